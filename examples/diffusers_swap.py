"""Pictures of several adapters from one compiled image model: two adapters, their blend, and a sweep of scales.

    python examples/diffusers_swap.py [--out pictures.png] [--backend inductor]

The pipeline is Stable Diffusion's with a tiny random UNet, text encoder and VAE, and the adapters are random too: the
pictures are noise, each its own. What is shown is the way: `fxpeft.install("diffusers")` and diffusers' recipe for hot
swaps. The second adapter has other targets than the first, among them a convolution, and is a DoRA. Nothing recompiles
behind the first picture; torch is told to raise where something would.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

import fxpeft

ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a": ({"r": 4, "lora_alpha": 16, "target_modules": ["to_q", "to_v"]}, {"r": 2, "target_modules": ["q_proj"]}),
    "b": (
        {"r": 6, "lora_alpha": 24, "target_modules": ["ff.net.2", "conv1"], "use_dora": True},
        {"r": 3, "target_modules": ["fc2"]},
    ),
}
TARGETS = ["to_q", "to_v", "ff.net.2", "conv1", "q_proj", "fc2"]  # without them: every linear layer and convolution


def make_pipeline() -> Any:
    """A pipeline of random models; nothing is downloaded."""
    torch.manual_seed(0)
    words = Tokenizer(WordLevel({c: n for n, c in enumerate("_~abcdefghijklmnopqrstuvwxyz ")}, unk_token="_"))
    words.pre_tokenizer = Split("", "isolated")
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("UpBlock2D",), block_out_channels=(16,), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=unet, feature_extractor=None, safety_checker=None,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=12, pad_token="~", unk_token="_"),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    for part in (unet, pipe.text_encoder, vae):
        part.eval().requires_grad_(False)
    return pipe


def write_adapters(folder: Path) -> None:
    """Two files of diffusers', each of a UNet and a text encoder, as training scripts write them."""
    for name, configs in ADAPTERS.items():
        pipe = make_pipeline()
        for model, config in zip((pipe.unet, pipe.text_encoder), configs, strict=True):
            fxpeft.add_adapter(model, fxpeft.LoraConfig(**config))
            generator = torch.Generator().manual_seed(ord(name))
            for key, tensor in fxpeft.adapter_state_dict(model).items():
                if "magnitude" not in key:
                    tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
        pipe.save_lora_weights(folder, weight_name=f"{name}.safetensors")


def draw(pipe: Any, **given: Any) -> Image.Image:
    """One picture of one prompt, always from the same noise."""
    generator = torch.Generator().manual_seed(1)
    found: Image.Image = pipe("a cat", num_inference_steps=4, generator=generator, **given).images[0]
    return found


def main(out: Path, backend: str) -> list[Image.Image]:
    """Draw bare, a, b, a blend, and a sweep of scales."""
    fxpeft.install("diffusers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(folder)
        pipe = make_pipeline()
        pipe.enable_lora_hotswap(target_rank=16, targets=TARGETS)
        pipe.load_lora_weights(folder, weight_name="a.safetensors", adapter_name="style")
        pipe.unet.compile(backend=backend, fullgraph=True)
        pictures = [draw(pipe)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            pipe.load_lora_weights(folder, weight_name="b.safetensors", adapter_name="style", hotswap=True)
            pictures.append(draw(pipe))
            pipe.load_lora_weights(folder, weight_name="a.safetensors", adapter_name="other")
            pipe.set_adapters(["other", "style"], [0.6, 0.4])
            pictures.append(draw(pipe))
            pipe.set_adapters("other")
            pictures += [draw(pipe, cross_attention_kwargs={"scale": s}) for s in (0.0, 0.25, 0.5, 1.0, 1.5)]
            pipe.unload_lora_weights()
            pictures.append(draw(pipe))
    fxpeft.uninstall("diffusers")
    size = pictures[0].width
    sheet = Image.new("RGB", (size * len(pictures), size))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number * size, 0))
    sheet.resize((sheet.width * 4, sheet.height * 4), Image.Resampling.NEAREST).save(out)
    print(f"a, b, blend, a at scales 0, 0.25, 0.5, 1 and 1.5, bare: {len(pictures)} pictures, no recompile")
    return pictures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("pictures.png"))
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args()
    main(options.out, options.backend)
