from .ops.chunked import *
from .ops.cpp import *
from .ops.parallel import *
