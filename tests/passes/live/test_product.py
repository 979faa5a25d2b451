"""What a fold may write to: the product of a live module, and why a module has none."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_gpt2
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import fxpeft
from fxpeft.passes.base import PassError
from fxpeft.passes.live.product import product_of
from fxpeft.passes.targets.operations import Conv


def test_names_of_what_the_product_reads() -> None:
    assert product_of(nn.Embedding(4, 3))[1:] == ("weight", True, None)
    assert product_of(nn.Linear(4, 3, bias=False))[1:] == ("weight", False, None)
    assert product_of(nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"))[1:] == ("weight", False, "bias")
    assert product_of(tiny_gpt2().transformer.h[0].attn.c_attn)[1:] == ("weight", True, "bias")
    # it multiplies what it looks up, and asks its weight for the dtype: neither is another use
    assert product_of(Gemma3TextScaledWordEmbedding(7, 4, 0, embed_scale=2.5))[1:] == ("weight", True, None)


def test_an_adapted_module_has_the_product_of_its_base() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    bare = product_of(net[0])
    fxpeft.add_adapter(net, fxpeft.LoraConfig(r=2, target_modules=["0"]))
    assert product_of(net[0]) == bare
    assert bare.view(net[0].weight).shape == (3, 4)


def test_a_module_is_asked_anew_where_its_weight_is_replaced() -> None:
    """What was read off the graph is kept for modules that are alike; what the weight is isn't."""
    module = nn.Linear(4, 3)
    product_of(module)
    module.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PassError, match=r"Linear\.weight is a Parameter of int8: dequantise it first"):
        product_of(module)
    with pytest.raises(PassError, match="offloaded"):
        product_of(nn.Linear(4, 3, device="meta"))


class OtherBias(nn.Linear):
    """Its bias is no tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias * 2)


def test_no_product() -> None:
    with pytest.raises(PassError, match="no kind of target"):
        product_of(nn.LayerNorm(3))
    with pytest.raises(PassError, match="computes an operand of its product"):
        product_of(OtherBias(4, 3))
    replaced = nn.Linear(4, 3)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(PassError, match=r"can't look into Linear\.forward"):
        product_of(replaced)
    with pytest.raises(PassError, match=r"can't look into|computed when it is read"):
        product_of(parametrize.register_parametrization(nn.Linear(5, 3), "weight", nn.Tanh()))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), None),
        (nn.Conv2d(4, 6, 3, padding=2, dilation=2), None),
        (nn.Conv2d(4, 6, 3, padding="valid", padding_mode="circular"), None),
        (nn.Conv2d(4, 6, 1, padding="same", padding_mode="circular", dilation=2), None),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), "pads with zeros"),
        (nn.Conv2d(4, 6, 1, padding=(0, 1), padding_mode="reflect"), "pads with zeros"),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), "without dilation"),
        (nn.Conv2d(4, 6, 3, groups=2), "mixes all groups"),
    ],
)
def test_when_an_update_is_a_change_of_the_weight(module: nn.Module, reason: str | None) -> None:
    kind = product_of(module).kind
    assert isinstance(kind, Conv)
    why = kind.why_no_delta(module)
    assert why is None if reason is None else reason in str(why)
