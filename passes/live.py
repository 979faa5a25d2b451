"""Live modules: the same rewrite on one module of a running model, bound back as its forward.

A module is traced on its own, its leaf graph is rewritten, and the generated code becomes the
``forward`` of a generated subclass of the module's own class. The instance is then moved to that
class, as torch's parametrize and FSDP2 do: names, hooks, ``isinstance`` and state_dict keys of the
base survive, and moving it back restores it exactly. Classes are cached by their source, so all
sites of one kind share one, and per-layer compilation keeps one graph.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import GraphModule

from fxpeft.passes.base import PassError, attribute
from fxpeft.passes.feed import LEAF, Feed, FeedPass, call_graph
from fxpeft.passes.inject import InjectPass, Rewrite
from fxpeft.passes.kinds import Kind
from fxpeft.passes.match import TARGET, MatchPass, Target, Unsupported, module_kind, read_target, stored_weight
from fxpeft.passes.pipeline import Pipeline, graph_text
from fxpeft.passes.redirect import RedirectPass
from fxpeft.passes.torch_private import import_block

_NOT_TRACED = frozenset(
    {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "_old_forward", "_hf_hook", LEAF}
)
_sources: dict[tuple[Any, ...], str] = {}
_kinds: dict[tuple[Any, ...], Kind] = {}
_weights: dict[tuple[Any, ...], tuple[str, bool]] = {}  # a weight's name, and whether it is stored [in, out]
_classes: dict[tuple[type, str, type | None], type[nn.Module]] = {}
_number = itertools.count()
_MEMBERS = "\n\nmembers = "  # begins what a generated class has beside its forward


class Container(nn.Module):
    """Holds what fxpeft adds to a live module; never part of the base model."""


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without its rewrite."""
    cls = type(module)
    return getattr(cls, "_fxpeft_base", cls)


def is_bound(module: nn.Module) -> bool:
    """Whether a module runs a generated forward."""
    return hasattr(type(module), "_fxpeft_base")


def trace_module(module: nn.Module) -> GraphModule:
    """The graph of one module's own forward, annotated with exactly one target.

    Where torch.fx can't trace the forward, or what it finds is not one plain target whose graph is
    the same in training and evaluation, the graph is one leaf call of the module.

    Raises:
        PassError: the module is of no kind that a rewrite knows.
    """
    traced = _trace_inside(module)
    if traced is not None:
        return traced
    kind = module_kind(module)
    if kind is None:
        known = "linear, embedding, conv1d, conv2d, conv3d or a module with in_features and out_features"
        raise PassError(f"{base_class(module).__name__} is no kind of target: expected {known}")
    return _leaf_graph(module)


def target_of(graph_module: GraphModule) -> Target:
    """The one annotated target of a leaf graph."""
    target: Target = next(node.meta[TARGET] for node in graph_module.graph.nodes if TARGET in node.meta)
    return target


def kind_of(module: nn.Module) -> Kind:
    """The :class:`Kind` of a module, read off its graph.

    Raises:
        PassError: as :func:`trace_module`.
    """
    key = signature(module)
    if key is None:
        return target_of(trace_module(module)).kind
    if key not in _kinds:
        _kinds[key] = target_of(trace_module(module)).kind
    return _kinds[key]


def base_weight(module: nn.Module) -> Tensor:
    """A target's own weight as a view ``[out, in, ...]``, however it is stored.

    Raises:
        PassError: the module is no target, or its weight is not plain: quantised, for instance.
    """
    key = signature(module)
    where = _weights.get(key) if key else None
    if where is None:
        traced = trace_module(module)
        node = next(node for node in traced.graph.nodes if TARGET in node.meta)
        found, flip = stored_weight(traced, node)
        where = str(found if isinstance(found, str) else found.target).removeprefix(f"{LEAF}."), flip
        if key:
            _weights[key] = where
    weight = attribute(module, where[0])
    view: Tensor = weight.t() if where[1] else weight
    if type(weight) not in (Tensor, nn.Parameter) or tuple(view.shape[:1]) != (kind_of(module).out_features,):
        found_type = f"{base_class(module).__name__}.weight is a {type(weight).__name__}"
        raise PassError(f"expected a plain tensor as weight: {found_type} {tuple(weight.shape)}")
    return view.detach()


def _trace_inside(module: nn.Module) -> GraphModule | None:
    """The module's own graph with its one target annotated, or ``None``."""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return None  # inside, the convolution reads the padded input; PEFT's A pads its own with zeros
    try:
        traced = _trace_any(module)
        found = [t for n in traced.graph.nodes if (t := read_target(traced, n))]
    except (PassError, Unsupported):
        return None
    if [t.site for t in found] != [""]:
        return None
    MatchPass(lambda site: site == "")(traced)
    return traced


def _trace_any(module: nn.Module) -> GraphModule:
    """The module's own graph, the same in training and evaluation; ``PassError`` where there is none."""
    if given_forward(module) is not None:
        raise PassError("somebody replaced this instance's forward, so it can only be called, not looked into")
    bare = _bare(module)
    traced = []
    for training in (module.training, not module.training):
        bare.training = training
        try:
            traced.append(GraphModule(bare, fx.Tracer().trace(bare)))
        except Exception as error:  # noqa: BLE001 - whatever a forward raises on proxies: it can't be traced
            raise PassError(f"torch.fx can't trace {base_class(module).__name__}.forward: {error}") from None
    if graph_text(traced[0]) != graph_text(traced[1]):
        raise PassError(f"{base_class(module).__name__}.forward depends on training mode")
    return traced[0]


def _bare(module: nn.Module) -> nn.Module:
    """A shallow stand-in of the module's own class: its tensors, no hooks, no instance forward.

    Its other attributes are copies: a forward that is traced may write to them, as that of
    bitsandbytes' Linear8bitLt does to its state, and proxies must not get into the module.
    """
    bare = base_class(module).__new__(base_class(module))
    vars(bare).update({name: _copied(value) for name, value in vars(module).items()})
    for name in ("forward", "_old_forward", "_hf_hook"):
        vars(bare).pop(name, None)
    return bare


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor | nn.Module) or callable(value):
        return value
    try:
        return copy.copy(value)
    except TypeError:  # it can't be copied
        return value


def _leaf_graph(module: nn.Module) -> GraphModule:
    root = nn.Module()
    root.add_module(LEAF, module)
    graph = fx.Graph()
    inputs = []
    function = given_forward(module) or base_class(module).forward.__get__(module)
    for p in inspect.signature(function).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        default = () if p.default is p.empty else (p.default,)
        inputs.append(graph.placeholder(p.name, None, *default))
    call = graph.call_module(LEAF, tuple(inputs))
    graph.output(call)
    traced = GraphModule(root, graph)
    kind = module_kind(module)
    assert kind is not None
    call.meta[TARGET] = Target("", kind)
    return traced


def rewrite_module(
    module: nn.Module,
    rewrites: Sequence[Rewrite],
    *,
    name: str,
    redirects: Mapping[str, tuple[str, Any]] | None = None,
    container: str = "adapters",
    dump: str | None = None,
) -> None:
    """Trace ``module``, let it read ``redirects``, inject ``rewrites`` in order, bind the result.

    The operands have to be reachable from the module itself at ``container.path``; the graph only
    names them. Without rewrites the module need not be of a known kind. Code that reads a redirected attribute
    without calling the module gets the operand too.

    Args:
        name: the module's dotted name, for messages.
        redirects: attribute -> (path of the operand, operand), as in :class:`RedirectPass`.
        container: where the redirects' operands are; each rewrite names its own.
        dump: folder for the graphs before and after, as in :class:`Pipeline`.

    Raises:
        PassError: the module can't take the rewrite; it is unchanged then.
    """
    redirects = redirects or {}
    own = signature(module)
    asked = ((k, path, container) for k, (path, _) in redirects.items())
    key = own and (own, *(r.signature() for r in rewrites), *asked)
    source = _sources.get(key) if key and dump is None else None
    if source is None:
        passes = [RedirectPass({"": redirects}, container=container), InjectPass({"": rewrites})]
        try:
            traced = trace_module(module) if rewrites else _trace_any(module)
            source = graph_source(Pipeline(passes, dump=dump)(traced).graph)
        except PassError as error:
            raise PassError(f"{name}: {error}") from None
        if key:
            _sources[key] = source
    reads = {leaf: _access(f"{container}.{path}") for leaf, (path, _) in redirects.items()}
    bind_source(module, source + _reading(module, reads))


def replace_module(module: nn.Module, path: str) -> None:
    """Let another module, reachable at ``path`` from ``module``, answer for it.

    It answers all calls, and reads of the module's parameters, buffers and children: code that reads a head's
    ``weight`` without calling the head gets the weight that a call computes with. Lists of parameters, as
    ``state_dict`` and ``named_modules`` make them, stay the module's own. Of a module whose weights accelerate's
    hook fetches, by these attributes, only calls are answered.
    """
    access = _access(path)
    held = (*module._parameters.items(), *module._buffers.items(), *module._modules.items())
    names = [key for key, value in held if value is not None and not isinstance(value, Container)]
    source = f"def forward(self, *args, **kwargs):\n    return {access}(*args, **kwargs)\n"
    bind_source(module, source + _reading(module, {name: f"getattr({access}, {name!r})" for name in names}))


def _access(path: str) -> str:
    """Code that reads a dotted path below a module; no part of the path becomes code."""
    access = "self"
    for atom in path.split("."):
        access = f"getattr({access}, {atom!r})"
    return access


def _reading(module: nn.Module, attributes: Mapping[str, str]) -> str:
    """Source of attributes that are read elsewhere: name -> the code that reads it there."""
    if not attributes or "_hf_hook" in vars(module):
        return ""
    lines = "".join(f"    {name!r}: property(lambda self: {code}),\n" for name, code in attributes.items())
    return f"{_MEMBERS}{{\n{lines}}}\n"


def feed_module(module: nn.Module, feed: Feed, *, name: str, dump: str | None = None) -> None:
    """Let ``feed`` prepare the inputs of every call of ``module``, whatever its own forward is.

    With a mixin the bound class is ``class X(mixin, X)``: methods that work with the forward's
    inputs too, as those of ``generate``. It keeps its name, since whole models are looked up by it.

    Raises:
        PassError: the forward's arguments have no names; the module is unchanged then.
    """
    given = given_forward(module) or base_class(module).forward.__get__(module)
    try:
        graph = Pipeline([FeedPass(feed)], dump=dump)(call_graph(given)).graph
    except PassError as error:
        raise PassError(f"{name or base_class(module).__name__}: {error}") from None
    bind_source(module, graph_source(graph), feed.mixin)


def graph_source(graph: fx.Graph) -> str:
    """A graph's generated code with the imports it needs, and no more."""
    for node in graph.nodes:
        node.type = None  # an annotation may be a string, which no import gives
    code = graph.python_code("self")
    used = {name: value for name, value in code.globals.items() if re.search(rf"\b{name}\b", code.src)}
    return f"{import_block(used)}\n\n{code.src.strip()}\n"


def signature(module: nn.Module) -> tuple[Any, ...] | None:
    """What a module's own graph depends on; ``None`` where that can't be told from plain attributes."""
    state = vars(module)
    if given_forward(module) is not None:
        return None
    plain: list[tuple[str, Any]] = []
    for name, value in state.items():
        if name in _NOT_TRACED or name.endswith("_hooks") or "_hooks_" in name:
            continue
        if isinstance(value, list):
            value = tuple(value)
        if not isinstance(value, int | float | str | bool | tuple | type(None)):
            return None
        plain.append((name, value))
    tensors = [
        (name, None if tensor is None else (type(tensor), tensor.shape))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    ]
    return base_class(module), tuple(plain), tuple(tensors)


def given_forward(module: nn.Module) -> Any:
    """The forward that somebody gave this instance in place of its class's, or ``None``."""
    state = vars(module)
    if LEAF in state:
        return state[LEAF]
    found = state.get("_old_forward", state.get("forward"))  # accelerate's hooks keep it as _old_forward
    return None if _is_own(module, found) else found


def _is_own(module: nn.Module, forward: Any) -> bool:
    """Whether a bound method is the class's own: accelerate leaves one on the instance."""
    return getattr(forward, "__func__", None) in (type(module).forward, base_class(module).forward)


def bind_source(module: nn.Module, source: str, mixin: type | None = None) -> None:
    """Move a module to the generated subclass whose ``forward`` is defined by ``source``."""
    base = base_class(module)
    state = vars(module)
    _drop_autocast(module)
    given, hooked = given_forward(module), "_old_forward" in state
    if "forward" in state and not hooked and (LEAF not in state or _is_own(module, state["forward"])):
        del state["forward"]  # let the class's forward run
    if given is not None:
        state[LEAF] = given  # called as a leaf: this is where the generated code looks for it
    module.__class__ = generated_class(base, source, mixin)
    if "_old_forward" in state:  # accelerate's hooks call this bound method; give it the new class's
        state["_old_forward"] = type(module).forward.__get__(module)


def unbind(module: nn.Module) -> None:
    """Give a module its own class back; the inverse of every bind before."""
    if not is_bound(module):
        return
    state = vars(module)
    _drop_autocast(module)
    if "_old_forward" not in state and _is_own(module, state.get("forward")):
        del state["forward"]
    module.__class__ = base_class(module)
    given = state.pop(LEAF, None)
    if "_old_forward" in state:
        state["_old_forward"] = given or type(module).forward.__get__(module)
    elif given is not None:
        state["forward"] = given


def _drop_autocast(module: nn.Module) -> None:
    """Drop the autocast that accelerate wrapped around a generated forward: it would go on calling that one."""
    state = vars(module)
    if is_bound(module) and "forward" in state and _is_own(module, state.get("_original_forward")):
        del state["forward"], state["_original_forward"]


def bare_copy(module: nn.Module) -> nn.Module:
    """A deep copy of the base module: no rewrite, no containers, no hooks."""
    shared = (vars(part).get("_hf_hook") for part in module.modules())
    copied = copy.deepcopy(module, {id(hook): hook for hook in shared if hook is not None})  # it may hold all weights
    for part in copied.modules():
        unbind(part)
        _unhook(part)
        for name in [n for n, child in part._modules.items() if isinstance(child, Container)]:
            del part._modules[name]
    return copied


def _unhook(module: nn.Module) -> None:
    """Take accelerate's hook off a copy, which has weights of its own to compute with."""
    state = vars(module)
    state.pop("_hf_hook", None)
    if "_old_forward" in state:
        forward = state.pop("_old_forward")
        state.pop("forward", None)
        if not _is_own(module, forward):
            state["forward"] = forward


def forward_text(module: nn.Module) -> str:
    """A module's forward as source: its own graph, or the rewritten one that it runs now."""
    if not is_bound(module):
        return graph_text(trace_module(module))
    return generated_source(module).partition(_MEMBERS)[0].rpartition("\n\n")[2]


def generated_source(module: nn.Module) -> str:
    """The source of a bound module's forward, imports first."""
    return type(module)._fxpeft_source  # type: ignore[attr-defined, no-any-return]


def generated_class(base: type[nn.Module], source: str, mixin: type | None = None) -> type[nn.Module]:
    """The subclass of ``base`` whose forward, and ``members`` where it has any, are ``source``'s.

    The same object for the same arguments.
    """
    cached = _classes.get((base, source, mixin))
    if cached is not None:
        return cached
    filename = f"<fxpeft {base.__name__} {next(_number)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)
    members = {
        **namespace.get("members", {}),
        "forward": namespace["forward"],
        "__module__": __name__,
        "__doc__": f"{base.__name__} with an adapter subgraph, generated by fxpeft.",
        "__reduce_ex__": _reduce,
        "_fxpeft_base": base,
        "_fxpeft_source": source,
        "_fxpeft_mixin": mixin,
    }
    if not hasattr(base, LEAF):
        members[LEAF] = base.forward
    if base.__repr__ is not nn.Module.__repr__:
        members["__repr__"] = _repr
    bases, name = ((base,), f"Adapted{base.__name__}") if mixin is None else ((mixin, base), base.__name__)
    made = type(name, bases, members)
    _classes[base, source, mixin] = made
    return made


def _repr(self: nn.Module) -> str:
    """What a class with a text of its own prints, and what was put into the module below it."""
    own: str = base_class(self).__repr__(self)
    added = [f"  ({name}): {child!r}".replace("\n", "\n  ") for name, child in self._modules.items()
             if isinstance(child, Container) and f"({name})" not in own]  # fmt: skip
    return "\n".join((f"{own} (", *added, ")")) if added else own


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle by base class and source, since a generated class can't be found by its name."""
    cls = type(self)
    state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)  # type: ignore[no-untyped-call]
    return _rebuild, (cls._fxpeft_base, cls._fxpeft_source, cls._fxpeft_mixin), state  # type: ignore[attr-defined]


def _rebuild(base: type[nn.Module], source: str, mixin: type | None = None) -> nn.Module:
    cls = generated_class(base, source, mixin)
    return cls.__new__(cls)
