"""Roles from the data flow: against a table of each family's names, and on models nobody has named."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from role_table import FAMILIES, make, roles_of
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.model.trace import model_flow, trace_model
from fxpeft.passes import MatchPass, PassError, Role, RolePass, pattern
from fxpeft.passes.targets.flow import flow_of
from fxpeft.passes.targets.roles import ROLES, declare, find_roles

EXAMPLES = Path(__file__).parents[2] / "examples"


def found(model: nn.Module) -> dict[str, str]:
    return {site: " ".join(own) for site, own in fxpeft.roles(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_the_roles_of_its_table(family: str) -> None:
    assert found(make(family)) == roles_of(family)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, "eager") for family in ("llama", "gpt2", "bert", "whisper")),
        *((family, "flex_attention") for family in ("llama", "bart")),
    ],
)
def test_roles_do_not_depend_on_how_attention_runs(family: str, attention: str) -> None:
    model = make(family, attention)
    before = model.config._attn_implementation
    assert found(model) == roles_of(family)
    assert model.config._attn_implementation == before


def scramble(model: nn.Module) -> dict[str, str]:
    """Let the gate and the down projection of each of a Llama's layers trade names."""
    renamed = {}
    for at, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        layer.mlp.gate_proj, layer.mlp.down_proj = layer.mlp.down_proj, layer.mlp.gate_proj

        class Swapped(type(layer.mlp)):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Tensor:
                return self.gate_proj(self.act_fn(self.down_proj(x)) * self.up_proj(x))

        layer.mlp.__class__ = Swapped
        renamed[f"model.layers.{at}.mlp.gate_proj"] = "mlp.down"
        renamed[f"model.layers.{at}.mlp.down_proj"] = "mlp.gate"
    return renamed


def test_names_say_nothing() -> None:
    model = make("llama")
    renamed = scramble(model)
    assert found(model) == {**roles_of("llama"), **renamed}


def test_tracing_reads_no_weight_and_leaves_the_model_alone() -> None:
    model = make("llama")
    model.train()
    model.model.layers[0].eval()
    model.model.norm.register_forward_hook(lambda *a: pytest.fail("a hook ran"))
    modes = [m.training for m in model.modules()]
    model.to("meta")
    assert found(model) == roles_of("llama")
    assert [m.training for m in model.modules()] == modes
    assert all(p.is_meta for p in model.parameters())


def test_an_adapted_or_prepared_model_has_the_roles_of_its_base() -> None:
    model = make("llama")
    fxpeft.add_adapter(model, LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", modules_to_save=["lm_head"]))
    assert found(model) == roles_of("llama")
    fxpeft.prepare_hotswap(model, 8, targets="all-linear")
    assert found(model) == roles_of("llama")


class Attention(nn.Module):
    """Written in one of several ways, with a norm and a rotation between projection and product."""

    def __init__(self, written: str, context: int | None = None) -> None:
        super().__init__()
        self.written = written
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(context or 8, 12), nn.Linear(context or 8, 12)
        self.norm, self.d = nn.RMSNorm(6), nn.Linear(12, 8)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, 2, 6).transpose(1, 2)

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), torch.ones(3))
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = x if context is None else context
        q, k, v = self.turn(self.norm(self.split(self.a(x)))), self.turn(self.split(self.b(y))), self.split(self.c(y))
        if self.written == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.written == "flex":
            out = flex_attention(q, k, v)
        elif self.written == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 6**0.5
            out = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        elif self.written == "bmm":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            scores = torch.bmm(q, k.mT) + torch.zeros(1, q.shape[1], k.shape[1])
            out = torch.bmm(F.dropout(torch.softmax(scores, -1), 0.1, self.training), v).unflatten(0, (-1, 2))
        else:
            scores = (q * 0.4) @ k.transpose(-1, -2)
            scores = torch.where(torch.ones(scores.shape[-2:]).tril().bool(), torch.tanh(scores / 30) * 30, -1e9)
            out = F.softmax(scores.float(), -1).to(v.dtype) @ v
        return self.d(out.transpose(1, 2).reshape(x.shape[0], -1, 12))


class Block(nn.Module):
    """An attention and a residual; ``crossed`` reads other states than its own."""

    def __init__(self, written: str, crossed: bool) -> None:
        super().__init__()
        self.entry, self.other = nn.Linear(5, 8), nn.Linear(4, 7)
        self.mix = Attention(written, 7 if crossed else None)
        self.crossed = crossed

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.entry(x)
        return h + self.mix(h, self.other(y) if self.crossed else None)


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("written", ["sdpa", "flex", "einsum", "bmm", "where"])
def test_attention_is_found_however_it_is_written(written: str, crossed: bool) -> None:
    inputs = {"x": torch.ones(2, 4, 5), "y": torch.ones(2, 3, 4)}
    known = fxpeft.roles(Block(written, crossed), inputs)
    kind = "cross_attention" if crossed else "attention"
    expected = {"mix.a": "query", "mix.b": "key", "mix.c": "value", "mix.d": "output"}
    mixed = {site: role for site, (role,) in known.items() if site.startswith("mix")}
    assert mixed == {site: f"{kind}.{part}" for site, part in expected.items()}


class Feed(nn.Module):
    """A feed-forward of one shape or another."""

    def __init__(self, written: str) -> None:
        super().__init__()
        wide = written in ("chunk", "glu")
        self.p, self.q, self.r = nn.Linear(8, 20 if wide else 10), nn.Linear(8, 10), nn.Linear(10, 8)
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        if self.written == "plain":
            return x + self.r(F.gelu(self.p(x)))
        if self.written == "square":
            return x + self.r(torch.relu(self.p(x)) ** 2)
        if self.written == "gated":
            return x + self.r(self.p(x) * F.silu(self.q(x)))
        if self.written == "glu":
            return x + self.r(F.glu(self.p(x)))
        if self.written == "chunk":
            up, gate = self.p(x).chunk(2, -1)
            return x + self.r(torch.sigmoid(gate) * up)
        if self.written == "linear":  # no activation between: two projections, no feed-forward
            return x + self.r(self.p(x))
        return self.r(torch.tanh(self.p(x))).softmax(-1)  # a pooler and its classifier


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("plain", {"p": "mlp.up", "r": "mlp.down"}),
        ("square", {"p": "mlp.up", "r": "mlp.down"}),
        ("gated", {"p": "mlp.up", "q": "mlp.gate", "r": "mlp.down"}),
        ("glu", {"p": "mlp.gate_up", "r": "mlp.down"}),
        ("chunk", {"p": "mlp.gate_up", "r": "mlp.down"}),
        ("linear", {}),
        ("pooler", {"r": "head"}),
    ],
)
def test_feed_forwards_of_every_shape(written: str, expected: dict[str, str]) -> None:
    known = fxpeft.roles(Feed(written), {"x": torch.ones(2, 8)})
    assert {site: role for site, (role,) in known.items()} == expected


def test_role_pass_annotates_graphs_of_torch_fx_too() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)))
    result = RolePass()(graph)
    assert result.modified
    assert {n.name: n.meta["fxpeft.role"] for n in graph.graph.nodes if "fxpeft.role" in n.meta} == {
        "_0": "embedding.token", "_1": "lm_head",
    }  # fmt: skip
    assert not RolePass()(graph).modified
    assert MatchPass(pattern("role:lm_head"))(graph).report.matched == ("1",)


def test_experts_in_a_list_are_feed_forwards() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 3)
            self.experts = nn.ModuleList(Feed("chunk") for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            weight, chosen = self.router(x).softmax(-1).topk(2)
            out = torch.zeros_like(x)
            for at, expert in enumerate(self.experts):
                out = out + expert(x) * ((chosen == at) * weight).sum(-1, keepdim=True)
            return x + out

    known = fxpeft.roles(Experts(), {"x": torch.ones(2, 8)})
    assert known == {
        "router": ("router",),
        **{f"experts.{i}.{p}": (f"mlp.{r}",) for i in range(3) for p, r in (("p", "gate_up"), ("r", "down"))},
    }


def test_a_flow_is_small_and_says_what_lies_between() -> None:
    flow = flow_of(trace_model(make("llama")))
    ops = [data["op"] for _, data in flow.nodes(data=True)]
    assert {op: ops.count(op) for op in set(ops)} == {
        "input": 2, "output": 1, "embedding": 1, "linear": 15, "attention": 2, "product": 2, "sum": 4,
    }  # fmt: skip
    (gate,) = [v for v, d in flow.nodes(data=True) if d["site"] == "model.layers.0.mlp.gate_proj"]
    ((_, after, data),) = flow.out_edges(gate, data=True)
    assert (flow.nodes[after]["op"], data["via"]) == ("product", ("silu",))


def test_a_linear_whose_weight_is_packed_is_traced_as_a_linear() -> None:
    class Packed(nn.Module):
        def __init__(self, into: int, out: int) -> None:
            super().__init__()
            self.in_features, self.out_features = into, out
            self.register_buffer("weight", torch.zeros(into * out // 2, dtype=torch.uint8))

        def forward(self, x: Tensor) -> Tensor:
            pytest.fail("only a GPU can run this")

    net = Feed("gated")
    net.p, net.r = Packed(8, 10), Packed(10, 8)
    assert fxpeft.roles(net, {"x": torch.ones(2, 8)}) == {"p": ("mlp.up",), "q": ("mlp.gate",), "r": ("mlp.down",)}


# --- roles of your own ---


@pytest.mark.parametrize(
    ("text", "gives", "message"),
    [
        ("a:linear -> b", {"a": "x"}, "'b' has no operation; write b:linear"),
        ("a:linear -{fast}-> b:sum", {"a": "x"}, "expected one of activation, !activation, plain, found 'fast'"),
        ("a:linear => b:sum", {"a": "x"}, "expected name:operation"),
        ("a:linear -> b:sum", {"c": "x"}, "has no vertex c"),
    ],
)
def test_a_role_that_cannot_be_read(text: str, gives: dict[str, str], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Role(text, gives)


def test_the_first_pattern_names_a_vertex() -> None:
    flow = model_flow(make("llama"))
    own = Role("x:linear -> a:attention", {"x": "mine"})
    assert set(find_roles(flow, [own]).values()) == {"mine"}
    assert list(find_roles(flow, [own, *ROLES]).values()).count("mine") == 6
    assert "mine" not in find_roles(flow, [*ROLES, own]).values()


def test_the_example_declares_a_role_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("fxpeft.passes.targets.roles.ROLES", list(ROLES))
    runpy.run_path(str(EXAMPLES / "own_role.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        "model.layers.0.self_attn.kv_a_proj_with_mqa", "model.layers.0.self_attn.q_a_proj",
        "model.layers.1.self_attn.kv_a_proj_with_mqa", "model.layers.1.self_attn.q_a_proj",
    ]  # fmt: skip


def test_declaring_twice_is_declaring_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpeft.passes.targets.roles.ROLES", list(ROLES))
    from fxpeft.passes.targets import roles

    own = Role("x:linear -> a:attention", {"x": "mine"})
    declare(own)
    declare(own)
    assert [own, *ROLES] == roles.ROLES


# --- models that can't be traced ---


class Silent(nn.Module):
    """Names no inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x)


class Deciding(Silent):
    """What it computes depends on values."""

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"x": torch.ones(2, 5)}

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) if x.sum() > 3 else x


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Silent, "Silent doesn't say what its inputs are.*pass inputs="),
        (Deciding, "torch.export can't trace Deciding: .*\n.*pass inputs=.*or name targets by name:"),
    ],
)
def test_a_model_that_cannot_be_traced_says_what_to_do(kind: Callable[[], nn.Module], message: str) -> None:
    model = kind()
    with pytest.raises(AdapterError, match=message):
        fxpeft.roles(model)
    with pytest.raises(AdapterError, match=message):
        fxpeft.add_adapter(model, LoraConfig(target_modules="role:head"))
    assert "_fxpeft" not in vars(model)
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules="kind:linear"))
    assert fxpeft.roles(Silent(), {"x": torch.ones(2, 5)}) == {"line": ("head",)}
