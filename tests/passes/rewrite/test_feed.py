"""Feed: rewritten, unchanged, numerics, several operands, one on another, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpeft.passes import PassError, Pipeline, graph_text
from fxpeft.passes.base import GraphPass
from fxpeft.passes.live import base_class, feed_module, generated_source, unbind
from fxpeft.passes.rewrite.feed import Feed, FeedPass, call_graph


class Model(nn.Module):
    """A forward that no tracer follows: it looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)

    def forward(self, ids: Tensor, scale: float = 2.0, flag: bool | None = None, **rest: Any) -> Tensor:
        """Ids ``[n]`` to ``[n, 3]``."""
        return self.words(ids) * (scale if ids.sum() > 0 else 0) + rest.get("shift", 0)

    def twice(self, x: Tensor) -> Tensor:
        """Stands for a method that calls the forward."""
        return self(x) * 2


class Mixin:
    """Overrides a method of the model's."""

    def twice(self, x: Tensor) -> Any:
        """As the model's, plus one."""
        return super().twice(x) + 1  # type: ignore[misc]


def shifted(inputs: dict[str, Any], *, by: Tensor, words: nn.Embedding, factor: float) -> dict[str, Any]:
    """The input's ``shift`` becomes what the operand says."""
    assert words.num_embeddings == 5
    return {**inputs, "shift": by * factor}


def scaled(inputs: dict[str, Any], *, to: Tensor) -> dict[str, Any]:
    """The input's ``scale`` is the operand."""
    return {**inputs, "scale": to}


IDS = torch.tensor([1, 4, 2])
SHIFT = torch.tensor([1.0, -2.0, 3.0])


def model() -> Model:
    torch.manual_seed(0)
    made = Model()
    made.add_module("adapters", nn.Module())
    made.adapters.register_buffer("shift", SHIFT.clone())
    return made


def feed(value: Any = SHIFT, **options: Any) -> Feed:
    return Feed("test:default", shifted, {"shift": ("by", value)}, {"words": "words"}, {"factor": 0.5}, **options)


def run(graph_pass: GraphPass, graph: Any) -> Any:
    result = graph_pass(graph)
    if result.modified:
        result.graph_module.graph.lint()
        result.graph_module.recompile()
    return result


def test_rewritten() -> None:
    graph = call_graph(model().forward)
    assert "def forward(self, ids, scale = 2.0, flag = None, **rest)" in graph_text(graph)
    assert "shifted" not in graph_text(graph)
    result = run(FeedPass(feed()), graph)
    assert result.modified
    assert result.report.nodes_after == result.report.nodes_before + 3
    text = graph_text(graph)
    assert "self.adapters.shift" in text
    assert "words = self.words" in text
    assert "factor = 0.5" in text


def test_fed_once() -> None:
    graph = call_graph(model().forward)
    run(FeedPass(feed()), graph)
    before = graph_text(graph)
    again = run(FeedPass(feed()), graph)
    assert not again.modified
    assert again.graph_module is graph
    assert graph_text(graph) == before


def test_a_graph_that_is_no_call() -> None:
    with pytest.raises(PassError, match="one call of a model"):
        Pipeline([FeedPass(feed())])(torch.fx.symbolic_trace(nn.Linear(2, 3)))


def test_a_forward_without_names() -> None:
    class Positional(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return args[0]

    module = Positional()
    with pytest.raises(PassError, match=r"there: expected a forward whose arguments have names, found \*args"):
        feed_module(module, feed(), name="there")
    assert type(module) is Positional


def test_numerics_and_back() -> None:
    bound = model()
    with torch.no_grad():
        wanted = bound(IDS) + SHIFT * 0.5
        feed_module(bound, feed(bound.adapters.shift), name="")
        assert torch.equal(bound(IDS), wanted)
        assert torch.equal(bound(IDS, scale=2.0, shift=99), wanted)
        bound.adapters.shift.mul_(3)
        assert torch.equal(bound(IDS), bound.words(IDS) * 2.0 + SHIFT * 1.5)
    unbind(bound)
    assert type(bound) is Model
    assert torch.equal(bound(IDS), bound.words(IDS) * 2.0)


def test_an_operand_that_is_a_module_is_called() -> None:
    class Half(nn.Module):
        def forward(self) -> Tensor:
            return SHIFT / 2

    bound = model()
    bound.adapters.add_module("halved", Half())
    wanted = bound(IDS) + SHIFT * 0.25
    feed_module(bound, Feed("f", shifted, {"halved": ("by", Half())}, {"words": "words"}, {"factor": 0.5}), name="")
    assert torch.equal(bound(IDS), wanted)
    assert "self.adapters.halved()" in generated_source(bound)


def test_one_feed_replaces_another() -> None:
    bound = model()
    bound.adapters.register_buffer("factor", torch.tensor(7.0))
    feed_module(bound, feed(bound.adapters.shift), name="")
    feed_module(bound, Feed("scaled", scaled, {"factor": ("to", bound.adapters.factor)}), name="")
    assert torch.equal(bound(IDS), bound.words(IDS) * 7)
    unbind(bound)
    assert type(bound) is Model


def test_a_mixin_comes_before_the_model_and_keeps_its_name() -> None:
    bound = model()
    wanted = bound.twice(IDS) + SHIFT + 1
    feed_module(bound, feed(bound.adapters.shift, mixin=Mixin), name="")
    assert torch.allclose(bound.twice(IDS), wanted)
    assert type(bound).__name__ == "Model"
    assert base_class(bound) is Model
    copies = copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))
    for other in copies:
        assert type(other) is type(bound)
        assert torch.equal(other.twice(IDS), bound.twice(IDS))


def test_bound_models_share_a_class() -> None:
    one, two = model(), model()
    for bound in (one, two):
        feed_module(bound, feed(bound.adapters.shift), name="")
    assert type(one) is type(two)


def test_the_graph_is_dumped(tmp_path: Any) -> None:
    feed_module(model(), feed(), name="", dump=str(tmp_path))
    assert "shifted" in (tmp_path / "01-feed-after.py").read_text()
    assert "shifted" not in (tmp_path / "01-feed-before.py").read_text()


def told(inputs: dict[str, Any], *, by: Tensor, words: nn.Embedding, factor: float) -> dict[str, Any]:
    """Takes out an argument that the model's forward doesn't have."""
    more = inputs["more"]
    return {name: value for name, value in inputs.items() if name != "more"} | {"shift": by * factor * (more or 1)}


def doubled(output: Tensor, inputs: dict[str, Any], *, factor: float) -> Tensor:
    """Of the arguments as they came."""
    return output * (2 if inputs["more"] is None else inputs["more"]) + factor


def test_an_argument_more_and_an_end() -> None:
    """The forward shows it, before what it takes by any name; the model's own never sees it."""
    made = model()
    options: dict[str, Any] = {"takes": ("more", "flag"), "finish": doubled}
    feed_module(made, Feed("test", told, feed().operands, {"words": "words"}, {"factor": 0.5}, **options), name="model")
    assert list(inspect.signature(made.forward).parameters) == ["ids", "scale", "flag", "more", "rest"]
    words = made.words(IDS)
    torch.testing.assert_close(made(IDS, 3.0), (words * 3 + SHIFT * 0.5) * 2 + 0.5)
    torch.testing.assert_close(made(IDS, 3.0, more=5), (words * 3 + SHIFT * 2.5) * 5 + 0.5)
    unbind(made)
    assert list(inspect.signature(made.forward).parameters) == ["ids", "scale", "flag", "rest"]
