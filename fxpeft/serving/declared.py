"""What slots are declared for: the one place that checks it, for live models, programs and packages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fxpeft.errors import AdapterError, listing
from fxpeft.methods import METHODS, slot_needs
from fxpeft.methods.alora import Alora
from fxpeft.methods.prompt_inputs import cache_argument
from fxpeft.methods.prompts import forward_arguments
from fxpeft.model.batch_rows import other_rows
from fxpeft.model.placement import parted
from fxpeft.model.wrappers import submodule
from fxpeft.passes.slots.kronecker import KRONECKER
from fxpeft.passes.slots.slot import LEAST
from fxpeft.passes.targets.kinds import Kind
from fxpeft.serving.prompts import prompt_methods


def servable(*, at_targets: bool = False) -> dict[str, frozenset[str]]:
    """What ``methods`` may name -> the gains and shifts that it needs; with ``at_targets`` without prompts."""
    served = () if at_targets else prompt_methods()
    unserved = {method.name for method in METHODS if method.unlowered and method.name not in served}
    if at_targets:
        unserved |= {method.name for method in METHODS if not method.targeted}
    return {name: needs for name, needs in slot_needs().items() if name not in unserved}


def check_slots(methods: Sequence[str], max_rank: int, rank: str, *, at_targets: bool = False) -> frozenset[str]:
    """Check what slots are declared for; returns the gains and shifts that they need.

    Args:
        methods, max_rank, rank: as in :func:`fxpeft.prepare_hotswap`.
        at_targets: there is no other place for slots, so that no prompt can be served.

    Raises:
        AdapterError: an unknown method, too few ranks, or another word for the rank.
    """
    known = servable(at_targets=at_targets)
    unknown = [m for m in methods if m not in known]
    if isinstance(methods, str) or unknown:
        found = repr(methods) if isinstance(methods, str) else ", ".join(map(str, unknown))
        raise AdapterError(f"methods: expected a sequence of some of {', '.join(known)}, found {found}")
    if max_rank < LEAST:
        raise AdapterError(f"max_rank: expected at least {LEAST}, found {max_rank}")
    if rank not in ("dynamic", "static"):
        raise AdapterError(f"rank: expected 'dynamic' or 'static', found {rank!r}")
    return frozenset[str]().union(*(known[m] for m in methods))


def check_lanes(model: nn.Module, kinds: Mapping[str, Kind], saved: Iterable[str]) -> dict[str, str]:
    """Check that rows can have adapters of their own at each of the sites.

    Args:
        saved: modules that adapters may bring whole. Where one can't be of some rows, it still can be of all.

    Returns:
        Those of ``saved`` that can't be of some rows -> why.

    Raises:
        AdapterError: sites where rows can't have their own, and what is there in the place of the batch's rows.
    """
    wrong = {site: f"a {kind.name} is the same for all rows" for site, kind in kinds.items() if not kind.takes_lanes}
    keep = {path: "it takes a cache, which every copy would fill" for path in saved if _takes_cache(model, path)}
    asked = [*(site for site in kinds if site not in wrong), *(path for path in saved if path not in keep)]
    found = other_rows(model, asked)
    keep |= {path: what for path, what in found.items() if path not in kinds}
    wrong |= {site: what for site, what in found.items() if site in kinds}
    if wrong:
        raise AdapterError(
            "lanes: these targets don't see the rows of a batch one by one and in their order:\n"
            f"{listing(f'{site}: {what}' for site, what in wrong.items())}\n"
            "leave them out of targets, or prepare with lanes=1"
        )
    return keep


def _takes_cache(model: nn.Module, path: str) -> bool:
    return any(cache_argument(forward_arguments(part)) for part in submodule(model, path).modules())


def check_parted(model: nn.Module, hosts: Iterable[str], methods: Sequence[str], lanes: int) -> list[str]:
    """Check that modules which tensor parallelism has parted get slots of low-rank factors alone; returns them.

    Raises:
        AdapterError: something else was declared; the parted modules are named.
    """
    given = [
        *(f"methods={m!r}" for m in methods if slot_needs()[m] - KRONECKER or m == Alora.name),
        *([f"lanes={lanes}"] if lanes > 1 else []),
    ]
    cut = sorted(name for name in hosts if parted(submodule(model, name)))
    if cut and given:
        raise AdapterError(
            f"{', '.join(given)}: expected LoRA in one lane where tensor parallelism has parted modules, as here:\n"
            f"{listing(cut)}\nleave them out of targets"
        )
    return cut
