"""Models in other programs: the same answers from stock transformers, onnxruntime and llama.cpp, token for token.

`python tests/export_answers.py runs/lite_seed0` asks 200 questions of a trained model."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from measures import lively
from PIL import Image
from typer.testing import CliRunner

from vlmamba_lite import VLMamba
from vlmamba_lite.cli.commands import app
from vlmamba_lite.data.conversations import build_tokenizer, byte_tokenizer
from vlmamba_lite.language.model import MambaConfig, MambaLM
from vlmamba_lite.model.chat import PromptFormat
from vlmamba_lite.model.export import fill_folder, open_any
from vlmamba_lite.model.export_gguf import export_gguf, gguf_tensors, write_gguf
from vlmamba_lite.model.export_llava import export_llava
from vlmamba_lite.model.export_onnx import PictureGraph, export_onnx, open_onnx, plain_forms
from vlmamba_lite.model.presets import VLMambaConfig, tiny_config
from vlmamba_lite.vision.images import CLIP_COLOURS, Preprocess

QUESTIONS = ["what color is the shape?", "is there a red circle?", "what shape is blue?", "is the shape green?", "is the circle not red?"]
MAMBA2 = dict(mixer="mamba2", mixer_args=dict(headdim=8, d_state=16))


@pytest.fixture(scope="module")
def words():
    return build_tokenizer([*QUESTIONS, "yes", "no", "square", "teal"])


def language(tokenizer, **changes):
    return MambaConfig(32, 2, tokenizer.get_vocab_size(), **{**MAMBA2, "embedding_std": 0.4, **changes})


def llava_like(tokenizer, kind="clip", connector="mlp", lm=None, vision=None, args=None):
    torch.manual_seed(1)
    vision = vision or dict(kind=kind, config=f"tiny-{kind}")
    return lively(VLMamba(VLMambaConfig(vision, connector, args or {}, lm or language(tokenizer)), tokenizer)).eval()


def noise(count, size=(48, 40)):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


# --- plain transformers ----------------------------------------------------------------------------------------------

STOCK = """
import sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
place, *questions = sys.argv[1:]
for folder in (place + "/0", place + "/1", place + "/2"):
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    said = []
    for question in questions:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=Image.open(place + "/noise.png"), text=text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        said.append({"ids": inputs["input_ids"], "logits": logits, "text": processor.decode(new, skip_special_tokens=True)})
    torch.save(said, folder + "/said.pt")
assert not any(name.startswith("vlmamba") for name in sys.modules)
"""


def test_stock_transformers_gives_the_same_logits_and_text(words, tmp_path):
    models, picture = [], noise(1)[0]
    picture.save(tmp_path / "noise.png")
    for kind, mixer, template in (("clip", "mamba2", None), ("siglip", "mamba", None), ("siglip", "mamba2", "zephyr")):
        tokenizer = words if template is None else byte_tokenizer()
        lm = language(tokenizer, mixer=mixer, mixer_args={} if mixer == "mamba" else MAMBA2["mixer_args"], tie_embeddings=template is None)
        models.append((llava_like(tokenizer, kind, lm=lm), template))
        export_llava(models[-1][0], tmp_path / str(len(models) - 1), template)
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path), *QUESTIONS], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})
    for i, (model, template) in enumerate(models):
        prompt, visual, texts = PromptFormat(model.tokenizer, template), model.see(model.pixels(picture)), set()
        for question, said in zip(QUESTIONS, torch.load(tmp_path / str(i) / "said.pt", weights_only=True), strict=True):
            ids = prompt.encode(question)
            assert said["ids"][0].tolist() == [model.tokenizer.get_vocab_size()] * visual.shape[1] + ids
            with torch.no_grad():
                ours = model.language(inputs_embeds=torch.cat([visual, model.language.embed(torch.tensor([ids]))], 1)).logits
            assert (said["logits"][..., :ours.shape[-1]] - ours).abs().max() < 1e-4
            assert said["text"].strip() == model.ask(picture, question, 6, template).strip()
            texts.add(said["text"])
        assert len(texts) > 1


def test_what_llava_has_not_is_refused_in_one_line(words, tmp_path):
    square = dict(size=(32, 32), mean=CLIP_COLOURS[0], std=CLIP_COLOURS[1])
    for match, model in {
            "connector: got 'vss_l2', need 'mlp'": llava_like(words, connector="vss_l2"),
            "vision: got 'conv', need one 'clip' or 'siglip'": llava_like(words, vision=tiny_config(9).vision),
            "vision: got 'fused', need one": llava_like(words, vision=dict(kind="fused", towers=[dict(kind=k, config=f"tiny-{k}") for k in ("clip", "siglip")])),
            "vision: got 'dinov2', need one": llava_like(words, "dinov2"),
            "hidden_dim: got 8, need 32": llava_like(words, args=dict(hidden_dim=8)),
            "mixer: got 'attention', need 'mamba' or 'mamba2'": llava_like(words, lm=language(words, mixer="attention", mixer_args=dict(headdim=8))),
            "dt_limit: got": llava_like(words, lm=language(words, mixer_args=dict(headdim=8, dt_limit=(0., 0.1)))),
            "preprocess: got pictures of": llava_like(words, vision=dict(kind="clip", config="tiny-clip", preprocess=square | dict(size=(40, 40)))),
            "pad_to_square: got a border": llava_like(words, vision=dict(kind="clip", config="tiny-clip", preprocess=square | dict(pad_to_square=True))),
            "model: got MambaLM, need a VLMamba": MambaLM(language(words))}.items():
        with pytest.raises(ValueError, match=match) as error:
            export_llava(model, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# --- onnxruntime -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def onnx_folder(words, tmp_path_factory):
    torch.manual_seed(0)
    model, folder = lively(VLMamba.from_preset("tiny", words)).eval(), tmp_path_factory.mktemp("onnx")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    model.save_pretrained(folder / "model")
    said = CliRunner().invoke(app, ["export", "onnx", str(folder / "model"), str(folder / "out")])
    assert said.exit_code == 0, said.output
    return model, folder / "out"


def test_200_answers_of_onnxruntime_are_ours(onnx_folder):
    model, folder = onnx_folder
    read, ask = open_onnx(folder)
    said = []
    for picture in noise(40, (70, 50)):
        state, ours = read(picture), model.read_image(picture)
        for name, parts in zip(("conv", "ssm"), zip(*ours)):
            assert np.abs(state[name] - torch.stack(parts).numpy()).max() < 1e-4
        said += [(ask(state, question), model.ask(ours, question)) for question in QUESTIONS]
    assert len(said) == 200 and all(a == b for a, b in said) and len(set(said)) > 5


def test_the_graphs_are_plain_arithmetic_with_the_state_outside(onnx_folder):
    import onnx
    for name in ("picture", "embed", "step"):
        graph = onnx.load(onnx_folder[1] / f"{name}.onnx").graph
        assert {node.domain for node in graph.node} <= {""} and not {node.op_type for node in graph.node} & {"Loop", "Scan", "If"}
    assert [x.name for x in graph.input] == ["x", "conv", "ssm"] and [x.name for x in graph.output] == ["logits", "next_conv", "next_ssm"]


def test_the_folder_answers_in_a_shell_without_torch(onnx_folder, tmp_path):
    model, folder = onnx_folder
    picture = noise(1)[0]
    picture.save(tmp_path / "noise.png")
    code = ("import runpy, sys; sys.modules['torch'] = sys.modules['vlmamba_lite'] = None; sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    command = [sys.executable, "-I", "-c", code, str(folder / "ask.py"), str(tmp_path / "noise.png"), QUESTIONS[1]]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n") == model.ask(picture, QUESTIONS[1])


@pytest.mark.parametrize("size, crop, pad", [((64, 64), None, False), (64, (64, 64), False), (70, (64, 64), True), ((40, 40), (64, 64), False)])
def test_the_driver_prepares_pictures_as_we_do(onnx_folder, monkeypatch, tmp_path, size, crop, pad):
    import json
    import shutil

    import onnxruntime
    folder = shutil.copytree(onnx_folder[1], tmp_path / "copy")
    prepare = Preprocess(size, crop, *CLIP_COLOURS, "bilinear", pad)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"picture": vars(prepare)}))
    real, seen = onnxruntime.InferenceSession.run, []

    def run(self, names, given):
        seen.extend(given.get("pixels", ()))
        return real(self, names, given)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)
    for picture in noise(1, (70, 91)) + noise(1, (91, 70)):
        open_onnx(folder)[0](picture)
        assert np.abs(seen.pop() - prepare(picture)[0].numpy()).max() < 1e-5


def test_plain_forms_share_the_weights_and_leave_the_model_alone(words):
    model = VLMamba.from_preset("tiny", words)
    plain, pixels = plain_forms(model), torch.rand(1, 3, 64, 64) * 2 - 1
    assert all(a is b for a, b in zip(plain.parameters(), model.parameters()))
    assert model.connector.vss.mixers[0].backend == "auto" and plain.connector.vss.mixers[0].backend == "hillis_steele"
    assert torch.allclose(PictureGraph(plain)(pixels), model.eval().see(pixels), atol=1e-5)


def test_what_onnx_cannot_say_is_refused(words, tmp_path, monkeypatch):
    model = VLMamba.from_preset("tiny", words)
    for match, other in {"mixer: got 'attention'": llava_like(words, lm=language(words, mixer="attention", mixer_args=dict(headdim=8))),
                         "dtype: got torch.bfloat16": VLMamba.from_preset("tiny", words, dtype=torch.bfloat16),
                         "model: got MambaLM": MambaLM(language(words))}.items():
        with pytest.raises(ValueError, match=match):
            export_onnx(other, tmp_path / "out")
    with pytest.raises(ValueError, match="template: got 'plain'"):
        export_onnx(llava_like(byte_tokenizer()), tmp_path / "out", template="plain")
    monkeypatch.setattr("vlmamba_lite.model.export_onnx.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ModuleNotFoundError, match=r"export onnx needs onnxscript, .*: pip install 'vlmamba_lite\[export\]'"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- llama.cpp -------------------------------------------------------------------------------------------------------

def llama(path):
    "A function of (prompt, tokens) -> token numbers that llama.cpp writes greedily."
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), 256, 1, 0
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads, cpu.poll = 1, 0                                 # idle threads sleep
    server = xllamacpp.Server(params)

    def write(prompt, tokens=12):
        said = server.handle_completions(dict(prompt=prompt, n_predict=tokens, temperature=0.0, n_probs=1))
        return [token["id"] for token in said["choices"][0]["logprobs"]["content"]]
    return write


def ours(lm, ids, tokens=12, stops=(0,)):
    return lm.generate(torch.tensor([ids]), tokens, stops)[0, len(ids):].tolist()


@pytest.mark.parametrize("changes", [
    dict(mixer="mamba", mixer_args={}), dict(mixer="mamba", mixer_args=dict(d_state=12, d_conv=2, dt_rank=3, conv_bias=False), tie_embeddings=False),
    dict(), dict(mixer_args=dict(headdim=16, ngroups=2, d_state=24, expand=1), tie_embeddings=False, pad_vocab_size_multiple=64)])
def test_greedy_tokens_of_llama_cpp_are_ours(tmp_path, changes):
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    lm = lively(MambaLM(MambaConfig(32, 2, 61, **{**MAMBA2, "embedding_std": 0.4, **changes}))).eval()
    write_gguf(lm, tmp_path / "lm.gguf")
    write, prompts = llama(tmp_path / "lm.gguf"), torch.randint(1, 61, (50, 9)).tolist()
    said = [write(ids) for ids in prompts]
    assert said == [ours(lm, ids) for ids in prompts] and len(set(map(tuple, said))) > 20


def test_words_are_read_as_here(words, tmp_path):
    pytest.importorskip("gguf")
    model = llava_like(words)
    with torch.no_grad():
        model.language.backbone.embedding.weight[2] = 9.0                 # whoever reads <unk> says something else
    model.save_pretrained(tmp_path / "model")
    said = CliRunner().invoke(app, ["export", "gguf", str(tmp_path / "model"), str(tmp_path / "words.gguf")])
    assert said.exit_code == 0, said.output
    write = llama(tmp_path / "words.gguf")
    for question in QUESTIONS:
        ids = words.encode(question).ids
        assert write(question) == write(ids) == ours(model.language, ids, stops=(1,))


def test_texts_in_bytes_are_read_as_here(tmp_path):
    pytest.importorskip("gguf")
    tokenizer = byte_tokenizer(QUESTIONS * 9, 300)
    torch.manual_seed(0)
    lm = MambaLM(MambaConfig(32, 2, 310, **MAMBA2, embedding_std=0.4)).eval()          # ten tokens more than words
    with torch.no_grad():                                              # llama.cpp names no token that ends within a character
        lm.backbone.embedding.weight[[i for word, i in tokenizer.get_vocab().items() if not word.isascii() and word[0] != "Ġ"]] = 0
        lm.backbone.embedding.weight[300:] = 0
    write_gguf(lm, tmp_path / "bytes.gguf", tokenizer)
    write = llama(tmp_path / "bytes.gguf")
    for text in (*QUESTIONS, "Grüße, what's 42 + 1?\n\nThe end <|endoftext|>"):
        ids = tokenizer.encode(text).ids
        assert write(text) == write(ids) == ours(lm, ids)


def test_what_llama_cpp_has_not_is_refused(words, tmp_path, monkeypatch):
    for match, changes in {"mixer: got 'mamba3'": dict(mixer="mamba3", mixer_args={}), "d_intermediate: got 8": dict(d_intermediate=8),
                           "bias: got True": dict(mixer_args=dict(headdim=8, bias=True)), "expand: got 1.0, need 2": dict(mixer="mamba", mixer_args=dict(expand=1)),
                           "dt_limit: got": dict(mixer_args=dict(headdim=8, dt_limit=(0., 0.1))),
                           "norm_before_gate: got True": dict(mixer_args=dict(headdim=8, norm_before_gate=True))}.items():
        with pytest.raises(ValueError, match=match):
            write_gguf(MambaLM(language(words, **changes)), tmp_path / "lm.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="export gguf needs gguf, which is not installed: pip install gguf"):
        write_gguf(MambaLM(language(words)), tmp_path / "lm.gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_of_a_language_model_folder(tmp_path):
    pytest.importorskip("gguf")
    lm = MambaLM(MambaConfig(16, 1, 40, **MAMBA2))
    lm.save_pretrained(tmp_path / "lm")
    assert isinstance(open_any(tmp_path / "lm"), MambaLM)
    export_gguf(open_any(tmp_path / "lm"), tmp_path / "lm.gguf")
    import gguf
    for tensor in gguf.GGUFReader(tmp_path / "lm.gguf").tensors:
        assert np.array_equal(tensor.data.reshape(-1), gguf_tensors(lm)[tensor.name].reshape(-1))
    said = CliRunner().invoke(app, ["export", "onnx", str(tmp_path / "lm"), str(tmp_path / "out")])
    assert said.exit_code == 2 and "model: got MambaLM, need a VLMamba" in said.output and not (tmp_path / "out").exists()


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path):
    def half(part):
        (part / "a").write_text("new")
        raise ValueError("stop")
    fill_folder(tmp_path, lambda part: (part / "a").write_text("old"))
    with pytest.raises(ValueError, match="stop"):
        fill_folder(tmp_path, half)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
