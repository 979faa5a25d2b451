"""Configs and files that PEFT loads: nulls, floats, later fields, patterns and heads that nothing has, pickles."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import logits, randomise, tiny_bert, tiny_llama, token_ids
from torch import nn

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = token_ids()


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A LoRA that PEFT saved, with patterns."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 3},
        alpha_pattern={"q_proj": 9},
    )
    model = peft.get_peft_model(tiny_llama(), config)
    randomise(p for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def edit(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **fields}))


def same_as_peft(folder: Path) -> None:
    ours = tiny_llama()
    fxpeft.load_adapter(ours, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits(peft.PeftModel.from_pretrained(tiny_llama(), str(folder)).eval())
    assert_close(logits(ours), expected)
    assert (expected - logits(tiny_llama())).abs().max() > 1e-2


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(LoraConfig)])
def test_null_is_the_default(theirs: Path, name: str) -> None:
    needed = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
    if name in needed:  # null there is another adapter: only the reading is asked for
        edit(theirs, **{name: None})
        assert fxpeft.checkpoint.read(theirs).config is not None
        return
    expected = tiny_llama()
    fxpeft.load_adapter(expected, theirs)
    same_as_peft(theirs)
    edit(theirs, **{name: None})  # PEFT fails at some of these: its own file without the null is the reference
    model = tiny_llama()
    fxpeft.load_adapter(model, theirs)
    assert torch.equal(logits(model), logits(expected))


def test_integers_written_as_floats(theirs: Path) -> None:
    edit(
        theirs,
        r=4.0,
        lora_alpha=6.0,
        rank_pattern={"v_proj": 3.0},
        alpha_pattern={"q_proj": 9.0},
        layers_to_transform=[0.0, 1.0],
    )
    config = fxpeft.checkpoint.read(theirs).config
    assert isinstance(config, LoraConfig)
    assert (config.r, config.rank_pattern, config.layers_to_transform) == (4, {"v_proj": 3}, [0, 1])
    assert type(config.r) is int
    model = tiny_llama()
    fxpeft.load_adapter(model, theirs)
    assert (logits(model) - logits(tiny_llama())).abs().max() > 1e-2
    edit(theirs, r=4.5)
    with pytest.raises(CheckpointError, match=r"LoraConfig\.r: expected int, found 4\.5"):
        fxpeft.load_adapter(tiny_llama(), theirs)


def test_a_field_of_a_later_peft_is_told_of_once(theirs: Path) -> None:
    edit(theirs, sparkles={"depth": 3}, use_sparkles=True)
    with pytest.warns(UserWarning, match=r"(?s)doesn't know.*sparkles = \{'depth': 3\}.*use_sparkles = True") as told:
        fxpeft.load_adapter(tiny_llama(), theirs)
    assert len([w for w in told if "doesn't know" in str(w.message)]) == 1
    model = tiny_llama()
    with pytest.raises(CheckpointError, match=r"sparkles = \{'depth': 3\} \(unknown\)"):
        fxpeft.load_adapter(model, theirs, strict=True)
    assert "_fxpeft" not in vars(model)
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj", "v_proj"])
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="sparkles"):
        fxpeft.hotswap(model, theirs, strict=True)
    with pytest.warns(UserWarning, match="sparkles"):
        fxpeft.hotswap(model, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_as_peft(theirs)


def test_a_later_field_with_tensors_of_its_own_is_refused(theirs: Path) -> None:
    edit(theirs, use_sparkles=True)
    held = load_file(theirs / WEIGHTS)
    key = next(iter(held))
    save_file({**held, key.replace("lora_A", "lora_S"): torch.ones(3)}, theirs / WEIGHTS, {"format": "pt"})
    with pytest.warns(UserWarning, match="use_sparkles"), pytest.raises(CheckpointError, match="lora_S"):
        fxpeft.load_adapter(tiny_llama(), theirs)


@pytest.mark.parametrize(
    "fields",
    [
        {"qalora_group_size": 32},
        {"megatron_core": "other.core"},
        {"corda_config": {"corda_method": "ipm"}},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"merge_weights": True},
        {"unsloth_fixed": True},
        {"loftq_config": None},
        {"eva_config": None, "lora_bias": None, "use_dora": None},
    ],
    ids=str,
)
def test_known_harmless_fields_are_silent(theirs: Path, fields: dict[str, Any]) -> None:
    edit(theirs, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fxpeft.load_adapter(tiny_llama(), theirs, strict=True)


@pytest.mark.parametrize("fields", [{"use_qalora": True}, {"kasa_config": {"beta": 1}}])
def test_fields_that_change_the_outputs_stay_errors(theirs: Path, fields: dict[str, Any]) -> None:
    edit(theirs, **fields)
    with pytest.raises(CheckpointError, match=rf"{next(iter(fields))} = .*unsupported"):
        fxpeft.load_adapter(tiny_llama(), theirs)


def test_a_config_with_many_odd_fields_has_a_short_error(theirs: Path) -> None:
    edit(theirs, **{f"_private_{i}": "x" * 10_000 for i in range(64)})
    with pytest.raises(CheckpointError, match=r"_private_0 = 'xxx") as caught:
        fxpeft.load_adapter(tiny_llama(), theirs, strict=True)
    assert len(str(caught.value)) < 8000
    assert "... and 44 more" in str(caught.value)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_meets_no_site(theirs: Path, name: str) -> None:
    own = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 9}}[name]
    edit(theirs, **{name: {**own, "k_proj": 2, r".*\.fc1": 5}})
    with pytest.warns(UserWarning, match=rf"{name}: 'k_proj' matches none"):
        fxpeft.load_adapter(tiny_llama(), theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_as_peft(theirs)
    config = LoraConfig(r=2, target_modules=["q_proj"], **{name: {"k_proj": 2}})  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=rf"{name}: 'k_proj' matches none"):
        fxpeft.add_adapter(tiny_llama(), config)


def test_modules_to_save_that_the_model_lacks(theirs: Path) -> None:
    edit(theirs, modules_to_save=["logit_scale", "lm_head2"])
    with pytest.warns(UserWarning, match=r"(?s)modules_to_save: no module.*logit_scale.*lm_head2.*passed over"):
        fxpeft.load_adapter(tiny_llama(), theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_as_peft(theirs)
    with pytest.raises(AdapterError, match="logit_scale"):
        fxpeft.add_adapter(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["logit_scale"]))


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_in_the_file_goes_into_its_declared_slot(tmp_path: Path, bias: bool) -> None:
    """``modules_to_save: null`` and a classifier's tensor in the file, as older scripts wrote it."""
    source = tiny_bert()
    fxpeft.add_adapter(source, LoraConfig(r=3, lora_alpha=5, target_modules=["query"], modules_to_save=["classifier"]))
    randomise(fxpeft.adapter_state_dict(source).values(), seed=4)
    fxpeft.save_adapter(source, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "modules_to_save": None, "task_type": None}))
    held = {k: v for k, v in load_file(tmp_path / WEIGHTS).items() if bias or not k.endswith("classifier.bias")}
    assert any("classifier.weight" in k for k in held)
    save_file(held, tmp_path / WEIGHTS, {"format": "pt"})
    eager, prepared = tiny_bert(), tiny_bert()
    fxpeft.load_adapter(eager, tmp_path)
    if bias:
        assert_close(logits(eager), logits(source))
    fxpeft.prepare_hotswap(prepared, 8, targets=["query"], modules_to_save=["classifier"])
    fxpeft.load_adapter(prepared, tmp_path)
    assert_close(logits(prepared), logits(eager))
    assert (logits(eager) - logits(tiny_bert())).abs().max() > 1e-2
    fxpeft.save_adapter(prepared, tmp_path / "again")
    again = tiny_bert()
    fxpeft.load_adapter(again, tmp_path / "again")
    assert_close(logits(again), logits(eager))
    with fxpeft.disabled(prepared):
        assert_close(logits(prepared), logits(tiny_bert()))


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"]])
def test_a_resized_vocabulary_names_the_cure(tmp_path: Path, saved: list[str]) -> None:
    base = tiny_llama()
    base.resize_token_embeddings(47)
    fxpeft.add_adapter(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    fxpeft.save_adapter(base, tmp_path)
    cure = r"expected \[40, 32\], found \[47, 32\]; .*call model\.resize_token_embeddings\(47\) first"
    with pytest.raises(CheckpointError, match=cure):
        fxpeft.load_adapter(tiny_llama(), tmp_path)
    resized = tiny_llama()
    resized.resize_token_embeddings(47)
    fxpeft.load_adapter(resized, tmp_path)


# --- pickled files ---


class Runs:
    """Unpickling it runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))  # type: ignore[attr-defined]


def test_a_pickled_file_of_tensors_needs_no_word(theirs: Path) -> None:
    expected = tiny_llama()
    fxpeft.load_adapter(expected, theirs)
    held = load_file(theirs / WEIGHTS)
    (theirs / WEIGHTS).unlink()
    torch.save({k: nn.Parameter(v) for k, v in held.items()}, theirs / "adapter_model.bin")
    model = tiny_llama()
    fxpeft.load_adapter(model, theirs)
    assert torch.equal(logits(model), logits(expected))
    torch.save({**held, "step": 3}, theirs / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"'step': expected a dense tensor .*found int"):
        fxpeft.load_adapter(tiny_llama(), theirs, allow_pickle=True)


def test_a_pickled_file_that_runs_code_needs_the_users_word(theirs: Path, tmp_path: Path) -> None:
    held = load_file(theirs / WEIGHTS)
    (theirs / WEIGHTS).unlink()
    bomb = Runs()
    bomb.path = str(tmp_path / "ran")  # type: ignore[attr-defined]
    torch.save({**held, "x": bomb}, theirs / "adapter_model.bin")
    for options in ({}, {"strict": True}):
        with pytest.raises(CheckpointError, match=r"adapter_model\.bin(?s:.*)allow_pickle=True"):
            fxpeft.load_adapter(tiny_llama(), theirs, **options)
    (theirs / "adapter_model.bin").write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match="any code"):
        fxpeft.load_adapter(tiny_llama(), theirs)
    assert not (tmp_path / "ran").exists()


def test_a_cached_hub_adapter_with_only_a_pickled_file(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's cache holds it when there is no network."""
    commit = "a" * 40
    repo = tmp_path / "hub" / "models--someone--adapter"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (snapshot / CONFIG).write_bytes((theirs / CONFIG).read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="someone/adapter"):
        fxpeft.load_adapter(tiny_llama(), "someone/adapter", local_files_only=True)
    torch.save(load_file(theirs / WEIGHTS), snapshot / "adapter_model.bin")
    model, expected = tiny_llama(), tiny_llama()
    fxpeft.load_adapter(model, "someone/adapter", local_files_only=True)
    fxpeft.load_adapter(expected, theirs)
    assert torch.equal(logits(model), logits(expected))
