"""Parameter-efficient fine-tuning as a graph-rewriting compiler pass."""

from importlib.metadata import version as _version

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
from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.methods.lora import LoraConfig
from fxpeft.serving import hold, hotswap, prepare_hotswap, release_hotswap

__version__ = _version("fxpeft")
__all__ = [
    "AdapterError",
    "CheckpointError",
    "LoraConfig",
    "__version__",
    "active_adapters",
    "adapter_config",
    "adapter_state_dict",
    "add_adapter",
    "delete_adapter",
    "disable_adapters",
    "disabled",
    "enable_adapters",
    "hold",
    "hotswap",
    "load_adapter",
    "prepare_hotswap",
    "release_hotswap",
    "remove",
    "save_adapter",
    "set_adapter",
    "set_scale",
    "trainable_parameters",
]
