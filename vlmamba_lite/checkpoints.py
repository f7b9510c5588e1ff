"""Transition: this module is vlmamba_lite.language.checkpoints (and vlmamba_lite.files) now."""
from .files import KeyReport, file_finder, naming, read_json, tensors_in, write_atomically, write_json  # noqa: F401
from .language.checkpoints import *  # noqa: F403
from .language.checkpoints import load_pretrained, save_pretrained  # noqa: F401


def from_pretrained(name, model_class=None, **options):
    from .language_model import MambaConfig, MambaLM
    return load_pretrained(name, model_class or MambaLM, MambaConfig, **options)
