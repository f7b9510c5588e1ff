"""Two processes on a CPU (gloo): DDP and FSDP train as one process does, and each goes on from what another one saved.

`torchrun` starts this file once, as a user starts a training; the two processes do all runs that need two of them.
"""
import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).absolute()
MODES = ("one", "ddp", "fsdp")
STEPS, SAVED = 20, 16
PAIRS = [(saved, resumed) for saved in MODES for resumed in MODES if saved != resumed]


# What is trained: the same in every mode

def words(n):
    return " ".join(["what color is the shape in the image"] * n)


def school():
    "A tokenizer, a stage, and conversations whose answers have from 1 to 60 words: two processes never learn from equally many tokens."
    from PIL import Image

    from vlmamba_lite.data.conversations import build_tokenizer
    from vlmamba_lite.data.records import ConversationSet
    from vlmamba_lite.training.recipes import Stage
    tokenizer = build_tokenizer([words(1)])
    samples = [{"image": Image.new("RGB", (64, 64), (37 * i % 256, 91 * i % 256, 11 * i % 256)), "questions": [words(1)],
                "answers": [" ".join(words(9).split()[:1 + 59 * (i % 2) * i // 24])]} for i in range(24)]
    columns = {"images": "image", "questions": "questions", "answers": "answers"}
    stage = Stage(trains=("connector", "language"), steps=STEPS, batch_size=4, micro_batch=1, lr=3e-3, weight_decay=0.05,
                  evaluations=STEPS // 4, keep=STEPS, template="lite")
    return tokenizer, stage, ConversationSet(samples, columns, "colours")


def train_mode(folder, mode, resume=False, on_step=None):
    "A run in a folder -> the model."
    from vlmamba_lite.model.presets import tiny_config
    from vlmamba_lite.model.vlmamba import VLMamba
    from vlmamba_lite.training.loop import train
    from vlmamba_lite.training.recipes import stage_batches
    tokenizer, stage, data = school()
    torch.manual_seed(7 if resume else 0)                                # what a resumed run draws must not matter
    model = VLMamba(tiny_config(tokenizer.get_vocab_size()), tokenizer)
    if mode == "one":
        stage = replace(stage, micro_batch=2)                            # the same step in other pieces
    sources = {stage.name: stage_batches(model, [data], stage)}
    train(model, (stage,), sources, folder, seed=5, resume=resume, on_step=on_step, log_every=1, parallel="auto" if mode == "one" else mode)
    return model


def last_steps(folder, where):
    "A copy of a run that stopped at step `SAVED`."
    shutil.copytree(folder, where)
    for path in sorted((where / "checkpoints").iterdir()):
        if int(path.name.rpartition("-")[2]) > SAVED:
            shutil.rmtree(path)
    return where


# The two processes

def held_by(model):
    "The share of a model's parameters, and the numbers of optimizer state, that this process holds."
    local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    return local / sum(p.numel() for p in model.parameters())


def optimizer_numbers():
    "The numbers that the AdamW in this process holds of its two averages, and those of the whole."
    optimizers = [o for o in gc.get_objects() if isinstance(o, torch.optim.AdamW) and o.state]
    averages = [t for state in optimizers[-1].state.values() for name, t in state.items() if name.startswith("exp_avg")]
    return [sum(getattr(t, "to_local", lambda t=t: t)().numel() for t in averages), sum(t.numel() for t in averages)]


def pair(folder):
    "All runs that need two processes. Process 0 writes, and the other one waits where both must see the same files."
    import torch.distributed as dist
    torch.set_num_threads(1)
    rank, held = int(os.environ["RANK"]), {}
    for mode in MODES[1:]:
        notes = []
        model = train_mode(folder / mode, mode, on_step=lambda report, notes=notes: notes.append(optimizer_numbers()) if report.step == 2 else None)
        held[mode] = {"share": held_by(model), "optimizer": notes}
        dist.barrier()
        (folder / f"{mode}-{rank}.json").write_text(json.dumps(held[mode]))
    for saved, resumed in PAIRS:
        if resumed != "one":
            if rank == 0:
                last_steps(folder / saved, folder / f"{saved}-{resumed}")
            dist.barrier()
            train_mode(folder / f"{saved}-{resumed}", resumed, resume=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)                                                          # as `leave_at_once` of chapter 21


# The tests

def torchrun(*arguments):
    "What `torchrun --nproc_per_node 2` does with these arguments; its standard error if it fails."
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, arguments)],
                         capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The folder in which every mode has trained, and has gone on from every other one."
    folder = tmp_path_factory.mktemp("runs")
    train_mode(folder / "one", "one")
    torchrun(HERE, folder)
    for saved in MODES[1:]:
        train_mode(last_steps(folder / saved, folder / f"{saved}-one"), "one", resume=True)
    return folder


def losses(folder):
    return [line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def near(got, want, limit=1e-4):
    assert len(got) == len(want) > 3
    worst = max(abs(a - b) / abs(b) for a, b in zip(got, want))
    assert worst < limit, worst


def test_the_batches_are_unequal():
    "Otherwise a mean of means would do."
    from vlmamba_lite.model.presets import tiny_config
    from vlmamba_lite.model.vlmamba import VLMamba
    from vlmamba_lite.training.loop import learned_tokens, micro_batches
    from vlmamba_lite.training.recipes import stage_batches
    tokenizer, stage, data = school()
    source = stage_batches(VLMamba(tiny_config(tokenizer.get_vocab_size()), tokenizer), [data], stage)
    steps = [[sum(map(learned_tokens, next(micro_batches(source, stage, 2, process, start)))) for process in (0, 1)] for start in range(6)]
    assert sum(max(pair) > 1.2 * min(pair) for pair in steps) >= 4, steps


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_losses_of_one_process(runs, mode):
    one = losses(runs / "one")
    assert one[-1] < 0.8 * one[0]                                        # it learns: the weights of all steps matter
    assert len(one) == STEPS
    near(losses(runs / mode), one)


@pytest.mark.parametrize("saved, resumed", PAIRS, ids=["-".join(names) for names in PAIRS])
def test_a_checkpoint_of_one_mode_goes_on_in_another(runs, saved, resumed):
    near(losses(runs / f"{saved}-{resumed}"), losses(runs / "one"))
    from vlmamba_lite.model.vlmamba import VLMamba
    ours, theirs = (VLMamba.from_pretrained(runs / name).state_dict() for name in (f"{saved}-{resumed}", "one"))
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, rtol=2e-3, atol=2e-4)


def test_fsdp_really_shares_the_parameters_out(runs):
    shares = [json.loads((runs / f"fsdp-{rank}.json").read_text())["share"] for rank in (0, 1)]
    assert all(0.4 < share < 0.6 for share in shares) and abs(sum(shares) - 1) < 1e-6, shares
    (mine, whole), = json.loads((runs / "fsdp-0.json").read_text())["optimizer"]
    assert 0.4 < mine / whole < 0.6
    assert all(json.loads((runs / f"ddp-{rank}.json").read_text())["share"] == 1 for rank in (0, 1))


def test_what_is_saved_is_whole(runs):
    "The checkpoints of all modes have the same files with the same tensors, and none knows of processes."
    from safetensors import safe_open
    found = []
    for mode in MODES:
        path = sorted((runs / mode / "checkpoints").iterdir())[-1]
        shapes = {}
        for file in path.glob("*.safetensors"):
            with safe_open(file, "pt") as f:
                shapes |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
        found.append((sorted(p.name for p in path.iterdir()), shapes))
    assert found[0] == found[1] == found[2]


def test_processes_part():
    "A run that is over leaves no group behind."
    import torch.distributed as dist

    from vlmamba_lite.training.distributed import leave_processes
    leave_processes()                                                    # alone: nothing to leave
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    leave_processes()
    assert not dist.is_initialized()


def test_the_command_in_two_processes(tmp_path):
    "Both stages of a recipe, by `vlmamba train` and by the same command under torchrun with sharded parameters."
    from PIL import Image
    from typer.testing import CliRunner

    from vlmamba_lite.cli.commands import app
    records = [{"id": str(i), "image": f"{i}.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red " * (1 + 3 * i)}]}
               for i in range(8)]
    for i in range(8):
        Image.new("RGB", (20, 20), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "data.json").write_text(json.dumps(records))
    command = ["train", "--preset", "tiny", "--recipe", "llava-1.5", "--data", str(tmp_path / "data.json"), "--steps", "3", "--precision", "fp32",
               "--device", "cpu", *(f"--set=training.{stage}.{name}={value}" for stage in ("align", "instruct")
                                    for name, value in dict(batch_size=4, micro_batch=2, evaluations=3).items())]
    run = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "one")])
    assert run.exit_code == 0, (run.output, run.exception)
    torchrun("-m", "vlmamba_lite.cli", *command, "--parallel", "fsdp", "--output", tmp_path / "two")
    near(losses(tmp_path / "two"), losses(tmp_path / "one"))
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


if __name__ == "__main__":
    pair(Path(sys.argv[1]))
