"""Old names of `vlmamba_lite.benchmark`, until everything imports from `vlmamba_lite.evaluation`."""
import importlib.util

from vlmamba_lite.evaluation.benchmarks import *
from vlmamba_lite.evaluation.cost import *
