"""The methods: each a config, its parameters, its training subgraph, and how it lowers to slot values."""

from fxpeft.methods.adalora import AdaLoraConfig
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.ia3 import IA3Config
from fxpeft.methods.inits import EvaConfig, LoftQConfig
from fxpeft.methods.lora import LoraConfig
from fxpeft.methods.p_tuning import PromptEncoderConfig
from fxpeft.methods.prefix_tuning import PrefixTuningConfig
from fxpeft.methods.prompt_tuning import PromptTuningConfig
from fxpeft.methods.registry import METHODS, config_class, method_of, register, slot_needs
from fxpeft.methods.values import Values

__all__ = [
    "METHODS", "AdaLoraConfig", "AdapterConfig", "EvaConfig", "IA3Config", "LoftQConfig", "LoraConfig",
    "PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig", "Values", "config_class", "method_of",
    "register", "slot_needs",
]  # fmt: skip
