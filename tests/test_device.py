"""Device mistakes found without a device: all runs on PyTorch's meta device, which like a GPU refuses tensors of the CPU, and whatever would wait
for a GPU is counted.

A tensor made where it should not be (`torch.arange(n)` without a device) fails here; so does a step that waits for the device more than once.
"""
import sys
import traceback
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmamba_lite.connectors.connectors import CONNECTORS
from vlmamba_lite.data.batches import Batches, Mixture, Preparer, collate, collate_by_image, collate_packed
from vlmamba_lite.data.conversations import Conversation
from vlmamba_lite.data.easy_vqa import VQABatches
from vlmamba_lite.evaluation.answers import answer_all
from vlmamba_lite.training import loop
from vlmamba_lite.training.recipes import Stage

aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
NUMBERS = {torch.bool: True, torch.int64: 1}


class Elsewhere(TorchDispatchMode):
    "Meta tensors as if they were on a GPU: no operation takes tensors of both, `waits` lists the lines that wait for a value."

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self):
        frames = [f for f in traceback.extract_stack() if "vlmamba_lite/" in f.filename and "/tests/" not in f.filename]
        self.waits.append(f"{frames[-1].filename.rpartition('vlmamba_lite/')[2]}: {frames[-1].line}" if frames else "elsewhere")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim or t.is_meta}                  # a number may come from the CPU
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            self.wait()
            return NUMBERS.get(args[0].dtype, 1.0)
        if func is aten.nonzero.default and args[0].is_meta:
            self.wait()
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.int64, device="meta")
        if func in INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1]):      # it asks where they are true
            self.wait()
            chosen = [i for t in args[1] for i in ([t] if t is None or t.dtype != torch.bool else [torch.empty(t.numel(), dtype=torch.int64, device="meta")] * t.ndim)]
            args = (args[0], chosen, *args[2:])
        if func is aten._to_copy.default and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.wait()
            dtype = kwargs.get("dtype") or args[0].dtype       # whole numbers may be places: all different
            return torch.arange(args[0].numel(), dtype=dtype).view(args[0].shape) if dtype == torch.int64 else torch.ones(args[0].shape, dtype=dtype)
        if func is aten.equal.default and args[0].is_meta:
            self.wait()
            return True
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.wait()
            return args[0]
        if "_fused_adam" in str(func):                         # it has no form for tensors without data
            assert devices == {"meta"}
            return None
        if len(devices) > 1 and func is not aten.copy_.default:
            raise RuntimeError(f"{func} got tensors on {' and on '.join(sorted(devices))}")
        return func(*args, **kwargs)


@pytest.fixture
def elsewhere(monkeypatch):
    "The mode, and what PyTorch offers for real devices alone."
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(sys.modules[torch.optim.Optimizer.__module__], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    return Elsewhere()


class Talks:
    "Conversations of several lengths, one in four without a picture."

    def __init__(self, rows, pictures=True):
        self.rows, self.pictures = rows, pictures

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        turns = list(zip(self.rows[i]["questions"], self.rows[i]["answers"]))[:1 + i % 3]
        return Conversation(str(i), [self.rows[i]["image"]] if self.pictures and i % 4 else [], turns)


def test_a_tensor_on_the_wrong_device_is_found(elsewhere):
    with elsewhere, torch.device("meta"):
        x = torch.ones(3)
        assert (x * 2 + torch.tensor(1.0, device="cpu")).is_meta and not elsewhere.waits
        with pytest.raises(RuntimeError, match="got tensors on cpu and on meta"):
            x + torch.ones(3, device="cpu")
        with pytest.raises(RuntimeError, match="got tensors on cpu and on meta"):
            x[torch.tensor([0, 1], device="cpu")]
        for wait in (x.sum().item, x.tolist, x.nonzero, lambda: bool(x.any()), lambda: x.to("cpu"), lambda: x[x > 0]):
            before = len(elsewhere.waits)
            wait()
            assert len(elsewhere.waits) > before


def steps_of(model, source, stage, elsewhere, monkeypatch):
    "Trains on the device; the lines that waited for it in each step, forward to optimizer."
    waits, step = [], loop.train_step

    def counted(*args):
        before = len(elsewhere.waits)
        loss = step(*args)
        waits.append(elsewhere.waits[before:])
        return loss
    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr("vlmamba_lite.training.run.check_moved", lambda *args: None)          # nothing has a value
    with elsewhere:
        model = model.to("meta")
        loop.train(model, (stage,), {stage.name: source}, evaluate=lambda model: {"all": 1.0})
    assert len(waits) == stage.steps and all(p.is_meta and (p.grad is None or p.grad.is_meta) for p in model.parameters())
    return waits


def check_waits(waits):
    "Once in a step, for the number in the log."
    for step in waits:
        assert len(step) == 1, step


@pytest.mark.parametrize("mixer, optimizer", [("mamba", "adamw"), ("mamba2", "muon")])
@pytest.mark.parametrize("connector", list(CONNECTORS))
def test_a_training_step_waits_once(make_model, small, elsewhere, monkeypatch, connector, mixer, optimizer):
    stage = Stage(steps=1, batch_size=4, micro_batch=2, optimizer=optimizer, ema=0.9, recompute=mixer == "mamba", precision="bf16")
    source = VQABatches(small.train, 1, 4, questions=2)
    check_waits(steps_of(make_model(connector, mixer), source, stage, elsewhere, monkeypatch))


@pytest.mark.parametrize("pack", [collate, collate_by_image, partial(collate_packed, length=64)], ids=["rows", "by image", "packed"])
@pytest.mark.parametrize("pictures", [True, False])
def test_conversations_train_on_the_device(make_model, small, elsewhere, monkeypatch, pack, pictures):
    model = make_model()
    source = Batches(Mixture([Talks(list(small.rows)[:8], pictures)]), Preparer(model.tokenizer, "lite"), 4, pack)
    waits = steps_of(model, source, Stage(steps=2, batch_size=4, trains=("connector", "language")), elsewhere, monkeypatch)
    check_waits(waits)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("connector", list(CONNECTORS))
def test_asking_chatting_and_measuring_stay_on_the_device(make_model, small, elsewhere, connector, mixer):
    model, picture = make_model(connector, mixer), small.rows[0]["image"]
    question = small.rows[0]["questions"][0]
    with elsewhere:
        model = model.to("meta").eval()
        model.ask(picture, question)
        state = model.read_image(picture)
        assert all(part.is_meta for layer in state for part in layer)
        model.ask(model.read_image(picture, state), question)
        ids = torch.ones(2, 5, dtype=torch.int64, device="meta")
        for options in (dict(), dict(temperature=1.0, top_k=3, top_p=0.9)):
            model.language.generate(ids, 3, **options)
        chat = model.chat(picture)
        for _ in range(2):
            chat.ask(question) if hasattr(chat, "ask") else list(chat.say(question))
        answer_all(model, small.data)
        loop.validation_loss(model, VQABatches(small.train, 2, 4, questions=2), 2)
