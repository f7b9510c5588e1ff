from .ops.selective_scan import *
from .ops.selective_scan import _BACKENDS


def _automatic(u, A):
    return resolve("auto", u, A)


def _find(backend, u=None, A=None):
    return _BACKENDS[resolve(backend, u, A)][0]
