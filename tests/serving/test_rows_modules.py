"""Rows of one batch have heads, and other modules that adapters bring whole, each of their own, in one graph."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from adapter_files import save_each
from tiny import tiny_llama
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxpeft
from fxpeft import AdapterError

IDS = torch.randint(0, 17, (6, 4), generator=torch.Generator().manual_seed(1))
WHOLE = ("embed", "norm", "head")


class Head(nn.Module):
    """A head of two layers, as many classifiers have, that gives two things."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.dense(x).tanh() * scale
        return self.out_proj(h), {"hidden": h}


class Net(nn.Module):
    """Takes ids ``[rows, tokens]``, gives ``[rows, tokens, 14]``."""

    def __init__(self) -> None:
        super().__init__()
        self.dummy_inputs = {"ids": IDS[:2]}
        self.embed, self.up, self.norm, self.head = nn.Embedding(17, 6), nn.Linear(6, 7), nn.LayerNorm(7), Head()

    def forward(self, ids: Tensor) -> Tensor:
        y, more = self.head(self.norm(self.up(self.embed(ids))), scale=0.5)
        return torch.cat((y, more["hidden"]), -1)


CONFIGS: dict[str, Any] = {
    "plain": fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["up"]),
    "head": fxpeft.LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["up"], modules_to_save=["head"]),
    "all": fxpeft.LoraConfig(r=1, lora_alpha=2, target_modules=["up"], modules_to_save=list(WHOLE)),
    "norm": fxpeft.LNTuningConfig(target_modules=["norm"]),
}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def prepared(folders: Mapping[str, str], **settings: Any) -> Net:
    model = net()
    settings = {"lanes": 3, "methods": ("lora", "ln_tuning"), **settings}
    fxpeft.prepare_hotswap(model, 8, targets=["up"], modules_to_save=WHOLE, **settings)
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    fxpeft.set_adapter(model, "head")
    return model


class Case(NamedTuple):
    folders: dict[str, str]
    expected: dict[str | None, Tensor]
    model: Net
    call: Any
    counter: CompileCounterWithBackend


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    torch._dynamo.reset()
    folders, expected = save_each(net, CONFIGS, tmp_path_factory.mktemp("modules")), {}
    with torch.no_grad():
        expected[None] = net()(IDS)
        for name, folder in folders.items():
            fxpeft.load_adapter(alone := net(), folder)
            expected[name] = alone(IDS)
        model, counter = prepared(folders), CompileCounterWithBackend("aot_eager")
        call = torch.compile(model, backend=counter, fullgraph=True)  # by Inductor in test_rows_prompts.py
        with fxpeft.rows(model, ["plain"] * 6):
            call(IDS)
    yield Case(folders, expected, model, call, counter)
    torch._dynamo.reset()


def check(model: Any, call: Any, names: Sequence[Any], case: Case) -> None:
    with torch.no_grad(), fxpeft.rows(model, names):
        found = call(IDS)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], case.expected[name][row], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_row_has_its_own_in_one_graph(case: Case) -> None:
    model, call, counter = case.model, case.call, case.counter
    draw = random.Random(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names in (["plain", "head", None, "all"], [None] * 6, ["head"] * 6, ["norm", "head", None]):
            names = (names * 6)[:6]
            check(model, call, names, case)
            check(model, model, names, case)
        for _ in range(8):
            names = ["head", *draw.sample(list(CONFIGS), 2)]  # the active one is resident, too
            check(model, call, [draw.choice([None, *names]) for _ in range(6)], case)
        graphs = counter.frame_count
    with torch.no_grad():
        fxpeft.set_adapter(model, "norm")
        torch.testing.assert_close(model(IDS), case.expected["norm"], rtol=1e-5, atol=1e-5)
        check(model, call, ["all", "head", None] * 2, case)  # whatever is active
        fxpeft.set_adapter(model, "head")
        torch.testing.assert_close(model(IDS), case.expected["head"], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == graphs == 1
    every = [[draw.choice([None, "plain", "head", "all"]) for _ in range(4)] for _ in range(6)]
    with torch.no_grad(), fxpeft.tokens(model, every):
        found = model(IDS)
    for row, own in enumerate(every):
        for place, name in enumerate(own):
            torch.testing.assert_close(found[row, place], case.expected[name][row, place], rtol=1e-5, atol=1e-5)


def test_mixtures_have_what_active_adapters_have(case: Case) -> None:
    reference = net()
    for name in ("plain", "head", "norm"):
        fxpeft.load_adapter(reference, case.folders[name], name)
    fxpeft.set_adapter(reference, ["plain", "head", "norm"])  # one brings the head, another the norm
    fxpeft.set_scale(reference, "plain", 0.7)
    fxpeft.set_scale(reference, "head", -0.3)
    with torch.no_grad():
        with fxpeft.rows(case.model, [{"plain": 0.7, "head": -0.3, "norm": 1}, None] * 3):
            found = case.model(IDS)
        torch.testing.assert_close(found[::2], reference(IDS)[::2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1::2], case.expected[None][1::2], rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match=r"each brings its own\n.*norm: all and norm"):
        fxpeft.rows(case.model, [{"all": 1, "norm": 1}]).__enter__()
    with (
        fxpeft.rows(case.model, ["head"] * 4),
        pytest.raises(AdapterError, match=r"embed: expected 4 rows.*\[6, 4, 6\]"),
    ):
        case.model(IDS)


def test_lanes_follow_adapters_and_the_base(case: Case, tmp_path: Path) -> None:
    model = prepared(case.folders, lanes=2)
    fxpeft.set_adapter(model, [])
    for names in (["head", "plain"], ["all", None], ["norm", "head"], ["plain", "norm"]):  # one comes where another was
        check(model, model, names * 3, case)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check(copied, copied, ["head", "all"] * 3, case)
    with fxpeft.rows(model, ["head", "plain"] * 3), torch.no_grad():
        fxpeft.hotswap(model, case.folders["all"], "head")
        torch.testing.assert_close(model(IDS)[::2], case.expected["all"][::2], rtol=1e-5, atol=1e-5)
    torch.manual_seed(5)
    other = Net().eval()
    model.load_state_dict(other.state_dict())
    with torch.no_grad(), fxpeft.rows(model, [None, "plain"] * 3):
        torch.testing.assert_close(model(IDS)[::2], other(IDS)[::2], rtol=1e-5, atol=1e-5)
    fxpeft.load_adapter(other, case.folders["plain"])
    with torch.no_grad(), fxpeft.rows(model, [None, "plain"] * 3):
        torch.testing.assert_close(model(IDS)[1::2], other(IDS)[1::2], rtol=1e-5, atol=1e-5)


def test_a_store_hands_heads_to_rows(case: Case, tmp_path: Path) -> None:
    model = prepared({"head": case.folders["head"]})
    store = fxpeft.AdapterStore(model, Path(case.folders["all"]).parent)
    with torch.no_grad(), store.rows(["all", None, "head"] * 2):
        found = model(IDS)
    store.close()
    for row, name in enumerate(["all", None, "head"] * 2):
        torch.testing.assert_close(found[row], case.expected[name][row], rtol=1e-5, atol=1e-5)


def test_beams_have_the_head_of_their_row(tmp_path: Path) -> None:
    def make() -> Any:
        return tiny_llama()

    configs = {
        "a": fxpeft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "b": fxpeft.LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }
    folders, model = save_each(make, configs, tmp_path), make()
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj"], modules_to_save=["lm_head"], lanes=2)
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    ids, names = IDS[:3], ["b", "__base__", "a"]
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **settings}
        expected = []
        for row, name in enumerate(names):
            alone = make()
            if name in folders:
                fxpeft.load_adapter(alone, folders[name])
            expected += list(alone.generate(ids[row : row + 1], **settings))
        assert torch.equal(model.generate(ids, adapter_names=names, **settings), torch.stack(expected))


def test_what_rows_cannot_have_is_for_all_rows() -> None:
    class Writes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    class Flat(Net):
        def __init__(self) -> None:
            super().__init__()
            self.writes = Writes(7, 7)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(self.writes(self.up(self.embed(ids))))
            return self.head(x.flatten(0, 1), scale=1.0)[0] + self.norm.weight.sum()

    torch.manual_seed(0)
    model = Flat().eval()
    fxpeft.prepare_hotswap(model, 8, targets=["up"], modules_to_save=["head", "norm", "writes"], lanes=2)
    for name in ("head", "norm", "writes"):
        config = fxpeft.LoraConfig(r=2, target_modules=["up"], modules_to_save=[name], init_lora_weights=False)
        fxpeft.add_adapter(model, config, name)
    flat = r"'head' brings head \(an input of \[\d+, 7\] for a batch of \d+\), which"
    for active, other, told in (
        ("norm", "head", flat),
        ("head", "norm", flat),  # the active one would be every row's
        ("norm", "writes", r"'writes' brings writes \(an input that it writes to\), which"),
    ):
        fxpeft.set_adapter(model, active)
        with pytest.raises(AdapterError, match=told), fxpeft.rows(model, [other] * 6):
            pass
    fxpeft.set_adapter(model, "norm")
    model(IDS)  # a call without rows has a weight to give
    with (
        fxpeft.rows(model, ["norm"] * 6),
        pytest.raises(AdapterError, match=r"norm: forward .* computes with its weight"),
    ):
        model(IDS)


def test_layers_that_are_compiled_each_share_a_graph() -> None:
    """Traced alone, since it is Dynamo that would compile anew: for the name of a site, say."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.up(x))  # type: ignore[no-any-return]

    model = nn.Sequential(*(Block() for _ in range(3))).eval()
    model.dummy_inputs = {"input": torch.zeros(2, 3, 6)}
    fxpeft.prepare_hotswap(
        model, 8, targets=["up"], methods=("lora", "dora", "ln_tuning"), modules_to_save=["norm"], lanes=2
    )
    config = fxpeft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["norm"], init_lora_weights=False)
    fxpeft.add_adapter(model, config, "a")
    counter, x = CompileCounterWithBackend("eager"), torch.randn(2, 3, 6)
    with torch.no_grad(), fxpeft.rows(model, ["a", None]):
        expected = model(x)
        for block in model:
            block.compile(backend=counter)
        torch.testing.assert_close(model(x), expected)
    assert counter.frame_count == 1
