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

import pytest
import torch
from beside import peft_file, peft_reads
from closeness import assert_close
from peer_versions import ALL_BIASES, needs
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


@pytest.mark.parametrize("cls", [nn.TransformerEncoderLayer, OwnLayer])
@pytest.mark.parametrize("what", CONFIGS)
@torch.no_grad()
def test_adapters_take_part_in_eval(what: str, cls: type[nn.TransformerEncoderLayer], tmp_path: Path) -> None:
    base = encoder(cls)
    if what == "bias":
        needs(*ALL_BIASES)
    peft_file(base, tmp_path, **CONFIGS[what])
    theirs, model = peft_reads(base, tmp_path), copy.deepcopy(base)
    with slow_path():
        expected = theirs(X)
        kept = theirs(X, PADDED)[~PADDED]
    if what == "self_attn":  # PEFT is right with the fast path on, too
        assert_close(theirs(X), expected)
    assert (expected - base(X)).abs().max() > 0.05
    fxpeft.load_adapter(model, tmp_path, "a")
    assert_close(model(X), expected)
    assert_close(model(X, PADDED)[~PADDED], kept)
    with fxpeft.disabled(model):  # the bare model runs as it always did, padding included
        assert torch.equal(model(X), base(X))
        assert torch.equal(model(X, PADDED), base(X, PADDED))
    fxpeft.fold(model)
    assert_close(model(X), expected)
    fxpeft.unfold(model)
    assert_close(model(X), expected)
    other = copy.deepcopy(model)
    fxpeft.delete_adapter(model, "a")
    assert torch.equal(model(X, PADDED), base(X, PADDED))
    assert type(model.encoder.layers[0]) is cls
    assert type(model.encoder) is nn.TransformerEncoder
    assert_close(other(X), expected)


@pytest.mark.parametrize("what", CONFIGS)
@torch.no_grad()
def test_slots_take_part_in_eval(what: str, tmp_path: Path) -> None:
    base = encoder()
    if what == "bias":
        needs(*ALL_BIASES)
    peft_file(base, tmp_path, **CONFIGS[what])
    theirs, model = peft_reads(base, tmp_path), copy.deepcopy(base)
    with slow_path():
        expected, kept = theirs(X), theirs(X, PADDED)[~PADDED]
    fields = dict(CONFIGS[what])
    fxpeft.prepare_hotswap(model, 8, targets=fields.pop("target_modules"), **fields)
    assert_close(model(X), base(X))
    fxpeft.load_adapter(model, tmp_path, "a")
    assert_close(model(X), expected)
    assert_close(model(X, PADDED)[~PADDED], kept)
    fxpeft.release_hotswap(model)
    assert_close(model(X), expected)
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
        assert_close(model(X), trained, terms=1)
        assert (model(X) - base(X)).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("what", ["linears", "self_attn"])
def test_compiled_slots(what: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    base = encoder()
    peft_file(base, tmp_path, **CONFIGS[what])
    theirs = peft_reads(base, tmp_path)
    fields = dict(CONFIGS[what])
    fxpeft.prepare_hotswap(base, 8, targets=fields.pop("target_modules"), **fields)
    compiled = torch.compile(base)
    with fxpeft.testing.no_recompiles() as counted, torch.no_grad():
        with slow_path():
            expected, bare = theirs(X), theirs.base_model.model
            with theirs.disable_adapter():
                without = bare(X)
        assert_close(compiled(X), without)
        fxpeft.load_adapter(base, tmp_path, "a")
        assert_close(compiled(X), expected)
    assert counted.graphs == 1
