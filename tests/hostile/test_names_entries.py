"""Hostile adapter names at every entry: refused by one rule, before anything was changed, and never code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from tiny import tiny_llama, two_linears
from torch import nn

import fxpeft
from fxpeft.adapters.name import check_adapter_name
from fxpeft.errors import AdapterError

HOSTILE: list[Any] = [
    'a"+chr(98)+"', "a\\", "a\nimport os", "a;b", "a b", "a.b", "", "-a", "a'", "{a}", "a\0", "ä", "a\n", "x" * 129,
    "..", "../a", "lambda", "None", "forward", "training", "_modules", "__class__", "a\u2028b", "²", None,
    3, b"a", ["a"],
]  # fmt: skip
EVERY = pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name)[:16])
CONFIG = fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's two files."""
    path = tmp_path_factory.mktemp("names") / "a"
    model = two_linears()
    fxpeft.add_adapter(model, CONFIG)
    fxpeft.save_adapter(model, path)
    return path


@EVERY
def test_the_rule(name: Any) -> None:
    with pytest.raises(AdapterError, match="adapter name"):
        check_adapter_name(name)


@pytest.mark.parametrize("name", ["a", "user-1", "3", "_", "A_b-9", "x" * 128, "default", "0-0"])
def test_what_is_a_name(name: str) -> None:
    model = two_linears()
    fxpeft.add_adapter(model, CONFIG, name)
    assert fxpeft.active_adapters(model) == [name]
    model(torch.randn(2, 5))


ENTRIES: dict[str, Callable[[nn.Module, Path, Any], Any]] = {
    "add": lambda m, path, name: fxpeft.add_adapter(m, CONFIG, name),
    "load": lambda m, path, name: fxpeft.load_adapter(m, path, name),
    "hotswap": lambda m, path, name: fxpeft.hotswap(m, path, "" if name is None else name),
    "blend": lambda m, path, name: fxpeft.add_weighted_adapter(m, ["first"], [1.0], name, "cat"),
    "convert": lambda m, path, name: fxpeft.convert(m, "first", new_name="" if name is None else name),
    "apply": lambda m, path, name: fxpeft.apply(fxpeft.plan(m, CONFIG, roles=False), m, name),
    "rewrite": lambda m, path, name: fxpeft.rewrite(torch.fx.symbolic_trace(two_linears()), CONFIG, name=name),
    "rewrite an export": lambda m, path, name: fxpeft.rewrite(
        torch.export.export(two_linears(), (torch.ones(2, 5),)), CONFIG, name=name
    ),
}


@pytest.mark.parametrize("prepared", [False, True], ids=["live", "prepared"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses(entry: str, prepared: bool, folder: Path) -> None:
    model, x = two_linears(), torch.randn(2, 5)
    fxpeft.load_adapter(model, folder, "first")
    if prepared:
        fxpeft.prepare_hotswap(model, 8)
    keys, before = list(model.state_dict()), model(x)
    for name in HOSTILE:
        with pytest.raises(AdapterError, match="slots" if entry == "hotswap" and not prepared else "adapter name"):
            ENTRIES[entry](model, folder, name)
        assert fxpeft.active_adapters(model) == ["first"]
        assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)


@EVERY
def test_transformers_integration_refuses(name: Any, tmp_path: Path) -> None:
    if not name:
        pytest.skip("Transformers takes its own default for an empty name")
    fxpeft.install()
    try:
        model = tiny_llama()
        with pytest.raises(ValueError, match="adapter name"):
            model.add_adapter(fxpeft.LoraConfig(r=3, target_modules=["q_proj"]), adapter_name=name)
        with pytest.raises(ValueError, match="adapter name"):
            model.load_adapter(str(tmp_path), adapter_name=name)
        assert not vars(model).get("_fxpeft")
    finally:
        fxpeft.uninstall()


def test_the_issues_name_calls_nothing() -> None:
    """Run in a process of its own, with a ``chr`` that tells."""
    script = (
        "import builtins, torch, fxpeft\n"
        "real, seen = builtins.chr, []\n"
        "def tell(n): seen.append(n); return real(n)\n"
        "net = torch.nn.Sequential(torch.nn.Linear(3, 4))\n"
        "config = fxpeft.LoraConfig(r=2, target_modules=['0'])\n"
        "name = 'a\"+chr(98)+\"'\n"
        "builtins.chr = tell\n"
        "try:\n"
        "    fxpeft.add_adapter(net, config, name)\n"
        "except fxpeft.AdapterError:\n"
        "    print('refused')\n"
        "net(torch.ones(1, 3))\n"
        "print(98 in seen)\n"
    )
    result = python("-c", script)
    assert result.stdout.split() == ["refused", "False"], result.stderr
