"The old place of `vlmamba_lite.language.model`, `.language.sampling` and `.layers.attention`, until all imports name the new ones."
from vlmamba_lite.language.model import *  # noqa: F403
from vlmamba_lite.language.sampling import *  # noqa: F403
from vlmamba_lite.layers.attention import *  # noqa: F403
