"""Transition only: the names of the former module `vlmamba_lite.training`, for rooms that still import them. To be emptied."""
import importlib.util  # noqa: F401
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vlmamba_lite.data import Batch, VQABatches, augment, draw_questions, normalize
from vlmamba_lite.training.checkpoints import *  # noqa: F403
from vlmamba_lite.training.distributed import *  # noqa: F403
from vlmamba_lite.training.distributed import Processes
from vlmamba_lite.training.loop import *  # noqa: F403
from vlmamba_lite.training.loop import learned_tokens, train
from vlmamba_lite.training.optimizers import *  # noqa: F403
from vlmamba_lite.training.recipes import *  # noqa: F403
from vlmamba_lite.training.recipes import Stage, learning_rate
from vlmamba_lite.training.results import *  # noqa: F403
from vlmamba_lite.training.results import RUN_CONFIG, write_run_config  # noqa: F401


@dataclass
class TrainingConfig:
    steps: int = 1000
    batch_size: int = 32
    questions: int = 5
    lr: float = 3e-3
    warmup: float = 0.03
    final_lr: float = 0.01
    weight_decay: float = 0.05
    betas: tuple = (0.9, 0.98)
    clip: float = 1.0
    shift: int = 2
    phases: tuple = ((0.0, (3, 6, 0.02, 0.02, 100)), (0.2, (1, 1, 1, 3, 100)))
    evaluations: int = 6
    optimizer = "muon"

    def __post_init__(self):
        for name in ("steps", "batch_size", "questions", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least 1")


TRAINING_PRESETS = {"lite": TrainingConfig(), "tiny": TrainingConfig(steps=60, batch_size=16, evaluations=2)}


def as_stage(config, name="train"):
    same = ("steps", "batch_size", "lr", "warmup", "final_lr", "weight_decay", "betas", "clip", "evaluations")
    return Stage(name=name, optimizer="muon", source="this course, chosen on validation pictures", **{field: getattr(config, field) for field in same})


def question_weights(progress, config):
    return [weights for start, weights in config.phases if progress >= start][-1]


def batch_pictures(count, config, seed, step):
    per_pass = max(count // config.batch_size, 1)
    this_pass, place = divmod(step, per_pass)
    order = np.random.default_rng((seed, this_pass)).permutation(count)
    return order[place * config.batch_size:(place + 1) * config.batch_size]


def make_batch(data, config, seed, step):
    rng = np.random.default_rng((seed, step, 1))
    pictures = batch_pictures(len(data.images), config, seed, step)
    weights = question_weights(step / config.steps, config)
    rows = draw_questions(data.table[pictures], data.types, weights, config.questions, rng).reshape(-1)
    images = normalize(augment(data.images[pictures], rng, config.shift))
    longest = int((data.labels[rows] != -100).any(0).nonzero().max()) + 1
    return images, data.input_ids[rows, :longest], data.labels[rows, :longest]


def Lessons(data, config, seed=0):
    return VQABatches(data, config.steps, config.batch_size, seed, config.questions, config.phases, config.shift)


def as_batch(images, ids, labels):
    learned = (labels != -100) * torch.arange(1, labels.shape[1] + 1)
    return Batch.from_rows(images, ids, labels, torch.arange(labels.shape[1]) < learned.amax(1, keepdim=True))


def fit(model, data, config, folder, seed=0, evaluate=None, resume=False, on_step=None, on_check=None, log_every=10, **options):
    hear = on_step and (lambda report: on_step(report.step, report.loss))
    stage = as_stage(config)
    return train(model, (stage,), {stage.name: Lessons(data, config, seed)}, folder, seed, evaluate, resume, hear, on_check, log_every, **options)


def check_finite(name, value):
    number = value.item()
    if not np.isfinite(number):
        raise FloatingPointError(f"{name}: got {number}, need a finite number")
    return number


def begin_step(optimizers, lr):
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = lr


def end_step(model, optimizers, clip):
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    check_finite("gradient: norm", norm)
    for optimizer in optimizers:
        optimizer.step()


def train_step(model, optimizers, batch, lr, clip):
    begin_step(optimizers, lr)
    loss = model(*batch).loss
    number = check_finite("loss", loss)
    loss.backward()
    end_step(model, optimizers, clip)
    return number


def training_steps(model, optimizers, data, config, seed=0, start=0):
    for step in range(start, config.steps):
        batch = [t.to(next(model.parameters()).device) for t in make_batch(data, config, seed, step)]
        yield step + 1, train_step(model.train(), optimizers, batch, learning_rate(step / config.steps, config), config.clip)


def make_accelerator(device="cpu", trackers=(), folder="."):
    return Processes(device)


def accumulate(learner, batches, processes):
    batches = [as_batch(*batch) if isinstance(batch, tuple) else batch for batch in batches]
    counts, loss = [learned_tokens(batch) for batch in batches], 0
    for batch, count in zip(batches, counts):
        part = learner(batch.to(processes.device)) * count / sum(counts)
        part.backward()
        loss = loss + part.detach()
    return loss


__all__ = [name for name in dir() if not name.startswith("_") and name not in ("annotations",)]
