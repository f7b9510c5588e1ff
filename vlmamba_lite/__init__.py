__version__ = "0.1.0"

_MODULES = {
    "ops.selective_scan": ["selective_scan", "backends"],
    "ops.ssd": ["ssd"],
    "layers.mamba": ["Mamba"],
    "layers.mamba2": ["Mamba2"],
    "layers.mamba3": ["Mamba3"],
    "language.model": ["MambaLM", "MambaConfig"],
    "connectors.vss": ["VSS", "scan_order"],
    "connectors.connectors": ["MLPConnector", "VSSMLPConnector", "VSSL2Connector"],
    "connectors.msc": ["MambaScanConnector"],
    "model.vlmamba": ["VLMamba"],
    "model.presets": ["VLMambaConfig"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    "Public names are loaded when they are first asked for (PEP 562), so that `import vlmamba_lite` stays quick."
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
