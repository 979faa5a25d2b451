"""``fxpeft serve``: Transformers' server and continuous batching, with adapters."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from fxpeft.errors import AdapterError


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base model's folder or hub id.")],
    adapters: Annotated[
        Path | None, typer.Option(help="A folder that holds each adapter in a folder of its name.", file_okay=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the base; default: MODEL.")] = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="FXPEFT_API_KEY", help="What clients have to name.")] = None,
    lanes: Annotated[int, typer.Option(min=2, help="Adapters in one batch.")] = 8,
    max_rank: Annotated[int, typer.Option(min=2, help="Ranks of all of these together.")] = 128,
    method: Annotated[list[str] | None, typer.Option(help="What slots are for, repeatable; default: lora.")] = None,
    targets: Annotated[str, typer.Option(help="What has slots: a pattern.")] = "all-linear",
    module_to_save: Annotated[
        list[str] | None, typer.Option(help="A module that adapters may bring whole, as lm_head; repeatable.")
    ] = None,
    virtual_tokens: Annotated[int | None, typer.Option(min=1, help="Of each soft prompt, for their methods.")] = None,
    adapter_bytes: Annotated[int, typer.Option(min=1, help="Memory for adapters.")] = 8 << 30,
    cache_tokens: Annotated[int, typer.Option(min=64, help="Room for keys and values.")] = 16384,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Of one forward.")] = 512,
    queue: Annotated[int, typer.Option(min=1, help="Requests under way; more are refused with 429.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 300.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that a stop waits for requests.")] = 30.0,
    compiled: Annotated[bool, typer.Option("--compile/--eager", help="Run the forward through torch.compile.")] = False,
    device: str = "auto",
    dtype: str = "auto",
    log_level: str = "info",
) -> None:
    """Serve a model and its adapters to OpenAI's clients, requests of different adapters in one batch."""
    try:
        from fxpeft.integrations.server import open_server
        from fxpeft.integrations.server.running import Settings
    except ImportError as error:
        raise AdapterError(f"serve needs more packages: pip install 'fxpeft[serve]' ({error})") from error
    settings = Settings(
        model, adapters, name, host, port, api_key, lanes, max_rank, tuple(method or ("lora",)), targets, adapter_bytes,
        cache_tokens, batch_tokens, queue, timeout, drain, device, dtype, log_level, compiled,
        tuple(module_to_save or ()), virtual_tokens,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again once all is answered
    with open_server(settings) as server:
        server.run()
