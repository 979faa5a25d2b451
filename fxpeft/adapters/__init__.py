"""What a model holds: its adapters, and the verbs that add, load, show, scale, save and take them out."""

from fxpeft.adapters.allocator import AdaLoraCallback, RankAllocator
from fxpeft.adapters.api import (
    active_adapters,
    adapter_config,
    add_adapter,
    delete_adapter,
    disable_adapters,
    enable_adapters,
    load_adapter,
    loaded_adapters,
    set_adapter,
    set_scale,
)
from fxpeft.adapters.components import save_components
from fxpeft.adapters.contexts import active, disabled, scaled
from fxpeft.adapters.data_starts import initialize_corda, initialize_lora_ga
from fxpeft.adapters.eva import initialize_eva
from fxpeft.adapters.injection import inject, load_adapter_state_dict
from fxpeft.adapters.invocation import invoked
from fxpeft.adapters.kv_prefix import initialize_kv_prefix_from_past_key_values, initialize_kv_prefix_from_text
from fxpeft.adapters.parameters import lora_fa_groups, lora_plus_groups, set_requires_grad, trainable_parameters
from fxpeft.adapters.replication import replicate_layers
from fxpeft.adapters.saving import adapter_state_dict, save_adapter

__all__ = [
    "AdaLoraCallback",
    "RankAllocator",
    "active",
    "active_adapters",
    "adapter_config",
    "adapter_state_dict",
    "add_adapter",
    "delete_adapter",
    "disable_adapters",
    "disabled",
    "enable_adapters",
    "initialize_corda",
    "initialize_eva",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_ga",
    "inject",
    "invoked",
    "load_adapter",
    "load_adapter_state_dict",
    "loaded_adapters",
    "lora_fa_groups",
    "lora_plus_groups",
    "replicate_layers",
    "save_adapter",
    "save_components",
    "scaled",
    "set_adapter",
    "set_requires_grad",
    "set_scale",
    "trainable_parameters",
]  # fmt: skip
