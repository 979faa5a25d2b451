"""Sites of one weight, to which adapters add one update: it is folded once."""

from __future__ import annotations

from fxpeft.adapters.state import Adapter
from fxpeft.methods import method_of
from fxpeft.methods.lora import Lora


def followers_among(adapters: list[Adapter]) -> dict[str, str]:
    """The sites whose weight is that of another, with the same update by all adapters, which is folded once."""
    found: dict[str, str] = {}
    for adapter in adapters:
        for name, first in adapter.plan.tied.items():
            touching = [a for a in adapters if name in a.plan.sites or first in a.plan.sites]
            if all(_follows(a, name, first) for a in touching) and touching:
                found[name] = first
    return found


def _follows(adapter: Adapter, name: str, first: str) -> bool:
    same = adapter.plan.tied.get(name) == first and method_of(adapter.config).name == Lora.name
    return same and adapter.site_plan(name).scaling == adapter.site_plan(first).scaling
