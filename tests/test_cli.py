"""The command as someone at a terminal meets it: what a run leaves behind, what it says, and how it takes mistakes and Ctrl-C."""
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

FILES = {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "result.json", "run_config.json", "curves.png",
         "samples.png", "checkpoints"}
QUESTION = "what color is the shape?"
HERE = Path(__file__).resolve().parent.parent
START = "import sys; from vlmamba_lite.cli.commands import app; sys.argv[0] = 'vlmamba'; app()"
FEW = """
import vlmamba_lite.cli.runs as runs
def few(split, whole=runs.load_easy_vqa):
    rows = whole(split)
    return rows.select(range(0, len(rows), 50))
runs.load_easy_vqa = few
"""                                                           # 72, 8 and 20 pictures in place of all of them


def process(*arguments, code=None, **kwargs):
    "The command in a process of its own: the installed script, or `code` in its place."
    script = shutil.which("vlmamba", path=str(Path(sys.executable).parent))
    start = [script] if script and code is None else [sys.executable, "-c", code or START]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([*start, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs)


def finished(child):
    out, err = child.communicate(timeout=300)
    return SimpleNamespace(code=child.returncode, out=out, err=err)


def vlmamba(*arguments):
    "The command in this process."
    from vlmamba_lite.cli.commands import app
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            app([str(a) for a in arguments], prog_name="vlmamba")
        except SystemExit as stop:
            code = stop.code or 0
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def is_a_mistake(said, match):
    "One line that says what is wrong, on stderr, and exit code 2."
    assert said.code == 2 and re.search(match, said.err), said
    assert said.err.startswith("vlmamba: ") and said.err.count("\n") == 1 and said.err.endswith("\n") and "Traceback" not in said.err


def steps_of(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {kind: [line["step"] for line in lines if kind in line] for kind in ("loss", "validation")}


def contents(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    "Nothing is left in the folder the tests were started in."
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few(monkeypatch):
    space = {}
    from vlmamba_lite.cli import runs
    before = runs.load_easy_vqa
    exec(FEW, space)
    yield
    runs.load_easy_vqa = before


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A short run on all of easy-VQA, in a terminal, into the default folder."
    place = tmp_path_factory.mktemp("run")
    said = finished(process("train", "--preset", "tiny", "--seed", 3, "--steps", 3, cwd=place))
    assert said.code == 0, said
    return SimpleNamespace(folder=place / "runs" / "tiny-seed3", said=said)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from vlmamba_lite.data.easy_vqa import load_easy_vqa
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    load_easy_vqa("test")[0]["image"].save(path)
    return path


# train

def test_what_a_run_leaves(run):
    from vlmamba_lite.training.checkpoints import checkpoints, verify_checkpoint
    assert {p.name for p in run.folder.iterdir()} == FILES and [p.name for p in run.folder.parent.iterdir()] == ["tiny-seed3"]
    assert all((run.folder / name).read_bytes()[:4] == b"\x89PNG" for name in ("curves.png", "samples.png"))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps_of(run.folder) == {"loss": [2, 3], "validation": [2, 3]}
    assert all({"cpu_seconds", "wall_seconds"} < set(line) for line in lines if "loss" in line)
    began = json.loads((run.folder / "run_config.json").read_text())
    assert began["preset"] == "tiny" and began["seed"] == 3 and began["easy_vqa"]["questions"] == 5
    [stage] = began["stages"]
    assert began["training"][stage]["steps"] == 3 and began["training"][stage]["lr"] == 3e-3
    assert [path.name for path in checkpoints(run.folder)] == ["step-00000002", "step-00000003"]
    verify_checkpoint(checkpoints(run.folder)[-1])


def test_what_its_result_says(run):
    from vlmamba_lite.model.vlmamba import VLMamba
    result = json.loads((run.folder / "result.json").read_text())
    assert set(result) == {"preset", "recipe", "stages", "data", "seed", "steps", "loss", "validation", "test_accuracy", "accuracy_by_type", "test_questions", "floors", "parameters",
                           "train_cpu_seconds", "train_wall_seconds", "commit", "command", "hardware", "versions", "date"}
    assert result["validation"]["all"] >= 0 and result["data"] is None
    assert (result["preset"], result["seed"], result["steps"], result["test_questions"]) == ("tiny", 3, 3, 9673)
    assert set(result["accuracy_by_type"]) == {"all", "what color", "what shape", "yes/no color", "yes/no shape"}
    assert 0 <= result["test_accuracy"] == result["accuracy_by_type"]["all"] <= 1
    assert {name: round(100 * score, 2) for name, score in result["floors"].items()} == {"always yes": 37.33, "blind majority": 67.00}
    assert result["parameters"] == sum(p.numel() for p in VLMamba.from_pretrained(run.folder).parameters())
    assert result["train_cpu_seconds"] > 0 and result["train_wall_seconds"] > 0
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|release \d+\.\d+\.\d+", result["commit"])
    assert result["command"].endswith("train --preset tiny --seed 3 --steps 3")


def test_what_it_says(run):
    assert run.said.err == "" and "Traceback" not in run.said.out
    said = " ".join(run.said.out.split())
    accuracy = json.loads((run.folder / "result.json").read_text())["test_accuracy"]
    for words in (rf"this model, all \S {100 * accuracy:.2f}", r"baseline: blind majority \S 67\.00", "published: ",
                  "step 3, validation: all ", "3/3"):
        assert re.search(words, said), words
    assert "Everything is in runs/tiny-seed3." in said and re.search(r"vlmamba ask \S*runs/tiny-seed3 picture.png", said)


def test_a_run_is_not_overwritten(run):
    before = contents(run.folder)
    said = vlmamba("train", "--preset", "tiny", "--output", run.folder)
    is_a_mistake(said, "^vlmamba: output: .*tiny-seed3 already holds .*--resume.*--output")
    assert contents(run.folder) == before


def test_a_model_without_its_checkpoint_is_not_overwritten_either(run, tmp_path, few):
    for kept in ({"model.safetensors", "config.json", "tokenizer.json"}, {"result.json"}):
        folder = tmp_path / f"only{len(kept)}"
        folder.mkdir()
        for name in kept:
            shutil.copy(run.folder / name, folder)
        before = contents(folder)
        is_a_mistake(vlmamba("train", "--preset", "tiny", "--steps", 1, "--output", folder), "^vlmamba: output: .* already holds ")
        assert contents(folder) == before


def test_a_run_goes_on_only_as_it_began(run, tmp_path, few):
    before = contents(run.folder)
    again = ["train", "--resume", "--output", run.folder, "--seed", 3]
    is_a_mistake(vlmamba(*again, "--preset", "tiny", "--steps", 4), "steps.*4.*3.* with which this run began")
    is_a_mistake(vlmamba(*again[:4], "--preset", "tiny", "--steps", 3), "seed: got 0, need 3, with which this run began$")
    is_a_mistake(vlmamba(*again, "--preset", "lite", "--steps", 3), "preset: got lite, need tiny")
    is_a_mistake(vlmamba("train", "--preset", "tiny", "--resume", "--output", tmp_path / "none"), "resume: no checkpoint in ")
    assert contents(run.folder) == before and not (tmp_path / "none").exists()


def test_a_finished_run_is_finished_again(tmp_path, few):
    first = vlmamba("train", "--preset", "tiny", "--steps", 2, "--output", "here")
    assert first.code == 0, first
    weights, result = contents("here")["model.safetensors"], json.loads(Path("here/result.json").read_text())
    Path("here/result.json").unlink()                         # as if Ctrl-C had come while the test set was read
    again = vlmamba("train", "--preset", "tiny", "--steps", 2, "--output", "here", "--resume")
    assert again.code == 0 and {p.name for p in Path("here").iterdir()} == FILES
    assert contents("here")["model.safetensors"] == weights
    assert json.loads(Path("here/result.json").read_text())["accuracy_by_type"] == result["accuracy_by_type"]


WAIT = FEW + """
import signal, sys, time
from pathlib import Path
def waiting(bar, report, step=runs.TrainingBar.step):
    step(bar, report)
    if report.step == 12:                                     # after step 12 it waits for Ctrl-C
        Path("ready").touch()
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            time.sleep(0.01)
runs.TrainingBar.step = waiting
""" + START


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to another process")
def test_ctrl_c_leaves_a_run_that_goes_on_with_the_line_it_prints(tmp_path, picture, few):
    folder = tmp_path / "my run [red]"                        # a name a shell and rich would take for something else
    child = process("train", "--preset", "tiny", "--seed", 1, "--steps", 20, "--device", "cpu", "--output", folder, code=WAIT, cwd=tmp_path)
    until = time.monotonic() + 200
    while not (tmp_path / "ready").exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    said = finished(child)
    assert said.code == 130 and said.err == "" and "Traceback" not in said.out, said
    assert {p.name for p in folder.iterdir()} == FILES - {"result.json", "curves.png", "samples.png"}
    asked = vlmamba("ask", folder, picture, QUESTION)
    assert asked.code == 0 and asked.out.count("\n") == 1
    line = next(line for line in said.out.splitlines() if "--resume" in line)
    words = shlex.split(line)
    assert words[:2] == ["vlmamba", "train"] and "cpu" in words and str(folder) in words, line
    again = vlmamba(*words[1:])
    assert again.code == 0 and "12/20" not in again.out and "20/20" in again.out, again
    assert {p.name for p in folder.iterdir()} == FILES
    assert steps_of(folder) == {"loss": [10, 20], "validation": [10, 20]}
    assert json.loads((folder / "result.json").read_text())["steps"] == 20


@pytest.mark.parametrize("arguments, match", [
    (["--preset", "huge"], "^vlmamba: preset: got 'huge', need one of .*'lite'.*'vl-mamba-2.8b'.* or a row of ABLATIONS$"),
    (["--preset", "tiny", "--device", "tpu"], "^vlmamba: device: got 'tpu', need 'auto', 'cpu'"),
    (["--preset", "tiny", "--output", "a file"], "^vlmamba: .*a file")])
def test_mistakes_in_training(arguments, match, tmp_path, few):
    Path("a file").write_text("mine")
    is_a_mistake(vlmamba("train", *arguments), match)
    assert [p.name for p in tmp_path.iterdir()] == ["a file"] and Path("a file").read_text() == "mine"        # no folder is left behind


def test_a_gpu_that_is_not_there(run, picture, tmp_path):
    import torch
    if torch.cuda.is_available():
        pytest.skip("it is there")
    is_a_mistake(vlmamba("train", "--device", "cuda", "--output", "x"), r"device: got 'cuda', need 'auto', 'cpu' \(no CUDA GPU here\)")
    is_a_mistake(vlmamba("ask", run.folder, picture, QUESTION, "--device", "cuda"), "device: got 'cuda', need .*no CUDA GPU here")
    is_a_mistake(vlmamba("ask", run.folder, picture, QUESTION, "--device", "toaster"), "device: got 'toaster', need ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [
    ["train", "--steps", "0"], ["train", "--steps", "many"], ["train", "--seed", "-1"], ["train", "--nope"], ["ask"], ["ask", "model"],
    ["nope"], ["bench", "nope"], ["bench", "prefix", "--repeats", "0"]], ids=" ".join)
def test_a_command_that_is_none(arguments, tmp_path, few):
    said = vlmamba(*arguments)
    is_a_mistake(said, "; vlmamba.* --help lists what there is$")
    assert said.out == "" and not list(tmp_path.iterdir())


def test_run_training_for_notebooks(few, capsys):
    from vlmamba_lite.cli.runs import run_training
    folder, result = run_training({"preset": "tiny", "seed": 5}, {"training": {"steps": 1}}, quiet=True)
    assert folder == Path("runs/tiny-seed5") and {p.name for p in folder.iterdir()} == FILES
    assert result["test_accuracy"] == json.loads((folder / "result.json").read_text())["test_accuracy"] and "commit" not in result
    said = capsys.readouterr()
    assert "training" not in said.out and said.err == ""      # no progress bar


def test_the_seed_draws_the_first_weights(few):
    import torch

    from vlmamba_lite.cli.runs import prepare
    torch.manual_seed(123)
    model, data = prepare("tiny", 0)
    again, other = prepare("tiny", 0)[0].state_dict(), prepare("tiny", 1)[0].state_dict()
    assert all(torch.equal(t, again[name]) for name, t in model.state_dict().items())
    assert not torch.equal(model.vision.position, other["vision.position"])
    assert set(data) == {"train", "validation", "test"}
    with pytest.raises(ValueError, match="preset: got 'nope'"):
        prepare("nope", 0)



# train: settings

def settings_of(*layers):
    from vlmamba_lite.cli.settings import resolve_settings
    return resolve_settings(*layers)[0].model_dump()


def test_the_later_setting_wins(tmp_path):
    from vlmamba_lite.cli.commands import option_settings
    from vlmamba_lite.cli.settings import parse_change
    file = dict(preset="vl-mamba-2.8b", seed=3, training=dict(lr=1e-4, align=dict(lr=2e-4, clip=0.5)), model=dict(connector="vss_mlp", scan="csm"))
    first = settings_of(file)
    assert first["seed"] == 3 and [first["training"][s]["lr"] for s in ("align", "instruct")] == [2e-4, 1e-4]
    given = option_settings(dict(seed=4, steps=7, connector="vss_l2", scan=None, data=[], config=None))
    then = settings_of(file, given)
    assert then["seed"] == 4 and (then["model"]["connector"], then["model"]["scan"]) == ("vss_l2", "csm") and then["preset"] == "vl-mamba-2.8b"
    assert all(then["training"][s]["steps"] == 7 and then["training"][s]["epochs"] is None for s in ("align", "instruct"))
    last = settings_of(file, given, parse_change("training.lr=5e-5"), parse_change("training.align.epochs=2"), parse_change("seed=5"))
    assert last["seed"] == 5 and [last["training"][s]["lr"] for s in ("align", "instruct")] == [5e-5, 5e-5]        # over a stage's own in the file
    assert (last["training"]["align"]["epochs"], last["training"]["align"]["steps"], last["training"]["align"]["clip"]) == (2, None, 0.5)


def test_settings_bring_their_recipe():
    for preset, recipe, stages in (("vl-mamba-2.8b", "llava-1.5", ["align", "instruct"]), ("ml-mamba/t4/mamba2-780m", "ml-mamba", ["align", "instruct"])):
        settings = settings_of({"preset": preset})
        assert settings["recipe"] == recipe and settings["stages"] == stages == list(settings["training"])
    assert settings_of({"preset": "vl-mamba-2.8b", "stages": ["instruct"]})["stages"] == ["instruct"]
    assert settings_of({"preset": "vl-mamba-2.8b", "recipe": "cobra"})["stages"] == ["instruct"]
    lite = settings_of({"training": {"steps": 5}})
    [stage] = lite["stages"]
    assert lite["recipe"] == "lite" and lite["training"][stage]["steps"] == 5 and lite["training"][stage]["batch_size"] == 32
    assert lite["workers"] is None                            # as many as `train` takes: 2 beside a GPU, none beside a CPU


def test_resolved_settings_are_settings():
    import yaml

    from vlmamba_lite.cli.settings import as_yaml, resolve_settings
    for layer in ({}, {"preset": "ml-mamba-2.7b", "data": "a.json", "training": {"instruct": {"ema": 0.99}}}, {"preset": "tiny", "data": ["a", "b"]}):
        settings, stages = resolve_settings(layer)
        again, same = resolve_settings(yaml.safe_load(as_yaml(settings)))
        assert as_yaml(again) == as_yaml(settings) and same == stages
        assert resolve_settings(json.loads(settings.model_dump_json()))[1] == stages


def test_numbers_as_people_write_them():
    from vlmamba_lite.cli.settings import parse_change, resolve_settings
    change = parse_change("training.lr=1e-4")                 # YAML takes 1e-4 for a text
    assert resolve_settings(change)[1][0].lr == 1e-4 and resolve_settings({"training": {"betas": [0.9, "9.5e-1"]}})[1][0].betas[0] == 0.9
    assert settings_of({"easy_vqa": {"questions": 3}})["easy_vqa"]["questions"] == 3


@pytest.mark.parametrize("arguments, match", [
    ("--set training.lrr=1", "'training.lrr', the nearest known one is 'training.lr'$"),
    ("--set trainin.lr=1", "'trainin', the nearest known one is 'training'$"),
    ("--set model.conector=mlp", "'model.conector', the nearest known one is 'model.connector'$"),
    ("--preset vl-mamba-2.8b --set training.align.clp=1", "'training.align.clp', the nearest known one is 'training.align.clip'$"),
    ("--preset vl-mamba-2.8b --set training.aling.clip=1", "'training.aling', the nearest known one is 'training.align'$"),
    ("--preset vl-mamba-2.8b --stage alig", "unknown stage 'alig', the nearest known one is 'align'$"),
    ("--preset vl-mamba-2.8b --data aling=x", "'data.aling', the nearest known one is 'data.align'$"),
    ("--preset vl-mamba-2.8b --data align=x", "data: got none for the stage 'instruct'"),
    ("--preset vl-mamba-2.8b --data align=x --data y", "data, weights: got align=x, y, need all with a name"),
    ("--preset vl-mamba-2.8b", "data: got none for the preset 'vl-mamba-2.8b', need .* --data align=PATH --data instruct=PATH"),
    ("--preset vl-mamba-2.8b --data no.json", "data: no file or folder no.json"),
    ("--preset vl-mamba-2.8b --recipe llava", "recipe: got 'llava', need one of .*llava-1.5"),
    ("--set training.lr", "set: got 'training.lr', need NAME=VALUE"), ("--set training.lr={", "set: got .*not YAML"), ("--set =1", "set: got '=1'"),
    ("--set training=5", "training: got 5, need settings with names"), ("--set training.lr=fast", "training.lr: got 'fast', need a valid number"),
    ("--preset vl-mamba-2.8b --set training.align.steps=1.5", "training.align.steps: got 1.5, need a valid integer"), ("--set training.steps=0", "steps: got 0"),
    ("--preset vl-mamba-2.8b --set training.align=5", "training.align: got 5, need settings with names"),
    ("--preset vl-mamba-2.8b --precision fp8", "precision: got 'fp8', need one of fp32, bf16"),
    ("--weights published", "weights: got 'published' for the preset 'lite'"), ("--weights vision=a", "weights: got "),
    ("--weights a --weights b", "weights: got a, b, need one word, or one folder for each part"),
    ("--weights magic", "weights: got 'magic', need 'random'"), ("--connector glue", "connector: got 'glue'"), ("--scan spiral2", "scan: got 'spiral2'"),
    ("--connector mlp --scan csm", "scan: got one for the connector 'mlp'"), ("--tokenizer x", "tokenizer: got 'x' for the run on easy-VQA, which has its own; need data"),
    ("--set easy_vqa.questions=0", "easy_vqa.questions: got 0, need greater than 0"), ("--set data.lite=3", "data.* got "),
    ("--set model.connector_args=3", "model.connector_args: got 3, need settings with names"), ("--parallel none", "parallel: got 'none', need 'auto', 'ddp' or 'fsdp'"),
    ("--set seed=x", "seed: got 'x', need a valid integer"),
    ("--config none.yaml", "config: no file none.yaml"), ("--config list.yaml", "config: got list in list.yaml"),
    ("--config broken.yaml", "config: broken.yaml is not YAML or JSON"), ("--config odd.yaml", "'sed', the nearest known one is 'seed'$")])
def test_mistakes_in_settings(arguments, match, tmp_path, few):
    Path("list.yaml").write_text("[1, 2]")
    Path("broken.yaml").write_text("{a: ")
    Path("odd.yaml").write_text("sed: 1")
    is_a_mistake(vlmamba("train", *shlex.split(arguments)), match)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.yaml", "list.yaml", "odd.yaml"]


def test_a_dry_run_is_a_config(tmp_path):
    from vlmamba_lite.cli.settings import read_settings
    arguments = ["--preset", "tiny", "--recipe", "llava-1.5", "--data", "no.json", "--steps", 3, "--set", "training.max_length=64", "--processes", 2]
    said = vlmamba("train", *arguments, "--dry-run")
    assert said.code == 0 and said.err == "" and not list(tmp_path.iterdir()), said
    Path("run.yaml").write_text(said.out)
    again = vlmamba("train", "--config", "run.yaml", "--dry-run", "--processes", 2)
    assert again.out == said.out and read_settings("run.yaml")["training"]["align"]["steps"] == 3
    for words in ("# tiny ", "of each of 2 processes, stage align: 32 rows of 64 tokens", "stage instruct: 16 rows of 64 tokens", "# total "):
        assert words in said.out
    changed = vlmamba("train", "--config", "run.yaml", "--dry-run", "--seed", 9, "--set", "training.instruct.lr=1e-4")
    assert changed.out.count("lr: 0.0001\n") == 1 and "seed: 9" in changed.out


def test_a_dry_run_of_the_papers_model_needs_no_network_and_no_memory(monkeypatch):
    import socket

    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    said = vlmamba("train", "--preset", "vl-mamba-2.8b", "--stage", "align", "--dry-run")
    assert said.code == 0, said
    sizes = re.search(r"# vl-mamba-2.8b +([\d.,]+) +([\d.,]+) +([\d.,]+) +([\d.,]+)", said.out)
    assert sizes[3] == "2,768.3" and "siglip 428.2, mamba-2.8b-slimpj 2,768.3" in said.out             # published: 0.43 B and 2.77 B
    assert re.search(r"# weights +12\.\d GiB\n(#.*\n)+# total +\d+\.\d GiB\n# (fits|does not fit) in ", said.out)


def test_a_dry_run_of_the_small_model(few):
    said = vlmamba("train", "--dry-run")
    assert said.code == 0 and "preset: lite" in said.out and re.search(r"# lite .* 0\.4\n", said.out) and not Path("runs").exists(), said


def test_other_parts_and_numbers_for_the_small_model(few):
    said = vlmamba("train", "--preset", "tiny", "--connector", "mlp", "--set", "training.lr=1e-3", "--steps", 2, "--output", "here")
    assert said.code == 0, said
    began = json.loads(Path("here/run_config.json").read_text())
    assert began["model"]["connector"] == "mlp" and [stage["lr"] for stage in began["training"].values()] == [1e-3]
    again = vlmamba("train", "--config", "here/run_config.json", "--output", "here", "--resume")
    assert again.code == 0 and "Everything is in here" in again.out, again
    is_a_mistake(vlmamba("train", "--config", "here/run_config.json", "--output", "here", "--resume", "--connector", "vss_mlp"), "model.connector: got vss_mlp, need mlp")
    slower = ("train", "--config", "here/run_config.json", "--output", "here", "--set", "training.lr=5e-4")
    is_a_mistake(vlmamba(*slower, "--resume"), "lr.*with which this run began; --resume-changed accepts it$")
    again = vlmamba(*slower, "--resume-changed")              # it is meant
    assert again.code == 0 and "Everything is in here" in again.out, again
    assert [stage["lr"] for stage in json.loads(Path("here/run_config.json").read_text())["training"].values()] == [5e-4]
    is_a_mistake(vlmamba(*slower, "--output", "none", "--resume-changed"), "resume: no checkpoint in ")


# train: conversations

@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    "A folder with LLaVA's json, twice, and pictures: what colour is a square?"
    from PIL import Image
    folder = tmp_path_factory.mktemp("talks")
    for name, count in (("captions", 12), ("talks", 10)):
        records = []
        for i in range(count):
            color = ("red", "green", "blue")[i % 3]
            Image.new("RGB", (40, 30), color).save(folder / f"{name}{i}.png")
            turns = [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": color}]
            records.append({"id": f"{name}{i}", "image": f"{name}{i}.png", "conversations": turns})
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


TWO_STAGES = ["--preset", "tiny", "--recipe", "llava-1.5", "--steps", 3, "--precision", "fp32", "--set", "training.batch_size=4",
              "--set", "training.micro_batch=2", "--set", "training.max_length=48", "--set", "training.evaluations=1"]


@pytest.fixture(scope="module")
def two_stages(talks, tmp_path_factory):
    "A run of two stages on conversations."
    folder = tmp_path_factory.mktemp("two") / "run"
    said = vlmamba("train", *TWO_STAGES, "--data", f"align={talks / 'captions.json'}", "--data", f"instruct={talks / 'talks.json'}",
                   "--validation", talks / "talks.json", "--output", folder)
    return SimpleNamespace(folder=folder, said=said)


def test_two_stages_on_conversations(two_stages, talks, types):
    said, folder = two_stages.said, two_stages.folder
    assert said.code == 0 and said.err == "", said
    assert re.search(r"instruct .*6/6 +loss \d\.\d{3} +lr \S+ +[\d,]+ tokens/s +\d\.\d GiB +0:00:00 left", said.out) and said.out.count("validation: loss") == 2
    assert f"vlmamba chat {folder} picture.png" in said.out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if "validation" in line] == ["align", "instruct"]
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 6 and result["stages"] == ["align", "instruct"] and set(result["validation"]) == {"loss"} and "commit" in result
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "samples.png").read_bytes()[:4] == b"\x89PNG"
    assert types(["what color?"], folder, talks / "talks0.png", "--tokens", 4).code == 0
    again = vlmamba("train", "--config", folder / "run_config.json", "--output", folder, "--resume")
    assert again.code == 0 and "6/6" in again.out, again
    is_a_mistake(vlmamba("train", "--config", folder / "run_config.json", "--output", folder), "output: .* already holds a run")
    is_a_mistake(vlmamba("train", "--config", folder / "run_config.json", "--output", folder, "--resume", "--seed", 1), "seed: got 1, need 0")


def test_one_stage_after_the_other_is_both(two_stages, talks, tmp_path):
    "The second stage alone, from a connector that the first one has trained, in a run of its own."
    first = vlmamba("train", *TWO_STAGES, "--stage", "align", "--data", talks / "captions.json", "--output", "first")
    assert first.code == 0 and "align" in first.out and "instruct" not in first.out, first
    lines = [json.loads(line) for line in Path("first/metrics.jsonl").read_text().splitlines()]
    both = [json.loads(line) for line in (two_stages.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in both if "loss" in line and line["stage"] == "align"]


def test_only_the_first_process_speaks(talks, monkeypatch, two_stages):
    from vlmamba_lite.cli import commands, runs
    monkeypatch.setenv("RANK", "1")
    said = vlmamba("train", "--preset", "huge")
    assert (said.code, said.out, said.err) == (2, "", "")
    assert (vlmamba("train", "--preset", "tiny", "--data", "x", "--dry-run").out) == ""
    monkeypatch.setattr(runs, "train_plan", lambda *_, **__: (True, {"cpu": 1, "wall": 1}))
    left = []
    monkeypatch.setattr(commands.os, "_exit", left.append)                      # it would take the tests along
    arguments = ["--config", two_stages.folder / "run_config.json", "--output", "elsewhere"]
    assert vlmamba("train", *arguments) == SimpleNamespace(code=0, out="", err="") and left == [0]
    def broken(*_, **__):
        raise ValueError("sample 7: torn")
    monkeypatch.setattr(runs, "train_plan", broken)
    is_a_mistake(vlmamba("train", *arguments), "sample 7: torn")           # data that it alone has read
    def exploded(*_, **__):
        raise FloatingPointError("step 3: loss: got nan, need a finite number")
    monkeypatch.setattr(runs, "train_plan", exploded)
    said = vlmamba("train", *arguments)
    assert said.code == 1 and said.err == "vlmamba: step 3: loss: got nan, need a finite number\n"


def test_what_to_type_after_ctrl_c(two_stages, monkeypatch):
    from vlmamba_lite.cli import runs
    monkeypatch.setattr(runs, "train_plan", lambda *_, **__: (False, {"cpu": 1, "wall": 1}))
    from vlmamba_lite.training import checkpoints
    assert "before the first step was saved; the same command" in vlmamba("train", "--config", two_stages.folder / "run_config.json", "--output", "early").out
    monkeypatch.setattr(checkpoints, "has_checkpoint", lambda folder: True)
    arguments = ["train", "--config", two_stages.folder / "run_config.json", "--output", "my [run]", "--device", "cpu", "--tracker", "tensorboard"]
    said = vlmamba(*arguments)
    line = next(line for line in said.out.splitlines() if "--resume" in line)
    assert said.code == 130 and shlex.split(line) == ["vlmamba", "train", "--config", "my [run]/run_config.json", "--output", "my [run]", "--resume",
                                                      "--device", "cpu", "--tracker", "tensorboard"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the same command and --resume" in vlmamba(*arguments).out


def test_the_module_is_a_program():
    import vlmamba_lite
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    said = subprocess.run([sys.executable, "-m", "vlmamba_lite.cli", "--version"], capture_output=True, text=True, env=env)
    assert (said.returncode, said.stdout, said.stderr) == (0, vlmamba_lite.__version__ + "\n", "")


# ask

def test_ask_in_a_terminal(run, picture):
    from vlmamba_lite.data.pictures import open_image
    from vlmamba_lite.model.vlmamba import VLMamba
    want = VLMamba.from_pretrained(run.folder).ask(open_image(picture), QUESTION)
    said = finished(process("ask", run.folder, picture, QUESTION))
    assert (said.code, said.out, said.err) == (0, want + "\n", "")


def test_ask_for_json(run, picture):
    said = vlmamba("ask", run.folder, picture, QUESTION, "--json")
    assert said.code == 0 and said.err == "" and said.out.count("\n") == 1
    answer = vlmamba("ask", run.folder, picture, QUESTION).out.rstrip("\n")
    assert json.loads(said.out) == {"question": QUESTION, "answer": answer, "picture": str(picture), "model": str(run.folder)}


@pytest.mark.parametrize("mode, name", [("L", "gray.png"), ("RGBA", "clear.png"), ("P", "palette.gif"), ("RGB", "photo.jpg"),
                                        ("1", "ink.png")])
def test_ask_about_any_picture(run, tmp_path, mode, name):
    from PIL import Image
    Image.new("RGB", (211, 97), (200, 30, 30)).convert(mode).save(tmp_path / name)
    said = vlmamba("ask", run.folder, tmp_path / name, QUESTION)
    assert said.code == 0 and said.err == "" and said.out.count("\n") == 1


def test_mistakes_in_asking(run, picture, tmp_path):
    (tmp_path / "notes.png").write_text("hello")
    (tmp_path / "torn.png").write_bytes(picture.read_bytes()[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    for model, seen, question, match in (
            ("no/model", picture, QUESTION, "model: no folder no/model"), (tmp_path, picture, QUESTION, "model: no config.json in "),
            (run.folder, "no.png", QUESTION, r"no\.png"), (run.folder, "notes.png", QUESTION, r"notes\.png"),
            (run.folder, "torn.png", QUESTION, r"torn\.png"), (run.folder, "empty.png", QUESTION, r"empty\.png"),
            (run.folder, tmp_path, QUESTION, str(tmp_path)), ("no/model", "notes.png", "", r"notes\.png"),
            (run.folder, picture, " ", "question: got ' ', need at least one word"),
            (run.folder, picture, "what colour is it?", "never read: it;")):
        said = vlmamba("ask", model, seen, question)
        is_a_mistake(said, match)
        assert said.out == ""


def test_a_damaged_model_is_a_mistake_too(run, picture, tmp_path):
    for name, text in (("model.safetensors", "torn"), ("config.json", "{"), ("tokenizer.json", "{}")):
        folder = shutil.copytree(run.folder, tmp_path / name)
        (folder / name).write_text(text)
        is_a_mistake(vlmamba("ask", folder, picture, QUESTION), name)


def test_a_mistake_in_a_terminal(run, tmp_path):
    said = finished(process("ask", run.folder, "no.png", QUESTION, cwd=tmp_path))
    is_a_mistake(said, r"no\.png")
    assert said.out == ""


MODULES = """
import json, sys
from vlmamba_lite.cli.commands import app
app(sys.argv[1:], standalone_mode=False)
print(json.dumps(sorted(m for m in sys.modules if "." not in m)))
"""


def test_ask_imports_only_what_it_needs(run, picture):
    said = finished(process("ask", run.folder, picture, QUESTION, code=MODULES))
    modules = json.loads(said.out.splitlines()[-1])
    assert said.code == 0 and "torch" in modules
    assert not {"datasets", "matplotlib", "transformers", "pyarrow", "pandas", "nbdev", "fastcore"} & set(modules)


def test_help_and_version_do_not_wait_for_torch():
    import vlmamba_lite
    said = finished(process("--version", code=MODULES))
    modules = json.loads(said.out.splitlines()[-1])
    assert said.out.splitlines()[0] == vlmamba_lite.__version__ and not {"torch", "numpy"} & set(modules)
    for arguments, words in (([], ["train", "ask", "bench"]), (["ask"], ["--json", "--device", "QUESTION"]),
                             (["train"], ["--preset", "--seed", "--steps", "--output", "--device", "--resume", "--set", "torchrun"]),
                             (["chat"], ["--state", "--temperature", "/help"]), (["demo"], ["--host", "--share"]), (["ablate"], ["--minutes"]),
                             (["bench", "prefix"], ["--repeats", "--output"])):
        said = vlmamba(*arguments, "--help")
        assert said.code == 0 and all(word.lower() in said.out.lower() for word in words), said.out


def test_help_lists_the_registries(monkeypatch):
    "A connector, preset, recipe or benchmark that is new stands in the help by itself."
    from vlmamba_lite.cli.options import registries
    monkeypatch.setenv("COLUMNS", "200")
    lists = registries()
    for arguments, names in ((["train"], ["presets", "encoders", "connectors", "scans", "languages", "recipes", "trackers"]),
                             (["eval"], ["benchmarks"]), (["chat"], ["templates"]), (["data", "check"], ["templates"])):
        said = re.sub(r"[\s\u2502]+", " ", vlmamba(*arguments, "--help").out)
        assert all(entry in said for name in names for entry in lists[name].split(", "))
        assert not re.search(rf"{{({'|'.join(lists)})}}", said)


def commands(command, *names):
    "(words to type, command) of every command of the program."
    yield names, command
    for name, one in getattr(command, "commands", {}).items():
        yield from commands(one, *names, name)


def test_every_option_has_its_help_and_nothing_is_cut_off(monkeypatch):
    import typer

    from vlmamba_lite.cli.commands import app
    monkeypatch.setenv("COLUMNS", "80")
    for names, command in commands(typer.main.get_command(app)):
        assert all(getattr(parameter, "help", None) for parameter in command.params if parameter.name != "help"), names
        said = vlmamba(*names, "--help")
        assert said.code == 0 and "\u2026" not in said.out and max(map(len, said.out.splitlines())) <= 80, (names, said.out)


# bench

def test_bench_prefix_writes_a_result(tmp_path, small, make_model, monkeypatch):
    import torch

    from vlmamba_lite.cli import runs
    monkeypatch.setattr(runs, "prepare", lambda *_, **__: (make_model(), {"train": small.train}))
    threads = torch.get_num_threads()
    try:
        said = vlmamba("bench", "prefix", "--output", "sub/cost.json", "--repeats", 1, "--seed", 2)
    finally:
        torch.set_num_threads(threads)
    assert said.code == 0 and said.out.count("x cheaper") == 3, said
    result = json.loads(Path("sub/cost.json").read_text())
    assert [cost["questions"] for cost in result["costs"]] == [1, 4, 8]
    assert all(cost["ratio"] > 0 and cost["repeats"] == 1 for cost in result["costs"])
    assert (result["benchmark"], result["seed"]) == ("prefix", 2) and {"commit", "command", "hardware", "versions", "date"} < set(result)


@pytest.mark.parametrize("name", ["scan", "ssd", "block", "directions", "scaling"])
def test_bench_writes_what_it_measured(tmp_path, monkeypatch, name):
    import torch

    from vlmamba_lite.evaluation import benchmarks
    row = dict(shape=(2, 3), peer="transformers", ratio=12.34)
    monkeypatch.setattr(benchmarks, f"bench_{name}", lambda **given: {"peers": [row], "given": given})
    threads = torch.get_num_threads()
    try:
        said = vlmamba("bench", name, "--output", "sub/cost.json", "--repeats", 3, "--seed", 2, "--threads", 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert said.code == 0 and "(2, 3): ours 12.3x faster than transformers" in said.out, said
    result = json.loads(Path("sub/cost.json").read_text())
    assert result["given"] == {"repeats": 3, "seed": 2} and result["peers"][0]["ratio"] == 12.34
    assert (result["benchmark"], result["seed"], result["threads"]) == (name, 2, 1) and {"commit", "hardware", "date"} < set(result)


def test_bench_without_the_peer(monkeypatch):
    from vlmamba_lite.evaluation import benchmarks
    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: None)
    said = vlmamba("bench", "ssd", "--output", "cost.json")
    assert said.code == 2 and "compares with transformers, which is not installed: pip install transformers" in said.err, said
    assert not Path("cost.json").exists()


# ablate

@pytest.fixture
def grid(monkeypatch):
    "Chapter 20 with a grid that trains nothing; what it was asked for is in `.given`."
    def run_grid(rows=None, tasks=None, seeds=5, output=None, minutes=None, dry_run=False, threads=1, device="auto", on_row=None):
        fake.given = dict(rows=rows, tasks=tasks, seeds=seeds, output=output, minutes=minutes, dry_run=dry_run, threads=threads, device=device)
        if rows == ["nope"]:
            raise ValueError("rows: got 'nope', need some of ['mlp']")
        done = [dict(task="easy_vqa", row="mlp", seed=seed, test_accuracy=0.5) for seed in range(seeds)]
        for row in [] if dry_run else done:
            on_row(row)
        return done
    fake = SimpleNamespace(run_grid=run_grid, cost_table=lambda plan: f"{len(plan)} runs [left]")
    monkeypatch.setitem(sys.modules, "vlmamba_lite.evaluation.grid", fake)
    return fake


def test_ablate(grid, tmp_path):
    said = vlmamba("ablate", "--row", "mlp", "--row", "vss_l2", "--task", "easy_vqa", "--seeds", 2, "--minutes", 0.5, "--output", tmp_path / "[a]",
                   "--threads", 2, "--device", "cpu")
    assert said.code == 0 and said.err == "", said
    assert grid.given == dict(rows=["mlp", "vss_l2"], tasks=["easy_vqa"], seeds=2, output=tmp_path / "[a]", minutes=0.5, dry_run=False, threads=2,
                              device="cpu")
    assert said.out.splitlines()[:2] == ["easy_vqa, mlp, seed 0: 50.00 %", "easy_vqa, mlp, seed 1: 50.00 %"] and "2 results are in " in said.out


def test_ablate_says_what_it_would_cost(grid):
    assert vlmamba("ablate", "--dry-run").out == "5 runs [left]\n"
    assert grid.given == dict(rows=None, tasks=None, seeds=5, output=Path("data/results/ablations"), minutes=None, dry_run=True, threads=1, device="auto")
    is_a_mistake(vlmamba("ablate", "--row", "nope"), "^vlmamba: rows: got 'nope', need ")
    def interrupted(*_):
        raise KeyboardInterrupt
    grid.run_grid = interrupted
    said = vlmamba("ablate")
    assert said.code == 130 and "The same command goes on" in said.out and said.err == ""


# chat

@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    "A tiny model with random weights that reads bytes and writes printable ones, in a folder: conversations have the papers' form."
    import torch

    from vlmamba_lite.data.conversations import byte_tokenizer
    from vlmamba_lite.model.presets import tiny_config
    from vlmamba_lite.model.vlmamba import VLMamba
    tokenizer = byte_tokenizer()
    config = tiny_config(tokenizer.get_vocab_size())
    config.language.tie_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = VLMamba(config, tokenizer).eval()
    printable = torch.tensor([tokenizer.token_to_id(chr(c)) for c in range(33, 127)])
    head, mixer = model.language.lm_head.weight, model.language.backbone.layers[0].mixer
    with torch.no_grad():
        head.mul_(torch.zeros(len(head), 1).index_fill_(0, printable, 1))        # a row of zeros is never the likeliest
        mixer.D.zero_()                                       # what it says depends on all it has read
        mixer.A_log.sub_(3)
        mixer.out_proj.weight.mul_(5)
    folder = tmp_path_factory.mktemp("speaker")
    model.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model)


@pytest.fixture
def types(monkeypatch):
    "A function: what `vlmamba chat` says to someone who types some lines."
    def type_lines(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return vlmamba("chat", *arguments)
    return type_lines


def test_chat_says_what_the_model_says(speaker, picture, types):
    from vlmamba_lite.data.pictures import open_image
    said = types(["what is this?", "", "and now?"], speaker.folder, picture, "--tokens", 9, "--device", "cpu")
    chat = speaker.model.chat(open_image(picture))
    want = ["".join(chat.stream(text, 9)) for text in ("what is this?", "and now?")]
    assert (said.code, said.out, said.err) == (0, "".join(answer + "\n" for answer in want), "") and want[0] != want[1]
    assert types(["what is this?"], speaker.folder, picture, "--tokens", 9, "--template", "llava").out != want[0] + "\n"


def test_chat_draws_with_a_seed(speaker, picture, types):
    drawing = [speaker.folder, picture, "--tokens", 20, "--temperature", 1, "--top-p", 0.9, "--top-k", 50]
    first, again, other = (types(["what?"], *drawing, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_a_conversation_that_is_kept_goes_on(speaker, picture, types, tmp_path):
    options = ["--tokens", 7, "--template", "llava"]          # its first turn begins in another way than the rest
    whole = types(["one", "two", "three"], speaker.folder, picture, *options).out
    begun = types(["one", "two", "/save kept [1].state"], speaker.folder, picture, *options)
    gone_on = types(["three"], speaker.folder, "--state", "kept [1].state", *options)
    assert begun.err == gone_on.err == "" and begun.out + gone_on.out == whole
    long = types([*"abcdefgh", "/save long.state"], speaker.folder, picture, *options)
    assert long.err == "" and Path("long.state").stat().st_size == Path("kept [1].state").stat().st_size


def test_pictures_and_new_beginnings(speaker, picture, types, tmp_path):
    from PIL import Image

    from vlmamba_lite.data.pictures import open_image
    Image.new("RGB", (30, 20), (10, 200, 90)).save("second picture.png")
    said = types(["one", "/picture second picture.png", "two", "/new", "/picture second picture.png", "one", "/quit", "never read"],
                 speaker.folder, picture, "--tokens", 7)
    both, second = speaker.model.chat(open_image(picture)), open_image("second picture.png")
    want = ["".join(both.stream("one", 7)), both.show(second) or "".join(both.stream("two", 7)), "".join(speaker.model.chat(second).stream("one", 7))]
    assert (said.out, said.err) == ("".join(answer + "\n" for answer in want), "") and want[0] != want[2]


def test_mistakes_in_a_conversation_do_not_end_it(run, speaker, picture, types, tmp_path):
    said = types(["/save early.state", "/picture no.png", "/picture", "/save", "/sing", "/help", "what lorry?", QUESTION], run.folder, picture, "--tokens", 8)
    lines = said.err.splitlines()
    assert said.code == 0 and len(lines) == 6 and all(line.startswith("vlmamba: ") for line in lines), said
    for line, match in zip(lines, ("/save: got a conversation without a turn", "image: no file no.png", "/picture: got no file", "/save: got no file",
                                   "chat: got /sing, need /picture, /new, /save, /help, /quit", "never read: lorry")):
        assert match in line
    assert "/picture PATH" in said.out and not Path("early.state").exists()
    assert said.out.splitlines()[-1] == vlmamba("ask", run.folder, picture, QUESTION).out.strip()


def test_a_conversation_that_cannot_begin(run, speaker, picture, types, tmp_path):
    types(["one", "/save kept.state"], speaker.folder, picture, "--tokens", 2)
    Path("notes").write_text("hello")
    for arguments, match in (((tmp_path,), "model: no config.json in "), ((speaker.folder, "no.png"), "image: no file no.png"),
                             ((speaker.folder, "--state", "none"), "none"), ((speaker.folder, "--state", "notes"), "notes"),
                             ((speaker.folder, "--template", "x"), "template: got 'x'"), ((speaker.folder, "--device", "tpu"), "device: got 'tpu'"),
                             ((speaker.folder, "--top-p", "0"), "top_p: got")):
        is_a_mistake(types(["one"], *arguments), match)
    assert types([], speaker.folder, "--state", "kept.state").code == 0


def interrupted(speaker, monkeypatch, when):
    "A `Chat` whose model is stopped by Ctrl-C: while it reads, or after some tokens."
    language, stream, hidden = speaker.model.language, speaker.model.language.stream, speaker.model.language.hidden
    def stopped(*args, **kwargs):
        for i, token in enumerate(stream(*args, **kwargs)):
            if i == when:
                signal.raise_signal(signal.SIGINT)
            yield token
    def reading(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return hidden(*args, **kwargs)
    chat = speaker.model.chat()
    def has_read(ids, read=chat._read):
        read(ids)
        signal.raise_signal(signal.SIGINT)
    if when == "has read":
        monkeypatch.setattr(chat, "_read", has_read)
    else:
        monkeypatch.setattr(language, *(("hidden", reading) if when == "reading" else ("stream", stopped)))
    return chat


def test_ctrl_c_stops_an_answer_and_not_the_conversation(speaker, monkeypatch, capsys):
    from vlmamba_lite.cli.chat import print_answer
    with monkeypatch.context() as patch:
        chat = interrupted(speaker, patch, 3)
        assert not print_answer(chat, "one", max_new_tokens=9)
    assert capsys.readouterr().out.endswith(" [stopped]\n") and len(chat.turns) == 1
    plain = speaker.model.chat()
    plain.say("one", 3)
    assert chat.turns == plain.turns and chat.say("two", 5) == plain.say("two", 5)        # as if the answer had ended there


@pytest.mark.parametrize("when", ["reading", "has read"])
def test_ctrl_c_before_an_answer_takes_the_turn_back(speaker, monkeypatch, capsys, when):
    from vlmamba_lite.cli.chat import print_answer
    with monkeypatch.context() as patch:
        chat = interrupted(speaker, patch, when)
        assert not print_answer(chat, "something entirely different, long and winding", max_new_tokens=9)
    assert chat.turns == [] and chat.say("two", 8) == speaker.model.chat().say("two", 8)


def test_ctrl_c_where_a_question_is_typed(monkeypatch, capsys):
    from vlmamba_lite.cli import chat
    def typed(prompt):
        raise KeyboardInterrupt
    monkeypatch.setattr("builtins.input", typed)
    assert chat.next_line() == "" and "/quit or Ctrl-D leaves" in capsys.readouterr().out
