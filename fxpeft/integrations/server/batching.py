"""Continuous batching of Transformers whose requests have adapters: each token of a batch has those of its request.

Transformers has no hook for it, so these are its classes with what is missing (tried with 5.23 and 5.24). What is
relied on: a manager makes one forward a step in ``_generation_step``, of the requests in
``inputs_and_outputs.requests_in_batch``, whose tokens lie in that order in one row, and padding behind them.
tests/integrations/test_server_hooks.py reads it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fxpeft.adapters.state import state_of
from fxpeft.errors import AdapterError
from fxpeft.model.walk import output_head
from fxpeft.model.wrappers import submodule
from fxpeft.serving import hold
from fxpeft.serving.residents import Lease
from fxpeft.serving.store import AdapterStore
from fxpeft.serving.swap import serving_of

PATIENCE = 1.0  # seconds that requests may pass by one that finds no lane; after that none begins before it
LARGE = 1e30  # in the place of an infinite logit
ALL = 2**31 - 1  # top_k of a request that has none
GREEDY = {"greedy": True, "temperature": 1.0, "top_k": ALL, "top_p": 1.0}  # the sampling of a request


class Stopping(RuntimeError):
    """No more requests are taken."""


@dataclass
class Asked:
    """What a request asks for beside its tokens.

    Args:
        lease: its adapters; the batching gives it back once it has ``taken`` it. sampling: of the logits processors.
    """

    lease: Lease
    sampling: dict[str, Any] = field(default_factory=dict)
    taken: bool = False


asked: ContextVar[Asked] = ContextVar("fxpeft_asked")


class AdapterBatching(ContinuousBatchingManager):
    """A manager whose requests have adapters, samplings and lengths of their own.

    Args:
        most: tokens of a request, its prompt among them.
    """

    def __init__(
        self,
        model: Any,
        store: AdapterStore,
        generation_config: GenerationConfig,
        config: ContinuousBatchingConfig,
        most: int,
    ) -> None:
        config.scheduler_type = "fxpeft"
        config.allow_block_sharing = False  # the same prompt has other keys and values under another adapter
        config.use_async_batching = False  # a batch's adapters are in the lanes while it runs, not the next one's
        config.use_cuda_graph = False  # a replay calls no model, so it would have the rows of the capture
        super().__init__(model, generation_config, config)
        self.store, self.most = store, most
        self.leases: dict[str, Lease] = {}
        self.lanes: dict[str, list[tuple[int, dict[str, float]]]] = {}  # from which token of a request on it names what
        self.virtual: dict[str, int] = {}  # how many tokens of a soft prompt stand before those of a request
        self.prompt_tokens = self.made_tokens = 0
        self.output_router = _Router(self._over, self.virtual)
        self.choice = _Choice()
        self.logit_processor = _sampling(self.choice)

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **logit_processor_kwargs: Any,
    ) -> str:
        """Add the request of this context, with its lease.

        Raises:
            AdapterError: it has no tokens, or more than there is room for. Stopping: the server stops.
        """
        request, name = asked.get(), request_id or uuid.uuid4().hex
        virtual = self._virtual_of(request.lease)
        room = self.most - virtual - len(input_ids)
        if not input_ids or room < 1:
            raise AdapterError(f"a prompt of {len(input_ids)} tokens: expected 1 to {self.most - virtual - 1}")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise AdapterError(f"expected to make at least 1 token, found {max_new_tokens}")
        if name in self.leases:
            raise AdapterError(f"request {name!r} is under way")
        self._hear(name)
        acting = request.lease.acting(input_ids)
        self.leases[name], self.lanes[name] = request.lease, [(at and at + virtual, mix) for at, mix in acting]
        self.virtual[name] = virtual
        request.taken = True
        length = min(room, max_new_tokens or room)
        try:
            sampling = {**logit_processor_kwargs, **request.sampling}
            ids = [0] * virtual + list(input_ids)  # whatever stands there, the soft prompt takes its place
            added = super().add_request(ids, name, length, streaming, record_timestamps, eos_token_id, **sampling)
            if added is None:
                raise Stopping("the server is stopping")
        except BaseException:
            self.give_back(name)
            self._forget(name)
            raise
        self.prompt_tokens += len(input_ids)
        return name

    def _virtual_of(self, lease: Lease) -> int:
        """How many tokens of a soft prompt stand before those of a request.

        Raises:
            AdapterError: it is one of keys and values, which no token can stand for.
        """
        slot = serving_of(state_of(self.model)).prompts
        if slot is None or not lease.prompted():
            return 0
        if slot.plan.prefix:
            raise AdapterError(
                "a prefix of keys and values: batches of requests compute those of every token; use prompt tuning"
            )
        return slot.plan.rank

    def _hear(self, name: str) -> None:
        """Have outputs of a request wait for its handler, which for streams is there only after it was added."""
        router = self.output_router

        def early(output: GenerationOutput) -> None:
            entry = router.result_handlers.get(name)
            if entry is not None and entry[0] is not early:
                entry[0](output)

        with router._lock:
            router.result_handlers.setdefault(name, (early, asyncio.get_running_loop()))

    def cancel_request(self, request_id: str) -> None:
        """End a request; nobody hears of it any more."""
        self._forget(request_id)
        super().cancel_request(request_id)

    def _forget(self, request_id: str) -> None:
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request_id, None)

    def _over(self, output: GenerationOutput) -> None:
        self.made_tokens += len(output.generated_tokens)
        self.give_back(output.request_id)

    def give_back(self, request_id: str) -> None:
        """Release what a request that is over had."""
        lease, _ = self.leases.pop(request_id, None), self.lanes.pop(request_id, None)
        self.virtual.pop(request_id, None)
        if lease is not None:
            lease.release()

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        scheduler: Any = processor.scheduler
        scheduler.batching = self
        head = output_head(self.model)
        sites = serving_of(state_of(self.model)).hosts()
        if any(submodule(self.model, site) is head for site in sites):  # which has to see every token, as all sites do
            processor.model_runner._model_supports_logits_to_keep = False
        return processor

    def _generation_step(self) -> None:
        """One forward: every token has the adapters of its request; padding has none."""
        batch: Any = self.batch_processor and self.batch_processor.inputs_and_outputs
        leases: list[Lease | None] = []
        lanes: list[dict[str, float] | None] = []
        virtual: list[int] = []
        prompted = False
        for each in batch.requests_in_batch:
            name, count = each.state.request_id, each.query_length
            leases += [self.leases[name]] * count
            first = each.state.position_offset - count  # it has been moved on to behind these tokens
            own, before, places = self.lanes[name], self.virtual[name], range(first, first + count)
            lanes += [next(mix for at, mix in reversed(own) if at <= place) for place in places]
            prompted |= before > 0
            virtual += [place if place < before else -1 for place in places]
        padding: list[None] = [None] * (batch.num_q_tokens - len(leases))
        soft = [*virtual, *(-1 for _ in padding)] if prompted else None
        with self.store.batch([*leases, *padding], [*lanes, *padding], soft), hold(self.model):
            super()._generation_step()
        if self.choice.broken and self.batch_processor is not None:  # attention may have brought it to the others
            problem = "the logits of a request that ran in one batch with this one are no numbers; ask again"
            self.batch_processor.handle_batch_error(RuntimeError(problem))  # type: ignore[no-untyped-call]
            batch.requests_in_batch = []


class _Router(OutputRouter):
    """Tells when a request is over, and keeps nothing that nobody hears."""

    def __init__(self, over: Callable[[GenerationOutput], None], virtual: Mapping[str, int]) -> None:
        super().__init__()
        self._over, self._virtual = over, virtual

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            output.prompt_ids = output.prompt_ids[self._virtual.get(output.request_id, 0) :]
            if output.is_finished():
                self._over(output)
        with self._lock:
            heard = [(self.result_handlers.get(output.request_id), output) for output in outputs]
        for entry, output in heard:
            if entry is not None:
                with suppress(RuntimeError):  # its loop is closed: the server stopped
                    entry[1].call_soon_threadsafe(entry[0], output)


class _LaneScheduler(FIFOScheduler):
    """First in, first out, as far as the adapters of all that run find lanes and ranks at once."""

    batching: AdapterBatching

    def _get_waiting_candidates(self) -> list[RequestState]:
        leases, found = self.batching.leases, []
        running = {name: lease for name in self.active_requests if (lease := leases[name]).versions()}
        there = {version for lease in running.values() for version in lease.versions()}
        for state in super()._get_waiting_candidates():
            lease = leases[state.request_id]
            if there.issuperset(lease.versions()) or self.batching.store.fit([*running.values(), lease]):
                running[state.request_id] = lease
                there.update(lease.versions())
                found.append(state)
            elif time.perf_counter() - state.created_time > PATIENCE:
                break
        return found

    def clear_cancelled_requests(self) -> list[RequestState]:
        states: list[RequestState] = super().clear_cancelled_requests()
        for state in states:
            self.batching.give_back(state.request_id)
        return states


SCHEDULER_MAPPING["fxpeft"] = _LaneScheduler


class _Choice(ContinuousBatchingLogitsProcessor):
    """Leaves the first of the likeliest tokens alone to a request that is ``greedy``.

    ``broken``: whether the last logits held NaN or infinity, which would end the sampling of all.
    """

    broken = False

    supported_kwargs: dict[str, type] = {"greedy": bool}  # noqa: RUF012 - as its base has it
    ignored_kwargs: tuple[str, ...] = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        greedy = [each.state.logit_processor_kwargs.get("greedy", False) for each in requests_with_new_token]
        return torch.tensor(greedy, dtype=torch.int32)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Takes and gives ``[tokens, vocabulary]``; ``tensor_arg``: ``[at least tokens]``."""
        self.broken = bool((scores.isnan() | scores.isposinf()).any())  # -inf is what a model masks tokens with
        if self.broken:
            scores = scores.nan_to_num(0.0, LARGE, -LARGE)
        first = scores.argmax(-1, keepdim=True)
        alone = torch.full_like(scores, -LARGE).scatter(-1, first, 0.0)
        return torch.where(tensor_arg[: scores.shape[0], None] > 0, alone, scores)


class _TopK(ContinuousBatchingTopKLogitsWarper):
    """Sorts nothing where no request asks for it."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        if bool((tensor_arg[: scores.shape[0]] >= scores.shape[1]).all()):
            return scores
        return super().__call__(scores, tensor_arg.clamp(max=scores.shape[1]))  # which 5.23 doesn't


class _TopP(ContinuousBatchingTopPLogitsWarper):
    """The same."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        if bool((tensor_arg[: scores.shape[0]].view(dtype=torch.float32) >= 1).all()):
            return scores
        return super().__call__(scores, tensor_arg)


def _sampling(choice: _Choice) -> ContinuousBatchingLogitsProcessorList:
    """Greedy or not, temperature, top_k and top_p: each request has its own."""
    found = ContinuousBatchingLogitsProcessorList(LogitsProcessorList())
    found.logits_processor = LogitsProcessorList(
        [choice, ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0)),
         _TopK(TopKLogitsWarper(ALL)), _TopP(TopPLogitsWarper(1.0))]
    )  # fmt: skip
    found.tensors_required, found.do_processing = len(found.logits_processor), True
    found._retrieve_processors_kwargs()
    return found


def start(
    model: Any, store: AdapterStore, *, tokens: int, batch_tokens: int, requests: int, compiled: bool = False
) -> AdapterBatching:
    """Begin to batch.

    Args:
        tokens: room in the cache of keys and values. batch_tokens: in one forward. requests: in one forward.
        compiled: run the forward through ``torch.compile``.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokens
    page = max(4, min(256, tokens // 16))
    generation = GenerationConfig.from_dict({**model.generation_config.to_dict(), "use_cache": False})
    generation.do_sample = True  # of the one token that a greedy request is left
    config = ContinuousBatchingConfig(
        page_size=page, num_blocks=tokens // page, max_batch_tokens=batch_tokens, max_requests_per_batch=requests,
        default_compile_level=int(compiled),
    )  # fmt: skip
    if generation.eos_token_id is None:
        generation.eos_token_id = -1
    batching = AdapterBatching(model, store, generation, config, min(positions, tokens // page * page))
    batching.start()
    return batching


def warm_up(batching: AdapterBatching, requests: int = 3) -> None:
    """Compile before clients wait for it: prompts and answers of several requests, then of one."""

    async def one(number: int) -> GenerationOutput:
        done, name = asyncio.get_running_loop().create_future(), uuid.uuid4().hex
        asked.set(Asked(batching.store.lease(None), GREEDY))
        batching.register_result_handler(name, done.set_result)  # called once: it doesn't stream
        batching.add_request([0] * (number + 3), name, 3)
        return await done  # type: ignore[no-any-return]

    async def several() -> list[GenerationOutput]:
        return [*await asyncio.gather(*map(one, range(requests))), await one(requests)]

    for output in asyncio.run(several()):
        if output.error is not None:
            raise AdapterError(f"the model can't be batched: {output.error}")
