"""Runs that are killed with SIGKILL, anywhere, and go on: to the last bit as if nothing had happened.

One process imports everything once and forks a child for each run. A child kills itself at the n-th line it executes in the engine, or at the n-th
change it makes to the disk, so that a test can choose any instant and get the same one again.
"""
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

HERE = Path(__file__).absolute()
SEED = 3
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# The process that forks

class Countdown:
    "Notes what happens and kills the process just before number `at`, counted from 0."
    def __init__(self, at):
        self.at, self.seen = at, []

    def tick(self, what):
        if len(self.seen) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(what)


def count_lines(clock):
    "A tick for each line that the engine, and what saves a model, executes."
    places = ("/vlmamba_lite/training/", "/vlmamba_lite/model", "/vlmamba_lite/files.py")

    def line(frame, event, _):
        if event == "line":
            clock.tick(frame.f_lineno)
        return line
    sys.settrace(lambda frame, event, _: line if any(place in frame.f_code.co_filename for place in places) else None)


def count_changes(clock):
    "A tick before each file that is opened for writing, renamed, removed or pushed to the disk."
    def hear(event, arguments):
        if event in CHANGES or event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax":
            clock.tick(f"{event} {arguments[0]}")
    sys.addaudithook(hear)
    push = os.fsync

    def fsync(handle):
        clock.tick("fsync")
        push(handle)
    os.fsync = fsync


def small_school():
    "A small model's two stages with all that a checkpoint must hold: two optimizers, a mean of the weights, unequal batches."
    from vlmamba_lite.data.conversations import build_tokenizer
    from vlmamba_lite.data.easy_vqa import VQABatches, build_set, load_easy_vqa
    from vlmamba_lite.training.recipes import Stage
    rows = load_easy_vqa("train").select(range(0, 3600, 300))
    tokenizer = build_tokenizer(text for name in ("questions", "answers") for texts in rows[name] for text in texts)
    stages = (Stage(name="align", trains=("connector",), steps=3, batch_size=2, micro_batch=1, lr=1e-2, evaluations=3, keep=1),
              Stage(name="instruct", steps=4, batch_size=2, optimizer="muon", lr=3e-3, ema=0.9, evaluations=2, keep=2))
    data = build_set(rows, tokenizer, captions=True)
    return tokenizer, stages, {stage.name: VQABatches(data, stage.steps, stage.batch_size, SEED, questions=2) for stage in stages}


def train_once(school, folder, resume):
    "A run in a folder, from the beginning or from where it stopped."
    import torch

    from vlmamba_lite.model.presets import tiny_config
    from vlmamba_lite.model.vlmamba import VLMamba
    from vlmamba_lite.training.checkpoints import has_checkpoint
    from vlmamba_lite.training.loop import train
    tokenizer, stages, sources = school
    resume = resume and has_checkpoint(folder)
    torch.manual_seed(99 if resume else SEED)                            # what a resumed run draws must not matter
    model = VLMamba(tiny_config(tokenizer.get_vocab_size()), tokenizer)

    def evaluate(model):
        return {"norm": sum(p.detach().double().square().sum().item() for p in model.parameters())}
    train(model, stages, sources, folder, SEED, evaluate, resume, log_every=1)


def save_model(school, folder, seed):
    "A model of this seed, saved in shards."
    import torch

    from vlmamba_lite.model.presets import tiny_config
    from vlmamba_lite.model.vlmamba import VLMamba
    torch.manual_seed(seed)
    model = VLMamba(tiny_config(school[0].get_vocab_size()), school[0])
    model.save_pretrained(folder, max_shard_size=20_000)                     # as many shards, of the same names


def child(school, order):
    "What a forked process does: a run, or a model saved, with a countdown."
    clock, folder = Countdown(order.get("at")), order["folder"]
    {"lines": count_lines, "changes": count_changes}[order["count"]](clock)
    if "save" in order:
        save_model(school, folder, order["save"])
    else:
        train_once(school, folder, order["resume"])
    sys.settrace(None)
    Path(folder + ".seen").write_text(json.dumps(clock.seen))


def serve():
    "Reads orders, a line of JSON each, forks for them, and answers with how the child ended: 0, an error, or minus a signal."
    import torch
    torch.set_num_threads(1)                                             # no threads that a fork would lose
    school = small_school()
    with tempfile.TemporaryDirectory() as folder:
        train_once(school, folder, False)                                # loads all there is to load
    gc.freeze()
    print("ready", flush=True)
    for text in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(school, json.loads(text))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


# The tests

class Server:
    def __init__(self, log):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", str(HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=log.open("w"), text=True, env=environment)
        assert self.process.stdout.readline() == "ready\n", log.read_text()

    def run(self, folder, resume=False, count="lines", **order):
        "How a run ended."
        order = dict(folder=str(folder), resume=resume, count=count, **order)
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(30) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("log") / "stderr")
    yield server
    server.close()


def result(folder):
    "All a run leaves behind that does not depend on the clock."
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "memory_bytes", "cpu_seconds", "wall_seconds")
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "metrics.jsonl"}
    for path in (folder / "checkpoints").iterdir():
        files |= {f"{path.name}/{p.name}": p.read_bytes() for p in path.iterdir() if p.suffix == ".safetensors"}
    return [{name: value for name, value in line.items() if name not in timed} for line in lines], files


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    "The run that nobody kills: its folder, its result, and what happens in it, in lines and in changes of the disk."
    folder, seen = tmp_path_factory.mktemp("whole"), {}
    for count in ("lines", "changes"):
        assert server.run(folder / count, count=count) == 0
        seen[count] = json.loads((folder / f"{count}.seen").read_text())
    same(result(folder / "lines"), result(folder / "changes"))
    return folder / "lines", result(folder / "lines"), seen


def same(got, want):
    assert got[0] == want[0]                                             # losses, learning rates and scores, to the last bit
    assert sorted(got[1]) == sorted(want[1])
    assert not [name for name in got[1] if got[1][name] != want[1][name]]


def test_the_run_that_nobody_kills(whole):
    _, (lines, files), seen = whole
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 7 and len(set(losses)) == 7 and len([line for line in lines if "validation" in line]) == 5
    assert {"config.json", "tokenizer.json", "model.safetensors"} == {name for name in files if "/" not in name}
    assert any("optimizer" in name for name in files) and any("raw" in name for name in files)
    assert len(seen["lines"]) > 2000 and len(seen["changes"]) > 60


def checked(folder):
    "The newest checkpoint of a run that was killed loads, whatever else lies there. -> its step, 0 where there is none."
    from vlmamba_lite.model.vlmamba import VLMamba
    from vlmamba_lite.training.checkpoints import has_checkpoint, latest_checkpoint, verify_checkpoint
    if not has_checkpoint(folder):
        return 0
    path = latest_checkpoint(folder)
    verify_checkpoint(path)
    VLMamba.from_pretrained(path)
    return int(path.name.rpartition("-")[2])


def killed_and_resumed(server, whole, folder, **order):
    assert server.run(folder, **order) == -signal.SIGKILL
    step = checked(folder)
    assert server.run(folder, resume=True) == 0
    same(result(folder), whole[1])
    shutil.rmtree(folder)
    return step


def test_ten_random_instants(server, whole, tmp_path):
    chosen = sorted(random.Random(0).sample(range(len(whole[2]["lines"])), 10))
    steps = [killed_and_resumed(server, whole, tmp_path / str(at), at=at) for at in chosen]
    assert len(set(steps)) >= 3, steps                                   # they were killed at different places


def test_killed_again_and_again(server, whole, tmp_path):
    "Each attempt gets a little further."
    rng, ends = random.Random(1), []
    while True:
        ends.append(server.run(tmp_path / "run", resume=True, at=rng.randrange(2000, len(whole[2]["lines"]))))
        if ends[-1] == 0:
            break
        assert ends[-1] == -signal.SIGKILL and len(ends) < 30
        checked(tmp_path / "run")
    same(result(tmp_path / "run"), whole[1])


def test_a_kill_while_a_checkpoint_is_written_loses_nothing(server, whole, tmp_path):
    "From the moment one checkpoint stands to the moment the next one does and the old one is gone: there is always a whole one."
    seen = whole[2]["changes"]
    first, second = (next(i for i, what in enumerate(seen) if what.startswith("os.rename") and what.endswith(f"step-{n:08}.part")) for n in (2, 3))
    last = next(i for i in range(second, len(seen)) if seen[i].endswith("metrics.jsonl"))              # the next step has been made
    assert last - first > 20
    chosen = sorted({second - 1, second, second + 1, *range(first + 1, last, (last - first) // 5)})
    steps = [killed_and_resumed(server, whole, tmp_path / str(at), at=at, count="changes") for at in chosen]
    assert steps == sorted(steps) and set(steps) == {2, 3}


def test_a_kill_while_a_model_is_saved_leaves_one_of_the_two(server, tmp_path):
    "In shards over another model in shards: at every change of the disk there is the old model or the new one."
    from vlmamba_lite.model.vlmamba import VLMamba
    for seed in (1, 2):
        assert server.run(tmp_path / f"{seed}", save=seed, count="changes") == 0
    models = [VLMamba.from_pretrained(tmp_path / f"{seed}").state_dict() for seed in (1, 2)]
    found, at = [], 0
    while True:
        folder = shutil.copytree(tmp_path / "1", tmp_path / "run", dirs_exist_ok=True)
        end = server.run(folder, save=2, count="changes", at=at)
        now = VLMamba.from_pretrained(folder).state_dict()
        found.append([all(map(equal, now.values(), model.values())) for model in models].index(True))
        if end == 0:
            break
        assert end == -signal.SIGKILL
        at += 1
        if at % 5 == 0:                                                  # the next save clears up after it
            assert server.run(folder, save=1, count="changes") == 0
            assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "1").iterdir()}
        shutil.rmtree(folder)
    assert at > 20 and found == sorted(found) and set(found) == {0, 1}


def equal(a, b):
    return a.shape == b.shape and bool((a == b).all())


if __name__ == "__main__":
    serve()
