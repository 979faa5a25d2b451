"""One function in two processes that know of each other (gloo), each with what it gives back."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import FORKS
from torch.multiprocessing.spawn import start_processes


def in_two_processes(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What ``function(rank, *args)`` returned in each of two processes; it lies in a module that can be imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    method = FORKS.get_start_method()
    start_processes(_run, (port, folder, function, args), nprocs=2, start_method=method)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"returned{rank}.pt", weights_only=False) for rank in range(2)]


def _run(rank: int, port: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **own)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save(function(rank, *args), folder / f"returned{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
