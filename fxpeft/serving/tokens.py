"""Serving trained tokens: room for some rows at the embeddings, which adapters' rows come into and leave by copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.tokens import NAME, TokenRows
from fxpeft.model.modules import Modules
from fxpeft.model.placement import placement
from fxpeft.model.wrappers import submodule
from fxpeft.passes.slots.lanes import Lanes
from fxpeft.passes.slots.tokens import TokenSlot
from fxpeft.targets.tokens import token_modules

MOST = 64  # tokens that there is room for where nobody says how many


def declare(
    model: nn.Module, methods: Sequence[str], max_tokens: int | None, modules: Sequence[str] | None,
    adapters: Sequence[Adapter], lanes: Lanes | None,
) -> dict[str, TokenSlot]:  # fmt: skip
    """Module -> room for rows, of the adapters to come and of those that the model has. The model is not touched.

    Args:
        max_tokens: how many tokens; at least as many as the adapters have that are there.
        modules: names of the embeddings and heads; ``None``: the input embeddings, and what has their weight.
        lanes: of a model whose rows may have adapters of their own.

    Raises:
        AdapterError: no such module, or room that ``methods`` doesn't declare.
    """
    own: dict[str, TokenRows] = {}
    for adapter in adapters:
        own.update(adapter.plan.tokens)
    most = max((len(rows.tokens) for a in adapters for rows in a.plan.tokens.values()), default=0)
    if NAME in methods:
        own |= token_modules(Modules(model), modules)
    elif max_tokens is not None or modules is not None:
        raise AdapterError(f"max_tokens and token_modules: only with {NAME!r} among the methods")
    if max_tokens is not None and (isinstance(max_tokens, bool) or max_tokens < max(most, 1)):
        raise AdapterError(f"max_tokens: expected at least {max(most, 1)}, found {max_tokens}")
    count = max_tokens or max(MOST, most)
    slots = {}
    for name, rows in own.items():
        device, dtype = placement(submodule(model, name), model, autocast=False)
        slots[name] = TokenSlot(rows.kind, count, device=device, dtype=dtype, lanes=lanes, site=name)
    return slots


def problems(slots: Mapping[str, TokenSlot], adapter: Adapter) -> list[str]:
    """Why an adapter's rows don't fit; nothing where they do."""
    found = []
    for name, rows in adapter.plan.tokens.items():
        slot, count = slots.get(name), len(rows.tokens)
        if slot is None:
            found.append(
                f"{name}: has no slot for tokens; declare {NAME!r} among the methods, and the module in token_modules "
                "where it is not the input embeddings"
            )
        elif count > len(slot.tokens):
            found.append(f"{name}: {count} tokens are above max_tokens {len(slot.tokens)}")
    return found


def check_alone(adapters: Sequence[Adapter]) -> None:
    """Refuse rows beside another adapter's rows, or update, of the same module: a slot has room for one's.

    Raises:
        AdapterError: it does; the modules are named.
    """
    clashes = []
    for adapter in adapters if len(adapters) > 1 else ():
        for name in adapter.plan.tokens:
            others = [a for a in adapters if a is not adapter and (name in a.plan.tokens or name in a.lowered)]
            clashes += [f"{name}: {adapter.name} ({method_of(adapter.config).name}) and {a.name}" for a in others]
    if clashes:
        raise AdapterError(
            "these adapters can't share a slot, since one has rows of its own there:\n"
            f"{listing(clashes)}\nset one of them active, or release_hotswap(model) to run them one after the other"
        )


def show(slots: Mapping[str, TokenSlot], adapters: Sequence[Adapter]) -> None:
    """Put the rows among ``adapters`` into the slots; where there are none a module is the base's."""
    for name, slot in slots.items():
        hold(slot, name, next((a for a in adapters if name in a.plan.tokens), None))


def hold(slot: TokenSlot, name: str, owner: Adapter | None, lane: int | None = None) -> None:
    """Put an adapter's rows into a module's slot, or into one of its lanes; without any nothing is there."""
    rows = None if owner is None else owner.plan.tokens.get(name)
    if owner is None or rows is None:
        slot.hold((), None, lane)
    else:
        slot.hold(rows.tokens, owner.values.tokens[rows.tied or name], lane)
