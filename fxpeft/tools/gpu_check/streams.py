"""Swaps on another stream, or thread, than the forwards': each output is one adapter's, whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import fxpeft
from fxpeft.tools.gpu_check.check import Check, Setting
from fxpeft.tools.gpu_check.models import LORAS, Served, logits, served

DELAY = 0.05  # seconds of work before what has to wait for it


def work(setting: Setting) -> Callable[[], None]:
    """What keeps the current stream of a device busy for :data:`DELAY`, and returns at once."""
    if setting.kind == "cpu":
        return lambda: None
    square = torch.ones(4096, 4096, device=setting.device, dtype=setting.dtype)
    result = square @ square
    setting.wait()
    start = time.perf_counter()
    for _ in range(10):
        torch.mm(square, square, out=result)
    setting.wait()
    count = max(1, int(DELAY * 10 / (time.perf_counter() - start)))

    def busy() -> None:
        for _ in range(count):
            torch.mm(square, square, out=result)

    return busy


def swap_waits(setting: Setting) -> dict[str, Any]:
    """A forward lies on one stream behind other work; the swap on another stream must not come before it."""
    return _in_turn(setting, busy_forward=True)


def forward_waits(setting: Setting) -> dict[str, Any]:
    """A swap lies on one stream behind other work; a forward on another stream that is called later must see it."""
    return _in_turn(setting, busy_forward=False)


def _in_turn(setting: Setting, *, busy_forward: bool) -> dict[str, Any]:
    streams = setting.module
    busy, runs, swaps = work(setting), 3 if setting.quick else 8, 0
    with served(setting) as each:
        names = [*each.folders]
        memory = {name: load_file(f"{folder}/adapter_model.safetensors") for name, folder in each.folders.items()}
        first, second = streams.Stream(), streams.Stream()
        for how in ("set_adapter", "hotswap"):
            shown = names[0]
            each.show(shown)
            if how == "hotswap":
                fxpeft.hotswap(each.model, each.folders[shown])
            setting.wait()
            for turn in range(runs):
                new = names[(names.index(shown) + 1) % len(names)]
                with streams.stream(first):
                    if busy_forward:
                        busy()
                    old_output = logits(each.model, each.ids)
                with streams.stream(second):
                    if not busy_forward:
                        busy()
                    _swap(each, how, names[0], new, memory)
                with streams.stream(first):
                    new_output = logits(each.model, each.ids)
                setting.wait()
                each.outputs.expect(old_output, shown, f"{how}, turn {turn}: a forward that was called before the swap")
                each.outputs.expect(new_output, new, f"{how}, turn {turn}: a forward that was called after the swap")
                shown, swaps = new, swaps + 1
    return {"swaps": swaps}


def _swap(each: Served, how: str, held: str, new: str, memory: dict[str, dict[str, Tensor]]) -> None:
    if how == "set_adapter":
        fxpeft.set_adapter(each.model, new)
    else:  # from memory of the machine, under one name
        fxpeft.hotswap(each.model, memory[new], held, config=_config(new))


def _config(name: str) -> fxpeft.LoraConfig:
    return fxpeft.LoraConfig(**LORAS[name])


def threads(setting: Setting) -> dict[str, Any]:
    """Forwards of three threads, each with its stream, while another swaps: no output lies between two adapters'."""
    streams, seconds = setting.module, 1.0 if setting.quick else 4.0
    with served(setting) as each:
        each.outputs.wanted.pop("off")
        names, end = [*each.folders], time.perf_counter() + seconds
        outputs: list[Tensor] = []
        errors: list[BaseException] = []
        swaps = 0

        def run() -> None:
            try:
                with streams.stream(streams.Stream()):
                    while time.perf_counter() < end:
                        mine = [logits(each.model, each.ids) for _ in range(4)]  # none waited for
                        setting.wait()
                        outputs.extend(mine)
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)

        setting.wait()
        running = [threading.Thread(target=run) for _ in range(3)]
        for thread in running:
            thread.start()
        with streams.stream(streams.Stream()):
            while time.perf_counter() < end:
                fxpeft.set_adapter(each.model, names[swaps % len(names)])
                swaps += 1
        for thread in running:
            thread.join()
        setting.wait()
        if errors:
            raise errors[0]
        found = {each.outputs.expect_one(output, f"output {n}") for n, output in enumerate(outputs[-2000:])}
        if setting.kind != "cpu" and len(found) < 2:
            raise AssertionError(f"all {len(outputs)} outputs are {found}'s: the swaps were not among them")
    return {"forwards": len(outputs), "swaps": swaps}


def source_reused(setting: Setting) -> dict[str, Any]:
    """What an adapter was swapped in from may be written over, or its memory given to others, right after the swap."""
    streams, busy = setting.module, work(setting)
    with served(setting) as each:
        names, other = [*each.folders], streams.Stream()
        held, runs = names[0], 2 if setting.quick else 6
        each.show(held)
        for turn in range(runs):
            name = names[1 + turn % (len(names) - 1)]
            host = load_file(f"{each.folders[name]}/adapter_model.safetensors")
            if setting.kind == "cuda":
                host = {key: tensor.pin_memory() for key, tensor in host.items()}
            with streams.stream(other):
                busy()
                fxpeft.hotswap(each.model, host, held, config=_config(name))
                for tensor in host.values():
                    tensor.fill_(float("nan"))
            each.outputs.expect(logits(each.model, each.ids), name, f"turn {turn}, the machine's memory reused")
            with streams.stream(other):
                near = load_file(f"{each.folders[held]}/adapter_model.safetensors", device=str(setting.device))
                busy()
                fxpeft.hotswap(each.model, near, held, config=_config(held))
            sizes = [tensor.shape for tensor in near.values()]
            near.clear()
            filled = [torch.full(size, float("nan"), device=setting.device) for size in sizes]
            each.outputs.expect(logits(each.model, each.ids), held, f"turn {turn}, the device's memory reused")
            del filled
    return {"swaps": 2 * runs}


CHECKS = (
    Check(
        "swap-waits",
        "A swap on another stream waits for the kernels of forwards that were called before it.",
        swap_waits,
    ),
    Check(
        "forward-waits",
        "A forward called after a swap on another, busy stream waits for its copies.",
        forward_waits,
    ),
    Check("threads", "Forwards of threads and streams beside swaps: each output is one adapter's, whole.", threads),
    Check(
        "source-reused",
        "What an adapter came from, pinned or on the device, can be overwritten or freed right after the swap.",
        source_reused,
    ),
)
