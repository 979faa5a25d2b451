"""Adapters on models that two processes hold in parts: saved whole, refused where they would get out of step."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from closeness import is_close
from safetensors.torch import load_file
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from two_processes import in_two_processes

import fxpeft
from fxpeft import AdapterError, LoraConfig

# adapted embeddings take the base's weight along into the file
CONFIG: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "embed_tokens"],
                          "modules_to_save": ["lm_head"], "rank_pattern": {"embed_tokens": 2}}  # fmt: skip


def adapted() -> Any:
    model = tiny_llama().train()
    fxpeft.add_adapter(model, LoraConfig(**CONFIG))
    randomise((p for p in model.parameters() if p.requires_grad), seed=3)
    return model


def fsdp1(model: Any) -> Any:
    def blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or isinstance(module, LlamaDecoderLayer)

    return FSDP(model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=blocks)


def fsdp2(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def message(action: Callable[[], Any]) -> str:
    """What an action's error says; empty: none."""
    try:
        action()
    except AdapterError as error:
        return str(error)
    return ""


def everything(rank: int, folder: Path) -> dict[str, Any]:
    """All that two processes are asked here, in one launch."""
    ids, said = token_ids(), {}
    for name, shard in {"fsdp1": fsdp1, "fsdp2": fsdp2}.items():
        model = adapted()
        wrapped = shard(model)
        for when in ("", " trained"):
            fxpeft.save_adapter(wrapped, folder / f"{name}{when}")
            held = fxpeft.adapter_state_dict(wrapped)
            said[f"{name}{when} state"] = {key: value.shape for key, value in held.items()}
            wrapped(ids).logits.square().mean().backward()
            torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5).step()
        said[f"{name} add"] = message(lambda: fxpeft.add_adapter(wrapped, LoraConfig(**CONFIG), "late"))  # noqa: B023
        said[f"{name} prepare"] = message(lambda: fxpeft.prepare_hotswap(wrapped, 8))  # noqa: B023
        said[f"{name} loaded"] = fxpeft.loaded_adapters(wrapped)
        if name == "fsdp1":
            # whose root is out of sight
            said["inside"] = message(lambda: fxpeft.save_adapter(model, folder / "inside"))  # noqa: B023
            said["inside wrote"] = (folder / "inside").exists()

    late = fsdp2(tiny_llama())
    names = [name for name, _ in late.named_parameters()]
    said["add"] = message(lambda: fxpeft.add_adapter(late, LoraConfig(**CONFIG)))
    said["untouched"] = names == [name for name, _ in late.named_parameters()] and not hasattr(late, "_fxpeft")
    said["load"] = message(lambda: fxpeft.load_adapter(late, folder / "fsdp2", trainable=True))
    with torch.no_grad():
        fxpeft.load_adapter(late, folder / "fsdp2")  # only to run it
        said["logits"] = late(ids).logits
        said["train"] = message(lambda: fxpeft.set_requires_grad(late, "default"))
        fxpeft.remove(late)
        fxpeft.prepare_hotswap(late, 8, targets=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
        fxpeft.load_adapter(late, folder / "fsdp2")
        said["slots"] = late(ids).logits
        with fxpeft.disabled(late):
            said["bare"] = late(ids).logits
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, in_two_processes(everything, folder, folder)


def plain(folder: Path, *, trained: bool) -> tuple[Any, dict[str, Tensor]]:
    """The same model in one process, and what it saves."""
    model = adapted()
    if trained:
        model(token_ids()).logits.square().mean().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    fxpeft.save_adapter(model, folder)
    return model, load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_a_sharded_adapter_is_saved_whole(name: str, trained: bool, said: Any, tmp_path: Path) -> None:
    folder, per_process = said
    place = folder / f"{name}{' trained' if trained else ''}"
    model, expected = plain(tmp_path, trained=trained)
    found = load_file(place / "adapter_model.safetensors")
    assert len(expected) == 8
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    states = [each[f"{name}{' trained' if trained else ''} state"] for each in per_process]
    assert states[0] == states[1] == {k: v.shape for k, v in fxpeft.adapter_state_dict(model).items()}
    peft = importlib.import_module("peft")  # not at the top: the two processes import this file
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(place))
    assert is_close(theirs(token_ids()).logits, model.eval()(token_ids()).logits)


@pytest.mark.slow
def test_what_is_out_of_reach_is_refused_before_anything_is_written(said: Any) -> None:
    for each in said[1]:
        assert "lm_head: weight: expected [40, 32], found [" in each["inside"]
        assert not each["inside wrote"]


@pytest.mark.slow
def test_what_comes_after_sharding_is_not_trained(said: Any, tmp_path: Path) -> None:
    model = plain(tmp_path, trained=False)[0].eval()
    expected, bare = model(token_ids()).logits, tiny_llama()(token_ids()).logits
    for each in said[1]:
        for what in ("add", "load", "train", "fsdp2 add"):
            assert "can't be trained in modules that FSDP or ZeRO-3 has parted" in each[what], what
            assert "\n  model.embed_tokens\n" in each[what]
        assert "FSDP1 or ZeRO-3 keeps a part of its weight here, of shape [" in each["fsdp1 add"]
        assert each["untouched"]
        for name in ("fsdp1", "fsdp2"):
            assert "slots are whole: save_adapter it" in each[f"{name} prepare"]
            assert each[f"{name} loaded"] == ["default"]
        torch.testing.assert_close(each["logits"], expected)
        torch.testing.assert_close(each["slots"], expected)
        torch.testing.assert_close(each["bare"], bare)


def test_zero_3_gathers_the_parameters_that_it_has_parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's two means: ``ds_status`` on a parameter, and ``GatheredParameters``."""
    expected = plain(tmp_path / "plain", trained=False)[1]
    model = adapted()
    whole: dict[int, Tensor] = {}
    for parameter in model.parameters():
        whole[id(parameter)] = parameter.data
        parameter.data, parameter.ds_status = torch.empty(0), "NOT_AVAILABLE"

    @contextmanager
    def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
        for parameter in parameters:
            parameter.data = whole[id(parameter)]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    fxpeft.save_adapter(model, tmp_path / "zero")
    found = load_file(tmp_path / "zero" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
