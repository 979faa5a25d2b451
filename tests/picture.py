"""A picture of a model, to show that an operation left everything as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def picture(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Classes, instance attributes, parameters' identity and ``requires_grad``, values, adapters, output."""
    state = vars(model).get("_fxpeft")
    return {
        "classes": [(n, type(m)) for n, m in model.named_modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "parameters": [(n, p.requires_grad, id(p)) for n, p in model.named_parameters(remove_duplicate=False)],
        "adapters": state and (list(state.adapters), list(state.active), state.enabled),
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "output": model(ids).logits,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Bit for bit."""
    for key in ("classes", "attributes", "parameters", "adapters"):
        assert after[key] == before[key]
    assert list(after["values"]) == list(before["values"])
    assert all(torch.equal(v, before["values"][k]) for k, v in after["values"].items())
    assert torch.equal(after["output"], before["output"])
