"The old place of `vlmamba_lite.layers.mamba`, until all imports name the new one."
from vlmamba_lite.layers.mamba import *  # noqa: F403
from vlmamba_lite.layers.mamba import Mamba

Mamba._select, Mamba._constants = Mamba.select, Mamba.constants          # old names, for benchmark
