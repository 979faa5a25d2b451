"""``ensure_weight_tying`` of adapted modules and of such that are brought whole, against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import add
from closeness import assert_close
from tiny import logits, randomise, tiny_gpt2, tiny_llama, token_ids

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore")
CASES: dict[str, dict[str, Any]] = {
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings adapted": {"target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {"lm_head": 3}},
    "by an expression": {"target_modules": r"(.*\.)?(q_proj|embed_tokens)"},
}


def tied() -> Any:
    config = tiny_llama().config
    config.tie_word_embeddings, config.num_hidden_layers = True, 1
    torch.manual_seed(0)
    return type(tiny_llama())(config).eval()


def fields(case: str) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 5, "ensure_weight_tying": True, **CASES[case]}


@pytest.mark.parametrize("case", CASES)
def test_the_head_follows_the_embeddings_as_in_peft(case: str, tmp_path: Path) -> None:
    model, ids = tied(), token_ids()
    add(model, fxpeft.LoraConfig(**fields(case)), seed=4)
    wanted = logits(model, ids)
    fxpeft.save_adapter(model, tmp_path / "ours")
    peer = peft.PeftModel.from_pretrained(tied(), str(tmp_path / "ours"), is_trainable=True).eval()
    assert_close(logits(peer, ids), wanted)
    # a step of an optimiser changes what they share, for both alike
    for each in (peer, model):
        optimiser = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimiser.zero_grad()
            each(ids, labels=ids).loss.backward()
            optimiser.step()
    trained = logits(model, ids)
    assert (trained - wanted).abs().max() > 1e-3
    torch.testing.assert_close(logits(peer, ids), trained, atol=2e-4, rtol=1e-3)
    randomise((p for p in peer.parameters() if p.requires_grad), seed=5)
    peer.save_pretrained(str(tmp_path / "theirs"))
    loaded = tied()
    fxpeft.load_adapter(loaded, tmp_path / "theirs", trainable=True)
    assert_close(logits(loaded, ids), logits(peer, ids))
    theirs = {key for key in peft.get_peft_model_state_dict(peer) if ".base_layer." not in key}
    assert fxpeft.adapter_state_dict(loaded).keys() == theirs
    written = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    named = written.modules_to_save if "saved" in case else written.target_modules
    assert "embed_tokens" in str(named)
    assert "lm_head" not in str(named)
    wanted = logits(loaded, ids)
    fxpeft.prepare_hotswap(loaded, 8)
    assert_close(logits(loaded, ids), wanted)
    fxpeft.release_hotswap(loaded)
    if "alpha_pattern" in CASES[case]:
        with pytest.raises(fxpeft.AdapterError, match="these weights are tied"):
            fxpeft.fold(loaded)
        return
    fxpeft.fold(loaded)  # one weight, into which both fold the same
    assert_close(logits(loaded, ids), wanted)
    fxpeft.unfold(loaded)
    assert_close(logits(loaded, ids), wanted)


def test_what_is_not_tied() -> None:
    untied = tiny_llama()
    fxpeft.add_adapter(untied, fxpeft.LoraConfig(**fields("head adapted")))
    assert not any("embed_tokens" in key for key in fxpeft.adapter_state_dict(untied))
    other = tiny_gpt2()  # PEFT ties by the names embed_tokens and lm_head
    fxpeft.add_adapter(other, fxpeft.LoraConfig(r=2, target_modules=["wte"], ensure_weight_tying=True))
    assert not any("lm_head" in key for key in fxpeft.adapter_state_dict(other))
