"""Attention maps and receptive fields of scans and connectors: against the scans themselves, known Jacobians, autograd."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import lively, rms_error

from vlmamba_lite.connectors.attention_maps import (
    connector_attention,
    connector_maps,
    hidden_attention,
    receptive_field,
    scan_input,
    ssd_attention,
    vss_attention,
)
from vlmamba_lite.connectors.connectors import VSSL2Connector, VSSMLPConnector
from vlmamba_lite.connectors.msc import MVSS, MambaScanConnector
from vlmamba_lite.connectors.vss import VSS, scan_order, vss_inputs
from vlmamba_lite.layers import mamba
from vlmamba_lite.ops.selective_scan import selective_scan
from vlmamba_lite.ops.ssd import ssd_recurrent

few = settings(deadline=None, max_examples=25, derandomize=True, database=None)
SMALL = {"d_state": 3, "headdim": 4, "expand": 1}


def make(kind, **args):
    torch.manual_seed(0)
    return kind(12, 20, **{"d_state": 4, "expand": 1, "dt_rank": 3} | args)


def tokens_of(size, dim=8, batch=2, dtype=torch.float64):
    return torch.randn(batch, size[0] * size[1], dim, generator=torch.Generator().manual_seed(1), dtype=dtype)


# --- receptive fields and hidden attention ---------------------------------------------------------------------------

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
    dt, A = F.linear(dt, mixer.dt_proj.weight, mixer.dt_proj.bias), -torch.exp(mixer.A_log)
    M = torch.autograd.functional.jacobian(
        lambda v: selective_scan(v.T[None], dt.mT, A, B.mT, C.mT, delta_softplus=True)[0].T, u[0])     # (L, D, L, D)
    M = torch.stack([M[:, d, :, d] for d in range(D)]).abs().mean(0)
    out = torch.zeros(L, L, dtype=x.dtype)
    for t in range(L):
        for s in range(L):
            out[path[t], path[s]] = M[t, s]
    return out, torch.zeros(L, dtype=x.dtype).index_copy(0, torch.tensor(path), torch.nn.functional.softplus(dt)[0].mean(-1))


@pytest.mark.parametrize("shared", [True, False])
def test_vss_attention_in_the_order_of_the_picture(shared):
    torch.manual_seed(0)
    module, x = VSS(6, "csm", shared=shared, d_state=3).double(), torch.randn(2, 12, 6, dtype=torch.float64)
    found, inputs = vss_attention(module, x, (3, 4)), vss_inputs(module.mixers, x, scan_order(3, 4, "csm"))[1]
    steps = F.softplus(inputs["delta"] + inputs["delta_bias"][:, None]).unflatten(1, (4, -1)).mean(2)     # (b, K, L), along the paths
    assert found.shape == (2, 4, 12, 12) and not found.requires_grad
    for k, path in enumerate(scan_order(3, 4, "csm").tolist()):
        want, want_steps = listening(module.mixers[0 if shared else k], x[1:], path)
        torch.testing.assert_close(found[1, k], want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(steps[1, k], want_steps[path])
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


# --- Mamba-2 ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ngroups", [1, 2])
def test_attention_is_the_effect_of_each_patch_on_each_other(shared, ngroups):
    torch.manual_seed(0)
    m, size = lively(MVSS(8, "csm", shared=shared, ngroups=ngroups, **SMALL)).double(), (2, 3)
    x = tokens_of(size)
    found = vss_attention(m, x, size)
    assert found.shape == (2, 4, 6, 6) and not found.requires_grad
    order = scan_order(*size, "csm")
    _, inputs = m.inputs(x, order)
    J = torch.autograd.functional.jacobian(lambda u: ssd_recurrent(**inputs | {"x": u, "D": None}), inputs["x"])
    for b in range(2):
        for k, path in enumerate(order.tolist()):
            heads = range(k * m.nheads, (k + 1) * m.nheads)
            M = sum(J[b, :, h, 0, b, :, h, 0].abs() for h in heads) / m.nheads       # (L, L) in the order of the path
            want = torch.zeros(6, 6, dtype=x.dtype)
            for t, i in enumerate(path):
                for s, j in enumerate(path):
                    want[i, j] = M[t, s]
            assert rms_error(found[b, k], want) < 1e-10


@given(L=st.integers(1, 9), groups=st.sampled_from([1, 2]))
@few
def test_ssd_attention_is_ssd(L, groups):
    g = torch.Generator().manual_seed(L)
    x, B, C = (torch.randn(2, L, *shape, generator=g, dtype=torch.float64) for shape in ((4, 3), (groups, 5), (groups, 5)))
    dt, A = torch.rand(2, L, 4, generator=g, dtype=torch.float64), -torch.rand(4, generator=g, dtype=torch.float64)
    M = ssd_attention(dt, A, B, C)
    assert M.shape == (2, 4, L, L) and torch.equal(M, M.tril())
    assert rms_error(torch.einsum("bhts,bshp->bthp", M, x), ssd_recurrent(x, dt, A, B, C)) < 1e-12
    single = ssd_attention(dt.float(), A.float(), B.bfloat16(), C.bfloat16())
    assert single.dtype == torch.float32 and rms_error(single, M) < 0.02


def test_maps_of_the_mamba_scan_connector():
    c, x = MambaScanConnector(8, 12, "csm", blocks=2, **SMALL), tokens_of((2, 3), dtype=torch.float32)
    given_ = scan_input(c, x, (2, 3))
    torch.testing.assert_close(given_, F.rms_norm(x, (8,), eps=1e-5))
    torch.testing.assert_close(connector_attention(c, x, (2, 3)), vss_attention(c.vss, given_, (2, 3)))
    assert c.vss is c.blocks[0].mvss and not c.vss._forward_pre_hooks


# --- connectors ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [VSSMLPConnector, VSSL2Connector])
def test_attention_is_that_of_the_vss_on_its_input(kind):
    connector, tokens = make(kind, scan="csm"), torch.randn(2, 6, 12, requires_grad=True)
    given = tokens if kind is VSSMLPConnector else F.gelu(connector.linear1(tokens))
    found = connector_attention(connector, tokens, (2, 3))
    assert found.shape == (2, 4, 6, 6) and not found.requires_grad and not connector.vss._forward_pre_hooks
    torch.testing.assert_close(found, vss_attention(connector.vss, given, (2, 3)))
    with pytest.raises(ValueError, match="tokens"):
        connector_attention(connector, tokens, (2, 2))
    assert not connector.vss._forward_pre_hooks


@pytest.mark.parametrize("scan, K", [("bsm", 2), ("csm", 4)])
def test_maps_are_attention_and_receptive_fields_of_the_connector_and_of_each_scan(scan, K):
    connector, tokens, at = make(VSSL2Connector, scan=scan), torch.randn(2, 6, 12), (1, 0)
    given = scan_input(connector, tokens, (2, 3))
    torch.testing.assert_close(given, F.gelu(connector.linear1(tokens)))
    maps, attention = connector_maps(connector, tokens, (2, 3), at), vss_attention(connector.vss, given, (2, 3)).sum(1).mean(0)
    wanted = {"attention, all": attention.sum(0), "attention": attention[3], "field": receptive_field(connector, tokens, (2, 3), at)}
    fields = receptive_field(connector.vss.directions, given, (2, 3), at)
    wanted |= {f"scan {k + 1}": fields[k] for k in range(K)}
    assert list(maps) == list(wanted)
    for name, values in wanted.items():
        assert maps[name].shape == (2, 3)
        torch.testing.assert_close(maps[name], values.view(2, 3))


def test_a_scan_may_answer_for_itself():
    connector, tokens = make(VSSL2Connector), torch.randn(1, 6, 12)
    connector.vss.attention = lambda x, size: x.sum() + size[1]
    assert connector_attention(connector, tokens, (2, 3)) == scan_input(connector, tokens, (2, 3)).sum() + 3
