"""Scan orders, cross scan and merge, VSS, SS2D and what scans see: exact inverses, definitions, symmetries, slow twins."""
import math

from measures import assert_same, rms_error, value_and_gradients
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlmamba_lite import mamba, scan, vss
from vlmamba_lite.mamba import Mamba
from vlmamba_lite.scan import selective_scan
from vlmamba_lite.vss import (
    PATHS,
    SCANS,
    SS2D,
    VSS,
    VMambaBlock,
    cross_merge,
    cross_scan,
    hidden_attention,
    plot_listening,
    plot_patch_maps,
    receptive_field,
    scan_order,
    unscan,
    vss_attention,
    vss_definition,
    vss_step_sizes,
)

few = settings(deadline=None, max_examples=25, derandomize=True, database=None)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
kinds = st.sampled_from(sorted(SCANS))


# --- orders ----------------------------------------------------------------------------------------------------------

def walk(kind, height, width):
    "The first half of a scan's paths, cell by cell: an independent statement of Figure 3."
    rows = [r * width + c for r in range(height) for c in range(width)]
    columns = [r * width + c for c in range(width) for r in range(height)]
    return {"bsm": [rows], "csm": [rows, columns]}[kind]


@pytest.mark.parametrize("kind", ["bsm", "csm"])
@given(size=sizes)
@few
def test_bsm_and_csm_are_figure_3(kind, size):
    paths = walk(kind, *size)
    assert scan_order(*size, kind).tolist() == paths + [path[::-1] for path in paths]


@given(size=sizes, kind=kinds)
@few
def test_every_scan_visits_every_patch_once_and_its_second_half_is_reversed(size, kind):
    order = scan_order(*size, kind)
    K, L = order.shape
    assert L == size[0] * size[1] and K == 2 * len(SCANS[kind])
    assert torch.equal(order.sort(1).values, torch.arange(L).expand(K, L))
    assert torch.equal(order[K // 2:], order[:K // 2].flip(1))


def test_scan_order_makes_the_index_where_it_is_asked_to():
    for kind in SCANS:
        assert scan_order(2, 2, kind, device="meta").device.type == "meta"


def steps(kind, height, width):
    "Where each step of a path leads: (rows, columns) moved."
    path = scan_order(height, width, kind)[0]
    return (path // width).diff(), (path % width).diff()


@given(size=sizes)
@few
def test_zigzag_always_goes_to_a_neighbour(size):
    rows, columns = steps("zigzag", *size)
    assert ((rows.abs() + columns.abs()) == 1).all()
    assert scan_order(2, 3, "zigzag")[0].tolist() == [0, 1, 2, 5, 4, 3]


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hilbert_is_hilberts_curve(side):
    rows, columns = steps("hilbert", side, side)
    assert ((rows.abs() + columns.abs()) == 1).all()        # every step to a neighbour, and
    quarter = max(side * side // 4, 1)                      # each quadrant done before the next begins, all the way down
    path = scan_order(side, side, "hilbert")[0]
    for part in path.split(quarter):
        r, c = part // side, part % side
        assert (r.max() - r.min() + 1) * (c.max() - c.min() + 1) == len(part)


@given(size=sizes)
@few
def test_hilbert_on_any_grid_keeps_the_order_of_the_square(size):
    height, width = size
    whole = [p for p in scan_order(16, 16, "hilbert")[0].tolist() if p // 16 < height and p % 16 < width]
    side = 1 << (max(size) - 1).bit_length()
    square = [p for p in scan_order(side, side, "hilbert")[0].tolist() if p // side < height and p % side < width]
    got = scan_order(height, width, "hilbert")[0].tolist()
    assert got == [p // side * width + p % side for p in square] and len(whole) == len(got)


@given(size=sizes)
@few
def test_diagonal_goes_through_the_diagonals_in_turn(size):
    path = scan_order(*size, "diagonal")[0]
    r, c = path // size[1], path % size[1]
    assert sorted(zip((r + c).tolist(), r.tolist())) == list(zip((r + c).tolist(), r.tolist()))


# --- cross scan and merge --------------------------------------------------------------------------------------------

@given(size=sizes, kind=kinds)
@few
def test_unscan_is_exact_and_merge_of_scan_is_k_times_identity(size, kind):
    order = scan_order(*size, kind)
    K, L = order.shape
    x = torch.randint(-9, 9, (2, L, 3)).double()
    scans = cross_scan(x, order)
    for k in range(K):
        assert torch.equal(scans[:, k], x[:, order[k]])
    assert torch.equal(unscan(scans, order), x[:, None].expand_as(scans))
    assert torch.equal(cross_scan(x, order), scans) and torch.equal(cross_merge(scans, order), K * x)


@given(size=sizes, kind=kinds)
@few
def test_gradients_are_the_transposes(size, kind):
    order = scan_order(*size, kind)
    K, L = order.shape
    x, y = torch.randn(2, L, 3, dtype=torch.float64), torch.randn(2, K, L, 3, dtype=torch.float64)
    x.requires_grad_(), y.requires_grad_()
    gx, = torch.autograd.grad(cross_scan(x, order), x, y.detach())
    gy, = torch.autograd.grad(cross_merge(y, order), y, x.detach())
    torch.testing.assert_close(gx, cross_merge(y, order))
    assert torch.equal(gy, cross_scan(x, order))


# --- VSS -------------------------------------------------------------------------------------------------------------

def twin(mixers, x, order):
    "VSS token by token and direction by direction, each layer by its recurrent step."
    y = torch.zeros_like(x)
    for k, path in enumerate(order.tolist()):
        mixer = mixers[k % len(mixers)]
        state = mixer.empty_state(len(x), dtype=x.dtype)
        state = state._replace(ssm=state.ssm.to(x.dtype))
        for patch in path:
            out, state = mixer.step(x[:, patch], state)
            y = y.index_add(1, torch.tensor([patch]), out[:, None])
    return y


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", sorted(SCANS))
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (1, 6), (7, 2)])
def test_vss_is_its_definition(kind, size, shared):
    torch.manual_seed(0)
    module = VSS(8, kind, shared=shared, d_state=4, bias=True).double()
    order, x = scan_order(*size, kind), torch.randn(2, size[0] * size[1], 8, dtype=torch.float64, requires_grad=True)
    slow = value_and_gradients(lambda x: vss_definition(module.mixers, x, order), x, *module.parameters())
    assert_same(value_and_gradients(lambda x: module(x, size), x, *module.parameters()), slow)


@pytest.mark.parametrize("shared", [True, False])
def test_vss_is_the_recurrent_step_along_every_path(shared):
    torch.manual_seed(0)
    module = VSS(6, "csm", shared=shared, d_state=3).double()
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    assert rms_error(module(x, (3, 4)), twin(module.mixers, x, scan_order(3, 4, "csm"))) < 1e-5


@pytest.mark.parametrize("merge, factor", [("sum", 4), ("mean", 1)])
def test_identity_mixer_gives_k_times_identity(merge, factor):
    x = torch.randint(-9, 9, (2, 15, 3)).float()
    assert torch.equal(VSS(3, "csm", mixer=nn.Identity, merge=merge)(x, (3, 5)), factor * x)


@pytest.mark.parametrize("shared", [True, False])
def test_mean_is_the_sum_divided_by_k(shared):
    module, x = VSS(4, "csm", shared=shared, bias=True), torch.randn(1, 6, 4)
    mean = VSS(4, "csm", shared=shared, bias=True, merge="mean")
    mean.load_state_dict(module.state_dict())
    torch.testing.assert_close(mean(x, (2, 3)), module(x, (2, 3)) / 4)
    torch.testing.assert_close(mean.directions(x, (2, 3)).sum(1), mean(x, (2, 3)))


def test_any_module_can_be_the_mixer():
    def make(dim, width):
        return nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, dim))
    module, x = VSS(4, "csm", mixer=make, shared=False, width=5), torch.randn(2, 6, 4)
    assert len(module.mixers) == 4                          # position-wise modules: the order does not matter
    torch.testing.assert_close(module(x, (2, 3)), sum(m(x) for m in module.mixers))


def turned(x, size):
    return x.view(len(x), *size, -1).flip(1, 2).flatten(1, 2)


def transposed(x, size):
    return x.view(len(x), *size, -1).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("kind", ["bsm", "csm"])
def test_shared_weights_are_equivariant_to_turning_by_180_degrees(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    module = VSS(8, kind).double()
    assert rms_error(module(turned(x, (3, 5)), (3, 5)), turned(module(x, (3, 5)), (3, 5))) < 1e-10
    own = VSS(8, kind, shared=False).double()
    assert rms_error(own(turned(x, (3, 5)), (3, 5)), turned(own(x, (3, 5)), (3, 5))) > 1e-2


def test_shared_csm_is_equivariant_to_transposing_and_bsm_is_not():
    torch.manual_seed(0)
    x, errors = torch.randn(2, 15, 8, dtype=torch.float64), {}
    for kind in ("bsm", "csm"):
        module = VSS(8, kind).double()
        errors[kind] = rms_error(module(transposed(x, (3, 5)), (5, 3)), transposed(module(x, (3, 5)), (3, 5)))
    assert errors["csm"] < 1e-10 and errors["bsm"] > 1e-2


@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_a_batch_do_not_meet(shared):
    module, x = VSS(8, "csm", shared=shared), torch.randn(3, 12, 8)
    torch.testing.assert_close(module(x, (3, 4))[1:2], module(x[1:2], (3, 4)))


@pytest.mark.parametrize("shared", [True, False])
def test_bfloat16(shared):
    torch.manual_seed(0)
    module, x = VSS(16, "csm", shared=shared, d_state=4), torch.randn(2, 35, 16)
    want = module(x, (5, 7))
    got = module.bfloat16()(x.bfloat16(), (5, 7))
    assert got.dtype == torch.bfloat16 and rms_error(got, want) < 0.03


@pytest.mark.parametrize("make", [VSS, lambda *a: VSS(*a, shared=False), SS2D])
def test_autocast_and_inference_mode(make):
    torch.manual_seed(0)
    module, x = make(16), torch.randn(2, 35, 16)
    want = value_and_gradients(lambda x: module(x, (5, 7)), x.requires_grad_(), *module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x, (5, 7))
        assert_same(value_and_gradients(lambda x: module(x, (5, 7)).float(), x, *module.parameters()), want, 0.1)
    assert got.dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(module(x, (5, 7)), want[0])


@pytest.mark.parametrize("shared", [True, False])
def test_backend_is_passed_through(shared):
    torch.manual_seed(0)
    module, x = VSS(8, shared=shared, backend="reference"), torch.randn(1, 6, 8)
    want = module(x, (2, 3))
    for mixer in module.mixers:
        mixer.backend = "chunked"
    torch.testing.assert_close(module(x, (2, 3)), want)
    for name in ("backend", "conv_backend"):
        module = VSS(8, shared=shared, **{name: "no such backend"})
        with pytest.raises(ValueError, match=f"^{name}: got 'no such backend'"):
            module(x, (2, 3))


@pytest.mark.parametrize("make", [VSS, lambda *a, **k: VSS(*a, shared=False, **k), SS2D])
def test_the_fused_kernel_named_where_it_cannot_run_says_so(make, monkeypatch):
    monkeypatch.setitem(scan._BACKENDS, "triton", (None, lambda: "there is no such card"))
    with pytest.raises(RuntimeError, match="^backend 'triton' cannot run here: there is no such card"):
        make(8, backend="triton")(torch.randn(1, 6, 8), (2, 3))


def test_the_order_is_kept_on_a_gpu(monkeypatch):
    cpu = torch.device("cpu")
    assert torch.equal(vss._order_on((2, 3), "csm", cpu), scan_order(2, 3, "csm"))
    with monkeypatch.context() as m:
        m.setattr(vss, "_kept_order", lambda *args: args)
        assert vss._order_on((2, 3), "csm", torch.device("cuda")) == (2, 3, "csm", torch.device("cuda"))
    vss._order_once.cache_clear()
    with torch.inference_mode():
        kept = vss._kept_order(2, 3, "csm", cpu)
    assert kept is vss._kept_order(2, 3, "csm", cpu) and not kept.is_inference()
    assert torch.equal(kept, scan_order(2, 3, "csm"))


@pytest.mark.parametrize("shared", [True, False])
def test_all_directions_go_through_one_scan(shared, monkeypatch):
    calls = []
    for module in (mamba, vss):
        scan = getattr(module, "selective_scan", None)
        if scan is not None:
            monkeypatch.setattr(module, "selective_scan", lambda *a, scan=scan, **k: calls.append(1) or scan(*a, **k))
    VSS(8, "csm", shared=shared)(torch.randn(1, 6, 8), (2, 3))
    assert len(calls) == 1


def test_parameters_are_those_of_mamba_layers():
    names = set(Mamba(8).state_dict())
    assert set(VSS(8, "csm").state_dict()) == {f"mixers.0.{n}" for n in names}
    assert set(VSS(8, "csm", shared=False).state_dict()) == {f"mixers.{k}.{n}" for k in range(4) for n in names}


def test_errors_name_the_argument():
    x, order = torch.randn(1, 6, 8), scan_order(2, 3)
    for match, call in {
        r"height, width: got 0, 3": lambda: scan_order(0, 3),
        r"kind: got 'spiral'": lambda: scan_order(2, 3, "spiral"),
        r"x: got 5 tokens, need 6": lambda: cross_scan(x[:, :5], order),
        r"y: got 5 tokens, need 6": lambda: cross_merge(torch.randn(1, 2, 5, 8), order),
        r"y: got 3 directions, need 2": lambda: cross_merge(torch.randn(1, 3, 6, 8), order),
        r"scan: got 'spiral'": lambda: VSS(8, "spiral"),
        r"mixer: got 'lstm'": lambda: VSS(8, mixer="lstm"),
        r"merge: got 'max'": lambda: VSS(8, merge="max"),
        r"x: got shape \(1, 6, 8\), need \(batch, 2 \* 2, 8\)": lambda: VSS(8)(x, (2, 2)),
        r"x: got shape \(1, 6, 8\), need \(batch, 2 \* 3, 16\)": lambda: VSS(16)(x, (2, 3)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


# --- SS2D ------------------------------------------------------------------------------------------------------------

def ss2d_twin(p, x, height, width):
    "VMamba's SS2D written step by step, one picture, one direction and one position at a time."
    out, N = [], p["A_logs"].shape[1]
    D = p["out_proj.weight"].shape[1]
    R = p["dt_projs_weight"].shape[2]
    for picture in x:
        xz = picture @ p["in_proj.weight"].T
        u, z = xz[:, :D], xz[:, D:]
        grid = u.view(height, width, D)
        conv = {}
        for r in range(height):
            for c in range(width):
                total = p["conv2d.bias"]
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        if 0 <= r + i < height and 0 <= c + j < width:
                            total = total + grid[r + i, c + j] * p["conv2d.weight"][:, 0, i + 1, j + 1]
                conv[r, c] = total * torch.sigmoid(total)
        rows = [(r, c) for r in range(height) for c in range(width)]
        columns = [(r, c) for c in range(width) for r in range(height)]
        merged = {cell: 0 for cell in rows}
        for k, path in enumerate([rows, columns, rows[::-1], columns[::-1]]):
            A, skip = -torch.exp(p["A_logs"][k * D:(k + 1) * D]), p["Ds"][k * D:(k + 1) * D]
            h = torch.zeros(D, N, dtype=x.dtype)
            for cell in path:
                v = conv[cell]
                code = p["x_proj_weight"][k] @ v
                dt = torch.log1p(torch.exp(p["dt_projs_weight"][k] @ code[:R] + p["dt_projs_bias"][k]))
                B, C = code[R:R + N], code[R + N:]
                h = torch.exp(dt[:, None] * A) * h + (dt * v)[:, None] * B[None]
                merged[cell] = merged[cell] + h @ C + skip * v
        y = torch.stack([merged[cell] for cell in rows])
        y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-5)
        y = (y * p["out_norm.weight"] + p["out_norm.bias"]) * (z * torch.sigmoid(z))
        out.append(y @ p["out_proj.weight"].T)
    return torch.stack(out)


@pytest.mark.parametrize("size", [(3, 4), (1, 1), (5, 2)])
def test_ss2d_is_vmambas_definition(size):
    torch.manual_seed(0)
    module = SS2D(6, d_state=3, dt_rank=2).double()
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(2, size[0] * size[1], 6, dtype=torch.float64, requires_grad=True)
    p = dict(module.named_parameters())
    want = value_and_gradients(lambda x: ss2d_twin(p, x, *size), x, *p.values())
    assert_same(value_and_gradients(lambda x: module(x, size), x, *p.values()), want, 1e-9)


def test_ss2d_has_vmambas_parameters_and_starts_as_mamba_does():
    shapes = {n: tuple(p.shape) for n, p in SS2D(8, d_state=4).named_parameters()}
    assert shapes == {"in_proj.weight": (32, 8), "conv2d.weight": (16, 1, 3, 3), "conv2d.bias": (16,),
                      "x_proj_weight": (4, 9, 16), "dt_projs_weight": (4, 16, 1), "dt_projs_bias": (4, 16), "A_logs": (64, 4),
                      "Ds": (64,), "out_norm.weight": (16,), "out_norm.bias": (16,), "out_proj.weight": (8, 16)}
    module = SS2D(8, d_state=4)
    torch.testing.assert_close(module.A_logs.exp(), torch.arange(1., 5).expand(64, 4))
    dt = torch.nn.functional.softplus(module.dt_projs_bias)
    assert (module.Ds == 1).all() and dt.min() > 9e-4 and dt.max() < 0.11 and dt.unique().numel() == 64
    assert module.A_logs._no_weight_decay and module.Ds._no_weight_decay
    assert sum(p.numel() for p in module.parameters()) == sum(math.prod(s) for s in shapes.values())


@pytest.mark.parametrize("size", [(7, 7), (1, 13), (24, 24), (27, 27), (27, 30)])
@pytest.mark.parametrize("make", [lambda: VSS(8, "csm", d_state=4), lambda: VSS(8, shared=False, d_state=4), lambda: VMambaBlock(8, d_state=4)],
                         ids=["shared", "own", "vmamba"])
def test_any_grid_in_single_and_half_precision(make, size):
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, size[0] * size[1], 8)
    with torch.no_grad():
        y, half = module(x, size), module.bfloat16()(x.bfloat16(), size)
    assert y.shape == x.shape and y.isfinite().all() and half.dtype == torch.bfloat16 and rms_error(half, y) < 0.03


def test_vmamba_block_is_residual():
    block, x = VMambaBlock(8), torch.randn(1, 6, 8)
    torch.testing.assert_close(block(x, (2, 3)), x + block.op(torch.nn.functional.layer_norm(x, (8,)), (2, 3)))
    with pytest.raises(ValueError, match="x: got shape"):
        block(x, (2, 2))


# --- what a scan sees ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("groups", [None, 1, 3])
@given(L=st.integers(1, 9))
@few
def test_hidden_attention_is_the_scan(groups, L):
    shape = (6, 4) if groups is None else (2, groups, 4, L)
    u, delta = torch.randn(2, 2, 6, L, dtype=torch.float64)
    A, bias = -torch.rand(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    B, C = torch.randn(2, *shape, dtype=torch.float64)
    M = hidden_attention(delta, A, B, C, bias, True)
    assert M.shape == (2, 6, L, L) and torch.equal(M, M.tril())
    want = selective_scan(u, delta, A, B, C, delta_bias=bias, delta_softplus=True, backend="reference")
    torch.testing.assert_close((M @ u[..., None])[..., 0], want)


def test_hidden_attention_is_finite_where_decay_is_extreme():
    delta = torch.full((1, 1, 300), 50.)
    M = hidden_attention(delta, torch.full((1, 2), -16.), torch.ones(1, 2, 300), torch.ones(1, 2, 300))
    assert M.isfinite().all() and torch.allclose(M[0, 0], 100. * torch.eye(300))


def listening(mixer, x, path):
    "Mean |M| of one scan from the layer's own recurrence: the effect of each input of the scan on each output, by autograd."
    L, D = len(path), mixer.d_inner
    u = mixer.in_proj(x[:, path]).chunk(2, -1)[0]
    u = torch.nn.functional.silu(mamba.causal_conv1d(u, mixer.conv1d.weight, mixer.conv1d.bias)[0])
    dt, B, C = mixer.x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
    dt, A = mixer.dt_proj(dt), -torch.exp(mixer.A_log)
    M = torch.autograd.functional.jacobian(
        lambda v: selective_scan(v.T[None], dt.mT, A, B.mT, C.mT, delta_softplus=True)[0].T, u[0])     # (L, D, L, D)
    M = torch.stack([M[:, d, :, d] for d in range(D)]).abs().mean(0)
    out = torch.zeros(L, L, dtype=x.dtype)
    for t in range(L):
        for s in range(L):
            out[path[t], path[s]] = M[t, s]
    return out, torch.zeros(L, dtype=x.dtype).index_copy(0, torch.tensor(path), torch.nn.functional.softplus(dt)[0].mean(-1))


@pytest.mark.parametrize("shared", [True, False])
def test_vss_attention_and_step_sizes_in_the_order_of_the_picture(shared):
    torch.manual_seed(0)
    module, x = VSS(6, "csm", shared=shared, d_state=3).double(), torch.randn(2, 12, 6, dtype=torch.float64)
    found, steps = vss_attention(module, x, (3, 4)), vss_step_sizes(module, x, (3, 4))
    assert found.shape == (2, 4, 12, 12) and steps.shape == (2, 4, 12) and not found.requires_grad
    for k, path in enumerate(scan_order(3, 4, "csm").tolist()):
        want, want_steps = listening(module.mixers[0 if shared else k], x[1:], path)
        torch.testing.assert_close(found[1, k], want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(steps[1, k], want_steps)
    seen = found[0] > 0
    for k, path in enumerate(scan_order(3, 4, "csm").tolist()):
        for t, patch in enumerate(path):
            assert seen[k, patch].nonzero().flatten().tolist() == sorted(path[:t + 1])


def test_vss_attention_averages_the_channels_asked_for():
    module, x = VSS(6, d_state=3), torch.randn(1, 6, 6)
    some, all_ = vss_attention(module, x, (2, 3), channels=5), vss_attention(module, x, (2, 3), channels=99)
    assert some.shape == all_.shape and not torch.equal(some, all_)
    torch.testing.assert_close(all_, vss_attention(module, x, (2, 3), channels=12))


def test_receptive_field_of_a_known_jacobian():
    torch.manual_seed(0)
    W = torch.randn(6, 5, 6, 7)                              # (out token, out channel, in token, in channel)
    def f(x, size):
        return torch.einsum("icjd,bjd->bic", W, x)
    found = receptive_field(f, torch.randn(2, 6, 7), (2, 3), (1, 1), probes=4000)
    assert rms_error(found, W[4].square().sum((0, 2)).sqrt().view(2, 3)) < 0.05


@pytest.mark.parametrize("merge", ["sum", "mean"])
def test_receptive_field_by_direction_sees_what_lies_before(merge):
    torch.manual_seed(0)
    module, x = VSS(6, "csm", d_state=3, merge=merge), torch.randn(2, 15, 6)
    maps = receptive_field(module.directions, x, (3, 5), (1, 2))
    for seen, path in zip(maps, scan_order(3, 5, "csm").tolist()):
        assert (seen.flatten() > 0).nonzero().flatten().tolist() == sorted(path[:path.index(7) + 1])
    merged = receptive_field(module, x, (3, 5), (1, 2))
    assert merged.shape == (3, 5) and (merged > 0).all() and (merged <= maps.sum(0) * (1 + 1e-6)).all()
    with torch.no_grad():                                   # works where gradients are off, and leaves x alone
        assert torch.equal(receptive_field(module, x, (3, 5), (1, 2)), merged) and not x.requires_grad
    with pytest.raises(ValueError, match=r"at: got \(3, 0\)"):
        receptive_field(module, x, (3, 5), (3, 0))


def test_plot_patch_maps_draws_and_marks():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    maps = torch.rand(3, 2, 4)
    maps[0, 0, 0] = 0
    for at in ((), (1, 2), [(0, 0), (1, 1), (1, 3)]):
        axes = plot_patch_maps(maps, ["a", "b", "c"], at, decades=3 if at else 0)
        assert [ax.get_title() for ax in axes] == ["a", "b", "c"]
        places = [line.get_xydata().tolist() for ax in axes for line in ax.lines]
        assert places == {(): [], (1, 2): [[[2, 1]]] * 3}.get(tuple(at), [[[0, 0]], [[1, 1]], [[3, 1]]])
    assert plot_patch_maps(torch.zeros(1, 2, 2)) is not None
    plt.close("all")


def test_plot_listening_shows_what_all_and_what_some_listen_to():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    heard = {"before": torch.rand(6, 6), "after": torch.rand(6, 6)}
    for mark in ((), (0, 1)):
        axes = plot_listening(heard, (2, 3), [(1, 2)], mark)
        assert axes.shape == (2, 2) and axes[1, 1].get_title() == "after: patch 1, 2"
        assert [len(ax.lines) for ax in axes.flat] == [len(mark) // 2, 1] * 2
        for row, M in zip(axes, heard.values()):
            for ax, want in zip(row, (M.sum(0), M[5])):
                shown = torch.tensor(ax.images[0].get_array())
                torch.testing.assert_close(shown, (want / want.max()).double().view(2, 3))
    plt.close("all")


def test_paths_can_be_added(monkeypatch):
    monkeypatch.setitem(PATHS, "odd first", lambda h, w, device=None: torch.cat([torch.arange(1, h * w, 2), torch.arange(0, h * w, 2)]))
    monkeypatch.setitem(SCANS, "odd", ["odd first"])
    x = torch.randn(1, 6, 4)
    assert torch.equal(VSS(4, "odd", mixer=nn.Identity)(x, (2, 3)), 2 * x)


def test_plot_scan_order_draws_a_panel_for_each_scan():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for kind in SCANS:
        assert len(vss.plot_scan_order(3, 5, kind)) == 2 * len(SCANS[kind])
    plt.close("all")
