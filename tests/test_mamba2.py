"""Chapter 06: the gated norm, how a Mamba-2 block starts, and the block against transformers'; what all blocks share is in test_blocks.py."""
import math

import pytest
import torch
import torch.nn.functional as F
from block_cases import KINDS, assert_peers, gated_norm
from measures import rms_error
from torch import nn
from torch.testing import assert_close

from vlmamba_lite.layers.mamba2 import GatedRMSNorm, Mamba2


# --- the gated norm ---

@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("before", [False, True])
def test_gated_norm(groups, before):
    norm = GatedRMSNorm(12, groups, before).double()
    norm.weight.data.normal_()
    y, z = torch.randn(2, 3, 5, 12).double().requires_grad_()
    assert_close(norm(y, z), gated_norm(y, z, norm.weight, groups, before))
    assert torch.autograd.gradcheck(norm, (y[0], z[0]))
    half = norm.bfloat16()(y.bfloat16() * 1e3, z.bfloat16())
    assert half.dtype == torch.bfloat16
    want = gated_norm(y.bfloat16().double() * 1e3, z.bfloat16().double(), norm.weight.double(), groups, before)
    assert rms_error(half, want) < 5e-3


def test_norm_orders_and_groups_differ():
    y, z = torch.randn(2, 4, 12)
    a, b, c = GatedRMSNorm(12)(y, z), GatedRMSNorm(12, norm_before_gate=True)(y, z), GatedRMSNorm(12, 3)(y, z)
    assert min(rms_error(a, b), rms_error(a, c)) > 0.05
    with pytest.raises(ValueError, match="^groups: got 5, need a divisor of dim = 12"):
        GatedRMSNorm(12, 5)


# --- how it starts ---

def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    block = Mamba2(1024, headdim=1)                                          # 2048 heads
    A, dt = block.A_log.exp(), F.softplus(block.dt_bias)
    assert 1 <= A.min() < 1.1 and 15.9 < A.max() <= 16
    assert_close(A.mean(), torch.tensor(8.5), atol=0.3, rtol=0)              # uniform in A, not in its logarithm
    assert 0.00099 < dt.min() < 0.00105 and 0.095 < dt.max() < 0.1001
    assert_close(dt.log().mean(), torch.tensor(math.log(0.01)), atol=0.1, rtol=0)
    assert torch.equal(block.D, torch.ones(2048)) and torch.equal(block.norm.weight, torch.ones(2048))
    assert (block.norm.norm_before_gate, block.norm.eps) == (False, 1e-5)
    default = Mamba2(128)
    assert (default.d_state, default.headdim, default.ngroups, default.d_conv, default.d_inner, default.chunk_size) == (128, 64, 1, 4, 256, 256)


def test_names_and_shapes_are_the_official_ones():
    got = {name: tuple(p.shape) for name, p in Mamba2(32, d_state=16, d_conv=3, headdim=8, ngroups=2, bias=True).state_dict().items()}
    assert got == {"dt_bias": (8,), "A_log": (8,), "D": (8,), "in_proj.weight": (64 + 128 + 8, 32), "in_proj.bias": (200,),
                   "conv1d.weight": (128, 1, 3), "conv1d.bias": (128,), "norm.weight": (64,), "out_proj.weight": (32, 64),
                   "out_proj.bias": (32,)}
    assert {"in_proj.bias", "out_proj.bias"}.isdisjoint(Mamba2(32).state_dict())
    assert "conv1d.bias" not in Mamba2(32, conv_bias=False).state_dict()


# --- a peer ---

class NormOverGroups(nn.Module):
    "For a transformers whose gated norm takes one mean over all groups: the official norm, in its place."

    def __init__(self, weight, groups):
        super().__init__()
        self.weight, self.groups, self.variance_epsilon = weight, groups, 1e-5

    def forward(self, y, gate=None):
        return gated_norm(y, gate, self.weight, self.groups, False)


# At least two heads a group: the norm does not feel the scale of a group, so with one head and one token the gradients of D and
# dt_bias cancel to nearly nothing, and a relative error of them says nothing about either side.
@pytest.mark.parametrize("d_model, d_state, headdim, ngroups, expand, d_conv, conv_bias", [
    (64, 128, 64, 1, 2, 4, True), (64, 64, 32, 1, 1, 4, False), (64, 16, 32, 2, 2, 3, True), (128, 8, 32, 4, 2, 2, True),
    (128, 32, 64, 2, 2, 4, False)])
def test_transformers_peer(d_model, d_state, headdim, ngroups, expand, d_conv, conv_bias):
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = pytest.importorskip("transformers").Mamba2Config
    ours = KINDS["mamba2"].random(d_model, d_state=d_state, headdim=headdim, ngroups=ngroups, expand=expand, d_conv=d_conv,
                                  conv_bias=conv_bias, chunk_size=16)
    theirs = modeling.Mamba2Mixer(config(
        hidden_size=d_model, state_size=d_state, head_dim=headdim, num_heads=ours.nheads, n_groups=ngroups, expand=expand, conv_kernel=d_conv,
        use_conv_bias=conv_bias, use_bias=False, chunk_size=16, num_hidden_layers=1, layer_norm_epsilon=1e-5), 0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if ngroups > 1 and not hasattr(theirs.norm, "group_size"):
        theirs.norm = NormOverGroups(theirs.norm.weight, ngroups)
    assert_peers(ours, theirs, d_model)


@pytest.mark.parametrize("options, message", [
    ({"headdim": 48}, "^headdim: got 48, need a divisor of d_inner = 64"), ({"ngroups": 3}, "^ngroups: got 3, need a divisor of nheads = 8"),
    ({"ngroups": 0}, "^ngroups: got 0")])
def test_sizes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(32, **{"headdim": 8} | options)
