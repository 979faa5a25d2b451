"""Rows of their own adapters on a model without slots: each of its targets takes its rows group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxpeft.adapters.attach import check_together, hosts, rebind
from fxpeft.adapters.change import changing
from fxpeft.adapters.restore import restoring
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.model.batch_rows import other_rows
from fxpeft.model.fast_path import is_fused, switch_off
from fxpeft.passes.base import PassError
from fxpeft.passes.live import bind_source, is_bound
from fxpeft.passes.live.apart import Groups, Own, call_own, own_forward, put_together, take_apart
from fxpeft.serving.board import Named

GROUPS = "_fxpeft_groups"  # where a model has them for its ``generate``
_CALLS = f"""from {call_own.__module__} import call_own

def forward(self, *args, **kwargs):
    return call_own(self, args, kwargs)
"""


class Generating:
    """``generate`` of a model whose rows are taken apart: beams and sequences of one row are rows side by side."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        groups: Groups = vars(self)[GROUPS]
        before, groups.repeats = groups.repeats, repeats_of(self, args, kwargs)
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            groups.repeats = before


def repeats_of(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many rows Transformers' ``generate`` makes of each."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None) or getattr(
        model, "generation_config", None
    )
    asked = (kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max(1, *(number for number in asked if isinstance(number, int)), 1)


@contextmanager
def rows_apart(model: nn.Module, named: Named) -> Iterator[None]:
    """Let the rows of the model's calls have the adapters that they name, as long as the block is open.

    Raises:
        AdapterError: what rows can't have, or the model is in training; nothing was changed.
    """
    with changing(model):
        state = state_of(model)
        mixtures = [[state.get(name) for name in mixture] for mixture in named.mixtures]
        _check(model, named, mixtures)
        adapters = list({adapter.name: adapter for mixture in mixtures for adapter in mixture}.values())
        touched = hosts(model, [*adapters, *state.running()])
        sites = [name for name in touched if any(name in adapter.parts for adapter in adapters)]
        _check_rows(model, sites)
        groups, root = Groups(named.ids, named.repeats), model if callable(getattr(model, "generate", None)) else None
        try:
            with restoring(model, [*adapters, *state.running()], touched.values()):
                owns: dict[str, list[Own]] = {name: [] for name in sites}
                for mixture in mixtures:
                    rebind(model, touched, mixture)
                    for name in sites:
                        parts = [adapter.parts[name] for adapter in mixture if name in adapter.parts]
                        owns[name].append(Own(_forward(touched[name]), parts))
                rebind(model, touched, [])
                for name, module in touched.items():
                    if name in owns:
                        take_apart(module, groups, owns[name], name)
                    elif is_fused(module):
                        switch_off(module)
                if root is not None and "" not in owns:
                    vars(root)[GROUPS] = groups
                    bind_source(root, _CALLS, Generating)
                state.apart = True
        except PassError as error:
            raise AdapterError(str(error)) from None
    try:
        yield
    finally:
        state.apart = False
        with changing(model):
            for name in sites:
                put_together(touched[name])
            rebind(model, touched if root is None else {**touched, "": root}, state.running())
            vars(model).pop(GROUPS, None)


def _forward(module: nn.Module) -> Callable[..., Any]:
    """What a module runs now, to be called with it, whatever it is bound to later."""
    if is_bound(module):
        return type(module).forward
    own = own_forward(module)
    return lambda _, *args, **kwargs: own(*args, **kwargs)


def _check(model: nn.Module, named: Named, mixtures: Sequence[list[Adapter]]) -> None:
    """Refuse what rows can't have each of their own.

    Raises:
        AdapterError: which, and why.
    """
    state = state_of(model)
    state.check_unfolded(named.names(), "rows can't name it")
    if model.training:
        raise AdapterError("rows of their own adapters are for inference, as in PEFT: call model.eval() first")
    for weights, mixture in zip(named.mixtures, mixtures, strict=True):
        check_together(mixture)
        for adapter in mixture:
            if method_of(adapter.config).feeds:
                raise AdapterError(f"a row: {adapter.name}: a prompt is of all rows of a call; set it active instead")
            if weights[adapter.name] != 1:
                raise AdapterError(
                    f"a row: {adapter.name}: expected the weight 1 on a model without slots, found "
                    f"{weights[adapter.name]:g}: set_scale, or prepare_hotswap(model, lanes=8) for weights of each row"
                )


def _check_rows(model: nn.Module, sites: Sequence[str]) -> None:
    """Refuse sites that don't see the rows of a batch.

    Raises:
        AdapterError: which, and what they see.
    """
    known = state_of(model).in_rows
    left = [site for site in sites if site not in known]
    if wrong := other_rows(model, left) if left else {}:
        raise AdapterError(
            "these targets don't see the rows of a batch one by one and in their order, so rows can't have adapters "
            f"of their own there:\n{listing(f'{site}: {what}' for site, what in wrong.items())}"
        )
    known.update(left)
