"""Hot swaps in a UNet: fxpeft beside diffusers' own, how long one takes and what either does with files of other kinds.

    python examples/benchmarks/image_models.py [--quick]

Prints the machine and two Markdown tables. Swaps from a file are timed in turns, by the processor's time, so that what
else runs on the machine counts for little; the median is printed with half the distance between the quartiles. What
becomes of a file is told by outputs: those of a model that loaded it fresh, of the adapter that was there before, or of
the bare model. Recompiles are told by a backend that compiles nothing; graphs are counted.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import fxpeft
from fxpeft.testing import count_graphs

SMALL = 32  # of the UNet whose outputs are looked at
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}
#: kind of the next file -> configs of the UNet and of the text encoder; the first one is of LORA
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "same targets and rank": (LORA, None),
    "another rank and alpha": ({**LORA, "r": 16, "lora_alpha": 8}, None),
    "fewer targets": ({**LORA, "target_modules": ATTENTION[:2]}, None),
    "other targets (`ff`)": ({**LORA, "target_modules": [*ATTENTION, "ff.net.2"]}, None),
    "convolutions": ({**LORA, "target_modules": [*ATTENTION, "conv1", "conv2"]}, None),
    "DoRA": ({**LORA, "use_dora": True}, None),
    "several alphas": ({**LORA, "alpha_pattern": {"to_v": 4}}, None),
    "several ranks": ({**LORA, "rank_pattern": {"to_v": 4}, "alpha_pattern": {"to_v": 8}}, None),
    "with a text encoder": (LORA, {"r": 4, "target_modules": ["q_proj"]}),
}


def make_pipeline(width: int) -> Any:
    """Of a UNet with two levels; where it is narrow, with one."""
    torch.manual_seed(0)
    levels = 1 if width == SMALL else 2
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(width, 2 * width)[:levels], layers_per_block=levels, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * levels, up_block_types=("CrossAttnUpBlock2D",) * levels,
        mid_block_type=None, cross_attention_dim=64,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=CLIPTextModel(text).eval(), unet=unet.eval(), tokenizer=None, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for model in (pipe.unet, pipe.text_encoder):
        model.requires_grad_(False)
    return pipe


def write(path: Path, width: int, unet: dict[str, Any], text: dict[str, Any] | None, seed: int) -> Path:
    """A file of diffusers' with its configs in the header."""
    pipe = make_pipeline(width)
    parts = {"unet": (pipe.unet, unet)} | ({"text_encoder": (pipe.text_encoder, text)} if text else {})
    for model, config in parts.values():
        fxpeft.add_adapter(model, fxpeft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in fxpeft.adapter_state_dict(model).items():
            if "magnitude" not in key:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    fxpeft.save_components(path, {component: model for component, (model, _) in parts.items()})
    return path


@torch.no_grad()
def outputs(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, words = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 7, 64, generator=generator)
    image: Tensor = pipe.unet(x, torch.tensor([3]), words).sample
    hidden: Tensor = pipe.text_encoder(torch.arange(2, 9).view(1, -1)).last_hidden_state
    return torch.cat([image.flatten(), hidden.flatten()])


def ready(width: int, first: Path, ours: bool) -> Any:
    """A pipeline after the recipe for hot swaps, with a first adapter."""
    pipe = make_pipeline(width)
    pipe.enable_lora_hotswap(target_rank=16, **({"methods": ("lora", "dora")} if ours else {}))
    pipe.load_lora_weights(first, adapter_name="a")
    return pipe


def outcome(width: int, first: Path, second: Path, ours: bool) -> str:
    """What becomes of the second file."""
    fresh = make_pipeline(width)
    for component, model in (("unet", fresh.unet), ("text_encoder", fresh.text_encoder)):
        try:
            fxpeft.load_adapter(model, second, component=component)
        except fxpeft.CheckpointError:
            continue
    pipe = ready(width, first, ours)
    pipe.unet.compile(backend="eager")
    before, bare, wanted = outputs(pipe), outputs(make_pipeline(width)), outputs(fresh)
    error = ""
    try:
        pipe.load_lora_weights(second, adapter_name="a", hotswap=True)
    except Exception as caught:  # noqa: BLE001 - whatever it raises is what is measured
        error = type(caught).__name__
    with count_graphs() as counted:
        after = outputs(pipe)
    meant = {"exact": wanted, "the old adapter serves": before, "the bare model serves": bare}
    served = next((word for word, o in meant.items() if torch.allclose(after, o, atol=1e-4)), "neither's outputs")
    told = f"refused ({error}), {served}" if error else served if served == "exact" else f"accepted, {served}"
    return f"{told}; {counted.graphs} graphs more" if counted.graphs else told


def timed(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main(quick: bool) -> None:
    """Print the tables."""
    width, rounds = (48, 5) if quick else (128, 15)
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        first, second = (write(Path(folder) / f"{n}.safetensors", width, LORA, None, n) for n in (1, 2))
        theirs = ready(width, first, ours=False)
        with fxpeft.installed("diffusers"):
            mine = ready(width, first, ours=True)
        turns: dict[str, list[float]] = {"fxpeft": [], "diffusers": []}
        for number in range(rounds):
            source = (second, first)[number % 2]
            with fxpeft.installed("diffusers"):
                turns["fxpeft"].append(
                    timed(lambda s=source: mine.load_lora_weights(s, adapter_name="a", hotswap=True))
                )  # type: ignore[misc]
            turns["diffusers"].append(
                timed(lambda s=source: theirs.load_lora_weights(s, adapter_name="a", hotswap=True))
            )  # type: ignore[misc]
        sites = len(fxpeft.adapter_state_dict(mine.unet)) // 2
        print(f"| {sites} sites, {first.stat().st_size / 1e6:.1f} MB, a swap from the file | ms |\n|---|---|")
        for name, seconds in turns.items():
            low, middle, high = statistics.quantiles(seconds, n=4)
            print(f"| {name} | {1e3 * middle:.1f} ± {1e3 * (high - low) / 2:.1f} |")
        print("\n| the next file | fxpeft | diffusers |\n|---|---|---|")
        small = write(Path(folder) / "small.safetensors", SMALL, LORA, None, 3)
        for number, (kind, (unet, text)) in enumerate(KINDS.items()):
            path = write(Path(folder) / f"small{number}.safetensors", SMALL, unet, text, number + 4)
            with fxpeft.installed("diffusers"):
                ours = outcome(SMALL, small, path, ours=True)
            print(f"| {kind} | {ours} | {outcome(SMALL, small, path, ours=False)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
