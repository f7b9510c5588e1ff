"""Hostile use of the command, as a table: what is typed, how it ends, and the words it says. One process, no traceback."""
import io
import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import vlmamba
from house import ROOT

from vlmamba_lite.connectors.msc import MVSS
from vlmamba_lite.language.model import save_state
from vlmamba_lite.layers.mamba import Mamba
from vlmamba_lite.layers.mamba2 import Mamba2
from vlmamba_lite.layers.mamba3 import Mamba3
from vlmamba_lite.ops.selective_scan import backends, resolve

ASK = "what color is the shape?"
TALK = [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": "red"}]
YAML = {"twice": "seed: 1\nseed: 2", "twice_inside": "training: {lr: 1, lr: 2}", "list": "[1, 2]", "torn": "{a: ", "text": "hello", "empty": "",
        "tab": "a:\n\t- b", "alias": "a: *b", "date": "seed: 2001-99-99", "tag": "a: !!python/object:os.system {}", "odd": "sed: 1", "deep": "[" * 3000,
        "nan": "training: {lr: .nan}", "inf": "training: {epochs: .inf}", "none": "preset:", "key": "{[1, 2]: 3}", "number": "7: 8",
        "fine": "preset: tiny\ntraining: {steps: 3}"}
PARTS = {"d_model": -1, "vocab_size": 0, "mixer": "nope"}
CONFIGS = {**{name: lambda c, n=name, v=value: c["language"].update({n: v}) for name, value in PARTS.items()},
           "connector": lambda c: c.update(connector="glue"), "vision": lambda c: c.update(vision=[]), "extra": lambda c: c.update(extra=1),
           "missing": lambda c: c.pop("language"), "type": lambda c: c.update(model_type="llava"), "width": lambda c: c["vision"].update(dim="a")}


def write_models(folder, model):
    "A good model in m, and copies of it that are damaged, each in one way."
    model.save_pretrained(folder / "m")
    config, weights = json.loads((folder / "m/config.json").read_text()), load_file(folder / "m/model.safetensors")

    def copy(name):
        return shutil.copytree(folder / "m", folder / f"m_{name}")
    for name, change in CONFIGS.items():
        changed = json.loads(json.dumps(config))
        change(changed)
        (copy(name) / "config.json").write_text(json.dumps(changed))
    for name, text in {"list": "[]", "torn": "{", "bytes": b"\xff\xfe", "twice": '{"model_type": "vlmamba", "model_type": "vlmamba"}', "deep": "[" * 9999}.items():
        (copy(name) / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, fill in {"nan": float("nan"), "inf": float("inf")}.items():
        broken = {key: t.clone() for key, t in weights.items()}
        next(t for t in broken.values() if t.is_floating_point()).view(-1)[0] = fill
        save_file(broken, copy(name) / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), copy("fewer") / "model.safetensors")
    (copy("cut") / "model.safetensors").write_bytes((folder / "m/model.safetensors").read_bytes()[:-9])
    (copy("header") / "model.safetensors").write_bytes(b"\xff" * 64)
    (copy("switch") / "saving.json").write_text("{}")
    (copy("switch_out") / "saving.json").write_text('{"files": ["../x"]}')
    (copy("no_tokenizer") / "tokenizer.json").unlink()
    (copy("no_weights") / "model.safetensors").unlink()
    (copy("tokenizer") / "tokenizer.json").write_text('{"model": 3}')


def write_pictures(folder):
    Image.new("RGB", (40, 30), "red").save(folder / "ok.png")
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "torn.png").write_bytes((folder / "ok.png").read_bytes()[:50])
    Image.new("RGB", (9, 9)).save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model):
    "A folder with all that the commands of the table name."
    folder = tmp_path_factory.mktemp("hostile")
    model = make_model().eval()
    write_models(folder, model)
    write_pictures(folder)
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "bytes.yaml").write_bytes(b"seed: \xff")
    records = [{"id": str(i), "image": "ok.png", "conversations": TALK} for i in range(4)]
    (folder / "d.json").write_text(json.dumps(records))
    (folder / "torn.json").write_text(json.dumps(records)[:-5])
    (folder / "number.json").write_text("7")
    (folder / "turns.json").write_text(json.dumps([{**records[0], "conversations": 7}]))
    (folder / "gone.json").write_text(json.dumps([{**records[0], "image": "gone.png"}]))
    (folder / "file").write_text("mine")
    chat = model.chat(Image.open(folder / "ok.png"))
    chat.say(ASK, 2)
    save_state(chat.state, folder / "kept.state")
    (folder / "torn.state").write_bytes((folder / "kept.state").read_bytes()[:-3])
    return folder


def rows():
    "(exit code, command, words): words are a regular expression, looked for in all that is said."
    for name, words in {"list": "need settings with names", "torn": "not YAML", "text": "need settings with names", "empty": "need settings", "tab": "not YAML",
                        "alias": "not YAML", "date": "not YAML", "tag": "not YAML", "odd": "nearest known one is 'seed'", "deep": "config: deep.yaml is not YAML or JSON: maximum recursion", "bytes": "not YAML",
                        "twice": "'seed' twice", "twice_inside": "'lr' twice", "nan": "training.lr: got nan", "inf": "training.epochs: got inf",
                        "none": "preset: got None", "key": "config: key.yaml is not YAML or JSON: .*unhashable key", "number": "7: got 7, need a name", "nosuch": "config: no file nosuch.yaml"}.items():
        yield 2, f"train --config {name}.yaml", f"vlmamba: .*{words}"
    yield 0, "train --config fine.yaml --dry-run --data d.json", "preset: tiny"
    for change, words in {
            "seed=1.5": "seed: got 1.5", "seed=true": "seed: got True, need a number", "seed=-1": "seed: got -1", "seed=18446744073709551616": "seed: got",
            "seed=[1]": "seed: got", "seed=": "seed: got None", "preset=[1]": "preset: got", "preset=5": "preset: got", "output=5": "output: got 5",
            "workers=x": "workers: got 'x'", "workers=-1": "workers: got -1", "workers=100000": "workers: got 100000", "trackers=5": "trackers: got 5, need a list",
            "trackers=x": "trackers: got 'x', need a list", "data=5": "data: got 5", "stages=5": "stages: got 5", "stages=tiny": "stages: got 'tiny', need a list",
            "validation=d.json": "validation: got 'd.json', need a list", "pictures=5": "pictures: got 5", "pictures=nosuch": "pictures: no folder nosuch",
            "tokenizer=5": "tokenizer: got 5", "device=tpu": "device: got 'tpu'", "parallel=none": "parallel: got 'none'", "model.vision=5": "model.vision: got 5",
            "model.vision={kind: nope}": "kind: got 'nope'", "model.vision={dim: -1}": "model.vision: got", "model.vision={dim: 99999999999}": "model.vision: got",
            "model.vision={colour: 3}": "vision: got 'colour'", "model.connector_args.d_state=-1": "connector_args: got",
            "model.connector_args.d_state=9999999999": "connector_args: got", "model.connector_args.nope=1": "connector_args: ", "model.connector=glue": "connector: got 'glue'",
            "model.connector_args=[1]": "connector_args: got", "model.language.d_model=1000000000": "model.language: got", "model.language=gpt": "language: got 'gpt'",
            "model.scan=x": "scan: got 'x'", "model=5": "model: got 5, need settings", "model.visoin=x": "nearest known one is 'model.vision'",
            "training=5": "training: got 5", "training.lr=fast": "training.lr: got 'fast'", "training.lr=-1": "lr: got -1", "training.lr=.inf": "training.lr: got inf",
            "training.lr=true": "training.lr: got True, need a number", "training.betas=[1,2,3]": "training.betas", "training.betas=[0.9]": "training.betas", "training.betas=[0.9,1.5]": "training.betas",
            "training.betas=x": "training.betas: got 'x'", "training.trains=[nose]": "trains: got", "training.trains=3": "training.trains: got 3",
            "training.batch_size=10000000000": "batch_size: got 10000000000", "training.batch_size=0": "batch_size: got 0", "training.steps=1.5": "steps: got 1.5",
            "training.steps=0": "steps: got 0", "training.epochs=-1": "epochs: got", "training.epochs=1e300": "epochs: got", "training.ema=2": "ema: got 2",
            "training.clip=0": "clip: got 0", "training.warmup=7": "warmup: got 7", "training.optimizer=sgd": "optimizer: got 'sgd'",
            "training.precision=fp8": "precision: got 'fp8'", "training.keep=0": "keep: got 0", "training.recompute=maybe": "recompute: got 'maybe'",
            "training.lrr=1": "nearest known one is 'training.lr'", "training.tarin.lr=1": "nearest known one is 'training.train'",
            "easy_vqa.questions=0": "questions: got 0", "easy_vqa.questions=99999999": "questions: got", "easy_vqa.phases=[1]": "easy_vqa.phases",
            "easy_vqa.shift=-1": "shift: got -1", "easy_vqa=3": "easy_vqa: got 3", "weights=5": "weights: got 5", "weights={vision: x}": "weights: got",
            "weights={nose: x, vision: y}": "weights: got", "recipe=x": "recipe: got 'x'", "nope=1": "unknown setting 'nope'", "=1": "need NAME=VALUE", "x": "need NAME=VALUE",
            "seed={": "not YAML", "a..b=1": "unknown setting 'a'", "training.lr={a: 1, a: 2}": "not YAML: got 'a' twice, need it once"}.items():
        yield 2, f"train --preset tiny --data d.json {shlex.quote('--set=' + change)}", f"vlmamba: .*{words}"
    for options, words in {
            "--seed -1": "'--seed': .* greater than or equal to 0; vlmamba train --help", "--seed 1180591620717411303424": "got 1180591620717411303424, need at most",
            "--steps 0": "'--steps': .* greater than or equal to 1", "--steps x": "'--steps': .* a valid integer", "--workers -3": "'--workers': .* greater than",
            "--preset huge": "preset: got 'huge'", "--data nosuch.json": "data: no file", "--data torn.json": "torn.json", "--data number.json": "number.json",
            "--data empty.png": "empty.png", "--data d.json --data a=d.json": "all with a name", "--output file": "output: got the file file, need a folder",
            "--output file/x": "output: got file/x, need a place to write to", "--output /proc/x": "output: got /proc/x, need a place to write to", "--output /dev/null": "output: got the file /dev/null, need a folder",
            "--tracker nope": "trackers: got 'nope'", "--tokenizer nosuch": "tokenizer: ", "--tokenizer file": "file: expected value at line 1", "--resume": "resume: no checkpoint",
            "--device cuda:99": "device: got", "--validation nosuch": "no file or folder nosuch", "--pictures nosuch": "pictures: no folder", "--weights published": "weights: got 'published'",
            "--stage nose": "unknown stage 'nose'", "--nope": "No such option", "extra": "unexpected extra argument", "--processes 0": "'--processes': .* greater than",
            "--recipe nope": "recipe: got 'nope'", "--connector mlp --scan csm": "scan: got one"}.items():
        yield 2, f"train --preset tiny --data d.json --output new --steps 1 {options}", words
    yield 2, "train --preset tiny --data nose=d.json", "nearest known one is 'data.train'"
    for name in [*CONFIGS, "list", "torn", "bytes", "twice", "deep"]:
        yield 2, f"ask m_{name} ok.png '{ASK}'", "vlmamba: .*(config.json|model)"
    for name, words in {"nan": "NaN or infinite numbers in", "inf": "NaN or infinite numbers in", "fewer": "1 missing", "cut": "model.safetensors", "header": "model.safetensors",
                        "switch": "saving.json: got no list", "switch_out": "saving.json: got no list", "no_tokenizer": "no tokenizer.json", "no_weights": "no model.safetensors",
                        "tokenizer": "tokenizer.json", "nosuch": "no folder m_nosuch"}.items():
        for command in (f"ask m_{name} ok.png '{ASK}'", f"chat m_{name} ok.png", f"eval m_{name} --benchmark easy_vqa --limit 1 --output new"):
            yield 2, command, f"vlmamba: .*{words}"
    for name, words in {"bomb": "need at most 50,000,000", "empty": "is not a picture", "text": "is not a picture", "torn": "torn.png", "nosuch": "no file"}.items():
        yield 2, f"ask m {name}.png '{ASK}'", f"vlmamba: image: .*{words}"
        yield 2, f"chat m {name}.png", f"vlmamba: image: .*{words}"
    yield from [
        (0, f"ask m ok.png '{ASK}'", r"^\w+"), (2, f"ask m moving.gif '{ASK}'", "2 frames"), (2, f"ask m m '{ASK}'", "is not a file"), (2, f"ask m '' '{ASK}'", "image: . is not a file"),
        (2, f"ask '' ok.png '{ASK}'", "model: no config.json in ."), (2, "ask m ok.png ''", "need at least one word"), (2, "ask m ok.png zebra", "never read: zebra"),
        (2, f"ask m ok.png {'z' * 99_999}", r"^.{1,2100}$"), (2, "ask m ok.png '\udcff what'", "need text in UTF-8"), (2, f"ask file ok.png '{ASK}'", "no folder file"),
        (2, f"ask m ok.png '{ASK}' --device tpu", "device: got 'tpu'"), (2, "ask m ok.png", "Missing argument"), (2, f"ask m ok.png '{ASK}' more", "unexpected extra"),
        (2, "chat m --state nosuch", "state: no file nosuch"), (2, "chat m --state torn.state", "torn.state: "), (2, "chat m --state file", "file: .*header"), (2, "chat m --template nope", "template: got 'nope'"),
        (2, "chat m --template plain", "template: got 'plain'"),
        (2, "chat m --top-p 0", "top_p: got"), (2, "chat m --top-p 2", "'--top-p': .* (less|greater) than or equal to"), (2, "chat m --top-k 0", "'--top-k': .* (less|greater) than or equal to"), (2, "chat m --temperature -1", "'--temperature': .* (less|greater) than or equal to"),
        (2, "chat m --tokens 0", "'--tokens': .* (less|greater) than or equal to"), (2, "chat m --seed 99999999999999999999", "got 99999999999999999999, need at most"), (0, "chat m --state kept.state", "^$"),
        (2, "demo nosuch", "no folder nosuch"), (2, "demo m --port 0", "'--port': .* greater than"), (2, "demo m --port 99999", "'--port': .* less than"), (2, "demo m --host 999.1.1.1", "host: got '999.1.1.1'"),
        (2, "eval m --benchmark nope", "benchmark: got 'nope', need one of"), (2, "eval m --benchmark pope", "data: got None; pope needs"),
        (2, "eval m --benchmark pope --data nosuch", "data: no file questions.jsonl in nosuch"),
        (2, "eval m --benchmark easy_vqa --limit 0", "'--limit': .* greater than"), (2, "eval m --benchmark easy_vqa --output file --limit 1", "output: got the file file, need a folder"),
        (2, "eval m --benchmark easy_vqa --output /proc/x --limit 1", "output: got /proc/x, need a place to write to"), (2, "eval m --benchmark easy_vqa --device x", "device: got 'x'"),
        (2, "ablate --output file --dry-run", "output: got the file file, need a folder"), (2, "ablate --row nope --dry-run", "got 'nope'"), (2, "ablate --seeds 0", "'--seeds': .* greater than"),
        (0, "data check d.json", r"long: 0 of d.json \(id 0\)"), (1, "data check gone.json", r"sample 0 of gone.json \(id 0\): image: no file .*gone.png"), (2, "data check d.json --root nosuch", "root: no folder nosuch"),
        (2, "data check nosuch.json", "data: no file or folder nosuch.json"), (2, "data check torn.json", "torn.json"), (2, "data check number.json", "number.json"), (1, "data check turns.json", "got turns of type int, need a list"),
        (2, "data check d.json --template nope", "template: got 'nope'"), (2, "data check d.json --tokenizer file", "file: expected value at line 1"), (2, "data check d.json --limit 0", "'--limit': .* greater than"),
        (2, "data", "Usage: vlmamba data"), (2, "nope", "No such command 'nope'; vlmamba --help"), (2, "bench nope", "No such command 'nope'; vlmamba bench --help"), (2, "bench scaling --output m", "output: got the folder m, need a file"),
        (2, "bench prefix --output file/x", "output: got file/x, need a place to write to"), (2, "bench gpu --device cpu --output file", "output: got the file file, need a folder"), (2, "", "Usage: vlmamba"), (0, "--version", r"\d\.\d")]


ROWS = list(rows())


def test_the_table_is_long_enough():
    assert len(ROWS) >= 150 and len({command for _, command, _ in ROWS}) == len(ROWS)
    assert all(len(words) >= 8 or words in ("^$", r"^\w+", r"\d\.\d") for _, _, words in ROWS)


@pytest.mark.parametrize("code, command, words", ROWS, ids=[command[:60].encode("ascii", "replace").decode() for _, command, _ in ROWS])
def test_hostile_use(place, monkeypatch, code, command, words):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    before = sorted(path.name for path in place.iterdir())
    said = vlmamba(*shlex.split(command))
    assert said.code == code, said
    assert "Traceback" not in said.err + said.out and re.search(words, said.err or said.out), said
    if code == 2 and not words.startswith("Usage"):
        assert said.err.startswith("vlmamba: ") and said.err.count("\n") == 1 and said.out == "", said
    assert sorted(path.name for path in place.iterdir()) == before                     # nothing is left behind


# chat: lines that are typed

def typed(monkeypatch, lines):
    "`vlmamba chat m ok.png` with these bytes on stdin."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    return vlmamba("chat", "m", "ok.png", "--tokens", 2)


def test_bytes_that_are_no_text_do_not_end_a_conversation(place, monkeypatch):
    monkeypatch.chdir(place)
    said = typed(monkeypatch, b"\xff what\n" + ASK.encode() + b"\n")
    assert said.code == 0 and said.err.count("\n") == 1 and "need text in UTF-8" in said.err and said.out.count("\n") >= 1, said


@pytest.mark.parametrize("name, words", [("ok.png", "holds something else"), ("nosuch/x", "no folder nosuch"), ("m", "holds something else")])
def test_save_spares_what_is_there(place, monkeypatch, name, words):
    monkeypatch.chdir(place)
    before = (place / "ok.png").read_bytes()
    said = typed(monkeypatch, f"{ASK}\n/save {name}\n".encode())
    assert said.code == 0 and words in said.err and said.err.count("\n") == 1, said
    assert (place / "ok.png").read_bytes() == before and not (place / "nosuch").exists()


def test_save_writes_over_a_conversation(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    said = typed(monkeypatch, f"{ASK}\n/save {tmp_path}/a\n{ASK}\n/save {tmp_path}/a\n".encode())
    assert said.err == "" and (tmp_path / "a").exists()


# disks and pipes

class Full(io.StringIO):
    "A stdout that nothing can be written to."
    def __init__(self, error):
        super().__init__()
        self.error = error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("error, code, words", [(OSError(28, "No space left on device"), 2, "vlmamba: stdout: not written: No space left on device\n"),
                                                (BrokenPipeError(32, "Broken pipe"), 141, "")])
@pytest.mark.parametrize("command", ["--version", f"ask m ok.png '{ASK}'", "train --preset tiny --data d.json --dry-run", "train --help"])
def test_a_stdout_that_cannot_be_written(place, monkeypatch, capsys, command, error, code, words):
    from vlmamba_lite.cli.commands import app
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdout", Full(error))
    with pytest.raises(SystemExit) as stop:
        app(shlex.split(command), prog_name="vlmamba")
    assert stop.value.code == code and capsys.readouterr().err == words


def test_a_full_disk_is_one_line(place, monkeypatch, tmp_path):
    "safetensors' error is no OSError; what was saved before stays."
    from vlmamba_lite import files
    files.save_together(tmp_path, files.weight_files({"a": torch.ones(2)}))
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(*_, **__):
        raise files.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left on device; what was there before is unchanged") as caught:
        files.save_together(tmp_path, files.weight_files({"a": torch.zeros(2)}))
    assert caught.value.errno == 28 and (tmp_path / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    monkeypatch.chdir(place)
    said = vlmamba("train", "--preset", "tiny", "--data", "d.json", "--steps", 1, "--set", "training.batch_size=2", "--output", tmp_path / "run")
    assert said.code == 2 and said.err.count("\n") == 1 and "No space left" in said.err and "There is no checkpoint in" in said.err, said


def test_where_nothing_can_be_written_is_found_before(tmp_path):
    from vlmamba_lite.files import check_output
    (tmp_path / "file").write_text("")
    check_output(tmp_path / "a/b/c.json")
    check_output(tmp_path / "a/b", folder=True)
    for path, folder in ((tmp_path, False), (tmp_path / "file", True), (tmp_path / "file/x", False), ("/proc/x", False), (tmp_path / ("n" * 300), True)):
        with pytest.raises(ValueError, match="^output: "):
            check_output(path, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# layers

@pytest.mark.parametrize("make", [lambda **o: Mamba(16, **o), lambda **o: Mamba2(16, headdim=8, **o), lambda **o: Mamba3(16, headdim=8, d_state=8, **o),
                                  lambda **o: MVSS(16, headdim=8, **o)])
@pytest.mark.parametrize("expand", ["2", None, True, 0, -1, float("nan"), float("inf"), 0.01])
def test_expand_is_a_number_of_channels(make, expand):
    with pytest.raises(ValueError, match=re.escape(f"expand: got {expand!r}, need a number")):
        make(expand=expand)


@pytest.mark.parametrize("name", ["headdim", "ngroups"])
def test_heads_and_groups_are_whole_numbers(name):
    for value in ("4", 4.0, 0, None):
        for make in (Mamba2, Mamba3):
            with pytest.raises(ValueError, match=re.escape(f"{name}: got {value!r}, need a whole number")):
                make(16, **{"headdim": 8, name: value})


# numbers

def test_the_readme_times_the_scan_that_one_gets():
    "Where there is a compiler: rows that name no backend are of the one that `auto` takes."
    if backends()["cpp"]:
        pytest.skip("needs a compiler")
    taken = resolve("auto", torch.zeros(1, 2, 3), -torch.ones(2, 4))
    shown = re.findall(r"^\| selective scan, .* \*\*(\d+)x\*\*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    peers = json.loads((ROOT / "data/results/bench_scan.json").read_text())["peers"]
    assert shown and shown == [f"{row['ratio']:.0f}" for row in peers if row.get("backend", taken) == taken]
