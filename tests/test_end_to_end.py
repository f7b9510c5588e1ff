"""From published formats to an answer: parts saved by transformers and a LLaVA json -> both stages -> eval -> ask, by the command line alone."""
import json
import random

import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from vlmamba_lite.language.model import MambaLM
from vlmamba_lite.cli.commands import app
from vlmamba_lite.data.conversations import byte_tokenizer
from vlmamba_lite.model.vlmamba import VLMamba
from vlmamba_lite.vision.towers import load_encoder

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("square", "circle")
STEPS, SAMPLES = 3, 100


# The files that a person brings

def draw(path, colour, shape):
    picture = Image.new("RGB", (40, 30), "white")
    pen = ImageDraw.Draw(picture)
    (pen.rectangle if shape == "square" else pen.ellipse)((10, 5, 30, 25), fill=colour)
    picture.save(path)


def write_data(folder):
    "100 pictures as LLaVA's json, captions for stage 1 and one to three turns for stage 2; and one of them as POPE asks about it."
    rng, records, captions = random.Random(0), [], []
    (folder / "pictures").mkdir()
    for i in range(SAMPLES):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        draw(folder / "pictures" / f"{i}.png", colour, shape)
        turns = [("What is this?", f"A {colour} {shape}."), ("Which colour?", colour), ("Which shape?", f"It is a {shape}, " * rng.randint(1, 4))]
        talk = [{"from": who, "value": text} for turn in turns[:rng.randint(1, 3)] for who, text in zip(("human", "gpt"), turn)]
        talk[0]["value"] = "<image>\n" + talk[0]["value"]
        records.append({"id": str(i), "image": f"pictures/{i}.png", "conversations": talk})
        captions.append({**records[-1], "conversations": talk[:2]})
    (folder / "instruct.json").write_text(json.dumps(records))
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "pope" / "val2014").mkdir(parents=True)
    draw(folder / "pope" / "val2014" / "0.png", "red", "square")
    lines = [{"image": "val2014/0.png", "question": f"Is there a {shape}?", "answer": "yes", "category": kind}
             for kind in ("random", "popular", "adversarial") for shape in SHAPES]
    (folder / "pope" / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_parts(folder):
    "Random SigLIP, DINOv2, Mamba and Mamba-2 models, as transformers saves them."
    import transformers as t
    eye = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, patch_size=8, image_size=32)
    settings = dict(size=dict(height=32, width=32), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    words = dict(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=8, expand=2)
    torch.manual_seed(0)
    for name, model in {
            "siglip": t.SiglipVisionModel(t.SiglipVisionConfig(intermediate_size=64, **eye)),
            "dinov2": t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(num_register_tokens=4, **eye)),
            "mamba": t.MambaForCausalLM(t.MambaConfig(**words)),
            "mamba2": t.Mamba2ForCausalLM(t.Mamba2Config(num_heads=8, head_dim=8, n_groups=1, chunk_size=16, **words))}.items():
        model.save_pretrained(folder / name)
        if name in ("siglip", "dinov2"):
            (folder / name / "preprocessor_config.json").write_text(json.dumps(settings))
        else:
            byte_tokenizer().save(str(folder / name / "tokenizer.json"))


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brought")
    write_data(folder)
    write_parts(folder)
    return folder


# What a person does with them

def vlmamba(*arguments, **options):
    "What the command prints; it must succeed."
    run = CliRunner().invoke(app, list(map(str, arguments)), **options)
    assert run.exit_code == 0, (run.output[-2000:], run.exception)
    return run.output


def weights_of(model, part):
    return {name: t.clone() for name, t in getattr(model, part).state_dict().items()}


def moved(before, after):
    "Which of these tensors are not bit for bit what they were."
    assert sorted(before) == sorted(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


# preset: encoder, language model, connector and its scan, precision
MODELS = {"vl-mamba-2.8b": ("siglip", "mamba", ("vss_l2", "bsm"), "bf16"),
          "ml-mamba-2.7b": ("dinov2 + siglip", "mamba2", ("msc_advanced", "bsm"), "fp32")}


@pytest.fixture(scope="module", params=MODELS)
def trained(request, brought):
    "Both stages of the recipe -> (the preset, the run's folder, the source of its encoder)."
    eye, words, _, precision = MODELS[request.param]
    eye = " + ".join(str(brought / name.strip()) for name in eye.split("+"))
    folder, changes = brought / "runs" / request.param, dict(batch_size=8, micro_batch=4, evaluations=STEPS, keep=2 * STEPS)
    sets = [f"--set=training.{stage}.{name}={value}" for stage in ("align", "instruct") for name, value in changes.items()]
    vlmamba("train", "--preset", request.param, "--weights", f"vision={eye}", "--weights", f"language={brought / words}",
            "--data", f"align={brought / 'captions.json'}", "--data", f"instruct={brought / 'instruct.json'}",
            "--steps", STEPS, "--precision", precision, "--device", "cpu", "--output", folder, *sets)
    return request.param, folder, eye


def at_step(folder, step):
    return VLMamba.from_pretrained(folder / "checkpoints" / f"step-{step:08d}")


def test_the_parts_are_the_papers(trained, brought):
    preset, folder, _ = trained
    model = VLMamba.from_pretrained(folder)
    eye, words, (connector, scan), _ = MODELS[preset]
    assert (model.config.connector, model.config.connector_args["scan"]) == (connector, scan)
    assert model.config.language.mixer == words and model.connector.vision_dim == 32 * (eye.count("+") + 1)
    assert model.see(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 32)


def test_what_is_frozen_and_what_moves(trained, brought):
    "Bit for bit: the encoder never, the language model only in stage 2, the connector in both."
    preset, folder, eye = trained
    eye, words = load_encoder(eye), MODELS[preset][1]
    words = MambaLM.from_pretrained(str(brought / words), vocab_size=byte_tokenizer().get_vocab_size())
    start, aligned, end = at_step(folder, 1), at_step(folder, STEPS), VLMamba.from_pretrained(folder)       # the first step has the learning rate 0
    for model in (start, aligned, end):
        assert not moved(eye.state_dict(), weights_of(model, "vision"))
    for model in (start, aligned):
        assert not moved(words.state_dict(), weights_of(model, "language"))
    assert moved(weights_of(start, "connector"), weights_of(aligned, "connector")) >= {n for n, _ in start.connector.named_parameters()}
    assert moved(weights_of(aligned, "connector"), weights_of(end, "connector"))
    changed = moved(weights_of(aligned, "language"), weights_of(end, "language"))
    assert len(changed) > 0.9 * len(words.state_dict())


def test_the_curve_and_the_files(trained):
    _, folder, _ = trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stages = [line["stage"] for line in lines if "loss" in line]
    assert set(stages) == {"align", "instruct"} and all(2 < line["loss"] < 8 for line in lines if "loss" in line)        # log 257 is 5.5
    assert {"config.json", "tokenizer.json", "model.safetensors", "metrics.jsonl", "run_config.json"} <= {p.name for p in folder.iterdir()}


def test_eval(trained, brought):
    _, folder, _ = trained
    said = vlmamba("eval", folder, "--benchmark", "pope", "--data", brought / "pope", "--tokens", 3)
    result = json.loads((folder / "eval" / "pope" / "result.json").read_text())
    assert result["questions"] == 6 and "pope, 6 questions" in said and 0 <= result["scores"]["accuracy"] <= 1
    lines = [json.loads(line) for line in (folder / "eval" / "pope" / "predictions.jsonl").read_text().splitlines()]
    model, picture = VLMamba.from_pretrained(folder), Image.open(brought / "pope" / "val2014" / "0.png").convert("RGB")
    assert [line["prediction"] for line in lines] == [model.ask(picture, line["question"], 3) for line in lines]


def test_ask(trained, brought):
    _, folder, _ = trained
    picture = brought / "pictures" / "5.png"
    said = vlmamba("ask", folder, picture, "What is this?")
    model = VLMamba.from_pretrained(folder)
    answer = model.ask(Image.open(picture).convert("RGB"), "What is this?")
    assert answer.strip() in said


def test_a_run_goes_on(trained, brought):
    "Stage 1 of one run is the beginning of another: its connector is taken over."
    preset, folder, eye = trained
    sources = dict(vision=eye, language=str(brought / MODELS[preset][1]), connector=folder / "checkpoints" / f"step-{STEPS:08d}")
    model = VLMamba.from_preset(preset, weights=sources)
    assert not moved(weights_of(at_step(folder, STEPS), "connector"), weights_of(model, "connector"))
