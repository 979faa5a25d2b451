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
from safetensors.torch import load_file, save_file
from tiny import conv_net, randomise, tiny_gpt2, tiny_llama
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
    XLMConfig,
    XLMWithLMHeadModel,
)

import fxpeft
from fxpeft import AdapterError, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

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


# --- what is refused ---

BAD = {
    "no tokens": (lambda: PrefixTuningConfig(num_virtual_tokens=0), "num_virtual_tokens: expected a positive"),
    "a word": (lambda: PromptTuningConfig(num_virtual_tokens="5"), "num_virtual_tokens: expected int"),
    "init": (lambda: PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="ZERO"), "prompt_tuning_init"),
    "no tokenizer": (
        lambda: PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="TEXT", prompt_tuning_init_text="a"),
        "tokenizer_name_or_path: prompt_tuning_init='TEXT' needs it",
    ),
    "no text": (
        lambda: PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="TEXT", tokenizer_name_or_path="a"),
        "prompt_tuning_init_text: prompt_tuning_init='TEXT' needs it",
    ),
    "tokenizer options": (
        lambda: PromptTuningConfig(num_virtual_tokens=5, tokenizer_kwargs={"a": 1}), "tokenizer_kwargs: only for",
    ),
    "dropout": (lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_dropout=1.0), "encoder_dropout"),
    "encoder": (
        lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_reparameterization_type="GRU"),
        "encoder_reparameterization_type",
    ),
    "submodules": (
        lambda: PromptTuningConfig(num_virtual_tokens=5, num_transformer_submodules=3), "num_transformer_submodules",
    ),
    "zero layers": (lambda: PrefixTuningConfig(num_virtual_tokens=5, num_layers=0), "num_layers: expected a positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_configs(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(AdapterError, match=message):
        make()


def test_an_ignored_number_of_layers_is_said() -> None:
    with pytest.warns(UserWarning, match="encoder_num_layers is ignored for the MLP"):
        PromptEncoderConfig(num_virtual_tokens=5, encoder_num_layers=3)


def mamba() -> MambaForCausalLM:
    """Weights large enough that what came before a token shows in its logits."""
    model = MambaForCausalLM(
        MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1, intermediate_size=32)
    )
    for parameter in model.backbone.layers.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)
    return model


def xlm() -> XLMWithLMHeadModel:
    """Its forward has an argument ``cache`` in all versions of transformers, with a meaning of its own."""
    return XLMWithLMHeadModel(XLMConfig(vocab_size=40, emb_dim=16, n_layers=1, n_heads=2))


def rwkv() -> RwkvForCausalLM:
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=40, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=32)
    )


def split() -> LlamaForCausalLM:
    model = tiny_llama()
    model.hf_device_map = {"model": 0, "lm_head": 1, "model.norm": "cpu"}
    return model


MISFITS: dict[str, tuple[Any, Any, str]] = {
    "no transformers model": (conv_net, CONFIGS["prompt"](), "expected a transformers model, found ConvNet"),
    "other width": (tiny_llama, CONFIGS["prompt"](token_dim=24), "token_dim: expected 32, .* found 24"),
    "other heads": (tiny_gpt2, CONFIGS["prefix"](num_attention_heads=3), "num_attention_heads: expected 4.* found 3"),
    "other layers": (tiny_llama, CONFIGS["prefix"](num_layers=7), "num_layers: expected 2.* found 7"),
    "no encoder": (tiny_llama, CONFIGS["prompt"](task_type="SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM doesn't fit LlamaFor"),
    "two submodules": (tiny_llama, CONFIGS["prompt"](num_transformer_submodules=2), "expected 1 for a model without"),
    "no keys": (mamba, CONFIGS["prefix"](), "MambaForCausalLM has layers without keys and values"),
    "no cache": (xlm, CONFIGS["prefix"](), "XLMWithLMHeadModel.forward takes no cache of keys and values"),
    "several devices": (split, CONFIGS["prefix"](), "split over 2 devices"),
    "no such module": (tiny_llama, CONFIGS["prompt"](modules_to_save=["hed"]), "modules_to_save.*\n.*hed"),
    "no tokenizer": (
        tiny_llama,
        CONFIGS["prompt"](
            prompt_tuning_init="TEXT", prompt_tuning_init_text="a", tokenizer_name_or_path="/there/is/none"
        ),
        "tokenizer_name_or_path: /there/is/none",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_models_that_take_no_such_prompt(case: str) -> None:
    make, config, message = MISFITS[case]
    model = make()
    cls, modules = type(model), [n for n, _ in model.named_modules()]
    with pytest.raises(AdapterError, match=message):
        fxpeft.add_adapter(model, config)
    assert type(model) is cls
    assert [n for n, _ in model.named_modules()] == modules
    assert all(p.requires_grad for p in model.parameters())


def test_generate_without_keys_and_values() -> None:
    """RWKV's state is a list, which doesn't tell whether the prompt is in it."""
    model = prompted(model=rwkv().eval(), num_attention_heads=1)
    with pytest.raises(AdapterError, match="RwkvForCausalLM keeps no cache of its past"):
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    found = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False)
    with torch.no_grad():
        assert torch.equal(found[:, -1], model(found[:, :-1]).logits[:, -1].argmax(-1))


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_from_a_state(beams: int) -> None:
    """A state-space model's cache has no length; with it or without, padded rows and all, tokens are the same."""
    model = prompted(model=mamba().eval(), num_attention_heads=1)
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0

    def generated(**options: Any) -> tuple[Tensor, Tensor]:
        found = model.generate(
            IDS, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, num_beams=beams,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        return found.sequences, torch.stack(found.logits)

    (tokens, scores), (others, wanted) = generated(), generated(use_cache=False)
    assert torch.equal(tokens, others)
    assert_close(scores, wanted)
    with fxpeft.disabled(model):
        assert not torch.allclose(generated()[1][0], scores[0], atol=1e-3)


def test_a_loop_of_ones_own_from_a_state() -> None:
    model = prompted(model=mamba().eval(), num_attention_heads=1)
    name = "cache" if "cache" in inspect.signature(MambaForCausalLM.forward).parameters else "cache_params"
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(IDS[:, :4], **{name: cache}, use_cache=True).logits[:, -4:]]
        parts += [model(IDS[:, i : i + 1], **{name: cache}, use_cache=True).logits for i in (4, 5)]
    assert_close(torch.cat(parts, 1), logits(model)[:, -6:])


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    model = tiny_llama()
    for changed, message in (
        ({"prompt_embeddings": torch.ones(5, 32)}, r"prompt_embeddings: expected \[4, 32\], found \[5, 32\]"),
        ({"prompt": torch.ones(4, 32)}, r"doesn't fill:\n  prompt_embeddings \[4, 32\]"),
        ({**tensors, "more": torch.ones(1)}, r"no place in the model:\n  more \[1\]"),
        ({"prompt_embeddings": torch.full((4, 32), float("nan"))}, "expected finite values"),
    ):
        save_file(changed, weights)
        with pytest.raises(fxpeft.CheckpointError, match=message):
            fxpeft.load_adapter(model, folder, check_finite=True)
        assert type(model) is LlamaForCausalLM
    save_file(tensors, weights)
    with pytest.raises(AdapterError, match="is it a prompt of another base model"):
        fxpeft.load_adapter(tiny_gpt2(), folder)
    prefix = saved(tmp_path / "two", "prefix")
    with pytest.raises(AdapterError, match="is it a prefix of another base model"):
        fxpeft.load_adapter(tiny_gpt2(), prefix)
