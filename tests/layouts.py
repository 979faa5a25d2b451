"""What adapters' files come as, and onto what: one line each, run by test_layouts and shown in the guide's table.

A new ability is a new line in one of the groups of :data:`ROWS`.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from families import FAMILIES
from peer_versions import LORA_ONLY, STACKS
from safetensors.torch import load_file, save_file
from tiny import conv_net, randomise, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from vision_language import MODELS as VISION_LANGUAGE

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Row:
    """One layout.

    Args:
        write: writes the two files into a folder and gives the outputs of the model that PEFT makes of them, or
            made of them on the Transformers of their time.
        base: a bare model. run: its outputs.
        skips: letters of the checks that make no sense here, see test_layouts. why: the reason.
        since: the least minor release that takes part, and what those before it do.
        wrap: what is put around the model before it gets the adapter. after: what is done to it when it has that.
    """

    write: Callable[[Path], Tensor]
    base: Callable[[], Any] = tiny_llama
    run: Callable[[Any], Tensor] = lambda model: model(token_ids()).logits
    skips: str = ""
    why: str = ""
    wrap: Callable[[Any], Any] = lambda model: model
    after: Callable[[Any], Any] = lambda model: model
    since: tuple[int, str] = (17, "is not tried")


@torch.no_grad()
def trained(base: Callable[[], Any], config: Any) -> Any:
    """PEFT's model with random values in all that an adapter has; gains and magnitudes around one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(base(), copy.deepcopy(config)).eval()
    randomise((p for p in model.parameters() if p.requires_grad), seed=4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("magnitude" in name or "ia3" in name):
            parameter.add_(1)
    return model


def by_peft(
    config: Any,
    base: Callable[[], Any] = tiny_llama,
    run: Callable[[Any], Tensor] | None = None,
    *,
    of: Callable[[], Any] | None = None,
    saved: Mapping[str, Any] | None = None,
    **options: Any,
) -> Row:
    """What PEFT writes today.

    Args:
        of: the base that it was trained on, where that is another one. saved: how it is saved.
    """
    shown = run or Row.run

    def write(folder: Path) -> Tensor:
        model = trained(of or base, config)
        model.save_pretrained(str(folder), **(saved or {}))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return shown(peft.PeftModel.from_pretrained(base(), str(folder)).eval())

    return Row(write, base, shown, **options)


def changed(
    row: Row,
    *,
    keys: Callable[[str], str] = lambda key: key,
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config,
    **options: Any,
) -> Row:
    """The same with other keys, or another config."""

    def write(folder: Path) -> Tensor:
        wanted = row.write(folder)
        save_file({keys(k): v for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
        path = folder / CONFIG
        path.write_text(json.dumps(config(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
        return wanted

    return Row(write, row.base, row.run, **options)


LORA = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
PATTERNS = peft.LoraConfig(
    r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], rank_pattern={"0.self_attn.q_proj": 5},
    alpha_pattern={"down_proj": 4},
)  # fmt: skip
PLAIN = by_peft(LORA)

# --- configs: the fields that each release of PEFT wrote for a LoRA, with the defaults of that time ---

_FIRST: dict[str, Any] = dict.fromkeys((
    "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "r", "target_modules", "task_type",
))  # fmt: skip
_ADDED: dict[str, dict[str, Any]] = {
    "0.3": {"init_lora_weights": True},
    "0.4, 0.5": {"auto_mapping": None, "revision": None, "layers_to_transform": None, "layers_pattern": None},
    "0.6": {"rank_pattern": {}, "alpha_pattern": {}},
    "0.7": {"megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {}},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10 to 0.13": {"layer_replication": None},
    "0.14": {"exclude_modules": None, "eva_config": None, "lora_bias": False},
    "0.15": {"trainable_token_indices": None, "corda_config": None},
    "0.16": {"use_qalora": False, "qalora_group_size": 16},
    "0.17": {"target_parameters": None},
    "0.18": {
        "peft_version": "0.18.0", "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False,
    },
    "0.19": {"peft_version": "0.19.0", "lora_ga_config": None, "use_bdlora": None},
    "0.20": {"peft_version": "0.20.0", "velora_config": None, "monteclora_config": None},
}  # fmt: skip


def _of_release(fields: Mapping[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def config(written: dict[str, Any]) -> dict[str, Any]:
        version = {k: v for k, v in fields.items() if k == "peft_version"}
        return {**{name: written.get(name, default) for name, default in fields.items()}, **version}

    return config


def _releases() -> dict[str, Row]:
    first = {**_FIRST, "merge_weights": False, "enable_lora": None}
    rows, fields = {"0.2": changed(PLAIN, config=_of_release(first))}, dict(_FIRST)
    for release, added in _ADDED.items():
        fields |= added
        source = by_peft(PATTERNS) if "rank_pattern" in fields else PLAIN
        rows[release] = changed(source, config=_of_release(fields))
    return {f"PEFT {release}": row for release, row in rows.items()} | {"PEFT 0.21": by_peft(PATTERNS)}


def _with(**fields: Any) -> Row:
    return changed(by_peft(PATTERNS), config=lambda config: {**config, **fields})


ODD: dict[str, Row] = {
    "a null where a field has a default": _with(
        loftq_config=None, megatron_core=None, use_dora=None, lora_dropout=None, fan_in_fan_out=None
    ),
    "integers written as floats (`8.0`)": _with(r=3.0, lora_alpha=7.0),
    "fields of a later PEFT": _with(peft_version="0.30.0", some_new_method=True),
}


# --- what the keys of the tensors look like ---


def _in_memory(key: str) -> str:
    return re.sub(r"(lora_\w+)", r"\1.default", key)


KEYS: dict[str, Row] = {
    "as PEFT writes them": PLAIN,
    "without `base_model.model.`": changed(PLAIN, keys=lambda key: key.removeprefix(PREFIX)),
    "`lora_A.default.weight`: PEFT's modules in memory": changed(PLAIN, keys=_in_memory),
    "`base_model.model._orig_mod.`: a compiled model": changed(
        PLAIN, keys=lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod.")
    ),
    "`layers.0._orig_mod.`: compiled blocks": changed(
        PLAIN, keys=lambda key: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", key)
    ),
    "`module.base_model.model.`: DDP around PEFT": changed(PLAIN, keys=lambda key: f"module.{key}"),
    "`base_model.model.module.`: PEFT around DDP": changed(
        PLAIN, keys=lambda key: key.replace(PREFIX, f"{PREFIX}module.")
    ),
}


# --- what an adapter is made of ---


def _convolved(model: Any) -> Tensor:
    found: Tensor = model(torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)))
    return found


def _classified(model: Any) -> Tensor:
    found: Tensor = model(token_ids()).logits
    return found


NO_METHOD = "Transformers' `load_adapter` is a method of its models"
NO_PROMPTS = "Transformers' methods take no prompt learning, with PEFT neither"
ADAPTERS: dict[str, Row] = {
    "LoRA, `rank_pattern`, `alpha_pattern`": by_peft(PATTERNS),
    "rsLoRA": by_peft(peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=r".*\.[qv]_proj")),
    "DoRA": by_peft(peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=["v_proj", "up_proj"])),
    "`lora_bias`": by_peft(peft.LoraConfig(r=3, lora_alpha=7, lora_bias=True, target_modules=["o_proj"])),
    "`bias=\"all\"`, `Conv1D`": by_peft(
        peft.LoraConfig(r=3, lora_alpha=7, bias="all", target_modules=["c_attn"]), tiny_gpt2
    ),
    "`bias=\"lora_only\"`": by_peft(
        peft.LoraConfig(r=3, lora_alpha=7, bias="lora_only", target_modules=["c_fc"]), tiny_gpt2,
        since=LORA_ONLY,
    ),
    "embeddings": by_peft(peft.LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens", "q_proj"])),
    "`modules_to_save`, a classifier's head": by_peft(
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query"], task_type="SEQ_CLS"), tiny_bert, _classified
    ),
    "convolutions": by_peft(
        peft.LoraConfig(r=4, lora_alpha=7, target_modules=["line", "grouped", "space"]), conv_net, _convolved,
        skips="T", why=NO_METHOD,
    ),
    "`target_parameters`: fused experts": by_peft(
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
        FAMILIES["mixtral"].build, since=STACKS,
    ),
    "IA3": by_peft(
        peft.IA3Config(target_modules=["v_proj", "o_proj", "down_proj"], feedforward_modules=["o_proj", "down_proj"])
    ),
    "prompt tuning": by_peft(
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), skips="T", why=NO_PROMPTS
    ),
    "p-tuning": by_peft(
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=9), skips="T",
        why=NO_PROMPTS,
    ),
    "prefix tuning": by_peft(
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), skips="T", why=NO_PROMPTS
    ),
}  # fmt: skip


# --- what lies in the folder ---


def resized() -> Any:
    """Seven more tokens, new ones."""
    model = tiny_llama()
    model.resize_token_embeddings(47, mean_resizing=False)
    return model


def trained_tokens() -> Any:
    """The same with rows that were trained."""
    model = resized()
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            randomise([table.weight[40:]], seed=8)
    return model


def _with_new_tokens(model: Any) -> Tensor:
    ids = token_ids()
    ids[:, -2:] = torch.tensor([44, 46])
    found: Tensor = model(ids).logits
    return found


FILES: dict[str, Row] = {
    "`adapter_model.safetensors`": PLAIN,
    "`adapter_model.bin`": by_peft(PATTERNS, saved={"safe_serialization": False}),
    "with the embeddings of a resized vocabulary": by_peft(LORA, resized, _with_new_tokens, of=trained_tokens),
}


# --- the base's names when the adapter was trained ---


def _before_4_52(name: str) -> Row:
    family = VISION_LANGUAGE[name]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=list(family.targets))
    row = by_peft(config, family.build, lambda model: model(**family.inputs()).logits)
    return changed(row, keys=lambda key: PREFIX + family.old(key.removeprefix(PREFIX)))


MODELS: dict[str, Row] = {f"{name}, trained before Transformers 4.52": _before_4_52(name) for name in VISION_LANGUAGE}


# --- onto what ---


def _half(dtype: torch.dtype) -> Row:
    return by_peft(PATTERNS, lambda: tiny_llama(dtype))


def _filled(model: Any) -> Any:
    """Give a base that was on the meta device its weights, and the buffers that no file has."""
    bare = tiny_llama()
    model.load_state_dict(bare.state_dict(), strict=False, assign=True)
    for name, buffer in bare.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer
    return model


BASES: dict[str, Row] = {
    "float32": by_peft(PATTERNS),
    "bfloat16": _half(torch.bfloat16),
    "float16": _half(torch.float16),
    "tied embeddings": by_peft(peft.LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "c_fc"]), tiny_gpt2),
    "meta, its weights come later": by_peft(
        PATTERNS,
        wrap=lambda model: model.to("meta"),
        after=_filled,
        skips="ST",
        why="slots are made beside the weights; Transformers loads a base before its adapters",
    ),
}


def _compiled_blocks(model: Any) -> Any:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


def _checkpointed_blocks(model: Any) -> Any:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    return model


def _ddp(model: Any) -> Any:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


WRAPPED = "the wrapper has no such method: call it on the model inside"
WRAPPERS: dict[str, Row] = {
    "`torch.compile(model)`": by_peft(
        PATTERNS, wrap=lambda model: torch.compile(model, backend="eager"), skips="T", why=WRAPPED
    ),
    "blocks compiled one by one": by_peft(PATTERNS, wrap=_compiled_blocks),
    "blocks in torch's activation checkpoints": by_peft(PATTERNS, wrap=_checkpointed_blocks),
    "`DistributedDataParallel`": by_peft(PATTERNS, wrap=_ddp, skips="T", why=WRAPPED),
    "`DataParallel`": by_peft(PATTERNS, wrap=nn.DataParallel, skips="T", why=WRAPPED),
    "`AveragedModel`": by_peft(PATTERNS, wrap=torch.optim.swa_utils.AveragedModel, skips="T", why=WRAPPED),
}

ROWS: dict[str, dict[str, Row]] = {
    "`adapter_config.json` of": _releases(),
    "`adapter_config.json` with": ODD,
    "in the folder": FILES,
    "keys": KEYS,
    "an adapter's parts": ADAPTERS,
    "the base's older names": MODELS,
    "the base": BASES,
    "around the base": WRAPPERS,
}
