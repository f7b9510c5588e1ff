"""The selective scans against independent code: transformers' slow path and the official reference, live or as golden tensors.

Everything here runs on a CPU. The official `selective_scan_ref` needs mamba_ssm to be installed, but not its CUDA part;
without it the golden tensors, made by it (see data/golden), stand in. The last tests need a CUDA GPU.
"""
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from measures import cuda
from safetensors import safe_open
from scan_cases import OURS, assert_near, cast, draw, outputs_and_gradients

from vlmamba_lite.ops.selective_scan import backends, selective_scan

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "golden" / "selective_scan.safetensors"
CASES = {                                                           # what the official function can do: no initial state
    "plain": dict(optional=(), b_form="step", c_form="step"),
    "everything": dict(optional=("D", "z", "delta_bias"), b_form="step", c_form="step"),
    "constant": dict(optional=("D",), b_form="constant", c_form="constant", softplus=False),
    "groups": dict(optional=("z", "delta_bias"), b_form=2, c_form=2),
    "length 1": dict(length=1, optional=("D", "z"), b_form="step", c_form="step"),
}


def official_reference(monkeypatch):
    "selective_scan_ref of mamba_ssm, its CUDA extensions replaced by empty modules for as long as the test runs."
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        pytest.skip("mamba_ssm is not installed")
    package = types.ModuleType("mamba_ssm")                         # the package without its __init__, which wants a GPU
    package.__path__ = list(spec.submodule_search_locations)
    for name in [n for n in sys.modules if n.startswith("mamba_ssm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    if importlib.util.find_spec("selective_scan_cuda") is None:
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    except ImportError as error:
        pytest.skip(f"mamba_ssm does not import: {error}")
    finally:
        for name in [n for n in sys.modules if n.startswith("mamba_ssm.")]:
            del sys.modules[name]


@pytest.mark.parametrize("case", CASES)
def test_official_reference(monkeypatch, case):
    official, args = official_reference(monkeypatch), draw(**CASES[case])
    want = outputs_and_gradients(official, args, torch.float32)
    for backend in OURS:
        got = outputs_and_gradients(selective_scan, args, torch.float32, backend=backend)
        assert_near(got[0], want[0], 2e-6)
        assert_near(got[1], want[1], 1e-5)


@pytest.mark.parametrize("backend", OURS)
def test_golden_tensors(backend):
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert {name.split("/")[0] for name in tensors} == set(CASES)
    for case, settings in CASES.items():
        def part(kind, case=case):
            head = f"{case}/{kind}/"
            return {k[len(head):]: v for k, v in tensors.items() if k.startswith(head)}

        args = {**part("input"), "delta_softplus": settings.get("softplus", True)}
        values, grads = outputs_and_gradients(selective_scan, args, torch.float32, backend=backend)
        assert_near(values, part("output"), 2e-6)
        assert_near(grads, part("gradient"), 1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("constant", "groups")])     # it knows (B, N, L) only
@pytest.mark.parametrize("backend", OURS)
def test_transformers_slow_path(backend, case):
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba", reason="needs transformers")
    peer = getattr(modeling, "mamba_selective_scan", None)
    if peer is None:
        pytest.skip("this transformers has no mamba_selective_scan")
    peer, args = getattr(peer, "__wrapped__", peer), draw(**CASES[case])      # without its search for a kernel
    want = outputs_and_gradients(lambda u, delta, **rest: peer(u, delta, **rest), args, torch.float32)
    got = outputs_and_gradients(selective_scan, args, torch.float32, backend=backend)
    assert_near(got[0], want[0], 2e-6)
    assert_near(got[1], want[1], 1e-5)


@cuda
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [*OURS, "mamba_ssm"])
def test_on_cuda(backend, case):
    if backends()[backend] is not None:
        pytest.skip(backends()[backend])
    args = draw(**CASES[case])
    args = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    if backend == "mamba_ssm":                                      # its last state has no gradient
        y = selective_scan(**cast(args, torch.float32), backend=backend)
        assert_near({"y": y}, {"y": selective_scan(**args, backend="reference")}, 1e-5)
        return
    want = outputs_and_gradients(selective_scan, args, backend="reference")
    got = outputs_and_gradients(selective_scan, args, torch.float32, backend=backend)
    assert_near(got[0], want[0], 2e-6)
    assert_near(got[1], want[1], 1e-5)
