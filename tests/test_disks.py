"""Disks, pipes and signals that are real, and processes of their own: whatever ends a training, it ends in one line and goes on to the same bits."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_cli import vlmamba
from test_hostile import ASK, TALK

from vlmamba_lite.cli import runs
from vlmamba_lite.cli.commands import app
from vlmamba_lite.training.checkpoints import checkpoints
from vlmamba_lite.training.results import read_metrics
from vlmamba_lite.training.run import Run


def begin(arguments, out, err, prepare):
    "The command in a process of its own, which does `prepare()` first; -> its number."
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        torch.set_num_threads(1)
        os.dup2(out, 1), os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        prepare()
        app([str(argument) for argument in arguments], prog_name="vlmamba")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture
def command(tmp_path):
    "A function: the command in a process of its own -> its exit code, or minus the signal, and what it said."
    def run(*arguments, out=None, prepare=lambda: None):
        with open(tmp_path / "out", "w+") as stdout, open(tmp_path / "err", "w+") as stderr:
            status = os.waitpid(begin(arguments, stdout.fileno() if out is None else out, stderr.fileno(), prepare), 0)[1]
            return SimpleNamespace(code=os.waitstatus_to_exitcode(status), out=Path(stdout.name).read_text(), err=Path(stderr.name).read_text())
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model):
    "A folder with data, a model, and in alone a run that nobody disturbed."
    folder = tmp_path_factory.mktemp("disks")
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 99, 7)).save(folder / f"{i}.png")
    (folder / "d.json").write_text(json.dumps([{"id": str(i), "image": f"{i}.png", "conversations": TALK} for i in range(6)]))
    make_model().eval().save_pretrained(folder / "m")
    assert vlmamba(*training(folder, folder / "alone")).code == 0
    return folder


def training(place, folder, *more):
    options = {"steps": 6, "batch_size": 2, "evaluations": 3, "keep": 3}
    changes = [f"--set=training.{name}={value}" for name, value in options.items()]
    return ["train", "--preset", "tiny", "--data", place / "d.json", *changes, "--output", folder, *more]


def same_end(place, folder):
    "Weights bit for bit, the log but for its times."
    def log(path):
        return [(line["step"], line.get("loss"), line.get("lr")) for line in read_metrics(path / "metrics.jsonl")]
    return (folder / "model.safetensors").read_bytes() == (place / "alone/model.safetensors").read_bytes() and log(folder) == log(place / "alone")


def one_line(said, words):
    return said.code == 2 and said.err.startswith("vlmamba: ") and said.err.count("\n") == 1 and words in said.err and "Traceback" not in said.out


# a full disk

@pytest.fixture
def disk(tmp_path):
    "A function that makes a disk of some kilobytes in tmp_path/disk, or gives it another size."
    where = tmp_path / "disk"
    where.mkdir()

    def sized(kilobytes):
        how = "remount," if where.is_mount() else ""
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how}size={kilobytes}k", "tmpfs", where], capture_output=True).returncode:
            pytest.skip("needs leave to mount a disk")
        return where
    yield sized
    if where.is_mount():
        subprocess.run(["umount", where], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a disk")
@pytest.mark.parametrize("fits, words", [(0.5, "There is no checkpoint in"), (1.5, "--resume goes on with the last one")])
def test_a_full_disk(place, disk, fits, words):
    "The disk holds no checkpoint, or one of three; with room the run goes on to the same end."
    size = sum(path.stat().st_size + 4096 for path in checkpoints(place / "alone")[0].iterdir()) / 1024
    folder = disk(int(size * fits) + 30) / "run"
    said = vlmamba(*training(place, folder))
    assert one_line(said, "No space left on device") and words in said.err, said
    disk(50_000)
    resume = ["--resume"] if checkpoints(folder) else []
    assert len(checkpoints(folder)) == int(fits) and vlmamba(*training(place, folder, *resume)).code == 0 and same_end(place, folder)


# pipes

@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"]])
def test_a_pipe_that_nobody_reads(arguments):
    "A whole interpreter, which flushes once more at its end."
    program = subprocess.Popen([sys.executable, "-m", "vlmamba_lite.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program.stdout.close()
    assert program.stderr.read() == "" and program.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_is_full(command, place):
    with open("/dev/full", "w") as full:
        assert one_line(command("ask", place / "m", place / "0.png", ASK, out=full.fileno()), "stdout: not written: No space left on device")


@pytest.mark.parametrize("arguments", [["ask", "m", "0.png", ASK], ["train", "--preset", "tiny", "--data", "d.json", "--dry-run"], ["data", "check", "d.json"]])
def test_answers_that_nobody_reads(command, place, monkeypatch, arguments):
    monkeypatch.chdir(place)
    read, write = os.pipe()
    os.close(read)
    said = command(*arguments, out=write)
    os.close(write)
    assert said.code == 141 and said.err == ""


# signals

def send(number, owner, name, at=1):
    "Sends this process a signal at the `at`-th call of a function, before it does anything."
    kept, calls = getattr(owner, name), []

    def struck(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return kept(*args, **kwargs)
    setattr(owner, name, struck)


@pytest.mark.parametrize("owner, name, words", [
    (runs, "make_plan", "stopped before the first step; nothing was written"), (Run, "begin", "stopped; the last step is saved. Go on with:"),
    (runs, "finish_conversations", "stopped; the last step is saved. Go on with:"), (runs, "plot_curves", "stopped; the last step is saved. Go on with:")])
def test_ctrl_c_before_the_first_step_and_after_the_last(command, place, tmp_path, owner, name, words):
    folder = tmp_path / "run"
    said = command(*training(place, folder), prepare=partial(send, signal.SIGINT, owner, name))
    assert said.code == 130 and words in said.out and said.err == "", said
    assert not (folder / "result.json").exists() and folder.exists() == (name != "make_plan")
    again = said.out.splitlines()[-1].split()[1:] if "Go on with" in words else training(place, folder)
    assert vlmamba(*again).code == 0 and same_end(place, folder) and (folder / "result.json").exists()


@pytest.mark.parametrize("step", [1, 3, 6])
def test_sigkill(command, place, tmp_path, step):
    said = command(*training(place, tmp_path / "run"), prepare=partial(send, signal.SIGKILL, Run, "report", step))
    assert said.code == -signal.SIGKILL and (tmp_path / "run/.lock").exists()
    resume = ["--resume"] if checkpoints(tmp_path / "run") else []
    assert vlmamba(*training(place, tmp_path / "run", *resume)).code == 0 and same_end(place, tmp_path / "run")


def test_two_trainings_in_one_folder(command, place, tmp_path):
    "Of two processes the second refuses in one line, and leaves nothing in the folder of the first."
    folder, go = tmp_path / "run", tmp_path / "go"

    def wait():
        kept = Run.begin

        def waiting(*args):
            while not go.exists():
                time.sleep(0.01)
            return kept(*args)
        Run.begin = waiting
    with open(tmp_path / "first", "w") as out:
        first = begin(training(place, folder), out.fileno(), out.fileno(), wait)
        try:
            while not (folder / "metrics.jsonl").exists():
                time.sleep(0.01)
            before = sorted(folder.rglob("*")), (folder / "run_config.json").read_bytes()
            assert one_line(vlmamba(*training(place, folder, "--seed", 1)), "is in use by a run that has not ended, need another folder")
            assert before == (sorted(folder.rglob("*")), (folder / "run_config.json").read_bytes())
        finally:
            go.touch()
            status = os.waitpid(first, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0 and same_end(place, folder)
