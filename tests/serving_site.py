"""A tiny Llama with a tokenizer of words, in a folder, and adapters for it; what each answers alone, greedy."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import torch
from adapter_files import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fxpeft

WORDS = ["<end>", "<unk>", "user", "assistant", *(f"w{number}" for number in range(60))]
TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}assistant"


def base() -> LlamaForCausalLM:
    return copy.deepcopy(_base())


@cache
def _base() -> LlamaForCausalLM:
    """Made once: a server's thread may draw random numbers meanwhile, which are the process's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=128, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", chat_template=TEMPLATE)


def write(root: Path, count: int) -> None:
    """``root/model``, and ``root/adapters/a0``, ``a1``, ..., of ranks 1 to 5 at different targets; a7 with a head."""
    base().save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    for number in range(count):
        targets = [["q_proj", "down_proj"], ["v_proj", "up_proj", "o_proj"], ["k_proj", "gate_proj"]][number % 3]
        config = fxpeft.LoraConfig(
            r=1 + number % 5, lora_alpha=64, target_modules=targets, use_rslora=number % 2 == 1,
            modules_to_save=["lm_head"] if number == 7 else None,
        )  # fmt: skip
        save(base(), config, root / "adapters" / f"a{number}", seed=number)


@torch.no_grad()
def alone(folder: Path | None, ids: list[int], made: int, scale: float = 1.0) -> list[int]:
    """The tokens that a freshly loaded adapter makes after these, each the likeliest."""
    model = base()
    if folder is not None:
        fxpeft.load_adapter(model, folder)
        if scale != 1:  # a prompt has none
            fxpeft.set_scale(model, "default", scale)
    row = torch.tensor([ids])
    for _ in range(made):
        row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    return row[0, -made:].tolist()  # type: ignore[no-any-return]
