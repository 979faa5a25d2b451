"""What a forward, a training step and a swap cost, beside the bare model, PEFT and the bus; measured in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxpeft
from fxpeft.tools.gpu_check.check import Check, Setting
from fxpeft.tools.gpu_check.compare import TOLERANCE, apart
from fxpeft.tools.gpu_check.models import ALL, llama, logits, save, token_ids

RANK = 16
CONFIG: dict[str, Any] = {"r": RANK, "lora_alpha": 24, "target_modules": ALL}
Call = Callable[[], object]


def base(setting: Setting) -> Any:
    """What is measured: two layers of a Llama of 8 billion parameters' width, a small vocabulary."""
    return llama(setting, hidden=128 if setting.kind == "cpu" else 1024 if setting.quick else 4096)


def measure(setting: Setting, calls: Mapping[str, Call], *, of: str | None = None) -> dict[str, dict[str, Any]]:
    """Milliseconds of each call, the calls taking turns, and the memory that one takes beyond what is there before.

    Args:
        of: the call whose time the others' ratios are of.
    """
    rounds = 5 if setting.quick else 60
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks = {name: _peak(setting, call) for name, call in calls.items()}
    for call in calls.values():
        for _ in range(2):
            call()
    names, end = [*calls], time.perf_counter() + 10
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            setting.wait()
            start = time.perf_counter()
            calls[name]()
            setting.wait()
            times[name].append(1e3 * (time.perf_counter() - start))
        if time.perf_counter() > end and turn >= 5:
            break
    found: dict[str, dict[str, Any]] = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = {"ms": middle, "low": low, "high": high}
        if of is not None:
            ratios = [own / other for own, other in zip(values, times[of], strict=True)]
            found[name]["ratio"] = statistics.median(ratios)
        if peaks[name] is not None:
            found[name]["peak MB"] = peaks[name]
    return found


def _peak(setting: Setting, call: Call) -> float | None:
    """Megabytes that a call takes beyond what was there; ``None``: the device doesn't count."""
    if not hasattr(setting.module, "max_memory_allocated"):
        return None
    call()
    setting.wait()
    setting.module.reset_peak_memory_stats()
    before = setting.module.memory_allocated()
    call()
    setting.wait()
    return float(setting.module.max_memory_allocated() - before) / 1e6


@contextmanager
def adapter_folders(setting: Setting, count: int) -> Iterator[list[str]]:
    """Folders of random adapters of rank 16 at all linear layers, in the model's dtype."""
    with tempfile.TemporaryDirectory(prefix="fxpeft-gpu-check-") as root:
        yield [
            save(partial(base, setting), fxpeft.LoraConfig(**CONFIG), Path(root, str(seed)), seed)
            for seed in range(count)
        ]


def forward(setting: Setting) -> dict[str, Any]:
    """Bare, slots on and off, and PEFT, compiled; one token with CUDA graphs too."""
    import peft

    found: dict[str, Any] = {}
    with adapter_folders(setting, 1) as (folder,):
        slots = base(setting)
        fxpeft.prepare_hotswap(slots, 64, targets=ALL)
        fxpeft.load_adapter(slots, folder)
        models = {
            "bare": base(setting), "slots, rank 16 of 64": slots,
            "PEFT, exact rank": peft.PeftModel.from_pretrained(base(setting), folder).eval(),
        }  # fmt: skip
        ways = ((512, "default"), (1, "default"), (1, "reduce-overhead"))
        for length, mode in ((16, "default"),) if setting.tiny else ways:
            torch.compiler.reset()
            ids = token_ids(setting, length, 1)
            runs: dict[str, Call] = {}
            for name, model in models.items():
                compiled = torch.compile(model, fullgraph=name != "PEFT, exact rank", dynamic=False, mode=mode)
                runs[name] = partial(logits, compiled, ids)
            for _ in range(3):  # compiles, records, replays
                outputs = {name: run() for name, run in runs.items()}
            _same(outputs["slots, rank 16 of 64"], outputs["PEFT, exact rank"])
            label = f"{length} token{'s' * (length > 1)}{', ' * (mode != 'default')}{mode.removeprefix('default')}"
            found |= {f"{label}: {name}": row for name, row in measure(setting, runs, of="bare").items()}
    return found


def _same(found: object, wanted: object) -> None:
    assert isinstance(found, Tensor)
    assert isinstance(wanted, Tensor)
    if (distance := apart(found, wanted)) > TOLERANCE[wanted.dtype]:
        raise AssertionError(f"slots and PEFT give outputs {distance:.3g} apart")


def training(setting: Setting) -> dict[str, Any]:
    """Forward and backward, eager and compiled; the bare model's goes back to the embeddings, as an adapter's must."""
    import peft

    found: dict[str, Any] = {}
    ids = token_ids(setting, 16 if setting.tiny else 512, 2)
    ours, theirs, bare = (base(setting) for _ in range(3))
    fxpeft.add_adapter(ours, fxpeft.LoraConfig(**CONFIG))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**CONFIG))
    bare.get_input_embeddings().requires_grad_(True)
    models = {"bare": bare, "fxpeft": ours, "PEFT": theirs}
    for model in models.values():
        model.train()
    for compiled in (False,) if setting.tiny else (False, True):
        torch.compiler.reset()
        steps: dict[str, Call] = {}
        for name, model in models.items():
            steps[name] = partial(_step, model, torch.compile(model, dynamic=False) if compiled else model, ids)
            for _ in range(2):
                steps[name]()
        how = "compiled" if compiled else "eager"
        found |= {f"{how}: {name}": row for name, row in measure(setting, steps, of="bare").items()}
    return found


def _step(model: nn.Module, called: Any, ids: Tensor) -> None:
    called(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def swap(setting: Setting) -> dict[str, Any]:
    """Between adapters on the device, from the machine's memory and from a folder; beside one copy of the bytes."""
    with adapter_folders(setting, 2) as folders:
        held, swapped = base(setting), base(setting)
        for model in (held, swapped):
            fxpeft.prepare_hotswap(model, 64, targets=ALL)
        for number, folder in enumerate(folders):
            fxpeft.load_adapter(held, folder, f"a{number}")
        fxpeft.load_adapter(swapped, folders[0])
        host = [load_file(f"{folder}/adapter_model.safetensors") for folder in folders]
        size = sum(tensor.nbytes for tensor in host[0].values())
        flat = [torch.cat([t.flatten().view(torch.uint8) for t in each.values()]) for each in host]
        if setting.kind == "cuda":
            flat = [each.pin_memory() for each in flat]
            host = [{key: tensor.pin_memory() for key, tensor in each.items()} for each in host]
        target = torch.empty_like(flat[0], device=setting.device)
        turns = iter(range(10**9))
        calls: dict[str, Call] = {
            "one copy of the bytes": lambda: target.copy_(flat[next(turns) % 2], non_blocking=True),
            "set_adapter": lambda: fxpeft.set_adapter(held, f"a{next(turns) % 2}"),
            "hotswap from memory": lambda: fxpeft.hotswap(swapped, host[next(turns) % 2]),
            "hotswap from a folder": lambda: fxpeft.hotswap(swapped, folders[next(turns) % 2]),
        }
        if (theirs := _peft_hotswap(setting, folders)) is not None:
            calls["PEFT's hotswap from a folder"] = lambda: theirs(folders[next(turns) % 2])
        found: dict[str, Any] = measure(setting, calls, of="one copy of the bytes")
        for row in found.values():
            row["GB/s"] = size / row["ms"] / 1e6
        return {"MB": round(size / 1e6, 2), **found}


def _peft_hotswap(setting: Setting, folders: list[str]) -> Callable[[str], object] | None:
    try:
        import peft
        from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    except ImportError:
        return None
    model = peft.PeftModel.from_pretrained(base(setting), folders[0]).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=64)
    return lambda folder: hotswap_adapter(model, folder, "default")


CHECKS = (
    Check("speed-swap", "What a swap takes, beside one copy of the adapter's bytes over the bus.", swap, limit=60),
    Check("speed-forward", "What a compiled forward takes: bare, in slots, PEFT.", forward, limit=180, needs=("peft",)),
    Check("speed-training", "What a training step takes: bare, fxpeft, PEFT.", training, limit=180, needs=("peft",)),
)
