"""Adapters whose files have the names of an older Transformers: every key finds its place, or is told of."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from families import FAMILIES, first_output
from safetensors.torch import load_file, save_file
from tiny import randomise
from torch import Tensor
from typer.testing import CliRunner
from vision_language import MODELS, VisionLanguage

import fxpeft
from fxpeft.tools.cli import app

PREFIX = "base_model.model."


def logits(model: Any, family: VisionLanguage) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**family.inputs()).logits
    return found


def write(folder: Path, family: VisionLanguage, *, seed: int = 4, **fields: Any) -> Tensor:
    """A file that PEFT writes, in both towers; returns the outputs of PEFT's freshly loaded model."""
    settings = {
        "r": 3, "lora_alpha": 7, "target_modules": list(family.targets), "rank_pattern": {r".*layers\.1.*q_proj": 5},
        "alpha_pattern": {"v_proj": 11}, **fields,
    }  # fmt: skip
    model = peft.get_peft_model(family.build(), peft.LoraConfig(**settings))
    randomise((p for n, p in model.named_parameters() if "lora_" in n), seed)
    model.save_pretrained(folder)
    return logits(peft.PeftModel.from_pretrained(family.build(), folder).eval(), family)


def renamed(folder: Path, rename: Callable[[str], str], **fields: Any) -> Path:
    """The same file with other keys, and fields of its config changed."""
    path = folder / "adapter_model.safetensors"
    tensors = {PREFIX + rename(key.removeprefix(PREFIX)): value for key, value in load_file(path).items()}
    save_file(tensors, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return folder


#: layout -> a key's name in it; what the guide's table says
LAYOUTS: dict[str, Callable[[VisionLanguage, str], str]] = {
    "now": lambda family, key: key,
    "before 5": lambda family, key: re.sub(r"(vision_tower\.)(?=encoder)", r"\1vision_model.", key),
    "before 4.52": lambda family, key: family.old(key),
    "saved from the body": lambda family, key: key.removeprefix("model."),
}


@pytest.mark.filterwarnings("error:.*have no place")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_both_towers_have_their_adapter(name: str, layout: str, tmp_path: Path, installed: None) -> None:
    family = MODELS[name]
    expected = write(tmp_path, family)
    renamed(tmp_path, lambda key: LAYOUTS[layout](family, key))
    assert not torch.allclose(expected, logits(family.build(), family), atol=1e-2)
    native = family.build()
    fxpeft.load_adapter(native, tmp_path)
    assert_close(logits(native, family), expected)
    through = family.build()
    info = through.load_adapter(str(tmp_path))
    assert info.missing_keys == info.unexpected_keys == set()
    assert_close(logits(through, family), expected)
    slots = family.build()
    fxpeft.prepare_hotswap(slots, max_rank=8)
    fxpeft.load_adapter(slots, tmp_path)
    fxpeft.disable_adapters(slots)
    fxpeft.enable_adapters(slots)
    fxpeft.hotswap(slots, tmp_path)
    assert_close(logits(slots, family), expected)
    # saved again, it has the names of now and PEFT reads it
    fxpeft.save_adapter(native, tmp_path / "again")
    assert sorted(load_file(tmp_path / "again" / "adapter_model.safetensors")) == sorted(
        f"{PREFIX}{key}" for key in through.get_adapter_state_dict()
    )
    theirs = peft.PeftModel.from_pretrained(family.build(), tmp_path / "again").eval()
    assert_close(logits(theirs, family), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["full names", "regular expression"])
def test_the_config_has_old_names_too(name: str, form: str, tmp_path: Path) -> None:
    """Full names, an expression that only the old names match, ranks by old names."""
    family = MODELS[name]
    expected = write(tmp_path, family, rank_pattern={r".*layers\.1\.self_attn\.q_proj": 5, r"blocks\.1\.attn\.proj": 2})
    sites = [
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        for key in load_file(tmp_path / "adapter_model.safetensors")
        if key.endswith("lora_A.weight")
    ]
    old = [family.old(site) for site in sites]
    ranks = {
        f"^{re.escape(family.old(site))}" if i % 2 else family.old(site): 5 if "q_proj" in site else 2
        for i, site in enumerate(sites)
        if re.search(r"layers\.1\.self_attn\.q_proj|blocks\.1\.attn\.proj", site)
    }
    targets = old if form == "full names" else "|".join(re.escape(site) for site in old)
    renamed(tmp_path, family.old, target_modules=targets, rank_pattern=ranks)
    model = family.build()
    fxpeft.load_adapter(model, tmp_path)
    assert_close(logits(model, family), expected)
    fxpeft.save_adapter(model, tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(family.build(), tmp_path / "again").eval()
    assert_close(logits(theirs, family), expected)


@pytest.mark.parametrize("name", ["llava", "paligemma"])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"vision_tower\..*"},
        {"target_modules": r"language_model\.model\..*(q|v)_proj"},
        {"target_modules": r"(?!vision_tower).*(q|v)_proj"},
    ],
    ids=["excluded", "selected", "not the other"],
)
def test_one_tower_by_its_old_name(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    family = MODELS[name]
    expected = write(tmp_path, family, target_modules=r".*language_model.*(q|v)_proj")
    renamed(tmp_path, family.old, **fields)
    model = family.build()
    fxpeft.load_adapter(model, tmp_path)
    assert_close(logits(model, family), expected)


def test_a_file_that_lacks_a_site_is_still_incomplete(tmp_path: Path) -> None:
    family = MODELS["llava"]
    write(tmp_path, family)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "vision_tower.encoder.layers.1" not in k}, path)
    renamed(tmp_path, family.old)
    with pytest.raises(fxpeft.CheckpointError, match=r"doesn't fill:\n  model\.vision_tower\.encoder\.layers\.1"):
        fxpeft.load_adapter(family.build(), tmp_path)


def test_a_whole_module_that_moved(tmp_path: Path) -> None:
    family = MODELS["llava"]
    expected = write(tmp_path, family, modules_to_save=["lm_head", "multi_modal_projector"])
    # PEFT writes the whole module as it was; other numbers show that they are read
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{PREFIX}lm_head.weight"] += 0.3
    tensors[f"{PREFIX}model.multi_modal_projector.linear_1.weight"] *= 2
    save_file(tensors, path)
    new = logits(peft.PeftModel.from_pretrained(family.build(), tmp_path).eval(), family)
    assert not torch.allclose(new, expected, atol=1e-2)
    renamed(tmp_path, family.old, modules_to_save=["language_model.lm_head", "multi_modal_projector"])
    model = family.build()
    fxpeft.load_adapter(model, tmp_path)
    assert_close(logits(model, family), new)


def test_what_is_left_over_is_an_error_and_a_loud_warning(tmp_path: Path, installed: None) -> None:
    family = MODELS["llava"]
    write(tmp_path, family)
    renamed(tmp_path, lambda key: family.old(key).replace("language_model.model.", "talk."))
    model = family.build()
    with pytest.raises(fxpeft.CheckpointError, match=r"no place in the model:\n  talk\.layers\.0\.self_attn\.q_proj"):
        fxpeft.load_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match=r"8 of its 16 tensors have no place in LlavaFor.*\n  talk\.layers\.0"):
        info = model.load_adapter(str(tmp_path))
    assert len(info.unexpected_keys) == len(info.missing_keys) == 8


def test_two_keys_for_one_place(tmp_path: Path) -> None:
    family = MODELS["llava"]
    write(tmp_path, family)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"{PREFIX}model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[PREFIX + family.old(key.removeprefix(PREFIX))] = tensors[key] + 1
    save_file(tensors, path)
    model = family.build()
    with pytest.raises(fxpeft.CheckpointError, match="two keys mean one place"):
        fxpeft.load_adapter(model, tmp_path)
    assert not any("adapters" in name for name, _ in model.named_modules())


def test_key_mapping(tmp_path: Path, installed: None) -> None:
    """Names that no table knows, renamed by the user; what the table knows still is."""
    family = MODELS["llava"]
    expected = write(tmp_path / "adapter", family)
    family.build().save_pretrained(tmp_path / "base")

    def own(key: str) -> str:
        return family.old(key).replace("language_model.model.", "talk.")

    base = {"base_model_name_or_path": str(tmp_path / "base")}
    renamed(tmp_path / "adapter", own, **base)
    mapping = {r"^talk\.": "language_model.model."}
    loaded = type(family.build()).from_pretrained(str(tmp_path / "adapter"), key_mapping=mapping)
    assert_close(logits(loaded, family), expected)
    native = family.build()
    fxpeft.load_adapter(native, tmp_path / "adapter", key_mapping=mapping)
    assert_close(logits(native, family), expected)
    slots = family.build()
    fxpeft.prepare_hotswap(slots, max_rank=8)
    fxpeft.load_adapter(slots, tmp_path / "adapter", key_mapping=mapping)
    fxpeft.hotswap(slots, tmp_path / "adapter", key_mapping=mapping)
    assert_close(logits(slots, family), expected)


@pytest.mark.parametrize("given", [False, True], ids=["tensors alone", "with a config"])
def test_tensors_in_memory(given: bool, tmp_path: Path) -> None:
    family = MODELS["llava"]
    expected = write(tmp_path, family, rank_pattern={}, alpha_pattern={}, lora_alpha=3)
    tensors = {PREFIX + family.old(k.removeprefix(PREFIX)): v
               for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}  # fmt: skip
    config = fxpeft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    model = family.build()
    fxpeft.inject(model, tensors, config if given else None)
    assert_close(logits(model, family), expected)
    slots = family.build()
    fxpeft.prepare_hotswap(slots, max_rank=8)
    fxpeft.add_adapter(slots, config)
    fxpeft.hotswap(slots, tensors)
    assert_close(logits(slots, family), expected)


def test_a_model_whose_blocks_are_compiled(tmp_path: Path) -> None:
    family = MODELS["llava"]
    expected = write(tmp_path, family)
    renamed(tmp_path, family.old)
    model = family.build()
    layers = model.model.language_model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    fxpeft.load_adapter(model, tmp_path)
    assert_close(logits(model, family), expected)


def test_swapped_by_transformers(tmp_path: Path, installed: None) -> None:
    family = MODELS["qwen2 vl"]
    expected = {seed: write(tmp_path / str(seed), family, seed=seed) for seed in (4, 5)}
    assert not torch.allclose(expected[4], expected[5], atol=1e-2)
    for slots in (True, False):
        model = family.build()
        if slots:
            model.enable_peft_hotswap(target_rank=8)
        model.load_adapter(str(tmp_path / "4"))
        for seed in (5, 4):
            folder = tmp_path / f"{seed} {slots}"
            shutil.copytree(tmp_path / str(seed), folder)
            model.load_adapter(str(renamed(folder, family.old)), "default", hotswap=True)
            assert_close(logits(model, family), expected[seed])


def test_the_command_line_says_that_it_loads(tmp_path: Path) -> None:
    family = MODELS["llava"]
    family.build().config.save_pretrained(tmp_path / "base")
    write(tmp_path / "adapter", family)
    renamed(tmp_path / "adapter", family.old)
    done = CliRunner().invoke(app, ["check", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--json"])
    answer = json.loads(done.stdout)
    assert (answer["loads"], answer["swaps"], answer["sites"]) == (True, True, 8)


def test_a_plan_shows_what_is_added() -> None:
    model = FAMILIES["mixtral"].build()
    plan = fxpeft.plan(model, fxpeft.LoraConfig(r=3, target_modules=["q_proj", "w1", "w2", "w3"]), roles=False)
    assert {site.name: site.rank for site in plan.sites if ".layers.1." in site.name} == {
        "model.layers.1.self_attn.q_proj": 3, "model.layers.1.mlp.experts.gate_up_proj": 6,
        "model.layers.1.mlp.experts.down_proj": 3,
    }  # fmt: skip
    fxpeft.apply(plan, model)
    assert fxpeft.active_adapters(model) == ["default"]


def test_targets_that_have_other_names_now(tmp_path: Path, installed: None) -> None:
    """A vision transformer's modules were renamed one by one: the config's names select nothing by themselves."""
    family = FAMILIES["vit"]

    def outputs(model: Any) -> Tensor:
        with torch.no_grad():
            return first_output(model(**family.inputs()))

    theirs = peft.get_peft_model(
        family.build(),
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "o_proj", "fc1", "fc2"], rank_pattern={"fc1": 5},
                        modules_to_save=["classifier"]),
    )  # fmt: skip
    randomise((p for n, p in theirs.named_parameters() if "lora_" in n), seed=4)
    theirs.save_pretrained(tmp_path)
    expected = outputs(peft.PeftModel.from_pretrained(family.build(), tmp_path).eval())
    before = {
        "vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query",
        "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip

    def old(key: str) -> str:
        for now, then in before.items():
            key = key.replace(now, then)
        return key

    # "dense" is three modules, and in no name of now
    renamed(tmp_path, old, target_modules=["query", "dense"], rank_pattern={"intermediate.dense": 5})
    for load in (lambda m: fxpeft.load_adapter(m, tmp_path), lambda m: m.load_adapter(str(tmp_path))):
        model = family.build()
        load(model)
        assert_close(outputs(model), expected)
    fxpeft.save_adapter(model, tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(family.build(), tmp_path / "again").eval()
    assert_close(outputs(theirs), expected)
