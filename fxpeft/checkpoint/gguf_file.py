"""A plain LoRA as GGUF, which llama.cpp loads, in the layout of its ``convert_lora_to_gguf.py`` (November 2026).

Its names come from the package ``gguf``. What is not a matter of names follows the converters of the base's weights
(llama.cpp, ``conversion/``): where those order the rows of q and k by pairs of rotary embedding, an update's B is
ordered alike. Architectures whose converters do more to what LoRAs adapt are refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
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
TEXT = "model.language_model."  # where a model of images has its language model


HEAD = {"lm_head": "llama.cpp has none of it: token_embd is its head too"}
ORDERED = {"query_key_value": "llama.cpp has its rows in another order"}
PARTED = {"input_linear": "llama.cpp has it in two"}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of a base.

    Args:
        name: its word for it. pairs: rows of q and k are ordered by pairs. left: sites of the base that it changes or
            leaves out, by their last names -> why. text: model types of its language model, where it may have another.
    """

    name: str
    pairs: bool = False
    left: Mapping[str, str] = field(default_factory=dict)
    text: tuple[str, ...] = ()


GEMMA3 = Architecture("gemma3", left={**HEAD, "embed_tokens": "llama.cpp has it with other rows"})
#: whose converters in llama.cpp's ``conversion/`` do nothing to what LoRAs adapt but rename, and ``permute``
ARCHITECTURES: Mapping[str, Architecture] = {
    **{
        named: Architecture(name, pairs=True)
        for named, name in {
            "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "MixtralForCausalLM": "llama",
            "Ministral3ForCausalLM": "mistral3", "SmolLM3ForCausalLM": "smollm3", "ArceeForCausalLM": "arcee",
            "GraniteForCausalLM": "granite", "OlmoForCausalLM": "olmo",
        }.items()
    },
    **{
        named: Architecture(name)
        for named, name in {
            "Qwen2ForCausalLM": "qwen2", "Qwen2MoeForCausalLM": "qwen2moe", "Qwen3ForCausalLM": "qwen3",
            "Qwen3MoeForCausalLM": "qwen3moe", "Qwen2VLForConditionalGeneration": "qwen2vl",
            "Qwen2_5_VLForConditionalGeneration": "qwen2vl", "Qwen3VLForConditionalGeneration": "qwen3vl",
            "Olmo2ForCausalLM": "olmo2", "Olmo3ForCausalLM": "olmo2", "OlmoeForCausalLM": "olmoe",
            "ApertusForCausalLM": "apertus", "PhiForCausalLM": "phi2", "Phi3ForCausalLM": "phi3",
            "Starcoder2ForCausalLM": "starcoder2", "StableLmForCausalLM": "stablelm", "CohereForCausalLM": "command-r",
            "Cohere2ForCausalLM": "cohere2", "GlmForCausalLM": "chatglm", "Glm4ForCausalLM": "glm4",
            "Glm4MoeForCausalLM": "glm4moe", "Exaone4ForCausalLM": "exaone4", "ExaoneMoeForCausalLM": "exaone-moe",
            "NemotronForCausalLM": "nemotron", "SeedOssForCausalLM": "seed_oss", "Ernie4_5ForCausalLM": "ernie4_5",
            "Ernie4_5_MoeForCausalLM": "ernie4_5-moe", "HunYuanDenseV1ForCausalLM": "hunyuan-dense",
            "HunYuanMoEV1ForCausalLM": "hunyuan-moe", "Lfm2ForCausalLM": "lfm2", "GptOssForCausalLM": "gpt-oss",
            "GPT2LMHeadModel": "gpt2",
        }.items()
    },
    **{
        named: Architecture(name, left=ORDERED)
        for named, name in {
            "GPTNeoXForCausalLM": "gptneox", "BloomForCausalLM": "bloom", "FalconForCausalLM": "falcon",
        }.items()
    },
    "GraniteMoeForCausalLM": Architecture("granitemoe", pairs=True, left=PARTED),
    "GraniteMoeSharedForCausalLM": Architecture("granitemoe", pairs=True, left=PARTED),
    "Mistral3ForConditionalGeneration": Architecture("mistral3", pairs=True, text=("mistral", "ministral3")),
    "GemmaForCausalLM": Architecture("gemma", left=HEAD),
    "Gemma2ForCausalLM": Architecture("gemma2", left=HEAD),
    "Gemma3ForCausalLM": GEMMA3, "Gemma3ForConditionalGeneration": GEMMA3,
}  # fmt: skip
LATENT = "the product that makes keys and values is taken apart into heads there"
LINEAR = "the rows of its linear attention are in another order there"
SCALED = "its multipliers are multiplied into the weights there"
#: what llama.cpp makes more of than other names, and rows ordered by pairs
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"), LATENT),
    **dict.fromkeys(
        ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3_5ForConditionalGeneration"),
        LINEAR,
    ),
    "FalconH1ForCausalLM": SCALED,
    "BitNetForCausalLM": "its weights are rounded to -1, 0 and 1 there, beside an update that is not",
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
    known, text = ARCHITECTURES.get(named), base.get_text_config()
    if known is None or (known.text and text.model_type not in known.text):
        why = REFUSED.get(named) or f"expected a base of {', '.join(ARCHITECTURES)}, found {short(named)}"
        raise AdapterError(
            f"{found.source}: GGUF: {f'{named}: ' if named in REFUSED else ''}{why}: give the folder that --for "
            "llama.cpp writes to llama.cpp's own converter of LoRAs"
        )
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    names = gguf.get_tensor_name_map(architecture, text.num_hidden_layers)
    tied = any(getattr(config, "tie_word_embeddings", False) for config in (base, text))
    left = {**(HEAD if tied else {}), **known.left}
    tensors, problems = dict[str, Tensor](), list[str]()
    for site, own in site_tensors(found)[0].items():
        last = site.rpartition(".")[2]
        name = names.get_name(f"{site.replace(TEXT, 'model.', 1)}.weight", try_suffixes=(".weight",))
        if last in left:
            problems.append(f"{site}: {left[last]}")
            continue
        if name is None or name.startswith("position_embd"):
            problems.append(
                f"{site}: {known.name} has {'no weight of the name' if name is None else 'no update of it'}"
            )
            continue
        try:
            a, b = own["lora_A"], _ordered(own["lora_B"], last, text) if known.pairs else own["lora_B"]
        except PassError as error:
            problems.append(f"{site}: {error}")
            continue
        tensors |= {f"{name}.lora_a": a.t() if name.startswith("token_embd") else a, f"{name}.lora_b": b}
    if problems:
        raise AdapterError(f"{found.source}: GGUF has no place for\n{listing(problems)}\nleave them out of the adapter")
    replace_files({path: _content(gguf, known.name, found.config, tensors)})


def _ordered(b: Tensor, last: str, text: Any) -> Tensor:
    """B ``[out, rank]`` with the rows of each head in the order of pairs, as llama.cpp's ``permute`` has the base's."""
    own = text.num_key_value_heads or text.num_attention_heads
    heads = {"q_proj": text.num_attention_heads, "k_proj": own}.get(last)
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
