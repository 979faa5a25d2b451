"""From a model and a folder of adapters to a server that answers, and that stops with its last request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from transformers.cli.serving.server import build_server

from fxpeft.errors import AdapterError, FxpeftError, StoreTimeout, UnknownAdapter, short
from fxpeft.integrations.server.batching import Stopping, start, warm_up
from fxpeft.integrations.server.gate import Gate, error
from fxpeft.integrations.server.handlers import Models, Served, handlers
from fxpeft.integrations.server.metrics import Metrics
from fxpeft.serving import prepare_hotswap
from fxpeft.serving.sources import within
from fxpeft.serving.store import AdapterStore

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/health")  # that stay


@dataclass(frozen=True)
class Settings:
    """How a server serves.

    Args:
        model: a folder or hub id. adapters: a folder with a folder for each adapter. name: the base's, for clients.
        lanes, max_rank, methods, targets, modules_to_save, num_virtual_tokens: as of :func:`fxpeft.prepare_hotswap`.
        adapter_bytes: memory for adapters. cache_tokens: room for keys and values. batch_tokens: of one forward.
        queue: requests under way at most. timeout: seconds of a request. drain: seconds that a stop waits for them.
        compiled: run the forward through ``torch.compile``.
    """

    model: str
    adapters: str | Path | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    lanes: int = 8
    max_rank: int = 128
    methods: Sequence[str] = ("lora",)
    targets: str = "all-linear"
    adapter_bytes: int = 8 << 30
    cache_tokens: int = 16384
    batch_tokens: int = 512
    queue: int = 256
    timeout: float = 300.0
    drain: float = 30.0
    device: str = "auto"
    dtype: str = "auto"
    log_level: str = "info"
    compiled: bool = False
    modules_to_save: Sequence[str] = ()
    num_virtual_tokens: int | None = None


@contextmanager
def open_server(settings: Settings) -> Iterator[uvicorn.Server]:
    """A server that is ready to ``run``; after the block everything that it started has ended."""
    models = Models(device=settings.device, dtype=settings.dtype, model_timeout=-1)
    place = models.process_model_name(settings.model)
    model, processor = models._load_model(place), models._load_processor(place)
    prepare_hotswap(
        model, settings.max_rank, targets=settings.targets, methods=settings.methods, lanes=settings.lanes,
        hold_generate=False, modules_to_save=settings.modules_to_save, num_virtual_tokens=settings.num_virtual_tokens,
    )  # fmt: skip
    with ExitStack() as stack:
        store = AdapterStore(model, settings.adapters, max_bytes=settings.adapter_bytes)
        stack.callback(store.close)
        batching = start(
            model, store, tokens=settings.cache_tokens, batch_tokens=settings.batch_tokens,
            requests=min(settings.queue, settings.batch_tokens), compiled=settings.compiled,
        )  # fmt: skip
        stack.callback(batching.stop, timeout=settings.drain, hard_stop=True)
        warm_up(batching)
        models.served = Served(settings.name or settings.model, model, processor, store, batching)
        stack.callback(models.served.waiting.shutdown, wait=False, cancel_futures=True)
        metrics = Metrics()
        app = Gate(_application(models, metrics), settings.api_key, settings.queue, settings.timeout, metrics)
        drain = max(1, round(settings.drain))
        config = uvicorn.Config(
            app, settings.host, settings.port, log_level=settings.log_level, timeout_graceful_shutdown=drain
        )
        yield uvicorn.Server(config)


def _application(models: Models, metrics: Metrics) -> FastAPI:
    """Transformers' application, with the routes of adapters."""
    served = models.served
    chat, completion, response, generation = handlers(models)
    unserved: Any = None
    app = build_server(models, chat, completion, response, unserved, unserved, generation)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    metrics.watch(served.store.stats, lambda: (served.batching.prompt_tokens, served.batching.made_tokens))

    @app.exception_handler(FxpeftError)
    async def refused(request: Request, problem: FxpeftError) -> JSONResponse:
        if isinstance(problem, UnknownAdapter):
            return error(404, "NotFoundError", f"The model does not exist: {problem}", "model")
        if isinstance(problem, StoreTimeout):
            return error(503, "ServiceUnavailableError", str(problem))
        status = 400 if isinstance(problem, AdapterError) else 500
        return error(status, "BadRequestError" if status == 400 else "InternalServerError", str(problem))

    @app.exception_handler(Stopping)
    async def stopping(request: Request, problem: Stopping) -> JSONResponse:
        return error(503, "ServiceUnavailableError", str(problem))

    @app.get("/v1/models")
    def listed() -> JSONResponse:
        base = {"id": served.name, "object": "model", "created": 0, "owned_by": "fxpeft", "parent": None}
        names = [name for name in served.store.names() if name != served.name]
        return JSONResponse(
            {"object": "list", "data": [base, *({**base, "id": n, "parent": base["id"]} for n in names)]}
        )

    @app.get("/metrics")
    def told() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/load_lora_adapter")
    async def load(body: dict[str, Any]) -> Response:
        name, path = body.get("lora_name"), body.get("lora_path")
        if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
            return error(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if name == served.name:
            return error(400, "InvalidUserInput", f"{short(name)} is the base model's name.")
        if served.store.folder is None:
            return error(400, "InvalidUserInput", "The server was started without a folder of adapters.")
        if name in served.store.loaded() and not body.get("load_inplace"):
            return error(
                400, "InvalidUserInput", f"The lora adapter {short(name)} has already been loaded. If you want to load "
                "the adapter in place, set 'load_inplace' to True.",
            )  # fmt: skip
        place = within(served.store.folder, path)
        if not place.is_dir():
            return error(404, "NotFoundError", f"No adapter found for {short(path)}")
        await asyncio.get_running_loop().run_in_executor(served.waiting, served.store.put, name, place)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: dict[str, Any]) -> Response:
        name = body.get("lora_name")
        if not isinstance(name, str) or not name:
            return error(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            served.store.remove(name)
        except UnknownAdapter:
            return error(404, "NotFoundError", f"The lora adapter {short(name)} cannot be found.")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return app
