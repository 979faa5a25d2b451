"""The private torch APIs that fxpeft uses, and nothing else: one that a torch lost is an error where it is used."""

from __future__ import annotations

import operator
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen
from torch.utils.checkpoint import CheckpointFunction

from fxpeft.passes.base import PassError
from fxpeft.passes.tried import TRIED, warn_untried

__all__ = [
    "ConstantSource", "FakeTensorMode", "HigherOrderOperator", "OpOverload", "OpOverloadPacket", "RecompileError",
    "TorchDynamoException", "ValueRanges", "pytree",
]  # fmt: skip


class _Lost(type):
    """The class of what stands in for an API that this torch has not: to use it, in whatever way, is the error."""

    message = ""

    def _refuse(cls, *args: Any, **kwargs: Any) -> Any:
        raise PassError(cls.message)

    __call__ = __bool__ = __getitem__ = __instancecheck__ = __subclasscheck__ = _refuse

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls._refuse()


def _found(path: str, feature: str) -> Any:
    """What lies at a private path of torch's. Where nothing does, what raises a ``PassError`` as soon as it is used."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        first, last = TRIED["torch"]
        message = (
            f"{feature} needs {path.replace(':', '.')}, which torch {torch.__version__} has not. "
            f"fxpeft was tried on torch {first} to {last}: install one of these, or a newer fxpeft"
        )
        # an exception, since some are named in an except clause, where none is asked what it is
        return _Lost(path.rpartition(":")[2], (Exception,), {"message": message})


if TYPE_CHECKING:
    from torch._dynamo.exc import RecompileError as RecompileError
    from torch._dynamo.exc import TorchDynamoException as TorchDynamoException
    from torch._dynamo.source import ConstantSource as ConstantSource
    from torch._ops import HigherOrderOperator as HigherOrderOperator
    from torch._ops import OpOverload as OpOverload
    from torch._ops import OpOverloadPacket as OpOverloadPacket
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.utils import _pytree as pytree
    from torch.utils._sympy.value_ranges import ValueRanges as ValueRanges
else:
    RecompileError = _found("torch._dynamo.exc:RecompileError", "counting recompiles")
    TorchDynamoException = _found("torch._dynamo.exc:TorchDynamoException", "counting recompiles")
    ConstantSource = _found("torch._dynamo.source:ConstantSource", "rewriting a captured graph")
    HigherOrderOperator = _found("torch._ops:HigherOrderOperator", "reading a graph")
    OpOverload = _found("torch._ops:OpOverload", "reading a graph")
    OpOverloadPacket = _found("torch._ops:OpOverloadPacket", "reading a graph")
    FakeTensorMode = _found("torch._subclasses.fake_tensor:FakeTensorMode", "tracing a model")
    pytree = _found("torch.utils._pytree", "reading nested arguments")
    ValueRanges = _found("torch.utils._sympy.value_ranges:ValueRanges", "rewriting a captured graph")
warn_untried("torch", torch.__version__)
FSDP = "_is_fsdp_managed_module"  # what FSDP1 and FSDP2 set on the modules whose parameters they come and go with
INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # where wrappers hold their one module
COMPILED = "_compiled_call_impl"  # what ``module.compile()`` sets
MODULE_CALL: CodeType = torch.nn.Module._call_impl.__code__  # the frame in which a module calls hooks and forward
version_of = operator.attrgetter("_version")  # how often a tensor was written
# ``F.grouped_mm``, which torch 2.9 hasn't, and what it and programs call
GROUPED_PRODUCTS = frozenset(
    found
    for path in ("torch.nn.functional:grouped_mm", "torch:_grouped_mm", "torch:ops.aten._grouped_mm.default")
    if not isinstance(found := _found(path, "a grouped product of experts"), _Lost)
)
LINEAR = _found("torch._C._nn:linear", "tracing a model")  # ``F.linear``, whatever stands in its place
# into tensors from tensors, in one call without the interpreter between
copy_each = _found("torch:_foreach_copy_", "a swap")
zero_each = _found("torch:_foreach_zero_", "a swap")  # the same with zeros
_graph_task = _found("torch._C:_current_graph_task_id", "a call of a locked model")
_is_tracing = _found("torch._C:_is_tracing", "a call of a slot")
_transforms = _found("torch._C:_are_functorch_transforms_active", "a call of an adapter")
_modes = _found("torch._C:_len_torch_dispatch_stack", "a call of a slot")
# ``None`` where Dynamo counts no frames, as in torch 2.11: a call that waits needs nothing then
_count_frames: Any = getattr(torch._C._dynamo.eval_frame, "set_fullgraph_compiled_frame_count", None)
_CHECKPOINT = {CheckpointFunction.forward.__code__: False, CheckpointFunction.backward.__code__: True}


def import_block(names: dict[str, Any]) -> str:
    """Import statements that give the globals of a graph's generated code, for a fresh process."""
    text: str = _found("torch.fx.graph_module:_format_import_block", "writing a generated forward")(
        names, _found("torch.package.importer:sys_importer", "writing a generated forward")
    )
    return text


def skip_frame(function: Callable[..., Any], *, deep: bool = False) -> None:
    """Let Dynamo run calls of a function as they are; where it is inlined it is traced as any.

    Args:
        deep: what it calls too. Otherwise Dynamo begins there.
    """
    try:
        frames: Any = pkgutil.resolve_name("torch._C._dynamo.eval_frame")
        below = frames._FrameAction.SKIP if deep else frames._FrameAction.DEFAULT
        strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, below)
        frames.set_code_exec_strategy(function.__code__, strategy)
    except (ImportError, AttributeError):  # at the import of this package, and eager models do without
        warnings.warn(
            f"torch {torch.__version__} has no way to skip a frame that fxpeft knows: in a compiled model Dynamo "
            "traces the locks of swaps too, and may break graphs there",
            stacklevel=2,
        )


def count_waiting_call() -> None:
    """Let a call that waits before its first compiled frame pass for one that has had some.

    With ``fullgraph=True`` Dynamo counts a call's compiled frames, in one number for all threads that each call sets
    to zero first: while one waits, others that end find none and raise.
    """
    if _count_frames is not None and _count_frames(1) < 0:
        _count_frames(-1)  # nobody counts


def is_recorded() -> bool:
    """Whether something sees each operator of this thread: ``torch.jit.trace``, or a mode of ``make_fx`` or fakes."""
    return bool(_is_tracing() or _modes() > 0)


def is_transformed() -> bool:
    """Whether this thread calls under a transform of ``torch.func`` or in forward-mode differentiation."""
    return bool(_transforms()) or torch.autograd.forward_ad._current_level >= 0


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return bool(_graph_task() != -1)


def checkpoint_above(stop: CodeType) -> tuple[Any, bool] | None:
    """The context of the reentrant checkpoint that called, not past a caller that runs ``stop``; and if backward."""
    frame = sys._getframe(3)
    while frame is not None and frame.f_code is not stop:
        if frame.f_code in _CHECKPOINT:
            return frame.f_locals["ctx"], _CHECKPOINT[frame.f_code]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def argument_names(graph: Graph) -> list[str]:
    """The names that a graph of nested arguments, as ``ExportedProgram.module()`` has one, gives its forward's."""
    nested = getattr(graph._codegen, "pytree_info", None)
    return [] if nested is None else list(nested.orig_args)


def has_plain_arguments(graph: Graph) -> bool:
    """Whether a graph's code takes its placeholders as they are, none of them nested in others."""
    return type(graph._codegen) is CodeGen


def schema_of(operator: object) -> Any:
    """An ATen operator's schema, with ``name`` and ``is_mutable``; ``None`` for any other object."""
    return getattr(operator, "_schema", None)


def fake_mode_of(values: Iterable[Any]) -> FakeTensorMode | None:
    """The mode that the fake tensors among values belong to; ``None``: there are none."""
    mode: FakeTensorMode | None = _found("torch._guards:detect_fake_mode", "rewriting a captured graph")(list(values))
    return mode


def symbolic_sizes() -> AbstractContextManager[Any]:
    """Let operators on fake tensors that are made of others leave symbols as they are, as torch's own tracers do.

    In C++ some of them take sizes for numbers: on torch 2.11 ``linear``, which fixed a symbol at what it stood for.
    """
    make = _found("torch._dispatch.python:enable_python_dispatcher", "tracing a model")
    context: AbstractContextManager[Any] = make()
    return context


def mark_dynamic(tensor: torch.Tensor, dimension: int, least: int, most: int) -> None:
    """Let Dynamo take a tensor's size as a symbol between two numbers."""
    _found("torch._dynamo:mark_dynamic", "a slot")(tensor, dimension, min=least, max=most)


def parameter_sources(graph_module: GraphModule) -> dict[str, Any] | None:
    """Attribute of a graph of Dynamo's -> where it found the parameter; AOTAutograd asks. ``None``: it is no such."""
    found: dict[str, Any] | None = getattr(graph_module, "_param_name_to_source", None)
    return found


def keep_sources(before: GraphModule, copied: GraphModule) -> None:
    """Let a copy of a graph of Dynamo's say where its inputs and parameters come from, as the graph does."""
    if (sources := parameter_sources(before)) is not None:
        vars(copied)["_param_name_to_source"] = sources
    for old, new in zip(before.graph.nodes, copied.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source


def inner_backend(
    backend: str | Callable[..., Any], mode: str | None, options: Mapping[str, Any], dynamic: bool | None
) -> Callable[..., Callable[..., Any]]:
    """What ``torch.compile(backend=, mode=, options=, dynamic=)`` hands its graphs to.

    Raises:
        RuntimeError: a mode or an option that Inductor doesn't know.
    """
    args: tuple[Any, ...] = (mode, dict(options), dynamic)
    made: Callable[..., Callable[..., Any]]
    if backend == "inductor":
        made = _found("torch:_TorchCompileInductorWrapper", "fxpeft.compile")(*args)
    else:
        made = _found("torch:_TorchCompileWrapper", "fxpeft.compile")(backend, *args)
    return made


def is_freezing() -> bool:
    """Whether Inductor folds parameters into constants, so that a swap would have no effect."""
    return bool(_found("torch._inductor:config.freezing", "preparing a model"))


def constants_setting() -> str | None:
    """The setting by which a compiled model takes its modules' tensors for constants, so that swaps have no effect."""
    found = {"torch._inductor.config.freezing": is_freezing()}
    for name in ("prepare_freezing", "install_free_tensors"):  # what a torch has not is never set
        found[f"torch._dynamo.config.{name}"] = getattr(torch._dynamo.config, name, False)
    return next((name for name, value in found.items() if value), None)


def aot_compile(module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any]) -> Any:
    """Inductor's files of a graph, for :func:`package_files`."""
    compiled = _found("torch._inductor:aot_compile", "a package")
    return compiled(module, args, kwargs, options=dict(options))


def package_files(path: str, files: Any, texts: dict[str, str]) -> None:
    """Write a ``.pt2`` archive with one compiled model, ``"model"``, and further texts by name."""
    write = _found("torch.export.pt2_archive._package:package_pt2", "a package")
    write(path, aoti_files={"model": files}, extra_files=texts)


def load_package(path: str, **options: Any) -> Any:
    """A ``.pt2`` archive, with its ``aoti_runners``."""
    return _found("torch.export.pt2_archive._package:load_pt2", "a package")(path, **options)


def captured_graphs() -> tuple[int, dict[str, int]]:
    """How many graphs Dynamo captured in this process, and how often for which reason it broke one."""
    counters = _counters()
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def cudagraph_skips() -> int:
    """How many graphs Inductor made no CUDA graph of in this process, though it was asked to."""
    return int(_counters()["inductor"]["cudagraph_skips"])


def _counters() -> Any:
    return _found("torch._dynamo.utils:counters", "counting graphs")


def compilations() -> list[Any]:
    """What Dynamo compiled last, in all threads, each with ``co_name``, ``recompile_reason`` and ``fail_type``."""
    return list(_found("torch._dynamo.utils:get_compilation_metrics", "counting recompiles")())


def error_on_recompile() -> AbstractContextManager[Any]:
    """Make a recompile in this thread a :class:`RecompileError`, which names the guard."""
    bool(_found("torch._dynamo:config.error_on_recompile", "counting recompiles"))  # raises where torch lost it
    context: AbstractContextManager[Any] = torch._dynamo.config.patch(error_on_recompile=True)
    return context


def graph_counter() -> Any:
    """A backend that runs graphs as they are and counts them in ``frame_count``, their operations in ``op_count``."""
    return _found("torch._dynamo.testing:CompileCounter", "counting graphs")()


KEYED = "_fxpeft_passes"  # torch makes its key of all that a graph module holds, names that it doesn't know too


def key_graph(graph_module: GraphModule, passes: tuple[tuple[str, str | bytes], ...] | None) -> None:
    """Let torch keep what it compiles of a graph for later processes by these passes too; ``None``: not at all."""
    setattr(graph_module, KEYED, _Unkeyed() if passes is None else passes)


class _Unkeyed:
    """No key can be made of it: the caches on disk are passed by."""

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("a pass without uuid changed this graph")

    def __deepcopy__(self, memo: object) -> _Unkeyed:
        return self
