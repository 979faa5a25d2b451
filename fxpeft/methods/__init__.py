"""The methods: each a config, its parameters, its training subgraph, and how it lowers to slot values."""

from fxpeft.methods.adalora import AdaLoraConfig
from fxpeft.methods.boft import BOFTConfig
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.delora import DeloraConfig
from fxpeft.methods.hra import HRAConfig
from fxpeft.methods.ia3 import IA3Config
from fxpeft.methods.inits import EvaConfig, LoftQConfig
from fxpeft.methods.ln_tuning import LNTuningConfig
from fxpeft.methods.loha import LoHaConfig
from fxpeft.methods.lokr import LoKrConfig
from fxpeft.methods.lora import LoraConfig
from fxpeft.methods.miss import MissConfig
from fxpeft.methods.oft import OFTConfig
from fxpeft.methods.p_tuning import PromptEncoderConfig
from fxpeft.methods.prefix_tuning import PrefixTuningConfig
from fxpeft.methods.prompt_tuning import PromptTuningConfig
from fxpeft.methods.registry import METHODS, config_class, following, method_of, register, slot_needs
from fxpeft.methods.tokens import TrainableTokensConfig
from fxpeft.methods.values import Values
from fxpeft.methods.vblora import VBLoRAConfig
from fxpeft.methods.vera import VeraConfig

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "AdapterConfig",
    "BOFTConfig",
    "DeloraConfig",
    "EvaConfig",
    "HRAConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig", "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "MissConfig",
    "OFTConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "TrainableTokensConfig",
    "VBLoRAConfig",
    "Values",
    "VeraConfig",
    "config_class",
    "following",
    "method_of",
    "register",
    "slot_needs"
]  # fmt: skip
