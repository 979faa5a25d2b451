"""A pytest plugin for compile-regression tests, also usable as plain functions.

Installed with fxpeft and found by pytest on its own. Nothing here imports torch before it is used.

    def test_swaps_do_not_recompile(no_recompiles):
        with no_recompiles() as counted, torch.no_grad():
            compiled(ids)                     # the first compile is allowed
            fxpeft.hotswap(model, "adapter")
            compiled(ids)                     # another one is an error with torch's guard reason

    def test_rewritten_graph(graph_snapshot):
        graph_snapshot(model.model.layers[0].self_attn.q_proj)

    def test_all_my_adapters():
        fxpeft.testing.assert_swaps_clean(model, ["adapters/a", "adapters/b"], {"input_ids": ids})
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import pytest
except ModuleNotFoundError:  # the functions work without it
    pytest = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor, nn


class GraphCount:
    """What Dynamo captured since the block began, until it ended; can be read inside the block too."""

    def __init__(self) -> None:
        self._before = _counters()
        self._after: tuple[int, dict[str, int]] | None = None

    @property
    def graphs(self) -> int:
        """The number of graphs."""
        return (self._after or _counters())[0] - self._before[0]

    @property
    def breaks(self) -> tuple[str, ...]:
        """The reasons of the graph breaks."""
        now = (self._after or _counters())[1]
        return tuple(reason for reason, n in now.items() if n > self._before[1].get(reason, 0))


def _counters() -> tuple[int, dict[str, int]]:
    from fxpeft.passes.torch_private import captured_graphs

    return captured_graphs()


@contextmanager
def count_graphs() -> Iterator[GraphCount]:
    """Count the graphs that Dynamo captures in the block, whatever the backend and the thread.

    with count_graphs() as counted:
        compiled(ids)
    assert counted.graphs == 1, counted.breaks
    """
    counted = GraphCount()
    try:
        yield counted
    finally:
        counted._after = _counters()


@contextmanager
def no_recompiles(*, warm: bool = False) -> Iterator[GraphCount]:
    """Make a recompile inside the block an error that names the guard that failed.

    The first compile of each function is allowed, so warming up can be part of the block. A new
    input shape is a recompile as well: warm up before the block with the shapes to come.

    Args:
        warm: everything was called before: forbid first compiles too.

    Returns:
        What was captured in the block, as in :func:`count_graphs`.

    Raises:
        torch._dynamo.exc.RecompileError: from the call that would have recompiled; for a call in
            another thread, at the end of the block.
        RuntimeError: with ``warm``, from a call that would have compiled at all.
    """
    import torch

    from fxpeft.passes.torch_private import RecompileError, compilations, error_on_recompile

    known = {id(compiled): compiled for compiled in compilations()}
    with ExitStack() as stack:
        counted = stack.enter_context(count_graphs())
        stack.enter_context(error_on_recompile())
        if warm:
            stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
        yield counted
    for compiled in compilations():  # torch's config is that of one thread: others went on
        if id(compiled) not in known and compiled.recompile_reason and compiled.fail_type is None:
            raise RecompileError(f"another thread recompiled {compiled.co_name}: {compiled.recompile_reason}")


def assert_single_graph(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    """Assert that a function or module, called like this, is captured whole, as exactly one graph.

    Compiles from scratch: Dynamo's caches are reset before and after.

        assert_single_graph(model, input_ids=ids, use_cache=False)

    Raises:
        AssertionError: more graphs or none; the message holds the number and what broke the graph.
    """
    import torch

    from fxpeft.model.wrappers import unwrap
    from fxpeft.passes.torch_private import TorchDynamoException, graph_counter

    plain = unwrap(function) if isinstance(function, torch.nn.Module) else function
    counter = graph_counter()
    torch.compiler.reset()
    try:
        torch.compile(plain, backend=counter, fullgraph=True)(*args, **kwargs)
    except TorchDynamoException as error:
        torch.compiler.reset()
        with count_graphs() as counted:  # what is left of it: breaks inside of a skipped frame don't count
            torch.compile(plain, backend="eager")(*args, **kwargs)
        raise AssertionError(
            f"expected one graph; torch.compile can't capture it whole, and makes {counted.graphs} of it.\n{error}"
        ) from error
    finally:
        torch.compiler.reset()
    if counter.frame_count != 1 or not counter.op_count:
        raise AssertionError(f"expected one graph, found {counter.frame_count} with {counter.op_count} operations")


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
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> SwapReport:
    """Swap a compiled copy of your model through every ordered pair of your adapters and "off".

    Once with ``set_adapter`` and once with ``hotswap``, and each adapter is scaled and scaled back.
    After every step the output equals that of the adapter freshly loaded into an eager copy, nothing
    recompiles and no slot moves in memory. The base's parameters, the keys of its ``state_dict`` and
    ``training`` stay as they are. Dynamo's caches are reset before.

        report = assert_swaps_clean(model.eval(), ["adapters/a", "adapters/b"], {"input_ids": ids})
        assert report.graphs == 1

    Args:
        model: the bare model; only copies of it are changed.
        adapters: folders in PEFT's format.
        inputs: keyword or positional arguments of a forward.
        max_rank, targets, prepare: arguments of :func:`fxpeft.prepare_hotswap`; by default the
            targets are the union of the adapters'.
        compile_options: arguments of ``torch.compile``; ``fullgraph=True`` by default.
        rtol, atol: as in ``torch.testing.assert_close``.

    Raises:
        AssertionError: a wrong output, a recompile or a slot that moved; the message names the swap.
        ValueError: nothing could be told from these arguments: no adapters, adapters whose outputs
            are no different, or a model that gives another output for each call.
    """
    import torch

    import fxpeft
    from fxpeft.passes.torch_private import RecompileError

    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    labels = ["off", *map(str, adapters)]
    if len(labels) == 1:
        raise ValueError("adapters: expected at least one folder, found none")

    def outputs(callee: Callable[..., Any]) -> list[Tensor]:
        return _tensors(callee(*args, **kwargs))

    with torch.no_grad():
        slots, bare = copy.deepcopy(model), copy.deepcopy(model)
        expected, halved = [outputs(bare)], [outputs(bare)]  # of "off"; twice, to see that calls repeat
        if problem := _mismatch(halved[0], expected[0], rtol, atol):
            raise ValueError(f"the bare model gives another output for each call; call eval()? {problem}")
        for number, folder in enumerate(labels[1:], start=1):
            fresh = copy.deepcopy(model)
            fxpeft.load_adapter(fresh, folder)
            expected.append(outputs(fresh))
            fxpeft.set_scale(fresh, "default", 0.5)
            halved.append(outputs(fresh))
            fxpeft.load_adapter(slots, folder, f"a{number}")
            for other, wanted in zip(labels, expected[:-1], strict=False):
                if not _mismatch(expected[-1], wanted, rtol, atol):
                    found = f"{folder} and {other} give the same output within rtol={rtol}, atol={atol}"
                    raise ValueError(f"{found}: a failed swap would not be seen")
        fxpeft.prepare_hotswap(slots, max_rank, targets=targets, **(prepare or {}))
        fxpeft.disable_adapters(slots)
        addresses = _addresses(slots)
        torch.compiler.reset()
        compiled = torch.compile(slots, **{"fullgraph": True, **(compile_options or {})})
        worst, swaps = 0.0, 0

        def check(step: str, wanted: list[Tensor]) -> None:
            nonlocal worst
            now = _addresses(slots)
            if moved := [name for name in addresses if now.get(name) != addresses[name]]:
                raise AssertionError(f"{step}: moved in memory: {', '.join(moved)}")
            try:
                found = outputs(compiled)
            except RecompileError as error:
                raise AssertionError(f"{step}: recompiled: {error}") from error
            if problem := _mismatch(found, wanted, rtol, atol):
                raise AssertionError(f"{step}: the output differs from that of a fresh load: {problem}")
            worst = max(worst, *map(_difference, found, wanted))

        with no_recompiles() as counted:
            check("off", expected[0])
            for how in ("set_adapter", "hotswap"):
                scaled = set[int]()
                for before, after in pairwise(_every_pair(len(labels))):
                    if after == 0:
                        fxpeft.disable_adapters(slots)
                    elif how == "hotswap":
                        fxpeft.hotswap(slots, labels[after])
                    else:
                        fxpeft.set_adapter(slots, f"a{after}")
                    if before == 0:
                        fxpeft.enable_adapters(slots)
                    swaps += 1
                    check(f"{labels[before]} -> {labels[after]} ({how})", expected[after])
                    if after == 0 or after in scaled or how == "hotswap":
                        continue
                    scaled.add(after)
                    for scale, wanted in ((0.5, halved[after]), (1.0, expected[after])):
                        fxpeft.set_scale(slots, f"a{after}", scale)
                        check(f"{labels[after]}: set_scale to {scale}", wanted)
    _check_base(model, slots)
    return SwapReport(counted.graphs, swaps, worst)


def _every_pair(n: int) -> Iterator[int]:
    """A walk from 0 to 0 over ``range(n)`` that takes every ordered pair once."""
    for i in range(n):
        for j in range(i + 1, n):
            yield from (i, j)
    yield 0


def _tensors(output: Any) -> list[Tensor]:
    from torch import Tensor

    from fxpeft.passes.torch_private import pytree

    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf.clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _mismatch(found: list[Tensor], wanted: list[Tensor], rtol: float, atol: float) -> str:
    """How the outputs differ; empty where they don't."""
    from torch.testing import assert_close

    try:
        assert_close(found, wanted, rtol=rtol, atol=atol)
    except AssertionError as error:
        return str(error)
    return ""


def _difference(found: Tensor, wanted: Tensor) -> float:
    other = found != wanted  # equal infinities are no distance apart
    return float((found[other] - wanted[other]).abs().max()) if other.any() else 0.0


def _addresses(model: nn.Module) -> dict[str, int]:
    from fxpeft.adapters.state import state_of
    from fxpeft.serving.swap import serving_of

    places = [f"{host}.slot".lstrip(".") for host in sorted(serving_of(state_of(model)).hosts())]
    return {f"{p}.{name}": buffer.data_ptr() for p in places for name, buffer in model.get_submodule(p).named_buffers()}


def _check_base(model: nn.Module, slots: nn.Module) -> None:
    """Assert that the base of the prepared model is that of the bare one."""
    import torch

    if list(slots.state_dict()) != list(model.state_dict()):
        raise AssertionError("the prepared model's state_dict has other keys than the bare model's")
    own = dict(slots.named_parameters())
    if changed := [n for n, p in model.named_parameters() if not torch.equal(p, own[n])]:
        raise AssertionError(f"parameters of the base changed: {', '.join(changed)}")
    if turned := [n for n, m in model.named_modules() if m.training != slots.get_submodule(n).training]:
        raise AssertionError(f"training was switched: {', '.join(turned)}")


def graph_text(graph: Any) -> str:
    """The text of a rewritten live module, a graph module, an exported program, a graph, or of text itself."""
    if isinstance(graph, str):
        return graph if graph.endswith("\n") else graph + "\n"
    from torch import fx, nn

    from fxpeft.model.wrappers import unwrap
    from fxpeft.passes import live, pipeline

    if isinstance(graph, nn.Module) and live.is_bound(unwrap(graph)):
        return str(live.generated_source(unwrap(graph)))
    if isinstance(graph, fx.Graph):
        graph = fx.GraphModule({}, graph) if graph.owning_module is None else graph.owning_module
    if isinstance(getattr(graph, "graph", None), fx.Graph):
        return str(pipeline.graph_text(graph))
    raise TypeError(f"expected a GraphModule, a rewritten module or text, found {type(graph).__name__}")


class GraphSnapshot:
    """Compares a graph with the golden text beside the test, or writes it with ``--fxpeft-update``."""

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
            temporary.write_text(text, encoding="utf-8", newline="\n")
            temporary.replace(path)
            return
        if not path.exists():
            pytest.fail(f"no snapshot {path}: run pytest with --fxpeft-update to take it, and commit it", pytrace=False)
        golden = path.read_text(encoding="utf-8")
        if golden != text:
            diff = difflib.unified_diff(golden.splitlines(True), text.splitlines(True), "snapshot", "now")
            message = f"the graph is not that of {path} (--fxpeft-update to accept):\n{''.join(diff)}"
            pytest.fail(message, pytrace=False)


def _stem(nodeid: str) -> str:
    """A file name for a test, another one for each: ``test_name``, ``TestClass.test_name[parameter]``."""
    name = nodeid.partition("::")[2].replace("::", ".")
    stem = re.sub(r"[^\w.\[\]-]+", "-", name)[:120]
    return stem if stem == name else f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--fxpeft-update`` takes graph snapshots anew."""
    text = "take the graph snapshots of fxpeft anew; --update is short for it, where nobody else has that option"
    parser.getgroup("fxpeft").addoption("--fxpeft-update", action="store_true", help=text)


if pytest is not None:

    @pytest.hookimpl(wrapper=True)
    def pytest_load_initial_conftests(
        early_config: pytest.Config, parser: pytest.Parser, args: list[str]
    ) -> Iterator[None]:
        """Know ``--update`` only where it is used and no plugin or conftest, all loaded by now, has it."""
        yield
        if "--update" in parser.parse_known_and_unknown_args(args)[1]:
            parser.getgroup("fxpeft").addoption("--update", action="store_true", dest="fxpeft_update")

    @pytest.fixture(name="no_recompiles")
    def _no_recompiles_fixture() -> Callable[..., Any]:
        """:func:`no_recompiles`."""
        return no_recompiles

    @pytest.fixture(name="graph_snapshot")
    def _graph_snapshot_fixture(request: pytest.FixtureRequest) -> GraphSnapshot:
        """A :class:`GraphSnapshot`; files are in ``snapshots/`` beside the test file."""
        update = bool(request.config.getoption("--fxpeft-update"))
        folder = request.path.parent / "snapshots" / request.path.stem
        return GraphSnapshot(folder, _stem(request.node.nodeid), update)
