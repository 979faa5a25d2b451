"""LyCORIS' files in a pipeline: names that diffusers' classes know of LoRAs alone, and its own methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import image_models as models
import pytest
import torch
from diffusers.loaders import lora_pipeline as loaders
from image_models import close, hidden, output
from lycoris_files import factors, loha, low_rank, merged, update
from safetensors.torch import save_file
from test_diffusers_formats import pipeline_of
from torch import Tensor, nn

import fxpeft
from fxpeft.errors import CheckpointError
from fxpeft.integrations.diffusers import load_lora_weights

Sites = dict[str, dict[str, Tensor]]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SGM = "lora_unet_input_blocks_1_1_transformer_blocks_0"
ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0"


def written(path: Path, sites: Sites) -> Path:
    save_file({f"{site}.{key}": tensor for site, own in sites.items() for key, tensor in own.items()}, path)
    return path


def stable(first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[Sites, Sites, Sites]:
    """Keys of sgm's blocks, and the sites of the UNet and the text encoder that they mean."""
    text, conv = factors(7, 2.0, lokr_w1=(2, 2), lokr_w2=(6, 6)), loha(8, 8, 8, 3, 3)
    return (
        {f"{SGM}_attn1_to_q": first, f"{SGM}_attn2_to_k": second, "lora_unet_input_blocks_1_0_in_layers_2": conv,
         "lora_te_text_model_encoder_layers_0_self_attn_q_proj": text},
        {f"{BLOCK}.attn1.to_q": first, f"{BLOCK}.attn2.to_k": second, "down_blocks.0.resnets.0.conv1": conv},
        {"encoder.layers.0.self_attn.q_proj": text},
    )  # fmt: skip


KRON = factors(3, 1.5, lokr_w1=(2, 2), lokr_w2_a=(4, 1), lokr_w2_b=(1, 4))
STABLE = {
    "LoHa": stable(loha(1, 8, 8), loha(2, 8, 12)),
    "mixed": stable(low_rank(4, 8, 8), factors(5, 9.0, lokr_w1=(2, 3), lokr_w2=(4, 4))),
    "with magnitudes": stable(
        KRON | {"dora_scale": 1 + 0.2 * models.random(8, 1)}, loha(6, 8, 12) | {"dora_scale": 2 + models.random(8, 1)}
    ),
}


@pytest.mark.parametrize("name", STABLE)
def test_names_of_sgms_blocks(tmp_path: Path, name: str) -> None:
    keys, unet, text = STABLE[name]
    if name == "with magnitudes":  # one method a component, and all of its sites with magnitudes
        conv = "lora_unet_input_blocks_1_0_in_layers_2"
        keys = {k: v for k, v in keys.items() if k != conv}
        unet = {k: v for k, v in unet.items() if "conv" not in k}
    parts = {"unet": models.unet(), "text_encoder": models.clip()}
    load_lora_weights(
        pipeline_of(loaders.StableDiffusionLoraLoaderMixin, parts), written(tmp_path / "x.safetensors", keys)
    )
    assert close(output(parts["unet"]), output(merged(models.unet(), unet)))
    assert close(output(parts["text_encoder"]), output(merged(models.clip(), text)))
    assert not close(output(parts["unet"]), output(models.unet()), 1e-3)
    assert not close(output(parts["text_encoder"]), output(models.clip()), 1e-3)


def parted(model: nn.Module, fused: Sites, where: dict[str, list[str]]) -> nn.Module:
    """A model with each update in the weights that its rows are of."""
    for site, own in fused.items():
        names = where[site]
        weights: list[Any] = [model.get_submodule(name).weight for name in names]
        shape = torch.Size([sum(len(w) for w in weights), weights[0].shape[1]])
        for weight, part in zip(weights, update(own, shape).split([len(w) for w in weights]), strict=True):
            weight.data += part
    return model


def test_a_part_of_a_sites_rows(tmp_path: Path) -> None:
    """q, k and v of Flux lie in one, of which a LoKr's parts are no LoKrs."""
    where = {
        "lora_unet_double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{n}" for n in "qkv"],
        "lora_unet_double_blocks_1_txt_attn_qkv": [f"transformer_blocks.1.attn.add_{n}_proj" for n in "qkv"],
        "lora_unet_single_blocks_1_linear2": ["single_transformer_blocks.1.proj_out"],
    }
    made = [
        (loha(1, 96, 32), loha(2, 96, 32), loha(3, 32, 160)),
        (factors(4, 2.0, lokr_w1=(8, 4), lokr_w2=(12, 8)), loha(5, 96, 32), low_rank(6, 32, 160)),
        (factors(7, 2.0, lokr_w1=(4, 4), lokr_w2_a=(24, 2), lokr_w2_b=(2, 8)),) * 2 + (loha(8, 32, 160),),
    ]
    for number, own in enumerate(made):
        sites = dict(zip(where, own, strict=True))
        ours = models.flux()
        path = written(
            tmp_path / f"{number}.safetensors", {s: {k: t.clone() for k, t in o.items()} for s, o in sites.items()}
        )
        load_lora_weights(pipeline_of(loaders.FluxLoraLoaderMixin, {"transformer": ours}), path)
        expected = output(parted(models.flux(), sites, where))
        assert close(output(ours), expected), number
        assert not close(expected, output(models.flux()), 1e-3)
        assert fxpeft.adapter_config(ours).peft_type == ("LORA" if number else "LOHA")


def test_dotted_names_of_flux2(tmp_path: Path) -> None:
    """Which diffusers reads too, for which it joins q, k and v of the model; here the model stays as it is."""
    where = {
        "diffusion_model.double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{n}" for n in "qkv"],
        "diffusion_model.single_blocks.0.linear2": ["single_transformer_blocks.0.attn.to_out"],
    }
    own = (
        factors(1, 2.0, lokr_w1=(8, 4), lokr_w2=(12, 8)),
        factors(2, 3.0, lokr_w1=(4, 8), lokr_w2_a=(8, 1), lokr_w2_b=(1, 16)),
    )
    sites = dict(zip(where, own, strict=True))
    path = written(tmp_path / "x.safetensors", sites)
    ours = models.flux2()
    load_lora_weights(pipeline_of(loaders.Flux2LoraLoaderMixin, {"transformer": ours}), path)
    assert close(output(ours), output(parted(models.flux2(), sites, where)))


def test_swapped_by_the_pipelines_own_methods(tmp_path: Path) -> None:
    """diffusers refuses them all, as it does LoHa everywhere and LoKr but of two classes."""
    named: dict[str, Sites] = {
        "LoHa": {f"lycoris_{ATTENTION}_attn1_to_q": loha(1, 8, 8), f"lycoris_{ATTENTION}_attn2_to_k": loha(2, 8, 12)},
        "LoKr": {f"lora_unet_{ATTENTION}_attn1_to_q": KRON}, **{f"sgm, {n}": STABLE[n][0] for n in STABLE},
    }  # fmt: skip
    files = {name: written(tmp_path / f"{name}.safetensors", sites) for name, sites in named.items()}
    theirs: Any = models.pipeline()
    for path in files.values():
        with pytest.raises((ValueError, RuntimeError, KeyError, AttributeError)):
            theirs.load_lora_weights(path, adapter_name="a")
        assert not theirs.get_list_adapters()
    sites = {
        "LoHa": {f"{BLOCK}.attn1.to_q": loha(1, 8, 8), f"{BLOCK}.attn2.to_k": loha(2, 8, 12)},
        "LoKr": {f"{BLOCK}.attn1.to_q": KRON}, "sgm, LoHa": STABLE["LoHa"][1], "sgm, mixed": STABLE["mixed"][1],
    }  # fmt: skip
    expected = {name: output(merged(models.unet(), own)) for name, own in sites.items()}
    with fxpeft.installed("diffusers"):
        pipe: Any = models.pipeline()
        bare = output(pipe.unet)
        pipe.enable_lora_hotswap(target_rank=16)
        assert not any(name.endswith("slot.w1") for name, _ in pipe.unet.named_buffers())  # unless one asks for it
        pipe.load_lora_weights(files["LoHa"], adapter_name="a")
        assert close(output(pipe.unet), expected["LoHa"])
        for name in ("LoKr", "sgm, LoHa", "sgm, mixed"):
            pipe.load_lora_weights(files[name], adapter_name="a", hotswap=True)
            assert close(output(pipe.unet), expected[name]), name
        text = output(merged(models.clip(), STABLE["mixed"][2]))
        assert close(hidden(pipe.text_encoder), text)
        wrong = written(tmp_path / "x.safetensors", STABLE["LoHa"][0] | {"lora_unet_elsewhere": loha(9, 8, 8)})
        with pytest.raises(CheckpointError):
            pipe.load_lora_weights(wrong, adapter_name="a", hotswap=True)
        assert close(output(pipe.unet), expected["sgm, mixed"])
        assert close(hidden(pipe.text_encoder), text)
        pipe.set_adapters("a", 0.0)
        assert close(output(pipe.unet), bare)
