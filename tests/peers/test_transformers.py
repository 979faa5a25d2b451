"""``install`` beside PEFT: the same program through Transformers' own integration, results and files compared."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from families import FAMILIES, first_output
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONFIG: dict[str, Any] = {
    "r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 7},
    "alpha_pattern": {"v_proj": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # transformers 5.24 asks for PEFT 0.22, which isn't published; but for that number its integration's code is that of
    # 5.23, which PEFT 0.21 serves
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.17.0")
    yield
    fxpeft.uninstall()


def output(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return first_output(model(**FAMILIES[family].inputs()))


def program(config_class: Any, folder: Path, family: str) -> list[Tensor]:
    """A user's program. It differs between the libraries by the class of the config alone."""
    targets = FAMILIES[family].targets
    model = FAMILIES[family].build()
    model.add_adapter(
        config_class(
            r=4, lora_alpha=10, target_modules=targets, rank_pattern={targets[0]: 3}, alpha_pattern={targets[1]: 7}
        )
    )
    tensors = model.get_adapter_state_dict()
    randomise((tensors[key] for key in sorted(tensors)), seed=1)
    outputs = [output(model, family)]
    model.save_pretrained(folder / "a")
    model.add_adapter(config_class(r=2, target_modules=FAMILIES[family].targets), "other")
    outputs.append(output(model, family))
    model.set_adapter("default")
    outputs.append(output(model, family))
    model.disable_adapters()
    outputs.append(output(model, family))
    model.enable_adapters()
    outputs.append(output(model, family))
    loaded = FAMILIES[family].build()
    info = loaded.load_adapter(str(folder / "a"), adapter_name="loaded")
    assert type(info).__name__ == "LoadStateDictInfo"
    outputs.append(output(loaded, family))
    return outputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "whisper", "vit", "qwen3 moe"])
def test_the_same_program(family: str, tmp_path: Path) -> None:
    theirs = program(peft.LoraConfig, tmp_path / "theirs", family)
    fxpeft.install()
    ours = program(fxpeft.LoraConfig, tmp_path / "ours", family)
    for step, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(mine, their, message=str(step))
    # PEFT's own config objects are taken too
    for mine, their in zip(program(peft.LoraConfig, tmp_path / "taken", family), theirs, strict=True):
        assert_close(mine, their)
    # files, both ways
    model = FAMILIES[family].build()
    model.load_adapter(str(tmp_path / "theirs" / "a"))
    assert_close(output(model, family), theirs[0])
    fxpeft.uninstall()
    model = FAMILIES[family].build()
    info = model.load_adapter(str(tmp_path / "ours" / "a"))
    assert not info.missing_keys
    assert_close(output(model, family), theirs[0])


def test_peft_model_loads_what_save_pretrained_wrote(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    fxpeft.install()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(fxpeft.LoraConfig(**CONFIG, modules_to_save=["lm_head"]))
    randomise(model.get_adapter_state_dict().values())
    model.save_pretrained(tmp_path / "adapter")
    expected = model.eval()(token_ids()).logits
    fxpeft.uninstall()
    wrapped = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_close(wrapped(token_ids()).logits, expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_close(theirs(token_ids()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_training_flags_of_a_loaded_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    """dtype, requires_grad and evaluation mode of a loaded adapter are what Transformers makes them."""

    def look(train: bool, again: bool) -> tuple[Any, ...]:
        model = tiny_llama(dtype).train()
        model.load_adapter(str(tmp_path), "a", is_trainable=train)
        if again:
            model.set_adapter("a")
        tensors = model.get_adapter_state_dict()
        trained = {p.requires_grad for n, p in model.named_parameters() if "lora_A" in n}
        return sorted(tensors), {v.dtype for v in tensors.values()} if not train else None, trained, model.training

    fxpeft.install()
    source = tiny_llama()
    source.add_adapter(fxpeft.LoraConfig(**CONFIG))
    source.save_pretrained(tmp_path)
    cases = [(False, False), (True, False), (False, True)]
    ours = [look(*case) for case in cases]
    fxpeft.uninstall()
    assert ours == [look(*case) for case in cases]


def test_a_model_that_peft_has_adapted_stays_peft_s(tmp_path: Path) -> None:
    before, wrapped = tiny_llama(), peft.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIG))
    before.add_adapter(peft.LoraConfig(**CONFIG), "p")
    expected = before(token_ids()).logits
    fxpeft.install()
    assert before._hf_peft_config_loaded
    assert before.active_adapters() == ["p"]
    assert list(before.peft_config) == ["p"]
    before.disable_adapters()
    before.enable_adapters()
    before.save_pretrained(tmp_path / "theirs")
    before.delete_adapter("p")
    assert not before._hf_peft_config_loaded
    assert not hasattr(before, "peft_config")
    assert wrapped.active_adapters == ["default"]
    wrapped.save_pretrained(tmp_path / "wrapped")
    late = tiny_llama()
    late_wrapped = peft.get_peft_model(late, peft.LoraConfig(**CONFIG))
    assert list(late_wrapped.base_model.model.peft_config) == ["default"]
    assert torch.equal(late_wrapped.unload()(token_ids()).logits, tiny_llama()(token_ids()).logits)
    model = tiny_llama()
    model.load_adapter(str(tmp_path / "theirs"))
    assert_close(model(token_ids()).logits, expected, terms=1)
    model.load_adapter(str(tmp_path / "wrapped"), "w")
    assert model.active_adapters() == ["w"]


def test_what_transformers_own_hotswap_gets_wrong(tmp_path: Path) -> None:
    """Why this file's neighbour exists: Transformers' hotswap keeps the old alpha, ours takes the new one's."""
    for name, alpha in (("a", 4), ("b", 40)):
        fxpeft.install()
        model = tiny_llama()
        model.add_adapter(fxpeft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"]))
        randomise(model.get_adapter_state_dict().values(), seed=alpha)
        model.save_pretrained(tmp_path / name)
        expected = model.eval()(token_ids()).logits
        fxpeft.uninstall()

    def swapped() -> Tensor:
        model = tiny_llama()
        model.enable_peft_hotswap(target_rank=8)
        model.load_adapter(str(tmp_path / "a"), adapter_name="default")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_adapter(str(tmp_path / "b"), adapter_name="default")
        out: Tensor = model(token_ids()).logits
        return out

    theirs = swapped()
    fxpeft.install()
    assert_close(swapped(), expected)
    assert not torch.allclose(theirs, expected, atol=1e-2)
