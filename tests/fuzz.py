"""Files with mistakes in them: configurations, tokenizers, weights, the files of a run, and settings in YAML, changed at random.

    python tests/fuzz.py                          2,000 changes
    python tests/fuzz.py --minutes 60 --seed 7    as many as fit into an hour

Each is read as a user would, in one process. Right is a result, or one error of one line, a ValueError or an OSError, that
names a file or an argument. Anything else is printed with its number: `--seed S --only N` does that one again.
"""
import argparse
import json
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlmamba_lite.cli.settings import as_yaml, read_settings, resolve_settings
from vlmamba_lite.data.conversations import build_tokenizer
from vlmamba_lite.data.easy_vqa import VQABatches, build_set, load_easy_vqa
from vlmamba_lite.files import write_json
from vlmamba_lite.language.model import MambaConfig, MambaLM, load_state, save_state
from vlmamba_lite.model.presets import VLMambaConfig, tiny_config
from vlmamba_lite.model.vlmamba import VLMamba
from vlmamba_lite.training.checkpoints import MANIFEST, file_sha256
from vlmamba_lite.training.loop import train
from vlmamba_lite.training.recipes import Stage
from vlmamba_lite.training.results import MetricsLog, plot_curves, read_metrics

SECONDS, BYTES = 10, 6 * 2 ** 30                 # of CPU for one change, and of memory above what there was: more is a find
VALUES = ("null", "true", "[]", "{}", '""', '"x"', "-1", "0", "1", "2", "3.5", "1e999", "-1e999", "NaN", "1000", "1000000000", "4194304",
          "131072", "9" * 30, "9" * 5000, "-0.0", "1e-300", '"inf"', '"\\ud800"', '"../x"', '"\\u0000"', '["mamba2"]', '[1, 2]', '[null]',
          '{"a": 1}', "[" * 50 + "]" * 50, "[" * 5000, '{"a":' * 2000 + "1" + "}" * 2000, '"' + "z" * 3000 + '"', "", "\n", "'", "ä")
YAML = (".nan", ".inf", "!!python/object:os.system {}", "*a", "&a [*a]", "&a {x: *a}", "2001-99-99", "2001-01-01", "!!binary x", "!!set {a, b}",
        "? [1]", "{[1]: 2}", "1_000", "0x10", "on", "~", "!!float x", "<<: 3", "{<<: *a}", "!!timestamp 1", "1:30", "|\n  a", "@", "%", "\t")
BOMB = "[&b0 [x,x,x,x,x,x,x,x,x]" + "".join(f", &b{i + 1} [{','.join([f'*b{i}'] * 9)}]" for i in range(8)) + "]"


# changes of a file: (bytes, random numbers) -> bytes

def change_bytes(data, rng):
    "Bits turned, a piece cut out, put in, or said twice."
    data, at = bytearray(data), rng.randrange(max(len(data), 1))
    piece = slice(at, at + rng.choice((1, 2, 8, 100, len(data))))
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 3, 30))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[piece]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.choice((1, 3, 50)))
    elif kind == 3:
        data[at:at] = data[piece][:2000]
    else:
        data[at:at + 1] = rng.choice(VALUES).encode(errors="surrogatepass")
    return bytes(data)


def places(tree):
    "[(list or dict, key)] of everything in a tree."
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in [(tree, key), *places(tree[key])]]


def change_tree(data, rng, values=VALUES):
    "JSON with one or two values exchanged, moved, taken away, named otherwise, or named twice."
    tree, raw = json.loads(data), {}
    for n in range(rng.choice((1, 1, 2))):
        found = places(tree)
        if not found:
            break
        (inner, key), mark = rng.choice(found), f"@{n}@"
        kind = rng.randrange(6)
        if kind < 3:
            inner[key], raw[mark] = mark, rng.choice(values)
        elif kind == 3:
            del inner[key]
        elif kind == 4:
            other, name = rng.choice(found)
            inner[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) and name < len(other) else None
        elif isinstance(inner, dict):
            value = json.dumps(inner.pop(key))
            name = rng.choice((key, key, f"{key}x", key[:-1], "", "vision", "z" * 300))
            inner[key], raw[mark] = mark, f'{value}, "{name}": {rng.choice((value, rng.choice(values)))}'
    text = json.dumps(tree)
    for mark, value in raw.items():
        text = text.replace(f'"{mark}"', value, 1)
    return text.encode(errors="surrogatepass")


def change_json(data, rng):
    return (change_tree if rng.random() < 0.8 else change_bytes)(data, rng)


def change_lines(data, rng):
    "JSON, an object a line, one of which is changed."
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = change_json(lines[at], rng).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


def change_yaml(data, rng):
    "Settings in JSON, which is YAML, with values that only YAML has."
    return change_bytes(data, rng) if rng.random() < 0.2 else change_tree(data, rng, VALUES[:-3] + YAML * 2 + (BOMB,))


def change_weights(data, rng):
    "A safetensors file with another header, whose length is told rightly or not, or with other bytes."
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        return change_bytes(data, rng)
    header = change_json(data[8:8 + size], rng)
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) - 1, len(data), 2 ** 40, 2 ** 64 - 1))
    return said.to_bytes(8, "little") + header + data[8 + size:]


# what is changed, and how it is read

QUESTION, PICTURE = "what color is the shape?", Image.new("RGB", (40, 30), "red")


def open_model(folder):
    VLMamba.from_pretrained(folder).ask(PICTURE, QUESTION, 2)


def open_language(folder):
    MambaLM.from_pretrained(folder)(torch.zeros(1, 3, dtype=torch.long))


def open_metrics(folder):
    MetricsLog(folder / "metrics.jsonl", 2).write(step=3)
    plot_curves(read_metrics(folder / "metrics.jsonl")).draw_without_rendering()


class Run:
    "A run of three steps with a checkpoint at each, and how one goes on with it."
    def __init__(self, folder, model, data):
        self.model, self.stage = model, Stage(steps=3, batch_size=2, evaluations=3, keep=3)
        self.sources = {"train": VQABatches(data, 3, 2)}
        self.options = dict(evaluate=lambda _: {"all": 0.5}, log_every=1, workers=0, settings={"preset": "tiny", "training": {"steps": 3}})
        train(model, [self.stage], self.sources, folder, **self.options)

    def resume(self, folder):
        for path in (folder / "checkpoints").glob("*"):                  # the change is no damage: the list of files knows it
            manifest = json.loads((path / MANIFEST).read_bytes()) if path.name.startswith("step-") else {}
            names = [name for name in manifest if (path / name).is_file()]
            entries = {name: {"bytes": (path / name).stat().st_size, "sha256": file_sha256(path / name)} for name in names}
            (path / MANIFEST).write_text(json.dumps(entries))
        self.go_on(folder)

    def go_on(self, folder):
        train(self.model, [self.stage], self.sources, folder, resume=True, **self.options)


def write_cases(folder):
    "Writes what is right; -> [(folder, file in it, change, reader)]."
    rows = load_easy_vqa("train").select(range(0, 3600, 400))
    tokenizer = build_tokenizer(text for name in ("questions", "answers") for texts in rows[name] for text in texts)
    words = tokenizer.get_vocab_size()
    model = VLMamba(tiny_config(words), tokenizer).eval()
    model.save_pretrained(folder / "tiny")
    mamba = MambaConfig(16, 2, words, 8, "mamba", dict(d_state=4))
    vit = dict(kind="vit", dim=16, depth=1, heads=2, image_size=32)
    VLMamba(VLMambaConfig(vit, "msc_advanced", {"scan": "csm", "d_state": 4}, mamba), tokenizer).save_pretrained(folder / "vit", max_shard_size=8000)
    tower = dict(kind="siglip", config="tiny-siglip")
    VLMamba(VLMambaConfig(tower, "vss_mlp", {"scan": "bsm"}, mamba), tokenizer).save_pretrained(folder / "tower")
    MambaLM(mamba).save_pretrained(folder / "mamba")
    model.language.save_pretrained(folder / "mamba2")
    (folder / "original").mkdir()
    ours = dict(d_model=16, n_layer=2, vocab_size=words, ssm_cfg=dict(d_state=4), rms_norm=True, pad_vocab_size_multiple=8)
    write_json(folder / "original/config.json", ours)
    weights = load_file(folder / "mamba/model.safetensors")
    save_file(weights, folder / "original/model.safetensors")
    (folder / "state").mkdir()
    save_state(model.read_image(PICTURE), folder / "state/kept.state")
    data = build_set(rows, tokenizer)
    run = Run(folder / "run", model, data)
    (folder / "settings").mkdir()
    settings, _ = resolve_settings({"preset": "tiny", "training": {"steps": 3}})
    for name, given in {"whole": settings.model_dump(mode="json"), "short": {"preset": "tiny", "seed": 1, "training": {"lr": 1e-3}},
                        "parts": {"preset": "lite", "model": {"vision": {"kind": "vit", "dim": 16}, "connector_args": {"d_state": 4}},
                                  "data": {"train": ["a"]}, "easy_vqa": {"phases": [[1, [1, 1, 1, 1, 1]]]}}}.items():
        (folder / f"settings/{name}.yaml").write_text(json.dumps(given))
    (folder / "settings/plain.yaml").write_text(as_yaml(settings))
    state = sorted((folder / "run/checkpoints").iterdir())[-1].relative_to(folder / "run")
    texts = {name: (lambda at, name=name: resolve_settings(read_settings(at / f"{name}.yaml"))) for name in ("whole", "short", "parts", "plain")}
    models = [(name, file, change_json, open_model) for name in ("tiny", "vit", "tiny", "vit", "tower") for file in ("config.json", "tokenizer.json")]
    return models + [
        ("tiny", "model.safetensors", change_weights, open_model), ("vit", "model.safetensors.index.json", change_json, open_model),
        ("tiny", "config.json", change_json, open_model), ("mamba2", "model.safetensors", change_weights, open_language),
        *((name, "config.json", change_json, open_language) for name in ("mamba", "mamba2", "original")),
        ("state", "kept.state", change_weights, lambda at: load_state(at / "kept.state")),
        ("run", "metrics.jsonl", change_lines, open_metrics), ("run", "metrics.jsonl", change_lines, open_metrics),
        ("run", "metrics.jsonl", change_lines, run.go_on), ("run", "run_config.json", change_json, run.go_on),
        ("run", f"{state}/state.json", change_json, run.resume), ("run", f"{state}/state.json", change_json, run.go_on),
        ("run", f"{state}/{MANIFEST}", change_json, run.go_on), ("run", f"{state}/optimizer.safetensors", change_weights, run.resume),
        ("run", f"{state}/model.safetensors", change_weights, run.resume),
        *(("settings", f"{name}.yaml", change_bytes if name == "plain" else change_yaml, texts[name]) for name in (*texts, "whole", "parts"))]


# the run

class TooLong(BaseException):
    "A change that costs more than SECONDS."


def _stop(*_):
    raise TooLong(f"more than {SECONDS} s")


@contextmanager
def bounded():
    "A context with bounds of CPU seconds, for `signal.setitimer`, and of memory."
    before, memory = signal.signal(signal.SIGVTALRM, _stop), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, memory[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGVTALRM, before)


def _where(error):
    frames = traceback.extract_tb(error.__traceback__)
    return " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[1:][-6:])


def fault(read, folder, file):
    "What is wrong with how a folder is read in which `file` was changed; None where all is right."
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        read(folder)
    except (ValueError, OSError) as error:
        text = str(error)
        if "\n" in text:
            return f"{type(error).__name__}, not one line: {text[:300]!r}"
        if Path(file).name not in text and not re.match(r"[\w/.\[\] ',-]+: ", text):
            return f"{type(error).__name__} without a name: {text[:300]!r} at {_where(error)}"
    except BaseException as error:                                       # the kernels of Rust panic with one of these
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:200]!r} at {_where(error)}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def fuzz(folder, count=2000, seed=0, minutes=None, only=None):
    "Changes and reads -> (number of changes, {fault: first (number, folder, file, changed bytes)})."
    folder, finds, done, began = Path(folder), {}, 0, time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cases = write_cases(folder)
    clean = {name: folder / name for name, *_ in cases}
    with bounded():
        while (time.monotonic() - began < 60 * minutes) if minutes else done < count:
            rng, done = random.Random(f"{seed} {done}"), done + 1
            name, file, change, read = rng.choice(cases)
            if only not in (None, done):
                continue
            data = change((clean[name] / file).read_bytes(), rng)
            if only:
                print(name, file, data[:3000])
            place = clean[name]
            if name == "run":                                            # a run writes, what is only read is put back
                place = shutil.copytree(clean[name], folder / "changed")
            before = (place / file).read_bytes()
            (place / file).write_bytes(data)
            try:
                if (found := fault(read, place, file)) is not None:
                    finds.setdefault(f"{name}/{file}: {found}", (done, data))
            finally:
                (place / file).write_bytes(before)
                shutil.rmtree(folder / "changed", ignore_errors=True)
    return done, finds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        done, finds = fuzz(folder, **vars(options))
    for text, (number, _) in finds.items():
        print(f"{number}: {text}")
    print(f"{done} changes, {len(finds)} finds, {time.process_time() - before:.1f} s CPU")
    return bool(finds)


if __name__ == "__main__":
    raise SystemExit(main())
