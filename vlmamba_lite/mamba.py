import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba_lite.scan import selective_scan

__all__ = ["causal_conv1d", "next_window", "pack_tokens", "unpack_tokens", "init_dt_bias", "MambaState", "Mamba"]


def causal_conv1d(x, weight, bias=None, window=None):
    """A depthwise convolution that sees only the past. x (B, L, D), weight (D, 1, K), bias (D,), window (B, D, K): the inputs before x.

    Returns y (B, L, D) and the inputs with the window before them (B, K + L, D), from which `next_window` cuts the next one.
    """
    L, K = x.shape[1], weight.shape[2]
    before = x.new_zeros(x.shape[0], K, x.shape[2]) if window is None else window.to(x.dtype).transpose(1, 2)
    seen = torch.cat([before, x], 1)
    y = seen[:, 1:L+1] * weight[:, 0, 0]
    for k in range(1, K): y = torch.addcmul(y, seen[:, k+1:k+1+L], weight[:, 0, k])
    return (y if bias is None else y + bias), seen


def next_window(seen, K, lengths=None):
    "The last K inputs (B, D, K) of each row: the conv state. `lengths` (B,) counts a row's real tokens, all of them by default."
    if lengths is None: return seen[:, -K:].transpose(1, 2)
    at = lengths[:, None] + torch.arange(K, device=seen.device)          # (B, K), positions in seen
    return seen.gather(1, at[..., None].expand(-1, -1, seen.shape[2])).transpose(1, 2)


def pack_tokens(x, mask):
    "Moves each row's real tokens to its front. x (B, L, d), mask (B, L) -> packed x, mask of the packed row, order (B, L)."
    if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"mask: got {mask.dtype} {tuple(mask.shape)}, need bool {tuple(x.shape[:2])}, True at real tokens")
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return x.gather(1, order[..., None].expand_as(x)), mask.gather(1, order), order


def unpack_tokens(y, mask, order):
    "The inverse of `pack_tokens`: every real token back to its place, zeros at the pads. mask is that of the packed row."
    y = y * mask[..., None]
    return torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)


def init_dt_bias(n, dt_min=1e-3, dt_max=0.1, floor=1e-4):
    "A bias whose softplus is log-uniform in [dt_min, dt_max]: the step sizes a new layer starts with (official init)."
    dt = torch.exp(torch.empty(n).uniform_(math.log(dt_min), math.log(dt_max))).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))                             # the inverse of softplus


class MambaState(NamedTuple):
    "What a Mamba layer remembers: `conv` (B, d_inner, d_conv), the last inputs of its convolution; `ssm` (B, d_inner, N), float32."
    conv: Tensor
    ssm: Tensor


class Mamba(nn.Module):
    "The Mamba block (arXiv 2312.00752, section 3.4), parameter names and shapes as in the official checkpoints."

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2, dt_rank="auto", dt_min=1e-3, dt_max=0.1,
                 dt_init_floor=1e-4, bias=False, conv_bias=True, backend="auto"):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.backend = d_model, d_state, d_conv, backend
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1., d_state + 1)).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank ** -0.5, self.dt_rank ** -0.5)
        with torch.no_grad(): self.dt_proj.bias.copy_(init_dt_bias(self.d_inner, dt_min, dt_max, dt_init_floor))
        self.dt_proj.bias._no_reinit = True
        self.A_log._no_weight_decay = self.D._no_weight_decay = True

    def ssm(self, u, z=None, state=None, real=None):
        "Convolution, projections and scan, the part that mixes positions: u, z (B, L, d_inner) -> y, the state after it. real (B, L): True, then False."
        u, seen = causal_conv1d(u, self.conv1d.weight, self.conv1d.bias, state and state.conv)
        u = F.silu(u)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = dt @ self.dt_proj.weight.T                                   # its bias enters the scan, as delta_bias in float32
        if real is not None: dt = dt.masked_fill(~real[..., None], -torch.inf)   # softplus(-inf) = 0: a pad takes a step of no length
        last = lambda x: None if x is None else x.transpose(1, 2)         # (B, L, .) -> (B, ., L)
        y, h = selective_scan(last(u), last(dt), -torch.exp(self.A_log.float()), last(B), last(C), self.D.float(), last(z),
                              self.dt_proj.bias.float(), True, state and state.ssm, True, self.backend)
        window = next_window(seen, self.d_conv, None if real is None else real.sum(1))
        return y.transpose(1, 2), MambaState(window, h)

    def forward(self, x, state=None, mask=None, return_state=False):
        "x (B, L, d_model) -> y [, state]. state: where the rows start from; mask (B, L): True at real tokens, pads on either side."
        real = None
        if mask is not None: x, real, order = pack_tokens(x, mask)
        u, z = self.in_proj(x).chunk(2, -1)
        y, state = self.ssm(u, z, state, real)
        y = self.out_proj(y)
        if mask is not None: y = unpack_tokens(y, real, order)
        return (y, state) if return_state else y

    def empty_state(self, batch, device=None, dtype=None):
        "The state before the first token: all zeros."
        p = self.conv1d.weight
        return MambaState(torch.zeros(batch, self.d_inner, self.d_conv, device=device or p.device, dtype=dtype or p.dtype),
                          torch.zeros(batch, self.d_inner, self.d_state, device=device or p.device))

    def step(self, x_t, state):
        "One token: x_t (B, d_model), state -> y_t (B, d_model), the next state. The recurrence itself, no scan."
        u, z = self.in_proj(x_t).chunk(2, -1)
        conv = torch.cat([state.conv[..., 1:], u[..., None].to(state.conv.dtype)], -1)      # the window moves on by one
        u = (conv * self.conv1d.weight[:, 0]).sum(-1)
        if self.conv1d.bias is not None: u = u + self.conv1d.bias
        u = F.silu(u)
        dt, B, C = (i.float() for i in self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1))
        dt = F.softplus(dt @ self.dt_proj.weight.float().T + self.dt_proj.bias.float())    # (B, d_inner)
        A = -torch.exp(self.A_log.float())
        h = torch.exp(dt[..., None] * A) * state.ssm + (dt * u.float())[..., None] * B[:, None]   # (B, d_inner, N)
        y = (h * C[:, None]).sum(-1) + self.D.float() * u.float()
        return self.out_proj((y * F.silu(z.float())).to(x_t.dtype)), MambaState(conv, h)
