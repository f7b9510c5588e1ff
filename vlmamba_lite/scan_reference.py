import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["scan_dtype", "check_scan_inputs", "prepare_scan", "finish_scan", "selective_scan_reference"]


def scan_dtype(dtype):
    "The dtype a scan computes in: float64 for float64 inputs, float32 for everything else."
    return torch.float64 if dtype == torch.float64 else torch.float32


def _need(ok, name, got, need):
    if not ok:
        raise ValueError(f"{name}: got {got}, need {need}")


def _group_ok(X, batch, n, L, channels):
    if X.ndim == 2: return tuple(X.shape) == (channels, n)
    if X.ndim == 3: return tuple(X.shape) == (batch, n, L)
    return X.ndim == 4 and X.shape[0] == batch and tuple(X.shape[2:]) == (n, L) and channels % max(X.shape[1], 1) == 0 and X.shape[1] > 0


def check_scan_inputs(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None):
    "Raises one `ValueError` that names the first argument of a wrong shape, what it got and what it needs."
    _need(u.ndim == 3, "u", tuple(u.shape), "(batch, channels, length)")
    batch, channels, L = u.shape
    _need(L > 0, "u", tuple(u.shape), "a length of at least 1")
    _need(A.ndim == 2 and A.shape[0] == channels, "A", tuple(A.shape), f"({channels}, N)")
    _need(not A.is_complex(), "A", A.dtype, "a real dtype")
    n = A.shape[1]
    for name, x in (("delta", delta), ("z", z)):
        _need(x is None or x.shape == u.shape, name, x is not None and tuple(x.shape), f"{tuple(u.shape)} like u")
    for name, x in (("B", B), ("C", C)):
        _need(_group_ok(x, batch, n, L, channels), name, tuple(x.shape),
              f"({channels}, {n}), ({batch}, {n}, {L}) or ({batch}, G, {n}, {L}) with G dividing {channels}")
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        _need(x is None or tuple(x.shape) == (channels,), name, x is not None and tuple(x.shape), f"({channels},)")
    x = initial_state
    _need(x is None or tuple(x.shape) == (batch, channels, n), "initial_state", x is not None and tuple(x.shape), f"({batch}, {channels}, {n})")


def _groups(X, u):
    "B or C in any of its three forms -> (B, G, N, L); a constant one becomes one group per channel."
    batch, channels, L = u.shape
    if X.ndim == 2: return X.to(scan_dtype(u.dtype))[None, :, :, None].expand(batch, channels, X.shape[1], L)
    return (X.unsqueeze(1) if X.ndim == 3 else X).to(scan_dtype(u.dtype))


def prepare_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None):
    """Checks the arguments of a selective scan and brings them to one form, in float32 (float64 for float64 inputs).

    Returns u, delta (B, D, L), delta with its bias added and through softplus; A (D, N); B, C (B, G, N, L); the first state (B, D, N).
    """
    check_scan_inputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype = scan_dtype(u.dtype)
    delta = delta.to(dtype)
    if delta_bias is not None: delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus: delta = F.softplus(delta)                        # identity above 20, as in the official kernel
    h = u.new_zeros(u.shape[0], *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    return u.to(dtype), delta, A.to(dtype), _groups(B, u), _groups(C, u), h


def finish_scan(y, u, D=None, z=None):
    "What follows every scan: the skip `D * u`, the gate `silu(z)`, and the cast back to u's dtype."
    if D is not None: y = y + D.to(y.dtype)[:, None] * u.to(y.dtype)
    if z is not None: y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)


def selective_scan_reference(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                             initial_state=None, return_last_state=False):
    """The selective scan as a loop over time: `h = exp(delta A) h + delta B u; y = C h`."""
    x, dt, A, Bg, Cg, h = prepare_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    per = u.shape[1] // Bg.shape[1]                                      # channels per group
    ys = []
    for t in range(u.shape[2]):
        dt_t, x_t = dt[:, :, t, None], x[:, :, t, None]                  # (B, D, 1)
        B_t, C_t = (X[..., t].repeat_interleave(per, 1) for X in (Bg, Cg))   # (B, D, N)
        h = torch.exp(dt_t * A) * h + dt_t * B_t * x_t                   # (B, D, N)
        ys.append((C_t * h).sum(-1))                                     # (B, D)
    y = finish_scan(torch.stack(ys, -1), u, D, z)
    return (y, h) if return_last_state else y
