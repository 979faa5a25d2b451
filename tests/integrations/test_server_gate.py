"""What a request has to pass before, and while, the application answers it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from fxpeft.integrations.server import gate
from fxpeft.integrations.server.gate import Gate
from fxpeft.integrations.server.metrics import Metrics

PATH = "/v1/chat/completions"
CANCELLED: list[str] = []


def application() -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def around(request: Request, call_next: Any) -> Any:  # as Transformers' has one
        return await call_next(request)

    @app.post(PATH)
    async def answer(body: dict[str, Any]) -> Any:
        async def parts() -> Any:
            try:
                for number in range(100):
                    yield f"{number}\n"
                    await asyncio.sleep(0.01)
            except (GeneratorExit, asyncio.CancelledError):
                CANCELLED.append("stream")
                raise

        if body.get("stream"):
            return StreamingResponse(parts())
        try:
            await asyncio.sleep(body["seconds"])
        except asyncio.CancelledError:
            CANCELLED.append("answer")
            raise
        return {"done": True}

    return app


class Client:
    """One request, part by part, as a server hands it on."""

    def __init__(self, app: Gate, parts: list[bytes | None], **headers: str) -> None:
        self.app, self.parts = app, parts
        self.sent: list[Any] = []
        named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope = {
            "type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *named], "http_version": "1.1", "scheme": "http",
        }  # fmt: skip

    async def receive(self) -> Any:
        if not self.parts:
            await asyncio.Event().wait()  # it waits
        part = self.parts.pop(0)
        if part is None:
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": not part.endswith(b"}")}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def run(self) -> int | None:
        await asyncio.wait_for(self.app(self.scope, self.receive, self.send), 10)
        return next((m["status"] for m in self.sent if m["type"] == "http.response.start"), None)


def run(client: Callable[[], Client]) -> int | None:
    CANCELLED.clear()

    async def go() -> int | None:
        return await client().run()

    return asyncio.run(go())


def door(**settings: Any) -> Gate:
    return Gate(application(), **{"key": None, "queue": 2, "timeout": 5.0, "metrics": Metrics(), **settings})


def test_what_is_whole_is_answered() -> None:
    app = door(key="k")
    assert run(lambda: Client(app, [b'{"seconds"', b": 0}"], authorization="Bearer k")) == 200
    assert run(lambda: Client(app, [b'{"seconds": 0}'])) == 401
    assert run(lambda: Client(app, [b'{"stream": 1}'], authorization="Bearer k")) == 200
    assert app.running == 0
    assert not CANCELLED


@pytest.mark.parametrize(("body", "name"), [(b'{"seconds": 9}', "answer"), (b'{"stream": 1}', "stream")])
def test_a_client_that_goes_ends_its_request(body: bytes, name: str) -> None:
    app = door()
    run(lambda: Client(app, [body, None]))
    assert [name] == CANCELLED
    assert app.running == 0


@pytest.mark.parametrize("parts", [[b'{"seconds"'], []])
def test_a_request_that_is_never_whole(parts: list[bytes | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "READ", 0.3)
    app = door()
    assert run(lambda: Client(app, list(parts))) == 408
    assert run(lambda: Client(app, [b'{"seconds"', None])) in (None, 400)  # it went: nobody hears
    assert app.running == 0


def test_a_request_that_takes_too_long() -> None:
    app = door(timeout=0.05)
    assert run(lambda: Client(app, [b'{"seconds": 9}'])) == 504
    assert CANCELLED == ["answer"]
    assert run(lambda: Client(app, [b'{"stream": 1}'])) == 200  # it had begun: it is cut
    assert CANCELLED == ["stream"]
    assert app.running == 0


def test_a_body_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY", 100)
    app = door()
    assert run(lambda: Client(app, [b'{"seconds": 0}'], content_length="101")) == 413
    assert run(lambda: Client(app, [b" " * 60, b" " * 60, b'{"seconds": 0}'])) == 413


def test_the_queue_has_an_end_and_errors_are_told() -> None:
    app = door()

    async def go() -> list[int | None]:
        clients = [Client(app, [b'{"seconds": 0.1}']) for _ in range(4)]
        found = await asyncio.gather(*(client.run() for client in clients))
        told = json.loads(clients[-1].sent[-1]["body"])["error"]
        assert (told["code"], told["type"]) == (429, "RateLimitError")
        return found

    assert asyncio.run(go()) == [200, 200, 429, 429]
    assert app.running == 0
    text = app.metrics.text().decode()
    assert 'fxpeft_requests_total{code="429",path="/v1/chat/completions"} 2.0' in text
    assert "fxpeft_requests_running 0.0" in text
    with pytest.raises(KeyError):  # the server's own fault is the server's to log
        run(lambda: Client(app, [b"{}"]))
    assert app.running == 0
