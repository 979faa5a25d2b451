"""Prepared models: what is refused and why, swaps that are all or nothing, threads, and release."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file, save_file
from served import base, folder, fresh, output, prepared

import fxpeft
from fxpeft import checkpoint
from fxpeft.adapters import loading
from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.slot import ActiveRank
from fxpeft.serving import swap


def test_hotswap_gives_what_a_fresh_load_gives(old: str, new: str) -> None:
    model = prepared(old)
    assert_close(output(model), fresh(old))
    for source in (new, old, new):
        fxpeft.hotswap(model, source)
        assert_close(output(model), fresh(source))
    config = fxpeft.adapter_config(model)
    assert (config.r, config.lora_alpha, config.alpha_pattern) == (6, 11, {"v_proj": 2})


def test_hotswap_from_a_state_dict_keeps_no_hold_of_it(old: str, new: str) -> None:
    model = prepared(old)
    tensors = load_file(f"{new}/adapter_model.safetensors")
    config = checkpoint.read(new).config
    fxpeft.hotswap(model, tensors, config=config)
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    fxpeft.disable_adapters(model)
    fxpeft.enable_adapters(model)
    assert_close(output(model), fresh(new))


def test_a_file_written_over_after_the_swap_changes_nothing(old: str, new: str) -> None:
    model = prepared(old)
    fxpeft.hotswap(model, new)
    wanted = fresh(new)
    path = Path(new) / "adapter_model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    fxpeft.disable_adapters(model)
    fxpeft.enable_adapters(model)
    assert_close(output(model), wanted)


def test_what_is_saved_from_slots_is_what_was_loaded(old: str, new: str, tmp_path: Path) -> None:
    model = prepared(old)
    fxpeft.hotswap(model, new)
    fxpeft.save_adapter(model, tmp_path / "again")
    saved, loaded = (load_file(f"{p}/adapter_model.safetensors") for p in (tmp_path / "again", new))
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in loaded)


STEPS = [
    (checkpoint, "read"), (checkpoint, "assign"), (loading, "plan_for"), (swap, "lower"), (swap, "settle"),
    (swap, "check_together"), (swap, "check_ranks"), (swap, "show_copies"), (ActiveRank, "set"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_fault_at_any_step_leaves_the_old_adapter_serving(
    owner: Any, step: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(old)
    wanted, real, calls = output(model), getattr(owner, step), []
    found = checkpoint.read(new)
    source = found.tensors if step == "settle" else new  # what was read from a file is fxpeft's own already

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(step)
        if len(calls) == 1:
            raise OSError("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, step, fail_once)
    with pytest.raises(OSError, match="injected"):
        fxpeft.hotswap(model, source, config=found.config)
    assert calls
    assert torch.equal(output(model), wanted)
    assert fxpeft.adapter_config(model).r == 3
    monkeypatch.undo()
    fxpeft.hotswap(model, new)
    assert_close(output(model), fresh(new))


def test_a_fault_in_the_middle_of_the_copies_is_undone(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(old)
    wanted, calls = output(model), []

    def half(self: Copies) -> None:
        calls.append(len(self.pairs))
        if len(calls) == 1:
            whole(Copies(self.pairs[: len(self.pairs) // 2]))
            raise MemoryError("injected")
        whole(self)

    whole = Copies.run
    monkeypatch.setattr(Copies, "run", half)
    with pytest.raises(MemoryError):
        fxpeft.hotswap(model, new)
    assert len(calls) == 2  # and the old adapter's
    assert torch.equal(output(model), wanted)


def test_stale_ranks_are_zeroed_even_where_they_are_nan(old: str, new: str, tmp_path: Path) -> None:
    model = prepared(old)
    tensors = {k: torch.full_like(v, float("nan")) for k, v in load_file(f"{new}/adapter_model.safetensors").items()}
    fxpeft.hotswap(model, tensors, config=checkpoint.read(new).config)
    assert output(model).isnan().any()
    fxpeft.hotswap(model, old)  # fewer ranks and other sites than the broken one
    assert_close(output(model), fresh(old))
    fxpeft.hotswap(model, new)
    assert_close(output(model), fresh(new))
    fxpeft.disable_adapters(model)
    assert_close(output(model), output(base()))


def refusals(tmp_path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    nan = folder(tmp_path / "nan", 3)
    tensors = load_file(f"{nan}/adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, f"{nan}/adapter_model.safetensors")
    return {
        "q_proj: rank 9 is above max_rank 8": (folder(tmp_path / "rank", 4, r=9), {}),
        "embed_tokens: has no slot; declare it in targets": (
            folder(tmp_path / "sites", 5, target_modules=["embed_tokens"]), {},
        ),
        "model.norm: has no slot; declare it in modules_to_save": (
            folder(tmp_path / "saved", 6, modules_to_save=["model.norm"]), {},
        ),
        "methods=('lora', 'lora_bias')": (folder(tmp_path / "bias", 7, lora_bias=True), {}),
        "expected finite values, found NaN": (nan, {"check_finite": True}),
    }  # fmt: skip


def test_what_does_not_fit_is_refused_with_what_to_do(old: str, tmp_path: Path) -> None:
    model = prepared(old)
    wanted = output(model)
    for message, (source, settings) in refusals(tmp_path).items():
        with pytest.raises(fxpeft.AdapterError) as error:
            fxpeft.hotswap(model, source, **settings)
        assert message in str(error.value)
        with pytest.raises(fxpeft.AdapterError):
            fxpeft.load_adapter(model, source, "other", **settings)
        assert fxpeft.active_adapters(model) == ["default"]
        assert torch.equal(output(model), wanted)


def test_more_active_ranks_than_a_slot_holds_are_refused(old: str, new: str) -> None:
    model = prepared(old, bias="all")
    fxpeft.load_adapter(model, new, "new")
    wanted = output(model)
    with pytest.raises(fxpeft.AdapterError, match="down_proj: 9 ranks"):
        fxpeft.set_adapter(model, ["default", "new"])
    assert torch.equal(output(model), wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_prj"]}, "nearest names: q_proj"),
        ({"methods": ("lora", "magic")}, "found magic"),
        ({"rank": "fixed"}, "'dynamic' or 'static'"),
        ({"max_rank": 1}, "at least 2"),
        ({"max_rank": 2}, "rank 3 is above max_rank 2"),
    ],
)
def test_preparing_wrongly_changes_nothing(settings: dict[str, Any], message: str, old: str) -> None:
    model = base()
    fxpeft.load_adapter(model, old)
    wanted, classes = output(model), [type(m) for m in model.modules()]
    with pytest.raises(fxpeft.AdapterError) as error:
        fxpeft.prepare_hotswap(model, **settings)
    assert message in str(error.value)
    assert torch.equal(output(model), wanted)
    assert [type(m) for m in model.modules()] == classes


def test_an_unprepared_model_says_what_to_call(old: str) -> None:
    model = base()
    fxpeft.load_adapter(model, old)
    with pytest.raises(fxpeft.AdapterError, match="call prepare_hotswap"):
        fxpeft.hotswap(model, old)
    fxpeft.prepare_hotswap(model)
    with pytest.raises(fxpeft.AdapterError, match="prepared already"):
        fxpeft.prepare_hotswap(model)


def test_slots_are_in_no_state_dict(old: str, tmp_path: Path) -> None:
    model = prepared(old)
    assert list(model.state_dict()) == list(base().state_dict())
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "base")
    assert load_file(tmp_path / "base" / "model.safetensors").keys() == base().state_dict().keys()


def test_release_and_remove_give_back_what_was(old: str) -> None:
    model = base()
    fxpeft.load_adapter(model, old, trainable=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    wanted = output(model)
    fxpeft.prepare_hotswap(model, 8, modules_to_save=["lm_head"], bias="all")
    fxpeft.release_hotswap(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert trained
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=0)
    fxpeft.prepare_hotswap(model, 8, modules_to_save=["lm_head"], bias="all")
    fxpeft.remove(model)
    bare = base()
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), bare.state_dict().values(), strict=True))
    assert torch.equal(output(model), output(bare))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("way", ["deepcopy", "torch.save", "pickle"])
def test_copies_swap_on_their_own(way: str, old: str, new: str) -> None:
    model = prepared(old)
    wanted = output(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    fxpeft.hotswap(other, new)
    assert_close(output(other), fresh(new))
    assert torch.equal(output(model), wanted)


def test_dtype_changes_reach_the_slots_but_not_the_scales(old: str, new: str) -> None:
    model = prepared(old).to(torch.bfloat16)
    slot = model.model.layers[0].self_attn.q_proj.slot
    assert (slot.a.dtype, slot.b.dtype, slot.d.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    fxpeft.hotswap(model, new)
    reference = base()
    fxpeft.load_adapter(reference, new)
    torch.testing.assert_close(output(model).float(), output(reference), rtol=0, atol=0.3)
    assert (output(model).float() - output(reference)).abs().mean() < 0.03
