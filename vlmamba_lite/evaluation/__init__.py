# For the time of the move only: the package stands before the module evaluation.py, whose names it hands on.
import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("vlmamba_lite._evaluation", Path(__file__).parent.with_suffix(".py"))
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
globals().update({name: value for name, value in vars(_module).items() if not name.startswith("__")})
