"The old place of `vlmamba_lite.connectors.connectors` and of the connectors' part of `vlmamba_lite.connectors.attention_maps`."
from .connectors.attention_maps import *
from .connectors.attention_maps import connector_maps as connector_sight, plot_connector_maps as plot_sight
from .connectors.connectors import *
from .connectors.vss import check_tokens, choose
