"""``fxpeft.install("diffusers")``: the methods of pipelines and models, as with PEFT wherever that is right."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
from image_models import close, drawn, hidden, image, pipeline, randomise, unet
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxpeft
from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.integrations.diffusers import save_lora_weights, scales

FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a": ({"r": 3, "target_modules": ["to_q", "to_v"]}, {"r": 2, "target_modules": ["q_proj"]}),
    "b": ({"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_k"]}, {"r": 4, "target_modules": ["q_proj", "fc2"]}),
}


@pytest.fixture(autouse=True)
def _diffusers() -> Iterator[None]:
    with fxpeft.installed("diffusers"):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, configs in FILES.items():
        pipe: Any = pipeline()
        for model, config in zip((pipe.unet, pipe.text_encoder), configs, strict=True):
            fxpeft.add_adapter(model, fxpeft.LoraConfig(**{"lora_alpha": config["r"], **config}))
            randomise(model, ord(name))
        found[name] = tmp_path_factory.mktemp("files") / f"{name}.safetensors"
        save_lora_weights(pipe, found[name])
    return found


def of_diffusers(files: dict[str, Path], act: Callable[[Any], Any]) -> Tensor:
    """What diffusers draws with PEFT after an act."""
    fxpeft.uninstall("diffusers")
    fxpeft.uninstall()
    try:
        pipe: Any = pipeline()
        for name, path in files.items():
            pipe.load_lora_weights(path, adapter_name=name)
        given = act(pipe) or {}
        assert any(isinstance(m, peft.tuners.lora.LoraLayer) for m in pipe.unet.modules())
        return drawn(pipe, **given)
    finally:
        fxpeft.install()
        fxpeft.install("diffusers")


def of_ours(files: dict[str, Path], act: Callable[[Any], Any], prepared: bool) -> Tensor:
    pipe: Any = pipeline()
    if prepared:
        few = None if act is ACTS["newest"] else ["to_q", "to_k", "to_v", "q_proj", "fc2"]
        pipe.enable_lora_hotswap(target_rank=8, **({"targets": few} if few else {}))
    for name, path in files.items():
        pipe.load_lora_weights(path, adapter_name=name)
    given = act(pipe) or {}
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in pipe.unet.modules())
    return drawn(pipe, **given)


BLOCKS = {"down": 0.5, "mid": 2.0, "up": {"block_1": [0.25, 3.0]}}
ACTS: dict[str, Callable[[Any], Any]] = {
    "newest": lambda pipe: None,
    "weights": lambda pipe: pipe.set_adapters(["a", "b"], [0.7, -0.3]),
    "one weight": lambda pipe: pipe.set_adapters(["a", "b"], adapter_weights=0.4),
    "by component": lambda pipe: pipe.set_adapters("a", {"unet": 0.5, "text_encoder": 2.0}),
    "by block": lambda pipe: pipe.set_adapters("a", {"unet": BLOCKS, "text_encoder": 0.5}),
    "by block each": lambda pipe: pipe.set_adapters(["a", "b"], [{"unet": BLOCKS}, {"text_encoder": 0.5}]),
    "of the model": lambda pipe: pipe.unet.set_adapters(["b", "a"], [0.5, {"down": 0.1}]),
    "deleted": lambda pipe: pipe.delete_adapters("b") or pipe.set_adapters("a"),
    "disabled": lambda pipe: pipe.disable_lora(),
    "enabled": lambda pipe: pipe.disable_lora() or pipe.enable_lora(),
    "unet off": lambda pipe: pipe.unet.disable_lora(),
    "scale": lambda pipe: {"cross_attention_kwargs": {"scale": 0.5}},
    "scale and weights": lambda pipe: (
        pipe.set_adapters(["a", "b"], [2.0, 0.5]) or {"cross_attention_kwargs": {"scale": -0.5}}
    ),
    "fused": lambda pipe: pipe.set_adapters("a") or pipe.fuse_lora(lora_scale=0.5),
    "fused by name": lambda pipe: pipe.set_adapters(["a", "b"]) or pipe.fuse_lora(adapter_names=["a", "b"]),
    "fused unet": lambda pipe: pipe.set_adapters("a") or pipe.fuse_lora(components=["unet"]),
    "unfused": lambda pipe: pipe.fuse_lora() or pipe.unfuse_lora(),
}  # fmt: skip


@pytest.fixture(scope="module")
def newest(files: dict[str, Path]) -> Tensor:
    with fxpeft.installed("diffusers"):
        return of_ours(files, ACTS["newest"], False)


@pytest.mark.parametrize("act", ACTS)
def test_as_with_peft(files: dict[str, Path], newest: Tensor, act: str) -> None:
    expected = of_diffusers(files, ACTS[act])
    for prepared in (False, True):
        assert close(of_ours(files, ACTS[act], prepared), expected, 1e-4), prepared
    if act not in ("newest", "enabled", "unfused"):
        assert not close(expected, newest, 1e-3)


def test_lists_and_files(files: dict[str, Path], tmp_path: Path) -> None:
    pipe: Any = pipeline()
    assert pipe.get_list_adapters() == {}
    assert pipe.get_active_adapters() == []
    bare = drawn(pipe)
    pipe.load_lora_weights(files["a"].parent, weight_name=files["a"].name)
    pipe.load_lora_weights(load_file(files["b"]))
    names = ["default_0", "default_1"]
    assert pipe.get_list_adapters() == {"unet": names, "text_encoder": names}
    assert pipe.get_active_adapters() == ["default_1"]
    second = drawn(pipe)
    pipe.save_lora_weights(tmp_path)
    pipe.unet.save_lora_adapter(tmp_path / "unet", adapter_name="default_0")
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe), bare)
    pipe.load_lora_weights(tmp_path)
    assert close(drawn(pipe), second)
    model: Any = unet()
    model.load_lora_adapter(tmp_path / "unet", prefix=None)
    other: Any = unet()
    other.load_lora_adapter(load_file(files["a"]), prefix="unet", adapter_name="x")
    assert close(image(model), image(other))
    assert model.active_adapters() == ["default_0"]
    tensors = load_file(tmp_path / "unet" / "pytorch_lora_weights.safetensors")
    pipe.save_lora_weights(tmp_path / "given", unet_lora_layers=tensors)
    written = load_file(tmp_path / "given" / "pytorch_lora_weights.safetensors")
    assert written.keys() == {f"unet.{key}" for key in tensors}


def test_fused_stays_when_unloaded(files: dict[str, Path]) -> None:
    pipe: Any = pipeline()
    pipe.load_lora_weights(files["a"], adapter_name="a")
    with_a = drawn(pipe)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    assert pipe.fused_loras == {"a"}
    assert close(drawn(pipe, cross_attention_kwargs={"scale": 0.5}), with_a, 1e-4)
    pipe.unload_lora_weights()
    assert close(drawn(pipe), with_a, 1e-4)
    assert not fxpeft.loaded_adapters(pipe.unet)


def test_all_or_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    pipe: Any = pipeline()
    for name in files:
        pipe.load_lora_weights(files[name], adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.7, 0.3])
    before = drawn(pipe)
    tensors, nan = load_file(files["a"]), float("nan")
    broken = {k: torch.full_like(v, nan) if "text_encoder" in k else v for k, v in tensors.items()}
    save_file(broken, tmp_path / "nan.safetensors")
    missing = {"text_encoder": 0.1, "unet": {"down.block_7.0": 1}}
    nowhere = {"unet": 0.1, "text_encoder": {"nowhere": 2}}

    def load(name: str, **given: Any) -> None:
        pipe.load_lora_weights(files["a"], adapter_name=name, **given)

    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (AdapterError, "no component has an adapter named c", lambda: pipe.set_adapters(["a", "c"])),
        (AdapterError, "no component has an adapter named c", lambda: pipe.delete_adapters(["a", "c"])),
        (AdapterError, "expected one for each of 2", lambda: pipe.set_adapters(["a", "b"], [1.0])),
        (AdapterError, r"down\.block_7", lambda: pipe.set_adapters("a", missing)),
        (AdapterError, "no site of adapter 'a' is in", lambda: pipe.set_adapters("a", nowhere)),
        (AdapterError, "there is an adapter named 'a' already", lambda: load("a")),
        (AdapterError, "no adapter named 'c'", lambda: load("c", hotswap=True)),
        (ValueError, "cannot be an empty list", lambda: pipe.fuse_lora(components=[])),
        (ValueError, "vae is not found", lambda: pipe.unfuse_lora(components=["vae"])),
        (TypeError, "found cache_dir", lambda: load("d", cache_dir="x")),
        (AdapterError, "moves adapters with their model", lambda: pipe.set_lora_device(["a"], "cpu")),
    ]  # fmt: skip
    for error, match, act in cases:
        with pytest.raises(error, match=match):
            act()
        assert torch.equal(drawn(pipe), before), match
        assert pipe.get_active_adapters() == ["a", "b"]
    pipe.load_lora_weights(tmp_path / "nan.safetensors", adapter_name="nan")
    pipe.set_adapters(["a", "b"], [0.7, 0.3])
    with pytest.raises(AdapterError, match="NaN"):
        pipe.fuse_lora(adapter_names=["nan"], safe_fusing=True, lora_scale=0.5)
    assert torch.equal(drawn(pipe), before)  # the UNet had been fused when the text encoder wasn't
    with pytest.warns(UserWarning, match="no vea"):
        pipe.set_adapters("a", {"vea": 1.0, "unet": 0.5})


def test_what_peft_has_adapted_is_pefts(files: dict[str, Path]) -> None:
    pipe: Any = pipeline()
    fxpeft.uninstall("diffusers")
    fxpeft.uninstall()
    pipe.load_lora_weights(files["a"], adapter_name="a")
    fxpeft.install()
    fxpeft.install("diffusers")
    with_a = drawn(pipe)
    pipe.set_adapters("a", 0.5)
    assert pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]}
    assert not close(drawn(pipe), with_a, 1e-3)
    assert not close(drawn(pipe, cross_attention_kwargs={"scale": 0.5}), drawn(pipe), 1e-3)
    pipe.unload_lora_weights()
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in pipe.unet.modules())


def test_a_call_that_breaks_off_leaves_no_scale(files: dict[str, Path]) -> None:
    pipe: Any = pipeline()
    pipe.load_lora_weights(files["a"], adapter_name="a")
    before, text = drawn(pipe), hidden(pipe.text_encoder)
    scaled = drawn(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(hidden(pipe.text_encoder), text)
    pipe.text_encoder.register_forward_pre_hook(_raise)
    with pytest.raises(ZeroDivisionError):
        drawn(pipe, cross_attention_kwargs={"scale": 3.0})
    pipe.text_encoder._forward_pre_hooks.popitem()
    assert torch.equal(drawn(pipe, cross_attention_kwargs={"scale": 0.5}), scaled)
    assert torch.equal(drawn(pipe), before)


def _raise(*given: Any) -> None:
    raise ZeroDivisionError


def test_uninstall_gives_back() -> None:
    fxpeft.uninstall("diffusers")
    owners = [LoraBaseMixin, PeftAdapterMixin, diffusers.StableDiffusionPipeline, pipeline_stable_diffusion]
    owners += [cls for cls in vars(diffusers.loaders.lora_pipeline).values() if isinstance(cls, type)]
    before = [dict(vars(owner)) for owner in owners]
    with fxpeft.installed("diffusers"):
        assert [dict(vars(owner)) for owner in owners] != before
        assert pipeline_stable_diffusion.scale_lora_layers.__module__.startswith("fxpeft")

        class Own(diffusers.StableDiffusionPipeline):
            def load_lora_weights(self, *args: Any, **kwargs: Any) -> str:
                return "theirs"

        assert Own.load_lora_weights.__wrapped__  # a class that comes while we are there
    assert [dict(vars(owner)) for owner in owners] == before
    assert Own.load_lora_weights(None) == "theirs"
    with pytest.raises(AdapterError, match="expected one of transformers, diffusers, found 'torch'"):
        fxpeft.install("torch")  # type: ignore[arg-type]


def test_a_text_encoders_scale_where_peft_is_not_installed(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers then has another function scale them, which knows other layers and gives no scale back."""
    pipe: Any = pipeline()
    pipe.load_lora_weights(files["a"])
    whole, bare = drawn(pipe), drawn(pipeline())
    half = drawn(pipe, cross_attention_kwargs={"scale": 0.5})
    fxpeft.uninstall("diffusers")
    monkeypatch.setattr(pipeline_stable_diffusion, "USE_PEFT_BACKEND", False)
    monkeypatch.setattr(scales, "USE_PEFT_BACKEND", False)
    with fxpeft.installed("diffusers"):
        text = hidden(pipe.text_encoder)
        assert close(drawn(pipe, cross_attention_kwargs={"scale": 0.5}), half)
        assert torch.equal(hidden(pipe.text_encoder), text)
        assert close(drawn(pipe), whole)
        assert close(drawn(pipeline(), cross_attention_kwargs={"scale": 0.5}), bare)
    assert not pipeline_stable_diffusion.USE_PEFT_BACKEND


def test_a_broken_file_names_what_is_wrong(files: dict[str, Path]) -> None:
    pipe: Any = pipeline()
    tensors = load_file(files["a"])
    site = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.raises(CheckpointError, match=r"another method:\n.*OFT"):
        pipe.load_lora_weights(tensors | {f"{site}.oft_blocks": torch.ones(2, 2)})


def test_the_example_draws_each_its_own(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "diffusers_swap.py"
    fxpeft.uninstall("diffusers")
    drawn = runpy.run_path(str(path))["main"](tmp_path / "pictures.png", "eager")
    bytes_of = [picture.tobytes() for picture in drawn]
    a, b, blend, off, *sweep, bare = bytes_of
    assert off == bare
    assert sweep[2] == a
    assert len({a, b, blend, off, *sweep}) == 7
    assert (tmp_path / "pictures.png").stat().st_size > 0
