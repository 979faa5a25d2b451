"""``layer_replication``: layers repeated with shared weights, and an adapter at each, against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from adapter_files import add
from closeness import assert_close
from tiny import logits, randomise, tiny_bert, tiny_llama, token_ids
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore")
RANGES = [[0, 2], [1, 2], [0, 1]]
FIELDS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "layer_replication": RANGES}


def repeated(build: Any = tiny_llama) -> Any:
    model = build()
    fxpeft.replicate_layers(model, RANGES)
    return model


def test_it_is_pefts(tmp_path: Path) -> None:
    model, ids = repeated(), token_ids()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny_llama().parameters())
    tensors = add(model, fxpeft.LoraConfig(**FIELDS), seed=4)
    assert len(tensors) == 4 * 2 * 2
    wanted = logits(model, ids)
    fxpeft.save_adapter(model, tmp_path / "ours")
    peer = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"), is_trainable=True).eval()
    assert_close(logits(peer, ids), wanted)
    for each in (peer, model):
        each(ids, labels=ids).loss.backward()
    theirs = {n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if p.grad is not None}
    held = {p.data_ptr(): p.grad for p in model.parameters()}
    assert all(held[t.data_ptr()] is not None for t in fxpeft.adapter_state_dict(model).values())
    for key, tensor in fxpeft.adapter_state_dict(model).items():
        assert_close(held[tensor.data_ptr()], theirs[key], size=4 * float(theirs[key].abs().max()))
    randomise((p for p in peer.parameters() if p.requires_grad), seed=5)
    peer.save_pretrained(str(tmp_path / "theirs"))
    loaded = repeated()
    fxpeft.prepare_hotswap(loaded, 8)
    fxpeft.load_adapter(loaded, tmp_path / "theirs", "theirs")
    assert_close(logits(loaded, ids), logits(peer, ids))
    assert generated(loaded, ids) == generated(peer, ids)
    fxpeft.hotswap(loaded, tmp_path / "ours", "theirs")
    assert_close(logits(loaded, ids), wanted)
    assert_close(logits(fxpeft.adopt(peer), ids), logits(peer, ids))


def generated(model: Any, ids: Any) -> list[list[int]]:
    found: list[list[int]] = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    return found


def test_other_models(tmp_path: Path) -> None:
    assert repeated(tiny_bert).config.num_hidden_layers == 4
    config = Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, max_window_layers=1,
    )  # fmt: skip
    types = config.layer_types
    model = repeated(lambda: Qwen2ForCausalLM(config).eval())
    assert model.config.layer_types == [types[0], types[1], types[1], types[0]]
    assert logits(model).shape == (2, 6, 40)


def test_what_does_not_fit_is_named() -> None:
    model = tiny_llama()
    with pytest.raises(fxpeft.AdapterError, match=r"found 2 layers that aren't: call fxpeft.replicate_layers"):
        fxpeft.add_adapter(model, fxpeft.LoraConfig(**FIELDS))
    with pytest.raises(fxpeft.AdapterError, match="found 2 layers that aren't"):  # as a file may ask for
        fxpeft.add_adapter(model, fxpeft.LoraConfig(**{**FIELDS, "layer_replication": [[0, 10**12]]}))
    for ranges, message in (
        ([[0, 3]], "the model has 2 layers, found number 2"),
        ([[0, 10**12]], "the model has 2 layers, found number 999999999999"),
        ([[1, 1]], "expected ranges of layers"),
        ([], "expected ranges of layers"),
        ("0-2", "expected ranges of layers"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            fxpeft.replicate_layers(model, ranges)  # type: ignore[arg-type]
    with pytest.raises(fxpeft.AdapterError, match="Linear has none"):
        fxpeft.replicate_layers(nn.Linear(2, 3), RANGES)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(fxpeft.AdapterError, match="expected a bare model"):
        fxpeft.replicate_layers(model, RANGES)
