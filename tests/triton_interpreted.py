"""The Triton kernels in Triton's interpreter, on CPU tensors. `test_scan_triton.py` runs this file in a process of its own,
because TRITON_INTERPRET=1 has to be in the environment before Triton is imported:

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py

On a machine with a GPU and without that variable the same tests run on the GPU.
"""
import sys

from measures import rms_error
import pytest
import scan_cases
import torch
from scan_cases import DIFFERENTIABLE, assert_near, cast, draw, outputs_and_gradients

from vlmamba_lite.evaluation import kernels
from vlmamba_lite.ops.reference import selective_scan_reference
from vlmamba_lite.ops.triton import INTERPRETED, _PLACES, _scan_backward_op, _scan_op, selective_scan_triton
from vlmamba_lite.connectors.vss import VSS, _kept_order, _order_once, scan_order

assert INTERPRETED or torch.cuda.is_available(), "needs TRITON_INTERPRET=1 in the environment, or a CUDA GPU"
if not INTERPRETED:
    scan_cases.DEVICE = torch.device("cuda", 0)
    torch.set_default_device(scan_cases.DEVICE)
DEVICE = scan_cases.DEVICE


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
    loss = sum((x * torch.randn(x.shape, generator=g, device="cpu").bfloat16().to(x)).sum() for x in (y, last))
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
    y = selective_scan_triton(u, ones, half, torch.ones(2, 1), torch.ones(2, 1), order=torch.tensor([[3, 2, 1, 0]]))
    assert y.float().tolist() == [[[4.0, 6.0, 8.0, 8.0], [10.625, 5.25, 2.5, 1.0]]]


def test_the_same_every_time():
    args = cast(draw(1, 66, 2, 3, b_form=1), torch.float32)
    first, again = (outputs_and_gradients(selective_scan_triton, args, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x.values(), y.values()))


def test_states_are_saved_for_a_gradient_only():
    args = cast(draw(1, 2, 40, 2, optional=()), torch.float32)
    inputs, run = (*(args[k] for k in ("u", "delta", "A", "B", "C")), None, None, None, None), _scan_op
    assert run(*inputs, None, False, True, False, None)[2].numel() == 0
    assert run(*inputs, None, False, True, True, None)[2].shape == (1, 1, 2, 4, 32)
    assert selective_scan_triton(**args).grad_fn is None
    args["B"].requires_grad_()
    saved = selective_scan_triton(**args).grad_fn.saved_tensors
    assert sum(x.numel() for x in saved if x is not None) == sum(args[k].numel() for k in ("u", "delta", "A", "B", "C")) + 2 * 4 * 32


@pytest.mark.parametrize("order", [None, torch.tensor([[1, 0], [0, 1]])], ids=["sequence", "order"])
def test_the_operators_are_what_pytorch_expects(order):
    "Also for B and C whose last axis is not their fastest, as the layers make them, and for a u that two paths share."
    args = cast(draw(1, 4, 2, 2), torch.float32)
    args |= {name: args[name].mT.contiguous().mT for name in ("delta", "B", "C")}
    args["u"] = args["u"] if order is None else args["u"][:, :2].mT.contiguous().mT
    inputs = [args[name].requires_grad_() for name in DIFFERENTIABLE]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")[:4 if order is None else 3]
    torch.library.opcheck(_scan_op, (*inputs, order, False, True, True, None), test_utils=checks)
    saved = _scan_op(*inputs, order, False, True, True, None)[2].detach()
    backward = (torch.ones(1, 4, 2), torch.ones(1, 4, 2), *(x.detach() for x in inputs[:8]), saved, order, False, True, None)
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
    with torch.autocast(DEVICE.type, torch.bfloat16):
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


# --- pictures: several paths in one launch ------------------------------------------------------------------------------

def along(x, order):
    "Each of K parts of the second axis of x in the order of its path. x (B, K P, ..., L), or (B, P, ..., L) for all of them."
    if x.shape[1] % len(order):
        x = torch.cat([x] * len(order), 1)
    return torch.cat([part[..., path] for part, path in zip(x.chunk(len(order), 1), order)], 1)


def by_copies(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None,
              return_last_state=False, order=None, along_paths=False):
    "A scan of a picture in the plain way: copies in the order of each path, the scan of chapter 01, and all back to its place."
    K = len(order)
    if not along_paths:
        u = along(torch.cat([u] * K, 1) if u.shape != delta.shape else u, order)
        delta = along(delta, order)
        B, C = (X if X.ndim == 2 else along(X.unsqueeze(1).expand(-1, K, -1, -1) if X.ndim == 3 else X, order) for X in (B, C))
    z = None if z is None else along(z, order)
    y, last = selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, True)
    return along(y, order.argsort(1)), last


def check_order(args, order, cut=None, given=None, **how):
    want = outputs_and_gradients(by_copies, args, order=order, **how)
    got = outputs_and_gradients(selective_scan_triton, given or args, torch.float32, cut=cut, order=order, **how)
    assert_near(got[0], want[0], 2e-6)
    assert_near(got[1], want[1], 1e-5)
    return got


def shuffled(K, L):
    g = torch.Generator().manual_seed(K)
    return torch.stack([torch.randperm(L, generator=g, device="cpu") for _ in range(K)]).to(DEVICE)


@pytest.mark.parametrize("kind, size, channels, groups, along_paths", [
    ("bsm", (3, 3), 6, 2, False), ("csm", (1, 3), 8, 4, False), ("bsm", (1, 5), 6, 2, True)])
def test_paths_through_a_picture(kind, size, channels, groups, along_paths):
    args = draw(1, channels, size[0] * size[1], 3, b_form=groups, c_form=groups)
    check_order(args, scan_order(*size, kind), along_paths=along_paths)


@pytest.mark.parametrize("K", [1, 3])
def test_any_permutation_and_a_u_that_all_paths_read(K):
    args = draw(1, 2 * K, 4, 2, b_form=K, c_form=1)
    args["u"] = args["u"][:, :2]
    got = check_order(args, shuffled(K, 4).int())
    assert got[0]["y"].shape == (1, 2 * K, 4) and got[1]["u"].shape == (1, 2, 4)


@pytest.mark.parametrize("b_form, c_form", [(4, "constant"), ("constant", "step")])
def test_groups_and_constants_with_an_order(b_form, c_form):
    check_order(draw(1, 8, 3, 2, b_form=b_form, c_form=c_form), shuffled(2, 3))


def test_paths_in_two_segments():
    check_order(draw(1, 2, 33, 2), scan_order(3, 11, "bsm")[1:], 2, along_paths=True)


@pytest.mark.parametrize("optional", [(), ("z",)])
def test_options_with_an_order(optional):
    check_order(draw(1, 4, 3, 2, b_form=2, c_form=2, optional=optional, softplus=False), shuffled(2, 3))


@pytest.mark.parametrize("lies", [time_major, dict], ids=["channels fastest", "time fastest"])
def test_paths_in_both_memory_orders(lies):
    "16 steps: with time fastest, what lies along the paths is loaded four steps at once."
    args = draw(1, 4, 16, 2)
    check_order(args, shuffled(1, 16), given=lies(args), along_paths=True)


def test_an_order_in_bfloat16():
    args = {k: v.bfloat16() if k in ("u", "delta", "z", "B") else v for k, v in cast(draw(1, 4, 6, 2, b_form=2), torch.float32).items()}
    same = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    y = selective_scan_triton(**args, order=shuffled(2, 6))
    assert y.dtype == torch.bfloat16 and rms_error(y, by_copies(**same, order=shuffled(2, 6))[0]) < 0.01


def test_an_order_is_checked_once(monkeypatch):
    args, order = cast(draw(1, 2, 3, 1, optional=()), torch.float32), torch.tensor([[2, 0, 1]])
    first = selective_scan_triton(**args, order=order)
    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "sort", None)                           # a second check would fail
        assert torch.equal(selective_scan_triton(**args, order=order), first)
    order[0, 0] = 0
    with pytest.raises(ValueError, match=r"^order: got rows that are no permutation of the numbers below 3"):
        selective_scan_triton(**args, order=order)
    remembered = len(_PLACES)
    del order
    assert len(_PLACES) == remembered - 1


def test_orders_that_do_not_fit():
    args = cast(draw(1, 4, 3, 1, b_form=4, optional=()), torch.float32)
    for order, words in {
            (3, 0): r"^order: got torch.float32, need \(K, L\) of int32 or int64",
            (2, 4): rf"^order: got \(2, 4\) on {DEVICE}, need \(K, 3\) on {DEVICE} with a K that divides the 4 channels of delta",
            (3, 3): rf"^order: got \(3, 3\) on {DEVICE}"}.items():
        with pytest.raises(ValueError, match=words):
            selective_scan_triton(**args, order=shuffled(*order) if order[1] else torch.ones(3, 3))
    with pytest.raises(ValueError, match="^B: got 4 groups, need a number that divides 2, as u is shared by 2 paths"):
        selective_scan_triton(**{**args, "u": args["u"][:, :2]}, order=shuffled(2, 3))
    with pytest.raises(ValueError, match=r"^A: got \(4, 1\), need \(2, N\) for u of 2 channels"):
        selective_scan_triton(**{**args, "u": args["u"][:, :2]}, order=shuffled(2, 3), along_paths=True)


@pytest.mark.parametrize("make", [lambda: VSS(3, d_state=2, bias=True, expand=1), lambda: VSS(3, shared=False, d_state=2, bias=True, expand=1)],
                         ids=["shared", "own"])
def test_modules_scan_a_picture_in_one_launch(make, monkeypatch):
    "Values and every gradient of `VSS`, named backend triton, against their plain form in float64."
    torch.manual_seed(0)
    module, x = make(), torch.randn(1, 4, 3)
    launches = []

    def noted(*args, **kwargs):
        launches.append(kwargs["order"].shape)
        return selective_scan_triton(*args, **kwargs)

    for name in ("vlmamba_lite.ops.triton",):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "selective_scan_triton", noted)

    def outputs(module, x, backend):
        for part in module.mixers:
            part.backend = backend
        x = x.detach().requires_grad_()
        y = module(x, (2, 2))
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        names, leaves = ["x", *dict(module.named_parameters())], [x, *module.parameters()]
        return {"y": y, **dict(zip(names, torch.autograd.grad((y * weights).sum(), leaves)))}

    got = outputs(module, x, "triton")
    assert launches == [(2, 4)]
    assert_near(got, outputs(module.double(), x.double(), "reference"), 1e-5)


def test_a_kept_order_is_a_constant_to_the_compiler(monkeypatch):
    "The same tensor in every call, so that it is checked once; and made in inference it serves training."
    device, args = DEVICE, cast(draw(1, 2, 6, 1, optional=()), torch.float32)

    def loss(u):
        return selective_scan_triton(**{**args, "u": u}, order=_kept_order(2, 3, "bsm", device)).square().sum()

    _order_once.cache_clear()
    with torch.inference_mode():
        loss(args["u"])
    assert _kept_order(2, 3, "bsm", device) is _kept_order(2, 3, "bsm", device)
    u = args["u"].requires_grad_()
    want = torch.autograd.grad(loss(u), u)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert rms_error(torch.autograd.grad(compiled(u), u)[0], want) < 1e-6
    monkeypatch.setattr(torch.Tensor, "sort", None)                     # another check would fail
    assert rms_error(torch.autograd.grad(compiled(u), u)[0], want) < 1e-6


def test_bench_picture_compares_two_ways(monkeypatch):
    "Without a clock: on one patch they do the same; on more where delta, B and C belong to the same places."
    monkeypatch.setattr(kernels, "time_scan", lambda scan, args: scan(*args))
    line = kernels.bench_picture((1, 2, 1, 1, 2), torch.float32, DEVICE)
    assert line["one_launch"].shape == (1, 2, 1) and rms_error(line["copies"], line["one_launch"]) < 1e-6
    args, order = cast(draw(1, 8, 4, 2, b_form=4, c_form=4, optional=()), torch.float32), scan_order(2, 2, "csm")
    u, delta, A, B, C, softplus = args.values()
    one = kernels.scan_by_order(u[:, :2], delta, A, B, C, None, None, None, softplus, order=order)
    delta, B, C = (along(x, order) for x in (delta, B, C))
    assert rms_error(kernels.scan_by_copies(u[:, :2], delta, A, B, C, None, None, None, softplus, order=order), one) < 1e-6


def test_behind_the_one_door():
    from vlmamba_lite.ops.selective_scan import backends, selective_scan
    args = cast(draw(1, 3, 2, 2), torch.float32)
    assert backends()["triton"] is None
    assert torch.equal(selective_scan(**args, backend="triton"), selective_scan_triton(**args))
    assert rms_error(selective_scan(**args), selective_scan_triton(**args)) < 1e-6
