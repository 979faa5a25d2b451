"""What a request has to pass: the key, the queue's end, its size, its time; and its client, who may have gone."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from fastapi.responses import JSONResponse

from fxpeft.integrations.server.metrics import Metrics

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/health",)  # to whoever has no key
BODY = 16 << 20  # bytes of a request
READ = 30.0  # seconds until it is there
COUNTED = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
)  # fmt: skip


def error(status: int, kind: str, message: str, param: str | None = None) -> JSONResponse:
    """An error as OpenAI's and vLLM's servers have it."""
    told = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": told}, status, {"Retry-After": "1"} if status in (429, 503) else None)


class Gate:
    """Around the whole application, as ASGI has it.

    Args:
        key: that clients have to name; ``None``: everybody may. queue: requests under way at most. timeout: seconds
            that one may take.
    """

    def __init__(self, app: App, key: str | None, queue: int, timeout: float, metrics: Metrics) -> None:
        self.app, self.key, self.queue, self.timeout, self.metrics = app, key, queue, timeout, metrics
        self.running = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in COUNTED else "other"
        exchange = _Exchange(receive, send)
        started = time.monotonic()
        try:
            if (refused := self._refused(scope, path)) is not None:
                await exchange.tell(scope, refused)
                return
            self.running += 1
            self.metrics.running.set(self.running)
            try:
                await self._answer(scope, exchange)
            finally:
                self.running -= 1
                self.metrics.running.set(self.running)
        finally:
            self.metrics.answered(path, exchange.status, time.monotonic() - started)

    def _refused(self, scope: Message, path: str) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                return error(401, "AuthenticationError", "expected the header 'Authorization: Bearer KEY' with the key")
        if path != "other" and self.running >= self.queue:
            return error(429, "RateLimitError", f"{self.running} requests are under way: try again later")
        if int(headers.get(b"content-length", b"0") or 0) > BODY:
            return _too_large()
        return None

    async def _answer(self, scope: Message, exchange: _Exchange) -> None:
        answer = asyncio.ensure_future(self.app(scope, exchange.receive, exchange.send))
        gone = asyncio.ensure_future(exchange.wait_for_end())
        try:
            await asyncio.wait({answer, gone}, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            late = not answer.done() and not gone.done()
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
        if late and exchange.status is None:
            told = error(504, "TimeoutError", f"the request took longer than {self.timeout:g} seconds")
            await exchange.tell(scope, told)
        elif exchange.refused is not None and exchange.status is None:
            await exchange.tell(scope, exchange.refused)
        elif not answer.cancelled() and (failed := answer.exception()) is not None:
            raise failed


def _too_large() -> JSONResponse:
    return error(413, "BadRequestError", f"expected a body of at most {BODY:,} bytes")


class _Exchange:
    """One request and its answer, watched. ``refused``: what is wrong with the request as it came in."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._read, self._ended = asyncio.Event(), asyncio.Event()
        self._size, self._deadline = 0, asyncio.get_running_loop().time() + READ
        self.status: int | None = None
        self.refused: JSONResponse | None = None

    async def receive(self) -> Message:
        """The request's next part; once it is whole, that the client has gone, when it has."""
        if self._read.is_set():
            await self._ended.wait()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.refused = error(408, "TimeoutError", f"expected the whole request within {READ:g} seconds")
            message = {"type": "http.disconnect"}
        self._size += len(message.get("body", b""))
        if self._size > BODY:
            self.refused, message = _too_large(), {"type": "http.disconnect"}
        if message["type"] == "http.disconnect":
            self._ended.set()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            self._read.set()
        return message

    async def send(self, message: Message) -> None:
        """A part of the answer; none where the request was not read."""
        if self.refused is not None:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def tell(self, scope: Message, answer: JSONResponse) -> None:
        """An answer that is not the application's."""
        self.status = answer.status_code
        await answer(scope, self.receive, self._send)

    async def wait_for_end(self) -> None:
        """Return where the client has gone, or the answer is out."""
        await self._read.wait()
        while not self._ended.is_set():
            if (await self._receive())["type"] == "http.disconnect":
                self._ended.set()
