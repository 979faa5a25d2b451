"""Rows of their own adapters on a model without slots: each is what it is alone, and what PEFT gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import save_each
from lane_net import CONFIGS, IDS, Net, alone, net, write
from picture import assert_same, picture
from tiny import logits, tiny_bert, tiny_llama, token_ids
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.integrations.peft import PeftModel

NAMES: list[Any] = [*CONFIGS, None]
TWO = {
    "a": LoraConfig(r=3, lora_alpha=50, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 20}),
    "b": LoraConfig(r=2, lora_alpha=30, target_modules=["up_proj", "q_proj"], use_rslora=True),
}


def loaded(folders: dict[str, str], make: Any = net) -> Any:
    model = make()
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    return model


@torch.no_grad()
def test_every_row_is_its_adapter_alone(tmp_path: Path) -> None:
    folders = write(tmp_path)
    model: Net = loaded(folders)
    before = [type(module) for module in model.modules()], model(IDS)
    expected = {None: alone(None), **{name: alone(folder) for name, folder in folders.items()}}
    with fxpeft.rows(model, NAMES):
        found = model(IDS)
        assert torch.equal(model(IDS), found)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(found[row], expected[name][row], rtol=1e-5, atol=1e-5)
    assert torch.equal(model(IDS, adapter_names=["__base__" if n is None else n for n in NAMES]), found)
    assert [type(module) for module in model.modules()] == before[0]
    assert torch.equal(model(IDS), before[1])
    fxpeft.set_adapter(model, ["lora", "rslora"])
    blend = model(IDS)
    with fxpeft.rows(model, [{"lora": 1.0, "rslora": 1}, "dora"] * 4):
        torch.testing.assert_close(model(IDS)[::2], blend[::2], rtol=1e-5, atol=1e-5)


def test_a_head_of_its_own_and_pefts_outputs(tmp_path: Path) -> None:
    configs = {
        "a": LoraConfig(r=3, lora_alpha=5, target_modules=["query"], modules_to_save=["classifier"]),
        "b": LoraConfig(r=2, lora_alpha=9, target_modules=["query", "value"], modules_to_save=["classifier"]),
        "c": LoraConfig(r=2, lora_alpha=7, target_modules=["value"], bias="all"),
    }
    folders = save_each(tiny_bert, configs, tmp_path)
    model, ids = loaded(folders, tiny_bert), token_ids(5)
    names = ["b", "a", "__base__", "c", "a"]
    found = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        own = tiny_bert() if name == "__base__" else loaded({name: folders[name]}, tiny_bert)
        torch.testing.assert_close(found[row], own(ids).logits[row], rtol=1e-5, atol=1e-5)
    theirs: Any = peft.PeftModel.from_pretrained(tiny_bert(), folders["a"], adapter_name="a").eval()
    theirs.load_adapter(folders["b"], "b")
    names = ["b", "a", "__base__", "b", "a"]
    expected = theirs(ids, adapter_names=names).logits
    torch.testing.assert_close(model(ids, adapter_names=names).logits, expected, rtol=1e-5, atol=1e-5)


def test_generated_with_beams(tmp_path: Path) -> None:
    folders = save_each(tiny_llama, TWO, tmp_path)
    model, ids = loaded(folders, tiny_llama), token_ids(3)
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        with fxpeft.rows(model, ["b", None, "a"]):
            found = model.generate(ids, **settings, **more)
        expected = []
        for row, name in enumerate(["b", None, "a"]):
            own = tiny_llama() if name is None else loaded({name: folders[name]}, tiny_llama)
            expected += list(own.generate(ids[row : row + 1], **settings, **more))
        assert torch.equal(found, torch.stack(expected))
    assert model.generate(ids, **settings).shape == (3, 10)
    bridged: Any = PeftModel.from_pretrained(tiny_llama(), folders["a"], adapter_name="a")
    bridged.load_adapter(folders["b"], "b")
    assert torch.equal(bridged.generate(ids, adapter_names=["b", "__base__", "a"], **settings, **more), found)


def test_a_call_that_is_broken_off_names_no_rows_afterwards(tmp_path: Path) -> None:
    model, ids = loaded(save_each(tiny_llama, TWO, tmp_path), tiny_llama), token_ids()
    expected = logits(model)
    for error in (KeyboardInterrupt, RuntimeError):

        def fail(*_: Any, error: type[BaseException] = error) -> None:
            raise error

        handle = model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(error):
            model(ids, adapter_names=["a", None])
        handle.remove()
        assert torch.equal(logits(model), expected)
        fxpeft.set_scale(model, "b", 1.0)


class Flat(nn.Module):
    """Its layers see all tokens of a batch as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.dummy_inputs = {"x": torch.zeros(2, 3, 6)}

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.flatten(0, 1)).view(*x.shape[:-1], -1)


def test_what_rows_cannot_have_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folders = save_each(tiny_llama, TWO, tmp_path)
    model, ids = loaded(folders, tiny_llama), token_ids()
    fxpeft.add_adapter(model, fxpeft.PromptTuningConfig(num_virtual_tokens=3), "prompt")
    fxpeft.set_adapter(model, "a")
    model.eval()
    before = picture(model, ids)
    for names, message in (
        (["a", "x"], "no adapter named 'x'"),
        (["a", {"b": 0.5}], "b: expected the weight 1 on a model without slots, found 0.5"),
        (["prompt", "a"], "prompt: a prompt is of all rows of a call"),
        ("a", "expected a name, names with weights, or None for each row"),
    ):
        with pytest.raises(AdapterError, match=message), fxpeft.rows(model, names):
            raise AssertionError("the block was entered")
        with pytest.raises(AdapterError, match=message):
            model(ids, adapter_names=names)
        assert_same(before, picture(model, ids) | {"attributes": before["attributes"]})
    with pytest.raises(AdapterError, match=r"expected 3 rows, as they were named, found an input of \[2, 6, 32\]"):
        model(ids, adapter_names=["a", "b", "a"])
    with fxpeft.rows(model, ["a", "b"]):
        found = logits(model)
        for change in (
            lambda: fxpeft.set_adapter(model, "b"),
            lambda: fxpeft.delete_adapter(model, "a"),
            lambda: fxpeft.set_scale(model, "a", 2.0),
            lambda: fxpeft.rows(model, ["b", "a"]).__enter__(),
            lambda: fxpeft.prepare_hotswap(model, 8),
            lambda: fxpeft.remove(model),
        ):
            with pytest.raises(AdapterError, match="can't be changed while rows are named"):
                change()
        assert torch.equal(logits(model), found)
    assert_same(before, picture(model, ids) | {"attributes": before["attributes"]})
    with pytest.raises(AdapterError, match="for inference"):
        model.train()(ids, adapter_names=["a", "b"])


def test_targets_that_see_no_rows_are_refused() -> None:
    flat = Flat().eval()
    fxpeft.add_adapter(flat, LoraConfig(r=2, target_modules=["up"]), "a")
    with pytest.raises(AdapterError, match=r"up: an input of \[15, 6\] for a batch of 5"):
        flat(torch.zeros(2, 1, 6), adapter_names=["a", None])  # as many flattened rows as the batch has
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2,
        )
    ).eval()  # fmt: skip
    fxpeft.add_adapter(experts, LoraConfig(r=2, target_parameters=["experts.down_proj"], target_modules=[]), "a")
    with pytest.raises(AdapterError, match="experts: an input of"):
        experts(token_ids(), adapter_names=["a", None])
