import torch

from vlmamba_lite.scan_reference import finish_scan, prepare_scan

__all__ = ["ChunkedScan", "selective_scan_chunked"]


def _to_time(x, G):
    "(B, D, L) -> (L, B, G, D/G), contiguous"
    b, d, L = x.shape
    return x.permute(2, 0, 1).contiguous().view(L, b, G, d // G)


def _decay_and_input(dt, v, A, B, a, x):
    "Fills a = exp(dt A) and x = B v for the steps of one chunk, in place."
    torch.mul(dt.unsqueeze(3), A, out=a).exp_()
    torch.mul(B.unsqueeze(4), v.unsqueeze(3), out=x)


class ChunkedScan(torch.autograd.Function):
    """h_t = exp(dt_t A) h_{t-1} + B_t v_t, y_t = C_t h_t over time-major chunks; the backward recomputes the states.

    dt, v (L, B, G, P); A (G, N, P); B, C (L, B, G, N); h0 (B, G, N, P) -> y (L, B, G, P), h_L (B, G, N, P).
    """
    @staticmethod
    def forward(ctx, dt, v, A, B, C, h0, chunk):
        L, b, G, P = dt.shape
        n = A.shape[1]
        chunk = min(chunk, L)
        y = torch.empty_like(dt)
        a, x = (dt.new_empty(chunk, b, G, n, P) for _ in range(2))
        bounds = dt.new_empty(-(-L // chunk), b, G, n, P)               # the state each chunk starts from: all that is kept
        h = h0
        for k, s in enumerate(range(0, L, chunk)):
            t = min(chunk, L - s)
            h = bounds[k].copy_(h)                                      # before x, where h may lie, is filled anew
            _decay_and_input(dt[s:s+t], v[s:s+t], A, B[s:s+t], a[:t], x[:t])
            for a_i, x_i in zip(a[:t].unbind(0), x[:t].unbind(0)): h = x_i.addcmul_(a_i, h)
            torch.matmul(C[s:s+t].unsqueeze(3), x[:t], out=y[s:s+t].unsqueeze(3))
        ctx.save_for_backward(dt, v, A, B, C, bounds)
        ctx.chunk = chunk
        return y, h.clone()

    @staticmethod
    def backward(ctx, gy, g_last):
        dt, v, A, B, C, bounds = ctx.saved_tensors
        L, b, G, P = dt.shape
        n, chunk = A.shape[1], ctx.chunk
        gdt, gv, gB, gC, gA = (torch.empty_like(i) for i in (dt, v, B, C, A))
        gA.zero_()
        a, x, g = (dt.new_empty(k, b, G, n, P) for k in (chunk, chunk + 1, chunk))
        carry = g_last.clone()                                          # a_{t+1} g_{t+1}, the gradient that flows in from the right
        gy = gy.contiguous()
        for k in reversed(range(len(bounds))):
            s = k * chunk
            t = min(chunk, L - s)
            now = slice(s, s + t)
            at, xt, gt, h_prev, h_now = a[:t], x[:t+1], g[:t], x[:t], x[1:t+1]
            _decay_and_input(dt[now], v[now], A, B[now], at, h_now)
            h = xt[0].copy_(bounds[k])
            for a_i, x_i in zip(at.unbind(0), h_now.unbind(0)): h = x_i.addcmul_(a_i, h)     # states again
            torch.mul(C[now].unsqueeze(4), gy[now].unsqueeze(3), out=gt)
            gs, as_ = gt.unbind(0), at.unbind(0)
            gh = gs[-1].add_(carry)
            for i in range(t - 2, -1, -1): gh = gs[i].addcmul_(as_[i+1], gh)                 # g_t = C_t gy_t + a_{t+1} g_{t+1}
            torch.mul(as_[0], gh, out=carry)
            torch.matmul(h_now, gy[now].unsqueeze(4), out=gC[now].unsqueeze(4))
            torch.matmul(gt, v[now].unsqueeze(4), out=gB[now].unsqueeze(4))
            torch.matmul(B[now].unsqueeze(3), gt, out=gv[now].unsqueeze(3))
            q = at.mul_(gt).mul_(h_prev)                                # g_t h_{t-1} a_t: the gradient of the exponent dt A
            torch.mul(q, A, out=gt)
            torch.sum(gt, 3, out=gdt[now])
            gA += q.mul_(dt[now].unsqueeze(3)).sum((0, 1))
        return gdt, gv, gA, gB, gC, carry, None


def selective_scan_chunked(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                           initial_state=None, return_last_state=False, chunk_size=16):
    """The selective scan in cache-sized chunks, with a backward that recomputes: the fast path on a CPU."""
    if chunk_size < 1: raise ValueError(f"chunk_size: got {chunk_size}, need at least 1")
    x, dt, A, Bg, Cg, h0 = prepare_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    b, d, L = x.shape
    G, n = Bg.shape[1:3]
    grouped = lambda h: h.view(b, G, d // G, n).transpose(2, 3)         # (B, D, N) -> (B, G, N, P)
    At = A.view(G, d // G, n).transpose(1, 2).contiguous()              # (G, N, P)
    Bt, Ct = (X.permute(3, 0, 1, 2).contiguous() for X in (Bg, Cg))     # (L, B, G, N)
    dt = _to_time(dt, G)
    y, h = ChunkedScan.apply(dt, dt * _to_time(x, G), At, Bt, Ct, grouped(h0), chunk_size)
    y = finish_scan(y.view(L, b, d).permute(1, 2, 0), u, D, z)
    return (y, h.transpose(2, 3).reshape(b, d, n)) if return_last_state else y
