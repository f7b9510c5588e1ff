from vlmamba_lite.scan_parallel import selective_scan_chunked
from vlmamba_lite.scan_reference import selective_scan_reference

__all__ = ["backends", "selective_scan"]

_BACKENDS = {"reference": selective_scan_reference, "chunked": selective_scan_chunked}


def backends():
    "The scans of this library: None beside each that runs here, else the reason why it does not."
    return {name: None for name in _BACKENDS}


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                   initial_state=None, return_last_state=False, backend="auto"):
    "The selective scan of Mamba (`h = exp(delta A) h + delta B u; y = C h`), by the backend you name or the fastest that runs."
    if backend == "auto": backend = "chunked"
    if backend not in _BACKENDS: raise ValueError(f"backend: got {backend!r}, need 'auto' or one of {sorted(_BACKENDS)}")
    return _BACKENDS[backend](u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, return_last_state)
