from .ops.ssd import *
from .ops.ssd import _SSD_BACKENDS, _ssd_mamba_ssm
