"""Soft prompts in a live model: coming and going, training, caches, and what they refuse."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from closeness import assert_close
from prompt_cases import CONFIGS, IDS, VIRTUAL, logits, prompted, saved
from safetensors.torch import load_file
from tiny import randomise, tiny_gpt2, tiny_llama
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import fxpeft
from fxpeft import AdapterError, LoraConfig

# the argument's names: transformers 5.24 renamed it, and still takes the older one
NAMES = [n for n in ("past_key_values", "cache") if n == "past_key_values" or n in inspect.signature(
    LlamaForCausalLM.forward).parameters]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_removed_prompt_leaves_nothing(name: str) -> None:
    model = tiny_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: p.requires_grad for k, p in model.named_parameters()}
    keys = set(vars(model)), set(model._modules)
    bare = logits(model)
    prompted(name, model)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model) is not LlamaForCausalLM
    assert not torch.equal(logits(model)[:, -6:], bare)
    model.generate(IDS, do_sample=False, max_new_tokens=2, pad_token_id=0)
    fxpeft.remove(model)
    assert type(model) is LlamaForCausalLM
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: p.requires_grad for k, p in model.named_parameters()} == grads
    assert (set(vars(model)), set(model._modules)) == keys
    assert torch.equal(logits(model), bare)


def test_prompts_come_and_go() -> None:
    model = prompted("prompt", adapter="one")
    first = logits(model)
    prompted("prefix", model, "two")
    second = logits(model)
    assert first.shape[1] == 6 + VIRTUAL
    assert second.shape[1] == 6
    fxpeft.set_adapter(model, "one")
    assert torch.equal(logits(model), first)
    with fxpeft.disabled(model):
        assert type(model) is LlamaForCausalLM
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(model), first)
    with pytest.raises(AdapterError, match="only one prompt can be active at a time, found one, two"):
        fxpeft.set_adapter(model, ["one", "two"])
    assert torch.equal(logits(model), first)
    fxpeft.delete_adapter(model, "one")
    assert torch.equal(logits(model), logits(tiny_llama()))
    fxpeft.set_adapter(model, "two")
    assert torch.equal(logits(model), second)
    fxpeft.delete_adapter(model, "two")
    assert type(model) is LlamaForCausalLM


def test_a_prompt_together_with_lora() -> None:
    """The two touch different modules: together, they are LoRA's model on embeddings that begin with the prompt."""
    model = prompted("prompt", adapter="soft")
    fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"), "low")
    randomise(fxpeft.adapter_state_dict(model, "low").values(), seed=3)
    with torch.no_grad():
        embeddings = torch.cat((model.adapters.soft.embedding.expand(2, -1, -1), model.model.embed_tokens(IDS)), 1)
        wanted = model(inputs_embeds=embeddings).logits
    fxpeft.set_adapter(model, ["soft", "low"])
    assert_close(logits(model), wanted, terms=1)
    assert not torch.allclose(logits(model), logits(prompted("prompt")), atol=1e-3)


def test_a_prompt_has_no_scale() -> None:
    model = prompted()
    before = logits(model)
    with pytest.raises(AdapterError, match="'default': prompt_tuning has no scale to change"):
        fxpeft.set_scale(model, "default", 0.5)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_copies(name: str) -> None:
    model = prompted(name)
    wanted = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), wanted)
        fxpeft.remove(other)
        assert type(other) is LlamaForCausalLM
    assert torch.equal(logits(model), wanted)


def test_a_model_with_accelerates_hook() -> None:
    """As with a device map: the hook keeps the forward that it found and calls it."""
    model = tiny_llama()
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    bare = logits(model)
    prompted(model=model)
    assert torch.equal(logits(model), logits(prompted()))
    assert torch.equal(
        *(m.generate(IDS, do_sample=False, max_new_tokens=3, pad_token_id=0) for m in (model, prompted()))
    )
    fxpeft.remove(model)
    assert torch.equal(logits(model), bare)
    remove_hook_from_module(model)
    assert torch.equal(logits(model), bare)


def test_a_saved_base_model_knows_its_class(tmp_path: Path) -> None:
    model = prompted()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_half_precision(name: str) -> None:
    """The prompt is trained in float32, the model runs in its own dtype."""
    model = prompted(name, tiny_llama(torch.bfloat16))
    assert {p.dtype for p in model.adapters.parameters()} == {torch.float32}
    out = model(IDS, labels=IDS)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    grad = model.adapters.default.embedding.grad
    assert grad.dtype == torch.float32
    assert grad.abs().sum() > 0
    torch.testing.assert_close(out.logits.float(), logits(prompted(name)), atol=0.05, rtol=0.05)


# --- training ---


class Tokens(Dataset[dict[str, Tensor]]):
    """Eight rows that are all alike but for the first token."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.tensor([index + 1, 7, 8, 9, 10, 11])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "unused": ids}


def train(model: Any, folder: Path, **options: Any) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=15, per_device_train_batch_size=8, learning_rate=0.1, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, seed=0, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["prompt", "prefix", "mlp"])
def test_a_trainer_lowers_the_loss(name: str, tmp_path: Path) -> None:
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() == 2 else 1)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    fxpeft.add_adapter(model, CONFIGS[name]())
    count = fxpeft.trainable_parameters(model, show=False)
    assert count.trainable == sum(p.numel() for p in model.adapters.parameters()) > 0
    losses = train(model, tmp_path / "run")
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in own.items())
    fxpeft.save_adapter(model, tmp_path / "adapter")
    trained = logits(model.eval())
    fxpeft.remove(model)
    fxpeft.load_adapter(model, tmp_path / "adapter")
    assert_close(logits(model), trained)


def test_a_trainer_of_half_precision_leaves_nothing(tmp_path: Path) -> None:
    """accelerate wraps the forward that it finds, the generated one, in autocast."""
    model = prompted()
    assert len(train(model, tmp_path, bf16=True)) == 15
    assert "forward" in vars(model)
    fxpeft.set_adapter(model, [])
    assert torch.equal(logits(model), logits(tiny_llama()))
    fxpeft.set_adapter(model, "default")
    assert logits(model).shape[1] == 6 + VIRTUAL
    fxpeft.remove(model)
    assert type(model) is LlamaForCausalLM
    assert "forward" not in vars(model)
    assert torch.equal(logits(model), logits(tiny_llama()))


@pytest.mark.parametrize("name", ["mlp", "lstm", "projected"])
def test_a_loaded_prompt_is_trained_without_its_encoder(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, name)
    assert load_file(folder / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
    model = tiny_llama()
    fxpeft.load_adapter(model, folder, trainable=True)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["adapters.default.embedding"]
    assert_close(logits(model), logits(prompted(name)))
    model(IDS, labels=IDS).loss.backward()
    assert model.adapters.default.embedding.grad.abs().sum() > 0


def test_an_encoders_dropout_is_off_in_what_is_saved(tmp_path: Path) -> None:
    model = prompted("lstm").train()
    found = {tuple(model.adapters.default().flatten()[:3].tolist()) for _ in range(3)}
    assert len(found) == 3
    one, two = (fxpeft.adapter_state_dict(model)["prompt_embeddings"] for _ in range(2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, model.eval().adapters.default().detach())


def test_zero_prefix() -> None:
    for name in ("prefix", "projected"):
        model = tiny_llama()
        fxpeft.add_adapter(model, CONFIGS[name](init_weights="zero"))
        assert not fxpeft.adapter_state_dict(model)["prompt_embeddings"].any()


def test_gradient_checkpointing() -> None:
    """Prompts give equal gradients; a prefix would be lost, so that it is refused."""
    model = prompted().train()
    model(IDS, labels=IDS).loss.backward()
    wanted = model.adapters.default.embedding.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(model.adapters.default.embedding.grad, wanted)
    prompted("prefix", model, "prefix")
    with pytest.raises(AdapterError, match="prefix tuning doesn't work with gradient checkpointing"):
        model.train()(IDS, labels=IDS)
    model.gradient_checkpointing_disable()
    assert model(IDS, labels=IDS).loss.isfinite()


# --- caches ---


@pytest.mark.parametrize("argument", NAMES)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.filterwarnings("ignore:past_key_values is deprecated:FutureWarning")
def test_a_loop_of_ones_own(name: str, static: bool, argument: str) -> None:
    """A forward that continues a cache adds no second prompt."""
    model = prompted(name)
    wanted = logits(model)[:, -6:]
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        mask = torch.ones(2, 4, dtype=torch.long)
        parts = [model(IDS[:, :4], attention_mask=mask, **{argument: cache}).logits[:, -4:]]
        for end in (5, 6):
            mask = torch.ones(2, end, dtype=torch.long)
            parts.append(model(IDS[:, end - 1 : end], attention_mask=mask, **{argument: cache}).logits)
    assert int(cache.get_seq_length()) == 6 + VIRTUAL
    assert_close(torch.cat(parts, 1), wanted)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_the_older_name_of_a_cache_warns_as_without_a_prompt(name: str) -> None:
    for model in (tiny_llama(), prompted(name)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(IDS, past_key_values=DynamicCache(config=model.config))
        said = [str(w.message) for w in caught if "past_key_values" in str(w.message)]
        assert len(said) == len(NAMES) - 1
        assert all("deprecated" in s for s in said)
        model(IDS, **{NAMES[-1]: DynamicCache(config=model.config)})


@pytest.mark.parametrize("argument", NAMES)
@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_generate_goes_on_from_a_cache(name: str, argument: str) -> None:
    model = prompted(name)
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    wanted = model.generate(IDS, attention_mask=mask, max_new_tokens=6, **options)
    cache = DynamicCache(config=model.config)
    first = model.generate(IDS, attention_mask=mask, **{argument: cache}, max_new_tokens=3, **options)
    found = model.generate(
        first, attention_mask=torch.ones_like(first), **{argument: cache}, max_new_tokens=3, **options
    )
    assert torch.equal(found, wanted)


def test_positions_and_types_are_ignored_with_a_warning() -> None:
    model = prompted(model=tiny_gpt2())
    wanted = logits(model)
    for name in ("position_ids", "token_type_ids"):
        with pytest.warns(UserWarning, match=f"{name} are ignored under a soft prompt"):
            assert torch.equal(logits(model, **{name: torch.ones_like(IDS)}), wanted)


def test_positions_of_a_prefix_count_from_its_end() -> None:
    model = prompted("prefix", tiny_gpt2())
    positions = torch.arange(6).expand(2, -1)
    assert torch.equal(logits(model, position_ids=positions), logits(model))
    assert not torch.equal(logits(model, position_ids=positions + 1), logits(model))


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_mask_of_four_dimensions_is_refused(name: str) -> None:
    with pytest.raises(AdapterError, match=r"attention_mask: expected \[batch, tokens\], found \[2, 1, 6, 6\]"):
        logits(prompted(name), attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool))
