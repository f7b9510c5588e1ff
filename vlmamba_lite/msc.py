"The old place of `vlmamba_lite.connectors.msc`."
from .connectors.attention_maps import mvss_attention, ssd_attention
from .connectors.msc import *
