"""Transformers' handlers of requests, whose ``model`` names an adapter, and what they ask the batching for."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import CBGenerateManager, GenerationState, Modality

from fxpeft.errors import AdapterError, FxpeftError, short
from fxpeft.integrations.server.batching import ALL, GREEDY, AdapterBatching, Asked, asked
from fxpeft.serving.residents import Lease
from fxpeft.serving.store import AdapterStore

OWN = ("adapters", "adapter_scale", "top_k")  # fields of a request that OpenAI's have not
WAITING = 64  # threads that wait for loads


@dataclass
class Served:
    """What all handlers share.

    Args:
        name: the base's, as clients call it.
    """

    name: str
    model: Any
    processor: Any
    store: AdapterStore
    batching: AdapterBatching
    waiting: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(WAITING, "fxpeft-lease"))

    def lane(self, body: Mapping[str, Any]) -> dict[str, float]:
        """The adapters that a request names, with their weights.

        Raises:
            AdapterError: a field is of another kind than it has to be.
        """
        named, blend, scale = body.get("model"), body.get("adapters"), body.get("adapter_scale", 1.0)
        if named is not None and not isinstance(named, str):
            raise AdapterError(f"model: expected a text, found {short(named)}")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise AdapterError(f"adapter_scale: expected a number, found {short(scale)}")
        adapter = None if named in (None, "", self.name) else named.removeprefix(f"{self.name}:")
        if blend is None:
            return {} if adapter is None else {adapter: float(scale)}
        if adapter is not None:
            raise AdapterError(f"adapters: expected none beside the adapter {short(adapter)} in model")
        if not isinstance(blend, dict):
            raise AdapterError(f"adapters: expected names with weights, found {short(blend)}")
        for name, weight in blend.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise AdapterError(f"adapters: {short(name)}: expected a number, found {short(weight)}")
        return {name: weight * scale for name, weight in blend.items()}

    async def lease(self, lane: dict[str, float]) -> Lease:
        """The lease for a request; where it has to wait for a load, others go on."""
        found = self.store.try_lease(lane)
        if found is None:
            found = await asyncio.get_running_loop().run_in_executor(self.waiting, self.store.lease, lane)
        return found

    def sampling(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """How a request's tokens are chosen: what it asks for, or else the model's defaults. Asking for a temperature
        above 0 is asking to sample."""
        config: GenerationConfig = self.model.generation_config
        temperature = _number(body, "temperature", config.temperature or 1.0, 0.0, 100.0)
        if temperature == 0.0 or (body.get("temperature") is None and not config.do_sample):
            return GREEDY
        top_p = _number(body, "top_p", config.top_p or 1.0, 0.0, 1.0)
        top_k = int(_number(body, "top_k", config.top_k or ALL, -1, ALL))
        return {
            "greedy": False, "temperature": max(temperature, 0.01), "top_p": top_p, "top_k": top_k if top_k > 0 else ALL
        }  # fmt: skip


def _number(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return float(default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise AdapterError(f"{name}: expected a number of {least:g} to {most:g}, found {short(value)}")
    return float(value)


class _Adapted:
    """What the handlers do more: the request's adapters are in memory until it is over."""

    served: Served
    needs: str  # a field

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """As of Transformers. ``request_id`` is a client's, and may be another one's too."""
        if body.get(self.needs) is None:
            raise AdapterError(f"{self.needs}: expected in the request, found none")
        lane, sampling = self.served.lane(body), self.served.sampling(body)
        request = Asked(await self.served.lease(lane), sampling)
        token = asked.set(request)
        try:
            own = {key: value for key, value in body.items() if key not in OWN}
            return await super().handle_request(own, uuid.uuid4().hex)  # type: ignore[misc]
        except (FxpeftError, HTTPException):
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if request.taken:
                raise
            raise AdapterError(f"the request can't be read: {type(error).__name__}: {error}") from error
        finally:
            asked.reset(token)
            if not request.taken:
                request.lease.release()

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return body.get("model") or self.served.name, self.served.model, self.served.processor


class AdapterChat(_Adapted, ChatCompletionHandler):
    """``/v1/chat/completions``."""

    needs = "messages"


class AdapterCompletion(_Adapted, CompletionHandler):
    """``/v1/completions``."""

    needs = "prompt"


class AdapterResponse(_Adapted, ResponseHandler):
    """``/v1/responses``."""

    needs = "input"


class AdapterGenerate(CBGenerateManager):
    """Asks one batching, made before the first request, for all."""

    def __init__(self, batching: AdapterBatching) -> None:
        super().__init__()
        self._cb = self.batching = batching

    async def generate_non_streaming(self, *args: Any, **kwargs: Any) -> Any:
        """As of Transformers; a client that goes takes its request along."""
        try:
            return await super().generate_non_streaming(*args, **kwargs)
        except BaseException:
            self.batching.cancel_request(kwargs["request_id"])
            raise


class AdapterGeneration(GenerationState):
    """Everything is batched."""

    def __init__(self, batching: AdapterBatching) -> None:
        super().__init__(continuous_batching=True)
        self._cb_manager = self.manager = AdapterGenerate(batching)

    def use_continuous_batching(self, model: Any, modality: Modality) -> bool:
        """Always."""
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> AdapterGenerate:
        """The same for every name."""
        return self.manager


class Models(ModelManager):
    """Loads the base, which stays."""

    served: Served

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        """A prompt is text."""
        return Modality.LLM

    def shutdown(self) -> None:
        """The base stays: requests may be under way."""


def handlers(models: Models) -> tuple[AdapterChat, AdapterCompletion, AdapterResponse, AdapterGeneration]:
    """One of each, and the generation that they share."""
    generation = AdapterGeneration(models.served.batching)
    chat, completion, response = (
        AdapterChat(models, generation), AdapterCompletion(models, generation), AdapterResponse(models, generation)
    )  # fmt: skip
    for handler in (chat, completion, response):
        handler.served = models.served
    return chat, completion, response, generation
