from .evaluation.kernels import *
from .ops.triton import *
