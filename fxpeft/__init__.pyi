"""The public names, each from the package where it lives. This is the one list: ``__init__.py`` reads it."""

from fxpeft.adapters import (
    AdaLoraCallback as AdaLoraCallback,
)
from fxpeft.adapters import (
    RankAllocator as RankAllocator,
)
from fxpeft.adapters import (
    active as active,
)
from fxpeft.adapters import (
    active_adapters as active_adapters,
)
from fxpeft.adapters import (
    adapter_config as adapter_config,
)
from fxpeft.adapters import (
    adapter_state_dict as adapter_state_dict,
)
from fxpeft.adapters import (
    add_adapter as add_adapter,
)
from fxpeft.adapters import (
    delete_adapter as delete_adapter,
)
from fxpeft.adapters import (
    disable_adapters as disable_adapters,
)
from fxpeft.adapters import (
    disabled as disabled,
)
from fxpeft.adapters import (
    enable_adapters as enable_adapters,
)
from fxpeft.adapters import (
    initialize_corda as initialize_corda,
)
from fxpeft.adapters import (
    initialize_eva as initialize_eva,
)
from fxpeft.adapters import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from fxpeft.adapters import (
    initialize_kv_prefix_from_text as initialize_kv_prefix_from_text,
)
from fxpeft.adapters import (
    initialize_lora_ga as initialize_lora_ga,
)
from fxpeft.adapters import (
    inject as inject,
)
from fxpeft.adapters import (
    invoked as invoked,
)
from fxpeft.adapters import (
    load_adapter as load_adapter,
)
from fxpeft.adapters import (
    load_adapter_state_dict as load_adapter_state_dict,
)
from fxpeft.adapters import (
    loaded_adapters as loaded_adapters,
)
from fxpeft.adapters import (
    lora_fa_groups as lora_fa_groups,
)
from fxpeft.adapters import (
    lora_plus_groups as lora_plus_groups,
)
from fxpeft.adapters import (
    replicate_layers as replicate_layers,
)
from fxpeft.adapters import (
    save_adapter as save_adapter,
)
from fxpeft.adapters import (
    save_components as save_components,
)
from fxpeft.adapters import (
    scaled as scaled,
)
from fxpeft.adapters import (
    set_adapter as set_adapter,
)
from fxpeft.adapters import (
    set_requires_grad as set_requires_grad,
)
from fxpeft.adapters import (
    set_scale as set_scale,
)
from fxpeft.adapters import (
    trainable_parameters as trainable_parameters,
)
from fxpeft.checkpoint import (
    compose_cartridge_adapters as compose_cartridge_adapters,
)
from fxpeft.checkpoint import (
    infer_config as infer_config,
)
from fxpeft.checkpoint import (
    one_task as one_task,
)
from fxpeft.errors import (
    AdapterError as AdapterError,
)
from fxpeft.errors import (
    CheckpointError as CheckpointError,
)
from fxpeft.errors import (
    FxpeftError as FxpeftError,
)
from fxpeft.errors import (
    LockError as LockError,
)
from fxpeft.errors import (
    LockTimeout as LockTimeout,
)
from fxpeft.errors import (
    PassError as PassError,
)
from fxpeft.errors import (
    PatternError as PatternError,
)
from fxpeft.errors import (
    StoreTimeout as StoreTimeout,
)
from fxpeft.errors import (
    UnknownAdapter as UnknownAdapter,
)
from fxpeft.integrations.adopting import (
    adopt as adopt,
)
from fxpeft.integrations.peft import (
    PeftModel as PeftModel,
)
from fxpeft.integrations.peft import (
    get_peft_model as get_peft_model,
)
from fxpeft.integrations.transformers import (
    install as install,
)
from fxpeft.integrations.transformers import (
    installed as installed,
)
from fxpeft.integrations.transformers import (
    uninstall as uninstall,
)
from fxpeft.live_model import (
    Handle as Handle,
)
from fxpeft.live_model import (
    LiveModel as LiveModel,
)
from fxpeft.methods import (
    AdaLoraConfig as AdaLoraConfig,
)
from fxpeft.methods import (
    AdamssConfig as AdamssConfig,
)
from fxpeft.methods import (
    BdLoraConfig as BdLoraConfig,
)
from fxpeft.methods import (
    BeftConfig as BeftConfig,
)
from fxpeft.methods import (
    BOFTConfig as BOFTConfig,
)
from fxpeft.methods import (
    C3AConfig as C3AConfig,
)
from fxpeft.methods import (
    CartridgeConfig as CartridgeConfig,
)
from fxpeft.methods import (
    CordaConfig as CordaConfig,
)
from fxpeft.methods import (
    CPTConfig as CPTConfig,
)
from fxpeft.methods import (
    DeftConfig as DeftConfig,
)
from fxpeft.methods import (
    DeloraConfig as DeloraConfig,
)
from fxpeft.methods import (
    EvaConfig as EvaConfig,
)
from fxpeft.methods import (
    FourierFTConfig as FourierFTConfig,
)
from fxpeft.methods import (
    GloraConfig as GloraConfig,
)
from fxpeft.methods import (
    GraloraConfig as GraloraConfig,
)
from fxpeft.methods import (
    HiraConfig as HiraConfig,
)
from fxpeft.methods import (
    HRAConfig as HRAConfig,
)
from fxpeft.methods import (
    IA3Config as IA3Config,
)
from fxpeft.methods import (
    LNTuningConfig as LNTuningConfig,
)
from fxpeft.methods import (
    LoftQConfig as LoftQConfig,
)
from fxpeft.methods import (
    LoHaConfig as LoHaConfig,
)
from fxpeft.methods import (
    LoKrConfig as LoKrConfig,
)
from fxpeft.methods import (
    LoraConfig as LoraConfig,
)
from fxpeft.methods import (
    LoraGAConfig as LoraGAConfig,
)
from fxpeft.methods import (
    MissConfig as MissConfig,
)
from fxpeft.methods import (
    MultitaskPromptTuningConfig as MultitaskPromptTuningConfig,
)
from fxpeft.methods import (
    OFTConfig as OFTConfig,
)
from fxpeft.methods import (
    OSFConfig as OSFConfig,
)
from fxpeft.methods import (
    PrefixTuningConfig as PrefixTuningConfig,
)
from fxpeft.methods import (
    PromptEncoderConfig as PromptEncoderConfig,
)
from fxpeft.methods import (
    PromptTuningConfig as PromptTuningConfig,
)
from fxpeft.methods import (
    PsoftConfig as PsoftConfig,
)
from fxpeft.methods import (
    PveraConfig as PveraConfig,
)
from fxpeft.methods import (
    RandLoraConfig as RandLoraConfig,
)
from fxpeft.methods import (
    RoadConfig as RoadConfig,
)
from fxpeft.methods import (
    ShiraConfig as ShiraConfig,
)
from fxpeft.methods import (
    SupertuningConfig as SupertuningConfig,
)
from fxpeft.methods import (
    TinyLoraConfig as TinyLoraConfig,
)
from fxpeft.methods import (
    TrainableTokensConfig as TrainableTokensConfig,
)
from fxpeft.methods import (
    UniLoraConfig as UniLoraConfig,
)
from fxpeft.methods import (
    VBLoRAConfig as VBLoRAConfig,
)
from fxpeft.methods import (
    VeraConfig as VeraConfig,
)
from fxpeft.methods import (
    WaveFTConfig as WaveFTConfig,
)
from fxpeft.methods import (
    register as register,
)
from fxpeft.model import (
    roles as roles,
)
from fxpeft.passes import (
    pattern as pattern,
)
from fxpeft.planning import (
    Plan as Plan,
)
from fxpeft.planning import (
    apply as apply,
)
from fxpeft.planning import (
    plan as plan,
)
from fxpeft.programs import (
    Package as Package,
)
from fxpeft.programs import (
    Slots as Slots,
)
from fxpeft.programs import (
    adapter_inputs as adapter_inputs,
)
from fxpeft.programs import (
    compile as compile,
)
from fxpeft.programs import (
    eject as eject,
)
from fxpeft.programs import (
    open_package as open_package,
)
from fxpeft.programs import (
    package as package,
)
from fxpeft.programs import (
    rewrite as rewrite,
)
from fxpeft.serving import (
    AdapterStore as AdapterStore,
)
from fxpeft.serving import (
    hold as hold,
)
from fxpeft.serving import (
    hotswap as hotswap,
)
from fxpeft.serving import (
    prepare_hotswap as prepare_hotswap,
)
from fxpeft.serving import (
    release_hotswap as release_hotswap,
)
from fxpeft.serving import (
    remove as remove,
)
from fxpeft.serving import (
    rows as rows,
)
from fxpeft.serving import (
    tokens as tokens,
)
from fxpeft.transform import (
    add_weighted_adapter as add_weighted_adapter,
)
from fxpeft.transform import (
    convert as convert,
)
from fxpeft.transform import (
    fold as fold,
)
from fxpeft.transform import (
    folded as folded,
)
from fxpeft.transform import (
    folded_adapters as folded_adapters,
)
from fxpeft.transform import (
    merge_and_unload as merge_and_unload,
)
from fxpeft.transform import (
    refold as refold,
)
from fxpeft.transform import (
    unfold as unfold,
)

__version__: str
