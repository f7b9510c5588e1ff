"""Chapter 09: the three forms of SSD against each other in float64, against transformers, and against bad input."""
import math

from measures import rms_error
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import vlmamba_lite.ops.ssd as ssd_module
from vlmamba_lite.ops.ssd import (
    decay_matrix,
    prepare_dt,
    segment_sum,
    split_sum,
    ssd,
    ssd_backends,
    ssd_chunked,
    ssd_cpp,
    ssd_quadratic,
    ssd_recurrent,
)

FORMS = [ssd_recurrent, ssd_quadratic, ssd_chunked] + [ssd_cpp] * (ssd_backends()["cpp"] is None)
LIMIT = (0.02, 1.5)


def inputs(b=2, L=17, H=4, P=3, G=2, N=5, dtype=torch.float64, wide_D=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
    A = (-torch.rand(H, dtype=torch.float64, generator=g) * 4 - 0.05).to(dtype).requires_grad_()
    return {"x": r(b, L, H, P), "dt": r(b, L, H), "A": A, "B": r(b, L, G, N), "C": r(b, L, G, N), "D": r(H, P) if wide_D else r(H),
                "z": r(b, L, H, P), "dt_bias": r(H), "initial_states": r(b, H, P, N)}


def everything(f, args, **options):
    "Output, last state, and the gradient of every argument."
    y, h = f(**args, dt_softplus=True, dt_limit=LIMIT, return_final_states=True, **options)
    loss = (y * torch.linspace(-1, 1, y.numel()).to(y).view_as(y)).sum() + (h * h.detach().cos()).sum()
    return [y, h, *torch.autograd.grad(loss, list(args.values()))]


@settings(deadline=None, max_examples=25, derandomize=True)
@given(L=st.integers(1, 40), Q=st.integers(1, 48), G=st.sampled_from([1, 2, 4]), b=st.integers(1, 3), P=st.integers(1, 4),
       N=st.integers(1, 6), wide_D=st.booleans(), seed=st.integers(0, 99))
def test_three_forms_any_length_any_chunk(L, Q, G, b, P, N, wide_D, seed):
    args = inputs(b, L, 4, P, G, N, wide_D=wide_D, seed=seed)
    want = everything(ssd_recurrent, args)
    for f in FORMS[1:]:
        for got, right in zip(everything(f, args, chunk_size=Q), want):
            assert_close(got, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("L", [1, 5])
def test_gradcheck(form, L):
    args = inputs(1, L, 2, 2, 1, 2)

    def f(*tensors):
        return form(**dict(zip(args, tensors)), dt_softplus=True, chunk_size=3, return_final_states=True)
    assert torch.autograd.gradcheck(f, tuple(args.values()))


@pytest.mark.parametrize("form", FORMS)
def test_options_mean_what_they_say(form):
    a = {k: v.detach() for k, v in inputs().items()}
    x, dt, A, B, C = (a[k] for k in ("x", "dt", "A", "B", "C"))
    core = form(x, prepare_dt(dt, a["dt_bias"], True, LIMIT), A, B, C, initial_states=a["initial_states"])
    assert_close(form(**a, dt_softplus=True, dt_limit=LIMIT), (core + a["D"][:, None] * x) * F.silu(a["z"]))
    wide = a["D"][:, None].expand(4, 3)
    assert_close(form(**a | {"D": wide}, dt_softplus=True), form(**a, dt_softplus=True))
    zero = torch.zeros_like(a["initial_states"])
    assert_close(form(x, dt, A, B, C, initial_states=zero), form(x, dt, A, B, C))
    y, h = form(x, dt, A, B, C, return_final_states=True)
    assert_close(y, form(x, dt, A, B, C))
    assert h.shape == (2, 4, 3, 5)


@pytest.mark.parametrize("form", FORMS)
def test_groups_are_repeated_heads(form):
    a = inputs(G=2)
    wide = a | {k: a[k].repeat_interleave(2, 2) for k in "BC"}               # one group per head: 0 0 1 1, not 0 1 0 1
    assert_close(form(**wide, chunk_size=8), form(**a, chunk_size=8))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [1, 8, 16])
def test_state_carries_over_any_cut(form, cut):
    a = inputs()
    want = form(**a, return_final_states=True)
    state, ys = a["initial_states"], []
    for s in (slice(None, cut), slice(cut, None)):
        part = {k: v[:, s] if k in ("x", "dt", "B", "C", "z") else v for k, v in a.items()}
        y, state = form(**part | {"initial_states": state}, chunk_size=6, return_final_states=True)
        ys.append(y)
    assert_close((torch.cat(ys, 1), state), want)


@pytest.mark.skipif(ssd_cpp not in FORMS, reason="needs a C++ compiler")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (1, 64, 6, 32, 1, 64), (2, 65, 6, 7, 3, 33), (1, 200, 5, 18, 1, 16), (2, 131, 4, 13, 2, 130)])
def test_cpp_widths_that_fill_no_register_and_threads(shape, threads):
    "Heads are shared out where there are fewer rows than threads; the bits do not depend on which thread was first."
    args, before = inputs(*shape, wide_D=True), torch.get_num_threads()
    want = everything(ssd_recurrent, args)
    try:
        torch.set_num_threads(threads)
        got, again = everything(ssd_cpp, args), everything(ssd_cpp, args)
    finally:
        torch.set_num_threads(before)
    for g, a, w in zip(got, again, want):
        assert torch.equal(g, a) and rms_error(g, w) < 1e-11


@pytest.mark.skipif(ssd_cpp not in FORMS, reason="needs a C++ compiler")
def test_cpp_takes_views_and_has_no_second_gradient():
    whole = torch.randn(2, 9, 4 * 3 + 2 * 10, dtype=torch.float64)
    x, B, C = whole.split([12, 10, 10], -1)                                  # as from the convolution of a block
    args = dict(x=x.unflatten(-1, (4, 3)), dt=torch.rand(4, 2, 9).double().permute(1, 2, 0), A=-torch.rand(1).double().expand(4),
                B=B.unflatten(-1, (2, 5)), C=C.unflatten(-1, (2, 5)).flip(-1))
    assert_close(ssd_cpp(**args), ssd_recurrent(**args))
    B = torch.randn(2, 9, 5, 2).double().mT
    assert_close(ssd_cpp(**args | {"B": B}), ssd_recurrent(**args | {"B": B}))
    A = args["A"].clone().requires_grad_()
    g, = torch.autograd.grad(ssd_cpp(**args | {"A": A}).square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="FusedSSD: its gradient can be taken once, not twice"):
        g.sum().backward()
    with pytest.raises(RuntimeError, match="backend 'cpp': got tensors on meta, needs them on the CPU"):
        ssd_cpp(**{k: v.to("meta") for k, v in args.items()})


def test_auto_takes_what_can_run(monkeypatch):
    called, args = [], {k: v.detach().float() for k, v in inputs().items()}
    class OnCuda(torch.Tensor):
        is_cuda = True
    cuda = args | {"x": args["x"].as_subclass(OnCuda)}
    for reason in (None, "no"):
        for name in ("chunked", "cpp", "mamba_ssm"):
            monkeypatch.setitem(ssd_module._SSD_BACKENDS, name, (lambda *_, name=name, **__: called.append(name), lambda name=name: None if name == "chunked" else reason))
        for tensors in (args, cuda, {k: v.to("meta") for k, v in args.items()}):
            ssd(**tensors)
    assert called == ["cpp", "mamba_ssm", "chunked", "chunked", "chunked", "chunked"]


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"])
def test_only_real_numbers(name):
    args = {k: v.detach() for k, v in inputs().items()}
    for dtype in (torch.int32, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"^{name}: got {dtype}, need a real floating-point dtype"):
            ssd(**args | {name: args[name].to(dtype)})
    with pytest.raises(ValueError, match=f"^{name}: got ndarray, need a tensor"):
        ssd(**args | {name: args[name].numpy()})


def test_a_step_of_no_length_changes_nothing():
    a = {k: v.detach() for k, v in inputs().items() if k not in ("dt_bias", "D", "z")}
    a["dt"] = a["dt"].abs()
    y, h = ssd_chunked(**a, chunk_size=5, return_final_states=True)
    padded = {k: torch.cat([v, torch.randn_like(v[:, :6])], 1) if k in ("x", "dt", "B", "C") else v for k, v in a.items()}
    padded["dt"][:, 17:] = 0
    y2, h2 = ssd_chunked(**padded, chunk_size=5, return_final_states=True)
    assert_close((y2[:, :17], h2), (y, h))


@pytest.mark.parametrize("shape", [(2, 129, 8, 32, 1, 64), (1, 65, 4, 16, 4, 128), (3, 1, 2, 8, 1, 16)])
def test_float32_stays_close_to_float64(shape):
    small = inputs(*shape, dtype=torch.float32)
    want = everything(ssd_recurrent, {k: v.detach().double().requires_grad_() for k, v in small.items()})
    for f in FORMS[1:]:
        got = everything(f, small, chunk_size=64)
        assert [i.dtype for i in got] == [torch.float32] * len(got)
        assert max(rms_error(g, w) for g, w in zip(got[:2], want[:2])) < 2e-6
        assert max(rms_error(g, w) for g, w in zip(got[2:], want[2:])) < 2e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_float32_inside(form, autocast):
    a = {k: v.detach().bfloat16() for k, v in inputs(L=33).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, h = form(**a, dt_softplus=True, chunk_size=8, return_final_states=True)
    want_y, want_h = ssd_recurrent(**{k: v.double() for k, v in a.items()}, dt_softplus=True, return_final_states=True)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    if autocast and form is ssd_chunked:                                         # its products were, and only they
        assert 1e-4 < rms_error(h, want_h) < 5e-3 and rms_error(y, want_y) < 8e-3
        return
    assert rms_error(h, want_h) < 1e-6                                           # nothing inside was rounded to bfloat16
    assert rms_error(y, want_y) < 3e-3                                           # the output was, once


def test_chunks_under_autocast_lose_no_more_than_a_rounding():
    "Products in bfloat16, sums and states in float32: the error does not grow with the length, values and gradients alike."
    errors = {}
    for L in (64, 1024):
        args = inputs(1, L, 2, 16, 1, 16, dtype=torch.float32)
        want = everything(ssd_recurrent, {k: v.detach().double().requires_grad_() for k, v in args.items()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = everything(ssd_chunked, args, chunk_size=64)
        assert {i.dtype for i in got} == {torch.float32}
        errors[L] = [rms_error(g, w) for g, w in zip(got, want)]
    assert max(errors[1024][:4]) < 1e-2 and all(long < 2 * short + 2e-3 for short, long in zip(errors[64][:4], errors[1024][:4])), errors


def test_segment_sum_by_hand():
    inf = math.inf
    assert_close(segment_sum(torch.tensor([-1., -2., -3.])), torch.tensor([[0., -inf, -inf], [-2, 0, -inf], [-5, -3, 0]]))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(L=st.integers(1, 70), scale=st.sampled_from([1e-3, 1., 1e2, 1e4]), seed=st.integers(0, 99))
def test_decay_keeps_its_digits(L, scale, seed):
    a = -torch.rand(3, L, generator=torch.Generator().manual_seed(seed)) * 0.1
    a[:, ::5] *= scale                                                       # every fifth step forgets, much or little
    a = torch.cat([a, a[:, :1] * 100], 1)
    want = segment_sum(a.double()).exp()
    for got in (segment_sum(a).exp(), decay_matrix(*split_sum(a))):
        assert_close(got.double(), want, rtol=1e-5, atol=1e-30)


def test_unstable_segment_sums_fail_where_ours_do_not():
    a = torch.cat([torch.tensor([-1e5]), torch.full((63,), -0.01)])
    s = a.cumsum(0)
    plain = (s[:, None] - s).masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -math.inf).exp()
    want = segment_sum(a.double()).exp()[1:, 1:]
    assert rms_error(plain[1:, 1:], want) > 1e-3
    assert rms_error(decay_matrix(*split_sum(a))[1:, 1:], want) < 1e-6
    assert not ((s.exp()[:, None] * (-s).exp()).tril()).isfinite().all()


def test_decay_gradient():
    a = torch.randn(2, 9, dtype=torch.float64).neg().abs().neg().requires_grad_()
    assert torch.autograd.gradcheck(lambda i: decay_matrix(*split_sum(i)), a)
    small = a.detach().float().requires_grad_()
    (got,) = torch.autograd.grad(decay_matrix(*split_sum(small)).sin().sum(), small)
    (want,) = torch.autograd.grad(decay_matrix(*split_sum(a)).sin().sum(), a)
    assert rms_error(got, want) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_a_reset_ruins_no_other_step(form):
    "One step that forgets everything must not cost the gentle steps after it their digits: the plain difference loses 1e-3 here."
    a = {k: v.detach() for k, v in inputs(1, 64, 2, 4, 1, 4, torch.float32).items() if k in "xdtABC"}
    a |= {"A": torch.tensor([-1., -16.]), "dt": torch.full((1, 64, 2), 0.01)}
    a["dt"][:, 0] = 1e3
    want = ssd_recurrent(**{k: v.double() for k, v in a.items()}, return_final_states=True)
    for got, right in zip(form(**a, return_final_states=True), want):
        assert rms_error(got, right) < 2e-6


def test_strong_forgetting_has_finite_gradients():
    a = inputs(1, 40, 2, 3, 1, 4, torch.float32)
    a = {k: v.detach() * (100 if k == "dt" else 1) for k, v in a.items()}
    a = {k: v.requires_grad_() for k, v in a.items()}
    for f in FORMS:
        assert all(i.isfinite().all() for i in everything(f, a))


@pytest.mark.parametrize("L, G, N, P, chunk", [(1, 1, 8, 4, 16), (37, 2, 16, 8, 16), (64, 4, 8, 4, 64), (75, 1, 32, 8, 32)])
def test_transformers_peer(L, G, N, P, chunk):
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    if not hasattr(modeling, "mamba2_chunk_scan"):
        pytest.skip("this transformers keeps its chunked scan inside the mixer; test_mamba2 compares the mixers")
    a = inputs(2, L, 4, P, G, N, torch.float32)
    a.pop("z")

    def theirs(x, dt, A, B, C, D, dt_bias, initial_states, **options):
        return modeling.mamba2_chunk_scan(x, dt, A, B, C, chunk, D=D, dt_bias=dt_bias, initial_states=initial_states, **options)
    got, want = everything(ssd_chunked, a, chunk_size=chunk), everything(theirs, a)
    assert max(rms_error(g, w) for g, w in zip(got[:2], want[:2])) < 1e-5
    assert max(rms_error(g, w) for g, w in zip(got[2:], want[2:])) < 1e-4


def test_strided_and_expanded_inputs():
    a = {k: v.detach() for k, v in inputs(L=9).items()}
    want = ssd_recurrent(**a)
    odd = a | {"x": a["x"].transpose(1, 3).contiguous().transpose(1, 3), "B": a["B"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert_close(ssd_chunked(**odd, chunk_size=3), want)
    one = a | {"dt": a["dt"][:, :1].expand(-1, 9, -1)}
    assert_close(ssd_chunked(**one, chunk_size=3), ssd_recurrent(**one))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name, bad", [
    ("x", (2, 17, 4)), ("x", (2, 0, 4, 3)), ("dt", (2, 17, 3)), ("A", (3,)), ("B", (2, 17, 3, 5)), ("B", (2, 16, 2, 5)),
    ("C", (2, 17, 2, 4)), ("D", (3,)), ("D", (4, 2)), ("z", (2, 17, 4, 2)), ("dt_bias", (4, 1)), ("initial_states", (2, 4, 5, 3))])
def test_wrong_shapes_are_named(form, name, bad):
    with pytest.raises(ValueError, match=rf"^{name}: got .*, need "):
        form(**inputs() | {name: torch.zeros(bad)})


def test_wrong_chunk_size_is_named():
    with pytest.raises(ValueError, match="^chunk_size: got 0, need at least 1"):
        ssd_chunked(**inputs(), chunk_size=0)
