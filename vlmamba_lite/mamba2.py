"The old place of `vlmamba_lite.layers.mamba2`, until all imports name the new one."
import torch

from vlmamba_lite.layers.mamba2 import *  # noqa: F403
from vlmamba_lite.layers.mamba2 import Mamba2
from vlmamba_lite.scan_reference import scan_dtype
from vlmamba_lite.ssd import prepare_dt


def split_projection(block, zxbcdt):                                     # old signatures, for msc
    return zxbcdt.split([block.d_inner, block.conv_dim, block.nheads], -1)


def split_heads(block, xBC):
    return Mamba2.split_heads(block, xBC)


def ssd_constants(block, dt):
    dtype = scan_dtype(dt.dtype)
    return -torch.exp(block.A_log.to(dtype)), block.D.to(dtype), prepare_dt(dt, block.dt_bias, True, block.dt_limit)
