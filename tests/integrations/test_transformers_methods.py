"""The adapter methods that ``install`` gives to ``PreTrainedModel``: results, errors, and nothing left behind."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import logits, randomise, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Trainer,
)
from transformers.integrations import PeftAdapterMixin
from transformers.models.auto import auto_factory

import fxpeft

CONFIG: dict[str, Any] = {
    "r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 7},
    "alpha_pattern": {"v_proj": 3},
}  # fmt: skip
OTHER: dict[str, Any] = {"r": 2, "lora_alpha": 5, "target_modules": ["k_proj", "down_proj"]}


def lora(**fields: Any) -> fxpeft.LoraConfig:
    return fxpeft.LoraConfig(**{**CONFIG, **fields})


def adapted(name: str | None = None, seed: int = 0, **fields: Any) -> Any:
    """A tiny Llama with an adapter whose values are all random."""
    model = tiny_llama()
    model.add_adapter(lora(**fields), name)
    randomise(model.get_adapter_state_dict(name or "default").values(), seed)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> str:
    adapted().save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_add_adapter_is_active_and_trained() -> None:
    model = tiny_llama()
    bare = logits(model)
    assert model.add_adapter(lora()) is None
    assert model.active_adapters() == ["default"]
    assert model._hf_peft_config_loaded is True
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), bare)  # B is zero
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 12
    assert all(".adapters.default." in name for name in trained)


def test_head_is_not_added_by_task_type() -> None:
    # Transformers' add_adapter, unlike get_peft_model, trains a head only where modules_to_save names it
    model = tiny_llama()
    model.add_adapter(lora(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    assert "lm_head.weight" in model.get_adapter_state_dict()
    classifier = tiny_bert()
    classifier.add_adapter(fxpeft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert not [key for key in classifier.get_adapter_state_dict() if "classifier" in key]


def test_second_adapter_becomes_the_only_active_one() -> None:
    model = adapted("a")
    first = logits(model)
    model.add_adapter(lora(**OTHER, rank_pattern={}, alpha_pattern={}), "b")
    randomise(model.get_adapter_state_dict("b").values(), 3)
    assert model.active_adapters() == ["b"]
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("a")
    assert torch.equal(logits(model), first)
    model.set_adapter(["a", "b"])
    assert model.active_adapters() == ["a", "b"]
    both = logits(model)
    assert not torch.allclose(both, first, atol=1e-3)
    assert not torch.allclose(both, second, atol=1e-3)


def test_set_adapter_trains_what_it_sets(saved: str) -> None:
    model = tiny_llama()
    model.load_adapter(saved, "a")
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.load_adapter(saved, "b")
    model.set_adapter("a")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 12
    assert all(".adapters.a." in n for n in trained)


def test_disable_and_enable() -> None:
    model = tiny_llama()
    bare = logits(model)
    model = adapted()
    on = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), bare)
    assert model.active_adapters() == ["default"]
    model.enable_adapters()
    assert torch.equal(logits(model), on)


def test_load_adapter_round_trip(saved: str) -> None:
    wanted = logits(adapted())
    model = tiny_llama().train()
    info = model.load_adapter(saved, "x")
    assert (info.missing_keys, info.unexpected_keys, info.mismatched_keys, info.error_msgs) == (set(), set(), set(), [])
    assert not model.training  # a frozen adapter puts the model in evaluation mode
    assert_close(logits(model), wanted, terms=1)
    model = tiny_llama().train()
    model.load_adapter(saved, is_trainable=True)
    assert model.training
    assert sum(p.requires_grad for p in model.parameters()) == 12


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_load_adapter_from_a_state_dict(prefix: str) -> None:
    source = adapted()
    tensors = {prefix + key: value for key, value in source.get_adapter_state_dict().items()}
    model = tiny_llama()
    model.load_adapter(peft_config=source.peft_config["default"], adapter_state_dict=tensors, adapter_name="s")
    assert_close(logits(model), logits(source), terms=1)
    by_dict = tiny_llama()
    by_dict.load_adapter(peft_config=lora().to_dict(), adapter_state_dict=tensors)
    assert_close(logits(by_dict), logits(source), terms=1)


def test_load_reports_missing_and_unexpected_keys(caplog: pytest.LogCaptureFixture) -> None:
    source = adapted()
    tensors = source.get_adapter_state_dict()
    gone = "model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors["model.layers.7.self_attn.q_proj.lora_A.weight"] = tensors.pop(gone)
    model = tiny_llama()
    logging.getLogger("transformers").propagate = True
    try:
        info = model.load_adapter(peft_config=lora(), adapter_state_dict=tensors)
    finally:
        logging.getLogger("transformers").propagate = False
    assert info.missing_keys == {"model.layers.0.self_attn.q_proj.lora_A.default.weight"}
    assert info.unexpected_keys == {"model.layers.7.self_attn.q_proj.lora_A.default.weight"}
    assert "UNEXPECTED" in caplog.text
    assert "MISSING" in caplog.text
    # the missing A is random, as in a new adapter; everything else was loaded
    own = model.get_adapter_state_dict()
    assert own[gone].abs().sum() > 0
    for key, value in source.get_adapter_state_dict().items():
        if key != gone:
            assert torch.equal(own[key], value)


def test_load_refuses_other_shapes_before_it_changes_anything() -> None:
    tensors = adapted().get_adapter_state_dict()
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key] = torch.randn(5, 32)
    model = tiny_llama()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model.load_adapter(peft_config=lora(), adapter_state_dict=tensors)
    assert [type(m) for m in model.modules()] == classes
    assert model._hf_peft_config_loaded is False
    info = model.load_adapter(peft_config=lora(), adapter_state_dict=tensors, ignore_mismatched_sizes=True)
    assert info.mismatched_keys == {(key.replace("lora_A.", "lora_A.default."), (5, 32), (4, 32))}


def test_load_refuses_a_foreign_adapter() -> None:
    tensors = {f"transformer.{k}": v for k, v in adapted().get_adapter_state_dict().items()}
    model = tiny_llama()
    with pytest.raises(fxpeft.CheckpointError, match="none of its 12 tensors belongs to one of the 6 sites"):
        model.load_adapter(peft_config=lora(), adapter_state_dict=tensors)
    assert not hasattr(model, "peft_config")


def test_adapter_of_a_head_model_fits_its_body_and_the_reverse() -> None:
    source = adapted()
    body = LlamaModel(source.config).eval()
    body.load_state_dict(tiny_llama().model.state_dict())
    info = body.load_adapter(peft_config=lora(), adapter_state_dict=source.get_adapter_state_dict())
    assert info.missing_keys == info.unexpected_keys == set()
    hidden = source.model(token_ids()).last_hidden_state
    assert_close(body(token_ids()).last_hidden_state, hidden, terms=1)
    back = tiny_llama()
    back.load_adapter(peft_config=lora(), adapter_state_dict=body.get_adapter_state_dict())
    assert_close(logits(back), logits(source), terms=1)


def test_adapter_of_an_older_transformers() -> None:
    """LLaVA's language model was renamed in transformers 4.52; adapters from before have the old names."""
    text = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=39))
    model.add_adapter(fxpeft.LoraConfig(r=3, target_modules=["down_proj"]))
    tensors = {key: torch.randn_like(value) for key, value in model.get_adapter_state_dict().items()}
    assert all(key.startswith("model.language_model.layers.") for key in tensors)
    model.delete_adapter("default")
    old = {k.replace("model.language_model.", "base_model.model.language_model.model."): v for k, v in tensors.items()}
    info = model.load_adapter(peft_config=fxpeft.LoraConfig(r=3, target_modules=["down_proj"]), adapter_state_dict=old)
    assert info.missing_keys == info.unexpected_keys == set()
    own = model.get_adapter_state_dict()
    assert all(torch.equal(own[key], value) for key, value in tensors.items())


METHODS: dict[str, Any] = {
    "dora": lambda: lora(use_dora=True),
    "lora_bias": lambda: lora(lora_bias=True),
    "ia3": lambda: fxpeft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": lambda: fxpeft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj", "v_proj"]),
    "norms": lambda: fxpeft.LNTuningConfig(),
    "rows": lambda: fxpeft.TrainableTokensConfig(token_indices=[3, 5]),
    "vera": lambda: fxpeft.VeraConfig(r=3, target_modules=["q_proj", "o_proj"]),
    "loha": lambda: fxpeft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "hra": lambda: fxpeft.HRAConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "tiny": lambda: fxpeft.TinyLoraConfig(r=2, u=4, target_modules=["q_proj", "v_proj"]),
    "uni": lambda: fxpeft.UniLoraConfig(r=3, theta_d_length=50, target_modules=["q_proj", "v_proj"]),
    "adamss": lambda: fxpeft.AdamssConfig(r=6, num_subspaces=2, target_modules=["q_proj", "v_proj"]),
    "oft": lambda: fxpeft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods(method: str, tmp_path: Path) -> None:
    model = tiny_llama()
    model.add_adapter(METHODS[method]())
    randomise(model.get_adapter_state_dict().values(), seed=2)
    loss = model.train()(token_ids(), labels=token_ids()).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = logits(model.eval())
    assert not torch.allclose(expected, logits(tiny_llama()), atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    assert_close(logits(loaded), expected)
    served = tiny_llama()
    served.enable_peft_hotswap(target_rank=8)
    served.load_adapter(str(tmp_path), "default")
    assert_close(logits(served), expected)
    if METHODS[method]().peft_type == "LORA":
        served.load_adapter(str(tmp_path), "default", hotswap=True)
        assert_close(logits(served), expected)
    else:
        with pytest.raises(ValueError, match="only supported for LoRA"):
            served.load_adapter(str(tmp_path), "default", hotswap=True)


def test_prompt_learning_is_out_of_scope_as_in_transformers() -> None:
    with pytest.raises(ValueError, match="don't take prompt learning"):
        tiny_llama().add_adapter(fxpeft.PromptTuningConfig(num_virtual_tokens=3))


def test_errors_are_transformers_own(saved: str) -> None:
    model = tiny_llama()
    for call in (
        model.active_adapters, model.enable_adapters, model.disable_adapters, model.get_adapter_state_dict,
        lambda: model.set_adapter("a"), lambda: model.delete_adapter("a"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="No adapter loaded"):
            call()
    with pytest.raises(ValueError, match="You should either pass a `peft_model_id`"):
        model.load_adapter()
    with pytest.raises(ValueError, match="adapter model file not found in"):
        model.load_adapter(str(Path(saved).parent))
    with pytest.raises(OSError, match="nonexistent"):
        model.load_adapter("/nonexistent/folder")
    with pytest.raises(ValueError, match="there must already be an existing adapter"):
        model.load_adapter(saved, "a", hotswap=True)
    with pytest.raises(TypeError, match="adapter_config should be"):
        model.add_adapter({"r": 4})
    with pytest.raises(TypeError, match="adapter_config should be"):
        model.add_adapter("lora")
    with pytest.raises(TypeError, match="no_such_argument"):
        model.load_adapter(saved, no_such_argument=1)
    model.load_adapter(saved, "a")
    with pytest.raises(ValueError, match="Adapter with name a already exists"):
        model.load_adapter(saved, "a", hotswap=False)
    with pytest.raises(ValueError, match="Adapter with name a already exists"):
        model.add_adapter(lora(), "a")
    with pytest.raises(ValueError, match="Adapter with name b not found"):
        model.set_adapter("b")
    with pytest.raises(ValueError, match=r"could not be found: b\."):
        model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="not present and cannot be deleted: b"):
        model.delete_adapter(["a", "b"])
    assert model.active_adapters() == ["a"]


def test_a_weights_file_that_is_missing_or_damaged(saved: str) -> None:
    weights = Path(saved) / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    model = tiny_llama()
    with pytest.raises(fxpeft.CheckpointError, match="damaged or cut short"):
        model.load_adapter(saved)
    weights.unlink()
    with pytest.raises(OSError, match="Could not download either"):
        model.load_adapter(saved)
    assert not hasattr(model, "peft_config")


def test_pickled_weights_are_read_without_running_them(saved: str) -> None:
    source = adapted()
    (Path(saved) / "adapter_model.safetensors").unlink()
    torch.save(source.get_adapter_state_dict(), Path(saved) / "adapter_model.bin")
    model = tiny_llama()
    model.load_adapter(saved)
    assert_close(logits(model), logits(source), terms=1)
    with pytest.raises(OSError, match="Could not download"):
        tiny_llama().load_adapter(saved, use_safetensors=True)
    torch.save({"a": Path()}, Path(saved) / "adapter_model.bin")
    with pytest.raises(fxpeft.CheckpointError, match="can't be read"):
        tiny_llama().load_adapter(saved)


def test_second_adapter_needs_the_type_of_the_first() -> None:
    model = adapted("a")
    with pytest.raises(ValueError, match="a second adapter needs the type of the first: expected LORA, found IA3"):
        model.add_adapter(METHODS["ia3"](), "b")
    tensors = model.get_adapter_state_dict()
    with pytest.raises(ValueError, match="a second adapter needs the type of the first"):
        model.load_adapter(peft_config=METHODS["ia3"](), adapter_state_dict=tensors, adapter_name="b")
    assert model.active_adapters() == ["a"]


def test_delete_adapter() -> None:
    model = adapted("a")
    first = logits(model)
    model.add_adapter(lora(**OTHER, rank_pattern={}, alpha_pattern={}), "b")
    with pytest.warns(UserWarning, match="Setting active adapter to a"):
        model.delete_adapter("b")
    assert model.active_adapters() == ["a"]
    assert torch.equal(logits(model), first)
    model.delete_adapter(["a"])
    assert model._hf_peft_config_loaded is False
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny_llama().modules()]


def test_state_dict_that_was_gathered_elsewhere() -> None:
    model = adapted(modules_to_save=["lm_head"], bias="none")
    gathered = {f"_orig_mod.{k}": v + 1 for k, v in model.state_dict().items()}
    own = model.get_adapter_state_dict()
    found = model.get_adapter_state_dict(state_dict=gathered)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key] + 1) for key in own)
    with pytest.raises(ValueError, match=r"q_proj\.adapters\.default\.lora_A: expected in state_dict"):
        model.get_adapter_state_dict(state_dict={})


def test_biases_of_gpt2_in_a_gathered_state_dict() -> None:
    model = tiny_gpt2()
    model.add_adapter(fxpeft.LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only"))
    found = model.get_adapter_state_dict(state_dict=model.state_dict())
    own = model.get_adapter_state_dict()
    assert any(key.endswith(".bias") for key in own)
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_active_adapter_is_the_old_way() -> None:
    model = adapted("a")
    with pytest.warns(FutureWarning, match="active_adapters"):
        assert model.active_adapter() == "a"


def test_fxpeft_functions_and_methods_see_the_same_adapters() -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, lora(), "f")
    assert model._hf_peft_config_loaded
    assert model.active_adapters() == fxpeft.active_adapters(model) == ["f"]
    fxpeft.remove(model)
    assert not model._hf_peft_config_loaded


def test_copies_keep_their_adapters() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    model.delete_adapter("default")
    assert twin.active_adapters() == ["default"]
    assert not torch.allclose(logits(twin), logits(model), atol=1e-3)


def test_signatures_are_transformers_own() -> None:
    ours = {name: value for name, value in vars(PreTrainedModel).items() if hasattr(PeftAdapterMixin, name)}
    fxpeft.uninstall()
    compared = 0
    for name, function in ours.items():
        theirs = getattr(PreTrainedModel, name)
        if name.startswith("_") or not callable(function):
            continue
        mine = [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        assert mine == [(p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()], name
        compared += 1
    assert compared == 9


def test_uninstall_restores_everything() -> None:
    fxpeft.uninstall()
    places = (PreTrainedModel, Trainer, auto_factory._BaseAutoModelClass, auto_factory)
    before = [dict(vars(place)) for place in places]
    model = tiny_llama()
    fxpeft.install()
    assert vars(PreTrainedModel)["save_pretrained"] is not before[0]["save_pretrained"]
    fxpeft.install()  # twice is once
    model.add_adapter(lora())  # made before install
    fxpeft.uninstall()
    for place, was in zip(places, before, strict=True):
        now = dict(vars(place))
        assert now.keys() == was.keys()
        assert all(now[key] is was[key] for key in was), place
    fxpeft.uninstall()
    assert fxpeft.active_adapters(model) == ["default"]  # the adapter stays, for fxpeft's functions


def test_only_files_that_exist_are_asked_for(saved: str) -> None:
    model = tiny_llama()
    model.load_adapter(str(Path(saved).parent), adapter_kwargs={"subfolder": "saved"})
    other = tiny_llama()
    other.load_adapter(str(Path(saved).parent), subfolder="saved", local_files_only=True)
    assert torch.equal(logits(model), logits(other))
