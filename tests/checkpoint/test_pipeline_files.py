"""Files of diffusers and kohya: read to diffusers' own outputs, and written so that diffusers reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_kohya
from image_models import clip, unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

import fxpeft
from fxpeft.checkpoint import read
from fxpeft.checkpoint.adapter_file import site_scale, site_tensors
from fxpeft.checkpoint.formats import choosing
from fxpeft.errors import AdapterError, CheckpointError

NAMES = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2"]
SETTINGS: dict[str, Any] = {
    "r": 3, "lora_alpha": 5, "target_modules": NAMES, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 7},
}  # fmt: skip


def text() -> CLIPTextModel:
    return clip(layers=2)


@torch.no_grad()
def image(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return model(x, torch.tensor([3]), context).sample


@torch.no_grad()
def hidden(model: Any) -> Tensor:
    return model(torch.arange(2, 9).view(1, -1)).last_hidden_state


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator) + ("magnitude" in name)
    return model


def trained_by_diffusers(**changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """A UNet with an adapter, and the adapter's tensors as diffusers' scripts hand them over."""
    model: Any = unet()
    model.add_adapter(peft.LoraConfig(**{**SETTINGS, **changes}))
    randomised(model)
    return model, peft.get_peft_model_state_dict(model, adapter_name="default")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """diffusers' file of a UNet and a text encoder, with the configs in its header."""
    path = tmp_path_factory.mktemp("diffusers")
    model, tensors = trained_by_diffusers()
    encoder: Any = text()
    settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"])
    peft.inject_adapter_in_model(settings, encoder)
    encoder.peft_config = {"default": settings}
    randomised(encoder)
    StableDiffusionPipeline.save_lora_weights(
        path, unet_lora_layers=tensors, unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(encoder, adapter_name="default"),
        text_encoder_lora_adapter_metadata=encoder.peft_config["default"].to_dict(),
    )  # fmt: skip
    torch.save({"image": image(model), "hidden": hidden(encoder)}, path / "outputs")
    return path


def outputs(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "outputs")


def kohya(tensors: Mapping[str, Tensor], alphas: Callable[[str], float]) -> dict[str, Tensor]:
    """sd-scripts' keys; diffusers' function for these writes the rank in the place of each alpha."""
    written = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in tensors.items()})
    flat = {k: torch.tensor(alphas(k)) if k.endswith(".alpha") else v for k, v in written.items()}
    return {
        key.replace("_lora_magnitude_vector.", ".dora_scale") if "magnitude" in key else key: value
        for key, value in flat.items()
    }


def alpha_of(key: str) -> float:
    return 7.0 if "to_v" in key else 5.0


def test_diffusers_file_with_two_components(folder: Path) -> None:
    for make, run, name, left in ((unet, image, "image", "text_encoder: 4"), (text, hidden, "hidden", "unet: ")):
        model = make()
        bare = run(model)
        with pytest.warns(UserWarning, match=f"left out the other components'.*\n.*{left}"):
            fxpeft.load_adapter(model, folder)
        torch.testing.assert_close(run(model), outputs(folder)[name], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(bare, run(model), atol=1e-2)
        fxpeft.remove(model)
        assert torch.equal(run(model), bare)


def test_kohya_file_keeps_each_alpha(tmp_path: Path) -> None:
    model, tensors = trained_by_diffusers()
    save_file(kohya(tensors, alpha_of), tmp_path / "trained.safetensors")
    ours = unet()
    fxpeft.load_adapter(ours, tmp_path / "trained.safetensors")
    torch.testing.assert_close(image(ours), image(model), rtol=1e-5, atol=1e-5)
    wrong = unet()
    save_file(kohya(tensors, lambda key: 5.0), tmp_path / "even.safetensors")
    fxpeft.load_adapter(wrong, tmp_path, weight_name="even.safetensors")
    assert not torch.allclose(image(wrong), image(model), atol=1e-3)


def test_kohya_dora(tmp_path: Path) -> None:
    model, tensors = trained_by_diffusers(use_dora=True, target_modules=["to_q", "ff.net.2"], alpha_pattern={})
    written = {}
    for key, value in tensors.items():
        site, part = key.split(".lora_")
        name = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(part, "dora_scale")
        value = value.unsqueeze(1) if name == "dora_scale" else value
        written[f"lora_unet_{site.replace('.', '_')}.{name}"] = value
    written |= {f"{key.split('.')[0]}.alpha": torch.tensor(5.0) for key in written if "lora_down" in key}
    save_file(written, tmp_path / "dora.safetensors")
    ours = unet()
    fxpeft.load_adapter(ours, tmp_path / "dora.safetensors")
    torch.testing.assert_close(image(ours), image(model), rtol=1e-5, atol=1e-5)
    turned = {k: v.t().contiguous() if k.endswith("dora_scale") else v for k, v in written.items()}
    save_file(turned, tmp_path / "inputs.safetensors")
    with pytest.raises(CheckpointError, match=r"dora_scale: expected a magnitude per output"):
        fxpeft.load_adapter(unet(), tmp_path / "inputs.safetensors")


def test_what_diffusers_wrote_before_it_took_pefts_names(tmp_path: Path) -> None:
    model, tensors = trained_by_diffusers(
        target_modules=["to_q", "to_out.0", "proj_in"], alpha_pattern={}, lora_alpha=3
    )
    old = {}
    for key, value in tensors.items():
        site, part = key.split(".lora_")
        side = "down" if part.startswith("A") else "up"
        for new, name in (("to_q", "to_q_lora"), ("to_out.0", "to_out_lora")):
            if site.endswith(new):
                site = f"{site.removesuffix(new)}processor.{name}"
        old[f"unet.{site}.{side}.weight" if "processor" in site else f"unet.{site}.lora.{side}.weight"] = value
    save_file(old, tmp_path / "pytorch_lora_weights.safetensors")
    ours = unet()
    fxpeft.load_adapter(ours, tmp_path)
    torch.testing.assert_close(image(ours), image(model), rtol=1e-5, atol=1e-5)


def test_slots_swap_from_file_to_file(folder: Path, tmp_path: Path) -> None:
    _, tensors = trained_by_diffusers()
    save_file(kohya(tensors, alpha_of), tmp_path / "same.safetensors")
    model = unet()
    fxpeft.prepare_hotswap(model, 8, targets=NAMES)
    with pytest.warns(UserWarning, match="left out"):
        fxpeft.load_adapter(model, folder, "a")
    first = image(model)
    torch.testing.assert_close(first, outputs(folder)["image"], rtol=1e-5, atol=1e-5)
    half = {key: 0.5 * value if "lora_up" in key else value for key, value in kohya(tensors, alpha_of).items()}
    save_file(half, tmp_path / "half.safetensors")
    fxpeft.hotswap(model, tmp_path / "half.safetensors", "a")
    assert not torch.allclose(image(model), first, atol=1e-3)
    fxpeft.hotswap(model, tmp_path / "same.safetensors", "a")
    torch.testing.assert_close(image(model), first, rtol=1e-5, atol=1e-5)


def test_pefts_own_file_by_its_name(tmp_path: Path) -> None:
    """Its config, which lies beside it, has the alphas; without it each site's rank is taken, as diffusers does."""
    model, other = unet(), unet()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**SETTINGS))
    randomised(model)
    fxpeft.save_adapter(model, tmp_path)
    fxpeft.load_adapter(other, tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(image(other), image(model), rtol=1e-5, atol=1e-5)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "lora.safetensors")
    fxpeft.load_adapter(other, tmp_path / "lora.safetensors", "alone")
    assert fxpeft.adapter_config(other, "alone").lora_alpha == 3


def test_written_for_diffusers(tmp_path: Path) -> None:
    model, encoder = unet(), text()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**SETTINGS, use_rslora=True))
    fxpeft.add_adapter(encoder, fxpeft.LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj"]))
    for each in (model, encoder):
        randomised(each)
    path = tmp_path / "new" / "pytorch_lora_weights.safetensors"
    fxpeft.save_components(path, {"unet": model, "text_encoder": encoder})
    theirs: Any = unet()
    theirs.load_lora_adapter(path, prefix="unet", use_safetensors=True)
    torch.testing.assert_close(image(theirs), image(model), rtol=1e-5, atol=1e-5)
    back = text()
    fxpeft.load_adapter(back, path, component="text_encoder")
    torch.testing.assert_close(hidden(back), hidden(encoder), rtol=1e-5, atol=1e-5)


def test_written_for_kohya(tmp_path: Path) -> None:
    model = unet()
    config = fxpeft.LoraConfig(
        **{**SETTINGS, "target_modules": ["to_k", "to_v", "conv1"]}, use_rslora=True, use_dora=True
    )
    fxpeft.add_adapter(model, config)
    randomised(model)
    fxpeft.save_components(tmp_path / "kohya.safetensors", {"unet": model}, file_format="kohya")
    keys = load_file(tmp_path / "kohya.safetensors")
    assert {key.split(".", 1)[1] for key in keys} == {"lora_down.weight", "lora_up.weight", "dora_scale", "alpha"}
    assert all(key.startswith("lora_unet_") for key in keys)
    back = unet()
    fxpeft.load_adapter(back, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(image(back), image(model), rtol=1e-5, atol=1e-5)


def test_nothing_is_written_of_what_has_no_keys(tmp_path: Path) -> None:
    model = unet()
    fxpeft.add_adapter(model, fxpeft.IA3Config(target_modules=["to_k"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match=r"unet: expected a LoRA.*found ia3"):
        fxpeft.save_components(tmp_path / "x.safetensors", {"unet": model})
    fxpeft.remove(model)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=["to_k"], modules_to_save=["conv_out"]))
    with pytest.raises(AdapterError, match=r"no keys for these:\n.*conv_out"):
        fxpeft.save_components(tmp_path / "x.safetensors", {"unet": model})
    assert not [*tmp_path.iterdir()]


def test_refused_files(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    _, tensors = trained_by_diffusers()
    flat = kohya(tensors, alpha_of)

    def refused(changed: Mapping[str, Tensor], match: str, **given: Any) -> None:
        save_file(dict(changed), path)
        model = unet()
        with pytest.raises(CheckpointError, match=match):
            fxpeft.load_adapter(model, path, **given)
        assert not fxpeft.loaded_adapters(model)

    key = next(k for k in flat if k.endswith("lora_down.weight"))
    site = key.partition(".")[0]
    refused(flat | {f"{site}.oft_blocks": torch.ones(2, 2)}, f"another method:\n.*OFT or BOFT: {site}")
    refused(flat | {f"{site}.hada_w1_a": torch.ones(2, 2)}, "no LoHa's or LoKr's: hada_w1_a")
    refused(flat | {"lora_unet_elsewhere.lora_down.weight": torch.ones(2, 2)}, "elsewhere")
    refused(flat | {f"{site}.diff_b": torch.ones(2)}, "diff_b")
    refused(flat | {f"{site}.alpha": torch.tensor(float("nan"))}, r"alpha: expected one finite number")
    refused({k: v for k, v in flat.items() if k != key}, "alphas of sites that have no factors")
    refused(flat, r"component='vae': the file has unet", component="vae")
    refused({"weight": torch.ones(2)}, "expected an adapter's file of kohya or diffusers")
    refused(
        {f"unet.{k}": v for k, v in tensors.items() if "to_q" not in k} | {"unet.x.lora_A.weight": torch.ones(2, 3)},
        "x",
    )
    with pytest.raises(CheckpointError, match=r"expected nothing\.safetensors, found none"):
        fxpeft.load_adapter(unet(), tmp_path, weight_name="nothing.safetensors")
    with pytest.raises(CheckpointError, match="no site of the file is one of Linear"):
        fxpeft.load_adapter(nn.Linear(3, 4), folder)


def test_header_is_no_code_and_no_config_of_another_kind(folder: Path, tmp_path: Path) -> None:
    source = folder / "pytorch_lora_weights.safetensors"
    with safe_open(source, "pt") as file:
        settings = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    for written, match in (
        ("{", "expected JSON"), ("[]", "expected an object"),
        (json.dumps(settings | {"unet.r": "__import__('os')"}), r"\br\b"),
    ):  # fmt: skip
        save_file(load_file(source), tmp_path / "x.safetensors", metadata={LORA_ADAPTER_METADATA_KEY: written})
        with pytest.raises(AdapterError, match=match):
            fxpeft.load_adapter(unet(), tmp_path / "x.safetensors", component="unet")


def test_a_components_config_is_made_once_and_the_others_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    wrapped = choosing._checkpoint
    monkeypatch.setattr(choosing, "_checkpoint", lambda *given: made.append(given) or wrapped(*given))
    found = read(folder, component="unet")
    assert not made
    model = unet()
    fxpeft.load_adapter(model, folder, component="unet")
    assert len(made) == 1
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" in n)  # frozen, as any other loaded
    fxpeft.prepare_hotswap(model, 8)
    fxpeft.hotswap(model, folder, component="unet")
    assert len(made) == 2
    assert found.config is found.config  # of both, made when it is asked for
    assert len(made) == 5


def test_a_left_out_components_alphas_have_to_be_of_sites(tmp_path: Path) -> None:
    _, tensors = trained_by_diffusers()
    save_file(kohya(tensors, alpha_of) | {"lora_te_elsewhere.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="alphas of sites that have no factors:\n  elsewhere"):
        fxpeft.load_adapter(unet(), tmp_path / "x.safetensors", component="unet")


def test_read_without_a_model(folder: Path) -> None:
    found = read(folder)
    assert found.config.peft_type == "LORA"
    assert any(".text_encoder." in key for key in found.tensors)
    assert any(".unet." in key for key in found.tensors)
    scales = {site: site_scale(found.config, site, len(own["lora_A"])) for site, own in site_tensors(found)[0].items()}
    ends = {"attn1.to_v": 7 / 3, "attn1.to_k": 5 / 2, "attn1.to_q": 5 / 3, "q_proj": 3 / 2}
    for end, scale in ends.items():
        assert {round(s, 6) for name, s in scales.items() if name.endswith(end)} == {round(scale, 6)}
