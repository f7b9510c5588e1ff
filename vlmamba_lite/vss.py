import torch
import torch.nn.functional as F
from torch import nn

from vlmamba_lite.mamba import Mamba

__all__ = ["scan_order", "cross_scan", "cross_merge", "VSS"]


def scan_order(height, width, kind="bsm"):
    "Index tensor (K, height * width): the patch each scan visits at each step. `bsm`: raster and its reverse; `csm`: column-major and its reverse too."
    if height < 1 or width < 1: raise ValueError(f"height, width: got {height}, {width}, need at least 1 each")
    grid = torch.arange(height * width).view(height, width)
    rows, columns = grid.flatten(), grid.T.flatten()
    orders = {"bsm": [rows, rows.flip(0)], "csm": [rows, columns, rows.flip(0), columns.flip(0)]}
    if kind not in orders: raise ValueError(f"kind: got {kind!r}, need one of {sorted(orders)}")
    return torch.stack(orders[kind])


def cross_scan(x, order):
    "The tokens of a picture in every scan order. x (B, L, C), order (K, L) -> (B, K, L, C)."
    return x[:, order.to(x.device)]


def cross_merge(y, order):
    "Puts every scan's tokens back to their places and sums over the scans. y (B, K, L, C), order (K, L) -> (B, L, C)."
    back = order.to(y.device).argsort(1)
    return sum(y[:, k, back[k]] for k in range(len(back)))


class VSS(nn.Module):
    "Vision Selective Scan (VL-Mamba, section 3.2): a 2-D scan, one Mamba layer over every order, un-scanned and summed."

    def __init__(self, dim, scan="bsm", mixer="mamba", shared=True, **mixer_args):
        super().__init__()
        if mixer != "mamba": raise ValueError(f"mixer: got {mixer!r}, need 'mamba'")
        self.scan, self.shared = scan, shared
        scans = len(scan_order(1, 1, scan))
        self.mixers = nn.ModuleList(Mamba(dim, **mixer_args) for _ in range(1 if shared else scans))

    def forward(self, x, size):
        "x (B, height * width, dim), size (height, width) -> (B, height * width, dim)"
        height, width = size
        if x.shape[1] != height * width: raise ValueError(f"x: got {x.shape[1]} tokens, need {height} * {width} = {height * width}")
        order = scan_order(height, width, self.scan)
        if self.shared: return self._shared(x, order)
        scans = cross_scan(x, order).unbind(1)
        return cross_merge(torch.stack([m(s) for m, s in zip(self.mixers, scans)], 1), order)

    def _shared(self, x, order):
        # in_proj, gate and out_proj treat each position alone, so they commute with any reordering and are done once.
        mixer, (B, L, _), K = self.mixers[0], x.shape, len(order)
        u, z = mixer.in_proj(x).chunk(2, -1)
        y, _ = mixer.ssm(cross_scan(u, order).flatten(0, 1))             # (B * K, L, d_inner)
        return mixer.out_proj(cross_merge(y.view(B, K, L, -1), order) * F.silu(z))
