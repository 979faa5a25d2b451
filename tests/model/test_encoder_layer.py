"""``nn.TransformerEncoderLayer`` in eval computes from its children's weights: its fast path is off under adapters.

PEFT's adapters of ``linear1`` do nothing on that path either, so there the reference is PEFT with the path switched
off in torch; for a whole ``self_attn`` PEFT is right as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import randomise
from torch import Tensor, nn

import fxpeft
from fxpeft import LoraConfig

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))
PADDED = torch.arange(5) >= torch.tensor([[5], [3], [4]])  # [3, 5]


class Encoder(nn.Module):
    """Two layers and a head."""

    def __init__(self, cls: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer) -> None:
        super().__init__()
        layer = cls(8, 2, dim_feedforward=13, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        """``x``: [batch, length, 8], ``padded``: [batch, length]."""
        return self.head(self.encoder(x, src_key_padding_mask=padded))  # type: ignore[no-any-return]


class OwnLayer(nn.TransformerEncoderLayer):
    """Somebody's subclass, whose forward is torch's at heart."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Takes what torch's takes."""
        return super().forward(src, *args, **kwargs) * 1.5


def encoder(cls: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer) -> Encoder:
    torch.manual_seed(0)
    model = Encoder(cls).eval()
    randomise((p for n, p in model.named_parameters() if n.endswith("bias")), seed=5)
    return model


@contextmanager
def slow_path() -> Iterator[None]:
    """torch's own switch, which is one for the whole process."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


CONFIGS: dict[str, dict[str, Any]] = {
    "linears": {"target_modules": ["linear1", "linear2"]},
    "one layer": {"target_modules": ["layers.1.linear1"]},
    "self_attn": {"target_modules": ["head"], "modules_to_save": ["self_attn"]},
    "norm": {"target_modules": ["head"], "modules_to_save": ["norm1"]},
    "bias": {"target_modules": ["linear1"], "bias": "all"},
}


def peft_file(base: nn.Module, path: Path, what: str) -> Any:
    """PEFT's model with random adapter values, saved and loaded again."""
    config = peft.LoraConfig(r=3, lora_alpha=5, **CONFIGS[what])
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()  # type: ignore[arg-type]
    randomise((p for p in model.parameters() if p.requires_grad), seed=2)
    model.save_pretrained(str(path))
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [nn.TransformerEncoderLayer, OwnLayer])
@pytest.mark.parametrize("what", CONFIGS)
@torch.no_grad()
def test_adapters_take_part_in_eval(what: str, cls: type[nn.TransformerEncoderLayer], tmp_path: Path) -> None:
    base = encoder(cls)
    theirs, model = peft_file(base, tmp_path, what), copy.deepcopy(base)
    with slow_path():
        expected = theirs(X)
        kept = theirs(X, PADDED)[~PADDED]
    if what == "self_attn":  # PEFT is right with the fast path on, too
        assert torch.allclose(theirs(X), expected, atol=1e-5)
    assert (expected - base(X)).abs().max() > 0.05
    fxpeft.load_adapter(model, tmp_path, "a")
    assert torch.allclose(model(X), expected, atol=1e-5)
    assert torch.allclose(model(X, PADDED)[~PADDED], kept, atol=1e-5)
    with fxpeft.disabled(model):  # the bare model runs as it always did, padding included
        assert torch.equal(model(X), base(X))
        assert torch.equal(model(X, PADDED), base(X, PADDED))
    fxpeft.fold(model)
    assert torch.allclose(model(X), expected, atol=1e-5)
    fxpeft.unfold(model)
    assert torch.allclose(model(X), expected, atol=1e-5)
    other = copy.deepcopy(model)
    fxpeft.delete_adapter(model, "a")
    assert torch.equal(model(X, PADDED), base(X, PADDED))
    assert type(model.encoder.layers[0]) is cls
    assert type(model.encoder) is nn.TransformerEncoder
    assert torch.allclose(other(X), expected, atol=1e-5)


@pytest.mark.parametrize("what", CONFIGS)
@torch.no_grad()
def test_slots_take_part_in_eval(what: str, tmp_path: Path) -> None:
    base = encoder()
    theirs, model = peft_file(base, tmp_path, what), copy.deepcopy(base)
    with slow_path():
        expected, kept = theirs(X), theirs(X, PADDED)[~PADDED]
    fields = dict(CONFIGS[what])
    fxpeft.prepare_hotswap(model, 8, targets=fields.pop("target_modules"), **fields)
    assert torch.allclose(model(X), base(X), atol=1e-5)
    fxpeft.load_adapter(model, tmp_path, "a")
    assert torch.allclose(model(X), expected, atol=1e-5)
    assert torch.allclose(model(X, PADDED)[~PADDED], kept, atol=1e-5)
    fxpeft.release_hotswap(model)
    assert torch.allclose(model(X), expected, atol=1e-5)
    fxpeft.remove(model)
    assert torch.equal(model(X, PADDED), base(X, PADDED))
    assert type(model.encoder.layers[1]) is nn.TransformerEncoderLayer


def test_a_layer_as_the_whole_model() -> None:
    base = encoder().encoder.layers[0]
    model = copy.deepcopy(base)
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["linear1"]))
    randomise(fxpeft.adapter_state_dict(model).values())
    trained = model(X).detach()
    with torch.no_grad():
        assert torch.allclose(model(X), trained, atol=1e-6)
        assert (model(X) - base(X)).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("what", ["linears", "self_attn"])
def test_compiled_slots(what: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    base = encoder()
    theirs = peft_file(base, tmp_path, what)
    fields = dict(CONFIGS[what])
    fxpeft.prepare_hotswap(base, 8, targets=fields.pop("target_modules"), **fields)
    compiled = torch.compile(base)
    with fxpeft.testing.no_recompiles() as counted, torch.no_grad():
        with slow_path():
            expected, bare = theirs(X), theirs.base_model.model
            with theirs.disable_adapter():
                without = bare(X)
        assert torch.allclose(compiled(X), without, atol=1e-5)
        fxpeft.load_adapter(base, tmp_path, "a")
        assert torch.allclose(compiled(X), expected, atol=1e-5)
    assert counted.graphs == 1
