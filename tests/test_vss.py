"""Scan orders, cross scan and merge, VSS: exact inverses, definitions, symmetries, slow twins."""
from measures import assert_same, rms_error, value_and_gradients
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vlmamba_lite.layers.mamba as mamba
import vlmamba_lite.ops.selective_scan as scan
from vlmamba_lite.connectors import vss
from vlmamba_lite.connectors.vss import PATHS, SCANS, VSS, cross_merge, cross_scan, scan_order, unscan, vss_directions
from vlmamba_lite.layers.mamba import Mamba

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
    slow = value_and_gradients(lambda x: vss_directions(module.mixers, x, order).sum(1), x, *module.parameters())
    assert_same(value_and_gradients(lambda x: module(x, size), x, *module.parameters()), slow)


@pytest.mark.parametrize("shared", [True, False])
def test_vss_is_the_recurrent_step_along_every_path(shared):
    torch.manual_seed(0)
    module = VSS(6, "csm", shared=shared, d_state=3).double()
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    assert rms_error(module(x, (3, 4)), twin(module.mixers, x, scan_order(3, 4, "csm"))) < 1e-5


@pytest.mark.parametrize("options", [{}, dict(is_mimo=True, mimo_rank=2, is_outproj_norm=True), dict(ngroups=2, rope_fraction=1.)], ids=str)
@pytest.mark.parametrize("mixer, shared", [("mamba3", True), ("mamba3", False), ("mamba2", True)])
@pytest.mark.parametrize("kind, size", [("bsm", (3, 5)), ("csm", (4, 3)), ("csm", (1, 1))])
def test_other_mixers_are_layers_on_tokens_in_other_orders(kind, size, mixer, shared, options):
    "Values and gradients against a layer for each direction, which reads the picture turned, transposed or both."
    if mixer == "mamba2":
        options = {name: value for name, value in options.items() if name == "ngroups"}
    torch.manual_seed(0)
    module = VSS(8, kind, mixer, shared, d_state=4, headdim=4, chunk_size=5, **options).double()
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(2, size[0] * size[1], 8, dtype=torch.float64)

    def naive(x):
        grid, total = x.unflatten(1, size), 0
        layers = list(module.mixers) * (module.K // len(module.mixers))
        paths = [(False, False), (False, True)] if kind == "bsm" else [(False, False), (True, False), (False, True), (True, True)]
        for layer, (columns, reverse) in zip(layers, paths, strict=True):
            seen = (grid.transpose(1, 2) if columns else grid).flatten(1, 2)
            y = layer(seen.flip(1)).flip(1) if reverse else layer(seen)
            y = y.unflatten(1, size[::-1] if columns else size)
            total = total + (y.transpose(1, 2) if columns else y).flatten(1, 2)
        return total
    slow = value_and_gradients(naive, x, *module.parameters())
    assert_same(value_and_gradients(lambda x: module(x, size), x, *module.parameters()), slow)
    assert_same([module.directions(x, size).sum(1)], [module(x, size)])
    assert rms_error(module(x, size), twin(module.mixers, x, scan_order(*size, kind))) < 1e-9


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


@pytest.mark.parametrize("make", [VSS, lambda *a: VSS(*a, shared=False)])
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


@pytest.mark.parametrize("make", [VSS, lambda *a, **k: VSS(*a, shared=False, **k)])
def test_the_fused_kernel_named_where_it_cannot_run_says_so(make, monkeypatch):
    monkeypatch.setitem(scan._BACKENDS, "triton", (None, lambda: "there is no such card"))
    with pytest.raises(RuntimeError, match="^backend 'triton' cannot run here: there is no such card"):
        make(8, backend="triton")(torch.randn(1, 6, 8), (2, 3))


def test_a_kept_order_is_one_tensor():
    cpu = torch.device("cpu")
    vss._order_once.cache_clear()
    with torch.inference_mode():
        kept = vss._kept_order(2, 3, "csm", cpu)
    assert kept is vss._kept_order(2, 3, "csm", cpu) and not kept.is_inference()
    assert torch.equal(kept, scan_order(2, 3, "csm")) and torch.equal(VSS(4, "csm").order(torch.empty(1, 6, 4), (2, 3)), kept)


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


@pytest.mark.parametrize("size", [(7, 7), (1, 13), (24, 24), (27, 27), (27, 30)])
@pytest.mark.parametrize("make", [lambda: VSS(8, "csm", d_state=4), lambda: VSS(8, shared=False, d_state=4)],
                         ids=["shared", "own"])
def test_any_grid_in_single_and_half_precision(make, size):
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, size[0] * size[1], 8)
    with torch.no_grad():
        y, half = module(x, size), module.bfloat16()(x.bfloat16(), size)
    assert y.shape == x.shape and y.isfinite().all() and half.dtype == torch.bfloat16 and rms_error(half, y) < 0.03


def test_paths_can_be_added(monkeypatch):
    monkeypatch.setitem(PATHS, "odd first", lambda grid: torch.cat([grid.flatten()[1::2], grid.flatten()[::2]]))
    monkeypatch.setitem(SCANS, "odd", ["odd first"])
    x = torch.randn(1, 6, 4)
    assert torch.equal(VSS(4, "odd", mixer=nn.Identity)(x, (2, 3)), 2 * x)
