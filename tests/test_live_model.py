"""The handle: every verb is on it and says what the function says; one code drives live models and packages."""

from __future__ import annotations

import functools
import inspect
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft import AdapterError, Handle, LiveModel, LoraConfig

IDS = token_ids()
RENAMED = {"enable_adapters": "enable", "disable_adapters": "disable"}  # as a package has them
NOT_VERBS = {
    "AdapterStore": "an object of its own, which has the adapters that a model is served with",
    "AdaLoraCallback": "an object of its own, which holds the model while it is trained",
    "RankAllocator": "an object of its own, which holds the model while it is trained",
    "LiveModel": "the handle itself",
    "Plan": "data, in which model is the name of one",
    "adopt": "takes PEFT's model, and gives the one that a handle is for",
    "get_peft_model": "PEFT's verbs in place of fxpeft's",
}


def verbs() -> dict[str, Any]:
    """What is public and takes a model first."""
    found = {}
    for name in fxpeft.__all__:
        value = getattr(fxpeft, name)
        if callable(value) and not (isinstance(value, type) and issubclass(value, Exception)):
            first = next(iter(inspect.signature(value).parameters), None)
            if first == "model":
                found[name] = value
    return found


def test_every_verb_is_on_it() -> None:
    found = verbs()
    assert len(found) > 35
    assert NOT_VERBS.keys() <= found.keys()
    for name, function in found.items():
        if name in NOT_VERBS:
            assert not hasattr(LiveModel, name)
            continue
        method = getattr(LiveModel, RENAMED.get(name, name))
        assert method.__wrapped__ is function
        assert method.__doc__ == function.__doc__
        bound = inspect.signature(getattr(LiveModel(nn.Linear(2, 3)), RENAMED.get(name, name)))
        given = inspect.signature(function)
        assert list(bound.parameters.values()) == list(given.parameters.values())[1:]
        assert bound.return_annotation == given.return_annotation


def test_it_has_no_verb_of_its_own() -> None:
    own = {name for name in vars(LiveModel) if not name.startswith("_")} - {"model"}
    assert own == {RENAMED.get(name, name) for name in verbs().keys() - NOT_VERBS.keys()}


def test_handles_of_one_model_agree_and_hold_nothing() -> None:
    model = tiny_llama()
    one, other = LiveModel(model), LiveModel(model)
    assert one == other != LiveModel(tiny_llama())
    assert vars(one) == {"model": model}
    one.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]), "a")
    assert other.loaded_adapters() == fxpeft.active_adapters(model) == ["a"]
    other.disable()
    assert repr(one) == repr(other)
    assert "_fxpeft" not in vars(tiny_llama())
    with pytest.raises(AdapterError, match="expected a torch module, found str"):
        LiveModel("model")  # type: ignore[arg-type]


def test_what_it_prints() -> None:
    handle = LiveModel(tiny_llama())
    assert repr(handle) == "LiveModel(LlamaForCausalLM)"
    handle.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]), "a")
    handle.add_adapter(LoraConfig(r=2, target_modules=["v_proj"], use_dora=True), "b")
    handle.set_scale("a", 0.5)
    assert repr(handle) == "LiveModel(LlamaForCausalLM; adapters: a (lora, scale 0.5), b (dora); active: b)"
    handle.disable()
    assert repr(handle).endswith("active: b, switched off)")
    handle.enable()
    handle.prepare_hotswap(16, methods=("lora", "dora"))
    handle.fold("a")
    assert repr(handle).endswith("active: b; folded: a; prepared: max_rank 16, lora, dora)")
    handle.remove()
    handle.prepare_hotswap(8)
    assert repr(handle) == "LiveModel(LlamaForCausalLM; adapters: none; active: none; prepared: max_rank 8, lora)"


def test_through_it_a_wrapped_model_is_called_and_changed() -> None:
    model = tiny_llama()
    compiled = torch.compile(model, backend="eager")
    handle = LiveModel(compiled)
    handle.prepare_hotswap(8)
    handle.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], init_lora_weights=False), "a")
    with torch.no_grad():
        torch.testing.assert_close(handle(IDS).logits, model(IDS).logits)
        with handle.disabled():
            torch.testing.assert_close(handle(IDS).logits, tiny_llama()(IDS).logits)
    assert repr(handle).startswith("LiveModel(LlamaForCausalLM;")
    assert handle.merge_and_unload() is model


class Net(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, 6]``."""
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "a": LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], rank_pattern={"up": 4}),
    "b": LoraConfig(r=2, lora_alpha=3, target_modules=["down"], use_rslora=True),
}


@functools.cache
def folder(name: str) -> Path:
    path = Path(tempfile.mkdtemp())
    model = net()
    fxpeft.add_adapter(model, CONFIGS[name])
    randomise(fxpeft.adapter_state_dict(model).values(), seed=len(name) + ord(name))
    fxpeft.save_adapter(model, path)
    return path


@functools.cache
def packaged() -> Path:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("AOTInductor compiles with the system's C++ compiler, and there is none")
    return fxpeft.package(net(), Path(tempfile.mkdtemp()) / "net.pt2", (X,), max_rank=8, targets=["up", "down"])


def prepared() -> Handle:
    handle = LiveModel(net())
    handle.prepare_hotswap(8, targets=["up", "down"])
    return handle


@torch.no_grad()
def drive(handle: Handle) -> list[Any]:
    """All shared verbs, by one code; what was seen."""
    seen: list[Any] = [handle(X), handle.loaded_adapters()]
    handle.load_adapter(folder("a"), "a", check_finite=True)
    handle.load_adapter(folder("b"), "b")
    seen += [handle(X), handle.loaded_adapters(), handle.active_adapters(), handle.adapter_config("a").to_dict()]
    with handle.active(["a", "b"]):
        seen.append(handle(X))
        with handle.scaled({"a": 0.5, "b": -2.0}), handle.hold():
            seen.append(handle(X))
        with handle.disabled():
            seen.append(handle(X))
    seen.append(handle(X))
    handle.set_adapter("a")
    with handle.scaled("a", 3.0):
        seen.append(handle(X))
    doubled = {key: 2 * value for key, value in handle.adapter_state_dict().items()}
    handle.load_adapter_state_dict(doubled, check_finite=True)
    seen.append(handle(X))
    handle.hotswap(folder("b"), "a", check_finite=True)
    handle.set_scale("a", 0.5)
    seen += [handle(X), handle.adapter_config().to_dict()]
    handle.hotswap(handle.adapter_state_dict("b"), "a", config=CONFIGS["b"])
    handle.disable()
    seen.append(handle(X))
    handle.enable()
    handle.delete_adapter("b")
    seen += [handle(X), handle.loaded_adapters(), handle.active_adapters()]
    for wrong in (lambda: handle.set_adapter("x"), lambda: handle.adapter_config("x"), lambda: handle.active("x")):
        with pytest.raises(AdapterError, match="no adapter named 'x'"):
            with wrong() or handle.disabled():
                raise AssertionError("it was done")
    return seen


@pytest.mark.slow
def test_one_function_drives_both() -> None:
    live, package = prepared(), fxpeft.open_package(packaged())
    assert isinstance(live, Handle)
    assert isinstance(package, Handle)
    assert not isinstance(net(), Handle)
    ours, theirs = drive(live), drive(package)
    tensors = [value for value in ours if isinstance(value, Tensor)]
    assert len(tensors) == 11
    assert (
        len({tuple(value.flatten().tolist()) for value in tensors}) == 7
    )  # thrice the bare net, b twice, b's half too
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        else:
            assert one == other
