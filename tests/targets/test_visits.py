"""While one adapter comes in, a model's modules are walked once, and no pattern is asked twice about a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, ItemsView, ValuesView
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import randomise, tiny_llama
from torch import nn

import fxpeft
from fxpeft import LoraConfig
from fxpeft.checkpoint import layouts
from fxpeft.methods.config import AdapterConfig
from fxpeft.model import modules as model_modules
from fxpeft.model.modules import Modules
from fxpeft.passes.targets.names import NameSelector
from fxpeft.passes.targets.regex import Expression
from fxpeft.passes.targets.terms import OfKind
from fxpeft.targets.sites import find_sites, make_plan


class Counting(dict[str, nn.Module]):
    """A module's children, and how often they were gone through."""

    walks = 0

    def items(self) -> ItemsView[str, nn.Module]:  # type: ignore[override]
        self.walks += 1
        return super().items()

    def values(self) -> ValuesView[nn.Module]:  # type: ignore[override]
        self.walks += 1
        return super().values()


def named() -> AdapterConfig:
    return LoraConfig(
        r=3, lora_alpha=7, target_modules=r".*\.(?:q_proj|down_proj)", exclude_modules=r".*\.0\..*up_\w+",
        rank_pattern={r"layers\.(?:0|5)\.self_attn\.q_proj": 5, r".*1.*down_proj": 2}, alpha_pattern={"down_proj": 3},
    )  # fmt: skip


def by_pattern() -> AdapterConfig:
    return LoraConfig(r=3, lora_alpha=7, target_modules="kind:linear & name:**.mlp.*", rank_pattern={"in=48": 2})


CONFIGS = {"names": named, "patterns": by_pattern}


def saved(folder: Path, config: Callable[[], AdapterConfig]) -> Path:
    model = tiny_llama()
    fxpeft.add_adapter(model, config())
    randomise(p for p in model.parameters() if p.requires_grad)
    fxpeft.save_adapter(model, folder)
    return folder


class Visits:
    """What is visited from here on in one model."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: Counter[tuple[Any, ...]] = Counter()
        self.children = Counting(model.model.layers._modules)  # type: ignore[union-attr, arg-type]
        vars(model.model.layers)["_modules"] = self.children
        for owner, name in (
            (Expression, "match"), (Expression, "fullmatch"), (NameSelector, "why_not"), (OfKind, "__call__"),
        ):  # fmt: skip
            self._count(monkeypatch, owner, name)
        for name in ("kind_of", "idle", "base_modules"):
            self._count(monkeypatch, model_modules, name)
        self._count(monkeypatch, layouts, "below_module")

    def _count(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.asked[(name, *(a if isinstance(a, str) else id(a) for a in args[:2]))] += 1
            kept.append(args)  # an id is one object's for as long as that lives
            return real(*args, **kwargs)

        kept: list[Any] = []
        monkeypatch.setattr(owner, name, counted)

    def of(self, name: str) -> list[int]:
        """How often one and the same was asked, of each."""
        return [count for (what, *_), count in self.asked.items() if what == name]


def add(model: Any, folder: Path, config: Callable[[], AdapterConfig]) -> None:
    fxpeft.add_adapter(model, config())


def load(model: Any, folder: Path, config: Callable[[], AdapterConfig]) -> None:
    fxpeft.load_adapter(model, folder)


def inject(model: Any, folder: Path, config: Callable[[], AdapterConfig]) -> None:
    fxpeft.inject(model, load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("verb", [add, load, inject])
def test_one_walk_and_no_question_twice(
    verb: Callable[..., None], config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = saved(tmp_path, CONFIGS[config]), tiny_llama()
    visits = Visits(model, monkeypatch)
    verb(model, folder, CONFIGS[config])
    assert visits.children.walks == 1
    for what in ("match", "fullmatch", "why_not", "__call__", "kind_of", "idle"):
        assert set(visits.of(what)) <= {1}, what
    assert len(visits.of("kind_of")) >= 4
    assert visits.of("below_module") == ([] if verb is add else [1])


@pytest.mark.parametrize("config", CONFIGS)
def test_a_swap_walks_once_for_a_new_config_and_never_for_a_known_one(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = saved(tmp_path, CONFIGS[config]), tiny_llama()
    fxpeft.prepare_hotswap(model, 8)
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["k_proj"]))
    visits = Visits(model, monkeypatch)
    fxpeft.hotswap(model, folder)
    assert visits.children.walks == 1
    assert set(visits.of("why_not")) == {1}
    before = len(visits.asked)
    for verb in (fxpeft.hotswap, fxpeft.load_adapter):
        verb(model, folder, **({} if verb is fxpeft.hotswap else {"name": "other"}))  # type: ignore[operator]
        assert visits.children.walks == 1
    assert {what for what, *_ in list(visits.asked)[before:]} == {"below_module"}


def test_modules_are_walked_where_first_asked_for_and_know_what_they_were_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama()
    visits = Visits(model, monkeypatch)
    modules = Modules(model)
    assert Modules.of(modules) is modules
    assert visits.children.walks == 0
    assert modules["model.layers.1.mlp.up_proj"] is model.model.layers[1].mlp.up_proj
    assert "model.layers.7" not in modules
    assert [*modules] == [name for name, _ in tiny_llama().named_modules()]
    for _ in range(2):
        assert modules.kind("model.layers.1.mlp.up_proj").out_features == 48
        assert modules.idle("model.layers.1.mlp.up_proj") is None
    assert visits.children.walks == 1
    assert visits.of("kind_of") == visits.of("idle") == [1]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_plan_leaves_the_config_that_was_given_as_it_was(config: str) -> None:
    given = CONFIGS[config]()
    plan = make_plan(tiny_llama(), given)
    assert given == CONFIGS[config]()
    assert plan.config is not given
    assert plan.config.rank_pattern is not given.rank_pattern  # type: ignore[attr-defined]


def test_sites_are_found_whatever_rank_comes_to_them() -> None:
    net = nn.Sequential(nn.Conv2d(6, 9, 3, groups=3), nn.Conv1d(10, 4, 1, groups=2), nn.Flatten(), nn.Linear(5, 7))
    found = find_sites(net, ["0", "1", "3"], exclude=["1"], modules_to_save=["3"], bias="all")
    assert {site: kind.groups for site, kind in found.kinds.items()} == {"0": 3}
    assert (found.saved, found.tensors) == (["3"], ["0.bias", "1.bias"])
    fxpeft.prepare_hotswap(net, 4, targets="kind:conv")
