"""Binding where the forward belongs to the instance: hooks, replaced forwards, modules that another answers for."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from closeness import assert_close
from test_live import adapt, make, update
from torch import Tensor, nn

from fxpeft.passes.live import (
    kind_of,
    unbind,
)


def replace_forward(module: nn.Module) -> Callable[..., Tensor]:
    """Double the output, by a forward set on the instance."""

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 2

    module.forward = types.MethodType(forward, module)
    return module.forward


@pytest.mark.parametrize("hooked", [False, True], ids=["bare", "hooked"])
def test_a_forward_set_on_the_instance_goes_on_running(hooked: bool) -> None:
    module, x = make("linear")
    forward = replace_forward(module)
    bare = module(x)
    if hooked:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    for names in (("mine",), ("mine", "other")):  # bound once, and again over the first
        adapt(module, *names)
        wanted = bare + sum(update(module, x, name) for name in names)
        assert_close(module(x), wanted)
    twin = copy.deepcopy(module)
    unbind(module)
    assert torch.equal(module(x), bare)
    if hooked:
        remove_hook_from_module(module)
    else:
        assert_close(twin(x), wanted)
    assert vars(module)["forward"] == forward
    assert torch.equal(module(x), bare)


class Anything(nn.Linear):
    """A forward that hands on whatever it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) * 2


@pytest.mark.parametrize("kept", ["on the instance", "of the class"])
def test_a_wrapper_whose_arguments_have_no_names_is_a_leaf(kept: str) -> None:
    """As Transformers' tensor parallelism puts one around each linear."""
    module, x = Anything(5, 7) if kept == "of the class" else nn.Linear(5, 7), torch.randn(4, 5)
    forward = module.forward
    if kept == "on the instance":
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 2
    bare = module(x)
    adapt(module, "mine")
    assert_close(module(x), bare + update(module, x, "mine"))
    assert_close(module(input=x), bare + update(module, x, "mine"))
    unbind(module)
    assert torch.equal(module(x), bare)


@pytest.mark.parametrize("name", ["linear", "transformers Conv1D", "embedding", "conv2d", "untraceable"])
def test_accelerate_hooks_stay(name: str) -> None:
    module, x = make(name)
    bare, cls = module(x), type(module)
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    add_hook_to_module(module, hook)
    seen: list[int] = []
    before = hook.pre_forward
    hook.pre_forward = lambda *args, **kwargs: (seen.append(1), before(*args, **kwargs))[1]
    adapt(module)
    assert_close(module(x), bare + update(module, x))
    assert seen == [1]
    unbind(module)
    assert torch.equal(module(x), bare)
    assert seen == [1, 1]
    remove_hook_from_module(module)
    assert torch.equal(module(x), bare)
    assert type(module) is cls


@pytest.mark.parametrize("added", ["before", "after"])
def test_a_hook_may_go_while_an_adapter_is_there(added: str) -> None:
    module, x = make("linear")
    bare = module(x)
    if added == "before":
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    adapt(module)
    if added == "after":
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert_close(module(x), bare + update(module, x))
    remove_hook_from_module(module)
    assert_close(module(x), bare + update(module, x))
    adapt(module, "other")
    assert_close(module(x), bare + update(module, x, "other"))
    unbind(module)
    del module.adapters
    assert torch.equal(module(x), bare)


def test_forward_hooks_stay() -> None:
    module, x = make("linear")
    module.register_forward_hook(lambda m, args, out: out + 1)
    bare = module(x)
    adapt(module)
    assert_close(module(x), bare + update(module, x))


class Remembering(nn.Linear):
    """Its forward writes to its state, as bitsandbytes' Linear8bitLt does."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.state = types.SimpleNamespace(seen=None)
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.state.seen = x
        self.log.append(x)
        return super().forward(x)


def test_tracing_leaves_no_proxy_in_the_modules_state() -> None:
    module = Remembering()
    kind_of(module)
    assert module.state.seen is None
    assert module.log == []
