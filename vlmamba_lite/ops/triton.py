from ..scan_triton import *
