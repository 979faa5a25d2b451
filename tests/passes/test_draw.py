"""Pictures, by their structure: what is drawn, what it is joined to, what is coloured, what is new."""

from __future__ import annotations

import importlib.util
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from role_table import make
from tiny import tiny_bert, tiny_llama
from torch import nn

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.passes import EjectPass, InjectPass, MatchPass, NameSelector, PassError, Pipeline, Rewrite
from fxpeft.passes.draw import COLOURS, NEUTRAL, NEW, Picture, colour

CONFIG = LoraConfig(r=4, target_modules="role:attention.query | role:mlp.down")


def gain(kind: Any, base: Any, x: Any, *, g: Any) -> Any:
    return base(x) * kind.per_output(g)


def pipeline() -> Pipeline:
    inject = InjectPass({"2": [Rewrite("gain", gain, {"g": torch.ones(2)})]})
    pipe = Pipeline([MatchPass(NameSelector(targets=["2"])), inject])
    pipe(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
    return pipe


def edges(drawing: Any) -> set[tuple[str, str]]:
    label = {v: data["label"].replace("\n", " ") for v, data in drawing.nodes(data=True)}
    return {(label[a], label[b]) for a, b in drawing.edges}


def test_a_pipeline_draws_what_it_did() -> None:
    picture = pipeline().draw()
    assert edges(picture.before) == {("input", "0"), ("0", "1"), ("1", "2"), ("2", "output")}
    assert edges(picture.after) == {
        ("input", "0"), ("0", "1"), ("1", "2"), ("2", "mul g [2]"), ("mul g [2]", "output"),
    }  # fmt: skip
    new = {data["label"] for _, data in picture.after.nodes(data=True) if data["new"]}
    assert new == {"mul\ng [2]"}
    assert not any(data["new"] for _, data in picture.before.nodes(data=True))
    assert picture.title == "match, inject"


def test_an_inverse_draws_the_way_back() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3)))
    there = Pipeline([MatchPass(lambda site: True), InjectPass({"0": [Rewrite("gain", gain, {"g": torch.ones(3)})]})])
    graph = there(graph)
    back = Pipeline([EjectPass()])
    back(graph)
    assert edges(back.draw().before) == edges(there.draw().after)
    assert edges(back.draw().after) == edges(there.draw().before)


def test_a_pipeline_that_has_not_run_has_nothing_to_draw() -> None:
    with pytest.raises(PassError, match="call the pipeline on a graph first"):
        Pipeline([EjectPass()]).draw()


def test_a_plan_draws_a_layer_before_and_after() -> None:
    picture = fxpeft.plan(tiny_llama(), CONFIG).draw(1)
    query, down = "self_attn.q_proj attention.query", "mlp.down_proj mlp.down"
    before, after = edges(picture.before), edges(picture.after)
    assert before == {
        ("from model.layers.0", query), ("from model.layers.0", "self_attn.k_proj attention.key"),
        ("from model.layers.0", "self_attn.v_proj attention.value"), ("from model.layers.0", "sum"),
        (query, "attention"), ("self_attn.k_proj attention.key", "attention"),
        ("self_attn.v_proj attention.value", "attention"), ("attention", "self_attn.o_proj attention.output"),
        ("self_attn.o_proj attention.output", "sum"), ("sum", "mlp.gate_proj mlp.gate"), ("sum", "mlp.up_proj mlp.up"),
        ("mlp.gate_proj mlp.gate", "product"), ("mlp.up_proj mlp.up", "product"), ("product", down), (down, "sum"),
        ("sum", "sum"), ("sum", "to lm_head"),
    }  # fmt: skip
    assert before - after == {(query, "attention"), (down, "sum")}
    assert after - before == {
        ("from model.layers.0", "linear lora_A [4, 32]"), ("linear lora_A [4, 32]", "mul scaling"),
        ("mul scaling", "linear lora_B [32, 4]"), ("linear lora_B [32, 4]", "add"), (query, "add"),
        ("add", "attention"), ("product", "linear lora_A [4, 48]"), ("linear lora_A [4, 48]", "mul scaling"),
        (down, "add"), ("add", "sum"),
    }  # fmt: skip
    sites = {data["site"] for _, data in picture.after.nodes(data=True) if data["new"]}
    assert sites == {"self_attn.q_proj", "mlp.down_proj"}


def test_sites_are_coloured_by_their_role() -> None:
    picture = fxpeft.plan(tiny_llama(), CONFIG).draw(0)
    fills = {data["label"].rpartition("\n")[2]: data["fill"] for _, data in picture.before.nodes(data=True)}
    assert fills["attention.query"] == COLOURS["attention"]
    assert fills["attention.key"] == COLOURS["attention.key"] != fills["attention.query"]
    assert fills["mlp.down"] == COLOURS["mlp.down"]
    assert fills["sum"] == NEUTRAL
    assert (colour("attention.mine"), colour("mine"), colour("")) == (COLOURS["attention"], NEUTRAL, NEUTRAL)


@pytest.mark.parametrize("family", ["mixtral", "t5", "clip"])
def test_other_families_can_be_drawn(family: str) -> None:
    plan = fxpeft.plan(make(family), LoraConfig(r=2, target_modules="role:*attention.query | role:router"))
    picture = plan.draw(0)
    drawn = {data["site"] for _, data in picture.after.nodes(data=True) if data["new"]}
    prefix = picture.title.split()[1].rstrip(":")
    assert drawn == {s.name.removeprefix(f"{prefix}.") for s in plan.sites if s.name.startswith(f"{prefix}.")}
    assert drawn


def test_a_model_without_layers_is_drawn_whole() -> None:
    net = nn.Sequential()
    net.first, net.second = nn.Linear(4, 6), nn.Linear(6, 3)
    plan = fxpeft.plan(net, LoraConfig(r=2, target_modules=["second"]), inputs={"input": torch.ones(1, 4)})
    assert ("second head", "add") in edges(plan.draw().after)


def test_what_cannot_be_drawn() -> None:
    plan = fxpeft.plan(tiny_llama(), LoraConfig(r=2, target_modules="q_proj & layers[1:] & kind:linear"))
    with pytest.raises(AdapterError, match=r"layer 0: the plan has no site in it; layers with sites: \[1\]"):
        plan.draw(0)
    with pytest.raises(AdapterError, match="no data flow to draw"):
        fxpeft.Plan.from_json(plan.to_json()).draw(1)


HAS_DOT = shutil.which("dot") is not None and importlib.util.find_spec("pydot") is not None
ENGINES = [
    "matplotlib",
    pytest.param("dot", marks=pytest.mark.skipif(not HAS_DOT, reason="graphviz or pydot is not installed")),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_svg_is_one_and_shows_everything(engine: Any, tmp_path: Path) -> None:
    if engine == "matplotlib":
        pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency")
    picture = fxpeft.plan(tiny_bert(), LoraConfig(r=2, target_modules="role:attention.value")).draw()
    text = picture.svg(engine)
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    for word in ("before", "after", "attention.value", "lora_A", "attention.self.value", NEW, COLOURS["mlp.down"]):
        assert word in text
    for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        picture.save(tmp_path / f"p{suffix}", engine)
        assert (tmp_path / f"p{suffix}").read_bytes().startswith(magic)
    assert len(list(tmp_path.iterdir())) == 3


def test_no_engine_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    picture = pipeline().draw()
    monkeypatch.setattr("fxpeft.passes.draw.shutil.which", lambda name: None)
    monkeypatch.setattr("fxpeft.passes.draw._has", lambda name: False)
    with pytest.raises(PassError, match="pip install matplotlib"):
        picture.svg()
    with pytest.raises(PassError, match="install graphviz, then pip install pydot"):
        picture.save(tmp_path / "a.svg", "dot")
    with pytest.raises(PassError, match=re.escape("expected a name that ends in .svg, .png or .pdf")):
        picture.save(tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_labels_with_quotes_and_backslashes_are_drawn() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency")
    picture = pipeline().draw()
    odd = picture.after.copy()
    next(iter(odd.nodes(data=True)))[1]["label"] = 'a "b" \\N'
    assert "svg" in Picture("t", picture.before, odd).svg()
