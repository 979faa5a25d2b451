"""Which adapters can be in the slots at a time."""

from __future__ import annotations

from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of


def check_ranks(adapters: list[Adapter], max_rank: int) -> None:
    """Refuse adapters whose ranks together are more than a slot holds; of one alone lowering looked."""
    if len(adapters) < 2:
        return
    total: dict[str, int] = {}
    for adapter in adapters:
        for site, value in adapter.lowered.items():
            total[site] = total.get(site, 0) + value.d.numel()
    over = [f"{site}: {rank} ranks" for site, rank in total.items() if rank > max_rank]
    if over:
        raise AdapterError(
            f"the active adapters need more than max_rank {max_rank} ranks together:\n{listing(over)}\n"
            "Activate fewer at a time, or prepare with a larger max_rank."
        )


def check_gains(adapters: list[Adapter]) -> None:
    """Refuse a gain beside another adapter: a slot multiplies the sum of all, and a DoRA's shift is of one bias."""
    if len(adapters) < 2:
        return
    clashes = []
    for adapter in adapters:
        for site, value in adapter.lowered.items():
            brought = f"{site}.bias" if value.shift is not None else None
            others = [
                a.name for a in adapters if a is not adapter and (site in a.lowered or brought in a.values.tensors)
            ]
            if others and value.multiplies():
                clashes.append(f"{site}: {adapter.name} ({method_of(adapter.config).name}) and {', '.join(others)}")
    if clashes:
        raise AdapterError(
            "these adapters can't share a slot, since a gain or rotation multiplies what the others add:\n"
            f"{listing(clashes)}\nset one of them active, or release_hotswap(model) to run them one after the other"
        )
