"""Serving: static slots at every site, prepared before compiling; adapters then come and go by copies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from torch import nn

from fxpeft.adapters.attach import detach
from fxpeft.adapters.change import changes
from fxpeft.adapters.gathering import check_whole
from fxpeft.adapters.lock import TIMEOUT
from fxpeft.adapters.penalty import unwatch_loss
from fxpeft.adapters.restore import restoring
from fxpeft.adapters.state import Adapter, ensure_state, find_state, is_prepared
from fxpeft.errors import AdapterError
from fxpeft.methods import METHODS, method_of
from fxpeft.methods.alora import Alora
from fxpeft.methods.ln_tuning import LnTuning, LNTuningConfig
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.base import PassError
from fxpeft.passes.slots.kronecker import KRONECKER
from fxpeft.passes.slots.lanes import Lanes
from fxpeft.passes.slots.rotation import BLOCK
from fxpeft.passes.slots.slot import ActiveRank
from fxpeft.passes.targets.terms import Pattern
from fxpeft.passes.torch_private import constants_setting
from fxpeft.serving import prompts as prompts_serving
from fxpeft.serving import tokens as tokens_serving
from fxpeft.serving.base_loads import watch_loads
from fxpeft.serving.binding import bind_slots
from fxpeft.serving.board import Board
from fxpeft.serving.declared import check_lanes, check_parted, check_slots
from fxpeft.serving.guard import ModelLock, drain, guard_forwards
from fxpeft.serving.lowering import lower, side_by_side
from fxpeft.serving.packing import settle
from fxpeft.serving.reach import SlotReach, check_invocations
from fxpeft.serving.swap import Serving, watch_reads
from fxpeft.serving.together import check_gains, check_ranks
from fxpeft.targets.parameters import check_hosts
from fxpeft.targets.saved import saved_modules
from fxpeft.targets.sites import find_sites, make_plan


@changes
def prepare_hotswap(
    model: nn.Module,
    max_rank: int = 128,
    *,
    targets: str | Pattern | Collection[str] | None = None,
    exclude: str | Pattern | Collection[str] | None = None,
    methods: Sequence[str] = ("lora",),
    modules_to_save: Sequence[str] = (),
    bias: Literal["none", "all", "lora_only"] = "none",
    rank: Literal["dynamic", "static"] = "dynamic",
    num_virtual_tokens: int | None = None,
    target_parameters: str | Pattern | Collection[str] | None = None,
    lock_timeout: float = TIMEOUT,
    hold_generate: bool = True,
    lanes: int = 1,
    max_tokens: int | None = None,
    token_modules: Sequence[str] | None = None,
    max_block: int | None = None,
    lokr_factor: int | None = None,
) -> None:
    """Give every target a slot. From then on loading, swapping, mixing and switching off are copies.

    Call it before ``torch.compile``. Adapters that the model has already are kept: their sites get
    slots too, and the active ones stay active. Slots are no parameters and in no ``state_dict``.

    Args:
        max_rank: the most ranks a site can hold; those of all active adapters together count.
        targets: as ``target_modules``, patterns too; the union over all adapters to come. Default: the sites of
            the model's adapters, or ``"all-linear"`` where it has none.
        exclude: as ``exclude_modules``.
        methods: what the slots have to serve: ``"lora"``, ``"lora_bias"`` (a bias of B), ``"dora"``,
            ``"ia3"``, ``"adalora"``, ``"trainable_tokens"`` (of adapters of any method, and alone),
            ``"ln_tuning"`` (of the modules in ``modules_to_save``, or the architecture's norms),
            ``"prompt_tuning"``, ``"p_tuning"``, ``"multitask_prompt_tuning"`` and ``"cpt"``, or
            ``"prefix_tuning"`` and ``"cartridge"``, ``"loha"``, ``"lokr"``, ``"vera"``,
            ``"miss"``, ``"miss_bat"``, ``"vblora"``, ``"delora"``, ``"alora"``, ``"hra"``, ``"oft"``, ``"boft"``,
            ``"beft"``, ``"gralora"``, ``"deft"``, ``"hira"``, ``"c3a"``, ``"fourierft"``, ``"psoft"``, ``"pvera"``,
            ``"tinylora"``, ``"unilora"``, ``"adamss"``, ``"shira"``, ``"supertuning"``,
            ``"randlora"``, ``"road"``, ``"waveft"``, ``"glora"``, ``"osf"``.
            Where only LoRA is declared, the graph holds no gain, shift, rotation or product of two matrices.
        target_parameters: as in :class:`~fxpeft.LoraConfig`, for adapters of experts and other parameters.
        num_virtual_tokens: length of every prompt to come, for the prompt methods.
        modules_to_save, bias: as in :class:`~fxpeft.LoraConfig`, for adapters that bring them.
        rank: ``"dynamic"``: pay for the rank in use; ``"static"``: pay for ``max_rank``, in a
            graph without symbolic sizes.
        lock_timeout: seconds that a swap waits for forwards, or a forward for a swap, before it gives up.
        hold_generate: let a whole ``generate`` hold swaps off, so that all tokens come from one adapter.
        lanes: how many adapters can be in one batch, for :func:`fxpeft.rows` and :func:`fxpeft.tokens`; the ranks of
            all of them together count for ``max_rank``. The model is traced then, to see that each target sees the
            batch's rows. A call without rows runs the graph of one lane.
        max_tokens: for ``"trainable_tokens"``: how many an adapter can have; 64 by default.
        token_modules: names of the embeddings and heads that have them; the input embeddings by default, and what has
            one weight with these.
        max_block: for ``"oft"`` and ``"boft"``: how many inputs are rotated together at most; 32 by default, or what
            the model's adapters have. A site holds blocks of that size, or of the nearest that divides its inputs, and
            smaller ones whose size divides theirs.
        lokr_factor: for ``"lokr"``: the ``decompose_factor`` of adapters whose two matrices go into a place of their
            own, at no ranks; what the model's adapters have by default, or -1. All others go into ranks; with 0, with
            lanes, and where tensor parallelism has parted modules, each does.

    Raises:
        AdapterError: unknown targets or methods, or an adapter that doesn't fit; nothing was changed.
        LockTimeout: a forward of another thread went on for longer than ``lock_timeout``; nothing was changed.
    """
    model = unwrap(model)
    needs = check_slots(methods, max_rank, rank)
    if isinstance(lanes, bool) or not isinstance(lanes, int) or lanes < 1:
        raise AdapterError(f"lanes: expected how many adapters one batch may have, at least 1, found {lanes!r}")
    if (setting := constants_setting()) is not None:
        raise AdapterError(f"{setting} folds slots into constants, so swaps would have no effect")
    existing = find_state(model)
    if is_prepared(model):
        raise AdapterError("the model is prepared already; call release_hotswap first to prepare it differently")
    adapters = list(existing.adapters.values()) if existing is not None else []
    for adapter in adapters:
        check_whole(adapter)
    serving = Serving(
        max_rank, ActiveRank(max_rank) if rank == "dynamic" else None, tuple(methods),
        *_declare(model, adapters, targets, exclude, modules_to_save, bias, methods, target_parameters),
        lock=ModelLock(lock_timeout, hold_generate, lanes > 1),
    )  # fmt: skip
    cut = check_parted(model, serving.hosts(), methods, lanes)
    serving.factor = _factor(needs, adapters, lokr_factor, alike=lanes == 1 and not cut)
    serving.block = _block(serving, adapters, max_block)
    if Alora.name in methods:
        serving.reach = SlotReach(serving)
    if lanes > 1:
        serving.board = Board(Lanes(lanes, max_rank, rank == "dynamic"), reach=serving.reach)
    prompts = prompts_serving.declare(model, methods, num_virtual_tokens, adapters)
    if serving.reach is not None and prompts is not None and not prompts[1].prefix:
        raise AdapterError(
            f"methods: {Alora.name!r} beside a prompt of embeddings, whose tokens lie before those that invocations "
            "are looked for in: prepare one model for each, or declare 'prefix_tuning'"
        )
    own_lanes = None if serving.board is None else serving.board.lanes
    if prompts is not None:
        serving.prompts = prompts_serving.PromptSlot.of(model, *prompts, own_lanes)
    serving.token_slots.update(tokens_serving.declare(model, methods, max_tokens, token_modules, adapters, own_lanes))
    if serving.board is not None:
        rowed = {**serving.kinds, **{name: slot.kind for name, slot in serving.token_slots.items()}}
        serving.board.for_all = check_lanes(model, rowed, sorted(serving.saved))
        serving.board.token_slots, serving.board.prompts = serving.token_slots, serving.prompts
    if both := sorted(serving.token_slots.keys() & serving.saved):
        raise AdapterError(f"{', '.join(both)}: declared for tokens and in modules_to_save; declare one of the two")
    # everything that can be refused is refused on copies, before the model is touched
    trial = [lower(model, serving, Adapter(a.name, a.plan, a.current(), a.strength)) for a in adapters]
    active = existing.active if existing is not None else []
    together = side_by_side(model, serving, [a for a in trial if a.name in active])
    check_ranks(together, max_rank)
    check_gains(together)
    check_invocations(together)
    tokens_serving.check_alone(together)
    if serving.board is not None:
        serving.board.check(together, max_rank)

    with serving.lock.write():  # nobody else has it; from here on they wait at it
        try:
            with restoring(model, adapters):
                guard_forwards(model, serving.lock, serving.locked())
                drain(model, serving.lock, serving.locked())
                _enter_slots(model, serving, adapters)
        except PassError as error:
            raise AdapterError(str(error)) from None


def _block(serving: Serving, adapters: list[Adapter], wanted: int | None) -> int:
    if wanted is None:
        return max([BLOCK, *(plan.block for adapter in adapters for plan in adapter.plan.sites.values())])
    if "rotation" not in serving.features:
        raise AdapterError("max_block: only with 'oft' or 'boft' among the methods")
    if isinstance(wanted, bool) or wanted < 2:
        raise AdapterError(f"max_block: expected how many inputs are rotated together, at least 2, found {wanted!r}")
    return wanted


def _factor(needs: frozenset[str], adapters: list[Adapter], wanted: int | None, *, alike: bool) -> int:
    """By which inputs and outputs are taken apart; 0: no place for products.

    Args:
        alike: every row of a call computes with the whole of every slot.
    """
    if wanted is None:
        own = (plan.factor for adapter in adapters for plan in adapter.plan.sites.values() if plan.factor)
        return next(own, -1) if needs & KRONECKER and alike else 0
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < -1:
        raise AdapterError(f"lokr_factor: expected -1, 0 or a decompose_factor, found {wanted!r}")
    if wanted and not needs & KRONECKER:
        raise AdapterError("lokr_factor: only with 'lokr' among the methods")
    if wanted and not alike:
        raise AdapterError(
            f"lokr_factor={wanted}: with lanes, and where tensor parallelism has parted modules, a LoKr goes into "
            "ranks; leave it out"
        )
    return wanted


def _enter_slots(model: nn.Module, serving: Serving, adapters: list[Adapter]) -> None:
    """From the adapters' own parameters to slots."""
    state = ensure_state(model)
    for adapter in adapters:
        detach(model, adapter)
    bind_slots(model, serving)
    watch_loads(model)
    state.serving = serving
    watch_reads(serving)
    for adapter in adapters:
        settle(lower(model, serving, adapter), serving.slots)
    serving.activate(model, state, state.running())
    unwatch_loss(model)


def _declare(
    model: nn.Module,
    adapters: list[Adapter],
    targets: str | Pattern | Collection[str] | None,
    exclude: str | Pattern | Collection[str] | None,
    modules_to_save: Sequence[str],
    bias: Literal["none", "all", "lora_only"],
    methods: Sequence[str],
    parameters: str | Pattern | Collection[str] | None,
) -> tuple[dict[str, Any], frozenset[str], frozenset[str]]:
    """Sites, modules and parameters of the adapters that are there and of those that were declared."""
    kinds = {s: p.kind for a in adapters if not method_of(a.config).unlowered for s, p in a.plan.sites.items()}
    saved = {path for a in adapters for path in a.values.saved}
    tensors = {path for a in adapters for path in a.values.tensors}
    if LnTuning.name in methods and not modules_to_save:
        saved.update(make_plan(model, LNTuningConfig(), heads=False).saved)
    if targets is None and not parameters and {m.name for m in METHODS if not m.targeted} >= set(methods):
        if bias != "none":
            raise AdapterError(f"bias: expected 'none' with {', '.join(methods)}, which bring none; found {bias!r}")
        saved.update(saved_modules(model, modules_to_save))
        return kinds, frozenset(saved), frozenset(tensors)
    if targets is None and not kinds:
        targets = "all-linear"
    if targets is not None or modules_to_save or bias != "none" or parameters:
        declared = find_sites(
            model, [s for s, kind in kinds.items() if not kind.leaf] if targets is None else targets, exclude=exclude,
            parameters=parameters, modules_to_save=modules_to_save, bias=bias,
        )  # fmt: skip
        kinds.update(declared.kinds)
        saved.update(declared.saved)
        tensors.update(declared.tensors)
    check_hosts(kinds, saved, tensors)
    return kinds, frozenset(saved), frozenset(tensors)
