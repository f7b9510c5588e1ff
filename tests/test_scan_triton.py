"""The Triton kernels without a GPU: run by the interpreter, and counted in the machine code for sm_90; each in a process of its own."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measures import cuda

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent


def python(*command, folder, **variables):
    "Runs Python beside this process, with no variable of Triton but those given; returns what it prints."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))}
    env |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", **variables}
    run = subprocess.run([sys.executable, *command], cwd=HERE, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    return run.stdout


def test_interpreted(tmp_path):
    out = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "triton_interpreted.py", folder=tmp_path, TRITON_INTERPRET="1")
    assert " passed" in out and "skipped" not in out and "failed" not in out


@cuda
def test_on_the_gpu(tmp_path):
    "The same tests, compiled, on the GPU: eight processes, because each of them compiles."
    out = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-n", "8", "triton_interpreted.py", folder=tmp_path)
    assert " passed" in out and "failed" not in out


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    "Instruction counts of the kernels a bar is set for, compiled here and now."
    names = ["forward", "forward, channels fastest", "forward, all options", "forward, order", "backward",
             "backward, all options", "backward, channels fastest, all options", "backward, order, all options"]
    code = f"import json; from vlmamba_lite.evaluation.kernels import static_counts; print(json.dumps(static_counts({names})))"
    found = json.loads(python("-c", code, folder=tmp_path_factory.mktemp("triton")))
    return {c["name"]: c for c in found}


def test_forward_is_lean(counts):
    "Seven instructions for each (channel, step, state entry), one of them the exponential; nothing spilled, nobody waits."
    assert counts["forward"]["instructions"] <= 7
    assert counts["forward"]["exponentials"] == 1
    for name in ("forward", "forward, channels fastest", "forward, all options", "forward, order"):
        c = counts[name]
        assert c["spilled"] == c["spills"] == c["shuffles"] == c["barriers"] == 0, c
    assert counts["forward, channels fastest"]["instructions"] <= 8
    assert counts["forward, order"]["instructions"] <= 8
    assert counts["forward, all options"]["instructions"] <= 9


def test_backward_is_lean(counts):
    "About half of what the official kernel needs (67), in every layout, with all options too; at most a few values spilled (triton 3.6)."
    for name in ("backward", "backward, all options", "backward, channels fastest, all options", "backward, order, all options"):
        c, tight = counts[name], name in ("backward", "backward, all options")
        assert c["instructions"] <= 36 and c["spilled"] <= (16 if tight else 32) and c["spills"] < (0.05 if tight else 0.25), c
    assert counts["backward"]["exponentials"] == 2


def test_recorded_counts_are_those_of_this_code(counts):
    "The table of chapter 03 is not of another day. Versions of the compiler differ a little."
    recorded = json.loads((HERE.parent / "data" / "results" / "kernels_static.json").read_text())["static"]
    for c in recorded:
        if c["name"] in counts:
            assert abs(c["instructions"] / counts[c["name"]]["instructions"] - 1) < 0.1, c


def test_without_gpu_and_interpreter_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = "import torch; from vlmamba_lite.ops.triton import *; o = torch.ones(1, 1, 1)\n" \
           "try: selective_scan_triton(o, o, -o[0], o[0], o[0])\nexcept RuntimeError as e: print(e)"
    assert python("-c", code, folder=tmp_path).startswith("backend 'triton': needs a CUDA GPU, and torch sees none")


def test_segments_are_a_plain_function_of_the_shape(tmp_path):
    code = "import json; from vlmamba_lite.ops.triton import scan_segments as s; " \
           "print(json.dumps([s(1024, 2048), s(160, 2048), s(160, 200), s(48, 16384), s(1, 10 ** 6), s(1, 1)]))"
    assert json.loads(python("-c", code, folder=tmp_path)) == [1, 6, 1, 22, 1056, 1]


# --- behind the one door ------------------------------------------------------------------------------------------------

def test_the_door_says_why_not():
    from vlmamba_lite.ops.selective_scan import backends, selective_scan
    o = torch.ones(1, 1, 1)
    if torch.cuda.is_available():
        assert backends()["triton"] is None
    else:
        assert backends()["triton"] == "needs a CUDA GPU, and torch sees none"
        with pytest.raises(RuntimeError, match="^backend 'triton' cannot run here: needs a CUDA GPU"):
            selective_scan(o, o, -o[0], o[0], o[0], backend="triton")


def test_the_library_works_without_triton(tmp_path):
    code = "import sys; sys.modules['triton'] = None\nimport torch; torch.cuda.is_available = lambda: True\n" \
           "from vlmamba_lite.ops.selective_scan import backends, selective_scan\no = torch.ones(1, 1, 1)\n" \
           "print(backends()['triton'], selective_scan(o, o, -o[0], o[0], o[0]).item())"
    assert python("-c", code, folder=tmp_path).startswith("triton does not import (ModuleNotFoundError: ")


def test_the_door_takes_triton_for_cuda_tensors(monkeypatch):
    import vlmamba_lite.ops.selective_scan as module

    class OnCuda(torch.Tensor):
        is_cuda = True

    def choice(dtype=torch.float32, n=16):
        return module.resolve("auto", torch.ones(1, 1, 1, dtype=dtype).as_subclass(OnCuda), torch.ones(1, n))

    monkeypatch.setattr(module, "_without_triton", lambda: None)
    assert choice() == choice(torch.bfloat16) == "triton"
    assert choice(torch.float64) == choice(n=257) == "chunked" and module.resolve("auto", torch.ones(1, 1, 1), torch.ones(1, 16)) != "triton"
    monkeypatch.setattr(module, "_without_triton", lambda: "no")
    assert choice() == "chunked"


def test_bench_kernels_refuses_names_it_does_not_know(tmp_path):
    code = "from vlmamba_lite.evaluation.kernels import *\ntry: bench_kernels(['7b', '8c'])\nexcept ValueError as e: print(e)"
    assert python("-c", code, folder=tmp_path).startswith("bench_kernels: got '8c', need one of '130m', ")
