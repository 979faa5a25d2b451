"""Adapters on models that two processes hold in parts: saved whole, refused where they would get out of step."""

from __future__ import annotations

import importlib
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from closeness import is_close
from safetensors.torch import load_file
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from two_processes import in_two_processes

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.serving import swap

# adapted embeddings take the base's weight along into the file
CONFIG: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "embed_tokens"],
                          "modules_to_save": ["lm_head"], "rank_pattern": {"embed_tokens": 2}}  # fmt: skip


EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
HALVES = find_spec("bitsandbytes") is not None


def adapted() -> Any:
    return trainable(tiny_llama())


def trainable(model: Any) -> Any:
    fxpeft.add_adapter(model.train(), LoraConfig(**CONFIG))
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
    except (AdapterError, OSError, ZeroDivisionError) as error:
        return str(error)
    return ""


def rows(rank: int | None = None) -> Tensor:
    """A batch of four; of a process its half."""
    ids = token_ids(4)
    return ids if rank is None else ids[2 * rank : 2 * rank + 2]


def losses(model: Any, ids: Tensor, steps: int = 3) -> list[Tensor]:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(steps):
        loss = model(ids).logits.square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.detach())
    return found


def in_half_the_bits() -> Any:
    """A base that bitsandbytes holds in 4 bits, with a LoRA, beside a module that is trained whole."""
    model = tiny_llama()
    bits = importlib.import_module("bitsandbytes").nn
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            new = bits.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4",
                                  compute_dtype=torch.float32)  # fmt: skip
            new.weight = bits.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
            model.model.layers.set_submodule(name, new.to("cpu"))
            assert new.weight.dtype == torch.uint8
    return trainable(model)


def data_parallel(rank: int, said: dict[str, Any]) -> None:
    """Each process with its half of the batch, under DDP."""
    made = {"plain": adapted, "nf4": in_half_the_bits} if HALVES else {"plain": adapted}
    for name, make in made.items():
        model = make()
        each = losses(DistributedDataParallel(model), rows(rank))
        for loss in each:
            dist.all_reduce(loss)
        said[f"ddp {name}"] = [loss.item() / 2 for loss in each]
        said[f"ddp {name} state"] = {k: v.clone() for k, v in fxpeft.adapter_state_dict(model).items()}


def together(rank: int, folder: Path, said: dict[str, Any]) -> None:
    """What one process fails to do, no other does."""
    ids, served = token_ids(), fsdp2(tiny_llama())
    other = adapted()
    randomise((p for p in other.parameters() if p.requires_grad), seed=8)
    if rank == 0:
        fxpeft.save_adapter(other, folder / "other")
        broken = folder / "broken"
        shutil.copytree(folder / "other", broken)
        (broken / "adapter_model.safetensors").write_bytes(b"no file")
    dist.barrier()
    with torch.no_grad():
        fxpeft.prepare_hotswap(served, 4, targets=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
        fxpeft.load_adapter(served, folder / "fsdp2")
        before = served(ids).logits
        for name, paths in {
            "missing": ("other", "nowhere"),
            "broken": ("broken", "other"),
            "others": ("other", "fsdp2"),
        }.items():
            said[f"swap {name}"] = message(lambda: fxpeft.hotswap(served, folder / paths[rank]))  # noqa: B023
            said[f"load {name}"] = message(lambda: fxpeft.load_adapter(served, folder / paths[rank], "second"))  # noqa: B023
            with fxpeft.installed():
                said[f"own {name}"] = message(lambda: served.load_adapter(str(folder / paths[rank]), "third"))  # noqa: B023
            said[f"kept {name}"] = torch.equal(served(ids).logits, before), fxpeft.loaded_adapters(served)
        if rank == 0:  # one breaks off amid its writes
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(swap, "show_copies", lambda *args: 1 / 0)
                said["swap torn"] = message(lambda: fxpeft.hotswap(served, folder / "other"))
        else:
            said["swap torn"] = message(lambda: fxpeft.hotswap(served, folder / "other"))
        said["kept torn"] = torch.equal(served(ids).logits, before), fxpeft.loaded_adapters(served)
        fxpeft.hotswap(served, folder / "other")
        said["swapped"] = served(ids).logits

    trained = fsdp2(adapted())
    (folder / "taken").touch() if rank == 0 else None
    said["save"] = message(lambda: fxpeft.save_adapter(trained, folder / "taken"))
    dist.barrier()
    with fxpeft.installed():
        named = folder / "taken" / "below"
        said["save_pretrained"] = message(lambda: trained.save_pretrained(named, is_main_process=rank == 0))
        trained.save_pretrained(folder / "main", is_main_process=rank == 0)
    losses(trained, ids, 1)
    options = StateDictOptions(ignore_frozen_params=True)
    dcp.save({"model": get_model_state_dict(trained, options=options)}, checkpoint_id=folder / "dcp")


def example(*arguments: str) -> str:
    """What the example prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return printed.getvalue()


def everything(rank: int, folder: Path) -> dict[str, Any]:
    """All that two processes are asked here, in one launch."""
    ids, said = token_ids(), {}
    said["examples"] = [example(), example("--shard")]
    data_parallel(rank, said)
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
    together(rank, folder, said)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["plain", pytest.param("nf4", marks=pytest.mark.skipif(not HALVES, reason="no bitsandbytes"))]
)
def test_ddp_trains_as_one_process(name: str, said: Any) -> None:
    model = adapted() if name == "plain" else in_half_the_bits()
    expected = [loss.item() for loss in losses(model, rows())]
    for each in said[1]:
        assert each[f"ddp {name}"] == pytest.approx(expected, rel=1e-5)
        for key, value in fxpeft.adapter_state_dict(model).items():
            torch.testing.assert_close(each[f"ddp {name} state"][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_swap_is_done_by_all_processes_or_by_none(said: Any) -> None:
    folder, (first, second) = said
    for verb in ("swap", "load", "own"):  # own: Transformers' method of that name
        assert "nowhere" in second[f"{verb} missing"]
        assert first[f"{verb} missing"].startswith(
            "another process failed, so nothing was changed here:\n  process 1: "
        )
        assert "nowhere" in first[f"{verb} missing"]
        assert "process 0: CheckpointError: " in second[f"{verb} broken"]
        for rank, each in enumerate((first, second)):
            assert f"process {1 - rank} read another adapter" in each[f"{verb} others"]
    assert "process 0: ZeroDivisionError" in second["swap torn"]
    model = tiny_llama()
    fxpeft.load_adapter(model, folder / "other")
    for each in (first, second):
        for name in ("missing", "broken", "others", "torn"):
            assert each[f"kept {name}"] == (True, ["default"])
        torch.testing.assert_close(each["swapped"], model(token_ids()).logits)


@pytest.mark.slow
def test_what_the_first_process_cannot_write_is_an_error_in_all(said: Any, tmp_path: Path) -> None:
    folder, (first, second) = said
    for verb in ("save", "save_pretrained"):
        assert "taken" in first[verb]
        assert second[verb].startswith("another process failed to write:\n  process 0: ")
        assert first[verb][:100] in second[verb]
    expected = plain(tmp_path, trained=False)[1]
    found = load_file(folder / "main" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_the_example_prints_the_same_in_one_process_and_in_two(said: Any) -> None:
    alone = example()
    assert "served" in alone
    assert [each["examples"] for each in said[1]] == [[alone] * 2, [""] * 2]


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_read_by_one(said: Any, tmp_path: Path) -> None:
    expected, _ = plain(tmp_path, trained=True)
    model = adapted()
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    state = {"model": get_model_state_dict(model, options=options)}
    dcp.load(state, checkpoint_id=said[0] / "dcp", no_dist=True)
    set_model_state_dict(model, state["model"], options=options)
    own = {name: p for name, p in expected.named_parameters() if p.requires_grad}
    assert state["model"].keys() == own.keys()
    assert not any(torch.equal(adapted().get_parameter(name), parameter) for name, parameter in own.items())
    for name, parameter in own.items():
        torch.testing.assert_close(model.get_parameter(name), parameter)


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
