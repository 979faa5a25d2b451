"""``fxpeft serve`` as a process of its own, asked by OpenAI's client."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import httpx2 as httpx
import openai
import pytest
import serving_site
from processes import start

ADAPTERS = 16
PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10"]
MADE = 4  # tokens of an answer


class Site(NamedTuple):
    """A base in a folder, adapters in folders."""

    model: Path
    adapters: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    serving_site.write(root, ADAPTERS)
    return Site(root / "model", root / "adapters")


@pytest.fixture(scope="module")
def answers(site: Site) -> Answers:
    """What the base and each adapter answer to each prompt, alone."""
    places = {"": None, **{f"a{number}": site.adapters / f"a{number}" for number in range(ADAPTERS)}}
    found = {(name, prompt): alone(place, prompt) for name, place in places.items() for prompt in PROMPTS}
    assert len(set(found.values())) > 0.7 * len(found)  # else mixed-up rows were not seen
    return found


def alone(folder: Path | None, prompt: str, scale: float = 1.0) -> str:
    """What a freshly loaded adapter answers, greedy."""
    words = serving_site.tokenizer()
    ids = words.encode(f"user {prompt} assistant")
    return str(words.decode(serving_site.alone(folder, ids, MADE, scale), skip_special_tokens=True))


Answers: TypeAlias = dict[tuple[str, str], str]


class Running(NamedTuple):
    client: openai.OpenAI
    http: httpx.Client
    process: Any
    log: Path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def server(site: Site, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    process = start(
        "-m", "fxpeft", "serve", site.model, "--adapters", site.adapters, "--name", "base", "--port", port,
        "--api-key", "secret", "--lanes", 6, "--max-rank", 24, "--cache-tokens", 2048, "--batch-tokens", 64,
        "--queue", 32, "--adapter-bytes", 30_000, "--module-to-save", "lm_head",
        log=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    http = httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}, timeout=30)
    try:
        request.getfixturevalue("answers")  # while it starts
        wait_for(http, process, log)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=30)
        yield Running(client, http, process, log)
    finally:
        process.kill()
        process.join()


def wait_for(http: httpx.Client, process: Any, log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            assert http.get("/health").status_code == 200
            return
        except httpx.TransportError:
            assert process.is_alive() and time.monotonic() < deadline, log.read_text()  # noqa: PT018
            time.sleep(0.1)


def ask(client: openai.OpenAI, model: str, prompt: str, **fields: Any) -> str:
    done = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=MADE, temperature=0, **fields
    )
    assert done.model == model
    return done.choices[0].message.content or ""


def test_every_endpoint_answers_with_the_adapter_that_is_named(server: Running, answers: Answers) -> None:
    prompt = PROMPTS[0]
    client, expected = server.client, answers["a3", prompt]
    assert ask(client, "a3", prompt) == ask(client, "base:a3", prompt) == expected
    assert ask(client, "base", prompt) == answers["", prompt]
    chunks = client.chat.completions.create(
        model="a3", messages=[{"role": "user", "content": prompt}], max_tokens=MADE, temperature=0, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    text = f"user {prompt} assistant"
    made = client.completions.create(model="a3", prompt=text, max_tokens=MADE, temperature=0)
    assert made.choices[0].text == expected
    parts = client.completions.create(model="a3", prompt=text, max_tokens=MADE, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == expected
    response = client.responses.create(model="a3", input=prompt, max_output_tokens=MADE, temperature=0, stream=False)
    assert response.output_text == expected
    events = client.responses.create(model="a3", input=prompt, max_output_tokens=MADE, temperature=0, stream=True)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected
    listed = {model.id for model in client.models.list()}
    assert listed == {"base", *(f"a{number}" for number in range(ADAPTERS))}


def test_a_scale_and_a_blend(server: Running, site: Site, answers: Answers) -> None:
    prompt = PROMPTS[1]
    expected = alone(site.adapters / "a4", prompt, scale=0.25)
    assert ask(server.client, "a4", prompt, extra_body={"adapter_scale": 0.25}) == expected
    assert ask(server.client, "base", prompt, extra_body={"adapters": {"a4": 0.25}}) == expected
    assert ask(server.client, "base", prompt, extra_body={"adapters": {"a4": 1.0}}) == answers["a4", prompt]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("chat/completions", {"model": "nobody"}, 404, "nobody"),
        ("chat/completions", {"model": "../adapters/a1"}, 404, "a1"),
        ("chat/completions", {"model": 3}, 400, "model: expected a text"),
        ("chat/completions", {"messages": None}, 400, "messages: expected"),
        ("chat/completions", {"messages": [{"content": "w1"}]}, 400, "can't be read"),
        ("chat/completions", {"max_tokens": -3}, 400, "at least 1 token"),
        ("chat/completions", {"messages": [{"role": "user", "content": "w1 " * 300}]}, 400, "a prompt of"),
        ("chat/completions", {"temperature": "hot"}, 400, "temperature: expected a number"),
        ("chat/completions", {"adapter_scale": "much"}, 400, "adapter_scale: expected a number"),
        ("chat/completions", {"model": "base", "adapters": {"a1": "much"}}, 400, "adapters: 'a1'"),
        ("chat/completions", {"model": "a1", "adapters": {"a2": 1}}, 400, "expected none beside"),
        ("completions", {"prompt": ""}, 400, "a prompt of 0 tokens"),
        ("load_lora_adapter", {"lora_name": "x"}, 400, "must be provided"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "nowhere"}, 404, "No adapter found"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "../model"}, 400, "leads elsewhere"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 400, "leads elsewhere"),
        ("load_lora_adapter", {"lora_name": "a/../b", "lora_path": "a1"}, 400, "adapter name"),
        ("load_lora_adapter", {"lora_name": "base", "lora_path": "a1"}, 400, "base model"),
        ("unload_lora_adapter", {}, 400, "needs to be provided"),
        ("unload_lora_adapter", {"lora_name": "nobody"}, 404, "cannot be found"),
    ],
)  # fmt: skip
def test_what_is_refused(server: Running, path: str, body: dict[str, Any], status: int, says: str) -> None:
    chat = {"model": "a1", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 2}
    whole = {"chat/completions": {**chat, **body}, "completions": {"model": "a1", **body}}.get(path, body)
    answer = server.http.post(f"/v1/{path}", json=whole)
    assert (answer.status_code, says in answer.text) == (status, True), answer.text
    assert answer.json()["error"]["code"] == status


def test_a_key_and_no_other_routes(server: Running) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
        assert server.http.get("/v1/models", headers=headers).status_code == 401
        assert server.http.get("/health", headers=headers).status_code == 200
    for path in ("/reset", "/load_model", "/v1/systemone", "/v1/audio/transcriptions"):
        assert server.http.post(path, json={"model": "x"}).status_code == 404


def test_adapters_are_loaded_unloaded_and_replaced_while_many_ask(
    server: Running, site: Site, answers: Answers
) -> None:
    """8 clients, 16 adapters, 500 requests; in between others come, go and change. No row has another's adapter."""
    client, draw = server.client, random.Random(0)
    names = ["", *(f"a{number}" for number in range(ADAPTERS))]
    asked = [(draw.choice(names), draw.choice(PROMPTS)) for _ in range(500)]
    done = threading.Event()

    def one(request: tuple[str, str]) -> bool:
        return ask(client, request[0] or "base", request[1]) == answers[request]

    def change() -> int:
        turns = 0
        while not done.is_set():
            name = f"new{turns % 3}"
            for path in ("a1", "a2"):  # the second is another version
                body = {"lora_name": name, "lora_path": str(site.adapters / path), "load_inplace": path == "a2"}
                answer = server.http.post("/v1/load_lora_adapter", json=body)
                assert answer.status_code == 200, answer.text
                assert ask(client, name, PROMPTS[0]) == answers[path, PROMPTS[0]]
            again = server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "a1"})
            assert again.status_code == 400
            assert "already been loaded" in again.text
            assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
            turns += 1
        return turns

    with ThreadPoolExecutor(9) as pool:
        changing = pool.submit(change)
        try:
            found = list(pool.map(one, asked))
        finally:
            done.set()
        assert changing.result() > 0
    assert all(found)
    told = metrics(server)
    assert told["fxpeft_adapter_evictions_total"] > 0  # the budget holds fewer than all
    assert told["fxpeft_adapter_resident_bytes"] <= told["fxpeft_adapter_max_bytes"] == 30_000
    assert told['fxpeft_requests_total{code="200",path="/v1/chat/completions"}'] > 500
    assert told["fxpeft_generation_tokens_total"] > 500 * MADE
    assert told["fxpeft_adapter_failures_total"] == 0


def metrics(server: Running) -> dict[str, float]:
    lines = server.http.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def settled(server: Running) -> None:
    for _ in range(200):
        told = metrics(server)
        if told["fxpeft_adapter_in_use"] == 0 and told["fxpeft_requests_running"] <= 1:  # this one
            return
        time.sleep(0.05)
    raise AssertionError(told)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_leaves_nothing_behind(server: Running, stream: bool) -> None:
    body = {"model": "a5", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 120, "stream": stream}
    raw, before = json.dumps(body).encode(), metrics(server)["fxpeft_generation_tokens_total"]
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
    head += f"Content-Length: {len(raw)}\r\n"
    address = (server.http.base_url.host, server.http.base_url.port)
    for size in (len(raw), len(raw) - 5):  # whole, and cut
        with socket.create_connection(address) as line:
            line.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + raw[:size])
            time.sleep(0.03)
    settled(server)
    assert metrics(server)["fxpeft_generation_tokens_total"] == before  # nobody made the rest of its 120
    assert ask(server.client, "a5", PROMPTS[0])


def test_a_full_queue_says_so(server: Running) -> None:
    body = {"model": "a1", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 100}
    with (
        ThreadPoolExecutor(80) as pool,
        httpx.Client(
            base_url=server.http.base_url,
            headers=server.http.headers,
            timeout=60,
            limits=httpx.Limits(max_connections=80),
        ) as http,
    ):
        found = list(pool.map(lambda _: http.post("/v1/chat/completions", json=body), range(80)))
    codes = {answer.status_code for answer in found}
    assert codes == {200, 429}
    assert all(a.headers["retry-after"] == "1" for a in found if a.status_code == 429)
    settled(server)


def test_a_stop_waits_for_what_is_under_way(server: Running) -> None:
    """The last test: the server is stopped."""
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(
                server.client.chat.completions.create, model=f"a{number}", max_tokens=100, temperature=0,
                messages=[{"role": "user", "content": "w1"}],
            )
            for number in range(4)
        ]  # fmt: skip
        while metrics(server)["fxpeft_requests_running"] < 3:  # two and this one
            assert not all(answer.done() for answer in asked)
        os.kill(server.process.pid, signal.SIGTERM)
        for answer in asked:
            assert answer.result().usage.completion_tokens == 100
    server.process.join(30)
    assert server.process.exitcode == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()
