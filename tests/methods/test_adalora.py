"""AdaLoRA's training: the budget, the term in the loss, the callback, and what is saved of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import randomise, tiny_llama, token_ids
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IDS = token_ids(4, 8)
SETTINGS: dict[str, Any] = {
    "init_r": 4, "target_r": 2, "lora_alpha": 6, "tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": 9,
    "orth_reg_weight": 0.3, "target_modules": ["q_proj", "v_proj", "down_proj"],
}  # fmt: skip


def ours(**changes: Any) -> Any:
    model = tiny_llama()
    fxpeft.add_adapter(model, fxpeft.AdaLoraConfig(**{**SETTINGS, **changes}))
    randomise(fxpeft.adapter_state_dict(model).values())
    return model


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """The same adapter in both libraries, trainable."""
    model = ours()
    peer = peft.get_peft_model(tiny_llama(), peft.AdaLoraConfig(**SETTINGS, task_type="CAUSAL_LM"))  # has the term
    tensors = {k: v.clone() for k, v in fxpeft.adapter_state_dict(model).items()}
    peft.set_peft_model_state_dict(peer, tensors)
    return model, peer


def test_loss_has_the_orthogonality_term_of_peft(pair: tuple[Any, Any]) -> None:
    model, peer = pair
    plain = tiny_llama()(input_ids=IDS, labels=IDS).loss
    found, expected = (m(input_ids=IDS, labels=IDS) for m in pair)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    assert found.loss > plain + 0.1
    found.loss.backward()
    expected.loss.backward()
    a = model.model.layers[0].mlp.down_proj.adapters.default.lora_A.grad
    b = peer.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].grad
    assert_close(a, b)
    fxpeft.disable_adapters(model)
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, plain)
    fxpeft.remove(model)
    assert not model._forward_hooks


def test_ranks_go_as_in_peft(pair: tuple[Any, Any]) -> None:
    model, peer = pair
    allocator = fxpeft.RankAllocator(model)
    optimisers = [torch.optim.SGD((p for p in m.parameters() if p.requires_grad), lr=0.5) for m in pair]
    budgets = []
    for step in range(SETTINGS["total_step"]):
        for m, optimiser in zip(pair, optimisers, strict=True):
            m(input_ids=IDS, labels=IDS).loss.backward()
            optimiser.step()
        allocator.update(step)
        peer.base_model.update_and_allocate(step)
        for optimiser in optimisers:
            optimiser.zero_grad()
        theirs = peer.peft_config["default"].rank_pattern
        mine = fxpeft.adapter_config(model).rank_pattern
        assert mine == (theirs and {k.replace(".default", ""): v for k, v in theirs.items()})
        budgets.append(sum(map(sum, mine.values())) if mine else allocator.initial)
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (allocator.initial, allocator.target)


def test_switched_off_ranks_are_not_saved_and_peft_agrees(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = pair
    allocator = fxpeft.RankAllocator(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    allocator.update(0)
    allocator.update(SETTINGS["total_step"] - SETTINGS["tfinal"])
    model.eval()
    with torch.no_grad():
        wanted = model(IDS).logits
    fxpeft.save_adapter(model, tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {site: sum(mask) for site, mask in pattern.items()}
    assert len(set(ranks.values())) > 1
    for key, tensor in fxpeft.adapter_state_dict(model).items():
        if key.endswith("lora_E"):
            assert len(tensor) == ranks[key.removeprefix("base_model.model.")]
    peer = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    again, served = tiny_llama(), tiny_llama()
    fxpeft.load_adapter(again, tmp_path)
    fxpeft.prepare_hotswap(served, 4, targets=SETTINGS["target_modules"], methods=["adalora"])
    fxpeft.load_adapter(served, tmp_path)
    for loaded in (peer, again, served):
        with torch.no_grad():
            assert_close(loaded(IDS).logits, wanted)
    peer.save_pretrained(str(tmp_path / "theirs"))
    back = tiny_llama()
    fxpeft.load_adapter(back, tmp_path / "theirs")
    with torch.no_grad():
        assert_close(back(IDS).logits, wanted)


class Text(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[index % 4], "labels": IDS[index % 4]}


def test_callback_drives_the_budget_of_a_trainer(tmp_path: Path) -> None:
    model = ours(orth_reg_weight=0.05)
    args = TrainingArguments(
        str(tmp_path), max_steps=9, per_device_train_batch_size=4, learning_rate=0.05, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Text(), callbacks=[fxpeft.AdaLoraCallback(model)])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    pattern = fxpeft.adapter_config(model).rank_pattern
    assert sum(map(sum, pattern.values())) == SETTINGS["target_r"] * 6
    for site, mask in pattern.items():
        values = model.get_submodule(site.removesuffix(".lora_E")).adapters.default.lora_E
        assert (values.flatten() != 0).tolist() == mask


def test_allocator_says_what_is_wrong() -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(target_modules=["q_proj"]), "plain")
    with pytest.raises(fxpeft.AdapterError, match="expected one AdaLoRA adapter, found"):
        fxpeft.RankAllocator(model)
    with pytest.raises(fxpeft.AdapterError, match="'plain' is no AdaLoRA adapter"):
        fxpeft.RankAllocator(model, "plain")
    fxpeft.add_adapter(model, fxpeft.AdaLoraConfig(**SETTINGS, inference_mode=True), "frozen")
    with pytest.raises(fxpeft.AdapterError, match="isn't trained"):
        fxpeft.RankAllocator(model)
    model = ours()
    with pytest.raises(fxpeft.AdapterError, match="no gradient: call update"):
        fxpeft.RankAllocator(model).update(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_step": None}, "total_step: expected the number of training steps, found None"),
        ({"tinit": 7}, "leave none of 9 steps"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight: expected at least 0"),
        ({"beta1": 1.0}, "beta1: expected a number between 0 and 1"),
        ({"target_r": 0}, "target_r: expected a positive integer"),
        ({"use_rslora": True}, "use_rslora: has no effect"),
        ({"rank_pattern": {"a": [1]}}, "rank_pattern: expected"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(fxpeft.AdapterError, match=message):
        fxpeft.AdaLoraConfig(**{**SETTINGS, **changes})
