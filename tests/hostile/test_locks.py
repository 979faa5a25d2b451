"""Whoever computes keeps swaps out, and gives the model back: after errors, Ctrl-C, forks; no wait is for ever."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from swapping import NAMES, X, close, is_free, lock_of, net, prepared, swap_elsewhere, threads
from torch import nn

import fxpeft
from fxpeft.errors import LockError, LockTimeout

# --- errors and Ctrl-C ---


def test_a_strangers_hook_that_raises_leaves_the_lock_as_it_was(model: nn.Sequential, outputs: Any) -> None:
    def refuse(*args: Any) -> None:
        raise ValueError("not now")

    handle = model.register_forward_pre_hook(refuse, prepend=True)
    for _ in range(3):
        with pytest.raises(ValueError, match="not now"):
            model(X)
    handle.remove()
    assert is_free(model)
    entered, go = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        entered.set()
        go.wait(30)

    model[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        found = pool.submit(model, X)
        assert entered.wait(30)
        swapped = pool.submit(fxpeft.set_adapter, model, "b")
        time.sleep(0.1)
        assert not swapped.done()  # the forward does hold the lock
        go.set()
        assert close(found.result(30), outputs["a"])
        swapped.result(30)


@pytest.mark.parametrize("where", ["root", "site", "pre-hook of a part"])
def test_an_interrupt_in_a_forward_gives_the_lock_back(where: str, model: nn.Sequential, outputs: Any) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    if where == "root":
        handle = model.register_forward_hook(interrupt)
    elif where == "site":
        handle = model[1].up.register_forward_hook(interrupt)
    else:
        handle = model[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    assert is_free(model)
    fxpeft.set_adapter(model, "b")
    swap_elsewhere(model, "c")
    assert close(model(X), outputs["c"])


def test_real_interrupts_at_any_moment_leave_the_lock_free(model: nn.Sequential, outputs: Any) -> None:
    """Forwards, holds and swaps of the main thread under a storm of signals."""
    caught = 0
    before = signal.getsignal(signal.SIGALRM)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(300):
            name = NAMES[i % 3]
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00005 * (1 + i % 40))
                for _ in range(1000):  # Python loses an interrupt that comes inside of a __del__ or a callback of gc
                    with fxpeft.hold(model):
                        model(X)
                    model[0](X)
                    fxpeft.set_adapter(model, name)
            except KeyboardInterrupt:
                caught += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert close(model(X), *outputs.values())
            assert close(model(X), outputs[fxpeft.active_adapters(model)[0]])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(True)  # torch.no_grad may be interrupted before it switches back
    assert caught > 280
    assert is_free(model)
    swap_elsewhere(model, "b")
    assert close(model(X), outputs["b"])


@pytest.mark.parametrize("waits", ["swap", "forward"])
def test_an_interrupted_wait_is_forgotten(waits: str, model: nn.Sequential, outputs: Any) -> None:
    entered, go = threading.Event(), threading.Event()

    def work() -> None:
        with lock_of(model).read() if waits == "swap" else lock_of(model).write():
            entered.set()
            go.wait(30)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(30)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.15)
        with pytest.raises(KeyboardInterrupt):
            fxpeft.set_adapter(model, "b") if waits == "swap" else model(X)
    finally:
        signal.signal(signal.SIGALRM, before)
    if waits == "swap":
        with ThreadPoolExecutor(1) as pool:  # a swap that waited for ever would keep this forward out
            assert close(pool.submit(model, X).result(30), outputs["a"])
    go.set()
    thread.join(30)
    assert is_free(model)
    fxpeft.set_adapter(model, "b")
    assert close(model(X), outputs["b"])


# --- waits end ---


def test_a_swap_gives_up_and_says_who_holds_the_model(folders: dict[str, str], outputs: Any) -> None:
    model = prepared(folders, lock_timeout=0.2)
    entered, go = threading.Event(), threading.Event()

    def work() -> None:
        with fxpeft.hold(model):
            entered.set()
            go.wait(30)

    thread = threading.Thread(target=work, name="a long generate")
    thread.start()
    assert entered.wait(30)
    with pytest.raises(LockTimeout, match=r"0.2 seconds.*'a long generate'.*lock_timeout"):
        fxpeft.set_adapter(model, "b")
    assert fxpeft.active_adapters(model) == ["a"]
    go.set()
    thread.join(30)
    assert is_free(model)
    fxpeft.set_adapter(model, "b")
    assert close(model(X), outputs["b"])


def test_a_forward_gives_up_too(folders: dict[str, str]) -> None:
    model = prepared(folders, lock_timeout=0.2)
    with lock_of(model).write(), ThreadPoolExecutor(1) as pool:
        with pytest.raises(LockTimeout, match="a forward waits for a swap"):
            pool.submit(model, X).result(30)
    assert is_free(model)


def test_threads_of_one_piece_of_work_that_wait_for_each_other_end_in_an_error(folders: dict[str, str]) -> None:
    """Hold, then a pool: allowed as long as nobody swaps; with a swap waiting it would never end."""
    model = prepared(folders, lock_timeout=0.5)
    with ThreadPoolExecutor(2) as pool:
        with fxpeft.hold(model):
            pool.submit(model, X).result(30)
            swap = pool.submit(fxpeft.set_adapter, model, "b")
            while not lock_of(model).claim:
                time.sleep(0.01)
            told = [task.exception(30) for task in (pool.submit(model, X), swap)]
    found = [str(error) for error in told if error is not None]
    assert found  # whichever of the two came first to its end
    assert all("Threads must not wait for each other" in text for text in found)
    assert is_free(model)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_a_positive_number(timeout: float) -> None:
    model = net()
    with pytest.raises(LockError, match="lock_timeout: expected"):
        fxpeft.prepare_hotswap(model, 4, targets=["up"], lock_timeout=timeout)
    assert type(model) is nn.Sequential


def test_swaps_and_forwards_without_end_let_each_other_through(model: nn.Sequential) -> None:
    counts = {"swaps": 0, "forwards": 0}

    def swap() -> None:
        fxpeft.set_adapter(model, "b")
        counts["swaps"] += 1

    def forward() -> None:
        model(X)
        counts["forwards"] += 1

    with threads(swap, swap, forward, forward):
        deadline = time.monotonic() + 30
        while min(counts.values()) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert min(counts.values()) >= 20


# --- one thread, many tasks ---


def test_tasks_of_an_event_loop_swap_beside_it(model: nn.Sequential, outputs: Any) -> None:
    async def reader() -> None:
        with fxpeft.hold(model):
            await asyncio.sleep(0.1)
            assert close(model(X), outputs["a"])

    async def work() -> None:
        task = asyncio.create_task(reader())
        await asyncio.sleep(0.01)
        with pytest.raises(LockError, match=r"await asyncio.to_thread\(fxpeft.hotswap"):
            fxpeft.set_adapter(model, "b")
        assert fxpeft.active_adapters(model) == ["a"]
        await asyncio.wait_for(asyncio.to_thread(fxpeft.set_adapter, model, "b"), 30)
        assert task.done()
        await task

    asyncio.run(work())
    assert close(model(X), outputs["b"])
    assert is_free(model)
