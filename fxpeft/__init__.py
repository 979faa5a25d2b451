"""Parameter-efficient fine-tuning as a graph-rewriting compiler pass."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from fxpeft.adapters import (
        active_adapters,
        adapter_config,
        adapter_state_dict,
        add_adapter,
        delete_adapter,
        disable_adapters,
        disabled,
        enable_adapters,
        load_adapter,
        remove,
        save_adapter,
        set_adapter,
        set_scale,
        trainable_parameters,
    )
    from fxpeft.allocator import AdaLoraCallback, RankAllocator
    from fxpeft.backend import compile
    from fxpeft.errors import AdapterError, CheckpointError
    from fxpeft.methods import register
    from fxpeft.methods.adalora import AdaLoraConfig
    from fxpeft.methods.ia3 import IA3Config
    from fxpeft.methods.lora import LoraConfig
    from fxpeft.packaged import Package, open_package
    from fxpeft.packaging import package
    from fxpeft.programs import Slots, adapter_inputs, eject, rewrite
    from fxpeft.serving import hold, hotswap, prepare_hotswap, release_hotswap

__version__ = _version("fxpeft")
__all__ = [
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdapterError",
    "CheckpointError",
    "IA3Config",
    "LoraConfig",
    "Package",
    "RankAllocator",
    "Slots",
    "active_adapters",
    "adapter_config",
    "adapter_inputs",
    "adapter_state_dict",
    "add_adapter",
    "compile",
    "delete_adapter",
    "disable_adapters",
    "disabled",
    "eject",
    "enable_adapters",
    "hold",
    "hotswap",
    "load_adapter",
    "open_package",
    "package",
    "prepare_hotswap",
    "register",
    "release_hotswap",
    "remove",
    "rewrite",
    "save_adapter",
    "set_adapter",
    "set_scale",
    "trainable_parameters",
]
_MODULES = {
    **dict.fromkeys(("AdapterError", "CheckpointError"), "fxpeft.errors"),
    **dict.fromkeys(("hold", "hotswap", "prepare_hotswap", "release_hotswap"), "fxpeft.serving"),
    **dict.fromkeys(("Package", "open_package"), "fxpeft.packaged"),
    "package": "fxpeft.packaging",
    **dict.fromkeys(("Slots", "adapter_inputs", "eject", "rewrite"), "fxpeft.programs"),
    "compile": "fxpeft.backend",
    **dict.fromkeys(("AdaLoraCallback", "RankAllocator"), "fxpeft.allocator"),
    "AdaLoraConfig": "fxpeft.methods.adalora",
    "IA3Config": "fxpeft.methods.ia3",
    "LoraConfig": "fxpeft.methods.lora",
    "register": "fxpeft.methods",
}


def __getattr__(name: str) -> _Any:
    # on first use: pytest imports this package in every run, for its plugin, and torch takes seconds
    if name not in __all__:
        raise AttributeError(f"module 'fxpeft' has no attribute {name!r}")
    value = getattr(_import_module(_MODULES.get(name, "fxpeft.adapters")), name)
    globals()[name] = value
    return value
