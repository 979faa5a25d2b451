"""Modules that an adapter brings whole: lists of modules, and code that reads their weights without calling them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside import peft_file
from closeness import assert_close, is_close
from tiny import randomise, tiny_bert, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError, LoraConfig

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


class Headed(nn.Module):
    """A linear module and a head that is a list of modules."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.up = kind, nn.Linear(6, 10)
        first, last = nn.Linear(10, 7), nn.Linear(7, 3)
        self.head: Any = {
            "sequential": lambda: nn.Sequential(first, nn.Tanh(), nn.Sequential(nn.LayerNorm(7), last)),
            "list": lambda: nn.ModuleList([first, nn.Tanh(), last]),
            "dict": lambda: nn.ModuleDict({"first": first, "tanh": nn.Tanh(), "last": last}),
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[..., 6]``."""
        x = self.up(x)
        if self.kind == "sequential":
            return self.head(x)  # type: ignore[no-any-return]
        for part in self.head.values() if self.kind == "dict" else self.head:
            x = part(x)
        return x


def headed(kind: str) -> Headed:
    torch.manual_seed(0)
    return Headed(kind).eval()


NAMED = {"sequential": ["head"], "list": ["head.0", "head.2"], "dict": ["head.first", "head.last"]}
SAVED = {"sequential": ["head.0", "head.2.0", "head.2.1"], "list": NAMED["list"], "dict": NAMED["dict"]}


@pytest.mark.parametrize("kind", NAMED)
def test_a_list_of_modules_is_brought_as_peft_brings_it(kind: str, tmp_path: Path) -> None:
    base = headed(kind)
    theirs = peft_file(base, tmp_path / "peft", modules_to_save=NAMED[kind], target_modules=["up"])
    model = copy.deepcopy(base)
    fxpeft.load_adapter(model, tmp_path / "peft", "a")
    expected, before = theirs(X), base(X)
    assert (expected - before).abs().max() > 0.1
    assert is_close(model(X), expected)
    fxpeft.save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))  # type: ignore[arg-type]
    assert is_close(back(X), expected)


@pytest.mark.parametrize("kind", NAMED)
def test_a_list_of_modules_neither_grows_nor_needs_a_forward(kind: str, tmp_path: Path) -> None:
    base, model = headed(kind), headed(kind)
    items = [type(part) for part in (model.head.values() if kind == "dict" else model.head)]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["up"], modules_to_save=["head"])
    fxpeft.add_adapter(model, config, "a")
    randomise(fxpeft.adapter_state_dict(model).values(), seed=1)
    expected = model(X)
    assert fxpeft.plan(base, config).saved == tuple(SAVED[kind])

    def check() -> None:
        """The list has its own items, adapted or not."""
        assert len(model.head) == 3
        found = list(model.head.values() if kind == "dict" else model.head)
        assert all(isinstance(part, cls) for part, cls in zip(found, items, strict=True))

    check()
    with fxpeft.disabled(model):
        assert torch.equal(model(X), base(X))
        check()
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["up"]), "headless")
    assert torch.equal(model(X), base(X))
    fxpeft.set_adapter(model, "a")
    assert torch.equal(model(X), expected)
    fxpeft.save_adapter(model, tmp_path / "a", "a")
    fxpeft.fold(model)
    assert is_close(model(X), expected)
    check()
    fxpeft.unfold(model)
    assert torch.equal(model(X), expected)
    fxpeft.remove(model)
    assert torch.equal(model(X), base(X))
    check()

    fxpeft.prepare_hotswap(model, 4, targets=["up"], modules_to_save=["head"])
    check()
    fxpeft.load_adapter(model, tmp_path / "a", "a")
    assert is_close(model(X), expected)
    fxpeft.disable_adapters(model)
    assert torch.equal(model(X), base(X))
    check()


def test_a_list_with_parameters_of_its_own_is_refused() -> None:
    class Scaled(nn.Sequential):
        """A list with a parameter."""

        def __init__(self, *args: nn.Module) -> None:
            super().__init__(*args)
            self.scale = nn.Parameter(torch.ones(3))

    model = headed("sequential")
    model.head = Scaled(nn.Linear(10, 3))
    with pytest.raises(AdapterError, match=r"head is a Scaled with scale of its own.*\n  head\.0"):
        fxpeft.add_adapter(model, LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    fxpeft.add_adapter(model, LoraConfig(target_modules=["up"], modules_to_save=["head.0"]))


def test_reading_a_saved_weight_gives_the_active_copy() -> None:
    model, ids = tiny_llama(), token_ids()
    base = model.lm_head.weight.detach().clone()
    for seed, name in enumerate("ab"):
        fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]), name)
        randomise(fxpeft.adapter_state_dict(model).values(), seed)
    # a fused loss computes with the head's weight and never calls the head
    hidden = model.model(ids).last_hidden_state
    loss = (hidden @ model.lm_head.weight.t()).square().mean()
    loss.backward()
    grads = {name: p.grad is not None for name, p in model.named_parameters() if "lm_head" in name}
    assert grads == {"lm_head.weight": False, "lm_head.adapters.a.weight": False, "lm_head.adapters.b.weight": True}
    assert_close(model(ids).logits, hidden @ model.lm_head.weight.t())
    assert model.lm_head.weight.requires_grad
    own = fxpeft.adapter_state_dict(model, "a")["base_model.model.lm_head.weight"]
    fxpeft.set_adapter(model, "a")
    assert torch.equal(model.lm_head.weight, own)
    assert not torch.equal(own, base)
    with fxpeft.disabled(model):
        assert torch.equal(model.lm_head.weight, base)
    # the base's own stays where state_dict and the rest of torch look for it
    assert torch.equal(model.state_dict()["lm_head.weight"], base)
    fxpeft.remove(model)
    assert torch.equal(model.lm_head.weight, base)


def test_parts_of_a_saved_module_are_the_active_copys_too() -> None:
    model = tiny_bert()
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["query"], modules_to_save=["pooler"]), "a")
    randomise(fxpeft.adapter_state_dict(model).values())
    own = fxpeft.adapter_state_dict(model)["base_model.model.bert.pooler.dense.weight"]
    assert torch.equal(model.bert.pooler.dense.weight, own)
    # another adapter's site lies in the module that the first one replaces
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["pooler.dense"]), "b")
    randomise(fxpeft.adapter_state_dict(model, "b").values(), seed=1)
    alone = model(token_ids()).logits
    for names in ("a", "b"):
        fxpeft.set_adapter(model, names)
    assert torch.equal(model(token_ids()).logits, alone)
    fxpeft.delete_adapter(model, "a")
    assert torch.equal(model(token_ids()).logits, alone)


class Fused(nn.Module):
    """Computes with its head's weight without calling the head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[..., 6]``."""
        return self.up(x) @ self.head.weight.t() + self.head.bias


@pytest.mark.slow
def test_a_swap_reaches_a_weight_that_is_read_in_compiled_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, expected = Fused().eval(), {}
    for seed, name in enumerate("ab"):
        model = copy.deepcopy(base)
        fxpeft.add_adapter(model, LoraConfig(r=2 + seed, target_modules=["up"], modules_to_save=["head"]))
        randomise(fxpeft.adapter_state_dict(model).values(), seed)
        fxpeft.save_adapter(model, tmp_path / name)
        own = fxpeft.adapter_state_dict(model)
        head = {leaf: own[f"base_model.model.head.{leaf}"] for leaf in ("weight", "bias")}
        expected[name] = (model.up(X) @ head["weight"].t() + head["bias"]).detach()
    fxpeft.prepare_hotswap(base, 8, targets=["up"], modules_to_save=["head"])
    compiled = torch.compile(base)
    with fxpeft.testing.no_recompiles() as counted, torch.no_grad():
        bare = compiled(X)
        for name in "ab":
            fxpeft.load_adapter(base, tmp_path / name, name)
            assert is_close(compiled(X), expected[name])
        fxpeft.disable_adapters(base)
        assert torch.equal(compiled(X), bare)
    assert counted.graphs == 1
