"""The components of a pipeline change together, or none does."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import nn

from fxpeft.adapters.api import set_scale
from fxpeft.adapters.change import changing
from fxpeft.adapters.restore import restoring
from fxpeft.adapters.state import ModelState, find_state
from fxpeft.errors import AdapterError


class Pipeline(Protocol):
    """What a diffusers pipeline has: its components by name; its class reads its files."""

    @property
    def components(self) -> dict[str, Any]:
        """Models, tokenizers and schedulers by name."""
        ...


def models_of(pipe: Pipeline) -> dict[str, nn.Module]:
    """Component -> model, those first that diffusers loads LoRAs into, in its order."""
    components = pipe.components  # a property that looks for all of them each time
    first = [name for name in getattr(pipe, "_lora_loadable_modules", ()) if name in components]
    found = {name: components[name] for name in (*first, *components)}
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def adapted(models: Mapping[str, nn.Module]) -> dict[str, ModelState]:
    """Component -> what fxpeft keeps for it, of those that it has changed."""
    return {name: state for name, model in models.items() if (state := find_state(model)) is not None}


def check_named(states: Mapping[str, ModelState], names: Collection[str]) -> None:
    """Refuse names that no component has.

    Raises:
        AdapterError: they are named.
    """
    if missing := [name for name in names if not any(name in state.adapters for state in states.values())]:
        raise AdapterError(f"no component has an adapter named {', '.join(missing)}")


@contextmanager
def together(models: Collection[nn.Module]) -> Iterator[None]:
    """Change the adapters of these models. After an error all have what they had, scales too."""
    with ExitStack() as stack:
        strengths = []
        for model in models:
            stack.enter_context(changing(model))
            state = find_state(model)
            if state is None or state.serving is None:
                stack.enter_context(restoring(model, [] if state is None else state.adapters.values()))
            inside = [] if state is None else state.in_weights()
            own = {} if state is None else state.adapters
            strengths += [(model, name, a.strength) for name, a in own.items() if name not in inside]
        try:
            yield
        except BaseException:
            for model, name, strength in strengths:  # values, which the blocks around don't put back
                state = find_state(model)
                if state is not None and name in state.adapters and state.adapters[name].strength != strength:
                    set_scale(model, name, strength)
            raise
