import math

import torch
import torch.nn.functional as F

from vlmamba_lite.scan_reference import scan_dtype

__all__ = ["check_ssd_inputs", "prepare_dt", "ssd_recurrent", "ssd_quadratic", "ssd_chunked"]


def _need(ok, name, got, need):
    if not ok: raise ValueError(f"{name}: got {got}, need {need}")


def check_ssd_inputs(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None):
    "Raises one `ValueError` that names the first argument of a wrong shape, what it got and what it needs."
    shape = lambda i: None if i is None else tuple(i.shape)
    _need(x.ndim == 4 and x.shape[1] > 0, "x", shape(x), "(batch, length, heads, headdim) with a length of at least 1")
    b, L, h, p = x.shape
    _need(B.ndim == 4 and shape(B)[:2] == (b, L) and B.shape[2] > 0 and h % B.shape[2] == 0, "B", shape(B), f"({b}, {L}, G, N) with G dividing {h}")
    _need(shape(C) == shape(B), "C", shape(C), f"{shape(B)} like B")
    _need(shape(dt) == (b, L, h), "dt", shape(dt), f"({b}, {L}, {h})")
    _need(shape(A) == (h,), "A", shape(A), f"({h},)")
    _need(D is None or shape(D) in ((h,), (h, p)), "D", shape(D), f"({h},) or ({h}, {p})")
    _need(z is None or shape(z) == shape(x), "z", shape(z), f"{shape(x)} like x")
    _need(dt_bias is None or shape(dt_bias) == (h,), "dt_bias", shape(dt_bias), f"({h},)")
    need = (b, h, p, B.shape[-1])
    _need(initial_states is None or shape(initial_states) == need, "initial_states", shape(initial_states), f"{need}")


def prepare_dt(dt, dt_bias=None, dt_softplus=False, dt_limit=(0., math.inf)):
    "The step size a head really takes: bias, softplus and limits, in float32 (float64 for float64 inputs)."
    dt = dt.to(scan_dtype(dt.dtype))
    if dt_bias is not None: dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus: dt = F.softplus(dt)
    return dt if tuple(dt_limit) == (0., math.inf) else dt.clamp(*dt_limit)


def _prepare(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_states):
    check_ssd_inputs(x, dt, A, B, C, D, z, dt_bias, initial_states)
    dtype = scan_dtype(x.dtype)
    x, A, B, C = (i.to(dtype) for i in (x, A, B, C))
    b, _, h, p = x.shape
    first = x.new_zeros(b, h, p, B.shape[-1]) if initial_states is None else initial_states.to(dtype)
    return x, prepare_dt(dt.to(dtype), dt_bias, dt_softplus, dt_limit), A, B, C, first


def _finish(y, x, D, z):
    if D is not None: y = y + D.to(y.dtype).view(D.shape[0], -1) * x.to(y.dtype)
    if z is not None: y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def ssd_recurrent(x, dt, A, B, C, *, chunk_size=256, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0., math.inf),
                  initial_states=None, return_final_states=False):
    "SSD as a recurrence: `h = exp(dt A) h + dt x B^T; y = h C`. chunk_size is not used."
    X, dt, A, B, C, h = _prepare(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_states)
    B, C = (i.repeat_interleave(x.shape[2] // B.shape[2], 2) for i in (B, C))       # (B, L, H, N)
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]                             # (B, H, 1, 1)
        h = decay * h + (dt[:, t, :, None] * X[:, t])[..., None] * B[:, t, :, None]  # (B, H, P, N)
        ys.append((h * C[:, t, :, None]).sum(-1))                                    # (B, H, P)
    y = _finish(torch.stack(ys, 1), x, D, z)
    return (y, h) if return_final_states else y


def ssd_chunked(x, dt, A, B, C, *, chunk_size=256, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0., math.inf),
                initial_states=None, return_final_states=False):
    "SSD in chunks: attention-like matrices inside a chunk, a recurrence over chunks (arXiv 2405.21060, section 6)."
    X, dt, A, B, C, h = _prepare(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_states)
    b, L, H, p = X.shape
    g, n = B.shape[2:]
    r, Q = H // g, min(chunk_size, L)
    pad = -L % Q
    xd = X * dt[..., None]
    if pad: xd, dt, B, C = (F.pad(i, (0, 0) * (i.ndim - 2) + (0, pad)) for i in (xd, dt, B, C))   # dt = 0 leaves the state alone
    c = (L + pad) // Q
    xd = xd.view(b, c, Q, g, r, p).permute(0, 1, 3, 4, 2, 5)                         # b c g r Q p
    cum = (dt * A).view(b, c, Q, g, r).permute(0, 1, 3, 4, 2).cumsum(-1)             # b c g r Q, the log of the decay since the chunk began
    B, C = (i.view(b, c, Q, g, n).transpose(2, 3) for i in (B, C))                   # b c g Q n
    G = (C @ B.mT).unsqueeze(3)                                                      # b c g 1 Q Q, once a group
    future = torch.ones(Q, Q, dtype=torch.bool, device=X.device).triu(1)
    M = (cum.unsqueeze(-1) - cum.unsqueeze(-2)).masked_fill(future, -torch.inf).exp() * G
    y = M @ xd                                                                       # within the chunk
    states, start = None, h.view(b, g, r, p, n)
    if c > 1 or return_final_states:
        S = (xd * (cum[..., -1:] - cum).exp().unsqueeze(-1)).mT @ B.unsqueeze(3)     # b c g r p n, what a chunk adds
        decay = cum[..., -1].exp()[..., None, None]
        starts = []
        for S_c, d_c in zip(S.unbind(1), decay.unbind(1)):
            starts.append(start)
            start = torch.addcmul(S_c, d_c, start)
        states = torch.stack(starts, 1)
    else: states = start.unsqueeze(1)
    if c > 1 or initial_states is not None:
        y = y + cum.exp().unsqueeze(-1) * (C.unsqueeze(3) @ states.mT)               # what came before the chunk
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, c * Q, H, p)[:, :L]
    y = _finish(y, x, D, z)
    return (y, start.reshape(b, H, p, n)) if return_final_states else y


def ssd_quadratic(x, dt, A, B, C, *, chunk_size=256, **kwargs):
    "SSD as one masked matrix, like attention: the chunked form with a single chunk. chunk_size is not used."
    return ssd_chunked(x, dt, A, B, C, chunk_size=x.shape[1], **kwargs)
