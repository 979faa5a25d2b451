"""diffusers' group offload and layerwise casting and accelerate's offload, before and after adapters come."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from image_models import close, flux, output, randomise

import fxpeft

TARGETS = ["attn.to_q", "proj_mlp"]
CPU = torch.device("cpu")  # what goes to a device and back is its own; that hooks and adapters bear each other is not


def offload(level: str) -> Callable[[Any], None]:
    sizes = {"num_blocks_per_group": 1} if level == "block_level" else {}
    return lambda model: model.enable_group_offload(CPU, CPU, offload_type=level, **sizes)


STEPS: dict[str, Callable[[Any], None]] = {
    "leaves": offload("leaf_level"),
    "blocks": offload("block_level"),
    "sequential": lambda m: cpu_offload(m, CPU),  # what enable_sequential_cpu_offload does to each model: to meta
    "sequential, buffers": lambda m: cpu_offload(m, CPU, offload_buffers=True),
    "model": lambda m: cpu_offload_with_hook(m, CPU),  # and enable_model_cpu_offload
    "cast": lambda m: m.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32),
    "prepare": lambda m: fxpeft.prepare_hotswap(m, 8, targets=TARGETS),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    model: Any = flux()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    randomise(model, 1)
    path = tmp_path_factory.mktemp("offload") / "pytorch_lora_weights.safetensors"
    fxpeft.save_components(path, {"transformer": model})
    return path, output(model)


@pytest.mark.parametrize(
    "steps",
    ["leaves load", "load leaves", "blocks load", "leaves prepare load", "prepare leaves load", "prepare load blocks",
     "cast load", "load cast", "cast prepare load", "prepare cast load",
     "sequential load", "load sequential", "sequential, buffers load", "load sequential, buffers",
     "sequential prepare load", "prepare load sequential, buffers", "prepare sequential load", "model load",
     "load model", "prepare load model"],
)  # fmt: skip
def test_outputs_are_the_adapters(file: tuple[Path, torch.Tensor], steps: str) -> None:
    path, expected = file
    model: Any = flux()
    bare = output(model)
    for step in re.findall(r"\w+(?:, \w+)?", steps):
        if step == "load":
            fxpeft.load_adapter(model, path)
        else:
            STEPS[step](model)
    # weights, and adapters that are there then, have bfloat16's digits where they are cast
    tolerance = 1e-2 if "cast" in steps else 1e-5
    assert close(output(model), expected, tolerance)
    assert not close(bare, expected, 5 * tolerance)
    scaled = output(model, joint_attention_kwargs={"scale": 0.0})
    assert close(scaled, bare, tolerance)
    if "prepare" in steps:
        fxpeft.hotswap(model, path)
        assert close(output(model), expected, tolerance)
    if "sequential" in steps:  # nothing is fetched that belongs to the base
        assert all(p.is_meta for name, p in model.named_parameters() if ".adapters." not in name)
    fxpeft.remove(model)
    assert close(output(model), bare, tolerance)


@pytest.mark.parametrize("hooks", ["leaves", "blocks", "cast", "sequential"])
def test_adapters_come_and_go_below_hooks(hooks: str) -> None:
    """diffusers' hooks keep the forward that was there when they came: another adapter's, or none's."""
    model: Any = flux()
    bare = output(model)
    expected = {}
    for name in ("a", "b"):
        fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=TARGETS), name)
        randomise(model, ord(name), name)
        expected[name] = output(model)
    fxpeft.delete_adapter(model, "b")
    fxpeft.set_adapter(model, "a")
    STEPS[hooks](model)
    tolerance = 1e-2 if hooks == "cast" else 1e-5
    assert close(output(model), expected["a"], tolerance)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=TARGETS), "b")
    randomise(model, ord("b"), "b")
    assert close(output(model), expected["b"], tolerance)
    fxpeft.set_adapter(model, "a")
    assert close(output(model), expected["a"], tolerance)
    fxpeft.prepare_hotswap(model, 8, modules_to_save=["norm_q"])
    fxpeft.set_adapter(model, "b")
    assert close(output(model), expected["b"], tolerance)
    fxpeft.release_hotswap(model)
    with fxpeft.disabled(model):
        assert close(output(model), bare, tolerance)
    fxpeft.remove(model)
    assert close(output(model), bare, tolerance)
    assert not any("_fxpeft_source" in vars(type(module)) for module in model.modules())
