"""``enable_peft_hotswap`` and ``load_adapter(hotswap=...)``: swapped is freshly loaded, and nothing recompiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import save_each
from closeness import assert_close
from safetensors.torch import load_file, save_file
from tiny import logits, randomise, tiny_llama, token_ids
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fxpeft
import fxpeft.adapters.installing
from fxpeft.integrations.transformers.model_state import is_prepared

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# other ranks, scales, patterns, more and fewer targets; the first is the one that is loaded before compiling
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]},
    "rank": {"r": 7, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]},
    "alpha": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "one": {"r": 1, "lora_alpha": 2, "target_modules": ["down_proj"]},
    "patterns": {
        "r": 3, "lora_alpha": 6, "target_modules": ALL, "rank_pattern": {"q_proj": 8, r"layers\.1\..*\.o_proj": 1},
        "alpha_pattern": {"up_proj": 1},
    },
    "rslora": {"r": 5, "lora_alpha": 4, "target_modules": ["gate_proj"], "use_rslora": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each adapter with random values, saved; ``half`` is ``patterns`` stored in bfloat16."""
    configs = {name: fxpeft.LoraConfig(**config) for name, config in ADAPTERS.items()}
    made = save_each(tiny_llama, configs, tmp_path_factory.mktemp("adapters"))
    half = tmp_path_factory.mktemp("half")
    (half / "adapter_config.json").write_text((Path(made["patterns"]) / "adapter_config.json").read_text())
    stored = load_file(Path(made["patterns"]) / "adapter_model.safetensors")
    save_file({key: value.bfloat16() for key, value in stored.items()}, half / "adapter_model.safetensors")
    return {**made, "half": str(half)}


def fresh(folder: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the adapter gives when it is loaded into a model of its own, without slots."""
    model = tiny_llama(dtype)
    model.load_adapter(folder)
    assert not is_prepared(model)
    return logits(model)


def test_plain_hotswap_needs_no_preparation(folders: dict[str, str]) -> None:
    model = tiny_llama()
    model.load_adapter(folders["first"])
    for name in ("alpha", "patterns", "one", "first", "rank"):
        info = model.load_adapter(folders[name], adapter_name="default", hotswap=True)
        assert info.missing_keys == info.unexpected_keys == set()
        assert_close(logits(model), fresh(folders[name]), message=str(name))
        assert model.peft_config["default"].r == ADAPTERS[name]["r"]
    assert model.active_adapters() == ["default"]
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_plain_hotswap_of_the_same_shapes_recompiles_nothing(folders: dict[str, str]) -> None:
    model = tiny_llama()
    model.load_adapter(folders["first"])
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits(compiled)
        for name in ("alpha", "first", "alpha"):
            model.load_adapter(folders[name], "default", hotswap=True)
            assert_close(logits(compiled), fresh(folders[name]))
    assert counter.frame_count == 1


def test_plain_hotswap_of_another_shape_does_recompile(folders: dict[str, str]) -> None:
    # the test above can fail: without enable_peft_hotswap another rank is another graph
    model = tiny_llama()
    model.load_adapter(folders["first"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits(compiled)
        model.load_adapter(folders["rank"], "default", hotswap=True)
        with pytest.raises(torch._dynamo.exc.RecompileError):
            logits(compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enabled_hotswap_recompiles_nothing(folders: dict[str, str], dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    bare = logits(model)
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(folders["first"], adapter_name="default")
    counter = CompileCounterWithBackend("inductor" if dtype is torch.float32 else "aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    tolerance = 1e-4 if dtype is torch.float32 else 0.06
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits(compiled)
        for name in ("first", *folders, "first"):
            model.load_adapter(folders[name], adapter_name="default")  # hotswap="auto"
            out = logits(compiled)
            assert torch.allclose(out, fresh(folders[name], dtype), atol=tolerance), name
            assert not torch.allclose(out, bare, atol=3 * tolerance), name
        source = tiny_llama()
        source.load_adapter(folders["patterns"])
        tensors = source.get_adapter_state_dict()
        model.load_adapter(
            adapter_state_dict=tensors, peft_config=source.peft_config["default"], adapter_name="default", hotswap=True
        )
        assert torch.allclose(logits(compiled), fresh(folders["patterns"], dtype), atol=tolerance)
        model.disable_adapters()
        assert torch.allclose(logits(compiled), bare, atol=tolerance)
        model.enable_adapters()
        model.load_adapter(folders["one"], adapter_name="second")
        model.set_adapter("default")
        assert torch.allclose(logits(compiled), fresh(folders["patterns"], dtype), atol=tolerance)
        model.set_adapter("second")
        assert torch.allclose(logits(compiled), fresh(folders["one"], dtype), atol=tolerance)
    assert counter.frame_count == 1


def test_a_swap_that_does_not_fit_changes_nothing(folders: dict[str, str]) -> None:
    model = tiny_llama()
    model.enable_peft_hotswap(target_rank=6)
    model.load_adapter(folders["first"], adapter_name="default")
    before = logits(model)
    with pytest.raises(fxpeft.AdapterError, match="is above max_rank 6"):
        model.load_adapter(folders["rank"], adapter_name="default")
    broken = {k: v[:1] if "lora_A" in k else v for k, v in model.get_adapter_state_dict().items()}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model.load_adapter(adapter_state_dict=broken, peft_config=model.peft_config["default"], adapter_name="default")
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"].r == 4


def test_a_first_adapter_that_does_not_fit_leaves_the_bare_model(folders: dict[str, str]) -> None:
    model = tiny_llama()
    model.enable_peft_hotswap(target_rank=2)
    with pytest.raises(fxpeft.AdapterError, match="is above max_rank 2"):
        model.load_adapter(folders["first"])
    assert not hasattr(model, "peft_config")
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny_llama().modules()]


def test_plain_exchange_that_fails_keeps_the_old_adapter(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    model.load_adapter(folders["first"])
    before = logits(model)
    rebind, calls = fxpeft.adapters.installing.rebind, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("no memory")
        rebind(*args)

    monkeypatch.setattr(fxpeft.adapters.installing, "rebind", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        model.load_adapter(folders["patterns"], "default", hotswap=True)
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"].r == 4
    assert len(model.get_adapter_state_dict()) == 8


def test_first_adapter_brings_its_own_places(folders: dict[str, str], tmp_path: Path) -> None:
    """Slots are at all linear modules, and wherever else the first adapter is."""
    source = tiny_llama()
    config = fxpeft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"], lora_bias=False
    )
    source.add_adapter(config)
    randomise(source.get_adapter_state_dict().values(), 9)
    source.save_pretrained(tmp_path)
    model = tiny_llama()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(str(tmp_path), "default")
    assert_close(logits(model), logits(source.eval()))
    model.load_adapter(folders["patterns"], "default")
    assert_close(logits(model), fresh(folders["patterns"]))


@pytest.mark.parametrize("check", ["error", "warn", "ignore"])
@pytest.mark.parametrize("late", ["loaded", "compiled"])
def test_check_compiled(folders: dict[str, str], check: Any, late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpeft.integrations.transformers import model_methods

    warned: list[str] = []
    monkeypatch.setattr(model_methods.logger, "warning", warned.append)
    model = tiny_llama()
    if late == "loaded":
        model.load_adapter(folders["first"])
    else:
        model.compile(backend="eager")
    if check == "error":
        with pytest.raises(RuntimeError, match="Call `enable_peft_hotswap` before"):
            model.enable_peft_hotswap(8, check_compiled=check)
        assert not getattr(model, "_hotswap_enabled", False)
        return
    model.enable_peft_hotswap(8, check_compiled=check)
    assert len(warned) == (1 if check == "warn" else 0)
    if late == "compiled":
        model.load_adapter(folders["first"])
    assert_close(logits(model), fresh(folders["first"]))
    model.load_adapter(folders["patterns"], "default")
    assert_close(logits(model), fresh(folders["patterns"]))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="check_compiled should be"):
        tiny_llama().enable_peft_hotswap(check_compiled="maybe")
    with pytest.raises(fxpeft.AdapterError, match="target_rank: expected a positive integer, found 0"):
        tiny_llama().enable_peft_hotswap(target_rank=0)


def test_without_the_call_auto_is_off(folders: dict[str, str]) -> None:
    model = tiny_llama()
    model.load_adapter(folders["first"], "default")
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(folders["rank"], "default")
    model.enable_peft_hotswap(8, check_compiled="ignore")
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(folders["rank"], "default", hotswap=False)


def test_training_takes_the_slots_out(folders: dict[str, str]) -> None:
    model = tiny_llama()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(folders["first"], "default")
    assert is_prepared(model)
    model.load_adapter(folders["patterns"], "trained", is_trainable=True)
    assert not is_prepared(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad and ".adapters.trained." in n]
    model(token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.set_adapter("default")
    assert_close(logits(model), fresh(folders["first"]))
    model.load_adapter(folders["one"], "default")  # frozen again: slots again
    assert is_prepared(model)
    assert_close(logits(model), fresh(folders["one"]))


def test_swapping_in_an_adapter_to_train(folders: dict[str, str]) -> None:
    model = tiny_llama()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(folders["first"], "default")
    model.load_adapter(folders["patterns"], "default", is_trainable=True)
    assert not is_prepared(model)
    assert sum(p.requires_grad for p in model.parameters()) == 28
    assert_close(logits(model.eval()), fresh(folders["patterns"]))


def test_setting_an_adapter_keeps_the_slots(folders: dict[str, str]) -> None:
    # adapters of one config share a plan, so what set_adapter does to one must not reach the next that is loaded
    model = tiny_llama()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(folders["first"], "a")
    model.load_adapter(folders["first"], "b")
    model.set_adapter("a")
    model.load_adapter(folders["first"], "b")
    model.load_adapter(folders["first"], "c")
    assert is_prepared(model)
    assert model.active_adapters() == ["c"]


def test_a_first_frozen_adapter_that_does_not_fit_keeps_the_trained_one(folders: dict[str, str]) -> None:
    model = tiny_llama()
    model.enable_peft_hotswap(target_rank=4)
    model.add_adapter(fxpeft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "trained")
    before = logits(model.eval())
    with pytest.raises(fxpeft.AdapterError, match="is above max_rank 4"):
        model.load_adapter(folders["rank"], "loaded")
    assert model.active_adapters() == ["trained"]
    assert torch.equal(logits(model), before)


def test_slots_are_saved_as_the_adapter(folders: dict[str, str], tmp_path: Path) -> None:
    model = tiny_llama()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(folders["patterns"], "default")
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    mine, theirs = (load_file(Path(f) / "adapter_model.safetensors") for f in (tmp_path, folders["patterns"]))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
