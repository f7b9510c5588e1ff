"""The blocks of chapters 05 and 06 side by side: random ones, their equations written out once more, and the ways to feed them."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measures import gradients, rms_error

from vlmamba_lite.layers.mamba import Mamba, MambaState
from vlmamba_lite.layers.mamba2 import Mamba2, Mamba2State
from vlmamba_lite.ops.reference import selective_scan_reference
from vlmamba_lite.ops.ssd import ssd_recurrent


def mamba_by_the_book(p, x, state=None):
    "The Mamba block in the paper's words, from any state."
    L = x.shape[1]
    window, h = state or p.empty_state(x.shape[0])
    u, z = p.in_proj(x).mT.chunk(2, 1)
    seen = torch.cat([window, u], 2)
    u = F.silu(F.conv1d(seen, p.conv1d.weight, p.conv1d.bias, groups=p.d_inner)[..., -L:])
    code, B, C = p.x_proj(u.mT).mT.split([p.dt_rank, p.d_state, p.d_state], 1)
    delta = F.softplus(p.dt_proj(code.mT) + p.dt_proj.bias).mT
    y, h = selective_scan_reference(u, delta, -torch.exp(p.A_log), B, C, p.D, z, initial_state=h, return_last_state=True)
    return p.out_proj(y.mT), MambaState(seen[..., -p.d_conv:], h)


def gated_norm(y, z, weight, groups, before):
    "The gated norm of Mamba-2, one group at a time."
    gate = z * torch.sigmoid(z)
    parts = (y if before else y * gate).chunk(groups, -1)
    out = torch.cat([p / (p.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() for p in parts], -1) * weight
    return out * gate if before else out


def mamba2_by_the_book(p, x, state=None):
    "The Mamba-2 block in the paper's words, from any state."
    b, L, _ = x.shape
    D, GN, G = p.d_inner, p.ngroups * p.d_state, p.ngroups
    window, h = state or p.empty_state(b)
    z, xBC, dt = p.in_proj(x).split([D, D + 2 * GN, p.nheads], -1)
    seen = torch.cat([window, xBC.mT], 2)
    xBC = F.silu(F.conv1d(seen, p.conv1d.weight, p.conv1d.bias, groups=D + 2 * GN)[..., -L:]).mT
    u, B, C = (i.reshape(b, L, n, -1) for i, n in zip(xBC.split([D, GN, GN], -1), (p.nheads, G, G)))
    dt = F.softplus(dt + p.dt_bias).clamp(*p.dt_limit)
    y, h = ssd_recurrent(u, dt, -torch.exp(p.A_log), B, C, D=p.D, initial_states=h, return_final_states=True)
    y = gated_norm(y.flatten(2), z, p.norm.weight, G, p.norm.norm_before_gate)
    return p.out_proj(y), Mamba2State(seen[..., -p.d_conv:], h)


def mamba_step_of(block, bias):
    "Every token takes a step of softplus(bias)."
    block.dt_proj.weight.zero_()
    block.dt_proj.bias.fill_(bias)


def mamba2_step_of(block, bias):
    "Every token takes a step of softplus(bias)."
    block.in_proj.weight[-block.nheads:] = 0
    block.dt_bias.fill_(bias)


@dataclass(frozen=True)
class Kind:
    "A block, and what its tests need to know of it."
    block: type
    state: type
    width: int                  # of the random blocks
    small: dict                 # their options, unless a test names others
    by_the_book: object
    step_of: object
    undecayed: tuple            # parameters marked `_no_weight_decay`
    configs: tuple              # options that change what is computed
    padded: tuple               # options to pad with
    halved: dict                # options to run in bfloat16 with
    tiny: dict                  # options for finite differences, of width 3

    def random(self, width=None, seed=0, **options):
        "A block none of whose parameters has its tidy first value."
        torch.manual_seed(seed)
        block = self.block(width or self.width, **self.small | options)
        with torch.no_grad():
            for p in block.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return block

    def random_state(self, block, batch, requires_grad=False):
        return self.state(*(torch.randn_like(s).requires_grad_(requires_grad) for s in block.empty_state(batch)))


KINDS = {
    "mamba": Kind(
        Mamba, MambaState, 18, {}, mamba_by_the_book, mamba_step_of, ("A_log", "D"),
        configs=({}, {"d_state": 8, "expand": 1}, {"d_conv": 2, "conv_bias": False}, {"d_conv": 3, "bias": True, "dt_rank": 3},
                 {"d_state": 64, "dt_rank": 7}, {"d_state": 1, "d_conv": 1}),
        padded=({"bias": True},), halved={}, tiny={"d_state": 2, "d_conv": 3, "expand": 1, "dt_rank": 1}),
    "mamba2": Kind(
        Mamba2, Mamba2State, 32, {"d_state": 6, "headdim": 8}, mamba2_by_the_book, mamba2_step_of, ("A_log", "D", "dt_bias"),
        configs=({}, {"d_state": 8, "expand": 1}, {"ngroups": 2, "d_conv": 2, "conv_bias": False}, {"ngroups": 4, "d_conv": 3, "bias": True},
                 {"ngroups": 2, "norm_before_gate": True, "chunk_size": 7}, {"dt_limit": (0.02, 0.3), "headdim": 16}, {"d_conv": 1, "headdim": 32}),
        padded=tuple({"ngroups": 2, "bias": True, "dt_limit": limit, "chunk_size": 4} for limit in ((0., math.inf), (0.05, 0.5))),
        halved={"ngroups": 2}, tiny={"d_state": 2, "d_conv": 3, "headdim": 3, "chunk_size": 2})}


def by_token(block, x, state):
    "A sequence, one `step` after the other."
    ys = []
    for x_t in x.unbind(1):
        y_t, state = block.step(x_t, state)
        ys.append(y_t)
    return torch.stack(ys, 1), state


def assert_peers(ours, theirs, width):
    "Two blocks whose parameters have the same names say the same and have the same gradients, for one token and for 37."
    named = dict(theirs.named_parameters())
    for L in (1, 37):
        x = torch.randn(3, L, width, requires_grad=True)
        y, want = ours(x), theirs(x)
        assert rms_error(y, want) < 1e-5
        got, right = gradients([y], [x, *ours.parameters()]), gradients([want], [x, *(named[n] for n, _ in ours.named_parameters())])
        assert max(rms_error(g, r) for g, r in zip(got, right)) < 1e-4
