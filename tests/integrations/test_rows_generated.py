"""``generate`` and batches whose rows have adapters of their own: beams and several sequences repeat the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import save_each
from tiny import tiny_llama
from transformers import T5Config, T5ForConditionalGeneration

import fxpeft

IDS = torch.randint(3, 40, (3, 5), generator=torch.Generator().manual_seed(1))
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sequences of beams": {"num_beams": 4, "num_return_sequences": 2},
}


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=39
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_every_row_is_generated_as_alone(make: Any, tmp_path: Path) -> None:
    targets = ["q_proj", "down_proj"] if make is tiny_llama else ["q", "wo"]
    configs = {
        "a": fxpeft.LoraConfig(r=3, lora_alpha=90, target_modules=targets),
        "b": fxpeft.LoraConfig(r=2, lora_alpha=70, target_modules=targets[:1], use_rslora=True),
    }
    folders = save_each(make, configs, tmp_path)
    model = make()
    fxpeft.prepare_hotswap(model, 8, targets=targets, lanes=2)
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    names = ["b", "__base__", "a"]
    for settings in WAYS.values():
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 5, **settings}
        count = settings.get("num_return_sequences", 1)
        expected = []
        for row, name in enumerate(names):
            alone = make()
            if name in folders:
                fxpeft.load_adapter(alone, folders[name])
            expected += list(alone.generate(IDS[row : row + 1], **settings))
        found = model.generate(IDS, adapter_names=names, **settings)
        assert len(found) == len(names) * count
        assert torch.equal(found, torch.stack(expected))
        with fxpeft.rows(model, names):
            assert torch.equal(model.generate(IDS, **settings), found)
