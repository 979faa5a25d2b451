"""The keys of what passes write on nodes: each stands in one file, and copies keep what stands there."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
from graphs import lora, matched, modules
from torch import nn

import fxpeft
import fxpeft.passes
from fxpeft.passes import EjectPass, InjectPass, Linear, Pipeline, meta
from fxpeft.passes.meta import ORIGIN, REWRITE, SITE, TARGET, MetaKey, Origin

KEYS = {name: value for name, value in vars(meta).items() if isinstance(value, MetaKey)}
FILES = [p for module in (fxpeft, fxpeft.passes) for folder in module.__path__ for p in Path(folder).rglob("*.py")]


def test_every_key_has_a_name_of_its_own() -> None:
    assert len({key.name for key in KEYS.values()}) == len(KEYS)
    assert all(key.name == f"fxpeft.{name.lower()}" for name, key in KEYS.items())


def test_no_other_file_spells_a_key() -> None:
    """Elsewhere a string that is one would read another meaning or type into it."""
    keys = {key.name for key in KEYS.values()}
    unknown = re.compile(r"""\.meta(?:\[|\.get\(|\.pop\()\s*f?["']fxpeft\.|MetaKey(?:\[.*\])?\(""")
    found = []
    for path in FILES:
        text = path.read_text()
        found += [f"{path}:{n.lineno}" for n in ast.walk(ast.parse(text))
                  if isinstance(n, ast.Constant) and n.value in keys]  # fmt: skip
        found += [f"{path}:{number}" for number, line in enumerate(text.splitlines(), 1) if unknown.search(line)]
    elsewhere = [place for place in found if not place.startswith(meta.__file__)]
    assert elsewhere == [], "a key of node.meta is spelled; it belongs into fxpeft.passes.meta, with its type"
    assert len(found) > len(keys)  # those of meta.py itself were seen


def test_a_key_reads_writes_and_takes_off() -> None:
    key = MetaKey[str]("fxpeft.example")
    (node, *_) = torch.fx.symbolic_trace(nn.ReLU()).graph.nodes
    assert not key.has(node)
    assert key.get(node) is None
    assert key.drop(node) is None
    with pytest.raises(KeyError, match=r"fxpeft\.example"):
        key.of(node)
    key.set(node, "")
    assert key.has(node)
    assert (key.of(node), key.get(node), node.meta["fxpeft.example"]) == ("", "", "")
    assert key.drop(node) == ""
    assert not key.has(node)


def test_a_site_and_what_it_was_are_two_keys() -> None:
    graph_module = matched(modules())
    up = next(n for n in graph_module.graph.nodes if n.name == "up")
    source = up.args[0]
    Pipeline([InjectPass({"up": [lora(Linear(6, 10))]})])(graph_module)
    made = [n for n in graph_module.graph.nodes if SITE.has(n)]
    assert {SITE.of(n) for n in made} == {"up"}
    assert {REWRITE.of(n) for n in made} == {("lora:mine",)}
    assert [n for n in graph_module.graph.nodes if ORIGIN.has(n)] == [up]
    assert ORIGIN.of(up) == Origin(("lora:mine",), source.name, made[-1].name)
    assert TARGET.of(up).kind == Linear(6, 10)


def test_a_copy_keeps_what_eject_reads() -> None:
    graph_module = matched(modules())
    before = [n.name for n in graph_module.graph.nodes]
    Pipeline([InjectPass({"up": [lora(Linear(6, 10))]})])(graph_module)
    copied = copy.deepcopy(graph_module)
    Pipeline([EjectPass()])(copied)
    assert [n.name for n in copied.graph.nodes] == before
    assert any(SITE.has(n) for n in graph_module.graph.nodes)
