"""A pytest plugin for compile-regression tests, also usable as plain functions.

Installed with fxpeft and found by pytest on its own. Nothing here imports torch before it is used.

    def test_swaps_do_not_recompile(no_recompiles):
        with no_recompiles(), torch.no_grad():
            compiled(ids)                     # the first compile is allowed
            fxpeft.hotswap(model, "adapter")
            compiled(ids)                     # another one is an error with torch's guard reason

    def test_rewritten_graph(graph_snapshot):
        graph_snapshot(model.model.layers[0].self_attn.q_proj)
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def no_recompiles(*, warm: bool = False) -> Iterator[None]:
    """Make a recompile inside the block an error that names the guard that failed.

    The first compile of each function is allowed, so warming up can be part of the block.

    Args:
        warm: everything was called before: forbid first compiles too.

    Raises:
        torch._dynamo.exc.RecompileError: from the call that would have recompiled.
        RuntimeError: with ``warm``, from a call that would have compiled at all.
    """
    import torch

    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
        if warm:
            stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
        yield


@dataclass
class GraphCount:
    """Graphs that were captured in a block, and the reasons of its graph breaks."""

    graphs: int = 0
    breaks: tuple[str, ...] = ()


@contextmanager
def count_graphs() -> Iterator[GraphCount]:
    """Count the graphs that Dynamo captures in the block, whatever the backend."""
    import torch._dynamo.utils as utils

    counted = GraphCount()
    graphs, breaks = utils.counters["stats"]["unique_graphs"], dict(utils.counters["graph_break"])
    try:
        yield counted
    finally:
        counted.graphs = utils.counters["stats"]["unique_graphs"] - graphs
        now = utils.counters["graph_break"]
        counted.breaks = tuple(reason for reason, n in now.items() if n > breaks.get(reason, 0))


def assert_single_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Assert that a function or module is captured as exactly one graph.

    Compiles from scratch: Dynamo's caches are reset before and after.

    Raises:
        AssertionError: more graphs or none; the message holds the number and the breaks' reasons.
    """
    import torch

    torch._dynamo.reset()
    try:
        found = torch._dynamo.explain(function)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    if found.graph_count != 1:
        reasons = "\n".join(f"  {reason.reason}" for reason in found.break_reasons) or "  (no graph breaks)"
        raise AssertionError(f"expected one graph, found {found.graph_count}; graph breaks:\n{reasons}")


@dataclass(frozen=True)
class SwapReport:
    """What :func:`assert_swaps_clean` went through."""

    graphs: int
    swaps: int
    max_difference: float


def assert_swaps_clean(
    model: nn.Module,
    adapters: Sequence[str | Path],
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    max_rank: int = 128,
    targets: Any = None,
    prepare: Mapping[str, Any] | None = None,
    compile_options: Mapping[str, Any] | None = None,
    atol: float = 1e-4,
) -> SwapReport:
    """Swap a compiled copy of your model through every ordered pair of your adapters.

    For each: the output equals that of the adapter freshly loaded into an eager copy, nothing
    recompiles, no slot moves in memory. In between: off and on again, and a scale changed and back.

    Args:
        model: the bare model; only copies of it are changed.
        adapters: folders in PEFT's format.
        inputs: keyword or positional arguments of a forward.
        max_rank, targets, prepare: arguments of :func:`fxpeft.prepare_hotswap`; by default the
            targets are the union of the adapters'.
        compile_options: arguments of ``torch.compile``; ``fullgraph=True`` by default.
        atol: greatest difference allowed in any output.

    Raises:
        AssertionError: a wrong output or a slot that moved; the message names the swap.
        torch._dynamo.exc.RecompileError: a swap recompiled.
    """
    import torch

    import fxpeft

    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args = () if isinstance(inputs, Mapping) else tuple(inputs)
    folders = [str(folder) for folder in adapters]
    with torch.no_grad():
        expected = {"off": _tensors(copy.deepcopy(model)(*args, **kwargs))}
        slots = copy.deepcopy(model)
        for folder in folders:
            fresh = copy.deepcopy(model)
            fxpeft.load_adapter(fresh, folder)
            expected[folder] = _tensors(fresh(*args, **kwargs))
            fxpeft.load_adapter(slots, folder, f"a{folders.index(folder)}")
        fxpeft.prepare_hotswap(slots, max_rank, targets=targets, **(prepare or {}))
        addresses = {name: buffer.data_ptr() for name, buffer in slots.named_buffers()}
        torch._dynamo.reset()
        compiled = torch.compile(slots, **{"fullgraph": True, **(compile_options or {})})
        worst, swaps = 0.0, 0

        def check(now: str, step: str) -> None:
            nonlocal worst
            for found, wanted in zip(_tensors(compiled(*args, **kwargs)), expected[now], strict=True):
                difference = (found.float() - wanted.float()).abs().max().item()
                worst = max(worst, difference)
                if not difference <= atol:
                    raise AssertionError(f"{step}: output differs by {difference:.3g} from a fresh load, above {atol}")
            moved = [n for n, b in slots.named_buffers() if b.data_ptr() != addresses[n]]
            if moved:
                raise AssertionError(f"{step}: moved in memory: {', '.join(moved)}")

        with count_graphs() as counted, no_recompiles():
            for before, after in ((b, a) for b in folders for a in folders):
                for folder in (before, after):
                    name = f"a{folders.index(folder)}"
                    fxpeft.set_adapter(slots, name)
                    swaps += 1
                    check(folder, f"{before} -> {after}")
                fxpeft.set_scale(slots, name, 0.5)
                fxpeft.set_scale(slots, name, 1.0)
                check(after, f"{after}: scale to 0.5 and back")
                fxpeft.disable_adapters(slots)
                check("off", f"{after} -> off")
                fxpeft.enable_adapters(slots)
                check(after, f"off -> {after}")
    if list(slots.state_dict()) != list(model.state_dict()):
        raise AssertionError("the prepared model's state_dict has other keys than the bare model's")
    return SwapReport(counted.graphs, swaps, worst)


def _tensors(output: Any) -> list[Tensor]:
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def graph_text(graph: Any) -> str:
    """The text of a rewritten live module, a graph module, a graph, or of text itself."""
    if isinstance(graph, str):
        return graph if graph.endswith("\n") else graph + "\n"
    from fxpeft.passes import live, pipeline

    if hasattr(graph, "graph"):
        text: str = pipeline.graph_text(graph)
        return text
    if live.is_bound(graph):
        source: str = live.generated_source(graph)
        return source
    raise TypeError(f"expected a GraphModule, a rewritten module or text, found {type(graph).__name__}")


class GraphSnapshot:
    """Compares a graph with the golden text beside the test, or writes it with ``--update``."""

    def __init__(self, folder: Path, stem: str, update: bool) -> None:
        self.folder, self.stem, self.update = folder, stem, update
        self.count = 0

    def __call__(self, graph: Any) -> None:
        """Assert that the graph reads as it did when the snapshot was taken."""
        self.count += 1
        path = self.folder / f"{self.stem}{'' if self.count == 1 else f'-{self.count}'}.txt"
        text = graph_text(graph)
        if self.update:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
            return
        if not path.exists():
            pytest.fail(f"no snapshot {path}: run pytest with --update to take it, and commit it", pytrace=False)
        golden = path.read_text(encoding="utf-8")
        if golden != text:
            lines = difflib.unified_diff(golden.splitlines(), text.splitlines(), "snapshot", "now", lineterm="")
            changed = "\n".join(lines)
            pytest.fail(f"the graph is not that of {path} (--update to accept):\n{changed}", pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update`` takes graph snapshots anew; ``--fxpeft-update`` where another plugin has that name."""
    group = parser.getgroup("fxpeft")
    text = "take the graph snapshots of fxpeft anew"
    group.addoption("--fxpeft-update", action="store_true", help=text)
    try:
        group.addoption("--update", action="store_true", dest="fxpeft_update_short", help=text)
    except ValueError:  # taken by another plugin; the long name is there
        return


@pytest.fixture(name="no_recompiles")
def _no_recompiles_fixture() -> Callable[..., Any]:
    """:func:`no_recompiles`."""
    return no_recompiles


@pytest.fixture(name="graph_snapshot")
def _graph_snapshot_fixture(request: pytest.FixtureRequest) -> GraphSnapshot:
    """A :class:`GraphSnapshot`; files are in ``snapshots/`` beside the test file."""
    config = request.config
    update = bool(config.getoption("--fxpeft-update") or getattr(config.option, "fxpeft_update_short", False))
    stem = re.sub(r"[^\w.-]+", "-", request.node.name).strip("-")
    return GraphSnapshot(request.path.parent / "snapshots" / request.path.stem, stem, update)
