"""What is no adapter's tensor is refused by its key before anything changed; what can be converted is taken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import logits, randomise, tiny_llama
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.errors import CheckpointError

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])


def nested(value: Tensor) -> Tensor:
    return torch.nested.nested_tensor([value[0], value[1]])


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "int": lambda t: 3,
    "list": lambda t: t.tolist(),
    "none": lambda t: None,
    "text": lambda t: "lora",
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "nested": nested,
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "int64": lambda t: t.to(torch.int64),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t > 0,
    "uint16": lambda t: t.abs().to(torch.uint16),
    "array of integers": lambda t: t.numpy().astype("int32"),
    "array of objects": lambda t: numpy.array([object()]),
}
RIGHT: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "array": lambda t: t.numpy(),
    "array of halves": lambda t: t.numpy().astype("float16"),
    "strided": lambda t: t.repeat(1, 2)[:, : t.shape[1]],
    "parameter": lambda t: nn.Parameter(t),
}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA's folder and its tensors."""
    model = tiny_llama()
    fxpeft.add_adapter(model, CONFIG)
    randomise(fxpeft.adapter_state_dict(model).values(), seed=3)
    fxpeft.save_adapter(model, tmp_path / "good")
    return tmp_path / "good", load_file(tmp_path / "good" / "adapter_model.safetensors")


def served(prepared: bool) -> nn.Module:
    model = tiny_llama()
    if prepared:
        fxpeft.prepare_hotswap(model, 8, targets=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    fxpeft.add_adapter(model, CONFIG)
    if not prepared:
        randomise(fxpeft.adapter_state_dict(model).values(), seed=5)
    return model


@pytest.mark.parametrize("kind", WRONG)
def test_hotswap_refuses_by_key(kind: str, saved: tuple[Path, dict[str, Tensor]]) -> None:
    model = served(True)
    fxpeft.hotswap(model, saved[0])
    before = logits(model)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.lora_A"):
        fxpeft.hotswap(model, {**saved[1], KEY: WRONG[kind](saved[1][KEY])})
    assert torch.equal(logits(model), before)
    assert not torch.equal(before, logits(tiny_llama()))


@pytest.mark.parametrize("key", [None, 7, b"x"])
def test_a_key_that_is_no_text(key: object, saved: tuple[Path, dict[str, Tensor]]) -> None:
    model = served(True)
    with pytest.raises(CheckpointError, match=rf"{key!r}: expected text"):
        fxpeft.hotswap(model, {**saved[1], key: torch.ones(2)})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=rf"{key!r}: expected text"):
        fxpeft.load_adapter_state_dict(served(False), {**saved[1], key: torch.ones(2)})  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", RIGHT)
def test_hotswap_converts(kind: str, saved: tuple[Path, dict[str, Tensor]]) -> None:
    model, given = served(True), {k: RIGHT[kind](t) for k, t in saved[1].items()}
    fxpeft.hotswap(model, given)
    other = served(True)
    exact = {k: torch.as_tensor(v).detach().float() for k, v in given.items()}
    fxpeft.hotswap(other, exact)
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), logits(tiny_llama()))


@pytest.mark.parametrize("kind", ["int64", "uint8", "bool", "uint16"])
@pytest.mark.parametrize("prepared", [False, True])
def test_integers_in_a_file_leave_no_trace(kind: str, prepared: bool, saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = saved
    save_file({**tensors, KEY: WRONG[kind](tensors[KEY])}, folder / "adapter_model.safetensors", {"format": "pt"})
    bare = tiny_llama()
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.lora_A"):
        fxpeft.load_adapter(bare, folder)
    assert "_fxpeft" not in vars(bare)
    model = served(prepared)
    before = logits(model)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.lora_A"):
        fxpeft.load_adapter(model, folder, "other")
    assert torch.equal(logits(model), before)
    assert fxpeft.active_adapters(model) == ["default"]


class WithBuffers(nn.Module):
    """A head with an integer buffer, which ``modules_to_save`` brings whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


def test_integers_where_the_model_has_integers(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["up"], modules_to_save=["norm"])
    torch.manual_seed(0)
    model, x = WithBuffers(), torch.randn(5, 6)
    fxpeft.add_adapter(model, config)
    randomise(value for key, value in fxpeft.adapter_state_dict(model).items() if "norm" not in key)
    model.train()(x)
    fxpeft.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.norm.num_batches_tracked"
    assert tensors[key].dtype is torch.int64
    torch.manual_seed(0)
    fresh = WithBuffers()
    fxpeft.load_adapter(fresh, tmp_path)
    assert torch.equal(fxpeft.adapter_state_dict(fresh)[key], tensors[key])
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    save_file({**tensors, key: tensors[key].float()}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"num_batches_tracked: expected int64, found float32"):
        fxpeft.load_adapter(WithBuffers(), tmp_path)


def test_transformers_adapter_state_dict(saved: tuple[Path, dict[str, Tensor]]) -> None:
    from fxpeft.integrations.transformers import install, uninstall

    install()
    try:
        for value in (3, None, saved[1][KEY].long(), saved[1][KEY].to_sparse()):
            with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.lora_A"):
                tiny_llama().load_adapter(adapter_state_dict={**saved[1], KEY: value}, peft_config=CONFIG)
    finally:
        uninstall()


ODD: dict[str, Any] = {
    "1e400": "1e400", "-Infinity": "-Infinity", "NaN": "NaN", "huge": "1" + "0" * 400, "many digits": "9" * 5000,
    "surrogate": r'"\ud800"', "deep list": "[" * 50_000 + "]" * 50_000, "list": "[" * 30 + "]" * 30, "true": "true",
    "negative": "-3", "text": '"x"', "object": '{"a": {"b": [1e999]}}', "long list": json.dumps(["x"] * 300_000),
    "bytes": '"' + "y" * 2_000_000 + '"',
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_odd_values_in_every_field(kind: str, saved: tuple[Path, dict[str, Tensor]]) -> None:
    """The field is named, or the value is one that the field can have; nothing else is raised."""
    file = saved[0] / "adapter_config.json"
    values = json.loads(file.read_text())
    told: list[tuple[str, str]] = []
    for name in values:
        text = json.dumps({k: v for k, v in values.items() if k != name})
        file.write_text(f'{text[:-1]}, "{name}": {ODD[kind]}}}')
        model = tiny_llama()
        try:
            fxpeft.load_adapter(model, saved[0])
        except AdapterError as error:
            told.append((name, str(error)))
            assert "_fxpeft" not in vars(model)
    assert told
    for name, message in told:
        assert any(word in message for word in (name, "JSON", "doesn't fit", "target")), message
        assert len(message) < 5000
    file.write_text(json.dumps(values))
    fxpeft.load_adapter(tiny_llama(), saved[0])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("what", ["pipe", "folder", "link to a pipe", "link to nothing", "link to a device", "loop"])
def test_no_regular_file(name: str, what: str, saved: tuple[Path, dict[str, Tensor]]) -> None:
    path = saved[0] / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "link to a pipe":
        os.mkfifo(saved[0] / "pipe")
        path.symlink_to("pipe")
    else:
        path.symlink_to({"link to nothing": "nothing", "link to a device": "/dev/zero", "loop": name}[what])
    with pytest.raises(CheckpointError, match=f"expected {name}, found none"):
        fxpeft.load_adapter(tiny_llama(), saved[0])
    model = served(True)
    before = logits(model)
    with pytest.raises(AdapterError, match=f"expected {name}, found none"):
        fxpeft.hotswap(model, saved[0])
    assert torch.equal(logits(model), before)
