"""Files of image tools in each model's pipeline, and models that take diffusers' own: outputs as with PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_models as models
import peft
import pytest
import torch
from diffusers.loaders import lora_pipeline as loaders
from image_models import close, output, peft_randomise, random
from safetensors.torch import save_file
from torch import Tensor

import fxpeft
from fxpeft.errors import CheckpointError
from fxpeft.integrations.diffusers import load_lora_weights

GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "diffusers.md"
#: model -> how to make it, and what its adapter targets
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "UNet2DConditionModel, SD 1.5": (models.unet, ["to_q", "ff.net.2", "conv1", "proj_in"]),
    "UNet2DConditionModel, SDXL": (models.sdxl, ["to_k", "ff.net.0.proj", "conv2", "add_embedding.linear_1"]),
    "SD3Transformer2DModel": (models.sd3, ["attn.to_q", "attn.add_k_proj", "ff.net.2", "norm1.linear"]),
    "FluxTransformer2DModel": (models.flux, ["attn.to_q", "attn.to_add_out", "proj_mlp", "x_embedder"]),
    "Flux2Transformer2DModel": (models.flux2, ["to_q", "to_qkv_mlp_proj", "linear_in", "x_embedder"]),
    "WanTransformer3DModel": (models.wan, ["attn1.to_q", "attn2.to_k", "ffn.net.2", "patch_embedding"]),
    "LTXVideoTransformer3DModel": (models.ltx, ["attn1.to_q", "attn2.to_out.0", "ff.net.2", "proj_in"]),
    "QwenImageTransformer2DModel": (models.qwen, ["attn.to_q", "add_v_proj", "img_mlp.net.2", "img_mod.1"]),
    "HunyuanVideoTransformer3DModel": (models.hunyuan, ["attn.to_q", "add_q_proj", "ff.net.2", "proj_mlp"]),
    "CLIPTextModel": (models.clip, ["q_proj", "out_proj", "fc1"]),
    "T5EncoderModel": (models.t5, ["SelfAttention.q", "wo"]),
}
ENCODERS = ("CLIPTextModel", "T5EncoderModel")


def pairs(
    sites: dict[str, tuple[int, int]], *, kohya: bool, alphas: bool = True, dora: bool = False, step: int = 1
) -> dict[str, Tensor]:
    """Factors, and where a tool writes them alphas and magnitudes, of sites with these inputs and outputs."""
    names = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    found: dict[str, Tensor] = {}
    for seed, (site, (into, out)) in enumerate(sites.items()):
        found[f"{site}.{names[0]}.weight"] = 0.3 * random(3, into, seed=seed)
        found[f"{site}.{names[1]}.weight"] = 0.3 * random(out, 3, seed=seed + 100)
        if alphas:
            found[f"{site}.alpha"] = torch.tensor(2.0 + step * (seed % 3))
        if dora:
            found[f"{site}.dora_scale"] = 1 + 0.1 * random(out, 1, seed=seed + 200)
    return found


def xlabs() -> dict[str, Tensor]:
    sites = {
        "double_blocks.0.processor.qkv_lora1": (32, 96), "double_blocks.1.processor.qkv_lora2": (32, 96),
        "double_blocks.0.processor.proj_lora1": (32, 32), "single_blocks.0.processor.qkv_lora": (32, 96),
        "single_blocks.1.processor.proj_lora": (160, 32),
    }  # fmt: skip
    found = pairs(sites, kohya=True, alphas=False)
    return {key.replace("lora_down.", "down.").replace("lora_up.", "up."): tensor for key, tensor in found.items()}


def wan(start: str, between: str) -> dict[str, tuple[int, int]]:
    kinds = [("self_attn", name) for name in "qkvo"] + [("cross_attn", name) for name in "qkvo"]
    sites = {f"{start}{between.join(('blocks', '0', kind, name))}": (24, 24) for kind, name in kinds}
    return sites | {
        f"{start}{between.join(('blocks', '0', 'ffn', '0'))}": (24, 20),
        f"{start}{between.join(('blocks', '0', 'ffn', '2'))}": (20, 24),
    }


def wan_biases() -> dict[str, Tensor]:
    found = pairs(wan("diffusion_model.", "."), kohya=False, alphas=False)
    outs = {key.removesuffix(".lora_B.weight"): len(t) for key, t in found.items() if "lora_B" in key}
    return found | {f"{site}.diff_b": random(out, seed=7) for site, out in outs.items()}


KOHYA_FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (32, 96), "lora_unet_double_blocks_1_img_attn_proj": (32, 32),
    "lora_unet_double_blocks_0_txt_mlp_0": (32, 128), "lora_unet_single_blocks_1_linear2": (160, 32),
}  # fmt: skip
SGM = {
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": (8, 8),
    "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k": (12, 16),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (12, 12),
}
QWEN = {"transformer_blocks_0_attn_to_q": (32, 32), "transformer_blocks_0_img_mlp_net_2": (128, 32), "img_in": (16, 32)}
HUNYUAN = {
    "double_blocks.0.img_attn_qkv": (20, 60), "double_blocks.0.txt_attn_proj": (20, 20),
    "double_blocks.0.img_mlp.fc1": (20, 80), "single_blocks.0.linear2": (100, 20),
}  # fmt: skip
FLUX2 = {
    "diffusion_model.double_blocks.0.img_attn.qkv": (32, 96), "diffusion_model.double_blocks.0.txt_mlp.2": (96, 32),
    "diffusion_model.single_blocks.0.linear2": (128, 32),
}  # fmt: skip
LTX = {"transformer_blocks.0.attn1.to_q": (16, 16), "transformer_blocks.0.ff.net.2": (64, 16)}
#: tool and what its keys look like -> the class that reads them, the model, and a file
FORMATS: dict[str, tuple[Any, str, Callable[[], dict[str, Tensor]]]] = {
    "kohya, sgm's blocks": (  # even alphas: of a UNet diffusers drops the others
        loaders.StableDiffusionLoraLoaderMixin, "UNet2DConditionModel, SD 1.5", lambda: pairs(SGM, kohya=True, step=0)
    ),
    "kohya, Flux": (
        loaders.FluxLoraLoaderMixin, "FluxTransformer2DModel", lambda: pairs(KOHYA_FLUX, kohya=True)
    ),
    "xlabs, Flux": (loaders.FluxLoraLoaderMixin, "FluxTransformer2DModel", xlabs),
    "BFL, Flux2": (
        loaders.Flux2LoraLoaderMixin, "Flux2Transformer2DModel", lambda: pairs(FLUX2, kohya=False, alphas=False)
    ),
    "Wan's own names, with alphas": (
        loaders.WanLoraLoaderMixin, "WanTransformer3DModel", lambda: pairs(wan("diffusion_model.", "."), kohya=True)
    ),
    "Wan's own names, with biases": (loaders.WanLoraLoaderMixin, "WanTransformer3DModel", wan_biases),
    "musubi, Wan": (
        loaders.WanLoraLoaderMixin, "WanTransformer3DModel", lambda: pairs(wan("lora_unet_", "_"), kohya=True)
    ),
    "musubi, Qwen": (
        loaders.QwenImageLoraLoaderMixin, "QwenImageTransformer2DModel",
        lambda: pairs({f"lora_unet_{site}": size for site, size in QWEN.items()}, kohya=True),
    ),
    "Hunyuan's own names": (
        loaders.HunyuanVideoLoraLoaderMixin, "HunyuanVideoTransformer3DModel",
        lambda: pairs({f"transformer.{s}": size for s, size in HUNYUAN.items()}, kohya=False, alphas=False),
    ),
    "ComfyUI, LTX": (
        loaders.LTXVideoLoraLoaderMixin, "LTXVideoTransformer3DModel",
        lambda: pairs({f"diffusion_model.{s}": size for s, size in LTX.items()}, kohya=False, alphas=False),
    ),
}  # fmt: skip


_Z, _L = "layers.0.attention", "layers.0.feed_forward"
#: tool and model -> the class that reads its names, the model, its settings, whether its keys are kohya's, and a file's
#: sites -> the model's; tried without weights: test_diffusers_names.py looks where each update goes
PLACES: dict[str, tuple[Any, str, dict[str, Any], bool, dict[str, list[str]]]] = {
    "kohya, Flux2": (
        loaders.Flux2LoraLoaderMixin, "Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}, True,
        {"lora_unet_double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{n}" for n in "qkv"],
         "lora_unet_double_blocks_0_txt_mlp_2": ["transformer_blocks.0.ff_context.linear_out"],
         "lora_unet_single_blocks_0_linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"]},
    ),
    "ai-toolkit, Flux3": (
        loaders.Flux3LoraLoaderMixin, "Flux3Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}, False,
        {"diffusion_model.single_blocks.0.q_proj": ["single_transformer_blocks.0.attn.to_q"],
         "diffusion_model.single_blocks.0.mlp_in": ["single_transformer_blocks.0.ff.linear_in"]},
    ),
    "ai-toolkit, HiDream": (
        loaders.HiDreamImageLoraLoaderMixin, "HiDreamImageTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1, "caption_channels": [8, 8], "llama_layers": [0], "patch_size": 2},
        False,
        {"diffusion_model.double_stream_blocks.0.block.attn1.to_q": ["double_stream_blocks.0.block.attn1.to_q"]},
    ),
    "ComfyUI, LTX2": (
        loaders.LTX2LoraLoaderMixin, "LTX2VideoTransformer3DModel", {"num_layers": 1}, False,
        {"diffusion_model.patchify_proj": ["proj_in"],
         "diffusion_model.transformer_blocks.0.audio_attn1.to_k": ["transformer_blocks.0.audio_attn1.to_k"]},
    ),
    "Lumina2's own names": (
        loaders.Lumina2LoraLoaderMixin, "Lumina2Transformer2DModel", {"num_layers": 1, "num_refiner_layers": 1}, False,
        {"diffusion_model.layers.0.attention.qkv": [f"layers.0.attn.to_{n}" for n in "qkv"],
         "diffusion_model.layers.0.attention.out": ["layers.0.attn.to_out.0"],
         **{f"diffusion_model.{_L}.w{n}": [f"{_L}.linear_{n}"] for n in (1, 2, 3)},
         "diffusion_model.layers.0.adaLN_modulation.1": ["layers.0.norm1.linear"]},
    ),
    "Anima's own names": (
        loaders.AnimaLoraLoaderMixin, "CosmosTransformer3DModel", {"num_layers": 1}, False,
        {"diffusion_model.blocks.0.self_attn.q_proj": ["transformer_blocks.0.attn1.to_q"],
         "diffusion_model.blocks.0.mlp.layer2": ["transformer_blocks.0.ff.net.2"]},
    ),
    "kohya, Z-Image": (
        loaders.ZImageLoraLoaderMixin, "ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}, True,
        {"lora_unet_layers_0_attention_to_q": [f"{_Z}.to_q"], "lora_unet_layers_0_feed_forward_w2": [f"{_L}.w2"]},
    ),
    "ai-toolkit, Z-Image": (
        loaders.ZImageLoraLoaderMixin, "ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}, False,
        {f"diffusion_model.{_Z}.to_k": [f"{_Z}.to_k"], f"diffusion_model.{_L}.w1": [f"{_L}.w1"]},
    ),
    "ai-toolkit, Ideogram4": (
        loaders.Ideogram4LoraLoaderMixin, "Ideogram4Transformer2DModel", {"num_layers": 1}, False,
        {f"diffusion_model.{_Z}.qkv": [f"{_Z}.to_{n}" for n in "qkv"], f"diffusion_model.{_Z}.o": [f"{_Z}.to_out.0"]},
    ),
    "ComfyUI, Krea2": (
        loaders.Krea2LoraLoaderMixin, "Krea2Transformer2DModel", {"num_layers": 1}, False,
        {"diffusion_model.blocks.0.attn.wk": ["transformer_blocks.0.attn.to_k"], "diffusion_model.first": ["img_in"],
         "diffusion_model.blocks.0.mlp.down": ["transformer_blocks.0.ff.down"]},
    ),
    "ACE-Step's own names": (
        loaders.AceStepLoraLoaderMixin, "AceStepTransformer1DModel", {"num_hidden_layers": 1}, False,
        {"base_model.model.layers.0.self_attn.k_proj": ["layers.0.self_attn.to_k"],
         "base_model.model.layers.0.cross_attn.o_proj": ["layers.0.cross_attn.to_out.0"]},
    ),
    "musubi, MiniMax-H3": (
        loaders.MiniMaxH3LoraLoaderMixin, "MiniMaxH3Transformer3DModel", {"num_layers": 1, "num_refiner_layers": 1},
        True,
        {"lora_unet_blocks_0_attn_qkv_proj": [f"transformer_blocks.0.attn.to_{n}" for n in "qkv"],
         "lora_unet_blocks_0_mlp_fc1": ["turned", "transformer_blocks.0.ff.net.0.proj"],
         "lora_unet_token_refiner_blocks_0_attn_out_proj": ["token_refiner.refiner_blocks.0.attn.to_out.0"]},
    ),
    "ai-toolkit, Ernie": (
        loaders.ErnieImageLoraLoaderMixin, "ErnieImageTransformer2DModel", {"num_layers": 1}, False,
        {"diffusion_model.layers.0.self_attention.to_q": ["layers.0.self_attention.to_q"]},
    ),
}  # fmt: skip


def pipeline_of(mixin: Any, parts: dict[str, Any]) -> Any:
    """A pipeline of nothing but models."""
    return type("Pipe", (mixin,), {"components": property(lambda self: parts), **parts})()


@pytest.mark.parametrize("name", FORMATS)
def test_a_tools_file(tmp_path: Path, name: str) -> None:
    mixin, kind, write = FORMATS[name]
    make, _ = MODELS[kind]
    tensors, component = write(), "unet" if "UNet" in kind else "transformer"
    theirs, ours = make(), make()
    text = {"text_encoder": models.clip()} if component == "unet" else {}
    copied = {key: tensor.clone() for key, tensor in tensors.items()}  # diffusers multiplies some in place
    converted = mixin.lora_state_dict(copied, return_alphas=True, unet_config=getattr(theirs, "config", None))
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    theirs.load_lora_adapter(state, prefix=component, network_alphas=alphas)
    bare = output(ours)
    save_file(tensors, tmp_path / "x.safetensors")
    load_lora_weights(pipeline_of(mixin, {component: ours, **text}), tmp_path / "x.safetensors")
    assert close(output(ours), output(theirs))
    assert not close(output(ours), bare, 1e-3)
    more = tensors | {
        "lora_unet_unheard_of.lora_down.weight": torch.ones(3, 5),
        "unheard.of.lora_A.weight": torch.ones(3, 5),
    }
    save_file(more, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError):
        load_lora_weights(pipeline_of(mixin, {component: make(), **text}), tmp_path / "more.safetensors", "b")


@pytest.mark.parametrize("name", MODELS)
def test_a_models_file_of_diffusers(tmp_path: Path, name: str) -> None:
    make, targets = MODELS[name]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, rank_pattern={targets[0]: 2}, alpha_pattern={targets[-1]: 7}
    )
    theirs, ours = make(), make()
    bare = output(ours)
    if name in ENCODERS:
        peft.inject_adapter_in_model(config, theirs)
        peft_randomise(theirs, 1)
        tensors = peft.get_peft_model_state_dict(theirs, adapter_name="default")
        loaders.StableDiffusionLoraLoaderMixin.save_lora_weights(
            tmp_path, text_encoder_lora_layers=tensors, text_encoder_lora_adapter_metadata=config.to_dict()
        )
    else:
        theirs.add_adapter(config)
        peft_randomise(theirs, 1)
        theirs.save_lora_adapter(tmp_path)
    expected = output(theirs)
    fxpeft.load_adapter(ours, tmp_path)
    assert close(output(ours), expected)
    assert not close(expected, bare, 1e-3)
    fxpeft.prepare_hotswap(ours, 8)
    assert close(output(ours), expected)
    if name not in ENCODERS:
        argument = "cross_attention_kwargs" if "UNet" in name else "attention_kwargs"
        argument = "joint_attention_kwargs" if any(n in name for n in ("SD3", "Flux")) else argument
        given = {argument: {"scale": 0.5}}
        assert close(output(ours, **given), output(theirs, **given))
        assert not close(output(ours, **given), expected, 1e-3)


def test_magnitudes_of_a_file_with_other_names(tmp_path: Path) -> None:
    """diffusers drops them; q, k and v that lie in one have each its part."""
    tensors = pairs(KOHYA_FLUX, kohya=True, dora=True)
    save_file(tensors, tmp_path / "x.safetensors")
    ours = models.flux()
    load_lora_weights(pipeline_of(loaders.FluxLoraLoaderMixin, {"transformer": ours}), tmp_path / "x.safetensors")
    config = fxpeft.adapter_config(ours)
    assert isinstance(config, fxpeft.LoraConfig)
    assert config.use_dora
    state = fxpeft.adapter_state_dict(ours)
    site = "lora_unet_double_blocks_0_img_attn_qkv"
    q, k, v = tensors[f"{site}.dora_scale"].flatten().chunk(3)
    for name, expected in (("to_q", q), ("to_k", k), ("to_v", v)):
        found = next(
            t
            for key, t in state.items()
            if f"transformer_blocks.0.attn.{name}.lora_magnitude" in key and "single" not in key
        )
        assert torch.equal(found, expected)
    expected = models.flux()
    weight, scale = expected.transformer_blocks[0].attn.to_k.weight, float(tensors[f"{site}.alpha"]) / 3
    update = tensors[f"{site}.lora_up.weight"][32:64] @ tensors[f"{site}.lora_down.weight"] * scale
    turned = weight.detach() + update
    x = random(2, 32)
    mine = ours.transformer_blocks[0].attn.to_k(x) - expected.transformer_blocks[0].attn.to_k.bias
    assert close(mine, x @ (turned * (k / turned.norm(dim=1)).unsqueeze(1)).T)


def test_what_diffusers_leaves_out_is_told(tmp_path: Path) -> None:
    tensors = wan_biases() | {
        "diffusion_model.blocks.0.norm3.diff_b": torch.ones(24),
        "diffusion_model.blocks.0.norm3.diff": torch.zeros(24),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    pipe = pipeline_of(loaders.WanLoraLoaderMixin, {"transformer": models.wan()})
    with pytest.warns(UserWarning, match=r"leaves these out, which are not zero:\n  .*norm3\.diff_b$"):
        load_lora_weights(pipe, tmp_path / "x.safetensors")


def test_norms_of_a_flux_file_are_the_adapters(tmp_path: Path) -> None:
    """With diffusers they are written into the model, for good; here another adapter has its own."""
    tensors = {
        f"transformer.{key}": t
        for key, t in pairs({"transformer_blocks.0.attn.to_q": (32, 32)}, kohya=False, alphas=False).items()
    }
    norms = {f"transformer.transformer_blocks.0.attn.norm_{n}.weight": 1 + random(16, seed=5) for n in ("q", "added_k")}
    save_file(tensors | norms, tmp_path / "x.safetensors")
    theirs: Any = models.flux()
    theirs.load_lora_adapter(dict(tensors), prefix="transformer")
    plain = output(theirs)
    theirs.load_state_dict({key.removeprefix("transformer."): t for key, t in norms.items()}, strict=False)
    expected = output(theirs)
    assert not close(plain, expected, 1e-3)
    for prepared in (False, True):
        ours: Any = models.flux()
        bare = output(ours)
        if prepared:
            fxpeft.prepare_hotswap(ours, 8, targets=["to_q"], modules_to_save=["norm_q", "norm_added_k"])
        load_lora_weights(pipeline_of(loaders.FluxLoraLoaderMixin, {"transformer": ours}), tmp_path / "x.safetensors")
        assert close(output(ours), expected), prepared
        fxpeft.disable_adapters(ours)
        assert close(output(ours), bare)


def test_a_control_lora_is_refused(tmp_path: Path) -> None:
    save_file(
        {f"transformer.{key}": t for key, t in pairs({"x_embedder": (8, 32)}, kohya=False, alphas=False).items()},
        tmp_path / "x.safetensors",
    )
    ours = models.flux()
    pipe = pipeline_of(loaders.FluxLoraLoaderMixin, {"transformer": ours})
    with pytest.raises(CheckpointError, match=r"x_embedder: takes 4 inputs, and the adapter's A has 8: a control LoRA"):
        load_lora_weights(pipe, tmp_path / "x.safetensors")
    assert not fxpeft.loaded_adapters(ours)


def table() -> str:
    """What this file's tests show, as the guide has it."""
    lines = ["| file | read by | tried on |", "|---|---|---|", "| diffusers' own | fxpeft | every model below |"]
    lines += ["| kohya | fxpeft | UNet2DConditionModel, CLIPTextModel |"]
    lines += [
        "| LyCORIS | fxpeft | UNet2DConditionModel, CLIPTextModel, FluxTransformer2DModel, Flux2Transformer2DModel |"
    ]
    lines += [f"| {name} | diffusers' `{mixin.__name__}` | {kind} |" for name, (mixin, kind, _) in FORMATS.items()]
    lines += [
        f"| {name} | diffusers' `{mixin.__name__}` | {kind}, by places |" for name, (mixin, kind, *_) in PLACES.items()
    ]
    lines += ["| BFL control, fal's Kontext | diffusers' `FluxLoraLoaderMixin` | FluxTransformer2DModel, by places |"]
    lines += ["", "| model | targets tried | a call's scale |", "|---|---|---|"]
    for name, (_, targets) in MODELS.items():
        lines.append(
            f"| {name} | {', '.join(f'`{t}`' for t in targets)} | {'of its pipeline' if name in ENCODERS else 'yes'} |"
        )
    return "\n".join(lines)


def test_the_guides_table_says_what_is_tested() -> None:
    found = re.search(r"<!-- formats -->\n\n(.*?)\n\n<!-- /formats -->", GUIDE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    assert found[1] == table(), f"the table should be:\n\n{table()}"
