"""BD-LoRA: block-diagonal factors, against PEFT; in a slot it is the LoRA that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from adapter_files import add
from closeness import assert_close
from peft.tuners.lora.config import BdLoraConfig
from tiny import logits, randomise, tiny_llama, token_ids

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore")
BLOCKS: dict[str, Any] = {
    "target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2,
    "match_strict": False,
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "r": 4, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj", "down_proj", "k_proj"],
    "rank_pattern": {"down_proj": 6}, "use_bdlora": BLOCKS,
}  # fmt: skip


def blocked(blocks: Any) -> fxpeft.LoraConfig:
    return fxpeft.LoraConfig(r=4, target_modules=["q_proj"], use_bdlora=blocks)


def test_it_is_pefts(tmp_path: Path) -> None:
    model, ids = tiny_llama(), token_ids()
    tensors = add(model, fxpeft.LoraConfig(**FIELDS), seed=4)
    assert {tuple(t.shape) for k, t in tensors.items() if "layers.0" in k and "q_proj" in k} == {(4, 32), (32, 2)}
    wanted = logits(model, ids)
    fxpeft.save_adapter(model, tmp_path / "ours")
    peer = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"), is_trainable=True).eval()
    assert_close(logits(peer, ids), wanted)
    for each in (peer, model):
        each(ids, labels=ids).loss.backward()
    theirs = {n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if p.grad is not None}
    held = {p.data_ptr(): p.grad for p in model.parameters()}
    for key, tensor in fxpeft.adapter_state_dict(model).items():
        assert_close(held[tensor.data_ptr()], theirs[key], size=4 * float(theirs[key].abs().max()))
    randomise((p for p in peer.parameters() if p.requires_grad), seed=5)
    peer.save_pretrained(str(tmp_path / "theirs"))
    slots = tiny_llama()
    fxpeft.prepare_hotswap(slots, 8)  # declared as a LoRA
    fxpeft.load_adapter(slots, tmp_path / "theirs", "a")
    assert_close(logits(slots, ids), logits(peer, ids))
    fxpeft.save_adapter(slots, tmp_path / "again")
    fxpeft.hotswap(slots, tmp_path / "ours", "a")
    assert_close(logits(slots, ids), wanted)
    fxpeft.fold(model)
    assert_close(logits(model, ids), wanted)
    fxpeft.unfold(model)
    fxpeft.convert(model, "default", new_name="plain")
    assert_close(logits(model, ids), wanted)
    again = tiny_llama()
    fxpeft.load_adapter(again, tmp_path / "again")
    assert_close(logits(again, ids), logits(peer, ids))


def test_a_fresh_one_is_pefts() -> None:
    peer = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**{**FIELDS, "use_bdlora": BdLoraConfig(**BLOCKS)}))
    model = tiny_llama()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**FIELDS))
    theirs = peft.get_peft_model_state_dict(peer)
    for key, tensor in fxpeft.adapter_state_dict(model).items():
        assert tensor.shape == theirs[key].shape
        assert bool(tensor.any()) is ("lora_A" in key)
    assert_close(logits(model), logits(tiny_llama()))


def test_what_does_not_fit_is_named() -> None:
    for blocks, message in (
        ({"nblocks": 3, "target_modules_bd_b": ["q_proj"]}, "nblocks: 3 blocks don't divide 32 x 4"),
        ({"nblocks": 2, "target_modules_bd_a": ["o_proj"]}, "q_proj: use_bdlora: named by neither"),
        ({"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["q_proj"]}, "named by target_modules_bd_a and by"),
        ({"nblocks": 0}, "nblocks: expected a positive integer"),
        ({"blocks": 2}, "BdLoraConfig has no fields blocks"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            fxpeft.add_adapter(tiny_llama(), blocked(blocks))
    with pytest.raises(fxpeft.AdapterError, match=r"use_bdlora: .*use_dora=True can't be with it"):
        fxpeft.LoraConfig(target_modules=["q_proj"], use_dora=True, use_bdlora=BLOCKS)  # type: ignore[arg-type]
