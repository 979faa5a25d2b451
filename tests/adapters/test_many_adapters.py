"""What a verb costs is a matter of the adapters that it is about, not of how many others the model has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import calls_of
from tiny import randomise, tiny_llama, token_ids

import fxpeft
from fxpeft import LoraConfig

FEW, MANY = 2, 7
LISTED = 40  # calls for one more adapter, to see that it is not meant: 14 sites take thousands


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "rank_pattern": {"up_proj": 2}} | fields
    )


def in_block(block: Callable[[Any], Any]) -> Callable[[Any, Path], None]:
    def verb(model: Any, folder: Path) -> None:
        with block(model):
            pass

    return verb


def fold_and_back(model: Any, folder: Path) -> None:
    fxpeft.fold(model, "a0")
    fxpeft.refold(model, "a1")
    fxpeft.unfold(model)


def load_and_delete(model: Any, folder: Path) -> None:
    fxpeft.load_adapter(model, folder, "new")
    fxpeft.delete_adapter(model, "new")


VERBS: dict[str, Callable[[Any, Path], Any]] = {
    "set_adapter": lambda model, folder: fxpeft.set_adapter(model, "a0"),
    "two at once": lambda model, folder: fxpeft.set_adapter(model, ["a0", "a1"]),
    "load_adapter, delete_adapter": load_and_delete,
    "add_adapter": lambda model, folder: fxpeft.add_adapter(model, lora(), "new"),
    "disable_adapters": lambda model, folder: fxpeft.disable_adapters(model),
    "enable_adapters": lambda model, folder: fxpeft.enable_adapters(model),
    "active": in_block(lambda model: fxpeft.active(model, "a1")),  # live: 450 for each adapter that was there
    "disabled": in_block(fxpeft.disabled),  # so too
    "scaled": in_block(lambda model: fxpeft.scaled(model, "a0", 0.5)),
    "folded": in_block(lambda model: fxpeft.folded(model, "a0")),
    "fold, refold, unfold": fold_and_back,  # prepared: each lowered all others anew, or looked at all their sites
    "set_scale": lambda model, folder: fxpeft.set_scale(model, "a0", 0.5),
    "add_weighted_adapter": lambda model, folder: fxpeft.add_weighted_adapter(model, ["a0", "a1"], [1, 2], "b", "cat"),
    "adapter_state_dict": lambda model, folder: fxpeft.adapter_state_dict(model, "a0"),
    "save_adapter": lambda model, folder: fxpeft.save_adapter(model, folder / "again", "a0"),
    "plan": lambda model, folder: fxpeft.plan(model, lora(), roles=False),
    "forward": lambda model, folder: model(token_ids()),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    found = {}
    for dora in (False, True):
        model, found[dora] = tiny_llama(), tmp_path_factory.mktemp("saved")
        fxpeft.add_adapter(model, lora(use_dora=dora))
        randomise(p for p in model.parameters() if p.requires_grad)
        fxpeft.save_adapter(model, found[dora])
    return found


def with_adapters(count: int, folder: Path, prepared: bool) -> Any:
    model = tiny_llama()
    if prepared:
        fxpeft.prepare_hotswap(model, 16, methods=["lora", "dora"], rank="static")
    for number in range(count):
        fxpeft.load_adapter(model, folder, f"a{number}")
    fxpeft.set_adapter(model, "a1")
    return model


@pytest.mark.parametrize("prepared", [False, True], ids=["live", "prepared"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_no_verb_looks_at_adapters_that_it_is_not_about(
    dora: bool, prepared: bool, folders: dict[bool, Path], tmp_path: Path
) -> None:
    refused = {"add_weighted_adapter"} if dora else set()
    refused |= {"two at once"} if dora and prepared else set()  # a gain is alone in its slot
    grown = {}
    for name, verb in VERBS.items():
        if name in refused:
            continue
        counts = []
        for count in (FEW, MANY):
            model = with_adapters(count, folders[dora], prepared)
            verb(model, folders[dora])  # what is done once a class, a config or a folder
            if name in ("add_adapter", "add_weighted_adapter"):
                fxpeft.delete_adapter(model, "new" if name == "add_adapter" else "b")
            counts.append(calls_of(lambda: verb(model, folders[dora])))  # noqa: B023
        grown[name] = (counts[1] - counts[0]) / (MANY - FEW)
    assert {name: more for name, more in grown.items() if more > LISTED} == {}


def test_what_was_counted_is_seen() -> None:
    """The count that all of this rests on grows with what does grow: walking the parameters of all adapters."""
    counts = []
    for count in (FEW, MANY):
        model = tiny_llama()
        for number in range(count):
            fxpeft.add_adapter(model, lora(), f"a{number}")
        counts.append(calls_of(lambda: list(model.parameters())))  # noqa: B023
    assert (counts[1] - counts[0]) / (MANY - FEW) > 10 * LISTED


def test_the_base_changes_and_an_adapter_that_was_not_shown_follows(folders: dict[bool, Path]) -> None:
    """DoRA's gains follow from the base's weights: of one that is not active they are found when it is."""
    live, served = tiny_llama(), tiny_llama()
    fxpeft.prepare_hotswap(served, 16, methods=["dora"])
    for model in (live, served):
        for name in ("a", "b", "c"):
            fxpeft.load_adapter(model, folders[True], name)
        fxpeft.fold(model, "c")
        fxpeft.set_adapter(model, "a")
    for _ in range(2):
        assert torch.allclose(served(token_ids()).logits, live(token_ids()).logits, atol=1e-5)
        for model in (live, served):
            fxpeft.set_adapter(model, [])
            fxpeft.unfold(model)
            fxpeft.set_adapter(model, "b")
            assert fxpeft.active_adapters(model) == ["b"]
        assert torch.allclose(served(token_ids()).logits, live(token_ids()).logits, atol=1e-5)
        for model in (live, served):
            fxpeft.fold(model, "c")
            fxpeft.set_adapter(model, "a")
