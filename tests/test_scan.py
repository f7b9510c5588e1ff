"""The selective scans against the float64 loop: values, every gradient, and the laws a scan obeys."""
from measures import rms_error
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import DIFFERENTIABLE, FAST, OURS, REFERENCE, assert_near, cast, draw, outputs_and_gradients

from vlmamba_lite.ops.selective_scan import backends, resolve, selective_scan
from vlmamba_lite.ops.chunked import selective_scan_chunked
from vlmamba_lite.ops.reference import selective_scan_reference

few = settings(max_examples=25, deadline=None, derandomize=True)
many = settings(max_examples=100, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
forms = st.sampled_from(["constant", "step", 1, 2, 4])
lengths = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 31, 64, 127, 128, 129, 255, 256, 257]), st.integers(1, 257))
FORMS = [("step", "step"), ("constant", "constant"), ("constant", "step"), ("step", "constant"), (2, 2), (4, 2), (2, "constant")]


def loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None):
    "The scan from its definition, in numpy float64, one scalar state entry at a time: shares no code with the library."
    u, delta, A, B, C = (np.asarray(x, dtype=np.float64) for x in (u, delta, A, B, C))
    batch, channels, length = u.shape
    y, last = np.zeros_like(u), np.zeros((batch, channels, A.shape[1]))

    def entry(X, b, d, n, t):
        if X.ndim == 2:
            return X[d, n]
        return X[b, n, t] if X.ndim == 3 else X[b, d // (channels // X.shape[1]), n, t]

    for b, d, n in np.ndindex(last.shape):
        h = 0.0 if initial_state is None else float(initial_state[b, d, n])
        for t in range(length):
            step = delta[b, d, t] + (0.0 if delta_bias is None else float(delta_bias[d]))
            step = np.logaddexp(0.0, step) if delta_softplus else step
            h = np.exp(step * A[d, n]) * h + step * entry(B, b, d, n, t) * u[b, d, t]
            y[b, d, t] += entry(C, b, d, n, t) * h
        last[b, d, n] = h
    y += 0.0 if D is None else np.asarray(D)[:, None] * u
    y *= 1.0 if z is None else np.asarray(z) / (1 + np.exp(-np.asarray(z)))
    return {"y": torch.from_numpy(y), "last_state": torch.from_numpy(last)}


# --- values and gradients -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("b_form, c_form", FORMS)
@pytest.mark.parametrize("backend", OURS)
def test_definition(backend, b_form, c_form):
    for length, softplus, optional in ((1, True, ()), (17, False, DIFFERENTIABLE), (33, True, ("D", "delta_bias")), (3, True, ("z",))):
        args = draw(2, 4, length, 2, b_form, c_form, optional, softplus)
        y, last = selective_scan(**args, return_last_state=True, backend=backend)
        assert_near({"y": y, "last_state": last}, loop(**args), 1e-13)


@many
@given(seeds, lengths, st.integers(1, 3), st.sampled_from([1, 3, 16]), forms, forms, st.sets(st.sampled_from(DIFFERENTIABLE[5:])), st.booleans())
def test_every_backend_is_the_reference(seed, length, batch, n, b_form, c_form, optional, softplus):
    args = draw(batch, 8, length, n, b_form, c_form, optional, softplus, seed)
    values, grads = outputs_and_gradients(selective_scan_reference, args)
    for backend in FAST:
        got = outputs_and_gradients(selective_scan, args, backend=backend)
        assert_near(got[0], values, 1e-13)
        assert_near(got[1], grads, 1e-11)
        got = outputs_and_gradients(selective_scan, args, torch.float32, backend=backend)
        assert_near(got[0], values, 2e-6)
        assert_near(got[1], grads, 1e-5)


@pytest.mark.parametrize("b_form, c_form", FORMS)
@pytest.mark.parametrize("backend", OURS)
def test_gradcheck(backend, b_form, c_form):
    args = draw(1, 4, 18, 2, b_form, c_form)                       # 18: one chunk of the chunked scan and a bit
    leaves = [args[name].requires_grad_() for name in DIFFERENTIABLE]

    def scan(*tensors):
        return selective_scan(**dict(zip(DIFFERENTIABLE, tensors)), delta_softplus=True, return_last_state=True, backend=backend)

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=(b_form, c_form) != (2, 2))


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 36, 37, 38, 1000])
@pytest.mark.parametrize("form", ["constant", "step", 2])
def test_chunk_size_does_not_matter(chunk, form):
    args = draw(b_form=form, c_form=form)
    want = outputs_and_gradients(selective_scan_reference, args)
    got = outputs_and_gradients(selective_scan_chunked, args, chunk_size=chunk)
    assert_near(got[0], want[0], 1e-13)
    assert_near(got[1], want[1], 1e-12)


@pytest.mark.parametrize("which", [0, 1], ids=["y", "last_state"])
@pytest.mark.parametrize("backend", FAST)
def test_gradient_of_each_output_alone(backend, which):
    args = draw()
    leaves = [args[name].requires_grad_() for name in DIFFERENTIABLE]
    got, want = (torch.autograd.grad(selective_scan(**args, return_last_state=True, backend=b)[which].pow(2).sum(), leaves,
                                     materialize_grads=True) for b in (backend, REFERENCE))
    assert_near(dict(zip(DIFFERENTIABLE, got)), dict(zip(DIFFERENTIABLE, want)), 1e-12)
    assert which == 0 or (want[4] == 0).all()                       # the last state does not depend on C


@pytest.mark.parametrize("backend", OURS)
def test_last_state_is_optional_and_holds_nothing_else(backend):
    args = draw()
    y, last = selective_scan(**args, return_last_state=True, backend=backend)
    assert torch.equal(selective_scan(**args, backend=backend), y)
    assert last.shape == (2, 4, 3)
    assert last.untyped_storage().nbytes() == last.numel() * last.element_size()       # no other states behind it


# --- laws ---------------------------------------------------------------------------------------------------------------

def part(args, span, **new):
    "The arguments restricted to some tokens."
    return {**{k: v[..., span] if k in ("u", "delta", "z") or (k in "BC" and v.ndim > 2) else v for k, v in args.items()}, **new}


@few
@given(seeds, st.integers(2, 70), st.data(), st.sampled_from(OURS), forms)
def test_split_anywhere(seed, length, data, backend, form):
    cut = data.draw(st.integers(1, length - 1))
    args = draw(length=length, b_form=form, c_form=form, seed=seed)
    whole, last = selective_scan(**args, return_last_state=True, backend=backend)
    left, state = selective_scan(**part(args, slice(cut)), return_last_state=True, backend=backend)
    right, state = selective_scan(**part(args, slice(cut, None), initial_state=state), return_last_state=True, backend=backend)
    assert rms_error(torch.cat([left, right], -1), whole) < 1e-13
    assert rms_error(state, last) < 1e-13


@few
@given(seeds, st.integers(1, 40), st.integers(0, 20), st.integers(0, 20), st.sampled_from(OURS))
def test_padding_on_both_sides(seed, length, left, right, backend):
    "Delta = 0 after softplus makes a pad invisible, whatever else stands there, and rows do not see each other's pads."
    args = draw(2, length=length, softplus=False, optional=("D", "z", "initial_state"), seed=seed)
    alone, last = selective_scan(**args, return_last_state=True, backend=backend)
    total = length + left + right
    padded = {**args, "delta": torch.zeros(2, 4, total).double()}
    for k in ("u", "z", "B", "C"):
        padded[k] = torch.full((*args[k].shape[:-1], total), 1e3, dtype=torch.float64)
    rows = (slice(left, left + length), slice(right, right + length))          # row 0 as asked, row 1 the other way round
    for k in ("u", "z", "B", "C", "delta"):
        for row, span in enumerate(rows):
            padded[k][row][..., span] = args[k][row]
    y, state = selective_scan(**padded, return_last_state=True, backend=backend)
    for row, span in enumerate(rows):
        assert rms_error(y[row][..., span], alone[row]) < 1e-13
    assert rms_error(state, last) < 1e-13


@pytest.mark.parametrize("backend", OURS)
def test_causal_by_jacobian(backend):
    args = draw(1, 2, 20, 2, 1, 1)
    for name in ("u", "delta", "B", "C"):
        def of(x, name=name):
            return selective_scan(**{**args, name: x}, backend=backend).sum((0, 1))

        jacobian = torch.autograd.functional.jacobian(of, args[name]).flatten(1, -2).abs().sum(1)     # (L, L)
        assert (jacobian.triu(1) == 0).all() and (jacobian.diagonal() > 0).all(), name
        assert name == "C" or (jacobian.tril(-1).sum() > 0)


@few
@given(seeds, st.integers(1, 40), st.sampled_from(OURS))
def test_flip(seed, length, backend):
    "A scan of the flipped sequence, flipped back, is the recurrence from right to left."
    args = draw(1, 2, length, 2, 1, 1, optional=(), softplus=False, seed=seed)
    flipped = {k: v.flip(-1) if isinstance(v, torch.Tensor) and k != "A" else v for k, v in args.items()}
    got = selective_scan(**flipped, backend=backend).flip(-1)
    h, want = torch.zeros(2, 2, dtype=torch.float64), torch.empty(2, length, dtype=torch.float64)
    for t in reversed(range(length)):
        step = args["delta"][0, :, t, None]
        h = torch.exp(step * args["A"]) * h + step * args["u"][0, :, t, None] * args["B"][0, 0, :, t]
        want[:, t] = h @ args["C"][0, 0, :, t]
    assert rms_error(got[0], want) < 1e-13


@few
@given(seeds, st.sampled_from(OURS))
def test_linear_in_input_and_state(seed, backend):
    args = draw(optional=("D", "initial_state"), seed=seed)
    more = draw(optional=("D", "initial_state"), seed=seed + 1)
    both = {**args, **{k: 2 * args[k] - 3 * more[k] for k in ("u", "initial_state")}}
    swapped = {**args, **{k: more[k] for k in ("u", "initial_state")}}
    y, a, b = (selective_scan(**x, backend=backend) for x in (both, args, swapped))
    assert rms_error(y, 2 * a - 3 * b) < 1e-13


# --- dtypes and extreme values ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [1, "constant"])
@pytest.mark.parametrize("backend", OURS)
def test_half_precision_computes_in_float32(backend, form, dtype):
    args = cast(draw(length=200, b_form=form, c_form=form), dtype)
    want, grads = outputs_and_gradients(selective_scan_reference, cast(args, torch.float64))
    y, last = selective_scan(**args, return_last_state=True, backend=backend)
    assert y.dtype == dtype and last.dtype == torch.float32
    assert rms_error(last, want["last_state"]) < 1e-6               # no rounding of the inputs' dtype inside
    assert rms_error(y, want["y"].to(dtype)) < torch.finfo(dtype).eps / 4
    got = outputs_and_gradients(selective_scan, args, dtype, backend=backend)[1]
    assert_near(got, grads, torch.finfo(dtype).eps / 2)             # one rounding of the result, none of a partial sum


@pytest.mark.parametrize("backend", OURS)
def test_float64_stays_float64(backend):
    y, last = selective_scan(**draw(), return_last_state=True, backend=backend)
    assert y.dtype == last.dtype == torch.float64


@pytest.mark.parametrize("backend", OURS)
def test_autocast_does_not_reach_inside(backend):
    args = cast(draw(length=40, b_form=2, c_form=2), torch.float32)
    want = outputs_and_gradients(selective_scan, args, torch.float32, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs_and_gradients(selective_scan, args, torch.float32, backend=backend)
    for a, b in zip(got, want):
        assert_near(a, b, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", OURS)
def test_no_nan_from_tiny_to_huge_decays(backend, dtype):
    "delta A from -1e-8 to -1e4: every product of these steps and decays, values and gradients."
    steps = torch.logspace(-4, 2, 7).repeat(6)                      # exact enough in all three dtypes
    rates = -torch.logspace(-4, 2, 7)
    product = steps[:, None] * rates
    assert product.max() > -1.01e-8 and product.min() < -0.99e4
    g = torch.Generator().manual_seed(0)
    args = {"u": torch.randn(1, 2, 42, generator=g) / 100, "delta": steps.expand(1, 2, 42), "A": rates.expand(2, 7),
            "B": torch.randn(1, 7, 42, generator=g), "C": torch.randn(1, 7, 42, generator=g),
            "initial_state": torch.randn(1, 2, 7, generator=g) / 100}
    values, grads = outputs_and_gradients(selective_scan, args, dtype, backend=backend)
    want, _ = outputs_and_gradients(selective_scan_reference, cast(args, dtype))
    assert all(x.isfinite().all() for x in (*values.values(), *grads.values()))
    assert rms_error(values["last_state"], want["last_state"]) < 1e-6
    assert rms_error(values["y"], want["y"]) < max(1e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", OURS)
def test_one_step_forgets_everything(backend):
    "A decay of exp(-1e4) = 0 cuts the sequence: what was before has no influence, not even as NaN."
    args = cast(draw(1, 2, 20, 2, softplus=False, optional=("initial_state",)), torch.float32)
    args["delta"][..., 10], args["A"] = 1e4, -torch.ones(2, 2)
    y = selective_scan(**args, backend=backend)
    args["u"][..., :10], args["initial_state"] = 1e6, 1e6 * args["initial_state"]
    assert torch.equal(selective_scan(**args, backend=backend)[..., 10:], y[..., 10:])


@pytest.mark.parametrize("backend", OURS)
def test_non_contiguous_and_broadcast_arguments(backend):
    args = draw(length=20)
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    assert not strided["u"].is_contiguous()
    want, grads = outputs_and_gradients(selective_scan, args, backend=backend)
    got = outputs_and_gradients(lambda **kw: selective_scan(**kw, backend=backend), strided)
    assert_near(got[0], want, 1e-14)
    assert_near(got[1], grads, 1e-14)
    args["delta"] = torch.full((1, 1, 1), 0.3, dtype=torch.float64).expand(2, 4, 20)
    y = selective_scan(**args, backend=backend)
    assert rms_error(y, selective_scan_reference(**args)) < 1e-13


@pytest.mark.parametrize("backend", OURS)
def test_arguments_are_left_alone(backend):
    args = draw(length=20)
    copies = {k: v.clone() for k, v in args.items() if isinstance(v, torch.Tensor)}
    outputs_and_gradients(selective_scan, args, backend=backend)
    assert all(torch.equal(args[k], v) for k, v in copies.items())


@pytest.mark.parametrize("backend", [name for name in FAST if name != "triton"])
def test_second_gradients_are_right_or_an_error(backend):
    "Of every input with respect to every other: a path through the scan's own backward raises, and what is left (z meets the output only) is the reference's."
    args = draw(1, 2, 6, 2, b_form=2)
    names = [name for name in args if name != "delta_softplus"]

    def second(name, other, **options):
        inputs = {n: args[n].clone().requires_grad_() for n in names}
        y, h = selective_scan(**inputs, delta_softplus=True, return_last_state=True, **options)
        first, = torch.autograd.grad(y.pow(2).sum() + h.pow(2).sum(), inputs[name], create_graph=True)
        return torch.autograd.grad(first.sum(), inputs[other], allow_unused=True)[0]
    right = 0
    for name in names:
        for other in names:
            try:
                got = second(name, other, backend=backend)
            except RuntimeError as error:
                assert "once, not twice" in str(error)
                continue
            torch.testing.assert_close(got, second(name, other, backend=REFERENCE))
            right += 1
    assert right < len(names) ** 2 / 2 if backend in ("chunked", "cpp") else right == len(names) ** 2


def test_auto_is_a_backend_that_runs():
    assert backends()[REFERENCE] is None and backends()["chunked"] is None
    args = draw()
    taken = resolve("auto", args["u"], args["A"])
    assert backends()[taken] is None and torch.equal(selective_scan(**args), selective_scan(**args, backend=taken))
