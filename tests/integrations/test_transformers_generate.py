"""``generate`` in its ways, ``model.compile()`` and ``pipeline``, with an adapter and in hotswap slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import save_each
from tiny import tiny_llama, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import fxpeft
from fxpeft.testing import count_graphs

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 30, "target_modules": ["q_proj", "v_proj", "down_proj"]}
OTHER: dict[str, Any] = {"r": 7, "lora_alpha": 40, "target_modules": ["k_proj", "o_proj", "up_proj"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    configs = {str(i): fxpeft.LoraConfig(**config) for i, config in enumerate((CONFIG, OTHER))}
    return [*save_each(tiny_llama, configs, tmp_path_factory.mktemp("adapters")).values()]


def merged(folder: str) -> Any:
    """The adapter multiplied into the weights by hand: what any way of generating has to agree with."""
    model = tiny_llama()
    fxpeft.load_adapter(model, folder)
    config, tensors = fxpeft.adapter_config(model), fxpeft.adapter_state_dict(model)
    fxpeft.remove(model)
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            update = tensors[key.replace("lora_A", "lora_B")] @ a * (config.lora_alpha / config.r)
            model.get_submodule(site).weight.data += update
    return model


def generate(model: Any, **arguments: Any) -> Tensor:
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(token_ids(1), **{**settings, **arguments})


WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beam search": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 5},
}


@pytest.mark.parametrize("slots", [False, True], ids=["parameters", "slots"])
@pytest.mark.parametrize("way", WAYS)
def test_generate(folders: list[str], way: str, slots: bool) -> None:
    model = tiny_llama()
    bare = generate(model)
    if slots:
        model.enable_peft_hotswap(target_rank=8)
    for folder in folders:
        model.load_adapter(folder, "default", hotswap=folder != folders[0])
        reference = merged(folder)
        torch.manual_seed(1)
        found = generate(model, **WAYS[way])
        torch.manual_seed(1)
        assert torch.equal(found, generate(reference, **WAYS[way]))
        assert way == "sampling" or not torch.equal(found[:1], bare)


def test_assisted_decoding(folders: list[str]) -> None:
    model, assistant = tiny_llama(), tiny_llama()
    model.load_adapter(folders[0])
    assistant.load_adapter(folders[1])
    assert torch.equal(generate(model, assistant_model=assistant), generate(merged(folders[0])))
    assert torch.equal(generate(model, prompt_lookup_num_tokens=2), generate(merged(folders[0])))


def test_model_compile_and_swap(folders: list[str]) -> None:
    """``model.compile()`` in place, then ``generate`` and swaps: new shapes of the text compile, swaps don't."""
    model = tiny_llama()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(folders[0], "default")
    model.compile(backend="eager", dynamic=True)
    expected = [generate(merged(folder)) for folder in folders]
    assert torch.equal(generate(model), expected[0])
    with count_graphs() as count, torch.compiler.set_stance("fail_on_recompile"):
        for index in (1, 0, 1):
            model.load_adapter(folders[index], "default")
            assert torch.equal(generate(model), expected[index])
    assert count.graphs == 0


def test_static_cache_with_a_compiled_forward(folders: list[str]) -> None:
    model = tiny_llama()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(folders[0], "default")
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    expected = [generate(merged(folder)) for folder in folders]
    assert torch.equal(generate(model, cache_implementation="static"), expected[0])
    with count_graphs() as count, torch.compiler.set_stance("fail_on_recompile"):
        for index in (1, 0):
            model.load_adapter(folders[index], "default")
            assert torch.equal(generate(model, cache_implementation="static"), expected[index])
    assert count.graphs == 0


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(40)}
    fast = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="w0", pad_token="w0", eos_token="w39")


def test_pipeline(folders: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(folders[0])
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}

    def text(**source: Any) -> str:
        return pipeline("text-generation", device="cpu", **source)("w3 w5 w8", **arguments)[0]["generated_text"]

    expected = text(model=merged(folders[0]), tokenizer=tokenizer)
    assert text(model=model, tokenizer=tokenizer) == expected
    assert text(model=str(base), tokenizer=tokenizer) != expected
    # an adapter's folder alone: the base it names is loaded, its tokenizer too
    model.save_pretrained(tmp_path / "adapter")
    assert text(model=str(tmp_path / "adapter"), tokenizer=tokenizer) == expected
    assert text(model=str(tmp_path / "adapter")) == expected
