"""Where tensors of files with other tools' names go: each update in the rows that its weight has in the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import image_models as models
import pytest
import torch
from diffusers.loaders import lora_pipeline as loaders
from image_models import close, output, random
from lycoris_files import merged
from safetensors.torch import save_file
from test_diffusers_formats import PLACES, pairs, pipeline_of
from torch import Tensor, nn

import fxpeft
from fxpeft.checkpoint.adapter_file import site_scale
from fxpeft.errors import CheckpointError
from fxpeft.integrations.diffusers import load_lora_weights


def on_meta(kind: str, settings: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return getattr(diffusers, kind)(**settings)


def updates(model: nn.Module) -> dict[str, Tensor]:
    """Site -> what its update makes of an input."""
    state = fxpeft.adapter_state_dict(model)
    config = fxpeft.adapter_config(model)
    found = {}
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scale = site_scale(config, site, len(a))
            found[site] = scale * state[key.replace("lora_A", "lora_B")] @ (a @ random(a.shape[1]))
    return found


def expected(model: nn.Module, sites: Mapping[str, list[str]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for site, own in sites.items():
        turned, names = own[0] == "turned", [name for name in own if name != "turned"]
        a = tensors.get(f"{site}.lora_A.weight", tensors.get(f"{site}.lora_down.weight"))
        b = tensors.get(f"{site}.lora_B.weight", tensors.get(f"{site}.lora_up.weight"))
        assert a is not None
        assert b is not None
        update = b @ (a @ random(a.shape[1])) * (float(tensors.get(f"{site}.alpha", torch.tensor(len(a)))) / len(a))
        if turned:
            update = torch.cat(update.chunk(2)[::-1])
        sizes = [model.get_submodule(name).out_features for name in names]
        found |= dict(zip(names, update.split(sizes), strict=True))
    return found


@pytest.mark.parametrize("name", PLACES)
def test_every_update_has_its_rows(name: str) -> None:
    mixin, kind, settings, kohya, sites = PLACES[name]
    model = on_meta(kind, settings)
    sizes = {}
    for site, own in sites.items():
        modules: list[Any] = [model.get_submodule(target) for target in own if target != "turned"]
        sizes[site] = (modules[0].in_features, sum(module.out_features for module in modules))
    tensors = pairs(sizes, kohya=kohya, alphas=kohya)
    load_lora_weights(pipeline_of(mixin, {"transformer": model}), tensors)
    found, wanted = updates(model), expected(model, sites, tensors)
    assert set(found) == set(wanted)
    for site, update in wanted.items():
        assert close(found[site], update, 1e-4), site


@pytest.mark.parametrize("alphas", [False, True])
def test_flux_last_modulation(tmp_path: Path, alphas: bool) -> None:
    """diffusers drops the alphas, and then the layer, of which it leaves out whose it is."""
    sites = {"lora_unet_final_layer_adaLN_modulation_1": (32, 64), "lora_unet_final_layer_linear": (32, 4)}
    tensors = pairs(sites, kohya=True, alphas=alphas) | pairs(
        {"lora_unet_double_blocks_1_img_attn_proj": (32, 32)}, kohya=True
    )
    save_file(tensors, tmp_path / "x.safetensors")
    ours = models.flux()
    load_lora_weights(pipeline_of(loaders.FluxLoraLoaderMixin, {"transformer": ours}), tmp_path / "x.safetensors")

    def own(site: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{site}."): t for k, t in tensors.items() if k.startswith(f"{site}.")}

    last = own("lora_unet_final_layer_adaLN_modulation_1")
    last["lora_up.weight"] = torch.cat(last["lora_up.weight"].chunk(2)[::-1])
    wanted = {
        "norm_out.linear": last, "proj_out": own("lora_unet_final_layer_linear"),
        "transformer_blocks.1.attn.to_out.0": own("lora_unet_double_blocks_1_img_attn_proj"),
    }  # fmt: skip
    assert close(output(ours), output(merged(models.flux(), wanted)))


def flux_of_bfl(start: str, *, control: bool, into: int = 64) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """A file in BFL's names, of all layers, as diffusers' converter asks for; and the places of some of them."""
    d = 3072
    sites = {"final_layer.linear": (d, 64)}
    if control:
        sites |= {"time_in.in_layer": (256, d), "time_in.out_layer": (d, d), "vector_in.in_layer": (768, d),
                  "vector_in.out_layer": (d, d), "txt_in": (4096, d), "img_in": (into, d),
                  "final_layer.adaLN_modulation.1": (d, 2 * d)}  # fmt: skip
    for block in [f"double_blocks.{i}.{side}_" for i in range(19) for side in ("img", "txt")]:
        sites |= {f"{block}mod.lin": (d, 6 * d), f"{block}attn.qkv": (d, 3 * d), f"{block}attn.proj": (d, d),
                  f"{block}mlp.0": (d, 4 * d), f"{block}mlp.2": (4 * d, d)}  # fmt: skip
    for block in [f"single_blocks.{i}." for i in range(38)]:
        sites |= {f"{block}modulation.lin": (d, 3 * d), f"{block}linear1": (d, 7 * d), f"{block}linear2": (5 * d, d)}
    tensors: dict[str, Tensor] = {}
    for seed, (site, (wide, out)) in enumerate(sites.items()):
        tensors[f"{start}{site}.lora_A.weight"] = random(2, wide, seed=seed)
        tensors[f"{start}{site}.lora_B.weight"] = random(out, 2, seed=seed + 1000)
        if control:
            tensors[f"{start}{site}.lora_B.bias"] = random(out, seed=seed + 2000)
    if control:
        norms = [f"double_blocks.{i}.{side}_attn.norm" for i in range(19) for side in ("img", "txt")]
        norms += [f"single_blocks.{i}.norm" for i in range(38)]
        tensors |= {f"{n}.{kind}_norm.scale": torch.full((128,), 2.0) for n in norms for kind in ("query", "key")}
    places = {
        "double_blocks.3.txt_attn.qkv": [f"transformer_blocks.3.attn.add_{n}_proj" for n in "qkv"],
        "single_blocks.37.linear1": [f"single_transformer_blocks.37.{n}" for n in ("attn.to_q", "attn.to_k",
                                                                                   "attn.to_v", "proj_mlp")],
        "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.net.2"],
    }  # fmt: skip
    if control:
        places |= {"final_layer.adaLN_modulation.1": ["turned", "norm_out.linear"], "img_in": ["x_embedder"]}
    return tensors, {f"{start}{site}": own for site, own in places.items()}


def test_bfls_control_and_fals_kontext() -> None:
    model = on_meta("FluxTransformer2DModel", {"guidance_embeds": False})
    pipe = pipeline_of(loaders.FluxLoraLoaderMixin, {"transformer": model})
    wide, _ = flux_of_bfl("", control=True, into=128)
    with pytest.raises(CheckpointError, match=r"x_embedder: takes 64 inputs, and the adapter's A has 128: a control"):
        load_lora_weights(pipe, wide)
    for start, control in (("", True), ("base_model.model.", False)):
        tensors, places = flux_of_bfl(start, control=control)
        load_lora_weights(pipe, tensors)
        found = updates(model)
        for site, update in expected(model, places, tensors).items():
            assert close(found[site], update, 1e-4), site
        state = {k.removeprefix("base_model.model."): t for k, t in fxpeft.adapter_state_dict(model).items()}
        pieces = 2 * 19 * 2 + 38 * 3  # two more for each qkv, three more for each linear1
        assert len(found) == sum("lora_A" in key for key in tensors) + pieces
        if control:
            bias = tensors["double_blocks.3.txt_attn.qkv.lora_B.bias"].chunk(3)[1]
            assert torch.equal(state["transformer_blocks.3.attn.add_k_proj.lora_B.bias"], bias)
            assert torch.equal(state["single_transformer_blocks.5.attn.norm_k.weight"], torch.full((128,), 2.0))
        fxpeft.remove(model)


def test_an_alpha_in_the_header_alone_is_told(tmp_path: Path) -> None:
    tensors = pairs({"transformer.transformer_blocks.0.attn.to_q": (32, 32)}, kohya=False, alphas=False)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"alpha": "8"})
    with pytest.warns(UserWarning, match=r"alpha = '8' in its header, and none in its keys"):
        fxpeft.load_adapter(models.flux(), tmp_path / "x.safetensors")
