"""Rows, and tokens, of one batch have adapters of their own, each what it is alone, in one compiled graph."""

from __future__ import annotations

import asyncio
import copy
import pickle
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import lane_net
import pytest
import torch
from adapter_files import add
from lane_net import CONFIGS, IDS, Net, alone, prepared
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fxpeft
from fxpeft import AdapterError
from fxpeft.passes.slots.copies import Copies

NAMES = tuple(CONFIGS)


class Case(NamedTuple):
    folders: dict[str, str]
    expected: dict[str | None, Tensor]


class Compiled(NamedTuple):
    model: Net
    call: Any
    counter: CompileCounterWithBackend


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folders = lane_net.write(tmp_path_factory.mktemp("lanes"))
    return Case(folders, {None: alone(None), **{name: alone(folder) for name, folder in folders.items()}})


@pytest.fixture
def model(case: Case) -> Net:
    return prepared(case.folders)


@pytest.fixture(scope="module")
def compiled(case: Case) -> Iterator[Compiled]:
    torch._dynamo.reset()
    model = prepared(case.folders)
    counter = CompileCounterWithBackend("inductor")
    call = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), fxpeft.rows(model, ["lora"] * 8):
        call(IDS)  # the one compilation of calls that name rows
    yield Compiled(model, call, counter)
    torch._dynamo.reset()


def check(model: Any, call: Callable[[Tensor], Tensor], names: Sequence[Any], case: Case) -> None:
    """Each row is what its adapter gives alone."""
    with torch.no_grad(), fxpeft.rows(model, names):
        found = call(IDS)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], case.expected[name][row], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_row_is_its_adapter_alone_in_one_graph(compiled: Compiled, case: Case) -> None:
    model, call, counter = compiled
    draw = random.Random(0)
    graphs = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(model, call, [*NAMES, None], case)
        for _ in range(12):
            names = [draw.choice([None, *NAMES]) for _ in range(8)]
            check(model, call, names, case)
            check(model, model, names, case)
        check(model, call, [None] * 8, case)
        with torch.no_grad(), fxpeft.rows(model, [{"lora": 0.7, "rslora": -0.3}] * 4 + [{"bias": 0.5}] * 4):
            found = call(IDS)
    assert counter.frame_count == graphs
    reference = lane_net.net()
    for name in ("lora", "rslora", "bias"):
        fxpeft.load_adapter(reference, case.folders[name], name)
    for rows, scales in ((slice(0, 4), {"lora": 0.7, "rslora": -0.3}), (slice(4, 8), {"bias": 0.5})):
        fxpeft.set_adapter(reference, list(scales))
        for name, scale in scales.items():
            fxpeft.set_scale(reference, name, scale)
        torch.testing.assert_close(found[rows], reference(IDS)[rows], rtol=1e-5, atol=1e-5)


def test_a_call_without_rows_has_the_active_adapters(compiled: Compiled, case: Case) -> None:
    model, call, counter = compiled
    with torch.no_grad():
        for name in ("dora", "bias", "ia3", "lora"):
            fxpeft.set_adapter(model, name)
            torch.testing.assert_close(call(IDS), case.expected[name], rtol=1e-5, atol=1e-5)
            check(model, call, ["lora", None, "rslora", name] * 2, case)
            torch.testing.assert_close(call(IDS), case.expected[name], rtol=1e-5, atol=1e-5)
        with fxpeft.disabled(model):
            torch.testing.assert_close(call(IDS), case.expected[None], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


def test_names_in_the_call(compiled: Compiled, case: Case) -> None:
    model, call, _ = compiled
    names = ["lora", "__base__", "dora", "ia3", "bias", "lora", "adalora", "rslora"]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for each in (model, call):
            found = each(IDS, adapter_names=names)
            for row, name in enumerate(names):
                expected = case.expected[None if name == "__base__" else name][row]
                torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match="no adapter named 'x'"):
        model(IDS, adapter_names=["x"] * 8)


def test_rows_are_those_of_their_thread_and_task(compiled: Compiled, case: Case) -> None:
    model, call, _ = compiled
    fxpeft.set_adapter(model, "lora")
    errors: list[BaseException] = []

    def other(name: str | None) -> None:
        try:
            with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
                for _ in range(10):  # of one graph: torch 2.13 may miss one while another thread calls another
                    torch.testing.assert_close(model(IDS), case.expected["lora"], rtol=1e-5, atol=1e-5)
                    check(model, call, [name] * 8, case)
                    check(model, model, [None, name] * 4, case)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    running = [threading.Thread(target=other, args=(name,)) for name in ("dora", "ia3")]
    for thread in running:
        thread.start()
    for _ in range(10):
        check(model, call, ["rslora", None, "bias", "lora"] * 2, case)
    for thread in running:
        thread.join(60)
    assert not errors

    async def task(name: str) -> Tensor:
        with fxpeft.rows(model, [name] * 8):
            await asyncio.sleep(0)
            first = model(IDS).detach()  # gradients are switched for a thread, not for a task
            torch.testing.assert_close((await asyncio.to_thread(model, IDS)).detach(), first)
            return first  # type: ignore[no-any-return]

    async def both() -> list[Tensor]:
        return await asyncio.gather(task("dora"), task("adalora"))

    for name, found in zip(("dora", "adalora"), asyncio.run(both()), strict=True):
        torch.testing.assert_close(found, case.expected[name], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), case.expected["lora"], rtol=1e-5, atol=1e-5)


def test_other_counts_of_rows_are_refused(compiled: Compiled, case: Case) -> None:
    model, call, _ = compiled
    for each in (model, call):
        with fxpeft.rows(model, ["lora"] * 3), pytest.raises(Exception, match=r"embed: expected 3 rows.*\[8, 5\]"):
            each(IDS)
    check(model, call, ["lora", None] * 4, case)


def test_other_versions_are_seen_by_the_next_call(model: Net, case: Case) -> None:
    with fxpeft.rows(model, ["lora", "rslora"] * 4), torch.no_grad():
        before = model(IDS)
        fxpeft.set_scale(model, "lora", 0.5)
        fxpeft.set_adapter(model, "dora")  # and others beside them
        halved = model(IDS)
        fxpeft.set_scale(model, "lora", 1)
        torch.testing.assert_close(model(IDS), before)
        fxpeft.hotswap(model, case.folders["adalora"], "lora")  # of another rank and method
        swapped = model(IDS)
        fxpeft.delete_adapter(model, "lora")
        assert torch.equal(model(IDS), swapped)  # a block that is open finishes with what it has
    torch.testing.assert_close(swapped[0], case.expected["adalora"][0], rtol=1e-5, atol=1e-5)
    for found in (before, halved, swapped):
        torch.testing.assert_close(found[1], case.expected["rslora"][1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[0], halved[0])
    with pytest.raises(AdapterError, match="no adapter named 'lora'"), fxpeft.rows(model, ["lora"] * 8):
        pass


def test_residents_go_when_nobody_names_them(case: Case) -> None:
    model = prepared(case.folders, max_rank=13, lanes=3)
    fxpeft.set_adapter(model, [])
    for names in (["lora", "rslora"], ["dora", "bias"], ["ia3", "lora", "rslora"], [None, "adalora"]):
        check(model, model, (names * 8)[:8], case)
    with fxpeft.rows(model, ["lora", "rslora"]):
        with pytest.raises(AdapterError, match=r"15 ranks side by side of .*, adalora, more than max_rank 13"):
            check(model, model, ["adalora"] * 8, case)
        check(model, model, ["bias", "lora"] * 4, case)
        with fxpeft.rows(model, ["bias"]), pytest.raises(AdapterError, match=r"4 adapters at once .* the 3 lanes"):
            fxpeft.set_adapter(model, "ia3")
        check(model, model, ["lora", "rslora"] * 4, case)
    check(model, model, ["adalora", "ia3"] * 4, case)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora", "nobody"], "no adapter named 'nobody'; loaded: lora"),
        ("lora", "rows: expected a name, names with weights, or None for each row, found 'lora'"),
        ([], "found \\[\\]"),
        ([3], "found 3"),
        ([{"lora": float("nan")}], "lora: expected a finite number as its weight, found nan"),
        ([{"dora": 0.5}], "dora: expected the weight 1, found 0.5: its gains .dora."),
        ([{"ia3": 1, "lora": 1}], "can't share a slot"),
    ],
)
def test_wrong_names_change_nothing(names: Any, message: str, case: Case, model: Net) -> None:
    refused(model, names, message)


def test_biases_of_an_adapters_own_are_for_all_rows() -> None:
    model = lane_net.net()
    fxpeft.prepare_hotswap(model, 8, targets=["up"], bias="lora_only", lanes=3)
    for name, bias in (("plain", "none"), ("bias", "lora_only")):
        config = fxpeft.LoraConfig(r=2, target_modules=["up"], bias=bias, init_lora_weights=False)  # type: ignore[arg-type]
        fxpeft.add_adapter(model, config, name)
    refused(model, ["bias"] * 8, r"adapter 'bias' brings up\.bias, which rows")
    refused(
        model, ["plain"] * 8, r"adapter 'bias' brings up\.bias, which rows"
    )  # the active one's would be every row's
    fxpeft.set_adapter(model, "plain")
    with fxpeft.rows(model, ["plain"] * 8), pytest.raises(AdapterError, match="adapter 'bias' brings up"):
        fxpeft.set_adapter(model, "bias")


def refused(model: Net, names: Any, message: str) -> None:
    """Rows can't have these, and nothing was changed."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    expected = model(IDS)
    with pytest.raises(AdapterError, match=message), fxpeft.rows(model, names):
        pass
    assert torch.equal(model(IDS), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.slow
def test_one_token_of_each_row_sums_its_own_ranks(case: Case) -> None:
    class Short(Net):
        """A graph of its own."""

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids)

    torch.manual_seed(0)
    model, short = Short().eval(), IDS[:, :1]
    fxpeft.prepare_hotswap(model, 24, targets=["up", "down"], methods=lane_net.METHODS, lanes=4)
    configs = {"two": 2, "five": 5, "one": 1}
    for seed, (name, rank) in enumerate(configs.items()):
        config = fxpeft.LoraConfig(r=rank, lora_alpha=3, target_modules=["up", "down"][: 1 + rank % 2])
        add(model, config, name, seed)
    fxpeft.load_adapter(model, case.folders["adalora"], "adalora")
    expected = {}
    for name in (*configs, "adalora", None):
        fxpeft.set_adapter(model, [] if name is None else name)
        expected[name] = model(short).detach()
    call = torch.compile(model, fullgraph=True)
    draw = random.Random(1)
    with torch.no_grad():
        with fxpeft.rows(model, ["two"] * 8):
            call(short)
        for number in range(10):
            names = [draw.choice(["two", "one", None, *(["adalora", "five"] if number % 2 else [])]) for _ in range(8)]
            last = {"two": 2.0, "five": -1.0} if number % 3 == 1 else names[7]  # each row's most ranks: 2, 5, 7
            with torch._dynamo.config.patch(error_on_recompile=True), fxpeft.rows(model, [*names[:7], last]):
                found, also = call(short), model(short)
            torch.testing.assert_close(found, also, rtol=1e-5, atol=1e-5)
            for row, name in enumerate(names[:7]):
                torch.testing.assert_close(found[row], expected[name][row], rtol=1e-5, atol=1e-5)


def test_tokens_have_their_own(case: Case) -> None:
    class Tokens(Net):
        """A graph of its own."""

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids)

    torch.manual_seed(0)
    model = Tokens().eval()
    fxpeft.prepare_hotswap(model, 16, targets=["up", "down"], methods=lane_net.METHODS, lanes=3)
    fxpeft.load_adapter(model, case.folders["adalora"], "adalora")
    names: Any = [["adalora", None, "adalora", {"adalora": 0.5}, "adalora"]] * 8
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        with fxpeft.tokens(model, names):
            found, also = model(IDS), call(IDS)
        with fxpeft.tokens(model, [["adalora"] * 5] * 8), torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(call(IDS), case.expected["adalora"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, also, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, ::2], case.expected["adalora"][:, ::2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, 1], case.expected[None][:, 1], rtol=1e-5, atol=1e-5)
    for wrong in (["adalora"], [["adalora"], []], [[]], "adalora"):
        with pytest.raises(AdapterError, match="tokens: expected"), fxpeft.tokens(model, wrong):  # type: ignore[arg-type]
            pass
    with fxpeft.tokens(model, names[:2]), pytest.raises(AdapterError, match="up: expected 2 rows of 5 tokens"):
        model(IDS)


def test_a_swap_that_fails_leaves_rows_as_they_were(model: Net, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    fxpeft.set_adapter(model, "dora")
    with fxpeft.rows(model, ["lora", "ia3"] * 4), torch.no_grad():
        before = model(IDS)
        whole, failing = Copies.run, [True]

        def run(self: Copies) -> None:
            whole(Copies(self.pairs[: len(self.pairs) // 2]))
            if failing and failing.pop():
                raise MemoryError
            whole(self)

        monkeypatch.setattr(Copies, "run", run)
        with pytest.raises(MemoryError), fxpeft.rows(model, ["rslora", "adalora"] * 4):
            pass
        monkeypatch.undo()
        assert torch.equal(model(IDS), before)
    torch.testing.assert_close(model(IDS), case.expected["dora"], rtol=1e-5, atol=1e-5)
    check(model, model, ["rslora", "adalora", "lora", "ia3"] * 2, case)


def test_slots_stay_while_a_block_needs_them(model: Net, case: Case) -> None:
    with fxpeft.rows(model, ["lora", None] * 4):
        for verb in (fxpeft.release_hotswap, fxpeft.remove):
            with pytest.raises(AdapterError, match="is open"):
                verb(model)
        with pytest.raises(AdapterError, match="is open"):
            fxpeft.fold(model, "lora")  # the row would have it twice
        check(model, model, ["dora"] * 8, case)
    fxpeft.release_hotswap(model)
    torch.testing.assert_close(model(IDS), case.expected["adalora"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"rank": "static"}, {"max_rank": 17, "lanes": 2}])
def test_other_slots(settings: dict[str, Any], case: Case) -> None:
    model = prepared(case.folders, **settings)
    fxpeft.set_adapter(model, "lora")
    for names in (["lora", "rslora"], ["lora", None], ["lora", "adalora"]):
        check(model, model, names * 4, case)


def test_copies_have_rows_of_their_own(model: Net, case: Case) -> None:
    with fxpeft.rows(model, ["lora", "dora"] * 4):
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(copied(IDS), case.expected["adalora"], rtol=1e-5, atol=1e-5)
            check(copied, copied, ["ia3", None] * 4, case)
            with torch.no_grad():
                assert torch.equal(copied(IDS, adapter_names=["rslora"] * 8), copied(IDS, adapter_names=["rslora"] * 8))


def test_values_that_would_reach_other_rows_are_refused(model: Net, case: Case) -> None:
    config = fxpeft.LoraConfig(r=2, target_modules=["up"])
    values = {"up.lora_A.weight": torch.ones(2, 7), "up.lora_B.weight": torch.full((9, 2), float("inf"))}
    with pytest.raises(AdapterError, match="up: holds NaN or infinity, which beside other lanes"):
        fxpeft.hotswap(model, {f"base_model.model.{k}": v for k, v in values.items()}, config=config)
    check(model, model, ["lora", "adalora"] * 4, case)


def test_rows_need_lanes(case: Case) -> None:
    model = lane_net.net()
    fxpeft.prepare_hotswap(model, 8, targets=["up"])
    with pytest.raises(AdapterError, match=r"prepare_hotswap\(model, lanes=8\)"):
        fxpeft.rows(model, [None])
    with pytest.raises(AdapterError, match="lanes: expected how many adapters"):
        fxpeft.prepare_hotswap(lane_net.net(), 8, targets=["up"], lanes=0)
