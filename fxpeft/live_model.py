"""One object to drive adapters with: a live model by the verbs of the functions, and what it shares with a package."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from fxpeft import adapters, programs, serving, transform
from fxpeft import model as reading
from fxpeft import planning as plans
from fxpeft.adapters.state import find_state
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.wrappers import unwrap
from fxpeft.serving.swap import Serving

if TYPE_CHECKING:
    from fxpeft.programs import Package

P = ParamSpec("P")
T = TypeVar("T")


@runtime_checkable
class Handle(Protocol):
    """What a live model (:class:`LiveModel`) and a package (:class:`fxpeft.Package`) are both driven by.

    Both may take more arguments than stand here: a live model's ``load_adapter`` reads from the hub, a package's
    knows the base that an adapter was trained on.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def load_adapter(self, source: str | Path, name: str = "default", *, check_finite: bool = False) -> None: ...
    def hotswap(
        self,
        source: str | Path | Mapping[str, Tensor],
        name: str | None = None,
        *,
        config: AdapterConfig | None = None,
        check_finite: bool = False,
    ) -> None: ...
    def load_adapter_state_dict(
        self, state_dict: Mapping[str, Tensor], name: str | None = None, *, check_finite: bool = False
    ) -> None: ...
    def delete_adapter(self, name: str) -> None: ...

    def set_adapter(self, names: str | Sequence[str]) -> None: ...
    def set_scale(self, name: str, scale: float) -> None: ...
    def enable(self) -> None: ...
    def disable(self) -> None: ...

    def loaded_adapters(self) -> list[str]: ...
    def active_adapters(self) -> list[str]: ...
    def adapter_config(self, name: str | None = None) -> AdapterConfig: ...
    def adapter_state_dict(self, name: str | None = None) -> dict[str, Tensor]: ...

    def active(self, names: str | Sequence[str]) -> AbstractContextManager[None]: ...
    def scaled(
        self, scales: str | Mapping[str, float], factor: float | None = None
    ) -> AbstractContextManager[None]: ...
    def disabled(self) -> AbstractContextManager[None]: ...
    def hold(self) -> AbstractContextManager[None]: ...


def _verb(function: Callable[Concatenate[nn.Module, P], T]) -> Callable[Concatenate[LiveModel, P], T]:
    """A function of a model as a method: its arguments, text and errors are the function's."""

    def method(self: LiveModel, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return function(self.model, *args, **kwargs)

    functools.update_wrapper(method, function)
    return method


@dataclass(frozen=True, repr=False)
class LiveModel:
    """A model and the verbs on its adapters: ``LiveModel(model).fold("a")`` is ``fxpeft.fold(model, "a")``.

    It holds nothing but the model: make one wherever it is handy. Those of one model are equal and say the same.
    ``enable`` and ``disable``, as a package has them, are :func:`fxpeft.enable_adapters` and ``disable_adapters``.

    Args:
        model: any module, compiled or wrapped too; calling this calls it.
    """

    model: nn.Module

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise AdapterError(f"LiveModel: expected a torch module, found {type(self.model).__name__}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    # adapters come and go
    add_adapter = _verb(adapters.add_adapter)
    load_adapter = _verb(adapters.load_adapter)
    inject = _verb(adapters.inject)
    load_adapter_state_dict = _verb(adapters.load_adapter_state_dict)
    save_adapter = _verb(adapters.save_adapter)
    delete_adapter = _verb(adapters.delete_adapter)
    remove = _verb(serving.remove)

    # which take part, and how much
    set_adapter = _verb(adapters.set_adapter)
    set_scale = _verb(adapters.set_scale)
    enable = _verb(adapters.enable_adapters)
    disable = _verb(adapters.disable_adapters)

    # what there is
    loaded_adapters = _verb(adapters.loaded_adapters)
    active_adapters = _verb(adapters.active_adapters)
    folded_adapters = _verb(transform.folded_adapters)
    adapter_config = _verb(adapters.adapter_config)
    adapter_state_dict = _verb(adapters.adapter_state_dict)
    roles = _verb(reading.roles)
    plan = _verb(plans.plan)

    # for the length of a block
    active = _verb(adapters.active)
    scaled = _verb(adapters.scaled)
    disabled = _verb(adapters.disabled)
    folded = _verb(transform.folded)
    hold = _verb(serving.hold)
    rows = _verb(serving.rows)
    tokens = _verb(serving.tokens)

    # training
    set_requires_grad = _verb(adapters.set_requires_grad)
    trainable_parameters = _verb(adapters.trainable_parameters)
    lora_fa_groups = _verb(adapters.lora_fa_groups)
    lora_plus_groups = _verb(adapters.lora_plus_groups)
    initialize_corda = _verb(adapters.initialize_corda)
    initialize_eva = _verb(adapters.initialize_eva)
    initialize_kv_prefix_from_past_key_values = _verb(adapters.initialize_kv_prefix_from_past_key_values)
    initialize_kv_prefix_from_text = _verb(adapters.initialize_kv_prefix_from_text)
    initialize_lora_ga = _verb(adapters.initialize_lora_ga)
    replicate_layers = _verb(adapters.replicate_layers)

    # serving
    prepare_hotswap = _verb(serving.prepare_hotswap)
    hotswap = _verb(serving.hotswap)
    release_hotswap = _verb(serving.release_hotswap)
    compile = _verb(programs.compile)  # type: ignore[arg-type]  # an option of torch's could be called model
    package = _verb(programs.package)

    # adapters into weights and into other adapters
    fold = _verb(transform.fold)
    refold = _verb(transform.refold)
    unfold = _verb(transform.unfold)
    merge_and_unload = _verb(transform.merge_and_unload)
    add_weighted_adapter = _verb(transform.add_weighted_adapter)
    convert = _verb(transform.convert)

    def __repr__(self) -> str:
        """What is loaded, active, folded, and whether it is prepared."""
        model = unwrap(self.model)
        state = find_state(model)
        facts = [type(model).__name__]
        if state is not None:
            scales = {name: _scale(a.strength) for name, a in state.adapters.items()}
            methods = {name: method_of(a.config).declared(a.config) for name, a in state.adapters.items()}
            each = [f"{name} ({methods[name]}{scales[name]})" for name in state.adapters]
            off = "" if state.enabled else ", switched off"
            facts += [f"adapters: {', '.join(each) or 'none'}", f"active: {', '.join(state.active) or 'none'}{off}"]
            if inside := self.folded_adapters():
                facts.append(f"folded: {', '.join(inside)}")
            if isinstance(slots := state.serving, Serving):
                facts.append(f"prepared: max_rank {slots.max_rank}, {', '.join(slots.methods)}")
        return f"{type(self).__name__}({'; '.join(facts)})"


if TYPE_CHECKING:  # mypy: both are handles
    _: tuple[type[Handle], type[Handle]] = (LiveModel, Package)


def _scale(strength: float | Mapping[str, float]) -> str:
    if isinstance(strength, Mapping):
        return f", scales of {len(strength)} sites"
    return "" if strength == 1 else f", scale {strength:g}"
