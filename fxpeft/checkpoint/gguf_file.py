"""A plain LoRA as GGUF, which llama.cpp loads, in the layout of its ``convert_lora_to_gguf.py`` (November 2026).

Its names come from the package ``gguf``. What is not a matter of names follows the converters of the base's weights
(llama.cpp, ``conversion/``): where those order the rows of q and k by pairs of rotary embedding, an update's B is
ordered alike. Architectures whose converters do more to what LoRAs adapt are refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxpeft.checkpoint.adapter_file import site_tensors
from fxpeft.checkpoint.reading import Checkpoint
from fxpeft.errors import AdapterError, listing, short
from fxpeft.files import replace_files
from fxpeft.passes.base import PassError

SUFFIX = ".gguf"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of a base.

    Args:
        name: its word for it. pairs: rows of q and k are ordered by pairs. left: sites of the base that it changes or
            leaves out, by their last names.
    """

    name: str
    pairs: bool = False
    left: tuple[str, ...] = ()


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", pairs=True),
    "MistralForCausalLM": Architecture("llama", pairs=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", pairs=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma", left=("lm_head",)),
    "Gemma2ForCausalLM": Architecture("gemma2", left=("lm_head",)),
    "Gemma3ForCausalLM": Architecture("gemma3", left=("lm_head", "embed_tokens")),
}


def write_gguf(path: Path, found: Checkpoint, base: Any) -> None:
    """Write a LoRA of one rank and the scale 1, as :func:`fxpeft.checkpoint.engines.for_engine` gives it.

    Args:
        base: the base model's config (Transformers').

    Raises:
        AdapterError: ``gguf`` isn't installed, an architecture that isn't known here, or a site that has no place.
    """
    try:
        import gguf
    except ImportError:
        raise AdapterError("GGUF needs the package gguf: pip install 'fxpeft[gguf]'") from None
    named = (getattr(base, "architectures", None) or [""])[0]
    known = ARCHITECTURES.get(named)
    if known is None:
        raise AdapterError(
            f"{found.source}: GGUF: expected a base of {', '.join(ARCHITECTURES)}, found {short(named)}: give the "
            "folder that --for llama.cpp writes to llama.cpp's own converter of LoRAs"
        )
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    names = gguf.get_tensor_name_map(architecture, base.num_hidden_layers)
    tensors, problems = dict[str, Tensor](), list[str]()
    for site, own in site_tensors(found)[0].items():
        last, tied = site.rpartition(".")[2], getattr(base, "tie_word_embeddings", False)
        name = names.get_name(f"{site}.weight", try_suffixes=(".weight",))
        if last in known.left or (tied and last == "lm_head"):
            problems.append(f"{site}: llama.cpp has no such weight, or another one, of {named}")
            continue
        if name is None:
            problems.append(f"{site}: {known.name} has no weight of the name")
            continue
        try:
            a, b = own["lora_A"], _ordered(own["lora_B"], last, base) if known.pairs else own["lora_B"]
        except PassError as error:
            problems.append(f"{site}: {error}")
            continue
        tensors |= {f"{name}.lora_a": a.t() if name.startswith("token_embd") else a, f"{name}.lora_b": b}
    if problems:
        raise AdapterError(f"{found.source}: GGUF has no place for\n{listing(problems)}\nleave them out of the adapter")
    replace_files({path: _content(gguf, known.name, found.config, tensors)})


def _ordered(b: Tensor, last: str, base: Any) -> Tensor:
    """B ``[out, rank]`` with the rows of each head in the order of pairs, as llama.cpp's ``permute`` has the base's."""
    heads = {"q_proj": base.num_attention_heads, "k_proj": base.num_key_value_heads or base.num_attention_heads}.get(
        last
    )
    if heads is None:
        return b
    if len(b) % (2 * heads):
        raise PassError(f"{len(b)} rows aren't pairs of {heads} heads")
    return b.view(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _content(gguf: Any, architecture: str, config: Any, tensors: Mapping[str, Tensor]) -> bytes:
    half = all(tensor.dtype is torch.float16 for tensor in tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.gguf")
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config.lora_alpha))
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
        if tokens := config.alora_invocation_tokens:
            kinds = gguf.GGUFValueType
            writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, tokens, kinds.ARRAY, kinds.UINT32)
        for name, tensor in tensors.items():
            own = tensor.detach().cpu().to(torch.float16 if half else torch.float32)
            writer.add_tensor(name, own.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
