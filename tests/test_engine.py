"""The engine: recipes, freezing, the gradient of a batch in pieces, checkpoints that are checked, runs of several stages that stop and go on."""
import json
import math
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmamba_lite.data.batches import Preparer, collate_packed
from vlmamba_lite.data.conversations import Conversation
from vlmamba_lite.data.easy_vqa import VQABatches, easy_vqa_set
from vlmamba_lite.files import tensors_in
from vlmamba_lite.model.vlmamba import VLMamba
from vlmamba_lite.training import results
from vlmamba_lite.training.checkpoints import (best_checkpoint, checkpoints, drop_checkpoints, has_checkpoint, latest_checkpoint, put_optimizer,
                                               read_state, verify_checkpoint, write_folder)
from vlmamba_lite.training.distributed import Processes, gather, main_process, process_device
from vlmamba_lite.training.loop import Learner, accumulation, check_run, learned_tokens, micro_batches, train, train_step, validation_loss
from vlmamba_lite.training.optimizers import EMA, build_optimizers
from vlmamba_lite.training.recipes import (RECIPES, Stage, change_stages, check_moved, count_steps, digests, freeze, learning_rate, pick_recipe,
                                           picture_reader, set_modes, stage_batches, total_steps)
from vlmamba_lite.training.results import StepReport, Trackers, read_metrics
from vlmamba_lite.training.run import fingerprint

QUICK = dict(template="lite", batch_size=8, lr=1e-2, warmup=0.2, evaluations=2)
ALIGN = Stage(name="align", trains=("connector",), steps=4, **QUICK)
INSTRUCT = Stage(name="instruct", trains=("connector", "language"), steps=4, **QUICK)


class Talks:
    "Conversations with answers of very different lengths, one in four without a picture; picklable, as a data set is."

    def __init__(self, rows, texts_only=False):
        self.rows, self.texts_only = rows, texts_only

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        turns = list(zip(row["questions"], row["answers"]))[:(1, 6, 2, 4)[i * 7 % 4]]
        return Conversation(f"{i}", [] if self.texts_only or i % 4 == 0 else [row["image"]], turns)


@pytest.fixture(scope="module")
def talks(small):
    return Talks(list(small.rows))


def source(model, data, stage, **options):
    return stage_batches(model, [data], stage, seed=3, **options)


def read_tensors(folder, stem):
    return {name: read() for name, _, read in tensors_in(*sorted(folder.glob(f"{stem}*.safetensors")))}


def accumulate(learner, batches, processes=None):
    "The loss of some micro-batches as one step; their gradient stays in the model."
    return train_step(learner, [], batches, 0, math.inf, processes or Processes())


def gradient(model):
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def weights_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Stages and recipes

def test_the_papers_numbers():
    "What the papers and LLaVA-1.5's scripts say, and nothing else said to be theirs."
    align, instruct = pick_recipe("llava-1.5")
    assert (align.trains, instruct.trains) == (("connector",), ("connector", "language"))
    assert [(s.lr, s.batch_size, s.epochs) for s in (align, instruct)] == [(1e-3, 256, 1), (2e-5, 128, 1)]
    assert {(s.warmup, s.final_lr, s.weight_decay, s.max_length, s.precision, s.optimizer) for s in (align, instruct)} == {(0.03, 0, 0, 2048, "bf16", "adamw")}
    assert "assumption" in align.source and "assumption" in instruct.source and pick_recipe("vl-mamba") == (align, instruct)
    align, instruct = pick_recipe("ml-mamba")
    assert (align.lr, align.batch_size, align.epochs) == (1e-3, 256, 1)
    assert (instruct.lr, instruct.batch_size, instruct.epochs, instruct.weight_decay) == (2e-5, 64, 2, 0.1)
    (code,), (cobra,) = pick_recipe("ml-mamba-code"), pick_recipe("cobra")
    assert (code.batch_size, code.epochs, code.weight_decay, cobra.batch_size, cobra.epochs, cobra.weight_decay) == (128, 1, 0.1, 128, 2, 0.1)
    assert all(s.clip == 1 and s.micro_batch and s.source for stages in RECIPES.values() for s in stages if s.optimizer == "adamw")
    assert all(accumulation(s, 8) >= 1 and accumulation(s, 1) >= 1 for name in ("llava-1.5", "ml-mamba", "cobra") for s in RECIPES[name])


def test_the_small_recipes():
    (lite,), (tiny,) = pick_recipe("lite"), pick_recipe("tiny")
    assert (lite.steps, lite.batch_size, lite.lr, lite.betas, lite.weight_decay, lite.final_lr, lite.evaluations) == (1000, 32, 3e-3, (0.9, 0.98), 0.05, 0.01, 6)
    assert tiny == replace(lite, steps=60, batch_size=16, evaluations=2)
    assert lite.trains == ("vision", "connector", "language") and lite.optimizer == "muon" and lite.precision == "fp32" and lite.name == "train"
    assert lite.checks() == {167, 333, 500, 667, 833, 1000} and tiny.checks() == {30, 60}


def test_a_stage_survives_json():
    for stages in RECIPES.values():
        for stage in stages:
            assert Stage(**json.loads(json.dumps(asdict(stage)))) == stage


@pytest.mark.parametrize("change, message", [
    (dict(steps=None), "steps: got None, need at least 1, or epochs"), (dict(steps=0), "steps: got 0"), (dict(epochs=1), "steps: got 4"),
    (dict(steps=None, epochs=-1), "epochs: got -1"), (dict(trains=()), "trains: got (), need some of vision"), (dict(trains=("lm",)), "trains: got ('lm',)"),
    (dict(batch_size=0), "batch_size: got 0"), (dict(micro_batch=0), "micro_batch: got 0"), (dict(optimizer="sgd"), "optimizer: got 'sgd', need one of adamw, muon"),
    (dict(precision="fp16"), "precision: got 'fp16'"), (dict(lr=0), "lr: got 0"), (dict(clip=math.inf), "clip: got inf"), (dict(warmup=2), "warmup: got 2"),
    (dict(weight_decay=-1), "weight_decay: got -1"), (dict(ema=1), "ema: got 1"), (dict(keep=0), "keep: got 0"), (dict(max_length=0), "max_length: got 0")])
def test_a_stage_says_what_does_not_fit(change, message):
    with pytest.raises(ValueError) as error:
        replace(ALIGN, **change)
    assert str(error.value).startswith(f"stage 'align', {message}") and "\n" not in str(error.value)


def test_changing_stages():
    stages = change_stages(RECIPES["llava-1.5"], steps=7, batch_size=4, micro_batch=None)
    assert [(s.steps, s.epochs, s.batch_size, s.lr) for s in stages] == [(7, None, 4, 1e-3), (7, None, 4, 2e-5)]
    assert [(s.steps, s.epochs) for s in change_stages(stages, epochs=2)] == [(None, 2)] * 2
    with pytest.raises(ValueError, match="^stages: got the fields learning_rate, need some of "):
        change_stages(stages, learning_rate=1)
    with pytest.raises(ValueError, match="^recipe: got 'llava', need one of cobra, "):
        pick_recipe("llava")


# Freezing

@pytest.mark.parametrize("trains", [("connector",), ("connector", "language"), ("vision",), ("vision", "connector", "language")])
def test_freezing(make_model, trains):
    model = make_model()
    names = freeze(model, trains)
    assert names == [n for n, p in model.named_parameters() if p.requires_grad] and {n.split(".")[0] for n in names} == set(trains)
    set_modes(model.eval(), trains)
    assert {name: part.training for name, part in model.named_children()} == {name: name in trains for name in ("vision", "connector", "language")}
    freeze(model, ("vision", "connector", "language"))
    assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_train(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="^trains: got 'eyes', need some of vision, connector, language$"):
        freeze(model, ("eyes",))
    model.vision.frozen = True
    with pytest.raises(ValueError, match="^trains: got 'vision', whose tower was built with frozen=True, need frozen=False$"):
        freeze(model, ("vision",))
    freeze(model, ("connector",))


def test_digests_see_every_bit(make_model):
    model = make_model().double()
    names = {n for n, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    before = digests(model)
    assert set(before) == names and before == digests(make_model().double())
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        old = t.detach().clone()
        flat = t.detach().view(-1)
        flat[-1] = flat[-1] + 1 if not t.is_floating_point() else torch.nextafter(flat[-1], torch.tensor(math.inf, dtype=t.dtype))
        assert [n for n, d in digests(model).items() if d != before[n]] == [name]
        t.detach().copy_(old)
    for dtype in (torch.float32, torch.bfloat16):
        assert set(digests(model.to(dtype))) == names


def test_who_moved(make_model):
    model = make_model()
    before = digests(model)
    with torch.no_grad():
        model.connector.linear1.weight[0, 0] += 1
    assert "connector.linear1.weight" not in check_moved(before, digests(model), ALIGN)
    assert "connector.linear2.weight" in check_moved(before, digests(model), ALIGN)
    with pytest.raises(RuntimeError, match="^stage 'instruct': nothing in language moved in 4 steps$"):
        check_moved(before, digests(model), INSTRUCT)
    check_moved(before, before, replace(ALIGN, steps=1))       # the rate of the first step is 0
    model.vision.stages[0][1].running_mean[0] += 1             # a buffer is frozen, too
    with pytest.raises(RuntimeError, match="^stage 'align': vision.stages.0.1.running_mean moved and 0 more, which are frozen$"):
        check_moved(before, digests(model), ALIGN)


def test_stages_move_what_they_should_and_nothing_else(make_model, talks, tmp_path):
    model = make_model()
    seen = [weights_of(model)]
    stages = (replace(ALIGN, evaluations=1), replace(INSTRUCT, evaluations=1))
    train(model, stages, {s.name: source(model, talks, s) for s in stages}, tmp_path, evaluate=lambda m: seen.append(weights_of(m)) or {"loss": 0.0})
    for stage, before, after in zip(stages, seen, seen[1:]):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.split(".")[0] for name in moved} == set(stage.trains)
        assert {n for n, p in model.named_parameters() if n.split(".")[0] in stage.trains} - moved <= {"language.backbone.embedding.weight"}
    assert len(seen) == 3


def test_a_part_that_moves_in_spite_of_freezing_ends_the_run(make_model, talks, tmp_path, monkeypatch):
    model = make_model()
    forward = model.see

    def see(images):
        model.vision.refine.bias.data += 1e-7
        return forward(images)
    monkeypatch.setattr(model, "see", see)
    with pytest.raises(RuntimeError, match="^stage 'align': vision.refine.bias moved and 0 more, which are frozen$"):
        train(model, (ALIGN,), {"align": source(model, talks, ALIGN)}, tmp_path)
    assert len(checkpoints(tmp_path)) == 1                     # what is wrong is not saved


# Micro-batches

def test_accumulation():
    stage = Stage(steps=1, batch_size=24, micro_batch=4)
    assert [accumulation(stage, n) for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert accumulation(replace(stage, micro_batch=None), 3) == 1
    for n in (4, 5, 12):
        with pytest.raises(ValueError, match=f"^batch_size: got 24, need a multiple of micro_batch 4 x {n} processes$"):
            accumulation(stage, n)


@dataclass
class Numbers:
    "A source whose batches are the positions they hold."
    batch_size: int = 1
    parts: int = 1

    def __getitem__(self, number):
        step, part = divmod(number, self.parts)
        size = self.batch_size // self.parts
        return list(range(step * self.batch_size + part * size, step * self.batch_size + (part + 1) * size))


@given(processes=st.sampled_from([1, 2, 3]), micro=st.sampled_from([1, 2, 4]), start=st.integers(0, 3))
@settings(deadline=None, max_examples=12, derandomize=True)
def test_processes_share_the_positions_of_a_step(processes, micro, start):
    stage, read = Stage(steps=4, batch_size=24, micro_batch=micro), {}
    for p in range(processes):
        for step, found in enumerate(micro_batches(Numbers(), stage, processes, p, start), start):
            assert len(found) == 24 // micro // processes and all(len(part) == micro for part in found)
            read.setdefault(step, []).extend(n for part in found for n in part)
    assert {step: sorted(n) for step, n in read.items()} == {step: list(range(24 * step, 24 * step + 24)) for step in range(start, 4)}


@pytest.mark.parametrize("processes, micro", [(1, None), (1, 4), (2, None), (2, 2), (4, 1)])
def test_pictures_in_pieces_are_the_batch(small, processes, micro):
    data = VQABatches(small.train, steps=5, batch_size=8, seed=7, questions=3)
    stage = Stage(steps=5, batch_size=8, micro_batch=micro)
    parts = [next(micro_batches(data, stage, processes, p, start=2)) for p in range(processes)]
    together = [parts[p][k] for k in range(len(parts[0])) for p in range(processes)]
    assert torch.equal(torch.cat([part.images for part in together]), data[2].images)
    assert sum(map(learned_tokens, together)) == learned_tokens(data[2])
    with pytest.raises(ValueError, match="^batch_size: got 40 pictures, need a multiple of 3 parts$"):         # there are only 40
        next(micro_batches(data, replace(stage, batch_size=48, micro_batch=16)))


def test_steps_of_an_epoch(small, talks, make_model):
    model = make_model()
    stage = Stage(epochs=2, batch_size=16)
    assert count_steps(stage, source(model, talks, stage)) == 5                  # 2 x 40 / 16
    assert count_steps(stage, VQABatches(small.train)) == 5 and count_steps(ALIGN, None) == 4
    assert count_steps(replace(stage, epochs=0.1), source(model, talks, stage)) == 1
    assert total_steps((ALIGN, replace(stage, name="b")), {"align": None, "b": source(model, talks, stage)}) == 9


def test_workers_bring_the_same(make_model, small):
    model, data = make_model(), easy_vqa_set("train")
    batches = [[b.input_ids for b in step] for workers in (0, 2) for step in micro_batches(source(model, data, ALIGN, questions=2), ALIGN, workers=workers)]
    assert len(batches) == 8 and all(map(torch.equal, sum(batches[:4], []), sum(batches[4:], [])))


def test_the_template_of_a_stage(make_model, talks):
    model = make_model()
    assert source(model, talks, replace(ALIGN, template=None)).prepare.template == "lite"
    assert source(model, talks, ALIGN, template="plain").prepare.template == "plain"
    made = source(model, talks, replace(ALIGN, template="zephyr", max_length=5), augmented=True, questions=2)
    assert made.prepare.template == "zephyr" and made.prepare.max_length == 5 and made.prepare.augmented and made.prepare.questions == 2
    assert made.batch_size == 8 and made.mixture.seed == 3


# The gradient of a batch in pieces

@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_pieces_give_the_gradient_of_the_batch(make_model, talks, mixer, micro):
    model = make_model(mixer=mixer).double()
    set_modes(model, ("connector", "language"))
    learner, found = Learner(model), []
    for m in (8, micro):
        batches, = micro_batches(source(model, talks, ALIGN), replace(ALIGN, steps=1, micro_batch=m))
        batches = [replace(b, images=b.images.double() / 127.5 - 1) for b in batches]
        model.zero_grad()
        loss = accumulate(learner, batches)
        found.append((loss, gradient(model), [learned_tokens(b) for b in batches]))
    (loss, want, _), (parts_loss, got, counts) = found
    assert len(set(counts)) > 1                               # unequal, or the mean of the means would do
    assert parts_loss == pytest.approx(loss, rel=1e-6)
    assert ((got - want).norm() / want.norm()).item() < 1e-5


def test_two_processes_average_to_the_gradient_of_the_batch(make_model, talks):
    "A process knows the other one's learned tokens through `sum`; the average that DDP makes is the gradient of all."
    class Two(Processes):
        def __init__(self, total):
            super().__init__()
            self.count, self.total = 2, total

        def sum(self, t):
            return torch.tensor(float(self.total)) if t.item() == self.own else t

        def hold(self, learner, yes):
            return nullcontext()
    model = make_model()
    set_modes(model, ("connector", "language"))
    learner = Learner(model)
    whole, = micro_batches(source(model, talks, ALIGN), replace(ALIGN, steps=1))
    accumulate(learner, whole)
    want, total, got = gradient(model), learned_tokens(whole[0]), 0
    for p in (0, 1):
        own, = micro_batches(source(model, talks, ALIGN), replace(ALIGN, steps=1, micro_batch=2), processes=2, process=p)
        fake = Two(total)
        fake.own = sum(map(learned_tokens, own))
        accumulate(learner, own, fake)
        got = got + gradient(model) / 2
    assert ((got - want).norm() / want.norm()).item() < 1e-4


def test_learned_tokens_are_what_the_loss_is_the_mean_of(make_model, talks, small):
    model = make_model()
    batch, = next(micro_batches(source(model, talks, ALIGN), ALIGN))
    logits = torch.zeros(*batch.labels.shape, 5)
    from vlmamba_lite.language.model import next_token_loss
    one = next_token_loss(logits.requires_grad_(), batch.labels.clamp(max=4), batch.mask)
    one.backward()
    assert learned_tokens(batch) == (logits.grad.abs().sum(-1) > 0).sum()
    batch = VQABatches(small.train, batch_size=4, questions=2)[0]
    assert learned_tokens(batch) == (batch.labels[:, 1:] != -100).sum()


def test_a_batch_without_pictures(make_model, talks):
    "It reads a black one that changes neither loss nor gradient, so that every process runs the same modules."
    model = make_model()
    set_modes(model, ("connector", "language"))
    learner = Learner(model)
    batch, = next(micro_batches(source(model, Talks(talks.rows, texts_only=True), ALIGN), ALIGN))
    assert not batch.images.numel()
    want = model(batch).loss
    want.backward()
    wanted = gradient(model)
    assert accumulate(learner, [batch]) == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(gradient(model), wanted)
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.connector.parameters()) and learner.visual_tokens == 64


def test_recomputing_changes_no_gradient(make_model, talks):
    model = make_model(n_layer=2)
    set_modes(model, ("connector", "language"))
    learner, found = Learner(model), []
    batch, = next(micro_batches(source(model, talks, ALIGN), ALIGN))
    for recompute in (False, True):
        model.language.backbone.recompute = recompute
        found.append((accumulate(learner, [batch]), gradient(model)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1]) and found[0][1].abs().sum() > 0


def test_bf16_keeps_the_parameters_in_float32(make_model, talks, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        model, found = make_model(), []
        stage = replace(INSTRUCT, precision=precision, recompute=True)
        train(model, (stage,), {"instruct": source(model, talks, stage)}, tmp_path / precision, on_step=lambda r: found.append(r.loss))
        assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.language.backbone.recompute
        assert {t.dtype for t in read_tensors(latest_checkpoint(tmp_path / precision), "optimizer").values()} == {torch.float32}
        losses[precision] = np.array(found)
    assert 0 < np.abs(losses["bf16"] / losses["fp32"] - 1).max() < 0.02


def test_what_does_not_go_with_shards(make_model, talks):
    model = make_model()
    packed = {"align": source(model, talks, ALIGN, collate=partial(collate_packed, length=60))}
    with pytest.raises(ValueError, match="^stage 'align', collate: got packed lines, need collate or collate_by_image with parallel='fsdp'$"):
        check_run((ALIGN,), packed, None, False, "fsdp")
    with pytest.raises(ValueError, match="^stage 'align', optimizer: got 'muon', need 'adamw' with parallel='fsdp'$"):
        check_run((replace(ALIGN, optimizer="muon"),), packed, None, False, "fsdp")
    check_run((ALIGN,), packed, None, False, "ddp")
    check_run((ALIGN,), {"align": source(model, talks, ALIGN)}, None, False, "fsdp")


# The mean of the weights

def test_the_mean_of_the_weights(make_model):
    model = make_model()
    freeze(model, ("connector",))
    mean, history = EMA(model, 0.9), [model.connector.linear1.weight.detach().clone()]
    for step in range(3):
        with torch.no_grad():
            model.connector.linear1.weight += step + 1
        history.append(model.connector.linear1.weight.detach().clone())
        mean.update(model)
    want = history[0]
    for w in history[1:]:
        want = 0.9 * want + 0.1 * w
    with mean.swapped(model):
        torch.testing.assert_close(model.connector.linear1.weight.detach(), want)
        assert torch.equal(mean.mean["connector.linear1.weight"], history[-1])
    assert torch.equal(model.connector.linear1.weight, history[-1]) and all(n.startswith("connector.") for n in mean.mean)


# Checkpoints

@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoints" / "step-00000001"
    write_folder(path, lambda part: [(part / name).write_bytes(bytes(range(200))) for name in ("a.bin", "b.bin")])
    return path


def test_a_checkpoint_is_checked(saved):
    verify_checkpoint(saved)
    for name in ("a.bin", "b.bin"):
        good = (saved / name).read_bytes()
        for bad, fault in ((bytes([good[0] ^ 1]) + good[1:], "has another checksum than when it was written"), (good[:-1], "has 199 bytes, need 200"),
                           (b"", "has 0 bytes, need 200"), (None, "is missing")):
            (saved / name).unlink() if bad is None else (saved / name).write_bytes(bad)
            with pytest.raises(ValueError, match=f"^checkpoint: .*{name} {fault}; delete .*step-00000001 to go on from the one before$"):
                verify_checkpoint(saved)
            (saved / name).write_bytes(good)
    verify_checkpoint(saved)
    for bad in (b"", b"{", b"[]", b'{"a.bin": 1}'):
        (saved / "manifest.json").write_bytes(bad)
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            verify_checkpoint(saved)
    (saved / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        verify_checkpoint(saved)


def test_an_unfinished_checkpoint_is_none(tmp_path, monkeypatch):
    "Whatever call the writing dies in, the folder is not there under its name, and the next one is written as if nothing had been."
    path, calls = tmp_path / "checkpoints" / "step-00000001", [0]
    def dies(at, name):
        original, seen = getattr(os, name), [0]

        def call(*args, **kwargs):
            seen[0] += 1
            if seen[0] == at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)
        monkeypatch.setattr(os, name, call)
    for name, at in (("fsync", 1), ("fsync", 2), ("fsync", 4), ("rename", 1)):
        with monkeypatch.context() as monkeypatch_here:
            monkeypatch, outer = monkeypatch_here, monkeypatch
            dies(at, name)
            with pytest.raises(KeyboardInterrupt):
                write_folder(path, lambda part: [(part / n).write_text(n) for n in "ab"])
            monkeypatch = outer
        calls[0] += 1
        assert not has_checkpoint(tmp_path)
    write_folder(path, lambda part: (part / "c").write_text("c"))
    verify_checkpoint(path)
    assert checkpoints(tmp_path) == [path] and {p.name for p in path.iterdir()} == {"c", "manifest.json"} and calls == [4]


def make_checkpoints(folder, scores, name="all"):
    for step, value in scores.items():
        state = {"score": None if value is None else {"name": name, "value": value}}
        write_folder(folder / "checkpoints" / f"step-{step:08d}", lambda part: (part / "state.json").write_text(json.dumps(state)))


def left(folder):
    return [int(path.name[5:]) for path in checkpoints(folder)]


@pytest.mark.parametrize("name, values, keep, kept", [
    ("all", [.1, .5, .5, .2, .3], 2, [2, 4, 5]), ("loss", [.1, .5, .5, .2, .3], 2, [1, 4, 5]), ("all", [.1, .2, .3, .4, .5], 2, [4, 5]),
    ("all", [None] * 5, 1, [5]), ("all", [None, .1, None, .05, None], 1, [2, 5]), ("all", [math.nan, .1, math.nan, None, None], 1, [2, 5]), ("all", [.1] * 5, 9, [1, 2, 3, 4, 5])])
def test_the_last_and_the_best_are_kept(tmp_path, name, values, keep, kept):
    make_checkpoints(tmp_path, dict(enumerate(values, 1)), name)
    (tmp_path / "checkpoints" / ".step-00000009.part").mkdir()
    (tmp_path / "checkpoints" / ".step-00000003.old").mkdir()
    drop_checkpoints(tmp_path, keep)
    assert left(tmp_path) == kept and len(list((tmp_path / "checkpoints").iterdir())) == len(kept)
    assert int(latest_checkpoint(tmp_path).name[5:]) == kept[-1]


def test_where_there_is_nothing(tmp_path):
    assert not has_checkpoint(tmp_path) and checkpoints(tmp_path / "none") == []
    with pytest.raises(FileNotFoundError, match="^resume: no checkpoint in "):
        latest_checkpoint(tmp_path)
    make_checkpoints(tmp_path, {1: None})
    with pytest.raises(FileNotFoundError, match="^best: no checkpoint with a validation in "):
        best_checkpoint(tmp_path)


def test_the_score_that_decides(make_model, talks, tmp_path):
    model, stage = make_model(), replace(ALIGN, steps=1, evaluations=1)
    for best, want in ((None, {"name": "a", "value": 1.0}), ("b", {"name": "b", "value": 2.0})):
        train(model, (stage,), {"align": source(model, talks, stage)}, tmp_path / str(best), evaluate=lambda m: {"a": 1, "b": 2}, best=best)
        assert read_state(latest_checkpoint(tmp_path / str(best)))["score"] == want
    with pytest.raises(ValueError, match="^best: got 'c', need one of a, b$"):
        train(model, (stage,), {"align": source(model, talks, stage)}, tmp_path / "c", evaluate=lambda m: {"a": 1, "b": 2}, best="c")


def test_states_that_do_not_fit(make_model):
    model = make_model()
    freeze(model, ("connector",))
    optimizers = build_optimizers(model, INSTRUCT)
    with pytest.raises(ValueError, match="^optimizer: got a state for vision.position, need one of the parameters that train$"):
        put_optimizer(model, optimizers, [("vision.position/step", (), lambda: torch.tensor(1.))])
    assert gather({"a": torch.ones(1)}, keep=False) == {}


def test_a_checkpoint_is_a_model(make_model, talks, tmp_path):
    model = make_model()
    train(model, (ALIGN,), {"align": source(model, talks, ALIGN)}, tmp_path)
    for folder in (tmp_path, *checkpoints(tmp_path)):
        VLMamba.from_pretrained(folder)
    assert equal(weights_of(VLMamba.from_pretrained(latest_checkpoint(tmp_path))), weights_of(model))


# Runs

def run(model, data, folder, resume=False, stop=None, stages=(ALIGN, INSTRUCT), **options):
    "A run of two stages that asks for its end after step `stop`; (steps done, losses, weights)."
    losses = []

    def on_step(report):
        losses.append(report.loss)
        if report.step == stop:
            signal.raise_signal(signal.SIGINT)
    done, _ = train(model, stages, {s.name: source(model, data, s) for s in stages}, folder, 5, resume=resume, on_step=on_step, **options)
    return done, losses, weights_of(model)


def scores(model):
    return {"loss": float(sum(p.detach().abs().sum() for p in model.parameters()))}


WITH_EMA = (replace(ALIGN, ema=0.8, micro_batch=2), replace(INSTRUCT, ema=0.8, recompute=True))


@pytest.fixture(scope="module")
def straight(make_model, talks, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("straight") for _ in range(2)]
    return [(folder, run(make_model(), talks, folder, stages=stages, evaluate=scores)) for folder, stages in zip(folders, ((ALIGN, INSTRUCT), WITH_EMA))]


@pytest.mark.parametrize("kind", [0, 1], ids=["plain", "ema"])
@pytest.mark.parametrize("stop", [1, 2, 4, 7, 8])
def test_a_run_that_stops_in_either_stage_ends_the_same(make_model, talks, straight, tmp_path, kind, stop):
    folder, (_, losses, weights) = straight[kind]
    stages = (ALIGN, INSTRUCT) if kind == 0 else WITH_EMA
    done, first, _ = run(make_model(), talks, tmp_path, stop=stop, stages=stages, evaluate=scores)
    assert done == stop and left(tmp_path)[-1] == stop
    done, rest, end = run(make_model(seed=9), talks, tmp_path, resume=True, stages=stages, evaluate=scores)
    assert done == 8 and first + rest == losses and equal(end, weights)
    for stem in ("model", "optimizer", "raw"):
        assert equal(read_tensors(latest_checkpoint(tmp_path), stem), read_tensors(latest_checkpoint(folder), stem))
    logs = [[(line["step"], line["stage"], line.get("loss"), line.get("validation")) for line in read_metrics(f / "metrics.jsonl")] for f in (tmp_path, folder)]
    assert logs[0] == logs[1] and equal(weights_of(VLMamba.from_pretrained(tmp_path)), end)
    assert best_checkpoint(tmp_path).name == best_checkpoint(folder).name


def test_the_end_of_a_run_with_a_mean_is_the_mean(straight):
    folder, (_, _, weights) = straight[1]
    assert not read_tensors(latest_checkpoint(folder), "raw") and equal(weights_of(VLMamba.from_pretrained(folder)), weights)
    middle = checkpoints(folder)[-2]                           # step 6, in the second stage
    raw, used = read_tensors(middle, "raw"), read_tensors(middle, "model")
    assert read_state(middle)["step"] == 6 and raw and any(not torch.equal(raw[name], used[name]) for name in raw if name in used)
    assert all(name.split(".")[0] in ("connector", "language") for name in raw)


def test_a_run_goes_on_from_a_checkpoint_before_a_damaged_one(make_model, talks, straight, tmp_path):
    folder, (_, losses, weights) = straight[0]
    shutil.copytree(folder, tmp_path / "run")
    newest = latest_checkpoint(tmp_path / "run")
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-3] ^= 64
    (newest / "model.safetensors").write_bytes(data)
    model = make_model(seed=9)
    before = weights_of(model)
    with pytest.raises(ValueError, match="^checkpoint: .*model.safetensors has another checksum than when it was written; delete .*step-00000008 "):
        run(model, talks, tmp_path / "run", resume=True)
    assert equal(weights_of(model), before)
    shutil.rmtree(newest)
    done, rest, end = run(model, talks, tmp_path / "run", resume=True, evaluate=scores)
    assert done == 8 and rest == losses[6:] and equal(end, weights)


def test_a_run_does_not_go_on_with_other_numbers(make_model, talks, straight, small, tmp_path):
    folder, _ = straight[0]
    model = make_model()
    with pytest.raises(ValueError, match="^seed: got 6, need 5, the seed this run began with$"):
        train(model, (ALIGN, INSTRUCT), {"align": source(model, talks, ALIGN), "instruct": source(model, talks, INSTRUCT)}, folder, 6, resume=True)
    for stages, message in (((ALIGN, replace(INSTRUCT, steps=5)), "stages: got 5 steps of 'instruct', need 4"), ((ALIGN,), "stages: got None steps of 'instruct', need 4")):
        with pytest.raises(ValueError, match=f"^{message}, with which this run began$"):
            run(model, talks, folder, resume=True, stages=stages)
    with pytest.raises(ValueError, match="^folder: .* holds the checkpoints of a run, need resume=True or another folder$"):
        run(model, talks, folder)
    with pytest.raises(FileNotFoundError, match="^resume: no checkpoint in "):
        run(model, talks, tmp_path, resume=True)


@pytest.mark.parametrize("change, message", [
    (dict(stages=(ALIGN, ALIGN)), "stages: got the names ['align', 'align'], need at least one stage and different names"),
    (dict(stages=()), "stages: got the names [], need"), (dict(sources={}), "sources: got , need one for the stage 'align'"),
    (dict(parallel="tpu"), "parallel: got 'tpu', need 'auto', 'ddp' or 'fsdp'"), (dict(trackers=("excel",)), "tracker: got 'excel', need one of tensorboard, wandb, trackio")])
def test_what_train_cannot_take(make_model, talks, tmp_path, change, message):
    model = make_model()
    arguments = dict(stages=(ALIGN,), sources={"align": source(model, talks, ALIGN)}) | change
    with pytest.raises(ValueError) as error:
        train(model, folder=tmp_path, **arguments)
    assert str(error.value).startswith(message) and not list(tmp_path.iterdir())


def test_a_missing_tracker(monkeypatch):
    monkeypatch.setattr(results.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="^tracker: the package wandb is not installed; pip install wandb$"):
        Trackers(("wandb",))


def test_tensorboard_gets_the_numbers(make_model, talks, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, losses, _ = run(make_model(), talks, tmp_path, stages=(ALIGN,), trackers=("tensorboard",), evaluate=scores, log_every=1)
    file, = [path for path in (tmp_path / "logs" / "vlmamba").iterdir() if path.name.startswith("events")]
    events = EventAccumulator(str(file)).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses) and [e.step for e in events.Scalars("validation/loss")] == [2, 4]


def test_reports(make_model, talks, tmp_path):
    reports, checks = [], []
    model = make_model()
    stages = (ALIGN, INSTRUCT)
    train(model, stages, {s.name: source(model, talks, s) for s in stages}, tmp_path, on_step=reports.append, evaluate=lambda m: {"all": 0.5},
          on_check=lambda step, s: checks.append((step, s)), log_every=3)
    assert [(r.step, r.steps, r.stage, r.stage_step, r.stage_steps) for r in reports] == [
        (i + 1, 8, "align" if i < 4 else "instruct", i % 4 + 1, 4) for i in range(8)]
    assert [r.lr for r in reports] == [learning_rate(i % 4 / 4, ALIGN) for i in range(8)] and checks == [(s, {"all": 0.5}) for s in (2, 4, 6, 8)]
    assert all(isinstance(r, StepReport) and r.tokens_per_second > 0 and r.memory_bytes > 1e7 for r in reports)
    assert reports[-1].seconds_left == 0 < reports[0].seconds_left
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8]
    assert set(lines[0]) == {"step", "stage", "loss", "lr", "tokens_per_second", "memory_bytes", "cpu_seconds", "wall_seconds"}


def test_the_generator_is_set_by_seed_and_step(make_model, small, tmp_path):
    "A model that draws goes on as it would have gone on."
    stage = Stage(steps=6, batch_size=4, optimizer="muon", lr=3e-3, evaluations=3)

    def noisy(stop=None, resume=False):
        model, losses = make_model(), []
        model.connector.register_forward_hook(lambda m, args, out: out + torch.randn_like(out))

        def on_step(report):
            losses.append(report.loss)
            torch.randn(3)                                     # somebody else draws, too
            if report.step == stop:
                signal.raise_signal(signal.SIGINT)
        data = VQABatches(small.train, 6, 4, 1, questions=2)
        train(model, (stage,), {"train": data}, tmp_path / str(stop or resume), 1, resume=resume, on_step=on_step)
        return losses
    straight = noisy()
    first = noisy(stop=3)
    (tmp_path / "3").rename(tmp_path / "True")
    assert first + noisy(resume=True) == straight


# Going on with the same, and alone

def finished(make_model, talks, folder, stop=2, **change):
    "A run that was stopped after two steps of `ALIGN`."
    return run(make_model(), talks, folder, stop=stop, stages=(ALIGN,), **change)


def test_a_run_goes_on_only_with_what_it_read(make_model, talks, tmp_path):
    finished(make_model, talks, tmp_path)
    other = Talks([dict(row, answers=["teal"] * len(row["answers"])) for row in talks.rows])
    redder = Talks([dict(row, image=row["image"].convert("L").convert("RGB")) for row in talks.rows])
    for data, words in ((Talks(talks.rows[:-1]), "data: got 39 samples of 'align', need 40"), (other, "data: got [0-9a-f]+ checksum of 'align', need"),
                        (redder, "data: got [0-9a-f]+ checksum of 'align', need")):
        with pytest.raises(ValueError, match=f"^{words}.*, with which this run began$"):
            run(make_model(), data, tmp_path, resume=True, stages=(ALIGN,))
    for change, words in ((dict(lr=1.0), "stages: got 1.0 lr of 'align', need 0.01"), (dict(batch_size=4), "stages: got 4 batch_size of 'align', need 8")):
        with pytest.raises(ValueError, match=f"^{words}, with which this run began$"):
            run(make_model(), talks, tmp_path, resume=True, stages=(replace(ALIGN, **change),))
    model = make_model()
    model.config.language.residual_in_fp32 = not model.config.language.residual_in_fp32
    with pytest.raises(ValueError, match="^model: got .* language.residual_in_fp32, need .*, with which this run began$"):
        run(model, talks, tmp_path, resume=True, stages=(ALIGN,))
    with pytest.raises(ValueError, match="^stages: got 9 steps of 'align', need 4, "):
        run(make_model(), other, tmp_path, resume="changed", stages=(replace(ALIGN, steps=9),))
    done, _, _ = run(make_model(), other, tmp_path, resume="changed", stages=(replace(ALIGN, lr=1e-3),))        # it is meant
    assert done == 4


def test_fingerprints(small, talks, tmp_path):
    from PIL import Image

    from vlmamba_lite.data.batches import Batches, Mixture
    from vlmamba_lite.data.records import llava_set

    def of(data):
        return fingerprint(Batches(Mixture([data]), None))
    assert of(talks) == of(Talks(talks.rows)) and of(talks)["samples"] == 40
    assert fingerprint(VQABatches(small.train)) == fingerprint(VQABatches(small.train, seed=7)) != fingerprint(VQABatches(small.data))
    records = [{"id": i, "image": "a.png", "conversations": [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": str(i)}]} for i in range(3)]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = []
    for size, path in ((8, "a.png"), (9, "a.png"), (9, "gone.png"), (9, "../a.png")):         # broken samples count, too
        Image.new("RGB", (size, 300)).save(tmp_path / "a.png")
        (tmp_path / "train.json").write_text(json.dumps([dict(r, image=path) for r in records]))
        found.append(of(llava_set(tmp_path / "train.json", tmp_path))["checksum"])
    assert len(set(found)) == 4


def test_two_trainings_in_one_folder(make_model, talks, tmp_path):
    "The second refuses, in one line, and the first is untouched; when it has ended, or was killed, the folder is free."
    refused = []

    def on_step(report):
        if report.step == 2:
            for resume in (False, True):
                with pytest.raises(ValueError, match="^folder: .* is in use by a run that has not ended, need another folder$|holds the checkpoints") as error:
                    train(make_model(seed=1), (ALIGN,), {"align": source(make_model(), talks, ALIGN)}, tmp_path / "run", 5, resume=resume, settings={"seed": 6})
                refused.append(str(error.value))
            assert json.loads((tmp_path / "run/run_config.json").read_text()) == {"seed": 5}
    alone = run(make_model(), talks, tmp_path / "alone", stages=(ALIGN,))
    model, losses = make_model(), []
    train(model, (ALIGN,), {"align": source(model, talks, ALIGN)}, tmp_path / "run", 5, on_step=lambda r: (losses.append(r.loss), on_step(r)),
          settings={"seed": 5})
    assert losses == alone[1] and equal(weights_of(model), alone[2]) and len(refused) == 2 and "\n" not in "".join(refused)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in (tmp_path / "alone").iterdir()} | {"run_config.json"}
    pid = os.fork()
    if pid == 0:
        with results.writing(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / "run" / ".lock").exists()               # abandoned
    with results.writing(tmp_path / "run"):
        pass


def test_settings_are_written_only_where_a_run_goes_on_with_them(make_model, talks, tmp_path):
    finished(make_model, talks, tmp_path, settings={"lr": 1})
    for resume, change, kept, words in ((True, {}, {"lr": 2}, "^lr: got 2, need 1, "), ("changed", dict(steps=9), {"lr": 2}, "^stages: got 9 steps")):
        with pytest.raises(ValueError, match=words):
            run(make_model(), talks, tmp_path, resume=resume, stages=(replace(ALIGN, **change),), settings=kept)
        assert json.loads((tmp_path / "run_config.json").read_text()) == {"lr": 1}
    run(make_model(), talks, tmp_path, resume="changed", stages=(ALIGN,), settings={"lr": 2})
    assert json.loads((tmp_path / "run_config.json").read_text()) == {"lr": 2}


@pytest.mark.parametrize("where", ["checkpoint", "model", "log"])
def test_a_full_disk_is_one_line_and_loses_nothing(make_model, talks, tmp_path, monkeypatch, where):
    from safetensors import SafetensorError

    from vlmamba_lite.model.vlmamba import VLMamba as Model
    alone, save, full = run(make_model(), talks, tmp_path / "alone", stages=(ALIGN,)), Model.save_pretrained, [True]

    def no_room(model, folder):
        if full[0] and ((where == "checkpoint" and "step-00000004" in str(folder)) or (where == "model" and folder == tmp_path / "run")):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(model, folder)
    monkeypatch.setattr(Model, "save_pretrained", no_room)
    write = results.MetricsLog.write

    def no_line(log, **line):
        if where == "log" and full[0] and line["step"] == 4:
            raise OSError(28, "No space left on device")
        write(log, **line)
    monkeypatch.setattr(results.MetricsLog, "write", no_line)
    with pytest.raises(OSError, match="^folder: .*run could not be written .*No space left on device.*$") as error:
        run(make_model(), talks, tmp_path / "run", stages=(ALIGN,))
    assert "\n" not in str(error.value) and not list((tmp_path / "run" / "checkpoints").glob(".*"))
    full[0] = False
    done, _, end = run(make_model(seed=9), talks, tmp_path / "run", resume=True, stages=(ALIGN,))
    assert done == 4 and equal(end, alone[2])


def test_a_damaged_log(make_model, talks, tmp_path):
    finished(make_model, talks, tmp_path)
    log, before = tmp_path / "metrics.jsonl", weights_of(make_model())
    good = log.read_text()
    for bad in ("nonsense\n", "[1]\n", '{"loss": 1}\n', '{"step": "two"}\n', "3\n", "\udcff\n"):
        log.write_bytes((good + bad).encode(errors="surrogateescape"))
        model = make_model()
        with pytest.raises(ValueError, match=f"^.*metrics.jsonl: line {good.count(chr(10)) + 1} holds no numbers of a step; delete that line to go on$"):
            run(model, talks, tmp_path, resume=True, stages=(ALIGN,))
    log.unlink()                                              # a log can be done without
    done, _, _ = run(make_model(), talks, tmp_path, resume=True, stages=(ALIGN,))
    assert done == 4 and [line["step"] for line in read_metrics(log)][-1] == 4 and before


@pytest.mark.parametrize("damage, words", [
    (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json is damaged, or no checkpoint of this model \\(it does not list all files\\); delete "),
    (lambda p: (p / "manifest.json").unlink(), "manifest.json is damaged.*FileNotFoundError\\); delete "),
    (lambda p: (p.parent / "step-00000099").mkdir(), "step-00000099/manifest.json is damaged.*; delete .*step-00000099 to go on from the one before$")])
def test_a_damaged_manifest_names_the_way_on(make_model, talks, tmp_path, damage, words):
    finished(make_model, talks, tmp_path)
    damage(latest_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=f"^resume: .*{words}"):
        run(make_model(), talks, tmp_path, resume=True, stages=(ALIGN,))


def test_a_run_in_a_thread(make_model, talks, tmp_path):
    "Signals belong to the main thread; a training elsewhere goes without, to the same end."
    from threading import Thread
    found = []
    thread = Thread(target=lambda: found.append(train_quietly(make_model(), talks, tmp_path / "thread")))
    thread.start()
    thread.join()
    assert found == [train_quietly(make_model(), talks, tmp_path / "main")] and len(found[0]) == 4


def train_quietly(model, data, folder):
    losses = []
    train(model, (ALIGN,), {"align": source(model, data, ALIGN)}, folder, 5, on_step=lambda r: losses.append(r.loss))
    return losses


# What is not finite

def test_a_bad_batch_is_kept_and_no_weight_moves(make_model, talks, tmp_path):
    model = make_model()
    class Poisoned:
        def __init__(self, batches):
            self.batches = batches
    poisoned = source(model, talks, INSTRUCT)
    before, collate = {}, poisoned.collate

    def bad(rows, pad):
        batch = collate(rows, pad)
        bad.calls += 1
        if bad.calls == 4:                                    # the second micro-batch of the second step
            before.update(weights_of(model))
            batch = replace(batch, images=batch.images.float() * math.nan)
        return batch
    bad.calls = 0
    stage = replace(INSTRUCT, micro_batch=4)
    with pytest.raises(FloatingPointError, match="^step 1: loss: got nan, need a finite number; its batch is in .*step-1-process-0.pt$") as error:
        train(model, (stage,), {"instruct": replace(poisoned, collate=bad)}, tmp_path)
    assert "\n" not in str(error.value) and equal(before, weights_of(model))
    parts = torch.load(tmp_path / "bad_batch" / "step-1-process-0.pt", weights_only=True)
    assert len(parts) == 2 and parts[1]["images"].isnan().all() and not parts[0]["images"].isnan().any() and parts[1]["names"]
    assert {"input_ids", "labels", "mask", "prefixes", "prefix_of", "starts"} < set(parts[0]) and not has_checkpoint(tmp_path)


def test_a_bad_gradient_is_kept(make_model, small, tmp_path):
    model, stage = make_model(), Stage(steps=3, batch_size=4, optimizer="muon", lr=3e-3)
    model.connector.linear1.weight.register_hook(lambda g: g * math.inf)
    before, data = weights_of(model), VQABatches(small.train, 3, 4, questions=2)
    with pytest.raises(FloatingPointError, match="^step 0: gradient: norm: got (nan|inf), need a finite number; its batch is in "):
        train(model, (stage,), {"train": data}, tmp_path)
    kept, = torch.load(tmp_path / "bad_batch" / "step-0-process-0.pt", weights_only=True)
    assert torch.equal(kept["images"], data[0].images) and kept["input_ids"].shape == kept["labels"].shape
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(FloatingPointError, match="^step 0: gradient: norm: got (nan|inf), need a finite number$"):         # nowhere to keep it
        train(model, (stage,), {"train": data})


# Validation, processes

def test_validation_loss_is_the_mean_over_tokens(make_model, talks):
    model = make_model().train()
    batches = source(model, talks, ALIGN)
    whole, parts = validation_loss(model, batches, 2), validation_loss(model, replace(batches, batch_size=2), 8)
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5) and model.training
    assert all(p.grad is None for p in model.parameters())


def test_who_is_who(monkeypatch):
    assert main_process() and process_device("cpu") == torch.device("cpu")
    alone = Processes("cpu", "fsdp")
    assert (alone.parallel, alone.count, alone.rank, alone.device) == ("none", 1, 0, torch.device("cpu"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert not main_process() and process_device("cuda") == torch.device("cuda:3") and process_device("cpu").index is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert [Processes("cpu", parallel).parallel for parallel in ("auto", "ddp", "fsdp")] == ["ddp", "ddp", "fsdp"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert Processes("cpu").parallel == "fsdp" and Processes("cpu").rank == 1


def test_preparer_reads_pictures_as_the_model_does(make_model, small):
    model, picture = make_model(), small.rows[0]["image"]
    from vlmamba_lite.data.pictures import normalize
    read = picture_reader(model)([picture, picture.convert("L")])
    assert read.dtype == torch.uint8 and torch.equal(normalize(read[:1]), model.pixels(picture))
    assert Preparer(model.tokenizer, "lite", process=picture_reader(model)) is not None
