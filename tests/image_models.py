"""Tiny random models of diffusers, each with a call that gives its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

import fxpeft


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=12, attention_head_dim=2,
    ).eval()  # fmt: skip


def clip(layers: int = 1) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=12, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=9, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def sdxl() -> UNet2DConditionModel:
    """A UNet in the shape of Stable Diffusion XL's: text and size embeddings beside the time's, linear projections."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=12, attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
    ).eval()  # fmt: skip


def sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


def flux2() -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
    ).eval()  # fmt: skip


def wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10,
        freq_dim=8, ffn_dim=20, num_layers=1, rope_max_seq_len=16,
    ).eval()  # fmt: skip


def ltx() -> LTXVideoTransformer3DModel:
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=10,
    ).eval()  # fmt: skip


def qwen() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip


def hunyuan() -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=12, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()  # fmt: skip


def t5() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2, relative_attention_num_buckets=8
    )
    return T5EncoderModel(config).eval()


@torch.no_grad()
def output(model: Any, **given: Any) -> Tensor:
    """What a model of any of these kinds makes of its inputs."""
    kind = type(model).__name__
    if kind in ("CLIPTextModel", "T5EncoderModel"):
        return model(torch.arange(2, 9).view(1, -1)).last_hidden_state
    if kind == "UNet2DConditionModel" and model.config.addition_embed_type:
        given["added_cond_kwargs"] = {"text_embeds": random(2, 10), "time_ids": torch.ones(2, 6)}
    if kind == "UNet2DConditionModel":
        return image(model, **given)
    if kind == "FluxTransformer2DModel":
        return flow(model, **given)
    tokens, step = random(1, 5, 12), torch.tensor([3])
    inputs: dict[str, tuple[Any, ...]] = {
        "SD3Transformer2DModel": (random(1, 4, 4, 4), tokens, random(1, 10), step),
        "Flux2Transformer2DModel": (
            random(1, 6, 4), tokens, torch.tensor([0.5]), torch.ones(1, 6, 4), torch.zeros(1, 5, 4), torch.tensor([2.0])
        ),
        "WanTransformer3DModel": (random(1, 4, 1, 4, 4), step, random(1, 5, 10)),
        "LTXVideoTransformer3DModel": (random(1, 8, 4), random(1, 5, 10), step, torch.ones(1, 5), 2, 2, 2),
        "QwenImageTransformer2DModel": (random(1, 4, 16), tokens, torch.ones(1, 5), torch.tensor([0.5]), [(1, 2, 2)]),
        "HunyuanVideoTransformer3DModel": (
            random(1, 4, 1, 4, 4), step, tokens, torch.ones(1, 5), random(1, 8), torch.tensor([6.0])
        ),
    }  # fmt: skip
    return model(*inputs[kind], return_dict=False, **given)[0]


@torch.no_grad()
def image(model: Any, **given: Any) -> Tensor:
    """A UNet's output."""
    return model(random(2, 4, 8, 8), torch.tensor([3]), random(2, 5, 12, seed=4), return_dict=False, **given)[0]


@torch.no_grad()
def flow(model: Any, **given: Any) -> Tensor:
    """A Flux transformer's."""
    return model(
        hidden_states=random(1, 6, 4), timestep=torch.tensor([0.5]), encoder_hidden_states=random(1, 5, 12),
        guidance=None, pooled_projections=random(1, 10), txt_ids=torch.zeros(5, 3), img_ids=torch.ones(6, 3),
        return_dict=False, **given,
    )[0]  # fmt: skip


@torch.no_grad()
def hidden(model: Any) -> Tensor:
    """A text encoder's."""
    return model(torch.arange(2, 9).view(1, -1)).last_hidden_state


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter; made here, since nothing is downloaded."""
    vocabulary = {letter: number for number, letter in enumerate("_~abcdefghijklmnopqrstuvwxyz ")}
    words = Tokenizer(WordLevel(vocabulary, unk_token="_"))
    words.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=7, pad_token="~", unk_token="_")


def pipeline(unet_of: Any = unet) -> StableDiffusionPipeline:
    """Stable Diffusion's pipeline."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=clip(), tokenizer=tokenizer(), unet=unet_of(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, **given: Any) -> Tensor:
    """Latents after two steps."""
    found = pipe(
        "a cat", num_inference_steps=2, guidance_scale=2.0, output_type="latent", height=8, width=8,
        generator=torch.Generator().manual_seed(1), **given,
    )  # fmt: skip
    return torch.as_tensor(found.images)


def randomise(model: nn.Module, seed: int, name: str | None = None, size: float = 0.3) -> None:
    """Fill an adapter with numbers, B too."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in fxpeft.adapter_state_dict(model, name).items():
        tensor.copy_(size * torch.randn(tensor.shape, generator=generator) + ("magnitude" in key))


def peft_randomise(model: nn.Module, seed: int, size: float = 0.3) -> None:
    """The same of PEFT's layers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator) + ("magnitude" in name)


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    pairs: Any = [(found[k], expected[k]) for k in expected] if isinstance(expected, Mapping) else [(found, expected)]
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)
