"""Convert: an adapter of one method becomes a plain LoRA, exactly or as near as a rank allows."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from fxpeft.adapters.change import changes
from fxpeft.adapters.inplace import accumulator, fold_weight
from fxpeft.adapters.installing import check_name
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.base import Base, SitePlan, SlotValues
from fxpeft.model.wrappers import submodule, unwrap
from fxpeft.passes.base import PassError
from fxpeft.passes.live import base_weight
from fxpeft.transform.derived import add_lora, brought, factorise, in_order, refactorise, refuse_parameters


@changes
@torch.no_grad()
def convert(
    model: nn.Module, name: str, to: Literal["lora"] = "lora", *, new_name: str | None = None, rank: int | None = None
) -> dict[str, float]:
    """Add a plain LoRA (scale 1, no rsLoRA) that computes what another adapter does, and make it the active one.

    Exact up to rounding, at the same ranks, from AdaLoRA (singular values go into B, ranks that are off
    are left out), from LoRA with rsLoRA, patterns or a strength (they go into B), and from any
    registered method that lowers to ranks and a shift. The old adapter stays.

    A gain (DoRA, IA3) is no low-rank update: :func:`fxpeft.fold` takes it exactly. With ``rank`` the
    update is approximated by the best of that rank, and a warning says how far off it is.

    Args:
        new_name: ``<name>_lora`` by default.
        rank: the most ranks at each site; also makes a LoRA smaller. A layer can't have more than its size.

    Returns:
        Site -> ``|W - W'| / |W|`` of its update W, where ``rank`` was asked for; what is exact has none.

    Raises:
        AdapterError: a method that needs ``rank``, an update that is no change of the weight, or a folded
            adapter; the sites are named, and nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    adapter = state.get(name)
    new_name = f"{name}_lora" if new_name is None else new_name
    check_name(model, new_name)
    state.check_unfolded([name], "it can't be converted")
    if unlowered := method_of(adapter.config).unmerged(adapter.config):
        raise AdapterError(f"adapter {name!r}: {unlowered}, which no LoRA does")
    if to != "lora":
        raise AdapterError(f"to: expected 'lora', found {to!r}")
    if rank is not None and rank <= 0:
        raise AdapterError(f"rank: expected a positive integer, found {rank}")
    if not adapter.plan.sites:
        raise AdapterError(
            f"adapter {name!r}: {method_of(adapter.config).name} adapts no site, so no LoRA does the same"
        )
    refuse_parameters([adapter], "convert")
    values, current = brought([adapter]), adapter.current()
    brings = current.own()
    errors: dict[str, float] = {}
    problems: list[str] = []
    for site in in_order(model, [adapter]):
        module = submodule(model, site)
        plan = adapter.site_plan(site)
        own = brings.get(site, {})
        parameters = (*current.sites[site].values(), *current.shared.values())
        dtype = next(tensor.dtype for tensor in parameters if tensor.is_floating_point())
        base = Base(module, own, shared=current.shared)
        try:
            if "weight" in own:
                raise PassError("the adapter brings its own base weight here; fold it instead")
            lowered = method_of(adapter.config).lower(plan, current.sites[site], base)
            a, b = _factors(module, plan, lowered, rank, errors, site)
            shift = _shift(plan, lowered, base)
        except PassError as error:
            problems.append(f"{site}: {error}")
            continue
        values.sites[site] = {"lora_A": a.to(dtype), "lora_B": b.to(dtype)}
        if shift is not None:
            values.sites[site]["lora_B_bias"] = shift.to(dtype)
    if problems:
        raise AdapterError(f"adapter {name!r} can't be converted to LoRA; nothing was changed.\n{listing(problems)}")
    _fill_biases(adapter, values.sites)
    worst = max(errors, key=lambda site: errors[site], default=None)
    if worst is not None and errors[worst] > 1e-5:
        warnings.warn(
            f"{new_name!r} approximates {name!r} at rank {rank}: the update is off by up to {errors[worst]:.1%} of its "
            f"norm (at {worst}), {sum(errors.values()) / len(errors):.1%} on average; fold {name!r} to have it exactly",
            stacklevel=4,
        )
    add_lora(model, new_name, values, [adapter])
    return errors


def _factors(
    module: nn.Module, plan: SitePlan, lowered: SlotValues, rank: int | None, errors: dict[str, float], site: str
) -> tuple[Tensor, Tensor]:
    """A and B of scale 1, and the share of the update that they miss."""
    kind = plan.kind
    gains = lowered.multiplies()
    if gains and rank is None:
        raise PassError(
            "the method multiplies what the base computes, which no low-rank update does; fold takes it exactly, or "
            "give a rank to approximate it"
        )
    a, rows = lowered.a.float(), lowered.b.float() * lowered.d.to(lowered.b.device).unsqueeze(1)
    grouped = kind.groups > 1
    if not len(a):  # a shift alone, and a LoRA of rank 0 there isn't
        a, rows = a.new_zeros(kind.a_shape(1)), rows.new_zeros(1, kind.out_features)
    if rank is None:
        on = lowered.d != 0
        if not grouped and not on.all():  # at least one is kept: a LoRA of rank 0 there isn't
            on[0] |= not on.any()
            a, rows = a[on.to(a.device)], rows[on.to(a.device)]
        return a, kind.unrows(rows, len(a)).contiguous()
    reason = kind.why_no_delta(module) if grouped or gains else None
    if reason:
        raise PassError(f"{reason}, so there is no nearest one of a lower rank")
    most = min(rank, kind.out_features, torch.Size(kind.a_shape(1)).numel())
    if gains:
        weight = accumulator(base_weight(module))
        delta = fold_weight(kind, weight, lowered) - weight
        a, b = factorise(kind, delta, most)
    else:
        delta = kind.delta(a, rows)
        a, b = refactorise(kind, a, rows, most)
    missed = torch.linalg.vector_norm(delta - kind.delta(a, kind.rows(b)))
    errors[site] = float(missed / torch.linalg.vector_norm(delta).clamp(min=1e-30))
    return a, b


def _shift(plan: SitePlan, lowered: SlotValues, base: Base) -> Tensor | None:
    """What is added per output, beside the base's own bias; ``None`` for nothing."""
    bias = base.bias()
    if bias is None or lowered.g_out is None:
        return lowered.shift
    shift = bias * (lowered.g_out - 1) + (0 if lowered.shift is None else lowered.shift)
    # DoRA's correction takes the gain off the bias again, to within rounding
    return shift if shift.abs().max() > 1e-6 * bias.abs().max() * (1 + lowered.g_out.abs().max()) else None


def _fill_biases(adapter: Adapter, sites: dict[str, dict[str, Tensor]]) -> None:
    """``lora_bias`` is one setting for all sites: those without get zeros."""
    if any("lora_B_bias" in parts for parts in sites.values()):
        for site, parts in sites.items():
            out = adapter.plan.sites[site].kind.out_features
            parts.setdefault("lora_B_bias", parts["lora_B"].new_zeros(out))
