"""The whole swap matrix, each kind compiled once by Inductor; and one package with all kinds, compiled once too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import spread
from closeness import LONGEST, assert_close
from method_cases import KINDS, MAX_RANK, METHODS, MethodCase, adapted, output, served
from torch import Tensor, nn

import fxpeft
from fxpeft.methods import slot_needs
from fxpeft.passes.slots.kronecker import KRONECKER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

Adapter = tuple[nn.Module, Path]  # an adapter of a model of its own, freshly loaded, and the folder it came from


def methods_of(kind: str) -> list[str]:
    return [name for name, case in METHODS.items() if kind not in case.refused]


def changes(case: MethodCase, ranks: Sequence[int] = (1, 2, 3, 4, 5, 6, 8)) -> list[dict[str, Any]]:
    """Settings of the adapters of one method: for LoRA of these ranks and 7, and alphas and targets of their own."""
    if case.declared == "lora":
        several = [{"r": r, "lora_alpha": 7 - r, "rank_pattern": {}} for r in ranks]
        return [*several, {"r": 7, "rank_pattern": {"first": 1}, "alpha_pattern": {"first": 3}}]
    if case.declared in ("dora", "lora_bias"):
        return [{}, {"r": MAX_RANK, "rank_pattern": {"second": 1}}]
    return [{}, {"init_r": MAX_RANK}] if case.declared == "adalora" else [{}]


def adapters_of(kind: str, root: Path) -> dict[str, Adapter]:
    """Adapters of all methods that a kind has, read by PEFT from what was saved; where PEFT has none, as trained."""
    made: dict[str, Adapter] = {}
    # every rank of convolutions is in test_convolution_slots.py
    ranks = (1, 2, 8, 4) if kind in ("Conv1d", "Conv2d", "Conv3d") else (1, 2, 3, 4, 5, 6, 8)
    for name in methods_of(kind):
        case = METHODS[name]
        for number, settings in enumerate(changes(case, ranks)):
            model: nn.Module = adapted(case, KINDS[kind], seed=number, **settings)
            key = f"{case.declared}{'-rs' * (name == 'rsLoRA')}-{number}"
            fxpeft.save_adapter(model, root / key)
            if kind not in case.alone:
                model = peft.PeftModel.from_pretrained(KINDS[kind].net(), str(root / key)).eval()
            made[key] = model, root / key
    return made


@pytest.fixture(scope="module", autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pairs(names: Sequence[str]) -> list[str]:
    """A walk in which every name comes right after every other one, and after itself."""
    walk = [names[0]]
    left = {(a, b) for a in names for b in names}
    while left:
        here = walk[-1]
        step = next((b for b in names if (here, b) in left), None)
        step = step if step is not None else next(a for a in names if any((a, b) in left for b in names))
        left.discard((here, step))
        walk.append(step)
    return walk


@pytest.mark.parametrize("kind", KINDS)
def test_every_swap_of_a_kind_in_one_graph(kind: str, tmp_path: Path) -> None:
    adapters, x = adapters_of(kind, tmp_path), KINDS[kind].input()
    bare = output(KINDS[kind].net(), x)
    wanted = {name: output(model, x) for name, (model, _) in adapters.items()} | {"off": bare}
    assert all((value - bare).abs().max() > 0.01 for name, value in wanted.items() if name != "off")
    net = served(KINDS[kind], kind)
    moved = {name: tensor.data_ptr() for name, tensor in net.named_buffers()}
    graph = torch.compile(net, fullgraph=True)
    output(graph, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, (_, folder) in adapters.items():
            fxpeft.load_adapter(net, folder, name)
            assert_close(output(graph, x), wanted[name])
        # every pair of LoRAs, and of what slots hold in other places; every adapter twice
        apart = {slot_needs()[name.partition("-")[0]]: name for name in adapters}
        chosen = dict.fromkeys([*apart.values(), *(name for name in adapters if name.startswith("lora-")), "off"])
        for name in [*pairs([*chosen]), *adapters, *reversed(adapters)]:
            show(net, name)
            assert_close(output(graph, x), wanted[name], terms=1 if name == "off" else LONGEST)
        for name, (_, folder) in adapters.items():  # another method under one name
            fxpeft.hotswap(net, folder, "lora-0")
            show(net, "lora-0")
            assert_close(output(graph, x), wanted[name])
        fxpeft.hotswap(net, adapters["lora-0"][1], "lora-0")
        sums_and_scales(kind, net, graph, adapters, x)
        show(net, "off")
        assert_close(output(graph, x), bare, terms=1, size=1.0)
    assert moved.items() <= {name: tensor.data_ptr() for name, tensor in net.named_buffers()}.items()


def show(model: nn.Module, name: str) -> None:
    if name == "off":
        fxpeft.disable_adapters(model)
    else:
        fxpeft.enable_adapters(model)
        fxpeft.set_adapter(model, name)


def sums_and_scales(kind: str, net: nn.Module, graph: Any, adapters: dict[str, Adapter], x: Tensor) -> None:
    """Two at a time, blends, and other scales, beside the same adapters in training layout."""
    own = KINDS[kind].net()
    chosen = ["lora-1", "lora-3"]  # of ranks 2 and 4
    for name in chosen:
        fxpeft.load_adapter(own, adapters[name][1], name)
    show(net, chosen[0])
    for model in (own, net):
        fxpeft.set_adapter(model, chosen)
    assert_close(output(graph, x), output(own, x))
    for model in (own, net):
        fxpeft.set_scale(model, chosen[1], -0.4)
    assert_close(output(graph, x), output(own, x))
    for rule in ("cat", "svd"):
        for model in (own, net):
            fxpeft.add_weighted_adapter(model, chosen, [0.7, -0.3], rule, combination_type=rule)
        assert_close(output(graph, x), output(own, x))


class All(nn.Module):
    """A net of every kind."""

    def __init__(self) -> None:
        super().__init__()
        for name, kind in KINDS.items():
            self.add_module(name, kind.net())

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """An input for each kind, by its name."""
        return {name: getattr(self, name)(x) for name, x in inputs.items()}


def everywhere(case: MethodCase, seed: int, **settings: Any) -> nn.Module:
    """A net of every kind with an adapter of a method wherever that method can be."""
    model = All().eval()
    own = {**case.settings, **settings, "target_modules": [f"{k}.{m}" for k in KINDS if k not in case.refused
                                                            for m in ("first", "second")]}  # fmt: skip
    if "feedforward_modules" in own:
        own["feedforward_modules"] = [name for name in own["target_modules"] if name.endswith("second")]
    fxpeft.add_adapter(model, case.ours(**own))
    spread(fxpeft.adapter_state_dict(model), seed)
    return model


def test_every_swap_in_a_package_of_all_kinds(tmp_path: Path) -> None:
    inputs = {name: kind.input() for name, kind in KINDS.items()}
    models: dict[str, nn.Module] = {}
    for case in METHODS.values():
        for number, settings in enumerate(changes(case)):
            name = f"{case.declared}{'-rs' * ('use_rslora' in case.settings)}-{number}"
            models[name] = everywhere(case, number, **settings)
            fxpeft.save_adapter(models[name], tmp_path / name)

    @torch.no_grad()
    def run(model: Callable[..., Any]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = model(**inputs)
        return found

    wanted = {name: run(model) for name, model in models.items()} | {"off": run(All().eval())}
    declared = tuple(dict.fromkeys(case.declared for case in METHODS.values()))
    targets = [f"{kind}.{member}" for kind in KINDS for member in ("first", "second")]
    path = tmp_path / "all.pt2"
    fxpeft.package(All().eval(), path, inputs, max_rank=MAX_RANK, targets=targets, methods=declared)
    served = fxpeft.open_package(path)
    for name in models:
        served.load_adapter(tmp_path / name, name)
    # every pair of what slots hold in other places; of all adapters each is in the graphs above
    apart = {slot_needs()[name.partition("-")[0]] - KRONECKER: name for name in models}
    for name in [*pairs([*apart.values(), "off"]), *models, *reversed(models)]:
        if name == "off":
            served.disable()
        else:
            served.enable()
            served.set_adapter(name)
        found = run(served)
        for kind, value in wanted[name].items():
            assert_close(found[kind], value, message=f"{name} on {kind}")
