"""Every method in an exported program: what the live model computes with the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from method_cases import KINDS, METHODS, adapted, output
from tiny import randomise

import fxpeft
from fxpeft.adapters.state import state_of
from fxpeft.methods import following, method_of
from fxpeft.methods.base import Base, SlotValues
from fxpeft.targets.sites import make_plan

KIND = KINDS["Linear"]


@pytest.fixture(scope="module")
def program() -> Any:
    return torch.export.export(KIND.net(), (KIND.input(),))


@pytest.mark.parametrize("name", METHODS)
def test_what_needs_the_bases_weights_says_so(name: str, tmp_path: Path) -> None:
    """A package has them for the methods that do."""
    case, settings = METHODS[name], {"save_precomputed_indices": False} if name == "Super-Tuning" else {}
    fxpeft.save_adapter(adapted(case, KIND, **settings), tmp_path)
    nets, found = [KIND.net(), KIND.net()], list[SlotValues]()
    randomise(nets[1].parameters(), seed=7)
    for net in nets:
        try:
            fxpeft.load_adapter(net, tmp_path)
        except fxpeft.CheckpointError:  # AdaMSS's groups are others
            break
        adapter = state_of(net).get("default")
        values, method = adapter.current(), method_of(adapter.config)
        base = Base(net.first, shared=values.shared)
        found.append(method.lower(adapter.site_plan("first"), values.sites["first"], base))
    same = len(found) == 2 and all(u is v if u is None else torch.equal(u, v) for u, v in zip(*found, strict=True))
    assert same is (case.declared not in following())


@pytest.mark.parametrize("name", METHODS)
def test_a_program_computes_what_the_live_model_does(name: str, program: Any, tmp_path: Path) -> None:
    case, x = METHODS[name], KIND.input()
    live = adapted(case, KIND)
    wanted = output(live, x)
    if name in ("TinyLoRA", "UniLoRA"):  # what a site has follows from its place in the model
        made = fxpeft.rewrite(program, make_plan(KIND.net(), case.config()), state_dict=fxpeft.adapter_state_dict(live))
    else:
        fxpeft.save_adapter(live, tmp_path)
        made = fxpeft.rewrite(program, tmp_path)
    assert (wanted - output(KIND.net(), x)).abs().max() > 0.01
    assert_close(output(made.module(), x), wanted)
