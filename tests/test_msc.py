"""MSC against step-by-step twins, one direction, token and head at a time; closed forms, symmetries, both variants, its cost."""
import copy
import math

from measures import assert_same, rms_error, value_and_gradients
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlmamba_lite.connectors import msc
from vlmamba_lite.connectors.attention_maps import connector_attention, receptive_field
from vlmamba_lite.connectors.connectors import connector_flops
from vlmamba_lite.connectors.connectors import CONNECTORS
from vlmamba_lite.connectors.msc import (MVSS, VARIANTS, MambaScanConnector, MSCBlock, MSCSwiGLU, ReleasedMSCBlock,
                                         along_paths)
from vlmamba_lite.connectors.vss import SCANS, VSS, cross_merge, cross_scan, scan_order
from vlmamba_lite.layers.mamba2 import Mamba2
from vlmamba_lite.ops.ssd import ssd

few = settings(deadline=None, max_examples=15, derandomize=True, database=None)
sizes = st.tuples(st.integers(1, 6), st.integers(1, 6))
SMALL = {"d_state": 3, "headdim": 4, "expand": 1}


def shaken(module):
    "No weight is left at a value that hides it (a norm's or a D's 1, a bias' 0)."
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module.double()


def make(dim=8, scan="bsm", **args):
    torch.manual_seed(0)
    return shaken(MVSS(dim, scan, **SMALL | args))


def tokens(size, dim=8, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, size[0] * size[1], dim, generator=g, dtype=dtype)


def silu(v):
    return v / (1 + torch.exp(-v))


def gelu(v):
    return v * 0.5 * (1 + torch.erf(v / 2 ** 0.5))


def rms(v, weight):
    return weight * v / torch.sqrt((v * v).mean(-1, keepdim=True) + 1e-5)


def layer_norm(v, weight, bias):
    centred = v - v.mean(-1, keepdim=True)
    return weight * centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) + bias


# --- the twin --------------------------------------------------------------------------------------------------------

def walks(scan, height, width):
    "Figure 4's directions, cell by cell."
    rows = [r * width + c for r in range(height) for c in range(width)]
    columns = [r * width + c for c in range(width) for r in range(height)]
    ways = {"bsm": [rows], "csm": [rows, columns]}[scan]
    return ways + [way[::-1] for way in ways]


def one_direction(m, s, path, xBC, dt):
    "Convolution, activation and SSM along one path with weight set s, a token and a head at a time. -> (L, d_inner)"
    p, C, d, GN = dict(m.named_parameters()), m.conv_dim, m.d_inner, m.ngroups * m.d_state
    taps, taps_bias = p["conv1d.weight"][s * C:(s + 1) * C, 0], p["conv1d.bias"][s * C:(s + 1) * C]
    h = [torch.zeros(m.headdim, m.d_state, dtype=xBC.dtype)] * m.nheads
    found = [None] * len(path)
    for t, patch in enumerate(path):
        v = taps_bias
        for back in range(min(t + 1, m.d_conv)):
            v = v + taps[:, m.d_conv - 1 - back] * xBC[path[t - back]]
        v = silu(v)
        u, B, Cm = v[:d].view(m.nheads, -1), v[d:d + GN].view(m.ngroups, -1), v[d + GN:].view(m.ngroups, -1)
        y = []
        for head in range(m.nheads):
            g = head * m.ngroups // m.nheads
            step = torch.log1p(torch.exp(dt[patch, head] + p["dt_bias"][s, head]))
            h[head] = torch.exp(-step * torch.exp(p["A_log"][s, head])) * h[head] + step * torch.outer(u[head], B[g])
            y.append(h[head] @ Cm[g] + p["D"][s, head] * u[head])
        found[patch] = torch.cat(y)
    return torch.stack(found)


def mvss_twin(m, x, height, width):
    p, out = dict(m.named_parameters()), []
    ways = walks(m.scan, height, width)
    for picture in x:
        together = picture @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
        z, xBC, dt = together[:, :m.d_inner], together[:, m.d_inner:-m.nheads], together[:, -m.nheads:]
        total = 0
        for k, path in enumerate(ways):
            y = one_direction(m, 0 if m.shared else k, path, xBC, dt) * silu(z)
            if "norm.weight" in p:
                parts = zip(y.chunk(m.ngroups, -1), p["norm.weight"].chunk(m.ngroups))
                y = torch.cat([rms(part, weight) for part, weight in parts], -1)
            total = total + y
        total = total / len(ways) if m.merge == "mean" else total
        out.append(total @ p["out_proj.weight"].T + p.get("out_proj.bias", 0))
    return torch.stack(out)


@pytest.mark.parametrize("options", [{}, {"inner_norm": True, "merge": "mean"}, {"ngroups": 2, "inner_norm": True, "bias": True},
                                     {"merge": "mean", "d_conv": 2, "chunk_size": 5}], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scan", ["bsm", "csm"])
def test_mvss_is_its_definition_one_step_at_a_time(scan, shared, options):
    m, size = make(scan=scan, shared=shared, **options), (3, 4)
    want = value_and_gradients(lambda x: mvss_twin(m, x, *size), tokens(size), *m.parameters())
    assert_same(value_and_gradients(lambda x: m(x, size), tokens(size), *m.parameters()), want)
    assert all(g.norm() > 0 for g in want)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (2, 7)])
def test_odd_grids(size):
    for scan in ("bsm", "csm"):
        m = make(scan=scan, chunk_size=4)
        assert rms_error(m(tokens(size), size), mvss_twin(m, tokens(size), *size)) < 1e-10


@given(size=sizes, kind=st.sampled_from(sorted(SCANS)))
@few
def test_along_paths_is_the_cross_scan_with_directions_beside_channels(size, kind):
    order, x = scan_order(*size, kind), tokens(size, 3)
    found = along_paths(x, order)
    assert torch.equal(found, cross_scan(x, order).transpose(1, 2))
    assert torch.equal(cross_merge(found.transpose(1, 2), order), len(order) * x)


@pytest.mark.parametrize("scan", ["bsm", "csm"])
def test_shared_with_the_norm_it_is_vss_on_mamba2(scan):
    torch.manual_seed(0)
    args = {"d_state": 3, "headdim": 4, "ngroups": 2, "bias": True}
    vss, m = shaken(VSS(8, scan, mixer=Mamba2, **args)), MVSS(8, scan, shared=True, inner_norm=True, **args).double()
    layer, K = vss.mixers[0].state_dict(), 2 * len(SCANS[scan])
    m.load_state_dict({n: p.view(m.state_dict()[n].shape) for n, p in layer.items()})
    with torch.no_grad():
        m.out_proj.bias *= K                                 # VSS adds the bias of its layer once for each direction
    x = tokens((3, 5))
    assert_same(value_and_gradients(lambda x: m(x, (3, 5)), x), value_and_gradients(lambda x: vss(x, (3, 5)), x))


@pytest.mark.parametrize("shared", [True, False])
def test_all_directions_go_through_one_scan(shared, monkeypatch):
    calls = []
    monkeypatch.setattr(msc, "ssd", lambda *a, **k: calls.append(k["x"].shape) or ssd(*a, **k))
    m = make(scan="csm", shared=shared)
    m(tokens((2, 3)), (2, 3))
    assert calls == [(2, 6, 4 * m.nheads, m.headdim)]


# --- closed forms and symmetries -------------------------------------------------------------------------------------

def identity_scan(m):
    "B and C zero, so that SSD gives D u = u; convolutions that pass the token itself."
    with torch.no_grad():
        m.in_proj.weight[2 * m.d_inner:m.d_inner + m.conv_dim] = 0
        m.conv1d.weight.zero_()[..., -1] = 1
        m.conv1d.bias.zero_()
        m.D.fill_(1)
    return m


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize("scan", ["bsm", "csm"])
def test_with_an_identity_scan_it_has_a_closed_form(scan, merge):
    m, x = identity_scan(make(scan=scan, merge=merge)), tokens((3, 5))
    K = 2 * len(SCANS[scan]) if merge == "sum" else 1
    z, u = (x @ m.in_proj.weight.T)[..., :2 * m.d_inner].chunk(2, -1)
    want = (K * silu(u) * silu(z)) @ m.out_proj.weight.T
    assert rms_error(m(x, (3, 5)), want) < 1e-12


class Merge(nn.Module):
    "A 2-D scan whose mixer is the identity."
    def __init__(self, scan):
        super().__init__()
        self.scan = scan

    def forward(self, x, size):
        order = scan_order(*size, self.scan)
        return cross_merge(cross_scan(x, order), order)


@pytest.mark.parametrize("scan, K", [("bsm", 2), ("csm", 4)])
def test_connectors_with_an_identity_scan_have_closed_forms(scan, K):
    torch.manual_seed(0)
    x, size = tokens((3, 5)), (3, 5)
    basic, advanced = (shaken(MambaScanConnector(8, 12, scan, form, **SMALL)) for form in ("basic", "advanced"))
    for c in (basic, advanced):
        c.blocks[0].mvss = Merge(scan)
    v = x + K * rms(x, basic.blocks[0].norm.weight)
    assert rms_error(basic(x, size), basic.mlp(v)) < 1e-12
    block = advanced.blocks[0]
    assert rms_error(advanced(x, size), advanced.mlp(swiglu(block.swiglu, x + K * rms(x, block.norm.weight)))) < 1e-12
    released = shaken(MambaScanConnector(8, 12, scan, variant="released", blocks=1, **SMALL))
    block = released.blocks[0]
    block.mvss = Merge(scan)
    v = (1 + K) * released.stem(x)
    v = v + swiglu(block.swiglu, F.layer_norm(v, (12,), block.norm.weight, block.norm.bias))
    assert rms_error(released(x, size), released.mlp(released.norm(v))) < 1e-12


def turned(x, size):
    return x.view(len(x), *size, -1).flip(1, 2).flatten(1, 2)


def transposed(x, size):
    return x.view(len(x), *size, -1).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("build", [lambda scan, shared: make(scan=scan, shared=shared),
                                   lambda scan, shared: shaken(MambaScanConnector(8, 12, scan, shared=shared, blocks=2, **SMALL)),
                                   lambda scan, shared: shaken(MambaScanConnector(8, 12, scan, shared=shared, variant="released", **SMALL))],
                         ids=["mvss", "paper", "released"])
def test_symmetries(build):
    torch.manual_seed(0)
    x, size, change = tokens((3, 5)), (3, 5), {}
    for scan in ("bsm", "csm"):
        for shared in (True, False):
            m = build(scan, shared)
            change["turn", scan, shared] = rms_error(m(turned(x, size), size), turned(m(x, size), size))
            change["transpose", scan, shared] = rms_error(m(transposed(x, size), (5, 3)), transposed(m(x, size), size))
    equal = {("turn", "bsm", True), ("turn", "csm", True), ("transpose", "csm", True)}
    assert {name for name, error in change.items() if error < 1e-10} == equal
    assert min(error for name, error in change.items() if name not in equal) > 1e-4, change


def permuted(m, to):
    "The directions' own weights in another order."
    other = copy.deepcopy(m)
    with torch.no_grad():
        for name in ("dt_bias", "A_log", "D"):
            getattr(other, name).copy_(getattr(m, name)[to])
        for p, q in zip(other.conv1d.parameters(), m.conv1d.parameters()):
            p.copy_(q.unflatten(0, (m.sets, -1))[to].flatten(0, 1))
    return other


def test_own_weights_move_with_the_directions():
    x, size = tokens((3, 5)), (3, 5)
    for scan, to in (("bsm", [1, 0]), ("csm", [2, 3, 0, 1])):
        m = make(scan=scan)
        assert rms_error(permuted(m, to)(turned(x, size), size), turned(m(x, size), size)) < 1e-10
    m = make(scan="csm")
    assert rms_error(permuted(m, [1, 0, 3, 2])(transposed(x, size), (5, 3)), transposed(m(x, size), size)) < 1e-10


# --- connectors ------------------------------------------------------------------------------------------------------

def swiglu(m, x):
    p = dict(m.named_parameters())
    first, second = (x @ p[f"{n}.weight"].T + p[f"{n}.bias"] for n in ("w1", "w2"))
    return (silu(first) * second) @ p["w3.weight"].T + p["w3.bias"]


def three_layers(mlp, x):
    for i in (0, 2):
        x = gelu(x @ mlp[i].weight.T + mlp[i].bias)
    return x @ mlp[4].weight.T + mlp[4].bias


def paper_twin(c, x, size):
    "Equations 6 to 8 and Figure 4."
    for block in c.blocks:
        x = x + mvss_twin(block.mvss, rms(x, block.norm.weight), *size)
        x = swiglu(block.swiglu, x) if c.form == "advanced" else x
    return three_layers(c.mlp, x)


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("form", ["basic", "advanced"])
@pytest.mark.parametrize("scan", ["bsm", "csm"])
def test_the_papers_connector(scan, form, blocks):
    torch.manual_seed(0)
    c, size = shaken(MambaScanConnector(8, 12, scan, form, blocks=blocks, **SMALL)), (2, 3)
    want = value_and_gradients(lambda x: paper_twin(c, x, size), tokens(size), *c.parameters())
    assert_same(value_and_gradients(lambda x: c(x, size), tokens(size), *c.parameters()), want)


def released_mixer(m, u):
    """The authors' bidirectional Mamba-2, in its own terms: the sequence and the sequence reversed, one in_proj, a convolution, dt_bias,
    A_log and D for each, one gated RMSNorm weight inside both, their mean, one out_proj."""
    L, d, N, H = u.shape[1], m.d_inner, m.d_state, m.nheads
    zxbcdt = u @ m.in_proj.weight.T
    ys = []
    for way in range(2):
        seq = zxbcdt.flip(1) if way else zxbcdt
        z, xBC, dt = seq.split([d, d + 2 * N, H], -1)
        taps, tap_bias = (p.chunk(2)[way] for p in (m.conv1d.weight, m.conv1d.bias))
        xBC = silu(F.conv1d(xBC.mT, taps, tap_bias, padding=m.d_conv - 1, groups=d + 2 * N)[..., :L].mT)
        x, B, C = xBC.split([d, N, N], -1)
        x, dt, A = x.unflatten(-1, (H, -1)), F.softplus(dt + m.dt_bias[way]), -torch.exp(m.A_log[way])
        h, out = 0, []
        for t in range(L):
            h = torch.exp(dt[:, t] * A)[..., None, None] * h + torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
            out.append(torch.einsum("bhpn,bn->bhp", h, C[:, t]) + m.D[way][:, None] * x[:, t])
        y = rms(torch.stack(out, 1).flatten(2) * silu(z), m.norm.weight)
        ys.append(y.flip(1) if way else y)
    return ((ys[0] + ys[1]) / 2) @ m.out_proj.weight.T


def released_twin(c, x):
    h = gelu(x @ c.stem[0].weight.T + c.stem[0].bias)
    for block in c.blocks:
        h = h + released_mixer(block.mvss, h)                # no norm before it
        h = h + swiglu(block.swiglu, layer_norm(h, block.norm.weight, block.norm.bias))
    return three_layers(c.mlp, layer_norm(h, c.norm.weight, c.norm.bias))


@pytest.mark.parametrize("size", [(3, 4), (1, 1), (2, 7)])
def test_the_released_connector(size):
    torch.manual_seed(0)
    c = shaken(MambaScanConnector(8, 12, variant="released", d_state=3, headdim=4, chunk_size=5))
    assert len(c.blocks) == 2
    want = value_and_gradients(lambda x: released_twin(c, x), tokens(size), *c.parameters())
    assert_same(value_and_gradients(lambda x: c(x, size), tokens(size), *c.parameters()), want)


def test_advanced_is_basic_and_swiglu():
    torch.manual_seed(0)
    basic, advanced = (MambaScanConnector(8, 12, form=form, **SMALL) for form in ("basic", "advanced"))
    missing = advanced.load_state_dict(basic.state_dict(), strict=False)
    assert not missing.unexpected_keys and {n.split(".")[2] for n in missing.missing_keys} == {"swiglu"}
    x, size = tokens((3, 4), dtype=torch.float32), (3, 4)
    scanned = basic.blocks[0](x, size)
    torch.testing.assert_close(advanced(x, size), advanced.mlp(advanced.blocks[0].swiglu(scanned)))
    advanced.blocks[0].swiglu = nn.Identity()
    torch.testing.assert_close(advanced(x, size), basic(x, size))


def test_no_blocks_is_the_mlp():
    c, x = MambaScanConnector(8, 12, blocks=0), tokens((2, 3), dtype=torch.float32)
    torch.testing.assert_close(c(x, (2, 3)), c.mlp(x))
    assert set(c.state_dict()) == {f"mlp.{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")} and not hasattr(c, "vss")


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (9, 5), (1, 13), (24, 24), (27, 27), (27, 30)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_grid(variant, size):
    y = MambaScanConnector(8, 12, "csm", variant=variant, **SMALL)(tokens(size, batch=1, dtype=torch.float32), size)
    assert y.shape == (1, size[0] * size[1], 12) and y.isfinite().all()


@pytest.mark.parametrize("kind", [{"form": "basic"}, {"scan": "csm"}, {"variant": "released"}, {"shared": True, "blocks": 2}], ids=str)
def test_bfloat16_autocast_and_inference_mode(kind):
    torch.manual_seed(0)
    c, x, size = MambaScanConnector(16, 12, **SMALL | kind), tokens((5, 7), 16, dtype=torch.float32), (5, 7)
    want = value_and_gradients(lambda x: c(x, size), x, *c.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(value_and_gradients(lambda x: c(x, size).float(), x, *c.parameters()), want, 0.1)
    with torch.inference_mode():
        torch.testing.assert_close(c(x, size), want[0])
        assert rms_error(c.double()(x.double(), size), want[0]) < 1e-5
        half = c.bfloat16()(x.bfloat16(), size)
    assert half.dtype == torch.bfloat16 and rms_error(half, want[0]) < 0.03


def test_rows_of_a_batch_do_not_meet():
    c, x = MambaScanConnector(8, 12, "csm", **SMALL), tokens((3, 4), batch=3, dtype=torch.float32)
    torch.testing.assert_close(c(x, (3, 4))[1:2], c(x[1:2], (3, 4)))


def test_options_reach_their_parts():
    c = MambaScanConnector(8, 12, "csm", blocks=3, norm="layernorm", merge="mean", inner_norm=True, shared=True, swiglu_dim=5, hidden_dim=7,
                           activation="relu", d_state=3, d_conv=2, expand=3, headdim=6, ngroups=2, chunk_size=4, dt_limit=(0.01, 0.1),
                           backend="recurrent", bias=True, conv_bias=False)
    m = c.blocks[2].mvss
    assert len(c.blocks) == 3 and isinstance(c.blocks[1].norm, nn.LayerNorm) and m.norm.groups == 2
    assert (m.scan, m.merge, m.shared, m.d_state, m.d_conv, m.d_inner, m.headdim, m.nheads) == ("csm", "mean", True, 3, 2, 24, 6, 4)
    assert (m.chunk_size, m.dt_limit, m.backend, m.conv1d.bias) == (4, (0.01, 0.1), "recurrent", None) and m.in_proj.bias is not None
    assert [layer.out_features for layer in c.mlp[::2]] == [7, 12, 12] and isinstance(c.mlp[1], nn.ReLU)
    assert c.blocks[0].swiglu.w1.out_features == 5
    assert c(tokens((2, 3), dtype=torch.float32), (2, 3)).shape == (2, 6, 12)


def test_backends_agree_and_limits_matter():
    x, size = tokens((3, 4)), (3, 4)
    want = make(scan="csm")(x, size)
    for backend in ("auto", "recurrent", "quadratic", "chunked"):
        assert rms_error(make(scan="csm", backend=backend)(x, size), want) < 1e-10
    assert rms_error(make(scan="csm", conv_backend="shifted_sums")(x, size), want) < 1e-12
    for name in ("backend", "conv_backend"):
        with pytest.raises(ValueError, match=f"^{name}: got 'no such form', need 'auto' or one of"):
            make(**{name: "no such form"})(x, size)
    for chunk_size in (1, 5, 12, 100):
        assert rms_error(make(scan="csm", chunk_size=chunk_size)(x, size), want) < 1e-10
    assert rms_error(make(scan="csm", dt_limit=(0., 1e-3))(x, size), want) > 1e-2


def test_parameters_and_their_first_values():
    shapes = {n: tuple(p.shape) for n, p in MVSS(8, "csm", d_state=3, headdim=4).named_parameters()}
    assert shapes == {"in_proj.weight": (16 + 22 + 4, 8), "conv1d.weight": (88, 1, 4), "conv1d.bias": (88,), "dt_bias": (4, 4),
                      "A_log": (4, 4), "D": (4, 4), "out_proj.weight": (8, 16)}
    assert set(MVSS(8, inner_norm=True, bias=True).state_dict()) - set(shapes) == {"norm.weight", "in_proj.bias", "out_proj.bias"}
    m = MVSS(64, "csm", headdim=1)
    dt = F.softplus(m.dt_bias)
    assert (m.D == 1).all() and 0.9 < dt.min() / 1e-3 and dt.max() < 0.11 and dt.unique().numel() == 4 * 128
    assert 1 <= m.A_log.exp().min() and m.A_log.exp().max() <= 16 and m.A_log.unique().numel() > 500
    assert all(p._no_weight_decay for p in (m.dt_bias, m.A_log, m.D))
    assert [MVSS(dim, shared=True).headdim for dim in (64, 16, 2176, 12, 48)] == [64, 32, 64, 8, 32]


def test_first_values_of_the_released_mlp():
    torch.manual_seed(0)
    c = MambaScanConnector(64, 96, variant="released", d_state=4)
    for layer in c.mlp[::2]:
        want = math.sqrt(2 / (layer.in_features + layer.out_features))
        assert (layer.bias == 0).all() and abs(layer.weight.std() / want - 1) < 0.05
    assert (c.stem[0].bias != 0).any()


def test_paper_size():
    def mvss(d, K, norm=0):
        e = 2 * d
        H, C = e // 64, e + 256
        return d * (e + C + H) + K * (5 * C + 3 * H) + norm * e + e * d
    def mlp(d, hidden, out): return (d + 1) * hidden + (hidden + 1) * out + (out + 1) * out
    d, out = 2176, 2560
    square = 3 * (d + 1) * d
    wanted = {"mlp": mlp(d, 4 * d, out), "basic": mlp(d, 4 * d, out) + d + mvss(d, 2), "csm": mlp(d, 4 * d, out) + d + mvss(d, 4) + square,
              "released": (d + 1) * out + 2 * (mvss(out, 2, 1) + 2 * out + 3 * (out + 1) * out) + 2 * out + mlp(out, 4 * out, out)}
    with torch.device("meta"):
        built = {"mlp": {"blocks": 0}, "basic": {"form": "basic"}, "csm": {"scan": "csm"}, "released": {"variant": "released"}}
        found = {n: sum(p.numel() for p in MambaScanConnector(d, out, **args).parameters()) for n, args in built.items()}
    assert found == wanted and round(found["released"] / 1e6) == 184


@pytest.mark.parametrize("chunk_size", [4, 6, 100])
@pytest.mark.parametrize("kind", [{}, {"scan": "csm", "ngroups": 2}, {"form": "basic", "shared": True}, {"variant": "released"}, {"blocks": 0}], ids=str)
def test_flops_are_those_pytorch_counts(kind, chunk_size):
    c = MambaScanConnector(8, 12, **SMALL | {"chunk_size": chunk_size} | kind)
    ours = connector_flops(c, (3, 5))
    with FlopCounterMode(display=False) as counter:
        c(tokens((3, 5), batch=1, dtype=torch.float32), (3, 5))
    assert sum(ours.values()) - ours.get("convolution", 0) == counter.get_total_flops()


def test_flops_by_hand():
    m = MVSS(8, "csm", d_state=3, headdim=4, chunk_size=6)   # 10 tokens: two chunks of 5
    assert m.flops((2, 5)) == {"projections": 2 * 10 * 8 * (16 + 22 + 4 + 16), "convolution": 4 * 10 * 22 * 2 * 4,
                                 "scan": 4 * 10 * (2 * 5 * 3 + 2 * 5 * 16 + 2 * 16 * 3 + 2 * 16 * 3)}


@pytest.mark.parametrize("kind", [{"form": "basic"}, {"scan": "csm", "blocks": 2}, {"variant": "released"}], ids=str)
def test_a_connector_learns(kind):
    torch.manual_seed(0)
    c, x = MambaScanConnector(8, 12, **SMALL | kind), tokens((3, 4), batch=4, dtype=torch.float32)
    target, losses = torch.randn(4, 12, 12), []
    optimizer = torch.optim.AdamW(c.parameters(), 1e-2)
    for _ in range(60):
        loss = F.mse_loss(c(x, (3, 4)), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in c.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_errors_name_the_argument():
    x = torch.randn(1, 6, 8)
    for match, call in {
        r"^scan: got 'spiral', need one of \['bsm',": lambda: MVSS(8, "spiral"),
        r"^merge: got 'max', need one of \['mean', 'sum'\]$": lambda: MVSS(8, merge="max"),
        r"^headdim: got 5, need a divisor of d_inner = 16$": lambda: MVSS(8, headdim=5),
        r"^ngroups: got 3, need a divisor of nheads = 4$": lambda: MVSS(8, headdim=4, ngroups=3),
        r"^variant: got 'official', need one of \['paper', 'released'\]$": lambda: MambaScanConnector(8, 12, variant="official"),
        r"^form: got 'large', need one of": lambda: MambaScanConnector(8, 12, form="large"),
        r"^form: got 'basic', need 'advanced' with variant='released'$": lambda: MambaScanConnector(8, 12, form="basic", variant="released"),
        r"^norm: got 'batch'": lambda: MambaScanConnector(8, 12, norm="batch"),
        r"^activation: got 'tanh'": lambda: MambaScanConnector(8, 12, activation="tanh"),
        r"^x: got shape \(1, 6, 8\), need \(batch, 2 \* 2, 8\)": lambda: MVSS(8)(x, (2, 2)),
        r"^tokens: got shape \(1, 6, 8\), need \(batch, 2 \* 4, 8\)": lambda: MambaScanConnector(8, 12)(x, (2, 4)),
        r"^tokens: got shape \(1, 6, 8\), need \(batch, 2 \* 3, 9\)": lambda: MambaScanConnector(9, 12)(x, (2, 3)),
    }.items():
        with pytest.raises(ValueError, match=match) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_copy_through_its_state_dict_is_the_same_connector():
    c = MambaScanConnector(8, 12, "csm", **SMALL)
    other = copy.deepcopy(c)
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(c.state_dict())
    x = tokens((2, 3), dtype=torch.float32)
    assert torch.equal(c(x, (2, 3)), other(x, (2, 3)))


# --- what it sees ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"merge": "mean", "inner_norm": True, "bias": True, "shared": True}], ids=str)
def test_directions_sum_to_the_output_and_see_what_lies_before(options):
    m, x, size = make(scan="csm", **options), tokens((3, 5)), (3, 5)
    parts = m.directions(x, size)
    assert parts.shape == (2, 4, 15, 8) and rms_error(parts.sum(1), m(x, size)) < 1e-12
    maps = receptive_field(m.directions, x, size, (1, 2))
    for seen, path in zip(maps, walks("csm", 3, 5)):
        assert (seen.flatten() > 0).nonzero().flatten().tolist() == sorted(path[:path.index(7) + 1])


@pytest.mark.parametrize("kind", [{"scan": "csm", "shared": True}, {"variant": "released"}], ids=str)
def test_nothing_is_made_on_another_device(kind, monkeypatch):
    monkeypatch.setattr(msc, "ssd", lambda x, **_: x)         # which has no autocast to switch off on "meta"
    with torch.device("meta"):
        c, x = MambaScanConnector(8, 12, **SMALL | kind), torch.empty(2, 6, 8)
    assert c(x, (2, 3)).device == connector_attention(c, x, (2, 3)).device == c.vss.directions(c.stem(x), (2, 3)).device == x.device


def test_blocks_are_what_they_say():
    torch.manual_seed(0)
    x, size = tokens((2, 3), dtype=torch.float32), (2, 3)
    block, old = MSCBlock(8, **SMALL), ReleasedMSCBlock(8, **SMALL)
    torch.testing.assert_close(block(x, size), block.swiglu(x + block.mvss(block.norm(x), size)))
    h = x + old.mvss(x, size)
    torch.testing.assert_close(old(x, size), h + old.swiglu(old.norm(h)))
    layer = MSCSwiGLU(8, 5)
    torch.testing.assert_close(layer(x), layer.w3(F.silu(layer.w1(x)) * layer.w2(x)))
    assert [n for n, _ in layer.named_parameters()] == ["w1.weight", "w1.bias", "w2.weight", "w2.bias", "w3.weight", "w3.bias"]


def test_the_registry_knows_both_forms():
    assert [CONNECTORS[f"msc_{form}"](8, 12, **SMALL).form for form in ("basic", "advanced")] == ["basic", "advanced"]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_mamba3_in_its_place(variant):
    "The connector with Mamba-3 by its equations, each direction a layer on flipped tokens; values and gradients."
    torch.manual_seed(0)
    connector = shaken(MambaScanConnector(8, 12, variant=variant, mixer="mamba3", d_state=4, headdim=4, expand=1))
    x, size, released = tokens((3, 4)), (3, 4), variant == "released"

    def by_hand(x):
        x = connector.stem(x)
        for block in connector.blocks:
            layer, = block.mvss.mixers
            assert hasattr(layer, "norm") == released
            y = x if released else block.norm(x)
            y = layer(y) + layer(y.flip(1)).flip(1)
            x = x + (y / 2 if released else y)
            x = x + block.swiglu(block.norm(x)) if released else block.swiglu(x)
        return connector.mlp(connector.norm(x))
    parameters = list(connector.parameters())
    assert_same(value_and_gradients(lambda x: connector(x, size), x, *parameters), value_and_gradients(by_hand, x, *parameters))
    assert receptive_field(connector.vss.directions, torch.randn(1, 12, 12 if released else 8).double(), size, (0, 0)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="vss: got a mixer Mamba3, need Mamba, or MVSS"):
        connector_attention(connector, x, size)
    with pytest.raises(ValueError, match=r"mixer: got 'mamba', need one of \['mamba2', 'mamba3'\]"):
        MambaScanConnector(8, 12, mixer="mamba")
