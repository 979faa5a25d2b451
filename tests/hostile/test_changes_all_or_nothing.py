"""A verb that breaks off anywhere, by whatever error, leaves the model as it was: modules, tensors, hooks, records."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import profiled
from tiny import randomise, two_linears
from torch import nn

import fxpeft
from fxpeft.adapters.state import find_state

ROOT = str(Path(fxpeft.__file__).parent)
OURS = (ROOT, str(Path(fxpeft.passes.__file__).parent))
# what begins and ends a change, and puts back: an error in there comes before it or when all is done
AROUND = ("change.py", "lock.py", "restore.py")
POINTS = 25  # calls of a verb in which it breaks off, spread over all of them
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(5))
CONFIG = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.3}


class Broken(KeyError):
    """What no code of fxpeft's waits for."""


def adapted(**more: Any) -> nn.Module:
    model = two_linears().eval()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(target_modules=["0", "2"], bias="lora_only", **CONFIG), "first")
    fxpeft.add_adapter(model, fxpeft.LoraConfig(target_modules=["0"], modules_to_save=["2"], **CONFIG), "second")
    randomise((p for p in model.parameters() if "adapters" in str(p) or p.requires_grad), 1)
    fxpeft.set_adapter(model, "first")
    fxpeft.set_requires_grad(model, "second")
    return model.eval()


def prepared() -> nn.Module:
    model = adapted()
    fxpeft.prepare_hotswap(model, 8, modules_to_save=["2"], bias="lora_only")
    return model


def folded() -> nn.Module:
    model = adapted()
    fxpeft.fold(model)
    return model


def other_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value + 1 for key, value in fxpeft.adapter_state_dict(model, "first").items()}


NEW = fxpeft.LoraConfig(r=2, target_modules=["2"], bias="all")
VERBS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "add": (adapted, lambda m: fxpeft.add_adapter(m, NEW, "new")),
    "add to a bare model": (lambda: two_linears().eval(), lambda m: fxpeft.add_adapter(m, NEW)),
    "set": (adapted, lambda m: fxpeft.set_adapter(m, ["second"])),
    "disable": (adapted, fxpeft.disable_adapters),
    "scale": (adapted, lambda m: fxpeft.set_scale(m, "first", 3.0)),
    "values": (adapted, lambda m: fxpeft.load_adapter_state_dict(m, other_values(m), "first")),
    "delete": (adapted, lambda m: fxpeft.delete_adapter(m, "first")),
    "convert": (adapted, lambda m: fxpeft.convert(m, "first", rank=2)),
    "prepare": (adapted, lambda m: fxpeft.prepare_hotswap(m, 8, modules_to_save=["2"], bias="lora_only")),
    "prepare a bare model": (lambda: two_linears().eval(), fxpeft.prepare_hotswap),
    "release": (prepared, fxpeft.release_hotswap),
    "remove": (adapted, fxpeft.remove),
    "remove from slots": (prepared, fxpeft.remove),
    "fold": (adapted, fxpeft.fold),
    "refold": (folded, lambda m: fxpeft.refold(m, ["second"])),
    "unfold": (folded, fxpeft.unfold),
    "remove what is folded": (folded, fxpeft.remove),
    "merge": (adapted, fxpeft.merge_and_unload),
    "merge in slots": (prepared, fxpeft.merge_and_unload),
}


def everything(model: nn.Module) -> list[Any]:
    """Which objects a model is made of, what they hold, and what it computes."""
    found: list[Any] = [model(X).detach().clone()]
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in ("kept", "windows")}  # a slot makes these anew
        held = {k: v for k, v in own.items() if not isinstance(v, dict)}
        inside = {k: dict(v) for k, v in own.items() if isinstance(v, dict)}
        found += [name, module, type(module), held, inside]
        found += [(p, p.requires_grad, p.detach().clone()) for p in module.parameters(recurse=False)]
    state = find_state(model)
    if state is not None:
        found.append({f.name: getattr(state, f.name) for f in fields(state) if f.name not in ("adapters", "notes")})
        found += [{f.name: getattr(a, f.name) for f in fields(a)} for a in state.adapters.values()]
        found.append([list(state.active), dict(state.base_grads), list(state.baked), list(state.adapters)])
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two are the same objects, or hold the same, tensors by their values."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if type(one) in (list, tuple, set):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is dict:
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return isinstance(one, str | int | float) and one == other


def breaking(work: Callable[[], Any], at: int) -> int:
    """Do something that breaks off in its ``at``-th call; returns how many there were."""
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        path, inside = (
            frame.f_code.co_filename,
            frame.f_code.co_flags & inspect.CO_GENERATOR,
        )  # closing one is a call too
        if event == "call" and not inside and path.startswith(OURS) and not path.endswith(AROUND):
            count += 1
            if count == at:
                raise Broken(f"in {path}:{frame.f_code.co_name}")

    with profiled(seen):
        work()
    return count


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_breaks_off_leaves_the_model_as_it_was(verb: str) -> None:
    make, work = VERBS[verb]
    work(make())  # what is kept of the first time makes the others shorter
    fresh = make()
    calls = breaking(lambda: work(fresh), 0)
    model, broken = make(), 0
    before = everything(model)
    for at in sorted({1 + number * (calls - 1) // POINTS for number in range(POINTS)}):
        where = None
        try:
            done = breaking(lambda: work(model), at)
        except Broken as error:
            where = str(error)
        if where is None:  # of slots that were written again before it needs fewer calls, and is through
            assert done < at
            break
        assert same(before, everything(model)), f"call {at} of {calls}, {where}"
        broken += 1
    assert broken > POINTS / 2
