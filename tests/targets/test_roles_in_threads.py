"""``role:`` targets in several threads at once: each model is traced alone, and equal to one thread's."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import nn

import fxpeft
from fxpeft.model.trace import tracing

MODELS: list[Callable[[], nn.Module]] = [tiny_llama, tiny_gpt2, tiny_bert, tiny_llama]
TARGETS = "role:attention.*"


def test_threads_trace_what_one_thread_does() -> None:
    wanted = [fxpeft.roles(make()) for make in MODELS]
    ready = threading.Barrier(len(MODELS))

    def add(make: Callable[[], nn.Module]) -> dict[str, tuple[str, ...]]:
        model = make()
        ready.wait(timeout=30)
        fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, target_modules=TARGETS))
        fxpeft.remove(model)
        return fxpeft.roles(model)

    with ThreadPoolExecutor(len(MODELS)) as pool:
        found = list(pool.map(add, MODELS))
    assert found == wanted
    assert all(found)


def test_one_model_in_several_threads_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, real = tiny_llama(), [], torch.export.export
    monkeypatch.setattr("torch.export.export", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(lambda _: fxpeft.roles(model), range(3))
    assert all(other == first for other in others)
    assert len(calls) == 1


def test_forwards_of_other_threads_go_on_while_a_module_is_traced() -> None:
    """Each module is of a class of its own, so that each is traced; a compiled and an eager model serve beside it."""
    served, ids = tiny_llama().eval(), token_ids()
    compiled = torch.compile(nn.Sequential(nn.Linear(5, 7), nn.ReLU()), backend="eager", fullgraph=True)
    x = torch.randn(3, 5)
    with torch.no_grad():
        wanted, other = served(ids).logits, compiled(x)
    stop, errors = threading.Event(), []

    def serve() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    assert torch.equal(served(ids).logits, wanted)
                    assert torch.equal(compiled(x), other)
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            errors.append(error)

    def make(number: int) -> None:
        cls = type(f"Own{number}", (nn.Linear,), {"forward": lambda self, x: nn.functional.linear(x, self.weight)})
        net = nn.Sequential(cls(5, 7))
        fxpeft.add_adapter(net, fxpeft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        net(x)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(make, range(60)))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_can_trace() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with tracing():
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what is tried here
        child = os.fork()
    if child == 0:
        with tracing():
            os._exit(7)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        done.set()
        thread.join()
