"""The Triton kernels in Triton's interpreter, on CPU tensors. `test_scan_triton.py` runs this file in a process of its own,
because TRITON_INTERPRET=1 has to be in the environment before Triton is imported:

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py
"""
import pytest
import torch
from scan_cases import DIFFERENTIABLE, assert_near, cast, draw, outputs_and_gradients, rms_error

from vlmamba_lite.scan_reference import selective_scan_reference
from vlmamba_lite.scan_triton import INTERPRETED, _scan_backward_op, _scan_op, selective_scan_triton

assert INTERPRETED, "needs TRITON_INTERPRET=1 in the environment"


def check(args, cut=None, given=None, value=2e-6, gradient=1e-5):
    "Values and every gradient of the kernels, on `given` where that lies differently in memory, against the float64 loop."
    want = outputs_and_gradients(selective_scan_reference, args)
    got = outputs_and_gradients(selective_scan_triton, given or args, torch.float32, cut=cut)
    assert_near(got[0], want[0], value)
    assert_near(got[1], want[1], gradient)


def time_major(args):
    return {k: v.mT.contiguous().mT if k in ("u", "delta", "z") else v for k, v in args.items()}


@pytest.mark.parametrize("b_form, c_form, cut", [("step", 1, 1), ("constant", 1, 2), ("constant", "constant", 1)])
def test_masks_on_every_axis(b_form, c_form, cut):
    "5 of 32 channels, 3 of 4 state entries, 7 of 32 steps in the last chunk, 3 of 4 in its last four."
    check(draw(1, 5, 39, 3, b_form, c_form), cut)


def test_groups_of_b_and_of_c():
    check(draw(1, 6, 2, 3, b_form=2, c_form=3))
    check(draw(1, 6, 5, 3, b_form=2, c_form="constant"))


@pytest.mark.parametrize("length", [1, 2, 32, 33])
def test_lengths(length):
    check(draw(1, 3, length, 2, seed=length))


def test_rows_and_blocks():
    "Two rows; two blocks of channels in each of two groups, the second not full."
    check(draw(2, 66, 2, 2, b_form=2, c_form=1))


def test_three_segments():
    check(draw(1, 4, 66, 2), cut=3)


@pytest.mark.parametrize("n", [1, 16, 17, 100, 256])
def test_state_sizes(n):
    check(draw(1, 2, 3, n))


def test_four_steps_as_one_load():
    "Time is the fastest axis and rows begin at multiples of 16: 20 steps of a tensor of 32."
    args = draw(1, 5, 20, 4)
    wide = {k: torch.cat([v, torch.full_like(v[..., :12], torch.nan)], -1)[..., :20] if k in ("u", "delta", "z") else v for k, v in args.items()}
    check(args, given=wide)


def test_channels_fastest():
    args = draw(1, 5, 9, 3)
    check(args, given=time_major(args))
    u = time_major(cast(args, torch.float32))["u"]
    y = selective_scan_triton(**time_major(cast(args, torch.float32)))
    assert y.stride() == u.stride()


@pytest.mark.parametrize("optional", [(), ("D",), ("z",), ("delta_bias",), ("initial_state",)])
@pytest.mark.parametrize("softplus", [False, True])
def test_options(optional, softplus):
    check(draw(1, 3, 6, 3, optional=optional, softplus=softplus))


def test_small_steps_keep_their_digits():
    "softplus from -20 to 40: each delta right by itself, not only the large ones."
    for low, high, limit in ((-20, -5, 2e-6), (-5, 5, 7e-7), (5, 40, 7e-7)):
        delta = torch.linspace(low, high, 17).view(1, 17, 1)
        A, one = torch.zeros(17, 1), torch.ones(17, 1)
        y = selective_scan_triton(torch.ones(1, 17, 1), delta, A, one, one, delta_softplus=True)
        exact = torch.log1p(torch.exp(delta.double()))
        assert ((y - exact) / exact).abs().max() < limit


def test_fast_decay_underflows_to_zero():
    args = draw(1, 3, 8, 3)
    args["A"] = args["A"] * 1e4
    check(args)


@pytest.mark.parametrize("which", [0, 1], ids=["y", "last_state"])
def test_gradient_of_each_output_alone(which):
    args = draw(1, 3, 6, 3)
    leaves = [args[name].requires_grad_() for name in DIFFERENTIABLE]
    want = torch.autograd.grad(selective_scan_reference(**args, return_last_state=True)[which].pow(2).sum(), leaves, materialize_grads=True)
    args = {k: v.detach().float().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    got = torch.autograd.grad(selective_scan_triton(**args, return_last_state=True)[which].pow(2).sum(),
                              [args[name] for name in DIFFERENTIABLE], materialize_grads=True)
    assert_near(dict(zip(DIFFERENTIABLE, got)), dict(zip(DIFFERENTIABLE, want)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_mixtures(dtype):
    "Inputs in half precision, computed in float32; every gradient in the dtype of its argument. The interpreter truncates bfloat16."
    args = {k: v.to(dtype) if k in ("u", "z", "B") else v for k, v in cast(draw(1, 4, 9, 3), torch.float32).items()}
    same = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    want = outputs_and_gradients(selective_scan_reference, same)
    leaves = {k: v.clone().requires_grad_() for k, v in args.items() if isinstance(v, torch.Tensor)}
    y, last = selective_scan_triton(**{**args, **leaves}, return_last_state=True)
    assert y.dtype == dtype and last.dtype == torch.float32
    g = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=g).bfloat16().to(x.dtype)).sum() for x in (y, last))
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    assert all(grads[k].dtype == v.dtype for k, v in leaves.items())
    assert_near({"y": y, "last_state": last}, want[0], 0.01)
    assert rms_error(last, want[0]["last_state"]) < 2e-6
    assert_near(grads, want[1], 0.01)


def test_broadcast_arguments():
    args = cast(draw(1, 4, 6), torch.float32)
    args["delta"] = torch.full((1, 1, 1), 0.3).expand(1, 4, 6).requires_grad_()
    y = selective_scan_triton(**args)
    assert rms_error(y, selective_scan_reference(**args)) < 2e-6
    y.sum().backward()


def test_offsets_beyond_32_bits():
    "Steps of one sequence 2^30 numbers apart: only a few pages of that memory are ever touched."
    u = torch.empty(2 ** 31 + 2 ** 30 + 8, dtype=torch.float16).as_strided((1, 2, 4), (0, 1, 2 ** 30))
    u.copy_(torch.tensor([[[1.0, 2, 4, 8], [8, 4, 2, 1]]]))
    ones, half = torch.ones(1, 2, 4), -torch.full((2, 1), 2.0).log()
    y = selective_scan_triton(u, ones, half, torch.ones(2, 1), torch.ones(2, 1))
    assert y.float().tolist() == [[[1.0, 2.5, 5.25, 10.625], [8.0, 8.0, 6.0, 4.0]]]


def test_the_same_every_time():
    args = cast(draw(1, 66, 2, 3, b_form=1), torch.float32)
    first, again = (outputs_and_gradients(selective_scan_triton, args, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x.values(), y.values()))


def test_states_are_saved_for_a_gradient_only():
    args = cast(draw(1, 2, 40, 2, optional=()), torch.float32)
    inputs = (*(args[k] for k in ("u", "delta", "A", "B", "C")), None, None, None, None, True)
    assert _scan_op(*inputs, False, None)[2].numel() == 0
    assert _scan_op(*inputs, True, None)[2].shape == (1, 1, 2, 4, 32)
    assert selective_scan_triton(**args).grad_fn is None
    args["B"].requires_grad_()
    saved = selective_scan_triton(**args).grad_fn.saved_tensors
    assert sum(x.numel() for x in saved if x is not None) == sum(args[k].numel() for k in ("u", "delta", "A", "B", "C")) + 2 * 4 * 32


def test_the_operators_are_what_pytorch_expects():
    args = cast(draw(1, 3, 2, 2), torch.float32)
    inputs = [args[name].requires_grad_() for name in DIFFERENTIABLE]
    torch.library.opcheck(_scan_op, (*inputs, True, True, None))
    saved = _scan_op(*inputs, True, True, None)[2].detach()
    backward = (torch.ones(1, 3, 2), torch.ones(1, 3, 2), *(x.detach() for x in inputs[:8]), saved, True, None)
    torch.library.opcheck(_scan_backward_op, backward, test_utils=("test_schema", "test_faketensor"))


def test_compiled():
    args = cast(draw(1, 3, 5, 2), torch.float32)
    leaves = [args[name].requires_grad_() for name in DIFFERENTIABLE]

    def loss(u, delta, A, B, C, D, z, bias, h0):
        y, last = selective_scan_triton(u * 2, delta, A, B, C, D, z, bias, True, h0, True)
        return y.square().sum() + last.sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert_near(dict(zip(DIFFERENTIABLE, got)), dict(zip(DIFFERENTIABLE, want)), 1e-6)


def test_autocast_changes_nothing():
    args = cast(draw(1, 3, 5, 2), torch.float32)
    want = outputs_and_gradients(selective_scan_triton, args, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs_and_gradients(selective_scan_triton, args, torch.float32)
    assert all(torch.equal(a, b) for x, y in zip(got, want) for a, b in zip(x.values(), y.values()))


def test_what_it_cannot_do():
    args = draw(1, 2, 3, 2)
    with pytest.raises(RuntimeError, match="float64"):
        selective_scan_triton(**args)
    args = cast(args, torch.float32)
    with pytest.raises(ValueError, match=r"^D: got \(3,\)"):
        selective_scan_triton(**{**args, "D": torch.ones(3)})
    with pytest.raises(ValueError, match="^A: got a state of 257, need at most 256"):
        selective_scan_triton(**cast(draw(1, 2, 3, 257), torch.float32))
    args["u"].requires_grad_()
    (g,) = torch.autograd.grad(selective_scan_triton(**args).pow(2).sum(), args["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        g.sum().backward()


def test_behind_the_one_door():
    from vlmamba_lite.scan import backends, selective_scan
    args = cast(draw(1, 3, 2, 2), torch.float32)
    assert backends()["triton"] is None
    assert torch.equal(selective_scan(**args, backend="triton"), selective_scan_triton(**args))
    assert rms_error(selective_scan(**args), selective_scan_triton(**args)) < 1e-6
