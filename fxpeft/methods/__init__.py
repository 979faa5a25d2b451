"""The methods: each a config, its parameters, its training subgraph, and how it lowers to slot values."""

from fxpeft.methods.adalora import AdaLoraConfig
from fxpeft.methods.adamss import AdamssConfig
from fxpeft.methods.beft import BeftConfig
from fxpeft.methods.blocks import BdLoraConfig
from fxpeft.methods.boft import BOFTConfig
from fxpeft.methods.c3a import C3AConfig
from fxpeft.methods.cartridge import CartridgeConfig
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.cpt import CPTConfig
from fxpeft.methods.data_starts import CordaConfig, LoraGAConfig
from fxpeft.methods.deft import DeftConfig
from fxpeft.methods.delora import DeloraConfig
from fxpeft.methods.fourierft import FourierFTConfig
from fxpeft.methods.glora import GloraConfig
from fxpeft.methods.gralora import GraloraConfig
from fxpeft.methods.hira import HiraConfig
from fxpeft.methods.hra import HRAConfig
from fxpeft.methods.ia3 import IA3Config
from fxpeft.methods.inits import EvaConfig, LoftQConfig
from fxpeft.methods.ln_tuning import LNTuningConfig
from fxpeft.methods.loha import LoHaConfig
from fxpeft.methods.lokr import LoKrConfig
from fxpeft.methods.lora import LoraConfig
from fxpeft.methods.miss import MissConfig
from fxpeft.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from fxpeft.methods.oft import OFTConfig
from fxpeft.methods.osf import OSFConfig
from fxpeft.methods.p_tuning import PromptEncoderConfig
from fxpeft.methods.prefix_tuning import PrefixTuningConfig
from fxpeft.methods.prompt_tuning import PromptTuningConfig
from fxpeft.methods.psoft import PsoftConfig
from fxpeft.methods.pvera import PveraConfig
from fxpeft.methods.randlora import RandLoraConfig
from fxpeft.methods.registry import METHODS, config_class, config_for, following, method_of, register, slot_needs
from fxpeft.methods.road import RoadConfig
from fxpeft.methods.shira import ShiraConfig
from fxpeft.methods.supertuning import SupertuningConfig
from fxpeft.methods.tinylora import TinyLoraConfig
from fxpeft.methods.tokens import TrainableTokensConfig
from fxpeft.methods.unilora import UniLoraConfig
from fxpeft.methods.values import Values
from fxpeft.methods.vblora import VBLoRAConfig
from fxpeft.methods.vera import VeraConfig
from fxpeft.methods.waveft import WaveFTConfig

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "AdamssConfig",
    "AdapterConfig",
    "BOFTConfig",
    "BdLoraConfig",
    "BeftConfig",
    "C3AConfig",
    "CPTConfig",
    "CartridgeConfig",
    "CordaConfig",
    "DeftConfig",
    "DeloraConfig",
    "EvaConfig",
    "FourierFTConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "MissConfig",
    "MultitaskPromptTuningConfig",
    "OFTConfig",
    "OSFConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "PsoftConfig",
    "PveraConfig",
    "RandLoraConfig",
    "RoadConfig",
    "ShiraConfig",
    "SupertuningConfig",
    "TinyLoraConfig",
    "TrainableTokensConfig",
    "UniLoraConfig",
    "VBLoRAConfig",
    "Values",
    "VeraConfig",
    "WaveFTConfig",
    "config_class",
    "config_for",
    "following",
    "method_of",
    "register",
    "slot_needs"
]  # fmt: skip
