"The old place of `vlmamba_lite.connectors.vss`."
from .connectors.vss import *
from .connectors.vss import _kept_order, _order_once, scan_dtype, selective_scan
