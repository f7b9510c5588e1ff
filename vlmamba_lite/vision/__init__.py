"The old place of the modules `encoders`, `images` and `towers`."
from .encoders import *
from .images import *
from .towers import *
