"""Fold: adapters become part of the base's weights, in place, and come out again.

Every method lowers to ``y = g_out * (base(x') + B d A x') + shift``, ``x' = (g_in * x) (I + R)`` (see
:class:`~fxpeft.methods.base.SlotValues`), so one rule folds all: ``W' = g_out * (W + B d A) (I + R)^T * g_in`` and
``bias' = g_out * bias + shift``. Of several adapters each takes the one before as its base, as in the
forward. Weights keep their memory, so a compiled graph of the bare model goes on serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fxpeft.adapters.attach import check_together
from fxpeft.adapters.change import changes
from fxpeft.adapters.inplace import (
    Folded,
    accumulator,
    check_finite,
    exchange,
    first_name,
    fold_weight,
    product_at,
    settle_shared,
)
from fxpeft.adapters.restore import restoring
from fxpeft.adapters.state import Adapter, ModelState, state_of
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of, slot_needs
from fxpeft.methods.base import Base, SlotValues
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.base import PassError, attribute, join
from fxpeft.passes.live.product import Product
from fxpeft.passes.slots.slot import MULTIPLY
from fxpeft.passes.torch_private import is_freezing
from fxpeft.serving.release import remove
from fxpeft.serving.swap import serving_of
from fxpeft.transform.rows import fold_rows
from fxpeft.transform.tied import followers_among
from fxpeft.transform.writing import write_and_run

STEEPEST = 1e3  # how much more a rotation may stretch one direction than another, to be undone in float32


@changes
def fold(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    keep: Literal["original", "delta"] | None = "original",
    safe: bool = False,
) -> None:
    """Merge adapters into the base's weights and take them out of the forward, which is then the bare model's.

    The outputs stay what they were, up to rounding: sums are made in float32 (float64 for a float64
    base) and rounded once to the base's dtype. Everything is computed and checked before the first
    weight is written; while it runs, that takes the touched weights' memory twice more.

    On a model that was prepared for hot swapping the fold is one swap under its lock. On any other
    model no forward may run in another thread meanwhile.

    Args:
        names: which adapters; the active ones by default. Others that are active stay so, on top.
        keep: ``"original"``: copies of the weights, for an exact :func:`unfold`. ``"delta"``: copies of
            the adapters only; ``unfold`` then subtracts, and a weight comes back to within rounding
            (a float32 one to about 1e-7 of the largest value it had, a bfloat16 one to 4e-3).
            A gain near zero makes that worse by its inverse. ``None``: nothing, there is no way back.
        safe: refuse NaN and infinity.

    Raises:
        AdapterError: tied weights, quantised ones, an update that is no change of the weight (a
            grouped convolution, a convolution with a ``padding_mode``), a bias that the base lacks;
            every site is named, and nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    if keep not in ("original", "delta", None):
        raise AdapterError(f"keep: expected 'original', 'delta' or None, found {keep!r}")
    if state.folded is not None:
        raise AdapterError(
            f"{', '.join(state.folded.names) or 'nothing'} is folded already: refold(model, names) folds others "
            "instead, several at once too; unfold(model) takes them out"
        )
    wanted = _wanted(state, names)
    _check_order(state, wanted)
    _fold(model, state, wanted, [n for n in state.active if n not in wanted], keep, safe)


def _fold(
    model: nn.Module,
    state: ModelState,
    wanted: list[str],
    stay: list[str],
    keep: Literal["original", "delta"] | None,
    safe: bool,
) -> dict[str, Tensor]:
    """Fold ``wanted`` and leave ``stay`` active; returns what the weights were."""
    work = _compute(model, [state.get(n) for n in wanted], {}, keep)
    if safe:
        check_finite(work.writes, wanted)
    before = write_and_run(model, state, work.writes, stay)
    if keep is None:
        state.baked = [*state.baked, *wanted]
    else:
        originals = dict(before)
        for path in work.subtracted:
            originals.pop(path, None)
        state.folded = Folded(wanted, keep, originals, work.steps)
    return before


@changes
def refold(model: nn.Module, names: str | Sequence[str], *, safe: bool = False) -> None:
    """Fold these adapters, and no others, in the place of what is folded: a hot swap without slots.

    Weights are written in their own memory, so nothing recompiles, and the compiled forward is the
    bare model's, with no work for the adapter. With ``keep="original"`` each swap starts from the
    originals: nothing drifts, however many there are. No adapter is left active. ``refold(model, [])``
    serves the bare model.

    Args:
        names: which adapters. safe: refuse NaN and infinity.

    Raises:
        AdapterError: as :func:`fold`; the old ones stay folded. Also where what is folded can't be
            taken out (``keep=None``), or ``torch._inductor.config.freezing`` is set, since a compiled
            graph then has copies of the weights.
    """
    model, state = unwrap(model), state_of(model)
    if is_freezing():
        raise AdapterError("torch._inductor.config.freezing folds weights into constants: a swap would have no effect")
    fold_instead(model, state, list(dict.fromkeys([names] if isinstance(names, str) else names)), [], safe=safe)


@changes
def unfold(model: nn.Module) -> None:
    """Take folded adapters out of the weights again and make them active: the outputs stay what they were.

    With ``keep="original"`` the weights are bit for bit what they were; what you wrote into them
    meanwhile is lost. ``keep="delta"``: see :func:`fold`.

    Raises:
        AdapterError: nothing is folded, it was folded with ``keep=None``, or the adapters can't be
            active together with those that are now.
    """
    model, state = unwrap(model), state_of(model)
    if state.folded is None:
        why = f"{', '.join(state.baked)} was folded with keep=None, so nothing was kept to go back to"
        raise AdapterError(why if state.baked else "no adapter is folded")
    active = [*state.folded.names, *(n for n in state.active if n not in state.folded.names)]
    check_together([state.get(n) for n in active])
    take_out(model, state, active)


def folded_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that are in the base's weights, those with ``keep=None`` first."""
    return state_of(model).in_weights()


@changes
def merge_and_unload(model: nn.Module, names: str | Sequence[str] | None = None, *, safe: bool = False) -> nn.Module:
    """Fold for good and forget all adapters: a plain model with other weights, ready to be saved.

    Args:
        names: which adapters; the active ones by default. What is folded already stays in. The
            adapters that are not named are forgotten without a trace.
        safe: refuse NaN and infinity.

    Returns:
        The model itself, changed in place, for code that is written for PEFT's function.

    Raises:
        AdapterError: as :func:`fold`; nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    inside = folded_adapters(model)
    wanted = state.active if names is None else [names] if isinstance(names, str) else names
    wanted = [n for n in wanted if n not in inside]
    before: dict[str, Tensor] = {}
    try:
        with restoring(model, state.adapters.values()):
            state.folded = None
            if wanted or not inside:
                # the others are forgotten, so whether they could stay on top doesn't matter
                before = _fold(model, state, _wanted(state, wanted), [], None, safe)
            remove(model)
    except BaseException:
        exchange(model, before)
        if state.serving is not None:
            serving_of(state).torn = True  # the slots' copies of the base may be of what was written
        raise
    return model


# --- what they share ---


def fold_instead(model: nn.Module, state: ModelState, names: list[str], active: list[str], *, safe: bool) -> None:
    """Fold these in the place of what is folded, if anything is, and leave ``active`` active on top."""
    old = state.folded or Folded([], "original")
    state.check_unfolded([n for n in names if n not in old.names], "folding it again would add it twice")
    _check_enabled(state)
    bare = old.bare(model)
    work = _compute(model, [state.get(n) for n in names], bare, old.keep)
    if safe:
        check_finite(work.writes, names)
    unkept = (bare.keys() - work.writes.keys()) | work.subtracted
    originals = {**write_and_run(model, state, {**bare, **work.writes}, active), **bare}
    for path in unkept:
        originals.pop(path, None)
    state.folded = Folded(names, old.keep, originals, work.steps)


def take_out(model: nn.Module, state: ModelState, active: list[str]) -> None:
    """Take what is folded out of the weights and make ``active`` active; on an error it stays folded."""
    folded = state.folded
    assert folded is not None
    state.folded = None
    try:
        write_and_run(model, state, folded.bare(model), active)
    except BaseException:
        state.folded = folded
        raise


@dataclass
class _Work:
    """What a fold will do: the values to write, what undoes them, and which writes the steps undo."""

    writes: dict[str, Tensor]
    steps: dict[str, list[SlotValues]]
    subtracted: frozenset[str]


@dataclass(frozen=True)
class _Stored(Base):
    """A base as a fold finds it: without what is folded now, with what the adapters bring."""

    weight_view: Tensor | None = None
    bias_value: Tensor | None = None

    def weight(self) -> Tensor:
        assert self.weight_view is not None
        return self.weight_view

    def bias(self) -> Tensor | None:
        return self.bias_value


def _wanted(state: ModelState, names: str | Sequence[str] | None) -> list[str]:
    _check_enabled(state)
    wanted = state.active if names is None else [names] if isinstance(names, str) else names
    if not wanted:
        raise AdapterError(f"no adapter is active; say which to fold: {', '.join(state.adapters) or 'none loaded'}")
    state.check_unfolded(wanted, "folding it again would add it twice")
    return [*(n for n in state.active if n in wanted), *dict.fromkeys(n for n in wanted if n not in state.active)]


def _check_order(state: ModelState, wanted: list[str]) -> None:
    """Refuse to fold an adapter from above one that stays where a gain makes the order matter."""
    clashes = []
    for i, name in enumerate(state.active):
        for lower_name in state.active[:i]:
            if name in wanted and lower_name not in wanted:
                pair = [state.get(lower_name), state.get(name)]
                shared = [s for s in pair[0].values.sites if s in pair[1].values.sites]
                clashes += [f"{s}: {lower_name} comes before {name}" for s in shared if any(map(_gains, pair))]
    if clashes:
        raise AdapterError(
            "an adapter that comes before a folded one stays active, and at these sites a gain multiplies what came "
            f"before:\n{listing(clashes)}\nfold both, or set_adapter them in the other order"
        )


def _gains(adapter: Adapter) -> bool:
    needs = slot_needs().get(method_of(adapter.config).declared(adapter.config), frozenset())
    return bool(needs & MULTIPLY)


def _check_enabled(state: ModelState) -> None:
    if not state.enabled:
        raise AdapterError("the adapters are switched off; call enable_adapters first")


@torch.no_grad()
def _compute(model: nn.Module, adapters: list[Adapter], bare: Mapping[str, Tensor], keep: str | None) -> _Work:
    """Everything that a fold writes. ``bare`` has the values of the bare model where others are there now."""
    check_together(adapters)
    unlowered = [f"{a.name}: {what}" for a in adapters if (what := method_of(a.config).unmerged(a.config))]
    if unlowered:
        raise AdapterError(f"{', '.join(unlowered)} and changes no weight, so it can't be folded")
    name_of = first_name(model)

    def base(path: str) -> Tensor:
        found = bare.get(name_of(path))
        tensor: Tensor = attribute(model, path).detach()
        return tensor if found is None else found.to(tensor.device)

    held = {a.name: a.current() for a in adapters}
    whole = {path: parts for values in held.values() for path, parts in values.saved.items()}
    brought = {path: value for values in held.values() for path, value in values.tensors.items()}
    covered = tuple(f"{path}." for path in whole) or ("\0",)  # a module that is replaced calls nothing below it
    writes = {path: value for path, value in brought.items() if not path.startswith(covered)}
    writes.update({join(path, key): value for path, parts in whole.items() for key, value in parts.items()})
    steps: dict[str, list[SlotValues]] = {}
    subtracted, problems = set(), []
    followers = followers_among(adapters)
    for site in dict.fromkeys(s for values in held.values() for s in values.sites):
        if f"{site}.".startswith(covered) or site in followers:
            continue
        try:
            module, product, weight_path = product_at(model, site)
            bias_path = join(site, product.bias or "")
            weight = product.view(accumulator(writes.get(weight_path, base(weight_path))))
            bias = None if product.bias is None else accumulator(writes.get(bias_path, base(bias_path)))
            own = _Stored(module, weight_view=weight, bias_value=bias)
            each = [
                _lowered(adapter, values.sites[site], site, replace(own, shared=values.shared))
                for adapter in adapters
                if site in (values := held[adapter.name]).sites
            ]
            new, shift = _fold_site(module, product, weight, bias, each)
        except PassError as error:
            problems.append(f"{site}: {error}")
            continue
        if new is not weight:
            if keep == "delta" and weight_path not in writes:
                problems += [f"{site}: {why}" for v in each for why in _no_inverse(v)]
                steps[site] = [_copied(v) for v in each]
                subtracted.add(name_of(weight_path))
            writes[weight_path] = product.view(new)
        if shift is not None and shift is not bias:
            writes[bias_path] = shift
    writes.update(
        {join(n, "weight"): writes[path] for n, at in followers.items() if (path := join(at, "weight")) in writes}
    )
    problems += fold_rows(model, adapters, held, writes, base)
    if problems:
        names = ", ".join(a.name for a in adapters)
        raise AdapterError(f"{names} can't be folded into the weights; nothing was changed.\n{listing(problems)}")
    cast = {path: _like(attribute(model, path), value) for path, value in writes.items()}
    return _Work(settle_shared(model, cast), steps, frozenset(subtracted))


def _lowered(adapter: Adapter, parameters: Mapping[str, Tensor], site: str, base: Base) -> SlotValues:
    plan = adapter.site_plan(site)
    return method_of(adapter.config).lower(plan, parameters, base)


def _fold_site(
    module: nn.Module, product: Product, weight: Tensor, bias: Tensor | None, each: list[SlotValues]
) -> tuple[Tensor, Tensor | None]:
    """New weight and bias of a site; the old ones themselves where nothing changes."""
    reason = product.kind.why_no_delta(module)
    for values in each:
        if reason and values.d.numel():
            raise PassError(f"{reason}, so it is no change of the weight; leave the site out or serve it unfolded")
        weight = fold_weight(product.kind, weight, values)
        if bias is not None and values.g_out is not None:
            bias = bias * values.g_out.to(bias)
        if values.shift is None:
            continue
        if bias is not None:
            bias = bias + values.shift.to(bias)
        elif values.shift.any():
            raise PassError("the adapter adds a bias and the base has none; give the module a bias of zeros first")
    return weight, bias


def _no_inverse(values: SlotValues) -> list[str]:
    zero = [name for name in ("g_in", "g_out") if (g := getattr(values, name)) is not None and not g.all()]
    found = [f"{name} holds zeros, which keep='delta' can't divide by; use keep='original'" for name in zero]
    turned = values.rotation
    if turned is not None and (torch.linalg.cond(torch.eye(turned.shape[1]).to(turned) + turned) > STEEPEST).any():
        found.append("its rotation is far from one, so keep='delta' can't undo it; use keep='original'")
    return found


def _copied(values: SlotValues) -> SlotValues:
    features = {name: value.clone() for name, value in values.features().items()}
    return SlotValues(values.a.clone(), values.b.clone(), values.d.clone(), **features)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return value.detach().to(device=tensor.device, dtype=tensor.dtype)
