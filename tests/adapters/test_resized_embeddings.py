"""New tokens: their rows are saved with the adapter as PEFT saves them, and a tied head reads them after a load."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file
from tiny import randomise, tiny_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.checkpoint import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
OLD, NEW = 40, 47
IDS = torch.tensor([[1, OLD + 2, 5, NEW - 1, 7], [3, 2, OLD, 8, 9]])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's folder."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_llama()
    model.config.tie_word_embeddings = request.param
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def resized(base: Path, seed: int) -> LlamaForCausalLM:
    """The base with rows for new tokens, which differ from one load to the next."""
    model = LlamaForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[OLD:] = torch.randn(NEW - OLD, 32)
        if not model.config.tie_word_embeddings:
            model.get_output_embeddings().weight[OLD:] = torch.randn(NEW - OLD, 32)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


def ours(base: Path, config: Any, folder: Path, **options: Any) -> Tensor:
    """Adds, saves and returns the outputs."""
    model = resized(base, 1)
    fxpeft.add_adapter(model, config)
    randomise(fxpeft.adapter_state_dict(model).values(), 3)
    fxpeft.save_adapter(model, folder, **options)
    return logits(model)


TARGETS = [["q_proj", "down_proj"], ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]]


@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_what_we_save_loads_here_and_in_peft_with_the_new_rows(base: Path, targets: list[str], tmp_path: Path) -> None:
    wanted = ours(base, LoraConfig(r=3, lora_alpha=5, target_modules=targets), tmp_path)
    fresh = resized(base, 2)
    assert not torch.allclose(logits(fresh), wanted)
    theirs = peft.PeftModel.from_pretrained(resized(base, 2), str(tmp_path)).eval()
    assert_close(logits(theirs), wanted)
    fxpeft.load_adapter(fresh, tmp_path)
    assert_close(logits(fresh), wanted)
    with fxpeft.disabled(fresh):
        assert torch.equal(logits(fresh), logits(resized(base, 2)))
    fxpeft.save_adapter(fresh, tmp_path / "again")
    again = resized(base, 4)
    fxpeft.load_adapter(again, tmp_path / "again")
    assert_close(logits(again), wanted)
    fxpeft.remove(fresh)
    assert torch.equal(logits(fresh), logits(resized(base, 2)))


@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_what_peft_saves_loads_here(base: Path, targets: list[str], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(resized(base, 1), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets)).eval()
    randomise((p for n, p in theirs.named_parameters() if "lora_" in n), 3)
    theirs.save_pretrained(str(tmp_path))
    wanted = logits(peft.PeftModel.from_pretrained(resized(base, 2), str(tmp_path)).eval())
    model = resized(base, 2)
    fxpeft.load_adapter(model, tmp_path)
    assert_close(logits(model), wanted)


def keys(folder: Path) -> set[str]:
    return {key.removeprefix("base_model.model.") for key in load_file(folder / WEIGHTS) if "lora_" not in key}


def test_the_keys_are_pefts(base: Path, tmp_path: Path) -> None:
    for number, targets in enumerate((["q_proj"], ["q_proj", "embed_tokens"])):
        theirs = peft.get_peft_model(resized(base, 1), peft.LoraConfig(target_modules=targets))
        for save in (True, False, "auto"):
            folder = tmp_path / f"{number}{save}"
            theirs.save_pretrained(str(folder / "peft"), save_embedding_layers=save)
            ours(base, LoraConfig(target_modules=targets), folder, save_embedding_layers=save)
            extra = {"lm_head.weight"} if targets[-1] == "embed_tokens" and save else set()  # PEFT drops the head's
            assert keys(folder) == keys(folder / "peft") | extra


def test_nothing_more_is_saved_where_nothing_was_resized(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]))
    fxpeft.save_adapter(model, tmp_path)
    assert keys(tmp_path) == set()
    unknown = tiny_llama()
    unknown.resize_token_embeddings(NEW)  # no base to compare with
    fxpeft.add_adapter(unknown, LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="no/such"))
    fxpeft.save_adapter(unknown, tmp_path / "unknown")
    assert keys(tmp_path / "unknown") == set()
    fxpeft.save_adapter(unknown, tmp_path / "asked", save_embedding_layers=True)
    assert keys(tmp_path / "asked") == {"lm_head.weight", "model.embed_tokens.weight"}


def test_modules_to_save_are_saved_once(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    ours(base, config, tmp_path, save_embedding_layers=True)
    assert keys(tmp_path) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_wrong_option_and_a_model_without_embeddings(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(AdapterError, match="save_embedding_layers: expected True, False or 'auto', found 'yes'"):
        fxpeft.save_adapter(model, tmp_path, save_embedding_layers="yes")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="doesn't say which its embeddings are"):
        fxpeft.save_adapter(model, tmp_path, save_embedding_layers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxpeft.save_adapter(model, tmp_path)


def test_a_base_in_another_dtype_needs_no_copy_of_its_own_embeddings(base: Path, tmp_path: Path) -> None:
    """The rows that were saved are the base's, rounded: no adapter's own, so that slots take it."""
    model = LlamaForCausalLM.from_pretrained(base)
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    fxpeft.save_adapter(model, tmp_path)
    assert keys(tmp_path) == {"model.embed_tokens.base_layer.weight"}
    for dtype in (torch.bfloat16, torch.float32):
        served = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
        fxpeft.prepare_hotswap(served, 4, targets=["embed_tokens"])
        fxpeft.load_adapter(served, tmp_path)


def test_through_transformers(base: Path, tmp_path: Path) -> None:
    """``save_pretrained`` and ``load_adapter`` after ``install()``."""
    fxpeft.install()
    try:
        model = resized(base, 1)
        model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], base_model_name_or_path=str(base)))
        randomise(fxpeft.adapter_state_dict(model).values(), 3)
        wanted = logits(model)
        model.save_pretrained(tmp_path)
        assert keys(tmp_path) == {"lm_head.weight", "model.embed_tokens.weight"}
        again = resized(base, 2)
        again.load_adapter(str(tmp_path))
        assert_close(logits(again), wanted)
    finally:
        fxpeft.uninstall()
