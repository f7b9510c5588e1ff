"""Old names of `vlmamba_lite.ablation`, until everything imports from `vlmamba_lite.evaluation`."""
from vlmamba_lite.evaluation.ablations import *
from vlmamba_lite.evaluation.grid import *
