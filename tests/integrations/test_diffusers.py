"""A pipeline's components take one file together or not at all, and names that only diffusers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import fxpeft
from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.integrations.diffusers import load_lora_weights, save_lora_weights, set_adapters


def make_pipe() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=12, attention_head_dim=2,
    ).eval()  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=9, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(config).eval(), tokenizer=None, unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def outputs(pipe: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    hidden = pipe.text_encoder(torch.arange(2, 9).view(1, -1)).last_hidden_state
    return pipe.unet(x, torch.tensor([3]), context).sample, hidden


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in fxpeft.adapter_state_dict(model).values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, tuple[Tensor, Tensor]]]:
    """Name -> file of both components, of other ranks and targets, and the outputs with it."""
    found = {}
    for seed, (name, targets) in enumerate({"a": ["to_q", "conv1"], "b": ["to_v", "ff.net.2"]}.items(), 2):
        pipe = make_pipe()
        fxpeft.add_adapter(
            pipe.unet, fxpeft.LoraConfig(r=seed, lora_alpha=5, target_modules=targets, alpha_pattern={targets[0]: 7})
        )
        fxpeft.add_adapter(pipe.text_encoder, fxpeft.LoraConfig(r=seed, lora_alpha=3, target_modules=["q_proj", "fc2"]))
        for model in (pipe.unet, pipe.text_encoder):
            randomise(model, seed)
        path = tmp_path_factory.mktemp(name) / f"{name}.safetensors"
        save_lora_weights(pipe, path, file_format="kohya" if name == "b" else "diffusers")
        found[name] = path, outputs(pipe)
    return found


@pytest.fixture
def pipe() -> Any:
    return make_pipe()


def test_both_components_from_one_file(pipe: Any, files: Any) -> None:
    bare = outputs(pipe)
    for name in ("a", "b"):
        load_lora_weights(pipe, files[name][0], name)
        assert close(outputs(pipe), files[name][1])
        assert not any(torch.allclose(x, y, atol=1e-3) for x, y in zip(outputs(pipe), bare, strict=True))
    set_adapters(pipe, "a")
    assert close(outputs(pipe), files["a"][1])
    set_adapters(pipe, ["a", "b"], [1.0, 0.0])
    assert close(outputs(pipe), files["a"][1])
    set_adapters(pipe, "b", {"unet": 1.0, "text_encoder": 0.0})
    assert close(outputs(pipe), (files["b"][1][0], bare[1]))
    with pytest.raises(AdapterError, match="no component has an adapter named c"):
        set_adapters(pipe, ["a", "c"])
    with pytest.raises(AdapterError, match=r"expected components, .*unet.*; found vea"):
        set_adapters(pipe, "a", {"vea": 1.0})
    with pytest.raises(AdapterError, match="expected one for each of 1 adapters, found 2"):
        set_adapters(pipe, "a", [1.0, 2.0])
    assert close(outputs(pipe), (files["b"][1][0], bare[1]))


@pytest.mark.parametrize("prepared", [False, True], ids=["live", "slots"])
def test_all_or_nothing_across_components(pipe: Any, files: Any, tmp_path: Path, prepared: bool) -> None:
    """A file whose last component doesn't fit leaves the first as it was."""
    if prepared:
        fxpeft.prepare_hotswap(pipe.unet, 8, targets=["to_q", "to_v", "conv1", "ff.net.2"])
        fxpeft.prepare_hotswap(pipe.text_encoder, 8, targets="all-linear")
    load_lora_weights(pipe, files["a"][0], "a")
    assert close(outputs(pipe), files["a"][1])
    tensors = load_file(files["b"][0])
    broken = tmp_path / "broken.safetensors"
    key = next(k for k in tensors if k.startswith("lora_te1_") and k.endswith("lora_up.weight"))
    save_file(tensors | {key: torch.ones(3, 3)}, broken)
    for hotswap in (False, *([True] if prepared else [])):
        with pytest.raises(CheckpointError, match=r"expected \[\d+, \d+\], found \[3, 3\]"):
            load_lora_weights(pipe, broken, "a" if hotswap else "b", hotswap=hotswap)
        assert close(outputs(pipe), files["a"][1])
        assert fxpeft.loaded_adapters(pipe.unet) == fxpeft.loaded_adapters(pipe.text_encoder)
        assert list(fxpeft.loaded_adapters(pipe.unet)) == ["a"]
    if prepared:
        load_lora_weights(pipe, files["b"][0], "a", hotswap=True)
        assert close(outputs(pipe), files["b"][1])
        only = {k: v for k, v in tensors.items() if k.startswith("lora_unet_")}
        save_file(only, broken)
        with pytest.raises(AdapterError, match="replaces 'a', but has nothing for text_encoder"):
            load_lora_weights(pipe, broken, "a", hotswap=True)
        assert close(outputs(pipe), files["b"][1])
    with pytest.raises(AdapterError, match="there is an adapter named 'a' already"):
        load_lora_weights(pipe, files["a"][0], "a")
    if prepared:
        fxpeft.delete_adapter(pipe.text_encoder, "a")
        load_lora_weights(pipe, files["a"][0], "a", hotswap=True)  # which brings one for both
        assert close(outputs(pipe), files["a"][1])
        with pytest.raises(AdapterError, match="no adapter named 'c' to replace in"):
            load_lora_weights(pipe, files["a"][0], "c", hotswap=True)


def test_what_is_no_pipelines_file(pipe: Any, tmp_path: Path) -> None:
    fxpeft.add_adapter(pipe.unet, fxpeft.LoraConfig(r=2, target_modules=["to_q"]))
    fxpeft.save_adapter(pipe.unet, tmp_path)
    with pytest.raises(AdapterError, match="is of one model"):
        load_lora_weights(pipe, tmp_path, "a")
    save_file(
        {"vea.x.lora_A.weight": torch.ones(1, 2), "vea.x.lora_B.weight": torch.ones(2, 1)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(CheckpointError, match="has no"):
        load_lora_weights(pipe, tmp_path / "x.safetensors", "a")


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


@torch.no_grad()
def flow(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return model(
        hidden_states=torch.randn(1, 6, 4, generator=generator), timestep=torch.tensor([0.5]),
        encoder_hidden_states=torch.randn(1, 5, 12, generator=generator), guidance=None,
        pooled_projections=torch.randn(1, 10, generator=generator), txt_ids=torch.zeros(5, 3), img_ids=torch.ones(6, 3),
    ).sample  # fmt: skip


def test_names_that_diffusers_knows(tmp_path: Path) -> None:
    """kohya's Flux file has one product for q, k and v, which diffusers parts; outputs are diffusers' own."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"img_attn_qkv": (32, 96), "img_attn_proj": (32, 32), "txt_mlp_0": (32, 128)}
    tensors: dict[str, Tensor] = {}
    for number, (name, (into, out)) in enumerate(sizes.items()):
        site = f"lora_unet_double_blocks_0_{name}"
        tensors[f"{site}.lora_down.weight"] = 0.3 * torch.randn(4, into, generator=generator)
        tensors[f"{site}.lora_up.weight"] = 0.3 * torch.randn(out, 4, generator=generator)
        tensors[f"{site}.alpha"] = torch.tensor(2.0 + number)
    save_file(tensors, tmp_path / "flux.safetensors")
    theirs = flux()
    theirs.load_lora_adapter(FluxPipeline.lora_state_dict(dict(tensors)), prefix="transformer")
    ours = flux()
    pipe = FluxPipeline(DDIMScheduler(), None, None, None, None, None, ours)
    bare = flow(ours)
    load_lora_weights(pipe, tmp_path / "flux.safetensors", "a")
    torch.testing.assert_close(flow(ours), flow(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(flow(ours), bare, atol=1e-2)
    assert any(isinstance(m, peft.tuners.lora.LoraLayer) for m in theirs.modules())
    tensors["lora_unet_double_blocks_0_unheard_of.lora_down.weight"] = torch.ones(4, 32)
    save_file(tensors, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError):
        load_lora_weights(pipe, tmp_path / "more.safetensors", "b")
    assert list(fxpeft.loaded_adapters(ours)) == ["a"]
