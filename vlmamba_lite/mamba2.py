import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba_lite.mamba import causal_conv1d, init_dt_bias, next_window, pack_tokens, unpack_tokens
from vlmamba_lite.ssd import prepare_dt, ssd_chunked

__all__ = ["GatedRMSNorm", "Mamba2State", "Mamba2"]


class GatedRMSNorm(nn.Module):
    "RMSNorm(y * silu(z)) over each group of channels, or RMSNorm(y) * silu(z) with `norm_before_gate`."

    def __init__(self, dim, groups=1, norm_before_gate=False, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.groups, self.norm_before_gate, self.eps = groups, norm_before_gate, eps

    def forward(self, y, z):
        dtype, y, gate = y.dtype, y.float(), F.silu(z.float())
        if not self.norm_before_gate: y = y * gate
        g = y.unflatten(-1, (self.groups, -1))
        y = F.rms_norm(g, g.shape[-1:], eps=self.eps).flatten(-2) * self.weight.float()
        return (y * gate if self.norm_before_gate else y).to(dtype)


class Mamba2State(NamedTuple):
    "What a Mamba-2 layer remembers: `conv` (B, d_inner + 2 G N, d_conv) and `ssm` (B, H, P, N), float32."
    conv: Tensor
    ssm: Tensor


class Mamba2(nn.Module):
    "The Mamba-2 block (arXiv 2405.21060, section 7), parameter names and shapes as in the official checkpoints."

    def __init__(self, d_model, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1, A_init_range=(1, 16), dt_min=1e-3,
                 dt_max=0.1, dt_init_floor=1e-4, dt_limit=(0., math.inf), norm_before_gate=False, bias=False, conv_bias=True, chunk_size=256):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.dt_limit, self.chunk_size = tuple(dt_limit), chunk_size
        self.d_inner = int(expand * d_model)
        if self.d_inner % headdim: raise ValueError(f"headdim: got {headdim}, need a divisor of d_inner = {self.d_inner}")
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups: raise ValueError(f"ngroups: got {ngroups}, need a divisor of nheads = {self.nheads}")
        self.conv_dim = self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + self.conv_dim + self.nheads, bias=bias)     # z, xBC, dt
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, bias=conv_bias)
        self.dt_bias = nn.Parameter(init_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.nheads).uniform_(*A_init_range)))
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = GatedRMSNorm(self.d_inner, ngroups, norm_before_gate)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.dt_bias._no_weight_decay = self.A_log._no_weight_decay = self.D._no_weight_decay = True

    def _project(self, x): return self.in_proj(x).split([self.d_inner, self.conv_dim, self.nheads], -1)

    def _heads(self, xBC):
        "xBC (..., conv_dim) -> x (..., H, P), B, C (..., G, N)"
        x, B, C = xBC.split([self.d_inner, self.ngroups * self.d_state, self.ngroups * self.d_state], -1)
        return x.unflatten(-1, (self.nheads, -1)), B.unflatten(-1, (self.ngroups, -1)), C.unflatten(-1, (self.ngroups, -1))

    def _dt(self, dt): return prepare_dt(dt.float() if dt.dtype != torch.float64 else dt, self.dt_bias, True, self.dt_limit)

    def forward(self, x, state=None, mask=None, return_state=False):
        "x (B, L, d_model) -> y [, state]. state: where the rows start from; mask (B, L): True at real tokens, pads on either side."
        real = None
        if mask is not None: x, real, order = pack_tokens(x, mask)
        z, xBC, dt = self._project(x)
        xBC, seen = causal_conv1d(xBC, self.conv1d.weight, self.conv1d.bias, state and state.conv)
        u, B, C = self._heads(F.silu(xBC))
        dt = self._dt(dt)
        if real is not None: dt = dt * real[..., None]                    # a pad takes a step of no length
        y = ssd_chunked(u, dt, -torch.exp(self.A_log.float()), B, C, chunk_size=self.chunk_size, D=self.D,
                        initial_states=state and state.ssm, return_final_states=return_state)
        y, h = y if return_state else (y, None)
        y = self.out_proj(self.norm(y.flatten(-2), z))
        if mask is not None: y = unpack_tokens(y, real, order)
        if not return_state: return y
        return y, Mamba2State(next_window(seen, self.d_conv, None if real is None else real.sum(1)), h)

    def empty_state(self, batch, device=None, dtype=None):
        "The state before the first token: all zeros."
        p = self.conv1d.weight
        return Mamba2State(torch.zeros(batch, self.conv_dim, self.d_conv, device=device or p.device, dtype=dtype or p.dtype),
                           torch.zeros(batch, self.nheads, self.headdim, self.d_state, device=device or p.device))

    def step(self, x_t, state):
        "One token: x_t (B, d_model), state -> y_t (B, d_model), the next state."
        z, xBC, dt = self._project(x_t)
        conv = torch.cat([state.conv[..., 1:], xBC[..., None].to(state.conv.dtype)], -1)
        xBC = (conv * self.conv1d.weight[:, 0]).sum(-1)
        if self.conv1d.bias is not None: xBC = xBC + self.conv1d.bias
        u, B, C = self._heads(F.silu(xBC))
        dt, u = self._dt(dt), u.float()
        B, C = (i.float().repeat_interleave(self.nheads // self.ngroups, 1) for i in (B, C))      # (B, H, N)
        decay = torch.exp(dt * -torch.exp(self.A_log.float()))[..., None, None]
        h = decay * state.ssm + (dt[..., None] * u)[..., None] * B[:, :, None]                    # (B, H, P, N)
        y = (h * C[:, :, None]).sum(-1) + self.D[:, None] * u                                     # (B, H, P)
        return self.out_proj(self.norm(y.flatten(-2).to(x_t.dtype), z)), Mamba2State(conv, h)
