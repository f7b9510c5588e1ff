"""The fused C++ scan: widths that do not fill its lanes, threads, its exponential, and how it is built."""
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import rms_error
from scan_cases import assert_near, cast, draw, outputs_and_gradients

from vlmamba_lite.ops import cpp
from vlmamba_lite.ops.chunked import selective_scan_chunked
from vlmamba_lite.ops.cpp import FusedScan, selective_scan_cpp
from vlmamba_lite.ops.reference import selective_scan_reference
from vlmamba_lite.ops.selective_scan import backends, selective_scan

pytestmark = pytest.mark.skipif(cpp.without_compiler() is not None, reason=str(cpp.without_compiler()))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 50), st.integers(1, 40), st.sampled_from([1, 2, 5, 16, 70, 256]), st.sampled_from(["step", "constant", 1]),
       st.sampled_from(["step", "constant", 1]), st.integers(0, 1000))
def test_any_width_length_and_state(channels, length, n, b_form, c_form, seed):
    args = draw(2, channels, length, n, b_form, c_form, seed=seed)
    want = outputs_and_gradients(selective_scan_reference, args)
    for dtype, values, grads in ((torch.float64, 1e-13, 1e-12), (torch.float32, 2e-6, 1e-5)):
        got = outputs_and_gradients(selective_scan_cpp, args, dtype)
        assert_near(got[0], want[0], values)
        assert_near(got[1], want[1], grads)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_share_the_work_and_repeat_their_bits(threads, count):
    threads(count)
    args = draw(1, 100, 40, 4)                                      # one row and group: the channels are cut into parts
    first, again = (outputs_and_gradients(selective_scan_cpp, args, torch.float32) for _ in range(2))
    want = outputs_and_gradients(selective_scan_reference, args)
    for part in (0, 1):
        assert all(torch.equal(first[part][name], again[part][name]) for name in first[part])
        assert_near(first[part], want[part], 1e-5)


@pytest.mark.parametrize("b_form", ["step", "constant"])
def test_gradients_of_a_long_scan_are_as_exact_as_in_pytorch(b_form):
    "Sums over 2,048 steps, in float32: those of A, D and constant B were ten times further off as one long sum."
    args = draw(1, 48, 2048, 16, b_form, "step", optional=("D", "delta_bias"))
    _, want = outputs_and_gradients(selective_scan_chunked, args)
    (_, got), (_, usual) = (outputs_and_gradients(scan, args, torch.float32) for scan in (selective_scan_cpp, selective_scan_chunked))
    errors = {name: (rms_error(got[name], want[name]), rms_error(usual[name], want[name])) for name in want}
    assert all(ours < 1.5 * theirs + 2e-7 for ours, theirs in errors.values()), errors


def test_its_exponential():
    "With no input one step leaves exp(delta A) of the state: all of float32's normal range, and zero below."
    x = torch.cat([-torch.logspace(-8, 1.934, 4000), torch.zeros(1)])              # to -86
    def decay(x):
        still = torch.zeros(1, len(x), 1)
        one = torch.ones(len(x), 1)
        return selective_scan_cpp(still, still + 1, x[:, None], one, one, initial_state=one[None], return_last_state=True)[1].flatten()
    exact = x.double().exp()
    assert ((decay(x) - exact) / exact).abs().max() < 1.5e-7
    assert decay(torch.tensor([-88.0, -1e4, -3e38])).max() < 2e-38
    assert decay(torch.tensor([0.0])) == 1


def test_nan_and_infinity_stay_visible():
    args = cast(draw(1, 3, 5, 2), torch.float32)
    for bad in (float("nan"), float("inf")):
        args["u"][0, 1, 2] = bad
        y = selective_scan_cpp(**args)
        assert torch.isfinite(y[0, [0, 2]]).all() and torch.isfinite(y[0, 1, :2]).all()
        assert not torch.isfinite(y[0, 1, 2:]).any()


def test_a_gradient_of_a_gradient_is_an_error():
    args = draw(1, 2, 4, 2)
    args["u"].requires_grad_()
    y = selective_scan_cpp(**args)
    g, = torch.autograd.grad((y * y).sum(), args["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        g.sum().backward()


def test_strided_and_expanded_inputs():
    dt, v = (torch.rand(6, 2, 3, 8, dtype=torch.float64).transpose(0, 1).contiguous().transpose(0, 1) for _ in range(2))
    args = {"u": v.permute(1, 2, 3, 0).flatten(1, 2), "delta": dt.permute(1, 2, 3, 0).flatten(1, 2), "A": -torch.rand(1, 4).double().expand(24, 4),
            "B": torch.rand(1, 4, 6).double().expand(2, 4, 6), "C": torch.rand(2, 6, 4).double().mT}
    assert_near({"y": selective_scan_cpp(**args)}, {"y": selective_scan_reference(**args)}, 1e-13)


# --- building it --------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp, "KERNEL", 'extern "C" int seven() { return 7; }\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cpp.fused_library.__wrapped__


def test_built_once_for_a_machine(small_kernel, tmp_path, monkeypatch):
    assert small_kernel().seven() == 7
    built = list((tmp_path / "vlmamba_lite").iterdir())
    assert len(built) == 1 and built[0].suffix == ".so"
    stamp = built[0].stat().st_mtime_ns
    assert small_kernel().seven() == 7 and built[0].stat().st_mtime_ns == stamp
    monkeypatch.setattr(cpp, "KERNEL", 'extern "C" int seven() { return 8; }\n')
    assert small_kernel().seven() == 8 and len(list((tmp_path / "vlmamba_lite").iterdir())) == 2


def test_two_processes_build_at_the_same_time(small_kernel, tmp_path):
    code = ("from vlmamba_lite.ops import cpp as s; s.KERNEL = 'extern \"C\" int seven() { return 7; }'; "
            "assert s.fused_library().seven() == 7")
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert len(list((tmp_path / "vlmamba_lite").iterdir())) == 1


def test_source_that_does_not_compile(small_kernel, monkeypatch, tmp_path):
    monkeypatch.setattr(cpp, "KERNEL", "int f( {")
    with pytest.raises(RuntimeError, match="backend 'cpp': the compiler cannot build the kernel: .*error"):
        small_kernel()
    assert not list((tmp_path / "vlmamba_lite").iterdir())          # nothing half-built is left


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert backends()["cpp"] == "needs a C++ compiler, and finds no 'no-such-compiler'"
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run here: needs a C"):
        selective_scan(**draw(), backend="cpp")
    with pytest.raises(RuntimeError, match="backend 'cpp': needs a C"):
        selective_scan_cpp(**draw())


def test_the_structure_has_the_kernels_fields():
    "The tensors stand in the order of the C++ `Scan`."
    fields = re.sub(r"//.*|const|F |[*]", "", cpp.KERNEL.partition("struct Scan {")[2].partition("int64_t")[0])
    assert re.findall(r"\w+", fields) == cpp._SCAN


@pytest.mark.parametrize("damage", [lambda code: code[:len(code) // 2], lambda code: b"", lambda code: code[:5000] + b"x" + code[5001:]])
def test_a_damaged_library_is_built_anew(small_kernel, tmp_path, capfd, damage):
    assert small_kernel().seven() == 7
    assert "builds its C++ kernels, once for this machine" in capfd.readouterr().err
    path, = (tmp_path / "vlmamba_lite").iterdir()
    whole = path.read_bytes()
    assert small_kernel().seven() == 7 and not capfd.readouterr().err                # it is there, and nothing is said
    path.unlink()                                                                    # the one that is loaded stays as it is
    path.write_bytes(damage(whole))
    assert small_kernel().seven() == 7 and path.read_bytes() == whole
    assert "builds" in capfd.readouterr().err


def test_a_home_that_cannot_be_written(small_kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert small_kernel().seven() == 7


def test_tensors_elsewhere():
    args = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in draw().items()}
    with pytest.raises(RuntimeError, match="backend 'cpp': got tensors on meta, needs them on the CPU"):
        selective_scan_cpp(**args)


def test_direct_use_of_the_function():
    shapes = dict(u=(1, 6, 5), dt=(1, 6, 5), A=(2, 3, 3), B=(2, 3, 3), C=(5, 1, 2, 3), D=(6,), h0=(1, 2, 3, 3))
    tensors = [torch.rand(s, dtype=torch.float64) * (-1 if name == "A" else 1) for name, s in shapes.items()]
    assert torch.autograd.gradcheck(FusedScan.apply, [x.requires_grad_() for x in tensors])


def test_a_compiler_that_lacks_openmp(monkeypatch, tmp_path):
    "As on a Mac: it is there, and refuses an option."
    fake = tmp_path / "fake-c++"
    fake.write_text("#!/bin/sh\necho \"clang: error: unsupported option '-fopenmp'\" >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert backends()["cpp"] == "the compiler cannot build the kernel: clang: error: unsupported option '-fopenmp'"
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run here: the compiler cannot build"):
        selective_scan(**draw(), backend="cpp")
