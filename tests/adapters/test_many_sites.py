"""So many more sites, so many more calls: no verb looks at all sites, or at all that an adapter brings, for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import calls_by_function
from tiny import randomise
from torch import Tensor, nn

import fxpeft
from fxpeft import IA3Config, LoraConfig
from fxpeft.methods.config import AdapterConfig

SIZES = (4, 8, 12)  # layers
MOST = 0.04  # by which the second step may be larger than the first: sets and dicts


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def stack(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(layers)))


def lora(**fields: Any) -> Callable[[int], LoraConfig]:
    return lambda layers: LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["up", "down"]} | fields)


def listed(layers: int) -> LoraConfig:
    names = [f"{number}.{leaf}" for number in range(layers) for leaf in ("up", "down")]
    ranks = dict.fromkeys(names[::2], 2)
    return LoraConfig(r=3, lora_alpha=7, target_modules=names, rank_pattern=ranks)


CONFIGS: dict[str, Callable[[int], AdapterConfig]] = {
    "names": lora(),
    "bias": lora(bias="all"),  # more in most verbs when each site looked at all that the adapter brings
    "dora": lora(use_dora=True, bias="lora_only"),
    "listed": listed,
    "patterns": lora(target_modules="kind:linear", exclude_modules="in=6", rank_pattern={"out=6": 2}),
    "saved": lora(target_modules=["up"], modules_to_save=["norm"]),
    "ia3": lambda layers: IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
}


def of_verbs(layers: int, config: str, folder: Path) -> dict[str, Counter[str]]:
    """Verb -> its calls, by function."""
    made, found, model = CONFIGS[config](layers), {}, stack(layers)

    def count(name: str, work: Callable[[], Any]) -> None:
        found[name] = calls_by_function(work)

    count("plan", lambda: fxpeft.plan(model, made, roles=False))
    count("add", lambda: fxpeft.add_adapter(model, made))
    randomise(p for p in model.parameters() if p.requires_grad)
    count("save", lambda: fxpeft.save_adapter(model, folder))
    count("load", lambda: fxpeft.load_adapter(model, folder, "other"))
    count("set", lambda: fxpeft.set_adapter(model, "default"))
    count("fold", lambda: fxpeft.fold(model))
    count("unfold", lambda: fxpeft.unfold(model))
    if type(made) is LoraConfig and not made.use_dora and config != "saved":
        fxpeft.add_adapter(model, lora()(layers), "plain")
        count("blend", lambda: fxpeft.add_weighted_adapter(model, ["default", "plain"], [1, 2], "sum", "cat"))
    if config in ("dora", "ia3"):
        count("convert", lambda: fxpeft.convert(model, "default", rank=2))
    for name in [name for name in fxpeft.loaded_adapters(model) if name != "default"]:
        count("delete", lambda: fxpeft.delete_adapter(model, name))  # noqa: B023
    fxpeft.set_adapter(model, "default")
    methods = [{"dora": "dora", "ia3": "ia3"}.get(config, "lora")]
    count("prepare", lambda: fxpeft.prepare_hotswap(model, 8, methods=methods))
    count("hotswap", lambda: fxpeft.hotswap(model, folder))
    count("load into slots", lambda: fxpeft.load_adapter(model, folder, "other"))
    count("set in slots", lambda: fxpeft.set_adapter(model, "default"))
    count("release", lambda: fxpeft.release_hotswap(model))
    count("merge", lambda: fxpeft.merge_and_unload(model))
    count("bridge", lambda: fxpeft.get_peft_model(stack(layers), made))
    return found


def curvature(counts: Sequence[int]) -> float:
    """By how much the second step of a count is larger than the first; 0 where it grows with the size, 1 with its
    square where nothing else does."""
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    return (second - first) / max(first, 100)


def curved(config: str, folder: Path) -> dict[str, tuple[float, list[str]]]:
    """Verb -> the curvature of its calls, where that is too much, and the functions whose calls are most of it."""
    counts, found = [of_verbs(layers, config, folder / str(layers)) for layers in SIZES], {}
    for verb in counts[0]:
        sizes = [each[verb] for each in counts]
        if (curve := curvature([each.total() for each in sizes])) > MOST:
            bent = {key: sizes[2][key] - 2 * sizes[1][key] + sizes[0][key] for key in sizes[2]}
            found[verb] = round(curve, 2), sorted(bent, key=lambda key: -bent[key])[:5]
    return found


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_calls_grow_with_the_sites(config: str, tmp_path: Path) -> None:
    of_verbs(1, config, tmp_path / "first")  # what is done once for each class
    alive = stack(1)  # which holds the classes that are made for a prepared model's modules
    fxpeft.prepare_hotswap(alive, 8, targets=["up", "down"])
    found = curved(config, tmp_path / "once")
    if found:  # a cache of the process that was full, or was emptied, on the way: not so the next time
        again = curved(config, tmp_path / "again")
        found = {verb: again[verb] for verb in found.keys() & again.keys()}
    assert found == {}


def test_what_looks_at_all_for_each_is_seen() -> None:
    def each_at_all(names: list[str]) -> None:
        assert not any(name.endswith(f".{other}.") for name in names for other in names)

    names = [[name for name, _ in stack(layers).named_modules()] for layers in SIZES]
    counts = [calls_by_function(lambda: each_at_all(each)).total() for each in names]  # noqa: B023
    assert curvature(counts) > 10 * MOST
