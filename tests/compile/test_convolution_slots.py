"""A convolution's slot compiles under Inductor at any rank, once: kernels of every sort, batches, sizes, dtypes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import randomise
from torch import Tensor, nn

import fxpeft
import fxpeft.programs.backend
from fxpeft.testing import no_recompiles

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("fresh_graphs")]
MAX_RANK = 6


class Convolutions(nn.Module):
    """One of each sort, all of them on inputs of their own; the output names what differs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "line": nn.Conv1d(9, 5, 3, padding=1),
                "line_strided": nn.Conv1d(9, 4, 4, stride=3),
                "line_grouped": nn.Conv1d(10, 6, 2, padding="same", groups=2),
                "plane": nn.Conv2d(9, 7, 3, padding=1),
                "plane_strided": nn.Conv2d(9, 7, (3, 2), stride=(2, 1), padding=(1, 0)),
                "plane_few": nn.Conv2d(3, 5, 5, padding=2, bias=False),
                "plane_patches": nn.Conv2d(3, 8, 4, stride=4),
                "plane_product": nn.Conv2d(9, 5, 1),
                "plane_product_strided": nn.Conv2d(9, 5, 1, stride=2),
                "plane_dilated": nn.Conv2d(9, 4, 3, padding=2, dilation=2),
                "plane_same": nn.Conv2d(8, 4, (3, 2), padding="same", dilation=(2, 1)),
                "plane_circular": nn.Conv2d(9, 4, 3, padding=1, padding_mode="circular"),
                "plane_reflected": nn.Conv2d(9, 4, 3, padding=(1, 2), padding_mode="reflect"),
                "plane_depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
                "space": nn.Conv3d(8, 5, (1, 2, 3), padding=(0, 1, 1)),
                "space_strided": nn.Conv3d(2, 5, 2, stride=2),
            }
        )
        self.channels = {name: layer.in_channels for name, layer in self.layers.items()}
        self.called = tuple(self.layers)

    def forward(self, line: Tensor, plane: Tensor, space: Tensor) -> dict[str, Tensor]:
        """``[batch, 10, length]``, ``[batch, 9, height, width]``, ``[batch, 8, depth, height, width]``."""
        given = {"line": line, "plane": plane, "space": space}
        found = {}
        for name in self.called:
            x = given[name.partition("_")[0]]
            found[name] = self.layers[name](x[:, : self.channels[name]])
        return found


def net(dtype: torch.dtype = torch.float32) -> Convolutions:
    torch.manual_seed(0)
    return Convolutions().to(dtype).eval()


def inputs(batch: int = 2, more: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch + more)
    shapes = (batch, 10, 11 + more), (batch, 9, 8 + more, 10 + more), (batch, 8, 4, 5 + more, 6)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


NAMES = list(net().layers)
# every way in which a slot computes a convolution: shifts, patches, products; each dimension, groups, strides, dilation
WAYS = ("line_grouped", "plane_strided", "plane_few", "plane_product_strided", "plane_dilated", "space")
SORTS = (*WAYS, "plane", "plane_same", "plane_circular", "space_strided")  # padding, in each of its modes, too
FEW = ("line_grouped", "plane_strided", "plane_few", "space")
PLAIN = [name for name in NAMES if getattr(net().layers[name], "groups", 1) == 1]
ADAPTERS: dict[str, dict[str, Any]] = {
    **{f"rank_{r}": {"r": r, "lora_alpha": 3, "target_modules": PLAIN} for r in range(1, MAX_RANK + 1)},
    "grouped_too": {
        "r": 2, "lora_alpha": 5, "target_modules": [n for n in NAMES if n != "plane_depthwise"],
        "rank_pattern": {"plane": 5, "space": 1, "line_grouped": 4}, "alpha_pattern": {"plane_same": 1},
    },
    "some": {"r": 3, "lora_alpha": 4, "target_modules": ["plane", "plane_circular", "space"], "use_rslora": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What PEFT writes."""
    made = {}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        model = peft.get_peft_model(net(), peft.LoraConfig(**config))
        randomise((p for n, p in model.named_parameters() if "lora_" in n), seed)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(str(made[name]))
    return made


@torch.no_grad()
def outputs(model: Any, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = model(*given)
    return found


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, nn.Module]:
    """Each adapter freshly loaded by PEFT, and the bare model. PEFT's A lacks its target's dilation, which it gets."""
    loaded = {name: peft.PeftModel.from_pretrained(net(), str(folder)).eval() for name, folder in folders.items()}
    for name, model in loaded.items():
        if "plane_dilated" in ADAPTERS[name]["target_modules"]:
            model.base_model.model.layers["plane_dilated"].lora_A["default"].dilation = (2, 2)
    return {**loaded, "off": net()}


def prepared(
    folders: dict[str, Path], dtype: torch.dtype = torch.float32, called: Sequence[str] = NAMES
) -> Convolutions:
    model = net(dtype)
    model.called = tuple(called)
    fxpeft.prepare_hotswap(model, MAX_RANK, targets=[n for n in NAMES if n != "plane_depthwise"])
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    return model


def walk(
    model: Convolutions,
    compiled: Any,
    models: dict[str, nn.Module],
    given: tuple[Tensor, ...],
    names: Sequence[str] = (*ADAPTERS, "off", *reversed(ADAPTERS)),
) -> None:
    """Through adapters and none; after each the outputs of every site are those of a model of its own."""
    bare = outputs(models["off"], given)
    for name in names:
        fxpeft.disable_adapters(model) if name == "off" else fxpeft.enable_adapters(model)
        if name != "off":
            fxpeft.set_adapter(model, name)
        found, wanted = outputs(compiled, given), outputs(models[name], given)
        assert found.keys() == set(model.called)
        for site, value in found.items():
            assert_close(value, wanted[site], message=f"{name}: {site}: ")
        if name != "off":
            aimed = ADAPTERS[name]["target_modules"]
            changed = {n for n in NAMES if (wanted[n].float() - bare[n].float()).abs().max() > 0.01}
            assert changed == set(aimed)


@pytest.mark.slow
def test_every_rank_in_one_graph(folders: dict[str, Path], models: dict[str, nn.Module]) -> None:
    """By fxpeft's backend: Inductor behind its passes, of which none but that of an idle graph is about these."""
    model, given = prepared(folders, called=SORTS), inputs()
    compiled = torch.compile(model, backend="fxpeft", fullgraph=True)
    with no_recompiles() as counted:
        walk(model, compiled, models, given)
    assert counted.graphs == 1


@pytest.mark.slow
def test_any_batch_and_any_size_of_image(folders: dict[str, Path], models: dict[str, nn.Module]) -> None:
    model = prepared(folders, called=FEW)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    walk(model, compiled, models, inputs(7, 8))  # no two alike: those share a symbol, in bare models too
    with no_recompiles(warm=True):
        for batch, more in ((2, 3), (5, 1), (6, 2)):  # sizes that equal a rank among them
            walk(model, compiled, models, inputs(batch, more), ("rank_1", "off", "grouped_too", "rank_6", "rank_3"))


@pytest.mark.slow
def test_half_precision_of_one_row_whose_channels_come_last(
    folders: dict[str, Path], models: dict[str, nn.Module]
) -> None:
    model, (line, plane, space) = prepared(folders, torch.bfloat16, FEW), inputs(1, dtype=torch.bfloat16)
    given = (
        line.transpose(1, 2).contiguous().transpose(1, 2),
        plane.to(memory_format=torch.channels_last),
        space.to(memory_format=torch.channels_last_3d),
    )
    halves = {name: copy.deepcopy(m).to(torch.bfloat16) for name, m in models.items()}
    compiled = torch.compile(model, fullgraph=True)
    with no_recompiles():
        walk(model, compiled, halves, given)


def test_the_smallest_case_that_was_reported() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1)).eval()
    x = torch.randn(1, 16, 8, 8)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    randomise(fxpeft.adapter_state_dict(model).values())
    wanted = model(x).detach()
    fxpeft.prepare_hotswap(model, max_rank=16, targets=["0"])
    with torch.no_grad():
        assert_close(torch.compile(model)(x), wanted)


def test_an_idle_graph_has_no_trace_of_the_slots(folders: dict[str, Path], models: dict[str, nn.Module]) -> None:
    graphs: list[Any] = []

    def keep(graph_module: Any, inputs: Any, **more: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    model = prepared(folders)
    walk(
        model,
        fxpeft.compile(model, inner=keep, passes=fxpeft.programs.backend.PASSES, fullgraph=True),
        models,
        inputs(),
    )
    idle, active = ([n.target for n in g.graph.nodes].count(torch.matmul) for g in graphs)
    sites = len(NAMES) - 1
    assert (idle, active) == (0, 2 * sites)
