"""A small model, adapters in files, what each gives when freshly loaded, and swaps beside forwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from adapter_files import save_each
from closeness import is_close
from torch import Tensor, nn

import fxpeft
from fxpeft.adapters.lock import SwapLock
from fxpeft.adapters.state import state_of
from fxpeft.passes.slots.copies import Copies
from fxpeft.serving.swap import serving_of

NAMES = ("a", "b", "c")


class Block(nn.Module):
    """Two linears of odd sizes."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(left, 11), nn.Linear(11, right)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[rows, left]``, gives ``[rows, right]``."""
        return self.down(self.up(x).tanh())


def net() -> nn.Sequential:
    """Takes ``[rows, 6]``, gives ``[rows, 3]``."""
    torch.manual_seed(0)
    return nn.Sequential(Block(6, 7), Block(7, 5), nn.Linear(5, 4), nn.Linear(4, 3)).eval()


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def write_adapters(folder: Path) -> dict[str, str]:
    """Name -> folder of an adapter: ranks, alphas, sites and patterns differ; one brings the last module."""
    configs = {
        "a": fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"]),
        "b": fxpeft.LoraConfig(r=5, lora_alpha=2, target_modules=["up", "2"], rank_pattern={"1.up": 1}),
        "c": fxpeft.LoraConfig(r=2, lora_alpha=7, target_modules=["down"], modules_to_save=["3"]),
    }
    return save_each(net, configs, folder)


def fresh(folder: str | None) -> Tensor:
    """What a freshly loaded adapter gives; without one, the base."""
    model = net()
    if folder is not None:
        fxpeft.load_adapter(model, folder)
    with torch.no_grad():
        return model(X)


def prepared(folders: dict[str, str], **options: object) -> nn.Sequential:
    """A prepared model with all adapters loaded and the first one active."""
    model = net()
    fxpeft.prepare_hotswap(model, 8, targets=["up", "down", "2"], modules_to_save=["3"], **options)  # type: ignore[arg-type]
    for name, folder in folders.items():
        fxpeft.load_adapter(model, folder, name)
    fxpeft.set_adapter(model, "a")
    return model


def lock_of(model: nn.Module) -> SwapLock:
    """A prepared model's lock."""
    return serving_of(state_of(model)).lock


def is_free(model: nn.Module) -> bool:
    """Whether nobody holds the model's lock or waits for it."""
    lock = lock_of(model)
    return not (lock.readers or lock.claim or lock.waiting or lock.turn or lock.gates)


def close(found: Tensor, *allowed: Tensor) -> bool:
    """Whether an output is one of these."""
    return any(is_close(found, one) for one in allowed)


@contextmanager
def slow_swaps(pause: float = 0.003) -> Iterator[None]:
    """Let every swap rest between its writes, so that whoever looks then sees a mixture."""
    whole = Copies.run

    def run(self: Copies) -> None:
        half = len(self.pairs) // 2
        whole(Copies(self.pairs[:half]))
        time.sleep(pause)
        whole(Copies(self.pairs[half:]))

    Copies.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        Copies.run = whole  # type: ignore[method-assign]


@contextmanager
def threads(*functions: Callable[[], None]) -> Iterator[None]:
    """Run functions over and over, each in a thread of its own; what they raise is raised at the end."""
    stop, errors = threading.Event(), []

    def run(function: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                function()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    running = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in running:
            thread.join(60)
    assert not any(thread.is_alive() for thread in running)
    if errors:
        raise errors[0]


def swap_elsewhere(model: nn.Module, name: str) -> None:
    """Swap in another thread; an error of its is raised here."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fxpeft.set_adapter, model, name).result(timeout=30)
