"""A ``torch.export`` program taken apart and put together again around a changed graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from fxpeft.passes.base import PassError
from fxpeft.passes.captured.aten import AtenPass
from fxpeft.passes.meta import LIFTED, READS
from fxpeft.passes.pipeline import Pipeline
from fxpeft.passes.rewrite.lift import LiftPass, drop_unused, last_placeholder, lift_bodies
from fxpeft.passes.rewrite.subgraphs import copy_graph_module, walk
from fxpeft.passes.slots.slot import CARRIER, LEAST, REACH
from fxpeft.passes.torch_private import ValueRanges, fake_mode_of, pytree

USER = InputKind.USER_INPUT
#: what a rewritten program may take beside what it took: where the operands of the last two are, by the ends of paths
KEYWORDS = {"adapters": "", "adapter_reach": REACH, "active_rank": CARRIER}
_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass
class Lifted:
    """What the rewritten graph reads beside what the program read before.

    Args:
        attributes: path -> parameter or buffer; both become the program's own.
        inputs: keyword argument -> a tensor, or tensors by name, that every call has to bring.
    """

    attributes: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


def open_program(program: ExportedProgram) -> GraphModule:
    """A copy of the program's graph whose placeholders know which parameters they carry."""
    graph_module = copy_graph_module(program.graph_module)
    targets = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.kind in _KINDS}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and targets.get(node.name) is not None:
            READS.set(node, targets[node.name])
    return graph_module


def tensors_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Every parameter, buffer and constant by its dotted name."""
    constants = {k: v for k, v in program.constants.items() if isinstance(v, Tensor)}
    return {**constants, **program.state_dict}


def lower_to_aten(
    program: ExportedProgram,
    graph_module: GraphModule,
    carriers: Collection[Tensor],
    max_rank: int,
    sized: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Turn an adapter's nodes into what the program's own nodes are, in all its graphs.

    Args:
        carriers: operands of any size up to ``max_rank``. sized: operands of the sizes of a value of the program's.
    """
    mode = fake_mode_of(n.meta["val"] for n in graph_module.graph.nodes if "val" in n.meta)
    if mode is None:
        raise PassError("the program's graph has no values (meta['val']), so it can't be rewritten; export it anew")
    training = program.dialect == "TRAINING"
    decompositions: Any = None if training else torch.export.default_decompositions()
    aten = AtenPass(mode, decompositions, symbolic=carriers, max_size=max_rank, sized=sized)
    with mode:
        for _, each in walk(graph_module):
            Pipeline([aten])(each)
    lift_bodies(graph_module)


def close_program(
    program: ExportedProgram,
    graph_module: GraphModule,
    *,
    as_inputs: Mapping[str, Collection[Tensor]],
    max_rank: int = 0,
) -> ExportedProgram:
    """The program with ``graph_module`` in the place of its graph.

    Args:
        as_inputs: keyword argument -> the operands that are handed in with it; the others become parameters and
            non-persistent buffers.
        max_rank: the largest size of a symbolic operand.
    """
    keyword = {id(tensor): name for name, tensors in as_inputs.items() for tensor in tensors}
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    places = _Places(graph_module, specs, keyword)
    lift = LiftPass(places.before, placed=places.note)
    Pipeline([lift])(graph_module)
    for end in (REACH, CARRIER):
        for node in [n for n in graph_module.graph.nodes if (LIFTED.get(n) or "").endswith(end)]:
            last = last_placeholder(graph_module)
            if last is not None and last is not node:
                last.append(node)  # keyword arguments are flattened in this order
    lifted = Lifted()
    for name, (path, tensor) in lift.lifted.items():
        key = keyword.get(id(tensor))
        spec = InputSpec(InputKind.USER_INPUT, TensorArgument(name), None)
        if key is None:
            kind = InputKind.PARAMETER if isinstance(tensor, nn.Parameter) else InputKind.BUFFER
            spec = InputSpec(kind, TensorArgument(name), path, None if kind is InputKind.PARAMETER else False)
            lifted.attributes[path] = tensor
        elif key == "adapters":
            lifted.inputs.setdefault(key, {})[path.partition(".")[2]] = tensor
        else:
            lifted.inputs[key] = tensor
        specs[name] = spec
    lifted.inputs = {key: lifted.inputs[key] for key in KEYWORDS if key in lifted.inputs}
    return _assemble(program, graph_module, specs, lifted, max_rank)


class _Places:
    """Where new placeholders go: a parameter after the last one, a buffer after the last of both, an input last.

    Args:
        specs: of the placeholders that are there. inputs: the ids of the tensors that are handed in.
    """

    def __init__(self, graph_module: GraphModule, specs: Mapping[str, InputSpec], inputs: Collection[int]) -> None:
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        parameters = [n for n in placeholders if specs[n.name].kind == InputKind.PARAMETER]
        held = [n for n in placeholders if specs[n.name].kind in (InputKind.PARAMETER, InputKind.BUFFER)]
        self.first = placeholders[0] if placeholders else None
        self.parameter = parameters[-1] if parameters else None
        self.held = held[-1] if held else None
        self.inputs = inputs

    def before(self, graph_module: GraphModule, tensor: Tensor) -> Node | None:
        """The placeholder that a tensor's follows."""
        if id(tensor) in self.inputs:
            return None
        return self._anchor(tensor)

    def _anchor(self, tensor: Tensor) -> Node | None:
        return (self.parameter if isinstance(tensor, nn.Parameter) else self.held) or self.first

    def note(self, node: Node, tensor: Tensor) -> None:
        """A tensor's placeholder is there."""
        self.first = self.first or node
        if id(tensor) in self.inputs:
            return
        if self.held in (None, self._anchor(tensor)):
            self.held = node
        if isinstance(tensor, nn.Parameter):
            self.parameter = node


def eject_program(program: ExportedProgram, graph_module: GraphModule) -> ExportedProgram:
    """The program around a graph that adapters were taken out of."""
    sizes = []
    for node in drop_unused(graph_module):
        sizes += [size.node.expr for size in node.meta["val"].shape if isinstance(size, torch.SymInt)]
        graph_module.graph.erase_node(node)
    graph_module.graph.lint()
    graph_module.recompile()
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    values = [n.meta.get("val") for n in graph_module.graph.nodes if n.op == "placeholder"]
    shapes: list[Any] = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    kept = {size.node.expr for size in shapes if isinstance(size, torch.SymInt)}
    return _assemble(program, graph_module, specs, Lifted(), 0, [size for size in sizes if size not in kept])


def _assemble(
    program: ExportedProgram,
    graph_module: GraphModule,
    specs: Mapping[str, InputSpec],
    lifted: Lifted,
    max_rank: int,
    gone: Collection[Any] = (),
) -> ExportedProgram:
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    signature = copy.deepcopy(program.graph_signature)
    signature.input_specs = [specs[n.name] for n in placeholders]
    (output,) = (n for n in graph_module.graph.nodes if n.op == "output")
    for spec, value in zip(signature.output_specs, output.args[0], strict=True):
        if isinstance(value, Node) and hasattr(spec.arg, "name"):
            spec.arg.name = value.name
    paths = {s.target for s in signature.input_specs}
    dropped = {s.target for s in program.graph_signature.input_specs} - paths
    parameters = {k: v for k, v in lifted.attributes.items() if isinstance(v, nn.Parameter)}
    buffers = {k: v for k, v in lifted.attributes.items() if k not in parameters}
    ranges = {k: v for k, v in program.range_constraints.items() if k not in gone}
    for node in placeholders:
        if (LIFTED.get(node) or "").endswith(CARRIER):
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    ranges.setdefault(size.node.expr, ValueRanges(LEAST, max_rank))
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=signature,
        state_dict={k: v for k, v in program.state_dict.items() if k not in dropped} | parameters,
        range_constraints=ranges,
        module_call_graph=_call_graph(program, [n for n in placeholders if specs[n.name].kind is USER], lifted.inputs),
        example_inputs=_examples(program, placeholders, lifted.inputs),
        constants={k: v for k, v in program.constants.items() if k not in dropped} | buffers,
        verifiers=program.verifiers,
    )


def _call_graph(program: ExportedProgram, users: list[Node], inputs: Mapping[str, Any]) -> list[Any]:
    """The call signatures, with the root's inputs as they are now."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*treespec")  # torch's, about itself
        graph: list[Any] = copy.deepcopy(program.module_call_graph)
    root = graph[0].signature
    assert root is not None
    names = [n.name for n in users]
    args, kwargs = pytree.tree_unflatten(list(range(root.in_spec.num_leaves)), root.in_spec)
    kwargs = {**_remaining(kwargs, users), **inputs}
    root.in_spec = pytree.tree_structure((args, kwargs))
    if root.inputs:  # export leaves the root's empty
        old = [a for a in root.inputs if not isinstance(a, TensorArgument) or a.name in names]
        root.inputs = old + [TensorArgument(name) for name in names[len(old) :]]
    if root.forward_arg_names is not None:
        plain = [name for name in root.forward_arg_names if name not in KEYWORDS]
        root.forward_arg_names = plain + [name for name in KEYWORDS if name in kwargs]
    return graph


def _examples(program: ExportedProgram, placeholders: list[Node], inputs: Mapping[str, Any]) -> Any:
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    return args, {**_remaining(kwargs, placeholders), **inputs}


def _remaining(kwargs: Mapping[str, Any], placeholders: list[Node]) -> dict[str, Any]:
    """Keyword arguments without the operands that no placeholder is left for."""
    paths = [LIFTED.of(n) for n in placeholders if LIFTED.has(n)]
    left = {path.partition(".")[2] for path in paths}
    kept = {k: v for k, v in kwargs.items() if k not in KEYWORDS}
    operands = {k: v for k, v in kwargs.get("adapters", {}).items() if k in left}
    if operands:
        kept["adapters"] = operands
    for key, end in KEYWORDS.items():
        if end and key in kwargs and any(path.endswith(end) for path in paths):
            kept[key] = kwargs[key]
    return kept
