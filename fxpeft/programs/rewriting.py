"""Whole programs: the same rewrite on what ``torch.export`` or ``torch.fx`` captured, without a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fxpeft.adapters.change import ordinary
from fxpeft.adapters.name import check_adapter_name
from fxpeft.errors import AdapterError, listing
from fxpeft.methods.config import AdapterConfig, matching
from fxpeft.passes.base import PassError
from fxpeft.passes.captured.dynamo import annotate_sources, name_operands
from fxpeft.passes.captured.form import FormPass
from fxpeft.passes.meta import INPUTS, ORIGIN
from fxpeft.passes.pipeline import Pipeline
from fxpeft.passes.rewrite.eject import EjectPass
from fxpeft.passes.rewrite.inject import InjectPass
from fxpeft.passes.rewrite.lift import drop_unused, hand_in, lift_bodies
from fxpeft.passes.rewrite.redirect import RedirectPass
from fxpeft.passes.rewrite.subgraphs import annotate_bodies, copy_graph_module, own_bodies, share_bodies, walk
from fxpeft.passes.source import check_all_names, check_path
from fxpeft.passes.targets.names import Selection
from fxpeft.passes.targets.reading import read_path
from fxpeft.programs.exported import KEYWORDS, close_program, eject_program, lower_to_aten, open_program, tensors_of
from fxpeft.programs.reach import ReachInput
from fxpeft.programs.rewrites import Redirects, Rewrites, Slots, rewrites_of
from fxpeft.programs.sites import Attributes, Found, closed_sites, match_sites, read_otherwise, unread_stacks
from fxpeft.targets.sites import AdapterPlan

P = TypeVar("P", bound=ExportedProgram | GraphModule)


@ordinary()
def rewrite(
    program: P,
    adapter: AdapterConfig | AdapterPlan | Slots | str | Path,
    *,
    name: str = "default",
    state_dict: Mapping[str, Tensor] | None = None,
    adapters: Literal["attributes", "inputs"] = "attributes",
    training: bool = False,
    check_finite: bool = False,
    dump: Path | str | None = None,
) -> P:
    """Put an adapter, or slots for adapters to come, into a captured program.

    The program that is given stays as it is; the result is another one of the same sort, whose base
    parameters are the same tensors. The bodies of higher-order operators (checkpoint, cond, map,
    scan, while_loop, flex_attention, invoke_subgraph) are entered.

    Args:
        program: an ``ExportedProgram`` in training or inference IR, with static or dynamic shapes,
            or a ``GraphModule`` from ``symbolic_trace``, ``ExportedProgram.module()`` or Dynamo.
        adapter: a config for a fresh adapter; a plan (:func:`fxpeft.targets.sites.make_plan`) made with the
            live model; a folder in PEFT's format; or :class:`Slots`.
        name: operands are named ``adapters.<site>.<name>.<operand>``; slots ``slot.<site>.<operand>``.
        state_dict: the adapter's tensors under PEFT's keys, for a config or plan.
        adapters: ``"attributes"``: parameters are parameters, scales and slots are buffers that no
            ``state_dict`` holds. ``"inputs"``: each call brings ``adapters={name: tensor}``, in an exported
            program and in a plain ``GraphModule``; :func:`adapter_inputs` gives the first ones.
        training: let dropout take part in an exported program, which is in one mode for good.
        check_finite: refuse NaN and infinity in tensors from outside.
        dump: folder for the graphs before and after each pass.

    Raises:
        AdapterError: no target was found, one is in a body that can't be entered, the adapter doesn't fit, or another
            one is there; the targets that were left out are named with the reason.
    """
    if adapters not in ("attributes", "inputs"):
        raise AdapterError(f"adapters: expected 'attributes' or 'inputs', found {adapters!r}")
    check_adapter_name(name)
    made: Any = _rewrite(
        program, adapter, name=name, state_dict=state_dict, adapters=adapters, training=training,
        check_finite=check_finite, dump=dump,
    )  # fmt: skip
    return made  # type: ignore[no-any-return]


def _rewrite(
    program: ExportedProgram | GraphModule,
    adapter: Any,
    *,
    name: str,
    state_dict: Mapping[str, Tensor] | None,
    adapters: str,
    training: bool,
    check_finite: bool,
    dump: Path | str | None,
) -> ExportedProgram | GraphModule:
    tensors: Any
    exported = isinstance(program, ExportedProgram)
    graph_module, tensors = _open(program)
    own_bodies(graph_module)
    annotate_bodies(graph_module)
    matched, closed = match_sites(graph_module, tensors), closed_sites(graph_module)
    found = matched[0], [*matched[1], *unread_stacks(graph_module, matched[0])]
    reach = ReachInput(program, graph_module)
    try:
        rewrites, redirects, carrier, limit = rewrites_of(
            adapter, found, name=name, state_dict=state_dict, training=training or not exported,
            check_finite=check_finite, exported=exported, closed=closed, reach=reach.tensor,
        )  # fmt: skip
        reach.check(found[0], rewrites)
        _refuse_partial(read_otherwise(graph_module, rewrites))
        if not _is_new(found, rewrites):
            return program
        taken = set(KEYWORDS) & set(_keywords(program)) if isinstance(program, ExportedProgram) else set()
        if (adapters == "inputs" and taken) or (reach.made is not None and "adapter_reach" in taken):
            raise AdapterError("the program takes an adapter as input already; eject it first")
        redirected = set()
        for _, each in walk(graph_module):
            redirected |= _inject(each, rewrites, redirects, dump if each is graph_module else None)
        unread = [f"{site}.{leaf}" for site, r in redirects.items() for leaf in r if f"{site}.{leaf}" not in redirected]
        if unread:
            raise AdapterError(
                f"the program doesn't read these on their own, so an adapter can't bring its own:\n{listing(unread)}\n"
                "use bias='none', or capture the program with torch.export"
            )
        if isinstance(program, ExportedProgram):
            carriers = [] if carrier is None else [carrier]
            lower_to_aten(program, graph_module, carriers, limit, reach.sized())
            share_bodies(graph_module)
            held = [t for site in rewrites.values() for r in site for t in r.operands.values()]
            held += [t for site in redirects.values() for _, t in site.values()]
            inputs = [t for t in held if isinstance(t, Tensor) and t is not carrier and t is not reach.made]
            as_inputs = {"adapters": inputs if adapters == "inputs" else [], "active_rank": carriers}
            as_inputs["adapter_reach"] = [] if reach.made is None else [reach.made]
            return close_program(program, graph_module, as_inputs=as_inputs, max_rank=limit)
        lift_bodies(graph_module)
        share_bodies(graph_module)
        if adapters == "inputs":
            hand_in(graph_module)
        name_operands(graph_module)
    except PassError as error:
        raise AdapterError(str(error)) from None
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _open(program: ExportedProgram | GraphModule) -> tuple[GraphModule, Any]:
    """A copy of the graph that can be changed, and its tensors by dotted name.

    Raises:
        AdapterError: a name in it would become code.
    """
    try:
        if isinstance(program, ExportedProgram):
            for spec in (*program.graph_signature.input_specs, *program.graph_signature.output_specs):
                check_path(spec.target or "")
            check_all_names(program.graph_module)
        else:
            check_all_names(program)
    except PassError as error:
        raise AdapterError(f"the program can't be rewritten: {error}") from None
    if isinstance(program, ExportedProgram):
        return open_program(program), tensors_of(program)
    graph_module = copy_graph_module(program)
    return graph_module, Attributes(graph_module, annotate_sources(graph_module))


@ordinary()
@matching()
def eject(program: P, targets: str | Collection[str] | None = None) -> P:
    """The inverse of :func:`rewrite`: the graph is exactly what it was, node for node.

    Args:
        targets: only these sites: names or ends of names, or one regular expression.

    Raises:
        AdapterError: there is nothing to take out.
    """
    graph_module, _ = _open(program)
    named = None if targets is None else Selection(targets, "targets")
    ejecting = EjectPass(lambda site: named is None or named(site))
    ejected: list[str] = []
    for _, each in walk(graph_module):
        pipeline = Pipeline([ejecting])
        pipeline(each)
        ejected += pipeline.reports[0].matched
    if not ejected:
        raise AdapterError("eject: no adapter is in the program" + (f" at {targets!r}" if targets else ""))
    unused = drop_unused(graph_module)
    share_bodies(graph_module)
    made: Any = graph_module
    if isinstance(program, ExportedProgram):
        made = eject_program(program, graph_module)
    else:
        for node in unused:
            graph_module.graph.erase_node(node)
        graph_module.graph.lint()
        graph_module.recompile()
    return made  # type: ignore[no-any-return]


def adapter_inputs(program: ExportedProgram | GraphModule) -> dict[str, Tensor]:
    """What a program that was rewritten with ``adapters="inputs"`` takes as ``adapters``: the first values."""
    found = _keywords(program).get("adapters") if isinstance(program, ExportedProgram) else INPUTS.get(program)
    if not found:
        raise AdapterError('the program takes no adapters as input: rewrite it with adapters="inputs"')
    return dict(found)


def _refuse_partial(lost: Mapping[str, str]) -> None:
    if lost:
        lines = listing(f"{site}: {why}" for site, why in lost.items())
        raise AdapterError(f"the adapter would be missing there; nothing was changed.\n{lines}\nleave them out")


def _is_new(matched: tuple[dict[str, list[Found]], list[str]], rewrites: Rewrites) -> bool:
    """Whether there is something to do; ``False``: this very adapter is there already.

    Raises:
        AdapterError: some of the sites hold another one.
    """
    there, clashes = 0, []
    for site, wanted in rewrites.items():
        for each in matched[0][site]:
            origin = ORIGIN.get(each.node)
            if origin is not None:
                there += 1
                if origin.rewrites != tuple(r.name for r in wanted):
                    clashes.append(f"{site}: {', '.join(origin.rewrites)}")
    if clashes:
        raise AdapterError(f"other adapters are in the program already:\n{listing(clashes)}\neject them first")
    total = sum(len(matched[0][site]) for site in rewrites)
    if 0 < there < total:
        raise AdapterError(f"the adapter is at {there} of its {total} sites already; eject it first")
    return there == 0


def _inject(graph_module: GraphModule, rewrites: Rewrites, redirects: Redirects, dump: Path | str | None) -> set[str]:
    reads = {read_path(n) for n in graph_module.graph.nodes}
    here = {s: r for s, r in redirects.items() if any(f"{s}.{leaf}" in reads for leaf in r)}
    pipeline = Pipeline([RedirectPass(here), InjectPass(rewrites), FormPass()], dump=dump)
    pipeline(graph_module)
    return set(pipeline.reports[0].matched)


def _keywords(program: ExportedProgram) -> dict[str, Any]:
    return program.example_inputs[1] if program.example_inputs is not None else {}
