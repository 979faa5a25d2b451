"""What ``fxpeft.integrations.server`` relies on in Transformers' classes, and what it makes of them, unserved."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import serving_site
import torch
import transformers
from adapter_files import add, save
from torch import Tensor, nn
from transformers import CompileConfig, ContinuousBatchingConfig
from transformers.cli.serving import chat_completion, completion, response, server, utils
from transformers.generation.continuous_batching import (
    continuous_api,
    input_outputs,
    model_runner,
    requests,
    scheduler,
)
from transformers.generation.continuous_batching.requests import GenerationOutput

import fxpeft
from fxpeft.integrations.server import batching as ours
from fxpeft.integrations.server.batching import ALL, GREEDY, AdapterBatching, Asked, asked, start, warm_up

CHANGED = (
    f"Transformers {transformers.__version__} is not as fxpeft/integrations/server needs it, which was tried with 5.23 "
    "and 5.24: look there at what relies on this"
)


MANAGER, IOS = continuous_api.ContinuousBatchingManager, input_outputs.ContinuousBatchingIOs
HANDLERS = (
    chat_completion.ChatCompletionHandler, completion.CompletionHandler, response.ResponseHandler,
)  # fmt: skip
RELIED_ON = [
    (MANAGER._generation_loop_body, "self._generation_step()"),
    (MANAGER._generation_step, "self.batch_processor._generation_step(self.model)"),
    (MANAGER._create_batch_processor, "SCHEDULER_MAPPING.get(scheduler_type"),
    (MANAGER._create_batch_processor, "output_router=self.output_router"),
    (MANAGER._create_batch_processor, "logit_processor=self.logit_processor"),
    (continuous_api.OutputRouter.__init__, "self.result_handlers"),
    (continuous_api.OutputRouter.__init__, "self._lock"),
    (IOS.prepare_batch_tensors, "state.position_offset += query_length"),
    (IOS.prepare_batch_tensors, "input_ids.extend(state.tokens_to_process)"),
    (IOS.prepare_batch_tensors, "self.requests_in_batch.append(future_state)"),
    (IOS.prepare_batch_tensors, "self.num_q_tokens = num_q_tokens"),
    (model_runner.ModelRunner.supports_logits_to_keep, "self._model_supports_logits_to_keep"),
    (scheduler.FIFOScheduler.schedule_batch, "self._get_waiting_candidates()"),
    (requests.FutureRequestState, "query_length"),
    *((handler.handle_request, "self._resolve_model(body)") for handler in HANDLERS),
    *((handler.handle_request, "gen_manager.init_cb(model, gen_config)") for handler in HANDLERS),
    (utils.CBGenerateManager.generate_non_streaming, "cb.add_request("),
    (utils.CBGenerateManager.init_cb, "if self._cb is not None:"),
    (server.build_server, "generation_state.is_cb_alive()"),
]


@pytest.mark.parametrize(("where", "text"), RELIED_ON)
def test_transformers_is_as_the_server_needs_it(where: Any, text: str) -> None:
    assert text in inspect.getsource(where), f"{CHANGED}: {where.__qualname__} has no {text!r}"


SOFT = {
    "soft": fxpeft.PromptTuningConfig(num_virtual_tokens=3),
    "task": fxpeft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_ranks=2),
    "prefix": fxpeft.PrefixTuningConfig(num_virtual_tokens=3),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hooks")
    serving_site.write(folder, 6)
    head = fxpeft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    save(serving_site.base(), head, folder / "adapters" / "head", seed=11)
    whole = fxpeft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    save(serving_site.base(), whole, folder / "adapters" / "whole", seed=12)
    invoked = fxpeft.LoraConfig(
        r=3, lora_alpha=64, target_modules=["q_proj", "down_proj"], alora_invocation_tokens=[9, 30]
    )
    save(serving_site.base(), invoked, folder / "adapters" / "invoked", seed=13)
    for seed, (name, soft) in enumerate(SOFT.items()):
        save(serving_site.base(), soft, folder / "adapters" / name, seed=20 + seed)
    return folder


@pytest.fixture(scope="module")
def run(root: Path) -> Iterator[Callable[..., AdapterBatching]]:
    """One batching for all that ask for the same one."""
    made: dict[str, AdapterBatching] = {}

    def begin(
        targets: str | list[str] = "all-linear",
        compiled: bool = False,
        saved: tuple[str, ...] = (),
        methods: tuple[str, ...] = ("lora",),
        virtual: int | None = None,
    ) -> AdapterBatching:
        if (key := f"{targets} {compiled} {saved} {methods}") not in made:
            model = serving_site.base()
            fxpeft.prepare_hotswap(
                model, 12, targets=targets, lanes=3, hold_generate=False, modules_to_save=saved, methods=methods,
                num_virtual_tokens=virtual,
            )  # fmt: skip
            store = fxpeft.AdapterStore(model, root / "adapters")
            made[key] = start(model, store, tokens=512, batch_tokens=32, requests=8, compiled=compiled)
        return made[key]

    yield begin
    for each in made.values():
        each.stop(timeout=10, hard_stop=True)
        assert not each.is_running()
        each.store.close()


@pytest.fixture
def batching(run: Callable[..., AdapterBatching]) -> Iterator[AdapterBatching]:
    """It has nothing left of a test when that is over."""
    batching = run()
    yield batching
    assert not batching.leases
    assert not batching.lanes
    assert not batching.output_router.result_handlers
    assert batching.output_router.output_queue.empty()
    assert batching.store.stats().in_use == 0


async def ask(
    batching: AdapterBatching, lane: Any, ids: list[int], made: int = 4, sampling: dict[str, Any] | None = None
) -> list[int]:
    """The tokens of one request, as the server's handlers ask for them."""
    lease = await asyncio.to_thread(batching.store.lease, lane)
    done = asyncio.get_running_loop().create_future()
    asked.set(Asked(lease, sampling or GREEDY))
    name = f"{lane}-{id(lease)}"
    batching.register_result_handler(name, lambda output: done.set_result(output) if output.is_finished() else None)
    batching.add_request(ids, name, made)
    output = await asyncio.wait_for(done, 30)
    assert output.error is None
    return list(output.generated_tokens)


def seen(batching: AdapterBatching, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The adapters of each forward from now on."""
    forwards: list[set[str]] = []
    before = batching.store.batch

    def batch(leases: Any, *more: Any) -> Any:
        forwards.append({version.name for lease in leases if lease for version in lease.versions()})
        return before(leases, *more)

    monkeypatch.setattr(batching.store, "batch", batch)
    return forwards


def test_requests_of_different_adapters_run_in_one_forward(
    batching: AdapterBatching, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = seen(batching, monkeypatch)
    lanes = [None, "a0", "a1", {"a2": 0.5}, "a3", "a4", "a5", "a1", "a0", None]  # three lanes, twelve ranks
    prompts = [list(range(4, 6 + 3 * number)) for number in range(len(lanes))]  # the last is longer than a forward
    prompts[-1] = list(range(4, 54))

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(ask(batching, lane, ids, 30) for lane, ids in zip(lanes, prompts, strict=True)))

    for lane, ids, found in zip(lanes, prompts, asyncio.run(all_of_them()), strict=True):
        (name, scale), *_ = lane.items() if isinstance(lane, dict) else [(lane, 1.0)]
        assert found == serving_site.alone(name and root / "adapters" / name, ids, 30, scale)
    assert max(map(len, forwards)) == 3


@pytest.mark.parametrize("name", ["head", "whole"])
def test_an_adapter_of_the_output_head(run: Callable[..., AdapterBatching], root: Path, name: str) -> None:
    """A head sees the last token of each request alone, where Transformers lets it; a site, and a copy, see all."""
    if name == "head":
        batching = run(targets=["lm_head", "q_proj", "down_proj"])
    else:
        batching = run(targets=["q_proj", "down_proj"], saved=("lm_head",))
    ids = [5, 6, 7, 8]

    async def both() -> list[list[int]]:
        return await asyncio.gather(ask(batching, name, ids), ask(batching, "a0", ids), ask(batching, None, ids))

    expected = [serving_site.alone(n and root / "adapters" / n, ids, 4) for n in (name, "a0", None)]
    assert asyncio.run(both()) == expected


def test_an_invocation_is_looked_for_in_each_request(run: Callable[..., AdapterBatching], root: Path) -> None:
    batching = run(methods=("lora", "alora"))
    # at the end; twice, in the part of a prompt that the second forward has; nowhere; at the beginning
    prompts = [[*range(4, 14), 9, 30], [9, 30, *range(4, 50), 9, 30, 7], [30, *range(4, 10)], [9, 30, 5], [9, 30, 5]]
    lanes = ["invoked", {"invoked": 0.5}, "invoked", "a0", {"invoked": 1.0, "a0": 0.5}]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(ask(batching, lane, ids, 20) for lane, ids in zip(lanes, prompts, strict=True)))

    for lane, ids, found in zip(lanes, prompts, asyncio.run(all_of_them()), strict=True):
        model = serving_site.base()
        mix = lane if isinstance(lane, dict) else {lane: 1.0}
        for name, scale in mix.items():
            fxpeft.load_adapter(model, root / "adapters" / name, name)
            fxpeft.set_scale(model, name, scale)
        fxpeft.set_adapter(model, list(mix))
        made = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert found == made[0, len(ids) :].tolist()
    with pytest.raises(fxpeft.AdapterError, match="several sequences in one row"):  # nobody says which tokens are whose
        model(input_ids=torch.tensor([[5, 9, 30, 5]]), cu_seq_lens_q=torch.tensor([0, 2, 4]))


def test_requests_have_soft_prompts_beside_others(
    run: Callable[..., AdapterBatching], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's tokens stand before those of its request, and only there; a client is told of its own alone."""
    batching = run(targets=["q_proj", "down_proj"], methods=("lora", "prompt_tuning"), virtual=3)
    forwards = seen(batching, monkeypatch)
    lanes = ["soft", "task", None, "a0", {"soft": 1.0, "a0": 0.5}, "soft"]
    prompts = [list(range(4, 6 + 3 * number)) for number in range(len(lanes))]
    prompts[-1] = list(range(4, 54))  # longer than a forward

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(ask(batching, lane, ids, 20) for lane, ids in zip(lanes, prompts, strict=True)))

    for lane, ids, found in zip(lanes, prompts, asyncio.run(all_of_them()), strict=True):
        model = serving_site.base()
        for name, scale in lane.items() if isinstance(lane, dict) else [(lane, 1.0)] if lane else []:
            fxpeft.load_adapter(model, root / "adapters" / name, name)
            if scale != 1:
                fxpeft.set_scale(model, name, scale)
        if isinstance(lane, dict):
            fxpeft.set_adapter(model, list(lane))
        made = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert found == made[0, len(ids) :].tolist(), lane
    assert max(map(len, forwards)) == 3

    async def told() -> None:
        done = asyncio.get_running_loop().create_future()
        asked.set(Asked(await asyncio.to_thread(batching.store.lease, "soft"), GREEDY))
        batching.register_result_handler("one", done.set_result)
        batching.add_request([5, 6], "one", 1)
        output = await asyncio.wait_for(done, 30)
        assert (output.prompt_ids, len(output.generated_tokens)) == ([5, 6], 1)
        asked.set(Asked(batching.store.lease("soft"), GREEDY))
        with pytest.raises(fxpeft.AdapterError, match="expected 1 to 124"):
            batching.add_request([5] * 125, "long", 1)
        asked.get().lease.release()

    asyncio.run(told())
    assert not batching.virtual


def test_a_prefix_has_no_tokens_to_stand_for(run: Callable[..., AdapterBatching]) -> None:
    batching = run(targets=["q_proj", "down_proj"], methods=("lora", "prefix_tuning"), virtual=3)
    asked.set(Asked(batching.store.lease("prefix"), GREEDY))
    with pytest.raises(fxpeft.AdapterError, match="batches of requests compute those of every token; use prompt"):
        batching.add_request([5], "name", 1)
    asked.get().lease.release()


@pytest.mark.slow
def test_other_adapters_compile_nothing_anew(
    run: Callable[..., AdapterBatching], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a batch is made of; traced alone, since it is Dynamo that would compile anew."""
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]

    def config(**settings: Any) -> ContinuousBatchingConfig:
        compile_config = CompileConfig(backend="eager", fullgraph=False, dynamic=True, mode=None)
        return ContinuousBatchingConfig(varlen_compile_config=compile_config, **settings)

    monkeypatch.setattr(ours, "ContinuousBatchingConfig", config)
    batching = run(
        targets=["q_proj", "down_proj"], compiled=True, methods=("lora", "prompt_tuning"), virtual=3
    )  # fmt: skip

    async def turn(lanes: list[str | None], prompts: list[list[int]]) -> list[list[int]]:
        return await asyncio.gather(*(ask(batching, lane, ids) for lane, ids in zip(lanes, prompts, strict=True)))

    warm_up(batching)
    before = frames["total"]
    for lanes in (["a0", None, "a3", "a0"], [None, "a3"], ["a3"], ["a0", "a3", "a3", None, "a0"]):
        prompts = [list(range(4, 7 + 3 * number)) for number in range(len(lanes))]
        found = asyncio.run(turn(lanes, prompts))
        for lane, ids, tokens in zip(lanes, prompts, found, strict=True):
            assert tokens == serving_site.alone(lane and root / "adapters" / lane, ids, 4)
        assert frames["total"] == before > 0
    asyncio.run(turn(["soft", None, "a0"], [[5, 6], [7], [8, 9]]))  # prompts are one graph more, and no other
    before = frames["total"]
    for lanes in (["task", "a3", "soft", None], ["task"], ["soft", "a0"], ["a3", None]):
        prompts = [list(range(4, 7 + 3 * number)) for number in range(len(lanes))]
        for lane, ids, tokens in zip(lanes, prompts, asyncio.run(turn(lanes, prompts)), strict=True):
            assert tokens == serving_site.alone(lane and root / "adapters" / lane, ids, 4)
        assert frames["total"] == before
    torch._dynamo.reset()


def test_who_waits_for_a_lane_has_its_turn(batching: AdapterBatching, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of three adapters that come without end don't keep a fourth out."""
    monkeypatch.setattr(ours, "PATIENCE", 0.05)

    async def busy(name: str, stop: asyncio.Event) -> int:
        turns = 0
        while not stop.is_set():
            await asyncio.gather(*(ask(batching, name, [5, 6], 30) for _ in range(2)))
            turns += 1
        return turns

    async def all_of_them() -> None:
        stop = asyncio.Event()
        others = [asyncio.create_task(busy(name, stop)) for name in ("a0", "a1", "a2")]
        await asyncio.sleep(0.1)
        assert len(await asyncio.wait_for(ask(batching, "a3", [7, 8]), 20)) == 4
        stop.set()
        assert min(await asyncio.gather(*others)) > 0

    asyncio.run(all_of_them())


def test_a_request_that_is_cancelled_gives_its_adapter_back(batching: AdapterBatching) -> None:
    async def go() -> None:
        for pause in (0.0, 0.02):
            lease = batching.store.lease("a0")
            asked.set(Asked(lease, GREEDY))
            name = batching.add_request([5, 6], f"gone-{pause}", 120, streaming=True)
            await asyncio.sleep(pause)
            batching.cancel_request(name)
        for _ in range(200):
            if not batching.leases:
                break
            await asyncio.sleep(0.01)

    before = batching.made_tokens
    asyncio.run(go())
    assert batching.made_tokens == before


def test_what_is_refused_is_not_taken(batching: AdapterBatching, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        for ids, made, says in (([], 1, "0 tokens"), ([5] * 200, 1, "200 tokens"), ([5], 0, "at least 1 token")):
            request = Asked(batching.store.lease("a0"), GREEDY)
            asked.set(request)
            with pytest.raises(fxpeft.AdapterError, match=says):
                batching.add_request(ids, "name", made)
            assert not request.taken
            request.lease.release()
        monkeypatch.setattr(batching.background_thread_status, "can_accept_new_requests", lambda: "it stops")
        request = Asked(batching.store.lease("a0"), GREEDY)
        asked.set(request)
        with pytest.raises(ours.Stopping):
            batching.add_request([5], "name", 1)

    asyncio.run(go())


@pytest.mark.parametrize("greedy", [True, False])
def test_each_request_is_sampled_as_it_asks(batching: AdapterBatching, root: Path, greedy: bool) -> None:
    hot = {"greedy": False, "temperature": 50.0, "top_k": ALL, "top_p": 1.0}
    cold = GREEDY if greedy else {"greedy": False, "temperature": 0.01, "top_k": 1, "top_p": 0.1}
    ids = [5, 6, 7]

    async def both() -> list[list[int]]:
        each = [ask(batching, "a0", ids, 30, hot) for _ in range(3)]
        return await asyncio.gather(*each, ask(batching, "a0", ids, 30, cold))

    *drawn, chosen = asyncio.run(both())
    assert chosen == serving_site.alone(root / "adapters" / "a0", ids, 30)
    assert len({tuple(each) for each in (*drawn, chosen)}) == 4


def test_a_row_without_numbers_keeps_to_itself() -> None:
    scores = torch.randn(4, 9)
    scores[1] = float("nan")
    scores[2, 3] = float("inf")
    scores[3, 5:7] = 99.0  # two of the likeliest
    wanted = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    choice = ours._Choice()
    found = choice(scores, wanted)
    assert choice.broken
    assert torch.equal(found[0], scores[0])
    assert found.isfinite().all()
    for _ in range(20):
        drawn = torch.multinomial(nn.functional.softmax(found, -1), 1)
        assert drawn[2:].flatten().tolist() == [3, 5]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_adapter_that_overflows_answers_nothing_wrong(
    batching: AdapterBatching, root: Path, streaming: bool
) -> None:
    """What runs beside it fails too, and says so: in one batch attention may have brought it there."""
    if not (root / "adapters" / "huge").exists():
        model = serving_site.base()
        tensors = add(model, fxpeft.LoraConfig(r=2, target_modules=["v_proj"]))
        for value in tensors.values():
            value.data.fill_(1e30)
        fxpeft.save_adapter(model, root / "adapters" / "huge")
    ids = [5, 6, 7]

    async def one(lane: str) -> GenerationOutput:
        lease = await asyncio.to_thread(batching.store.lease, lane)
        done = asyncio.get_running_loop().create_future()
        asked.set(Asked(lease, GREEDY))
        name = f"{lane}-{id(lease)}"
        batching.add_request(ids, name, 4, streaming=streaming)
        batching.register_result_handler(name, lambda o: o.is_finished() and not done.done() and done.set_result(o))
        return await asyncio.wait_for(done, 30)

    async def several() -> list[GenerationOutput]:
        return await asyncio.gather(*(one(lane) for lane in ("a0", "huge", "a1")))

    first, broken, last = asyncio.run(several())
    assert "no numbers" in str(broken.error)
    for name, output in (("a0", first), ("a1", last)):
        assert output.error or output.generated_tokens == serving_site.alone(root / "adapters" / name, ids, 4)
    assert asyncio.run(one("a0")).generated_tokens == serving_site.alone(root / "adapters" / "a0", ids, 4)


@pytest.mark.slow
def test_nothing_is_sorted_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **settings: Any) -> Tensor:
        raise AssertionError("sorted")

    processors = ours._sampling(ours._Choice())
    scores = torch.randn(2, 9)
    args = torch.stack(
        [
            torch.ones(2, dtype=torch.int32),
            torch.ones(2).view(torch.int32),
            torch.full((2,), ALL, dtype=torch.int32),
            torch.ones(2).view(torch.int32),
        ]
    )
    monkeypatch.setattr(torch, "sort", refuse)
    assert processors(torch.zeros(2), scores, args).argmax(-1).tolist() == scores.argmax(-1).tolist()
    args[2] = 3
    with pytest.raises(AssertionError, match="sorted"):
        processors(torch.zeros(2), scores, args)
