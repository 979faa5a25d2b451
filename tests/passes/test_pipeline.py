"""The pipeline: reports, dumped graphs, and lint and recompile only where something changed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from graphs import FORMS, IDS, lora, matched
from torch.fx import GraphModule

from fxpeft.passes import EjectPass, GraphPass, InjectPass, Linear, MatchPass, Pipeline, Report, graph_text, pipeline
from fxpeft.passes.base import RewriteResult, Skip


class Counted(GraphPass):
    """Says it changed the graph, or not."""

    name = "counted"

    def __init__(self, modified: bool) -> None:
        self.modified = modified

    def call(self, graph_module: GraphModule) -> RewriteResult:
        """Changes nothing."""
        return RewriteResult(graph_module, self.modified, Report(self.name))


class Broken(GraphPass):
    """Leaves a graph that doesn't pass lint."""

    name = "broken"

    def call(self, graph_module: GraphModule) -> RewriteResult:
        """Moves the output before what it returns."""
        output = next(n for n in graph_module.graph.nodes if n.op == "output")
        next(iter(graph_module.graph.nodes)).prepend(output)
        return RewriteResult(graph_module, True, Report(self.name))


def passes() -> list[GraphPass]:
    return [MatchPass(lambda site: site in ("up", "down")), InjectPass({"up": [lora(Linear(6, 10))]})]


def test_one_report_per_pass() -> None:
    graph_module = FORMS["aten"]()
    pipeline = Pipeline(passes())
    assert pipeline.reports == ()
    assert pipeline(graph_module) is graph_module
    match, inject = pipeline.reports
    assert (match.name, match.matched) == ("match", ("up", "down"))
    assert (inject.name, inject.matched, inject.skipped) == ("inject", ("up",), (Skip("down", "has no rewrite"),))
    assert inject.nodes_before == match.nodes_after
    assert inject.nodes_after == len(graph_module.graph.nodes) > inject.nodes_before
    pipeline(FORMS["aten"]())
    assert len(pipeline.reports) == 2  # those of the last call


def test_reports_are_readable() -> None:
    report = Report("inject", ("a",), (Skip("b", "has no rewrite"), Skip("", "not selected")), 3, 8)
    assert str(report).splitlines() == [
        "inject: 1 matched, 2 skipped, 3 -> 8 nodes",
        "  skipped b: has no rewrite",
        "  skipped (root): not selected",
    ]


def test_reports_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fxpeft"):
        Pipeline(passes())(FORMS["call_module"]())
    logged = [r.getMessage().splitlines()[0] for r in caplog.records if r.name == "fxpeft.passes.pipeline"]
    assert logged == ["match: 2 matched, 2 skipped, 9 -> 9 nodes", logged[1], logged[2]]
    assert logged[1].startswith("inject: 1 matched, 1 skipped, 9 -> ")
    assert logged[2] == "nodes of inject: add 1 -> 2, linear 0 -> 2, mul 0 -> 1, type_as 0 -> 2"


def test_dumps_every_graph_before_and_after(tmp_path: Path) -> None:
    graph_module = FORMS["aten"]()
    bare = graph_text(graph_module)
    folder = tmp_path / "new" / "dump"
    Pipeline([*passes(), EjectPass()], dump=folder)(graph_module)
    text = {path.name: path.read_text() for path in folder.iterdir()}
    names = ("01-match", "02-inject", "03-eject")
    assert sorted(text) == sorted(f"{name}-{when}.py" for name in names for when in ("before", "after"))
    same = ("01-match-before.py", "01-match-after.py", "02-inject-before.py", "03-eject-after.py")
    assert {text[name] for name in same} == {bare}
    assert text["02-inject-after.py"] == text["03-eject-before.py"] != bare
    assert "adapters.up.mine.a" in text["02-inject-after.py"]
    for source in text.values():
        compile(source, "dump", "exec")


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Pipeline(passes())(FORMS["call_module"]())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("modified", [True, False])
def test_lints_and_recompiles_only_what_changed(modified: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = matched(FORMS["call_module"]())
    calls: list[str] = []
    monkeypatch.setattr(type(graph_module), "recompile", lambda self: calls.append("recompile"))
    monkeypatch.setattr(torch.fx.Graph, "lint", lambda self: calls.append("lint"))
    Pipeline([Counted(modified), Counted(False)])(graph_module)
    assert calls == (["lint", "recompile"] if modified else [])


def test_a_broken_graph_is_caught() -> None:
    with pytest.raises(RuntimeError):
        Pipeline([Broken()])(FORMS["call_module"]())


def test_runs_passes_in_order() -> None:
    graph_module = FORMS["call_module"]()
    output = graph_module(IDS)
    pipeline = Pipeline([*passes(), EjectPass(), *passes()])
    result = pipeline(graph_module)(IDS)
    assert [r.name for r in pipeline.reports] == ["match", "inject", "eject", "match", "inject"]
    assert not torch.allclose(result, output, atol=0.01)


def test_a_drawing_is_made_when_it_is_asked_for_and_shows_that_call(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    make = pipeline.drawing_of
    monkeypatch.setattr(pipeline, "drawing_of", lambda *args, **more: drawn.append(1) or make(*args, **more))
    graph_module = matched(FORMS["functional"]())
    inject = Pipeline([InjectPass({"up": [lora(Linear(6, 10))]})])
    inject(graph_module)
    assert not drawn
    Pipeline([EjectPass()])(graph_module)
    labels = [data["label"] for _, data in inject.draw().after.nodes(data=True) if data["new"]]
    assert "linear\na [4, 6]" in labels  # ejected and deleted since
    assert len(drawn) == 2
