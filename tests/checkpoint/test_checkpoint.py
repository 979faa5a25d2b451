"""Checkpoints: what is refused, what stays untouched, what is written, and base weights in the file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from picture import assert_same, picture
from safetensors.torch import load_file, save_file
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor

import fxpeft
from fxpeft import CheckpointError, LoraConfig

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
IDS = token_ids()
PREFIX = "base_model.model.model.layers.0.self_attn"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter with ranks and alphas of its own per site, saved by fxpeft."""
    model = tiny_llama()
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5}, alpha_pattern={"v_proj": 2}
    )
    fxpeft.add_adapter(model, config)
    randomise(fxpeft.adapter_state_dict(model).values())
    fxpeft.save_adapter(model, tmp_path)
    return tmp_path


# --- files that can't be used ---


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) - 16])


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def to_pickled_objects(folder: Path) -> None:
    """Beside the tensors an object, which only unpickling whatever is there makes."""
    torch.save({**load_file(folder / WEIGHTS), "path": Path("x")}, folder / PICKLE)
    (folder / WEIGHTS).unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), rf"expected {CONFIG}, found none"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), rf"expected {WEIGHTS}, found none"),
    "broken json": (lambda f: (f / CONFIG).write_text('{"r": 4,'), rf"{CONFIG}: damaged"),
    "no utf-8": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), rf"{CONFIG}: damaged"),
    "json list": (lambda f: (f / CONFIG).write_text('["r", 4]'), "expected an object, found list"),
    "no peft_type": (lambda f: (f / CONFIG).write_text("{}"), "peft_type: expected one of LORA.*found None"),
    "other peft_type": (lambda f: edit_config(f, peft_type="SHADOW"), "peft_type.*'SHADOW'"),
    "odd peft_type": (lambda f: edit_config(f, peft_type=["LORA"]), r"peft_type.*\['LORA'\]"),
    "wrong type": (lambda f: edit_config(f, r="3"), rf"{CONFIG}: LoraConfig.r: expected int, found '3'"),
    "unsupported": (lambda f: edit_config(f, kasa_config=True), r"kasa_config = True \(unsupported\)"),
    "cut short": (cut, rf"{WEIGHTS}: damaged or cut short"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), rf"{WEIGHTS}: damaged or cut short"),
    "not safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"\x00" * 64), rf"{WEIGHTS}: damaged or cut short"),
    "pickle": (to_pickled_objects, rf"{PICKLE}.*any code.*allow_pickle=True"),
    "foreign key": (
        lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.other.lora_A.weight": torch.ones(3, 2)})),
        r"no place in the model:\n  other\.lora_A\.weight \[3, 2\]",
    ),
    "missing site": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{PREFIX}.v_proj.lora_B.weight")),
        r"doesn't fill:\n  model\.layers\.0\.self_attn\.v_proj\.lora_B\.weight \[16, 5\]",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{PREFIX}.q_proj.lora_A.weight": torch.ones(4, 32)})),
        r"layers\.0\.self_attn\.q_proj\.lora_A\.weight: expected \[3, 32\], found \[4, 32\]",
    ),
    "swapped sides": (
        lambda f: edit_tensors(f, lambda t: t.update({k: v.t().contiguous() for k, v in t.items()})),
        r"v_proj\.lora_B\.weight: expected \[16, 5\], found \[5, 16\]",
    ),
    "another rank in the config": (lambda f: edit_config(f, r=4), r"lora_A\.weight: expected \[4, 32\], found \[3,"),
    "no such target": (lambda f: edit_config(f, target_modules=["quarry"]), r"no module of the model is a target"),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_checkpoint_is_refused_and_nothing_changes(
    change: Callable[[Path], object], message: str, adapted: bool, folder: Path
) -> None:
    model = tiny_llama()
    if adapted:
        fxpeft.add_adapter(model, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]), "first")
        randomise(fxpeft.adapter_state_dict(model).values())
    before = picture(model, IDS)
    change(folder)
    with pytest.raises(fxpeft.AdapterError, match=rf"(?s){message}"):
        fxpeft.load_adapter(model, folder, "second")
    assert_same(before, picture(model, IDS))


def test_all_that_does_not_fit_is_in_one_error(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{PREFIX}.q_proj.lora_A.weight"], tensors[f"{PREFIX}.q_proj.lora_B.weight"]
        tensors[f"{PREFIX}.v_proj.lora_A.weight"] = torch.ones(6, 32)
        tensors[f"{PREFIX}.k_proj.lora_A.weight"] = torch.ones(3, 32)
        tensors["strange"] = torch.ones(1)

    edit_tensors(folder, change)
    with pytest.raises(CheckpointError) as caught:
        fxpeft.load_adapter(tiny_llama(), folder)
    text = str(caught.value)
    for part in ("q_proj.lora_A.weight [3, 32]", "q_proj.lora_B.weight [32, 3]", "expected [5, 32], found [6, 32]"):
        assert part in text
    for part in ("k_proj.lora_A.weight [3, 32]", "strange [1]", str(folder), "nothing was changed"):
        assert part in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value: float, folder: Path) -> None:
    edit_tensors(folder, lambda t: t[f"{PREFIX}.v_proj.lora_A.weight"][2, 3].fill_(value))
    model = tiny_llama()
    before = picture(model, IDS)
    with pytest.raises(CheckpointError, match=r"v_proj\.lora_A\.weight: expected finite values"):
        fxpeft.load_adapter(model, folder, check_finite=True)
    assert_same(before, picture(model, IDS))
    fxpeft.load_adapter(model, folder)
    assert not model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, "text"])
def test_pickle_of_something_else_is_refused(content: object, folder: Path) -> None:
    to_pickle(folder)
    torch.save(content, folder / PICKLE)
    with pytest.raises(CheckpointError, match=f"{PICKLE}: (expected a dict of tensors|no tensors(?s:.*)found int)"):
        fxpeft.load_adapter(tiny_llama(), folder, allow_pickle=True)
    (folder / PICKLE).write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=f"{PICKLE}: can't be unpickled"):
        fxpeft.load_adapter(tiny_llama(), folder, allow_pickle=True)


def test_pickle_is_read_where_allowed(folder: Path) -> None:
    expected = load_file(folder / WEIGHTS)
    to_pickle(folder)
    model = tiny_llama()
    fxpeft.load_adapter(model, folder, allow_pickle=True)
    found = fxpeft.adapter_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


# --- where it is read from ---


def test_subfolder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "inner" / "deep").mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(tmp_path / "inner" / "deep" / name)
    model = tiny_llama()
    with pytest.raises(CheckpointError, match=CONFIG):
        fxpeft.load_adapter(model, tmp_path)
    fxpeft.load_adapter(model, tmp_path, subfolder="inner/deep")
    assert fxpeft.active_adapters(model) == ["default"]


@pytest.mark.parametrize("source", ["nobody/no-such-adapter", "./no/such/folder", "/no/such/folder", "no such id!"])
def test_source_that_cannot_be_reached(source: str) -> None:
    model = tiny_llama()
    before = picture(model, IDS)
    with pytest.raises(CheckpointError, match="no such folder"):
        fxpeft.load_adapter(model, source, local_files_only=True)
    assert_same(before, picture(model, IDS))


def test_hub_is_not_asked_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/no-such-adapter: no such folder"):
        fxpeft.load_adapter(tiny_llama(), "nobody/no-such-adapter")


# --- what is written ---


def test_files_are_pefts(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    umask = os.umask(0)
    os.umask(umask)
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o666 & ~umask for p in folder.iterdir())
    values = json.loads((folder / CONFIG).read_text())
    assert values["inference_mode"] is True
    assert values["auto_mapping"] == {
        "base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama",
    }  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), folder)
    ours = tiny_llama()
    fxpeft.load_adapter(ours, folder)
    assert not torch.equal(ours(IDS).logits, tiny_llama()(IDS).logits)
    assert_close(ours(IDS).logits, theirs(IDS).logits)


def test_save_writes_what_training_made_of_it(folder: Path) -> None:
    model = tiny_llama()
    fxpeft.load_adapter(model, folder, trainable=True)
    before = load_file(folder / WEIGHTS)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(IDS, labels=IDS).loss.backward()
    optimiser.step()
    fxpeft.save_adapter(model, folder)
    after = load_file(folder / WEIGHTS)
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[k], v) for k, v in before.items())
    again = tiny_llama()
    fxpeft.load_adapter(again, folder)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("at", [1, 2], ids=["weights", "config"])
def test_crash_while_saving_leaves_whole_files(
    broken: str, at: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    model, calls = tiny_llama(), 0
    fxpeft.load_adapter(model, folder)
    randomise(fxpeft.adapter_state_dict(model).values(), seed=8)
    owner: Any = os if broken == "fsync" else Path
    real = getattr(owner, broken)

    def crash(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError("disk full")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, broken, crash)
        with pytest.raises(OSError, match="disk full"):
            fxpeft.save_adapter(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert (folder / CONFIG).read_bytes() == old[CONFIG]
    # both are on disk before the first is renamed; only a crash between two renames can leave one of each
    between = (broken, at) == ("replace", 2)
    assert ((folder / WEIGHTS).read_bytes() != old[WEIGHTS]) == between
    fxpeft.load_adapter(tiny_llama(), folder)


# --- base weights in the file ---


@pytest.mark.parametrize("shift", [0.0, 0.5], ids=["equal", "changed"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["target", "beside"])
def test_base_embeddings_that_peft_saved(shift: float, wrapped: bool, tmp_path: Path) -> None:
    targets = ["embed_tokens", "q_proj"] if wrapped else ["q_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets)
    theirs = peft.get_peft_model(tiny_llama(), config)
    randomise(p for n, p in theirs.named_parameters() if "lora_" in n)
    with torch.no_grad():
        theirs.get_input_embeddings().weight.add_(shift)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in k and k.endswith(".weight") for k in load_file(tmp_path / WEIGHTS))

    model = tiny_llama()
    expected = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()(IDS).logits
    fxpeft.load_adapter(model, tmp_path)
    assert_close(model(IDS).logits, expected)
    own = tiny_llama()
    path = "model.embed_tokens.weight"
    assert torch.equal(model.state_dict()[path], own.state_dict()[path])  # the attribute is the adapter's, as in PEFT
    assert torch.equal(model.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    with fxpeft.disabled(model):
        assert torch.equal(model(IDS).logits, own(IDS).logits)
    fxpeft.save_adapter(model, tmp_path / "again")
    again = tiny_llama()
    fxpeft.load_adapter(again, tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    reread = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "again").eval()
    assert_close(reread(IDS).logits, expected)
    fxpeft.remove(model)
    assert_same(picture(own, IDS) | {"parameters": 0}, picture(model, IDS) | {"parameters": 0})


def test_embeddings_of_another_vocabulary_say_what_to_do(tmp_path: Path) -> None:
    base = tiny_llama()
    base.resize_token_embeddings(42)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["embed_tokens"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(CheckpointError, match=r"(?s)expected \[40, 32\], found \[42, 32\].*resize_token_embeddings"):
        fxpeft.load_adapter(tiny_llama(), tmp_path)


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    contents = set()
    for i in range(12):  # safetensors alone writes one of two orders each time
        fxpeft.save_adapter(model, tmp_path / str(i))
        contents.add((tmp_path / str(i) / "adapter_model.safetensors").read_bytes())
    assert len(contents) == 1
    assert load_file(tmp_path / "0" / "adapter_model.safetensors").keys() == fxpeft.adapter_state_dict(model).keys()
