"""What goes to each site of a captured program: an adapter's subgraph with its values, or an empty slot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxpeft import checkpoint
from fxpeft.adapters.values import fresh_values, placed
from fxpeft.checkpoint.layouts import in_layout_of
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.alora import Alora
from fxpeft.methods.base import SharedPart, SiteAdapter, SitePlan
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.skeleton import skeleton
from fxpeft.passes.meta import TARGET
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.kronecker import KRONECKER
from fxpeft.passes.slots.slot import Slot
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.match import Target
from fxpeft.passes.targets.operations.batched import Batched
from fxpeft.passes.targets.operations.parameter import ParameterKind
from fxpeft.passes.targets.patterns import from_peft
from fxpeft.passes.targets.terms import Pattern, Subject
from fxpeft.programs.sites import Found
from fxpeft.serving.declared import check_slots
from fxpeft.targets.sites import AdapterPlan, find_sites, make_plan

Rewrites = dict[str, list[Rewrite]]
Names = str | Pattern | Collection[str] | None
Redirects = dict[str, dict[str, tuple[str, Any]]]


@dataclass(frozen=True)
class Slots:
    """Empty slots for :func:`rewrite`, in the place of an adapter.

    Args:
        targets: names or ends of names, or one regular expression, as ``target_modules``.
        parameters: the same as ``target_parameters``: stacks of matrices, one for each expert. Their A,
            ``[max_rank, experts, in]``, is at the product's input.
        max_rank, methods: as in :func:`fxpeft.prepare_hotswap`.
        rank: ``"static"``, or ``"dynamic"``: an exported program then takes a tensor ``active_rank`` more, whose
            size is the rank in use.
    """

    targets: str | Collection[str]
    max_rank: int = 128
    methods: Sequence[str] = ("lora",)
    rank: Literal["static", "dynamic"] = "static"
    parameters: str | Collection[str] | None = None

    def features(self) -> frozenset[str]:
        """The features that the methods need; a Kronecker product goes into ranks."""
        return check_slots(self.methods, self.max_rank, self.rank, at_targets=True) - KRONECKER


def rewrites_of(
    adapter: AdapterConfig | AdapterPlan | Slots | str | Path,
    matched: tuple[dict[str, list[Found]], list[str]],
    *,
    name: str,
    state_dict: Mapping[str, Tensor] | None,
    training: bool,
    check_finite: bool,
    exported: bool,
    closed: Mapping[str, str],
    reach: Callable[[], Tensor],
) -> tuple[Rewrites, Redirects, Tensor | None, int]:
    """Site -> its rewrites, redirected biases, and of slots the carrier of the rank and its largest size.

    Args:
        reach: gives what says which tokens of the program's input are acted on, where an adapter has an invocation.
    """
    found, skipped = matched
    outlines = {site: nodes[0].outline for site, nodes in found.items() if site}
    model = skeleton(outlines)
    if isinstance(adapter, Slots):
        return _slots(adapter, model, found, skipped, exported, closed, reach)
    values, read = None, None
    if isinstance(adapter, str | Path):
        read = in_layout_of(model, checkpoint.read(adapter))
        plan = _plan(model, read.config, skipped, closed, loading=True)
    else:
        plan = adapter if isinstance(adapter, AdapterPlan) else _plan(model, adapter, skipped, closed)
        _refuse_closed(plan.config.target_modules, plan.config.exclude_modules, plan.sites, closed)
        if state_dict is not None:
            read = in_layout_of(model, checkpoint.Checkpoint("the state_dict", plan.config, dict(state_dict)))
    if isinstance(adapter, AdapterPlan):
        layouts = {s: own.kind.transposed for s, own in plan.sites.items() if isinstance(own.kind, ParameterKind)}
    else:
        layouts = _layouts(plan, found, {} if read is None else read.tensors, exported)
    _lay_out(found, layouts)
    in_program = replace(plan, sites=_in_program(plan.sites, found))
    _check_plan(plan if isinstance(adapter, AdapterPlan) else in_program, found, skipped)
    plan = in_program
    if read is not None:
        values = checkpoint.assign(model, plan, read, check_finite=check_finite)
    values = fresh_values(model, plan, autocast=True) if values is None else placed(model, values, autocast=True)
    method = method_of(plan.config)
    if set(values.tensors) - {f"{site}.bias" for site in plan.sites}:
        raise AdapterError(
            f"the adapter brings base parameters of its own, and a program has no second copy of them:\n"
            f"{listing(values.tensors)}\nrewrite the live model with load_adapter, then capture it"
        )
    rewrites: Rewrites = {}
    redirects: Redirects = {}
    shared = SharedPart(values.shared, method.shared_trained(plan.config)).requires_grad_(
        not plan.config.inference_mode
    )
    frozen = {*method.frozen(plan.config), *method.untrained(plan.config)}
    invoked = reach() if method.invocation(plan.config) else None
    for site, own in plan.sites.items():
        dropout = method.dropout(plan.config, own.kind) if training else 0.0
        part = SiteAdapter(own, values.sites[site], dropout=dropout, frozen=frozen)
        part.share(shared)
        if invoked is not None:
            part.reach = invoked
        for parameter in part.parameters():
            parameter.requires_grad_(not plan.config.inference_mode)
        if training and dropout and exported:
            part.dropout.train()
        rewrite = method.rewrite(name, plan.config, part)
        assert isinstance(rewrite, Rewrite)  # prompts, which feed a whole model, were refused
        rewrites[site] = [rewrite]
    for path, tensor in values.tensors.items():
        site, _, leaf = path.rpartition(".")
        redirects[site] = {leaf: (f"{name}.{leaf}", nn.Parameter(tensor))}
    return rewrites, redirects, None, 0


def _plan(
    model: nn.Module, config: AdapterConfig, skipped: list[str], closed: Mapping[str, str], *, loading: bool = False
) -> AdapterPlan:
    if (method := method_of(config)).feeds:
        raise AdapterError(
            f"{method.name} prepares the inputs of a model's forward, and a program has none: add the adapter to the "
            "live model, then capture it"
        )
    if method.ordered:
        raise AdapterError(
            f"{method.name}: what a site has follows from its place in the model, and this is a program: add the "
            "adapter to the live model, then capture it; or pass fxpeft.targets.sites.make_plan(model, config)"
        )
    if getattr(config, "trainable_token_indices", None) or not method.targeted:
        raise AdapterError(
            f"{'trainable_token_indices' if method.targeted else method.name}: a program has no place for what an "
            "adapter brings beside its sites: add the adapter to the live model, then capture it"
        )
    _refuse_unnamed(config.target_modules)
    _refuse_closed(config.target_modules, config.exclude_modules, (), closed)
    if config.modules_to_save or getattr(config, "bias", "none") == "all":
        raise AdapterError(
            "modules_to_save and bias='all' need the live model: add the adapter to it, then capture the program"
        )
    with _telling_of(skipped):
        return make_plan(model, config, heads=False, of_file=loading)


@contextmanager
def _telling_of(skipped: list[str]) -> Iterator[None]:
    """Let an error in the block name the targets that can't be rewritten too."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{error}{_left(skipped)}") from None


def _left(skipped: list[str]) -> str:
    return f"\ntargets that can't be rewritten:\n{listing(skipped)}" if skipped else ""


def _refuse_unnamed(targets: Names) -> None:
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        raise AdapterError(
            f"target_modules={targets!r}: what that means is read off a model, and this is a program; name the "
            "modules, or make the plan with the model: fxpeft.targets.sites.make_plan(model, config)"
        )


def _refuse_closed(targets: Names, exclude: Names, sites: Collection[str], closed: Mapping[str, str]) -> None:
    """Refuse targets that are, or are in one of their uses, where a rewrite can't reach."""
    wanted, unwanted = from_peft(targets or ()), from_peft(exclude or ())
    subjects = [Subject(site) for site in closed]
    lost = [s.name for s in subjects if s.name in sites or (wanted(s) and not unwanted(s))]
    if lost:
        lines = listing(f"{site}: {closed[site]}" for site in lost)
        raise AdapterError(
            f"the adapter would be missing there; nothing was changed.\n{lines}\nexclude them, or add the "
            "adapter to the live model, then capture it"
        )


def _check_plan(plan: AdapterPlan, found: Mapping[str, list[Found]], skipped: list[str]) -> None:
    """A plan may come from a model: each of its sites has to be in the program, as the same kind."""
    if plan.tokens:
        raise AdapterError(
            f"trainable_token_indices: a program has no place for rows of an embedding:\n{listing(plan.tokens)}\nadd "
            "the adapter to the live model, then capture it"
        )
    if plan.saved:
        raise AdapterError(f"modules_to_save: a program has no modules to copy:\n{listing(plan.saved)}")
    problems = []
    for site, own in plan.sites.items():
        nodes = found.get(site, [])
        if not nodes:
            problems.append(f"{site}: expected a {own.kind.name} in the program, found none")
        for each in nodes:
            kind = each.target.kind
            if _form(kind) != _form(own.kind):
                problems.append(f"{site}: expected {own.kind}, found {kind}")
    if problems:
        text = f"the plan doesn't fit the program; nothing was changed.\n{listing(problems)}"
        raise AdapterError(f"{text}{_left(skipped)}")


def _layouts(
    plan: AdapterPlan, found: Mapping[str, list[Found]], tensors: Mapping[str, Tensor], exported: bool
) -> dict[str, bool]:
    """Stack -> whether its module says that it is stored ``[experts, in, out]``, by where A's tensor fits.

    Raises:
        AdapterError: the tensors can't tell that, or which of a module's stacks they are for.
    """
    method = method_of(plan.config)
    layouts: dict[str, bool] = {}
    first: dict[str, str] = {}
    for site, own in plan.sites.items():
        kind = found[site][0].target.kind if site in found else None
        if not isinstance(kind, Batched):
            continue
        layouts[site] = kind.transposed
        if not tensors:
            continue
        key = method.key(site, own, "lora_A").removeprefix(method.prefix)
        a = next((tensor for name, tensor in tensors.items() if f".{name}".endswith(f".{key}")), None)
        other = first.setdefault(kind.host(site), site)
        why = None
        if other != site and not exported:
            why = f"and {other}: a graph module does not tell in which order their module has them"
        elif not kind.last and kind.in_features == kind.out_features:
            why = "is square, and the program does not tell whether its module says is_transposed"
        elif not kind.last and a is not None and a.shape[-1:] == (kind.out_features,):
            layouts[site] = False
        if why is not None:
            raise AdapterError(
                f"{site} {why}, by which PEFT's file is laid out; make the plan with the model, "
                "fxpeft.targets.sites.make_plan(model, config), and give the tensors as state_dict"
            )
    return layouts


def _lay_out(found: Mapping[str, list[Found]], layouts: Mapping[str, bool]) -> None:
    """Let every product with a stack have its A where PEFT has it."""
    for site, transposed in layouts.items():
        for each in found.get(site, ()):
            kind = each.target.kind
            if isinstance(kind, Batched):
                TARGET.set(each.node, Target(site, kind.laid_out(transposed), each.target.input))


def _in_program(sites: Mapping[str, SitePlan], found: Mapping[str, list[Found]]) -> dict[str, SitePlan]:
    """Sites with the kinds that the program has: it multiplies with a parameter that a live module is given anew."""
    return {
        site: replace(own, kind=found[site][0].target.kind) if own.kind.is_parameter and site in found else own
        for site, own in sites.items()
    }


def _form(kind: Kind) -> tuple[Any, ...]:
    # an export writes strides as lists, and it pads by itself where a module has a padding_mode
    return kind.name, kind.a_shape(1), kind.out_features


def _slots(
    slots: Slots,
    model: nn.Module,
    found: Mapping[str, list[Found]],
    skipped: list[str],
    exported: bool,
    closed: Mapping[str, str],
    reach: Callable[[], Tensor],
) -> tuple[Rewrites, Redirects, Tensor | None, int]:
    features = slots.features()
    _refuse_unnamed(slots.targets)
    _refuse_closed(slots.targets, (), (), closed)
    with _telling_of(skipped):
        sites = find_sites(model, slots.targets, parameters=slots.parameters).kinds
    carrier = torch.zeros(min(slots.max_rank, 4), dtype=torch.uint8) if slots.rank == "dynamic" else None
    if carrier is not None and not exported:
        raise AdapterError("rank='dynamic': a GraphModule has no inputs to hide; use rank='static', or export")
    rewrites: Rewrites = {}
    invoked = reach() if Alora.name in slots.methods else None
    for site in sites:
        outline, kind = found[site][0].outline, found[site][0].target.kind
        assert outline.weight is not None
        own = () if kind.is_parameter else features
        slot = Slot(kind, slots.max_rank, None, features=own, device=outline.weight.device, dtype=outline.weight.dtype)
        rewrites[site] = [slot.rewrite(carrier, invoked if kind.is_linear else None)]
    return rewrites, {}, carrier, slots.max_rank
