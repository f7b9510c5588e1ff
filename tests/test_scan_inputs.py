"""What a selective scan refuses, and the message it refuses it with; backends that cannot run."""
import sys
import types

import pytest
import torch
from scan_cases import OURS, cast, draw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vlmamba_lite.ops.selective_scan as scan_module
from vlmamba_lite.ops.selective_scan import backends, resolve, selective_scan
from vlmamba_lite.ops.chunked import selective_scan_chunked
from vlmamba_lite.ops.reference import check_scan_inputs


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


# u is (2, 4, 37), N is 3, B and C have one group
WRONG_SHAPES = [
    ("u", zeros(4, 37), r"u: got \(4, 37\), need \(batch, channels, length\)"),
    ("u", zeros(2, 4, 0), r"u: got \(2, 4, 0\), need .* length of at least 1"),
    ("delta", zeros(2, 4, 36), r"delta: got \(2, 4, 36\), need \(2, 4, 37\)"),
    ("delta", zeros(2, 1, 37), r"delta: got \(2, 1, 37\), need \(2, 4, 37\)"),          # would broadcast, silently
    ("A", zeros(3, 4), r"A: got \(3, 4\), need \(4, N\)"),
    ("A", zeros(4), r"A: got \(4,\), need \(4, N\)"),
    ("A", zeros(4, 0), r"A: got \(4, 0\), need \(4, N\)"),
    ("B", zeros(2, 5, 37), r"B: got \(2, 5, 37\), need \(4, 3\), \(2, 3, 37\) or \(2, G, 3, 37\)"),
    ("B", zeros(2, 3, 3, 37), r"B: got \(2, 3, 3, 37\), need .* a G that divides 4"),
    ("B", zeros(2, 0, 3, 37), r"B: got \(2, 0, 3, 37\), need .* a G that divides 4"),
    ("C", zeros(3, 4), r"C: got \(3, 4\), need \(4, 3\)"),
    ("C", zeros(1, 3, 37), r"C: got \(1, 3, 37\), need .*\(2, 3, 37\)"),
    ("C", zeros(3), r"C: got \(3,\), need"),
    ("D", zeros(4, 1), r"D: got \(4, 1\), need \(4,\)"),
    ("z", zeros(2, 37, 4), r"z: got \(2, 37, 4\), need \(2, 4, 37\)"),
    ("delta_bias", zeros(1), r"delta_bias: got \(1,\), need \(4,\)"),
    ("initial_state", zeros(4, 3), r"initial_state: got \(4, 3\), need \(2, 4, 3\)"),
]


@pytest.mark.parametrize("name, value, message", WRONG_SHAPES)
@pytest.mark.parametrize("backend", OURS)
def test_wrong_shape(backend, name, value, message):
    with pytest.raises(ValueError, match="^" + message):
        selective_scan(**{**draw(), name: value}, backend=backend)


TENSORS = [k for k, v in draw().items() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("backend", OURS)
def test_wrong_kind(backend, name):
    args = draw()
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"^{name}: got {dtype}, need a real floating-point dtype"):
            selective_scan(**{**args, name: args[name].to(dtype)}, backend=backend)
    with pytest.raises(ValueError, match=f"^{name}: got ndarray, need a tensor"):
        selective_scan(**{**args, name: args[name].numpy()}, backend=backend)


@pytest.mark.parametrize("name", [n for n in TENSORS if n != "u"])
def test_mixed_devices(name):
    args = draw()
    with pytest.raises(ValueError, match=f"^{name}: got meta, need cpu, the device of u"):
        selective_scan(**{**args, name: args[name].to("meta")})


@pytest.mark.parametrize("backend", OURS)
def test_positive_A(backend):
    args = draw()
    args["A"][2, 1] = 0.25
    with pytest.raises(ValueError, match="^A: got a largest entry of 0.25, need no entry above 0"):
        selective_scan(**args, backend=backend)
    args["A"][2, 1] = 0.0                                           # no decay at all is allowed
    assert selective_scan(**args, backend=backend).isfinite().all()


def test_values_of_A_are_not_read_on_other_devices():
    check_scan_inputs(**{k: v.to("meta") for k, v in draw().items() if isinstance(v, torch.Tensor)})


def test_missing_argument_and_chunk_size():
    args = draw()
    with pytest.raises(TypeError, match="'C'"):
        selective_scan(**{k: v for k, v in args.items() if k != "C"})
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"chunk_size: got {size}, need at least 1"):
            selective_scan_chunked(**args, chunk_size=size)


def test_required_arguments_may_not_be_none():
    args = draw()
    for name in ("u", "delta", "A", "B", "C"):
        with pytest.raises(ValueError, match=f"^{name}: got NoneType, need a tensor"):
            selective_scan(**{**args, name: None})


# --- backends -----------------------------------------------------------------------------------------------------------

def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: got 'fast', need 'auto' or one of 'reference', .*'chunked'"):
        selective_scan(**draw(), backend="fast")


def test_backends_says_why_not():
    found = backends()
    assert {"reference", "hillis_steele", "blelloch", "chunked"} <= set(OURS) and all(found[name] is None for name in OURS)
    assert set(OURS) | {"cpp", "mamba_ssm"} <= set(found)
    reason = found["mamba_ssm"]
    if reason is not None:
        assert "CUDA" in reason or "does not import" in reason
        with pytest.raises(RuntimeError, match="backend 'mamba_ssm' cannot run here: "):
            selective_scan(**draw(), backend="mamba_ssm")


def test_mamba_ssm_that_does_not_import(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    assert backends()["mamba_ssm"].startswith("mamba_ssm does not import (ModuleNotFoundError: ")


def test_auto_on_a_cpu_is_the_compiled_scan(monkeypatch):
    "Where there is a compiler, and nothing looks on that would have to see each operation."
    u, A = torch.ones(1, 1, 1), torch.ones(1, 2)
    monkeypatch.setitem(scan_module._BACKENDS, "cpp", (None, lambda: None))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert resolve("auto", u.to(dtype), A) == resolve("auto", torch.nn.Parameter(u.to(dtype)), A) == "cpp"
    with FlopCounterMode(display=False):
        assert resolve("auto", u, A) == "chunked"
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(u)
    for watched in (fake, u.to("meta"), u.as_subclass(type("Traced", (torch.Tensor,), {}))):
        assert resolve("auto", watched, A) == "chunked"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert resolve("auto", u, A) == "chunked"
    monkeypatch.undo()
    monkeypatch.setitem(scan_module._BACKENDS, "cpp", (None, lambda: "no compiler"))
    assert resolve("auto", u, A) == "chunked"


class Stub:
    "Stands where the official kernel would: records what it is called with."
    def __init__(self, monkeypatch):
        module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
        module.selective_scan_fn = self
        for name in ("mamba_ssm", "mamba_ssm.ops", "selective_scan_cuda"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def __call__(self, *args):
        self.args = args
        return args[0]


def test_mamba_ssm_gets_its_own_dtypes(monkeypatch):
    stub = Stub(monkeypatch)
    assert backends()["mamba_ssm"] is None
    monkeypatch.setattr(scan_module, "_mamba_ssm_lacks", lambda *_: None)         # there is no GPU here
    args = cast(draw(optional=("D", "z", "delta_bias"), b_form="constant"), torch.bfloat16)
    selective_scan(**args, backend="mamba_ssm")
    u, delta, A, B, C, D, z, bias, softplus, last = stub.args
    assert {x.dtype for x in (u, delta, C, z)} == {torch.bfloat16} and softplus is True and last is False
    assert {x.dtype for x in (A, B, D, bias)} == {torch.float32}


@pytest.mark.parametrize("change, message", [
    ({}, "tensors on the CPU"), ({"device": "cuda", "dtype": torch.float64}, "float64"),
    ({"device": "cuda", "state": True}, "an initial_state"), ({"device": "cuda", "last": True}, "a last state with a gradient"),
    ({"device": "cuda", "groups": (2, 4)}, "B and C of different numbers of groups"), ({"device": "cuda"}, None)])
def test_mamba_ssm_refuses_what_it_lacks(change, message):
    u = types.SimpleNamespace(device=types.SimpleNamespace(type=change.get("device", "cpu")), dtype=change.get("dtype", torch.float32))
    B, C = (torch.zeros(2, g, 3, 37) for g in change.get("groups", (1, 1)))
    lacks = scan_module._mamba_ssm_lacks(u, B, C, change.get("state"), change.get("last", False), True)
    assert lacks is None if message is None else lacks.startswith(message)


def test_mamba_ssm_on_the_cpu_is_refused(monkeypatch):
    Stub(monkeypatch)
    with pytest.raises(RuntimeError, match="backend 'mamba_ssm': got tensors on the CPU, which the official kernel cannot do"):
        selective_scan(**cast(draw(), torch.float32), backend="mamba_ssm")
