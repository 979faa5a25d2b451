"""diffusers' hot-swap recipe with real Inductor: files of any targets, ranks and methods, nothing recompiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, UNet2DConditionModel
from image_models import close, drawn, flow, flux, pipeline, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxpeft
from fxpeft.errors import AdapterError
from fxpeft.integrations.diffusers import save_lora_weights

pytestmark = pytest.mark.usefixtures("_installed_here")
UNET: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "lora_alpha": 5, "target_modules": ["to_q", "conv1"], "alpha_pattern": {"conv1": 7}},
    "b": {"r": 6, "target_modules": ["ff.net.2", "conv_shortcut"], "rank_pattern": {"conv_shortcut": 2}},
    "c": {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "conv1", "conv_shortcut"], "use_dora": True},
}
FLUX: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "lora_alpha": 5, "target_modules": ["attn.to_q", "proj_mlp"]},
    "b": {"r": 6, "target_modules": ["attn.to_q", "attn.add_k_proj"], "rank_pattern": {"add_k_proj": 2}},
    "c": {"r": 2, "lora_alpha": 3, "target_modules": ["proj_mlp", "attn.to_out.0"], "lora_bias": True},
}
TEXT: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "target_modules": ["q_proj"]}, "b": {"r": 4, "lora_alpha": 3, "target_modules": ["fc2"]},
    "c": {"r": 3, "target_modules": ["q_proj", "fc2"], "use_dora": True},
}  # fmt: skip


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("UpBlock2D",), block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=12, attention_head_dim=2,
    ).eval()  # fmt: skip


def flux_pipeline() -> FluxPipeline:
    return FluxPipeline(None, None, None, None, None, None, flux())


def targets(*tables: dict[str, dict[str, Any]]) -> list[str]:
    return sorted({name for table in tables for config in table.values() for name in config["target_modules"]})


def falling(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A scale for the next step."""
    pipe._cross_attention_kwargs = {"scale": 1.5 - step}
    return kwargs


def swept(pipe: Any) -> Tensor:
    return drawn(pipe, cross_attention_kwargs={"scale": 0.5}, callback_on_step_end=falling)


@pytest.fixture(scope="module")
def unet_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor, Tensor]]:
    """Name -> file of a UNet and a text encoder, and what eager models without slots draw with it."""
    found = {}
    for name in UNET:
        pipe: Any = pipeline(small_unet)
        for model, config in ((pipe.unet, UNET[name]), (pipe.text_encoder, TEXT[name])):
            fxpeft.add_adapter(model, fxpeft.LoraConfig(**config))
            randomise(model, ord(name))
        path = tmp_path_factory.mktemp("unet") / f"{name}.safetensors"
        save_lora_weights(pipe, path)
        with fxpeft.installed("diffusers"):
            found[name] = path, drawn(pipe), swept(pipe)
    return found


@pytest.fixture(scope="module")
def _installed_here() -> Iterator[None]:
    with fxpeft.installed("diffusers"), torch._dynamo.config.patch(error_on_recompile=True):
        torch._dynamo.reset()
        yield


def test_a_whole_unet(unet_files: Any, tmp_path: Path) -> None:
    """The recipe with two lines more: the import and ``install``."""
    pipe: Any = pipeline(small_unet)
    pipe.enable_lora_hotswap(target_rank=8, targets=targets(UNET, TEXT))
    pipe.load_lora_weights(unet_files["a"][0], adapter_name="style")
    pipe.unet.compile(fullgraph=True)
    assert close(drawn(pipe), unet_files["a"][1], 1e-4)
    for before, after in itertools.permutations(unet_files, 2):
        for name in (before, after):
            pipe.load_lora_weights(unet_files[name][0], adapter_name="style", hotswap=True)
            assert close(drawn(pipe), unet_files[name][1], 1e-4), (before, after)
        assert close(swept(pipe), unet_files[after][2], 1e-4), after
    pipe.load_lora_weights(unet_files["a"][0], adapter_name="other")
    pipe.set_adapters(["style", "other"], [0.0, 1.0])
    assert close(drawn(pipe), unet_files["a"][1], 1e-4)
    pipe.disable_lora()
    bare = drawn(pipe)
    assert close(bare, drawn(pipeline(small_unet)), 1e-4)
    pipe.enable_lora()
    pipe.set_adapters("style")
    tensors = load_file(unet_files["a"][0])
    text = next(key for key in tensors if key.startswith("text_encoder") and "lora_B" in key)
    for changed, match in (
        ({**tensors, text: torch.ones(3, 3)}, "expected"),  # what diffusers would notice behind the UNet's swap
        ({"unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 1, 1, 1)}
         | {k: v for k, v in tensors.items() if k.startswith("text")}, "conv_in: has no slot"),
        ({k: torch.cat([v] * 4, 0 if "lora_A" in k else 1) for k, v in tensors.items()}, r"above max_rank 8"),
    ):  # fmt: skip
        save_file(changed, tmp_path / "broken.safetensors")
        with pytest.raises(AdapterError, match=match):
            pipe.load_lora_weights(tmp_path / "broken.safetensors", adapter_name="style", hotswap=True)
        assert close(drawn(pipe), unet_files[after][1], 1e-4), match
    pipe.unload_lora_weights()
    assert close(drawn(pipe), bare)


def test_repeated_blocks_of_flux(tmp_path: Path) -> None:
    files = {}
    for name, config in FLUX.items():
        eager: Any = flux()
        fxpeft.add_adapter(eager, fxpeft.LoraConfig(**config))
        randomise(eager, ord(name))
        fxpeft.save_components(tmp_path / name / "pytorch_lora_weights.safetensors", {"transformer": eager})
        files[name] = flow(eager), flow(eager, joint_attention_kwargs={"scale": 0.5})
    pipe: Any = flux_pipeline()
    pipe.enable_lora_hotswap(target_rank=8, targets=targets(FLUX), methods=("lora", "lora_bias"))
    pipe.load_lora_weights(tmp_path / "a", adapter_name="style")
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):  # the bare model's blocks see inputs of two strides
        flow(pipe.transformer)
    assert close(flow(pipe.transformer), files["a"][0])
    for pair in itertools.permutations(files, 2):
        for name in pair:
            pipe.load_lora_weights(tmp_path / name, adapter_name="style", hotswap=True)
            assert close(flow(pipe.transformer), files[name][0]), pair
            for scale, expected in ((0.5, files[name][1]), (1.0, files[name][0])):
                assert close(flow(pipe.transformer, joint_attention_kwargs={"scale": scale}), expected), pair
    fxpeft.add_adapter(dora := flux(), fxpeft.LoraConfig(r=2, target_modules=["attn.to_q"], use_dora=True))
    fxpeft.save_components(tmp_path / "d" / "pytorch_lora_weights.safetensors", {"transformer": dora})
    with pytest.raises(AdapterError, match=r"its method, dora: declare"):
        pipe.load_lora_weights(tmp_path / "d", adapter_name="style", hotswap=True)
    assert close(flow(pipe.transformer), files[pair[1]][0])
