"""LyCORIS' LoHa and LoKr in files of image tools: outputs of PEFT's methods, or of LyCORIS' formulas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from image_models import close, output, random, unet
from lycoris_files import factors, loha, low_rank, merged
from safetensors.torch import save_file
from torch import Tensor, nn

import fxpeft
from fxpeft.checkpoint import read
from fxpeft.errors import AdapterError, CheckpointError

TARGETS = ["to_q", "to_v", "to_out.0", "conv1", "proj_in"]
CONFIGS: dict[str, Any] = {
    "LoHa": peft.LoHaConfig(
        r=3, alpha=5, target_modules=TARGETS, rank_pattern={"to_v": 2}, alpha_pattern={"to_q": 7},
    ),
    "LoHa, kernels decomposed": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS, alpha_pattern={"to_out.0": 5}),
    "LoKr, all decomposed": peft.LoKrConfig(
        r=1, alpha=0.6, target_modules=TARGETS, decompose_both=True, decompose_factor=2, use_effective_conv2d=True
    ),
}  # fmt: skip


def written(model: nn.Module, config: Any, start: str, between: str) -> dict[str, Tensor]:
    """What LyCORIS writes of PEFT's adapter, each alpha with its site; of two whole matrices one that says nothing."""
    found: dict[str, Tensor] = {}
    for key, tensor in peft.get_peft_model_state_dict(model, adapter_name="default").items():
        site, _, part = key.rpartition(".")
        pattern = {**(config.alpha_pattern or {})}
        alpha = next((value for name, value in pattern.items() if site.endswith(name)), config.alpha)
        name = f"{start}{site.replace('.', between)}"
        found |= {f"{name}.{part}": tensor.contiguous(), f"{name}.alpha": torch.tensor(float(alpha))}
    return found


@pytest.fixture(scope="module", params=CONFIGS)
def adapted(request: pytest.FixtureRequest) -> tuple[Any, nn.Module, Tensor]:
    config = CONFIGS[request.param]
    model: Any = unet()
    peft.inject_adapter_in_model(config, model)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "hada_" in name or "lokr_" in name:
            parameter.data = 0.4 * random(*parameter.shape, seed=seed)
    whole = [m for m in model.modules() if type(m).__module__.startswith("peft.tuners.lokr") and hasattr(m, "scaling")]
    for module in whole:
        if "default" in module.lokr_w1 and "default" in module.lokr_w2:
            module.scaling["default"] = 1.0  # LyCORIS' own; PEFT's is alpha / r
    return config, model, output(model)


@pytest.mark.parametrize(
    ("start", "between"),
    [("lora_unet_", "_"), ("lycoris_", "_"), ("lycoris_unet_", "_"), ("unet.", "."), ("", ".")],
)  # fmt: skip
def test_pefts_outputs(tmp_path: Path, adapted: tuple[Any, nn.Module, Tensor], start: str, between: str) -> None:
    config, theirs, expected = adapted
    save_file(written(theirs, config, start, between), tmp_path / "x.safetensors")
    ours = unet()
    bare = output(ours)
    fxpeft.load_adapter(ours, tmp_path / "x.safetensors")
    assert close(output(ours), expected)
    assert not close(expected, bare, 1e-2)
    assert fxpeft.adapter_config(ours).peft_type == config.peft_type.value
    assert read(tmp_path / "x.safetensors").config.peft_type == config.peft_type.value  # told without a model
    fxpeft.remove(ours)
    assert torch.equal(output(ours), bare)


def test_swapped_in_slots_from_file_to_file(tmp_path: Path) -> None:
    """One of each method, in one graph."""
    ours, expected = unet(), {}
    for seed, (name, sites) in enumerate(SOME.items()):
        tensors = {f"lora_unet_{s.replace('.', '_')}.{key}": t for s, own in sites.items() for key, t in own.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        alone = unet()
        fxpeft.load_adapter(alone, tmp_path / f"{name}.safetensors")
        expected[name] = output(alone)
        assert seed == 0 or not close(expected[name], expected["LoHa"], 1e-3)
    fxpeft.prepare_hotswap(ours, 16, targets=[*SOME["LoHa"], *SOME["LoKr"]], methods=("lora", "dora", "loha", "lokr"))
    fxpeft.load_adapter(ours, tmp_path / "LoHa.safetensors", "a")
    ours.compile(backend="eager", fullgraph=True)
    assert close(output(ours), expected["LoHa"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("LoKr", "mixed", "LoHa", "with magnitudes", "LoKr"):
            fxpeft.hotswap(ours, tmp_path / f"{name}.safetensors", "a")
            assert close(output(ours), expected[name]), name
    place = unet()  # a LoKr's two matrices have their own, which is no rank
    fxpeft.prepare_hotswap(place, 2, targets=[*SOME["LoKr"]], methods=("lokr",))
    fxpeft.load_adapter(place, tmp_path / "LoKr.safetensors", "a")
    assert close(output(place), expected["LoKr"])
    narrow = unet()
    fxpeft.prepare_hotswap(narrow, 8, targets=[*SOME["LoHa"]])
    with pytest.raises(AdapterError, match=r"its method, loha: declare methods="):
        fxpeft.load_adapter(narrow, tmp_path / "LoHa.safetensors", "a")


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
CONV = "down_blocks.0.resnets.0.conv1"  # 8 to 8, 3x3
SOME: dict[str, dict[str, dict[str, Tensor]]] = {
    "LoHa": {f"{BLOCK}.attn1.to_q": loha(1, 8, 8), CONV: loha(2, 8, 8, 3, 3, alpha=1.0)},
    "LoKr": {
        f"{BLOCK}.attn1.to_q": factors(3, 1.5, lokr_w1=(2, 2), lokr_w2_a=(4, 1), lokr_w2_b=(1, 4)),
        f"{BLOCK}.attn2.to_k": factors(4, 9.0, lokr_w1=(2, 3), lokr_w2=(4, 4)),
    },
    "mixed": {
        f"{BLOCK}.attn1.to_q": low_rank(5, 8, 8, alpha=1.0), f"{BLOCK}.attn2.to_k": loha(6, 8, 12),
        CONV: factors(7, 2.0, lokr_w1=(2, 4), lokr_w2_a=(4, 1), lokr_w2_b=(1, 2 * 9)),
    },
    "with magnitudes": {
        f"{BLOCK}.attn1.to_q": loha(8, 8, 8) | {"dora_scale": 1 + 0.2 * random(8, 1)},
        CONV: factors(9, 2.0, lokr_w1=(2, 2), lokr_w2=(4, 4, 3, 3)) | {"dora_scale": 1 + 0.2 * random(8, 1, 1, 1)},
    },
}  # fmt: skip
MORE: dict[str, dict[str, dict[str, Tensor]]] = {
    "other factors at each site": {  # of outputs the larger one first, and one that no divisor says
        f"{BLOCK}.attn1.to_q": factors(1, 2.0, lokr_w1=(4, 2), lokr_w2=(2, 4)),
        f"{BLOCK}.attn1.to_v": factors(2, 2.0, lokr_w1=(1, 8), lokr_w2_a=(8, 3), lokr_w2_b=(3, 1)),
        f"{BLOCK}.attn2.to_k": factors(3, 5.0, lokr_w1_a=(2, 2), lokr_w1_b=(2, 3), lokr_w2=(4, 4)),
    },
    "a kernel's core in some": {
        CONV: factors(4, 3.0, hada_w1_a=(2, 8), hada_w1_b=(2, 8), hada_w2_a=(2, 8), hada_w2_b=(2, 8),
                      hada_t1=(2, 2, 3, 3), hada_t2=(2, 2, 3, 3)),
        "down_blocks.1.resnets.0.conv1": loha(5, 16, 8, 3, 3),
    },
    "a third factor of LoRA": {
        CONV: factors(6, 2.0, **{"lora_down.weight": (3, 8, 1, 1), "lora_mid.weight": (3, 3, 3, 3),
                                 "lora_up.weight": (8, 3, 1, 1)}),
        f"{BLOCK}.attn1.to_q": low_rank(7, 8, 8),
    },
    "norms": {
        f"{BLOCK}.attn1.to_q": loha(8, 8, 8), f"{BLOCK}.norm1": factors(9, w_norm=(8,), b_norm=(8,)),
        "down_blocks.0.resnets.0.norm1": factors(10, w_norm=(8,), b_norm=(8,)),
    },
    "no alphas": {f"{BLOCK}.attn1.to_q": {k: t for k, t in loha(11, 8, 8).items() if k != "alpha"}},
}  # fmt: skip


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("name", [*SOME, *MORE])
def test_lycoris_formulas(tmp_path: Path, name: str, dotted: bool) -> None:
    sites = (SOME | MORE)[name]
    start = "unet." if dotted else "lora_unet_"
    named = {site: start + (site if dotted else site.replace(".", "_")) for site in sites}
    save_file(
        {f"{named[s]}.{key}": t for s, own in sites.items() for key, t in own.items()}, tmp_path / "x.safetensors"
    )
    ours = unet()
    fxpeft.load_adapter(ours, tmp_path / "x.safetensors")
    expected = output(merged(unet(), sites))
    assert close(output(ours), expected)
    assert not close(expected, output(unet()), 1e-3)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line, self.cube = nn.Conv1d(6, 4, 3, padding=1), nn.Conv3d(4, 6, (1, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.cube(self.line(x).view(2, 4, 1, 4, 3))


@pytest.mark.parametrize(
    "sites",
    [
        {"line": factors(1, 3.0, lokr_w1=(2, 2), lokr_w2=(2, 3, 3))},
        {"line": factors(2, 3.0, lokr_w1=(2, 2), lokr_w2_a=(2, 1), lokr_w2_b=(1, 9))},
        {"line": factors(3, 3.0, hada_w1_a=(2, 4), hada_w1_b=(2, 6), hada_w2_a=(2, 4), hada_w2_b=(2, 6),
                         hada_t1=(2, 2, 3), hada_t2=(2, 2, 3))},
        {"cube": factors(4, 3.0, lokr_w1=(2, 2), lokr_w2_a=(2, 3), lokr_w2_b=(2, 2), lokr_t2=(2, 2, 1, 3, 2))
                 | {"lokr_w2_a": random(2, 3)}},
        {"cube": loha(5, 6, 4, 1, 3, 2), "line": loha(6, 4, 6, 3)},
    ],
)  # fmt: skip
def test_convolutions_of_other_dimensions(tmp_path: Path, sites: dict[str, dict[str, Tensor]]) -> None:
    """PEFT's LoKr makes another product of a conv1d's whole matrix, and has no conv3d."""
    save_file(
        {f"lycoris_{s}.{key}": t for s, own in sites.items() for key, t in own.items()}, tmp_path / "x.safetensors"
    )
    ours, x = Convolutions(), random(2, 6, 12)
    fxpeft.load_adapter(ours, tmp_path / "x.safetensors")
    expected = merged(Convolutions(), sites)(x)
    assert close(ours(x), expected)
    assert not close(expected, Convolutions()(x), 1e-3)


def test_half_precision_is_multiplied_in_float32(tmp_path: Path) -> None:
    sites = {
        name: {key: t.half() if t.ndim else t for key, t in own.items()}
        for name, own in {**SOME["LoHa"], f"{BLOCK}.attn2.to_k": SOME["LoKr"][f"{BLOCK}.attn2.to_k"]}.items()
    }
    exact = {name: {key: t.float() for key, t in own.items()} for name, own in sites.items()}
    for kept in (sites, {name: sites[name] for name in SOME["LoHa"]}):
        named = {f"unet.{s}.{key}": t for s, own in kept.items() for key, t in own.items()}
        save_file(named, tmp_path / "x.safetensors")
        expected = output(merged(unet(), {name: exact[name] for name in kept}))
        for prepared in (False, True):
            ours = unet()
            if prepared:
                fxpeft.prepare_hotswap(ours, 16, targets=list(kept), methods=("lora", "loha"))
            fxpeft.load_adapter(ours, tmp_path / "x.safetensors")
            assert close(output(ours), expected), prepared


def test_norms_are_the_adapters(tmp_path: Path) -> None:
    sites = MORE["norms"]
    save_file({f"unet.{s}.{key}": t for s, own in sites.items() for key, t in own.items()}, tmp_path / "x.safetensors")
    ours = unet()
    norms = [site for site in sites if "norm" in site]
    fxpeft.prepare_hotswap(ours, 8, targets=["to_q"], methods=("loha",), modules_to_save=norms)
    fxpeft.load_adapter(ours, tmp_path / "x.safetensors")
    assert close(output(ours), output(merged(unet(), sites)))
    with fxpeft.disabled(ours):
        assert close(output(ours), output(unet()))
    save_file({"unet.elsewhere.w_norm": torch.ones(8)} | {f"unet.{BLOCK}.attn1.to_q.{k}": t for k, t in
              sites[f"{BLOCK}.attn1.to_q"].items()}, tmp_path / "y.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"elsewhere"):
        fxpeft.load_adapter(unet(), tmp_path / "y.safetensors", component="unet")


def test_saved_as_pefts(tmp_path: Path) -> None:
    """What was read is PEFT's method, whose own files go both ways; what became LoRAs is a LoRA."""
    for name, kind in (("LoHa", "LOHA"), ("LoKr", "LOKR"), ("mixed", "LORA")):
        sites = SOME[name]
        named = {f"lycoris_{s.replace('.', '_')}.{key}": t for s, own in sites.items() for key, t in own.items()}
        save_file(named, tmp_path / "x.safetensors")
        ours, theirs = unet(), unet()
        fxpeft.load_adapter(ours, tmp_path / "x.safetensors")
        fxpeft.save_adapter(ours, tmp_path / name)
        model = peft.PeftModel.from_pretrained(theirs, tmp_path / name)
        assert model.peft_config["default"].peft_type.value == kind
        assert close(output(theirs), output(ours))


def test_small_factors_of_a_giant(tmp_path: Path) -> None:
    """A few megabytes that say terabytes: without a model nothing else bounds them."""
    giant = {f"lora_unet_b.lokr_w{number}": torch.zeros(1000, 1000) for number in (1, 2)}
    beside = {f"lora_unet_a.{key}": t for key, t in loha(1, 8, 8).items()}  # one config says both of no file
    save_file({**giant, **beside}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"b: small factors of an update of \[1000000, 1000000\]"):
        fxpeft.checkpoint.read(tmp_path / "x.safetensors").tensors  # noqa: B018
    third = {f"lora_unet_a.lora_{key}.weight": torch.zeros(500, 500) for key in ("down", "up")}
    save_file({**third, "lora_unet_a.lora_mid.weight": torch.zeros(500, 500, 3, 3)}, tmp_path / "y.safetensors")
    assert fxpeft.checkpoint.read(tmp_path / "y.safetensors").tensors  # in bounds


def test_refused(tmp_path: Path) -> None:
    site = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"
    whole = {f"{site}.{key}": t for key, t in loha(1, 8, 8).items()}
    kron = {f"{site}.{key}": t for key, t in SOME["LoKr"][f"{BLOCK}.attn1.to_q"].items()}

    def refused(tensors: Mapping[str, Tensor], match: str) -> None:
        save_file(dict(tensors), tmp_path / "x.safetensors")
        ours = unet()
        with pytest.raises(CheckpointError, match=match):
            fxpeft.load_adapter(ours, tmp_path / "x.safetensors")
        assert not fxpeft.loaded_adapters(ours)

    for key, method in {
        "oft_blocks": "OFT or BOFT", "on_input": "IA3", "a1.weight": "GLoRA", "diff": "full", "diff_b": "full",
        "lokr_t1": "LoKr with a core", "q_layer.weight": "T-LoRA", "scalar": "a factor",
    }.items():  # fmt: skip
        refused(whole | {f"{site}.{key}": torch.ones(2, 2)}, rf"another method:\n  {method}.*: {site}\.{key}")
    refused(whole | {f"{site}.dora_scale": torch.ones(1, 8)}, "dora_scale: expected a magnitude per output")
    refused(
        whole | {f"{site}.hada_t1": torch.ones(2, 2, 3, 3)}, r"these are no LoHa's or LoKr's: .*hada_t1 \[2, 2, 3, 3\]"
    )
    refused(whole | kron, "these are no LoHa's or LoKr's")
    for key in ("hada_w1_b", "hada_w2_a"):
        refused({k: t for k, t in whole.items() if not k.endswith(key)}, "no update:\n.*these are no LoHa's or LoKr's")
    refused({k: t for k, t in whole.items() if not k.endswith("hada_w1_a")}, "beside no hada_w1")
    refused(whole | {f"{site}.hada_w2_b": torch.ones(3, 8)}, "their sizes don't fit")
    refused(whole | {f"{site}.hada_w2_b": torch.ones(2)}, "their sizes don't fit")
    refused(kron | {f"{site}.lokr_w1": torch.ones(4)}, "their sizes don't fit")
    refused(
        kron | {f"{site}.lokr_w1": torch.ones(2, 5)},
        r"to_q: an update of \[8, 20\], and the model's weight is \[8, 8\]",
    )
    third = {f"{site}.{key}": t for key, t in low_rank(3, 8, 8).items()}
    for core in (torch.ones(3, 2, 1, 1), torch.tensor(1.0)):
        refused(third | {f"{site}.lora_mid.weight": core}, "no place in the model:\n.*lora_mid")
    refused(
        third | {f"{site}.lora_mid.weight": torch.ones(3, 3), f"{site}.lora_down.weight": torch.tensor(1.0)},
        "found one number for lora_A",
    )
    refused(whole | {f"{site}x.alpha": torch.tensor(1.0)}, "alphas of sites that have no factors")
    refused(whole | {f"{site}.alpha": torch.ones(2)}, "expected one finite number")
    refused(whole | {"lora_unet_elsewhere.hada_w1_a": torch.ones(2, 2)}, "these are no LoHa's or LoKr's")
    refused({k.replace("to_q", "to_z"): t for k, t in whole.items()}, "no site of the file is one of")
    refused({k: 0 * t[..., :0] if t.ndim > 1 and k.endswith("a") else t[:0] if t.ndim else t for k, t in whole.items()},
            "expected a positive integer, found 0")  # fmt: skip
    refused(whole | {k.replace("attn1_to_q", "norm1"): t.clone() for k, t in whole.items()}, "norm1: LayerNorm is no")
