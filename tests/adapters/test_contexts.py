"""Contexts: what each puts back, on live, prepared and folded models, after an error, nested, and after deletions."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from picture import assert_same, picture
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.adapters.state import state_of

IDS = token_ids()
CONFIGS = {
    "a": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 5}),
    "b": LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
    "c": LoraConfig(r=4, lora_alpha=3, target_modules=["v_proj"], use_rslora=True),
}


def live() -> nn.Module:
    """Adapters a, b, c with b and a active, in this order, b scaled; of a's parameters one is frozen, c is trained."""
    model = tiny_llama()
    for seed, (name, config) in enumerate(CONFIGS.items()):
        fxpeft.add_adapter(model, config, name)
        randomise(fxpeft.adapter_state_dict(model, name).values(), seed)
    fxpeft.set_adapter(model, ["b", "a"])
    fxpeft.set_scale(model, "b", 0.5)
    fxpeft.set_requires_grad(model, "c")
    next(p for n, p in model.named_parameters() if ".a.lora_A" in n).requires_grad_(False)
    return model


def prepared() -> nn.Module:
    model = live()
    fxpeft.prepare_hotswap(model, 16)
    return model


def folded() -> nn.Module:
    model = live()
    fxpeft.fold(model, "b")
    return model


def prepared_and_folded() -> nn.Module:
    model = prepared()
    fxpeft.fold(model, ["b"])
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "live": live, "prepared": prepared, "folded": folded, "prepared and folded": prepared_and_folded,
}  # fmt: skip
CONTEXTS: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager[None]]] = {
    "active": lambda model: fxpeft.active(model, "c"),
    "two active": lambda model: fxpeft.active(model, ["c", "a"]),
    "none active": lambda model: fxpeft.active(model, []),
    "disabled": fxpeft.disabled,
    "scaled": lambda model: fxpeft.scaled(model, "a", 0.25),
    "two scaled": lambda model: fxpeft.scaled(model, {"a": -1.5, "c": 3}),
    "folded": fxpeft.folded,
    "another folded": lambda model: fxpeft.folded(model, "c"),
    "two folded": lambda model: fxpeft.folded(model, ["c", "a"]),
}
NOT = {("disabled", "folded"), ("disabled", "prepared and folded")}  # what is in the weights can't be switched off


def whole(model: nn.Module) -> dict[str, Any]:
    """All of a model that could have changed."""
    state = state_of(model)
    own = {
        name: (a.strength, a.trained, [p.requires_grad for p in a.parameters()]) for name, a in state.adapters.items()
    }
    inside = None if state.folded is None else (state.folded.names, state.folded.keep)
    found = picture(model, IDS)
    found["adapters"] = found["adapters"], own, inside, state.baked
    return found


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(IDS).logits
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONTEXTS)
def test_everything_is_as_before(kind: str, name: str) -> None:
    model = KINDS[kind]()
    before = whole(model)
    if (name, kind) in NOT:
        with pytest.raises(AdapterError, match="can't be switched off"), CONTEXTS[name](model):
            pass
        assert_same(before, whole(model))
        return
    with CONTEXTS[name](model):
        inside = logits(model)
    assert_same(before, whole(model))
    same = name == "folded"  # by default what is folded is what ran
    assert torch.allclose(inside, before["output"], atol=1e-4) is same
    with pytest.raises(ZeroDivisionError), CONTEXTS[name](model):
        raise ZeroDivisionError
    assert_same(before, whole(model))


@pytest.mark.parametrize("kind", KINDS)
def test_nested_in_every_order(kind: str) -> None:
    model = KINDS[kind]()
    before = whole(model)
    for outer in CONTEXTS:
        for inner in CONTEXTS:
            with contextlib.suppress(AdapterError), CONTEXTS[outer](model):
                between = whole(model)
                with contextlib.suppress(AdapterError), CONTEXTS[inner](model):
                    logits(model)
                assert_same(between, whole(model))
            assert_same(before, whole(model))


def test_what_runs_inside() -> None:
    model = live()
    fxpeft.set_adapter(model, "c")
    alone = logits(model)
    fxpeft.set_adapter(model, ["b", "a"])
    with fxpeft.active(model, "c"):
        assert fxpeft.active_adapters(model) == ["c"]
        assert torch.equal(logits(model), alone)
        with fxpeft.scaled(model, "c", 0):
            assert torch.allclose(logits(model), logits(tiny_llama()), atol=1e-6)
            with fxpeft.scaled(model, {"c": 1}):  # in its place, not on top of it
                assert torch.equal(logits(model), alone)
        with fxpeft.folded(model):
            assert fxpeft.folded_adapters(model) == ["c"]
            assert fxpeft.active_adapters(model) == []
            assert torch.allclose(logits(model), alone, atol=1e-5)
            with fxpeft.folded(model, "b"):
                assert fxpeft.folded_adapters(model) == ["b"]
        with fxpeft.disabled(model), fxpeft.active(model, "a"):  # which, not whether
            assert torch.equal(logits(model), logits(tiny_llama()))
    with fxpeft.folded(model, "a", keep="delta"):
        assert fxpeft.active_adapters(model) == ["b"]  # as fold: others stay on top


def test_the_weights_come_back_to_within_rounding_with_delta() -> None:
    model = live()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with fxpeft.folded(model, keep="delta"):
        pass
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-5)
    assert fxpeft.active_adapters(model) == ["b", "a"]


@pytest.mark.parametrize("kind", ["live", "prepared"])
def test_deleted_inside(kind: str) -> None:
    """What is gone stays gone, and the others come back."""
    model = KINDS[kind]()
    with fxpeft.active(model, "c"):
        fxpeft.delete_adapter(model, "b")
    assert fxpeft.active_adapters(model) == ["a"]
    with fxpeft.active(model, "a"):
        fxpeft.delete_adapter(model, "a")
        assert fxpeft.active_adapters(model) == []
    assert fxpeft.active_adapters(model) == []
    with fxpeft.scaled(model, {"c": 3}):
        fxpeft.delete_adapter(model, "c")
        fxpeft.add_adapter(model, CONFIGS["a"], "d")
    with fxpeft.disabled(model):
        fxpeft.add_adapter(model, CONFIGS["b"], "e")
        fxpeft.delete_adapter(model, "d")
    assert fxpeft.active_adapters(model) == ["e"]
    assert state_of(model).enabled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["active", "scaled", "disabled", "folded"])
def test_the_model_taken_apart_inside(kind: str, name: str) -> None:
    """There is nothing to put back, and what is put in anew is left alone."""
    if (name, kind) in NOT:
        return
    model = KINDS[kind]()
    with CONTEXTS[name](model):
        fxpeft.remove(model)
    assert fxpeft.loaded_adapters(model) == []
    assert torch.equal(logits(model), logits(tiny_llama()))
    fxpeft.add_adapter(model, CONFIGS["a"], "a")
    with CONTEXTS[name](model) if name != "active" else fxpeft.active(model, []):
        fxpeft.remove(model)
        fxpeft.add_adapter(model, CONFIGS["b"], "b")
    assert fxpeft.active_adapters(model) == ["b"]


@pytest.mark.parametrize("kind", ["live", "prepared"])
def test_folds_that_are_left_or_taken_out_inside(kind: str) -> None:
    model = KINDS[kind]()
    with fxpeft.active(model, ["c"]):
        fxpeft.fold(model, "a")
        inside = logits(model)
    assert fxpeft.folded_adapters(model) == ["a"]  # the user's own fold: it stays, and isn't added once more
    assert fxpeft.active_adapters(model) == ["b"]
    assert not torch.equal(logits(model), inside)
    fxpeft.unfold(model)
    fxpeft.set_adapter(model, ["b", "a"])
    before = whole(model)
    with fxpeft.folded(model, "c"):
        fxpeft.unfold(model)
        assert fxpeft.active_adapters(model) == ["c", "b", "a"]
    assert_same(before, whole(model))
    with fxpeft.folded(model, "c"):
        fxpeft.refold(model, ["a", "b"])
    assert_same(before, whole(model))
    with fxpeft.folded(model, "b"), fxpeft.folded(model, "c"):
        fxpeft.delete_adapter(model, "b")
    assert fxpeft.folded_adapters(model) == []
    assert fxpeft.active_adapters(model) == ["a"]
    with fxpeft.scaled(model, "a", 2.0):
        fxpeft.fold(model, keep=None)
    assert fxpeft.folded_adapters(model) == ["a"]  # for good, at the scale it was folded at


def test_swapped_and_prepared_inside() -> None:
    model = live()
    before = logits(model)
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    with fxpeft.active(model, "c"), fxpeft.scaled(model, "a", 2):
        fxpeft.prepare_hotswap(model, 16)
        fxpeft.hotswap(model, {k: v * 2 for k, v in fxpeft.adapter_state_dict(model).items()})
        with fxpeft.disabled(model):
            fxpeft.release_hotswap(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    again = {n: p.requires_grad for n, p in model.named_parameters()}
    assert again.keys() == trained.keys()
    assert fxpeft.active_adapters(model) == ["b", "a"]


def test_switched_on_inside_a_block_of_an_other_kind() -> None:
    """Trained is what the adapters chosen say, not what was frozen while they were off."""
    model = live()
    trained = [p.requires_grad for p in model.parameters()]
    fxpeft.disable_adapters(model)
    with fxpeft.active(model, "c"):
        fxpeft.enable_adapters(model)
    assert fxpeft.active_adapters(model) == ["b", "a"]
    found = [p.requires_grad for p in model.parameters()]
    assert sum(found) == sum(trained) + 1  # the one that was frozen by hand, before they were switched off


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused(kind: str) -> None:
    model = KINDS[kind]()
    before = whole(model)
    refused: list[tuple[Callable[[], contextlib.AbstractContextManager[None]], str]] = [
        (lambda: fxpeft.active(model, ["a", "x"]), "no adapter named 'x'"),
        (lambda: fxpeft.scaled(model, {"a": 2, "x": 2}), "no adapter named 'x'"),
        (lambda: fxpeft.scaled(model, "a"), "expected a name and a factor"),
        (lambda: fxpeft.scaled(model, {"a": 2.0}, 3.0), "expected a name and a factor"),
        (lambda: fxpeft.folded(model, "x"), "no adapter named 'x'"),
        (lambda: fxpeft.folded(model, "a", keep=None), "with which there is a way back"),  # type: ignore[arg-type]
        (lambda: fxpeft.active(tiny_llama(), "a"), "has no adapters"),
    ]
    if "folded" in kind:
        refused.append((lambda: fxpeft.scaled(model, {"a": 2, "b": 2}), "its scale can't be changed"))
        refused.append((lambda: fxpeft.active(model, "b"), "would add it twice"))
    for make, message in refused:
        with pytest.raises(AdapterError, match=message), make():
            raise AssertionError("it was entered")
    assert_same(before, whole(model))


def test_a_swap_that_fails_leaves_the_old_scales() -> None:
    model = live()
    fxpeft.add_adapter(model, fxpeft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "gain")
    before = whole(model)
    with pytest.raises(AdapterError, match="no scale to change"), fxpeft.scaled(model, {"a": 2, "gain": 2}):
        raise AssertionError("it was entered")
    assert_same(before, whole(model))


def test_inside_a_hold_and_around_one() -> None:
    model = prepared()
    with fxpeft.hold(model), pytest.raises(fxpeft.LockError), fxpeft.active(model, "c"):
        raise AssertionError("it was entered")
    assert fxpeft.active_adapters(model) == ["b", "a"]
    with fxpeft.active(model, "c"), fxpeft.hold(model):
        assert fxpeft.active_adapters(model) == ["c"]
    assert fxpeft.active_adapters(model) == ["b", "a"]


def test_a_wait_at_the_end_that_is_too_long() -> None:
    """As any swap it gives up; what the block set stays, whole."""
    model = live()
    fxpeft.prepare_hotswap(model, 16, lock_timeout=0.2)
    entered, left = threading.Event(), threading.Event()

    def hold() -> None:
        with fxpeft.hold(model):
            entered.set()
            left.wait()

    thread = threading.Thread(target=hold)
    block = fxpeft.active(model, "c")
    block.__enter__()
    alone = logits(model)
    thread.start()
    entered.wait()
    try:
        with pytest.raises(fxpeft.LockTimeout):
            block.__exit__(None, None, None)
    finally:
        left.set()
        thread.join()
    assert fxpeft.active_adapters(model) == ["c"]
    assert torch.equal(logits(model), alone)


def test_it_goes_back_as_one_change() -> None:
    """Nobody sees half of it: scales of two adapters come and go together."""
    model = prepared()
    seen: list[Tensor] = []
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            seen.append(logits(model))

    with fxpeft.scaled(model, {"a": 0, "b": 0}):
        off = logits(model)
    on = logits(model)
    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(30):
        with fxpeft.scaled(model, {"a": 0, "b": 0}):
            pass
    stop.set()
    thread.join()
    assert all(torch.equal(one, on) or torch.equal(one, off) for one in seen)


def test_as_a_decorator() -> None:
    model = live()

    @fxpeft.active(model, "c")
    def run() -> list[str]:
        return fxpeft.active_adapters(model)

    assert [run(), fxpeft.active_adapters(model), run()] == [["c"], ["b", "a"], ["c"]]
