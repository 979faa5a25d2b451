"""LoKr in a place of its own: two small products in the slot, beside PEFT, in one compiled graph with all others."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import add
from closeness import assert_close
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import fxpeft
from fxpeft.adapters.state import state_of
from fxpeft.passes.live import forward_text
from fxpeft.passes.slots.kronecker import KRONECKER, work
from fxpeft.programs.rewrites import Slots
from fxpeft.serving.call_scale import rescale
from fxpeft.serving.swap import serving_of

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["first", "line", "plane", "point"]


class Net(nn.Module):
    """A target of each kind; those of PEFT's and a transposed one."""

    def __init__(self, dilation: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.turned = nn.Linear(12, 10), Conv1D(10, 12)
        self.line = nn.Conv1d(6, 10, 3, padding="same", dilation=dilation)
        self.plane = nn.Conv2d(6, 10, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1), padding_mode="circular")
        self.point = nn.Conv2d(10, 9, 1, stride=2)

    def forward(self, x: Tensor, line: Tensor, plane: Tensor) -> Tensor:
        """``[3, 4, 12]``, ``[6, 7]``, without a batch, and ``[2, 6, 5, 7]``."""
        h = self.first(x).tanh() + 9 * self.turned(x)
        found = h, self.line(line), self.point(self.plane(plane))
        return torch.cat([each.flatten() for each in found])


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (3, 4, 12), (6, 7), (2, 6, 5, 7)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@torch.no_grad()
def output(net: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    found: Tensor = net(*inputs(dtype))
    return found


def lokr(**settings: Any) -> fxpeft.LoKrConfig:
    own = {"r": 1, "alpha": 3, "alpha_pattern": {"plane": 2}, "target_modules": TARGETS}
    return fxpeft.LoKrConfig(**{**own, **settings})


# none of them fits as ranks into slots of two
FORMS = {
    "low": {"rank_pattern": {"plane": 2}},
    "both": {"decompose_both": True, "decompose_factor": 1},
    "core": {"use_effective_conv2d": True, "r": 2},
    "whole": {"r": 9, "target_modules": ["first", "plane", "point"]},  # a conv1d's is another product
    "apart": {"r": 2, "decompose_factor": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_pefts_at_no_ranks(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    net = Net(2)
    add(net, lokr(**FORMS[form]), scale=0.6)
    fxpeft.save_adapter(net, tmp_path)
    peer = peft.PeftModel.from_pretrained(Net(2), str(tmp_path)).eval()
    net = net.to(dtype)
    bare, wanted = output(Net(2).to(dtype), dtype), output(net, dtype)
    assert_close(wanted, output(peer.to(dtype), dtype))
    assert all(
        (wanted - bare).abs()[start : start + 8].max() > 0.02 for start in ((0, 190), (0, 120, 190))[form != "whole"]
    )
    for rank in ("dynamic", "static"):
        served = copy.deepcopy(net)
        fxpeft.prepare_hotswap(served, 2, methods=("lokr", "lora"), rank=rank)  # type: ignore[arg-type]
        assert_close(output(served, dtype), wanted)
        fxpeft.disable_adapters(served)
        assert torch.equal(output(served, dtype), bare)


def test_a_transposed_weight() -> None:
    net = Net()
    add(net, lokr(target_modules=["turned"], alpha_pattern={}))
    wanted = output(net)
    fxpeft.prepare_hotswap(net, 2, methods=("lokr",))
    assert_close(output(net), wanted)


def fresh(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a model of its own gives with an adapter that is loaded into it."""
    net = Net()
    fxpeft.load_adapter(net, folder)
    return output(net.to(dtype), dtype)


def ranks(net: Any, name: str) -> list[int]:
    """How many an adapter has in the slots as it is shown, at each of its sites."""
    (shown,) = (each for each in serving_of(state_of(net)).shown if each.name == name)
    return [len(value.d) for value in shown.lowered.values()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of every form, one of them of other factors, and two of other methods."""
    made, root = {}, tmp_path_factory.mktemp("adapters")
    configs: dict[str, Any] = {
        name: lokr(**{"decompose_factor": -1, **settings}) for name, settings in FORMS.items() if name != "both"
    }
    configs["both"] = lokr(r=1, decompose_both=True)
    configs["lora"] = fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["first", "turned", "plane"])
    configs["dora"] = fxpeft.LoraConfig(r=2, use_dora=True, target_modules=["first", "line"])
    for seed, (name, config) in enumerate(configs.items()):
        net = Net()
        add(net, config, seed=seed, scale=0.6)
        fxpeft.save_adapter(net, root / name)
        made[name] = root / name
    return made


def test_every_swap_in_one_graph(folders: dict[str, Path]) -> None:
    wanted = {name: fresh(folder) for name, folder in folders.items()} | {"off": output(Net())}
    net = Net()
    fxpeft.prepare_hotswap(net, 12, targets=[*TARGETS, "turned"], methods=("lora", "lokr", "dora"))
    for name, folder in folders.items():
        fxpeft.load_adapter(net, folder, name)
    graph = torch.compile(net, fullgraph=True)
    output(graph)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("low", "whole", "off", "apart", "core", "lora", "both", "dora", "low", "off", "both", "apart"):
            fxpeft.disable_adapters(net) if name == "off" else fxpeft.enable_adapters(net)
            if name != "off":
                fxpeft.set_adapter(net, name)
                assert (max(ranks(net, name)) == 0) is (name in ("low", "both", "core", "whole")), name
            assert_close(output(graph), wanted[name], message=f"{name}: ")
        fxpeft.enable_adapters(net)
        for names in (["lora", "low"], ["core", "lora"], ["low", "both"], ["apart", "low"], ["low", "apart", "lora"]):
            fxpeft.set_adapter(net, names)
            live = Net()
            for name in names:
                fxpeft.load_adapter(live, folders[name], name)
            fxpeft.set_adapter(live, names)
            assert_close(output(graph), output(live), message=f"{names}: ")
        assert ranks(net, "low") == [0, 0, 0, 0]
        fxpeft.set_adapter(net, ["both", "low"])
        assert (ranks(net, "both"), min(ranks(net, "low")) > 0) == ([0, 0, 0, 0], True)
        fxpeft.set_adapter(net, "low")
        for step in ("scale", "call", "hotswap"):
            if step == "scale":
                fxpeft.set_scale(net, "low", -0.5)
                live = Net()
                fxpeft.load_adapter(live, folders["low"])
                fxpeft.set_scale(live, "default", -0.5)
                assert_close(output(graph), output(live))
                fxpeft.set_scale(net, "low", 1.0)
            elif step == "call":  # what a call of diffusers asks for
                kept: Any = [net.plane.slot.w1.clone(), net.plane.slot.w2.clone()]
                rescale(serving_of(state_of(net)), None, -0.5)  # and the next call, which asks for none, takes it back
                assert torch.equal(net.plane.slot.w1, -0.5 * kept[0])
                assert torch.equal(net.plane.slot.w2, kept[1])
            else:
                fxpeft.hotswap(net, folders["core"], "low")
                assert_close(output(graph), wanted["core"])
                fxpeft.hotswap(net, folders["low"], "low")
            assert_close(output(graph), wanted["low"], message=f"{step}: ")
        fxpeft.delete_adapter(net, "low")
        fxpeft.disable_adapters(net)
        assert_close(output(graph), wanted["off"], terms=1)
    assert all(slot.idle for slot in serving_of(state_of(net)).slots.values())
    fxpeft.remove(net)
    assert torch.equal(output(net), wanted["off"])


def test_what_needs_ranks_is_named_before_anything_changes(folders: dict[str, Path]) -> None:
    net = Net()
    fxpeft.prepare_hotswap(net, 3, targets=TARGETS, methods=("lokr",))
    fxpeft.load_adapter(net, folders["low"], "low")
    fxpeft.load_adapter(net, folders["both"], "both")
    fxpeft.set_adapter(net, "low")
    before = output(net)
    for change, message in (
        (
            lambda: fxpeft.hotswap(net, folders["apart"], "low"),
            "first: rank 4 is above max_rank 3; with lokr_factor=2 it needs no ranks",
        ),
        (lambda: fxpeft.set_adapter(net, ["both", "low"]), "plane: rank 4 .* max_rank 3; the place .* has 'both'"),
        (lambda: fxpeft.hotswap(net, folders["lora"], "low"), "its method, lora: declare"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            change()
        assert torch.equal(output(net), before)
    dilated = Net(2)
    add(dilated, lokr(decompose_factor=2, target_modules=["line"], alpha_pattern={}))
    wanted = output(dilated)
    with pytest.raises(fxpeft.AdapterError, match=r"line: with padding=.same. and dilation .* with lokr_factor=2"):
        fxpeft.prepare_hotswap(dilated, 64, methods=("lokr",), lokr_factor=3)
    assert torch.equal(output(dilated), wanted)
    for options, message in (
        ({"lokr_factor": 4, "methods": ("lora",)}, "lokr_factor: only with 'lokr'"),
        ({"lokr_factor": True}, "lokr_factor: expected -1, 0 or .* found True"),
        ({"lokr_factor": -2}, "lokr_factor: expected -1, 0 or .* found -2"),
        ({"lokr_factor": 4, "lanes": 2}, "lokr_factor=4: with lanes"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            fxpeft.prepare_hotswap(Net(), 4, **{"targets": TARGETS, "methods": ("lokr",), **options})


def test_a_graph_that_is_not_declared_for_it_has_no_trace(folders: dict[str, Path]) -> None:
    """And one that is multiplies as often as is said, whatever the adapter."""
    made = {}
    for name, options in {
        "lora": {"methods": ("lora",)}, "ranks": {"methods": ("lora", "lokr"), "lokr_factor": 0},
        "place": {"methods": ("lora", "lokr")},
    }.items():  # fmt: skip
        net = Net()
        fxpeft.prepare_hotswap(net, 4, targets=TARGETS, **options)  # type: ignore[arg-type]
        fxpeft.load_adapter(net, folders["low"]) if name == "place" else None
        with FlopCounterMode(display=False) as counted:
            output(net)
        made[name] = net, counted.get_total_flops()
        if name != "place":
            assert not KRONECKER & {key for key, _ in net.first.slot.named_buffers()}
            assert "w1" not in forward_text(net.first)
    net, flops = made["place"]
    kinds, positions = {s: x.kind for s, x in serving_of(state_of(net)).slots.items()}, (12, 7, 2 * 5 * 5, 2 * 3 * 3)
    added = sum(2 * n * work(kinds[site], -1) for site, n in zip(TARGETS, positions, strict=True))
    assert flops - made["lora"][1] == added
    assert made["lora"][1] == made["ranks"][1]
    per_token = sum(2 * work(kinds[site], -1) for site in TARGETS)
    assert fxpeft.plan(Net(), lokr(), roles=False).notes == (
        f"in slots prepared with lokr_factor=-1: no ranks, and {per_token:,} flops/token, for all sites",
    )
    assert "for 3 sites" in fxpeft.plan(Net(), lokr(r=9), roles=False).notes[0]
    assert "w1=[2, 3], w2=[5, 4]" in repr(net.first.slot)
    assert not KRONECKER & Slots(TARGETS, methods=("lora", "lokr")).features()
    rows: Any = nn.Sequential(nn.Linear(12, 10))
    rows.dummy_inputs = {"input": torch.randn(2, 12)}
    add(rows, lokr(target_modules=["0"], alpha_pattern={}))
    wanted = rows(**rows.dummy_inputs).detach()
    fxpeft.prepare_hotswap(rows, 4, methods=("lora", "lokr"), lanes=2)
    assert rows[0].slot.features == ()
    assert_close(rows(**rows.dummy_inputs).detach(), wanted)


def test_copies_casts_and_loads_of_the_base(folders: dict[str, Path]) -> None:
    net = Net()
    for name in ("apart", "low"):
        fxpeft.load_adapter(net, folders[name], name)
    fxpeft.set_adapter(net, ["low", "apart"])
    both = output(net)
    fxpeft.prepare_hotswap(net, 8, methods=("lokr",))  # by the factor of the first one
    assert net.first.slot.w1.shape == (2, 2)
    assert_close(output(net), both)
    assert ranks(net, "low") == [2, 0, 0, 2]
    fxpeft.set_adapter(net, ["apart", "low"])
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for each in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert_close(output(each), both)
        each.load_state_dict(Net().state_dict(), strict=False)
        assert_close(output(each), both)
        fxpeft.set_adapter(each, "apart")
        assert_close(output(each), fresh(folders["apart"]))
        each.to(torch.bfloat16)
        assert each.first.slot.w1.dtype is torch.bfloat16
        assert_close(output(each, torch.bfloat16), fresh(folders["apart"], torch.bfloat16))
    fxpeft.release_hotswap(net)
    assert_close(output(net), both)
