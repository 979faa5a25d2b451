"""Which adapters are trained: as in PEFT while they are active, inactive, switched off or asked for by name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from tiny import randomise, tiny_llama, token_ids

import fxpeft
from fxpeft import AdapterError, LoraConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["norm"]},
    "b": {"r": 2, "lora_alpha": 7, "target_modules": ["up_proj", "down_proj"], "rank_pattern": {"down_proj": 5}},
}


def both() -> tuple[Any, Any]:
    """The same two adapters in fxpeft and in PEFT, ``b`` active."""
    ours = tiny_llama()
    theirs: Any = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**SETTINGS["a"]), "a")
    for name in SETTINGS:
        fxpeft.add_adapter(ours, LoraConfig(**SETTINGS[name]), name)
    theirs.add_adapter("b", peft.LoraConfig(**SETTINGS["b"]))
    theirs.set_adapter("b")
    return ours, theirs


def trained(model: Any) -> dict[str, set[bool]]:
    """Adapter -> what ``requires_grad`` says of its parameters."""
    found: dict[str, set[bool]] = {"a": set(), "b": set()}
    for name, parameter in model.named_parameters():
        for adapter in found:
            if adapter in name.split("."):
                found[adapter].add(parameter.requires_grad)
    return found


STEPS: dict[str, tuple[Any, Any]] = {
    "frozen": (lambda m: fxpeft.set_requires_grad(m, "b", False), lambda m: m.set_requires_grad("b", False)),
    "inactive": (lambda m: fxpeft.set_requires_grad(m, "a"), lambda m: m.set_requires_grad("a")),
    "several": (
        lambda m: fxpeft.set_requires_grad(m, ["a", "b"], False), lambda m: m.set_requires_grad(["a", "b"], False),
    ),
    "another active": (lambda m: fxpeft.set_adapter(m, "a"), lambda m: m.set_adapter("a")),
    "off": (fxpeft.disable_adapters, lambda m: m.base_model.disable_adapter_layers()),
    "on": (fxpeft.enable_adapters, lambda m: m.base_model.enable_adapter_layers()),
}  # fmt: skip


@pytest.mark.parametrize(
    "steps",
    [
        ["frozen"],
        ["inactive"],
        ["several", "another active"],
        ["off"],
        ["off", "on"],
        ["off", "inactive"],
        ["another active", "off", "on", "inactive"],
    ],
    ids=" then ".join,
)
def test_as_in_peft(steps: list[str]) -> None:
    ours, theirs = both()
    assert trained(ours) == trained(theirs) == {"a": {False}, "b": {True}}
    for step in steps:
        for model, act in zip((ours, theirs), STEPS[step], strict=True):
            act(model)
        assert trained(ours) == trained(theirs), step


def test_what_was_said_comes_back_after_a_block_without_adapters() -> None:
    """PEFT would train all that is active."""
    model, _ = both()
    fxpeft.set_requires_grad(model, "b", False)
    fxpeft.set_requires_grad(model, "a")
    with fxpeft.disabled(model):
        assert trained(model) == {"a": {False}, "b": {False}}
        assert fxpeft.trainable_parameters(model, show=False).trainable == 0
    assert trained(model) == {"a": {True}, "b": {False}}


def test_a_loaded_adapter_stays_frozen_through_such_a_block(tmp_path: Any) -> None:
    model, _ = both()
    fxpeft.save_adapter(model, tmp_path, "b")
    fxpeft.load_adapter(model, tmp_path, "c")
    with fxpeft.disabled(model):
        pass
    assert fxpeft.trainable_parameters(model, show=False).trainable == 0
    fxpeft.set_requires_grad(model, "c")
    assert fxpeft.trainable_parameters(model, show=False).trainable > 0


def test_gradients_of_a_forward_before_a_block_without_adapters() -> None:
    """DPO's order: the policy's forward, the reference's, and only then backward."""
    grads = []
    for reference in (False, True):
        model, _ = both()
        randomise((p for p in model.parameters() if p.requires_grad), seed=4)
        loss = model(token_ids(), labels=token_ids()).loss
        if reference:
            with torch.no_grad(), fxpeft.disabled(model):
                assert not torch.equal(model(token_ids(), labels=token_ids()).loss, loss)
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == len(grads[1]) == 8
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, other)


def test_a_frozen_adalora_adds_nothing_to_the_loss() -> None:
    model = tiny_llama()
    config = fxpeft.AdaLoraConfig(init_r=3, target_modules=["q_proj"], total_step=9, orth_reg_weight=2.0)
    fxpeft.add_adapter(model, config)
    randomise((p for p in model.parameters() if p.requires_grad), seed=4)
    ids = token_ids()
    trains = model(ids, labels=ids).loss
    fxpeft.set_requires_grad(model, "default", False)
    frozen = model(ids, labels=ids).loss
    assert trains - frozen > 0.1
    fxpeft.set_requires_grad(model, ["default"])
    assert torch.equal(model(ids, labels=ids).loss, trains)


def test_what_is_refused() -> None:
    model, _ = both()
    with pytest.raises(AdapterError, match="no adapter named 'c'; loaded: a, b"):
        fxpeft.set_requires_grad(model, ["a", "c"])
    assert trained(model) == {"a": {False}, "b": {True}}
    fxpeft.prepare_hotswap(model)
    with pytest.raises(AdapterError, match="slots, which are not trained: call release_hotswap first"):
        fxpeft.set_requires_grad(model, "a")


def test_lora_plus_has_peft_s_groups() -> None:
    fields: dict[str, Any] = {
        "r": 3, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"], "use_dora": True,
    }  # fmt: skip
    ours, theirs = tiny_llama(), peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields))
    with pytest.raises(AdapterError, match="no parameter is trained"):
        fxpeft.lora_plus_groups(ours.requires_grad_(False), 0.01, 16)
    fxpeft.add_adapter(ours, LoraConfig(**fields))
    groups = fxpeft.lora_plus_groups(ours, 0.01, 16, weight_decay=0.1, embedding_lr=1e-3)
    expected = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-3
    )

    def shape(group: dict[str, Any]) -> tuple[Any, ...]:
        return group["lr"], group["weight_decay"], sorted(tuple(p.shape) for p in group["params"])

    assert sorted(map(shape, groups)) == sorted(shape(group) for group in expected.param_groups if group["params"])
    assert len(groups) == 3
    torch.optim.AdamW(groups)
