"""Optimizers against slow twins, one step by the book, and runs that stop, go on, and end the same."""
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
from dataclasses import asdict, replace

from measures import rms_error
import numpy as np
import pytest
import torch
from torch import nn

from vlmamba_lite.data.easy_vqa import VQABatches
from vlmamba_lite.files import tensors_in, write_json
from vlmamba_lite.connectors.connectors import CONNECTORS
from vlmamba_lite.model.vlmamba import VLMamba
from vlmamba_lite.training import results
from vlmamba_lite.training.checkpoints import latest_checkpoint, read_state, write_folder
from vlmamba_lite.training.distributed import Processes
from vlmamba_lite.training.loop import Learner, train, train_stage, train_step
from vlmamba_lite.training.optimizers import Muon, build_optimizers, newton_schulz, parameter_groups
from vlmamba_lite.training.recipes import Stage, learning_rate, pick_recipe
from vlmamba_lite.training.results import (RUN_CONFIG, MetricsLog, OtherRun, StopRequest, Stopwatch, check_run_config, plot_curves,
                                           prefix_reuse_cost, provenance, read_metrics, write_result)

SHORT = replace(pick_recipe("lite")[0], steps=9, batch_size=8, evaluations=3)
COMBINATIONS = [(connector, mixer) for connector in CONNECTORS for mixer in ("mamba", "mamba2")]


def fit(model, data, stage, folder=None, seed=0, evaluate=None, questions=3, **options):
    "A run of one stage on a `VQASet`."
    source = VQABatches(data, stage.steps, stage.batch_size, seed, questions)
    return train(model, (stage,), {stage.name: source}, folder, seed, evaluate, **options)


def read_tensors(folder, stem):
    return {name: read() for name, _, read in tensors_in(*sorted(folder.glob(f"{stem}*.safetensors")))}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(a, b):
    "Two nests of dicts and lists hold the same numbers, bit for bit."
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


# Muon

def quintic(s, rounds=5):
    "What Newton-Schulz does to one singular value, a plain number."
    for _ in range(rounds):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return s


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (1, 7), (7, 1), (1, 1), (3, 6, 4)])
def test_newton_schulz_acts_on_the_singular_values_alone(shape):
    X = randn(*shape)
    U, S, Vt = torch.linalg.svd(X, full_matrices=False)
    want = U @ torch.diag_embed(quintic(S / S.norm(dim=-1, keepdim=True))) @ Vt
    assert rms_error(newton_schulz(X), want) < 1e-6           # 1e-7 keeps the norm from being zero
    assert rms_error(newton_schulz(X, 0), X / X.norm(dim=(-2, -1), keepdim=True)) < 1e-6


def test_newton_schulz_comes_near_the_orthogonal_matrix():
    X = randn(24, 16) @ torch.diag(torch.logspace(0, -1.3, 16).double()) @ randn(16, 40, seed=1)
    U, S, Vt = torch.linalg.svd(X, full_matrices=False)
    U, Vt = U[:, :16], Vt[:16]
    got = newton_schulz(X)
    values = torch.linalg.svdvals(got)[:16]
    assert values.min() > 0.6 and values.max() < 1.25
    assert (got * (U @ Vt)).sum() / (got.norm() * 4) > 0.97   # the cosine with U V^T, whose norm is 4
    torch.testing.assert_close(newton_schulz(X.T.contiguous()), got.T)
    assert (newton_schulz(torch.zeros(3, 4)) == 0).all()


def muon_by_svd(p, gradients, lr, weight_decay, momentum=0.95):
    "Muon from its definition, one matrix at a time, in float64 and with a singular value decomposition."
    p, m = p.clone(), torch.zeros_like(p)
    for g in gradients:
        m = momentum * m + (1 - momentum) * g
        U, S, Vt = torch.linalg.svd(((1 - momentum) * g + momentum * m).flatten(1), full_matrices=False)
        update = U @ torch.diag(quintic(S / (S.norm() + 1e-7))) @ Vt
        p = p - lr * weight_decay * p - lr * 0.2 * math.sqrt(max(update.shape)) * update.view_as(p)
    return p


def step_all(starts, gradients, **options):
    "Muon over some tensors, one step for each list of gradients; returns the tensors."
    params = [nn.Parameter(p.clone()) for p in starts]
    optimizer = Muon(params, **options)
    for now in gradients:
        for p, g in zip(params, now):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


SHAPES = [(8, 6), (8, 6), (6, 8), (8, 3, 2, 1), (4, 4), (8, 3, 1, 2), (5, 1), (16, 2, 3, 3), (16, 18)]


def test_muon_is_its_definition():
    starts = [randn(*s, seed=i) for i, s in enumerate(SHAPES)]
    gradients = [[randn(*s, seed=100 * step + i) for i, s in enumerate(SHAPES)] for step in range(1, 5)]
    got = step_all(starts, gradients, lr=0.1, weight_decay=0.3, momentum=0.9)
    for i, p in enumerate(starts):
        assert rms_error(got[i] - p, muon_by_svd(p, [g[i] for g in gradients], 0.1, 0.3, 0.9) - p) < 1e-5
    faster = step_all([p.float() for p in starts], [[g.float() for g in now] for now in gradients], lr=0.1, weight_decay=0.3, momentum=0.9)
    assert all(rms_error(f, g) < 1e-4 for f, g in zip(faster, got))


def test_muon_of_equal_shapes_at_once_is_one_by_one():
    starts = [randn(*s, seed=i) for i, s in enumerate(SHAPES)]
    gradients = [[randn(*s, seed=100 * step + i) for i, s in enumerate(SHAPES)] for step in range(1, 4)]
    together = step_all(starts, gradients, lr=0.1)
    for i, p in enumerate(starts):
        alone, = step_all([p], [[g[i]] for g in gradients], lr=0.1)
        assert rms_error(together[i], alone) < 1e-12


def test_muon_takes_a_kernel_as_a_matrix():
    kernel, gradient = randn(8, 3, 3, 3), randn(8, 3, 3, 3, seed=1)
    got, = step_all([kernel], [[gradient]], lr=0.1)
    want, = step_all([kernel.flatten(1)], [[gradient.flatten(1)]], lr=0.1)
    assert got.shape == (8, 3, 3, 3) and rms_error(got.flatten(1), want) < 1e-12


def test_muon_moves_by_the_size_of_adam():
    "The root mean square of an update is lr * 0.2, whatever the shape and the size of the gradient (arXiv 2502.16982)."
    for shape in ((64, 64), (96, 24), (16, 8, 3, 3)):
        for scale in (1e-6, 1, 1e6):
            got, = step_all([torch.zeros(shape).double()], [[scale * randn(*shape)]], lr=0.01)
            assert 0.7 < got.square().mean().sqrt() / (0.2 * 0.01) < 1.1


def test_muon_decays_exactly_without_a_gradient():
    p = randn(6, 4, dtype=torch.float32)
    got, = step_all([p], [[torch.zeros(6, 4)]] * 2, lr=0.5, weight_decay=0.1)
    assert torch.equal(got, p * (1 - 0.05) * (1 - 0.05))
    assert torch.equal(step_all([p], [[torch.zeros(6, 4)]], lr=0.5, weight_decay=0)[0], p)


def test_muon_leaves_out_what_has_no_gradient():
    p, q = nn.Parameter(randn(3, 3)), nn.Parameter(randn(3, 3))
    optimizer, before = Muon([p, q], lr=0.1), p.detach().clone()
    q.grad = randn(3, 3, seed=1)
    optimizer.step()
    assert torch.equal(p, before) and p not in optimizer.state and not torch.equal(q, before)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_muon_agrees_with_the_one_of_torch(shape):
    start, gradients = randn(*shape, dtype=torch.float32), [randn(*shape, seed=i, dtype=torch.float32) for i in range(1, 4)]
    peer = nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([peer], lr=0.1, weight_decay=0.05, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for g in gradients:
        peer.grad = g.clone()
        optimizer.step()
    ours, = step_all([start], [[g] for g in gradients], lr=0.1, weight_decay=0.05, momentum=0.95)
    assert rms_error(ours - start, peer.detach() - start) < 0.05         # torch's iteration runs in bfloat16


def test_muon_goes_on_from_its_state():
    p, gradients = randn(5, 7), [randn(5, 7, seed=i) for i in range(1, 5)]
    straight, = step_all([p], [[g] for g in gradients], lr=0.1)
    q, state = nn.Parameter(p.clone()), None
    for g in gradients:
        optimizer = Muon([q], lr=0.1)                         # a new one for every step
        if state is not None:
            optimizer.load_state_dict(state)
        q.grad = g.clone()
        optimizer.step()
        state = optimizer.state_dict()
    assert torch.equal(q, straight)


# Groups

def treated(model):
    return {name: group for group, params in parameter_groups(model).items() for name in params}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("connector, mixer", COMBINATIONS)
def test_groups_hold_every_parameter_once(make_model, connector, mixer, tied):
    model = make_model(connector, mixer, n_layer=2, tie_embeddings=tied)
    groups = parameter_groups(model)
    held = [id(p) for group in groups.values() for p in group.values()]
    assert set(groups) == {"matrices", "decayed", "plain"} and len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}
    assert all(dict(model.named_parameters())[name] is p for group in groups.values() for name, p in group.items())
    optimized = [id(p) for o in build_optimizers(model, SHORT) for g in o.param_groups for p in g["params"]]
    assert sorted(optimized) == sorted(held)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("connector, mixer", COMBINATIONS)
def test_who_is_treated_how(make_model, connector, mixer, tied):
    model = make_model(connector, mixer, tie_embeddings=tied)
    how = treated(model)
    for name, p in model.named_parameters():
        if name.endswith(("A_log", ".D", "dt_bias", "bias")) or "norm" in name or ".1.weight" in name and "stages" in name:
            assert how[name] == "plain", name
        elif name.endswith(("embedding.weight", "lm_head.weight", "position", "conv1d.weight")):
            assert how[name] == "decayed", name
        else:
            assert how[name] == "matrices" and p.ndim in (2, 4), name
    assert ("language.lm_head.weight" in how) != tied
    assert {"plain", "decayed", "matrices"} == set(how.values())


def test_a_head_of_any_name_that_is_tied_is_no_matrix():
    net = nn.ModuleDict({"words": nn.Embedding(5, 4), "hidden": nn.Linear(4, 4), "out": nn.Linear(4, 5, bias=False)})
    assert treated(net)["out.weight"] == "matrices"
    net["out"].weight = net["words"].weight
    assert treated(net) == {"words.weight": "decayed", "hidden.weight": "matrices", "hidden.bias": "plain"}


def test_frozen_parameters_are_left_out(make_model, small):
    model = make_model()
    model.vision.requires_grad_(False)
    assert not [name for name in treated(model) if name.startswith("vision.")] and treated(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, small.train, replace(SHORT, steps=3, trains=("connector", "language")))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("vision.")}


def test_an_optimizer_without_parameters_is_left_out(make_model):
    model = make_model()
    model.requires_grad_(False)
    assert build_optimizers(model, SHORT) == []
    model.language.backbone.norm_f.weight.requires_grad_(True)
    optimizer, = build_optimizers(model, SHORT)
    assert isinstance(optimizer, torch.optim.AdamW) and [g["weight_decay"] for g in optimizer.param_groups] == [0]
    model.requires_grad_(False)
    model.connector.linear1.weight.requires_grad_(True)
    assert [type(o) for o in build_optimizers(model, SHORT)] == [Muon]


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_without_gradients_only_the_decayed_shrink(make_model, mixer):
    model = make_model(mixer=mixer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)                                       # none is zero
    before, how = {name: p.detach().clone() for name, p in model.named_parameters()}, treated(model)
    optimizers = build_optimizers(model, replace(SHORT, lr=0.1, weight_decay=0.5))
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for optimizer in optimizers:
            optimizer.step()
    assert {name for name in how if name.endswith("A_log")} and {name for name in how if name.endswith(".D")}
    for name, p in model.named_parameters():
        if how[name] == "plain":
            assert torch.equal(p, before[name]), name
        else:
            torch.testing.assert_close(p.detach(), before[name] * 0.95 ** 2, msg=name)


# The schedule

def test_learning_rate_by_hand():
    config = Stage(steps=1, lr=2.0, warmup=0.1, final_lr=0.1)
    for progress, want in ((0, 0), (0.05, 1), (0.1, 2), (0.55, 0.2 + 1.8 / 2), (0.1 + 0.9 / 3, 0.2 + 1.8 * 0.75), (1 - 1e-9, 0.2)):
        assert learning_rate(progress, config) == pytest.approx(want, abs=1e-8)
    rates = [learning_rate(p, config) for p in np.linspace(0, 1, 1000, endpoint=False)]
    assert np.argmax(rates) == 100 and (np.diff(rates[:101]) > 0).all() and (np.diff(rates[100:]) < 0).all()
    assert learning_rate(0, Stage(steps=1, lr=2.0, warmup=0)) == 2


# Steps

def test_a_step_trains_by_the_book(make_model, small):
    "Clipped gradient, the schedule's rate in every group, AdamW for the plain ones: against torch's functions, by hand."
    model, twin = make_model().train(), make_model().train()
    batch = VQABatches(small.train, SHORT.steps, 8, 0, 3)[1]
    optimizers = build_optimizers(model, SHORT)
    loss = train_step(Learner(model), optimizers, [batch], 0.01, 0.1, Processes())
    assert all(group["lr"] == 0.01 for o in optimizers for group in o.param_groups)
    want_loss = twin(batch).loss
    want_loss.backward()
    norm = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
    assert loss == want_loss.item() and norm > 0.1
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        gradient = q.grad * 0.1 / norm
        if treated(model)[name] == "matrices":
            want = muon_by_svd(q.detach().double(), [gradient.double()], 0.01, 0.05)
        else:                                                 # Adam's first step: the sign of the gradient
            decay = 0.05 if treated(model)[name] == "decayed" else 0
            want = q.detach() * (1 - 0.01 * decay) - 0.01 * gradient / (gradient.abs() + 1e-8)
        assert rms_error(p.detach() - q.detach(), want - q.detach()) < 2e-2, name


def test_a_step_at_rate_zero_changes_nothing(make_model, small):
    model, losses = make_model(), []
    before = [p.detach().clone() for p in model.parameters()]
    done, _ = fit(model, small.train, replace(SHORT, steps=1, evaluations=1), on_step=lambda r: losses.append(r.loss))        # warm-up begins at 0
    assert done == 1 and losses[0] > 0 and all(map(torch.equal, model.parameters(), before)) and model.training


def test_a_tiny_model_learns(make_model, small):
    losses = []
    done, spent = fit(make_model(), small.train, replace(SHORT, steps=40, lr=1e-2), questions=5, on_step=lambda r: losses.append(r.loss))
    assert done == len(losses) == 40 and spent["cpu"] > 0 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def bad_gradient(loss, model):
    "A finite loss whose gradient is not: the root of zero."
    return loss + (0 * model.language.backbone.norm_f.weight).abs().sqrt().sum()


@pytest.mark.parametrize("poison", [lambda loss, _: loss * math.nan, lambda loss, _: loss + math.inf, bad_gradient],
                         ids=["nan", "inf", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_model, small, poison, monkeypatch):
    model, kept, calls, forward = make_model(), [], [], Learner.forward
    made = []

    def poisoned(learner, batch):
        calls.append(1)
        loss = forward(learner, batch)
        return poison(loss, model) if len(calls) == 4 else loss
    monkeypatch.setattr(Learner, "forward", poisoned)
    monkeypatch.setattr("vlmamba_lite.training.run.build_optimizers", lambda *a: made.extend(build_optimizers(*a)) or made)

    def states():
        return [[p.detach().clone() for p in model.parameters()], pickle.dumps([o.state_dict()["state"] for o in made])]
    with pytest.raises(FloatingPointError, match=r"^step 3: (loss|gradient).*: got .*(nan|inf).*, need a finite ") as error:
        fit(model, small.train, SHORT, on_step=lambda report: kept.append(states()))
    assert "\n" not in str(error.value) and len(kept) == 3
    now = states()
    assert all(map(torch.equal, now[0], kept[-1][0])) and now[1] == kept[-1][1]


# Stopping and going on

def without_times(lines):
    return [{k: v for k, v in line.items() if not k.endswith(("_seconds", "_per_second", "_bytes"))} for line in lines]


def everything(folder, model):
    "What a run leaves: weights in memory and on disk, the optimizers, the state and the log without its times."
    path = latest_checkpoint(folder)
    state = {k: v for k, v in read_state(path).items() if k != "seconds"}
    return [model.state_dict(), read_tensors(path, "model"), read_tensors(path, "optimizer"), state, without_times(read_metrics(folder / "metrics.jsonl"))]


def scores_of(model):
    "An `evaluate` that depends on the weights and leaves them alone."
    return {"all": float(sum(p.detach().abs().sum() for p in model.parameters()))}


@pytest.fixture(scope="module")
def straight(make_model, small, tmp_path_factory):
    "Nine steps in one go."
    folder, model = tmp_path_factory.mktemp("straight"), make_model()
    done, spent = fit(model, small.train, SHORT, folder, 4, scores_of, log_every=2)
    assert done == 9 and spent["cpu"] > 0 and spent["wall"] > 0
    return folder, everything(folder, model)


def test_a_run_leaves_a_model_and_a_log(make_model, straight):
    folder, (weights, stored, optimizers, state, lines) = straight
    assert {p.name for p in folder.iterdir()} == {"checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "tokenizer.json"}
    assert state["step"] == 9 and same({name: weights[name] for name in stored}, stored)
    assert {name.rpartition("/")[2] for name in optimizers} == {"momentum", "exp_avg", "exp_avg_sq", "step"}
    assert same(dict(VLMamba.from_pretrained(latest_checkpoint(folder)).state_dict()), dict(weights))
    assert same(dict(VLMamba.from_pretrained(folder).state_dict()), dict(weights))
    assert [line["step"] for line in lines if "loss" in line] == [2, 3, 4, 6, 8, 9]
    assert [line["step"] for line in lines if "validation" in line] == [3, 6, 9]
    assert lines[-1] == {"step": 9, "stage": "train", "validation": scores_of(VLMamba.from_pretrained(folder))}
    full = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    for unit in ("cpu_seconds", "wall_seconds"):
        assert all(a[unit] <= b[unit] for a, b in zip(full, full[1:])) and full[-1][unit] > 0


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_ctrl_c_and_resume_is_the_run_without_a_stop(make_model, small, straight, tmp_path, stop):
    def on_step(report):
        if report.step == stop:
            signal.raise_signal(signal.SIGINT)
    model, before = make_model(), signal.getsignal(signal.SIGINT)
    done, spent = fit(model, small.train, SHORT, tmp_path, 4, scores_of, on_step=on_step, log_every=2)
    assert done == stop and signal.getsignal(signal.SIGINT) is before
    usable = VLMamba.from_pretrained(tmp_path)
    assert same(dict(usable.state_dict()), dict(model.state_dict()))
    assert isinstance(usable.ask(small.rows[0]["image"], "what color is the shape?"), str)
    fresh, steps = make_model(seed=99), []                    # its first weights do not matter: the checkpoint's do
    done, total = fit(fresh, small.train, SHORT, tmp_path, 4, scores_of, resume=True, on_step=lambda r: steps.append(r.step), log_every=2)
    assert done == 9 and steps == list(range(stop + 1, 10)) and total["cpu"] > spent["cpu"] and total["wall"] > spent["wall"]
    assert same(everything(tmp_path, fresh), straight[1])


def test_a_crash_and_resume_is_the_run_without_a_crash(make_model, small, straight, tmp_path):
    "Killed after step 8: it goes on from the checkpoint at 6, and what the log says beyond it is dropped."
    def on_step(report):
        if report.step == 8:
            raise MemoryError
    with pytest.raises(MemoryError):
        fit(make_model(), small.train, SHORT, tmp_path, 4, scores_of, on_step=on_step, log_every=2)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")][-1] == 8
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')                         # torn in the middle of a line
    model = make_model(seed=99)
    fit(model, small.train, SHORT, tmp_path, 4, scores_of, resume=True, log_every=2)
    assert same(everything(tmp_path, model), straight[1])


def test_a_finished_run_has_nothing_to_go_on_with(make_model, small, straight):
    folder, want = straight
    model, steps = make_model(seed=99), []
    done, spent = fit(model, small.train, SHORT, folder, 4, scores_of, resume=True, on_step=steps.append)
    assert done == 9 and steps == [] and spent["cpu"] > 0 and same(everything(folder, model), want)


def test_ctrl_c_at_any_line_leaves_a_checkpoint_of_the_last_step(make_model, small, tmp_path):
    "The signal may come between any two lines of the loop, also before the first step and after the last look at it."
    stage, at = replace(SHORT, steps=2, batch_size=2, evaluations=1), 0
    outcomes = set()
    while at < 120:
        count, folder, codes = [0], tmp_path / str(at), (train_stage.__code__, train_step.__code__)

        def trace(frame, event, _):
            if frame.f_code not in codes:
                return None
            if event == "line":
                count[0] += 1
                if count[0] == at + 1:
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGINT)
            return trace
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            done, _ = fit(make_model(), small.train, stage, folder, questions=1)
        finally:
            sys.settrace(before)
        if count[0] <= at:
            break
        assert read_state(latest_checkpoint(folder))["step"] == done, f"stopped at line event {at}"
        VLMamba.from_pretrained(folder)
        outcomes.add(done)
        at += 1
    assert outcomes == {0, 1, 2} and 10 < at < 120


def test_stop_request():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.asked is False
        signal.raise_signal(signal.SIGINT)
        assert stop.asked is True
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_needs_its_seed(make_model, small, straight, tmp_path):
    folder, _ = straight
    model = make_model(seed=5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="^seed: got 3, need 4, the seed this run began with$"):
        fit(model, small.train, SHORT, folder, 3, resume=True)
    with pytest.raises(FileNotFoundError, match="^resume: no checkpoint in "):
        fit(model, small.train, SHORT, tmp_path, 4, resume=True)
    with pytest.raises(ValueError, match="^resume: got True without a folder"):
        fit(model, small.train, SHORT, resume=True)
    assert same(dict(model.state_dict()), before)


def test_a_checkpoint_that_is_pickled_code_does_not_run(make_model, small, tmp_path):
    "Whoever can write a checkpoint can write its manifest as well: what is read must be data even when the checksums agree."
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    def stop(_):
        signal.raise_signal(signal.SIGINT)
    run = tmp_path / "run"
    fit(make_model(), small.train, SHORT, run, on_step=stop)
    path = latest_checkpoint(run)
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}
    damaged = [{"optimizer.safetensors": pickle.dumps(Malice())}, {"model.safetensors": pickle.dumps(Malice())}, {"state.json": pickle.dumps(Malice())},
               {"state.json": b""}, {"model.safetensors": b"abc"}, {"model.safetensors": files["optimizer.safetensors"]}, {"manifest.json": b"{"}]
    for change in damaged:
        shutil.rmtree(path)
        write_folder(path, lambda part: [(part / name).write_bytes(data) for name, data in {**files, **change}.items() if name != "manifest.json"])
        if "manifest.json" in change:
            (path / "manifest.json").write_bytes(change["manifest.json"])
        with pytest.raises(ValueError, match="^resume: .*step-00000001") as error:
            fit(make_model(), small.train, SHORT, run, resume=True)
        assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_a_run_goes_on_only_with_its_configuration(tmp_path):
    settings = dict(preset="tiny", seed=0, training=asdict(SHORT), model={"width": 8})
    with pytest.raises(ValueError, match=f"^resume: no {RUN_CONFIG} in .*; --resume-changed goes on without it$"):
        check_run_config(tmp_path, settings)
    write_json(tmp_path / RUN_CONFIG, settings)
    check_run_config(tmp_path, settings)                      # tuples are lists on disk: no difference
    with pytest.raises(OtherRun, match="^preset: got lite, need tiny, with which this run began$") as error:
        check_run_config(tmp_path, {**settings, "preset": "lite"})
    assert not error.value.fixed
    with pytest.raises(OtherRun, match="steps.*10.*need.*9.*with which this run began$") as error:
        check_run_config(tmp_path, {**settings, "training": asdict(replace(SHORT, steps=10))})
    assert error.value.fixed and "batch_size" not in str(error.value)               # it names what differs and not all that does not


# Logs and results

def test_the_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 5):
        log.write(step=step, loss=step / 3)
    assert read_metrics(path) == [{"step": s, "loss": s / 3} for s in range(1, 5)]          # every digit is kept
    MetricsLog(path, start=3).write(step=4, loss=0.0)
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 0.0)]
    MetricsLog(path)
    assert read_metrics(path) == []


def test_the_stopwatch():
    import time
    watch = Stopwatch({"cpu": 10.0, "wall": 20.0})
    with watch:
        time.sleep(0.05)
    time.sleep(0.05)                                          # not measured
    assert 0.04 < watch.spent["wall"] - 20 and watch.spent["cpu"] - 10 < 0.04
    between = dict(watch.spent)
    assert watch.spent == between and Stopwatch().spent == {"cpu": 0.0, "wall": 0.0}
    with watch:
        sum(range(10 ** 5))
    assert watch.spent["cpu"] > between["cpu"]


def test_curves(straight, tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    metrics = read_metrics(straight[0] / "metrics.jsonl")
    left, right = plot_curves(metrics, tmp_path / "curves.png").axes
    assert list(left.lines[0].get_xdata()) == [2, 3, 4, 6, 8, 9]
    assert right.lines[0].get_ydata() == pytest.approx([100 * m["validation"]["all"] for m in metrics if "validation" in m])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1
    left, right = plot_curves([{"step": 1, "loss": 2.0}]).axes
    assert not right.lines
    plt.close("all")


def test_provenance(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/vlmamba", "train", "--seed", "1"])
    found = provenance()
    assert set(found) == {"commit", "command", "hardware", "versions", "date"} and found["command"] == "vlmamba train --seed 1"
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|release \d+\.\d+\.\d+", found["commit"])
    assert set(found["hardware"]) == {"cpu", "cores", "threads", "gpu"} and found["hardware"]["cpu"] and found["hardware"]["cores"] >= 1
    assert found["versions"]["torch"] == torch.__version__ and found["versions"].keys() == {"vlmamba_lite", "torch", "python"}
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", found["date"])
    write_result(tmp_path / "sub" / "result.json", score=0.5, seed=1)
    written = json.loads((tmp_path / "sub" / "result.json").read_text())
    assert written["score"] == 0.5 and written["seed"] == 1 and written["commit"] == found["commit"]


def test_provenance_where_there_is_no_git(monkeypatch, tmp_path):
    "Minutes of training must not end without a result because a program is not installed."
    import vlmamba_lite
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["commit"] == f"release {vlmamba_lite.__version__}"


def test_provenance_is_not_that_of_another_repository(monkeypatch, tmp_path):
    "Installed in the virtual environment of someone's project, git answers for that project."
    import subprocess

    import vlmamba_lite
    installed = tmp_path / "venv" / "site-packages" / "vlmamba_lite"
    installed.mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    try:
        subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    except FileNotFoundError:
        pytest.skip("no git")
    (tmp_path / "theirs.py").write_text("")
    subprocess.run([*git, "add", "theirs.py"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "theirs"], cwd=tmp_path, check=True)
    monkeypatch.setattr(results, "__file__", str(installed / "results.py"))
    assert provenance()["commit"] == f"release {vlmamba_lite.__version__}"


def test_prefix_reuse_cost(make_model, small):
    model = make_model().train()
    cost = prefix_reuse_cost(model, small.train, questions=2, repeats=1)
    assert set(cost) == {"questions", "pictures", "repeats", "once_cpu_seconds", "repeated_cpu_seconds", "ratio"}
    assert (cost["questions"], cost["pictures"], cost["repeats"]) == (2, 32, 1) and cost["once_cpu_seconds"] > 0
    assert cost["ratio"] == pytest.approx(cost["repeated_cpu_seconds"] / cost["once_cpu_seconds"])
    assert all(p.grad is None for p in model.parameters())
