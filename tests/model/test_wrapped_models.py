"""DDP, FSDP1, accelerate's and compile's wrappers, nested too: taken wherever a model is, names without them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from tiny import randomise, tiny_llama, token_ids, two_linears
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel

import fxpeft
from fxpeft.model.wrappers import named_modules, plain_name, submodule, unwrap

CONFIG = {"r": 3, "lora_alpha": 7, "target_modules": ["0", "2"], "rank_pattern": {"2": 2}, "bias": "lora_only"}


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _no_accelerator() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state() if state is not AcceleratorState else state._reset_state(True)


def compiled(model: nn.Module) -> nn.Module:
    """The wrapper of ``torch.compile``; graphs run as they are."""
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": lambda m: DDP(m.requires_grad_(True)),
    "fsdp1": lambda m: FSDP(m, use_orig_params=True, device_id=torch.device("cpu")),
    "fsdp1, each linear": lambda m: FSDP(
        m, use_orig_params=True, device_id=torch.device("cpu"),
        auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, nn.Linear),
    ),
    "compile": compiled,
    "ddp of compile": lambda m: DDP(compiled(m.requires_grad_(True))),
    "compile of ddp": lambda m: compiled(DDP(m.requires_grad_(True))),
    "checkpoint": checkpoint_wrapper,
    "dataparallel": nn.DataParallel,
    "accelerate": lambda m: Accelerator(cpu=True).prepare(m),
    "accelerate, bf16": lambda m: Accelerator(cpu=True, mixed_precision="bf16").prepare(m),
    "averaged": AveragedModel,
}  # fmt: skip
EVERY = pytest.mark.parametrize("wrapper", WRAPPERS)


@EVERY
def test_an_adapter_that_was_there_before(wrapper: str, tmp_path: Path) -> None:
    model, x = two_linears(), torch.randn(2, 5)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**CONFIG), "mine")
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    fxpeft.save_adapter(model, tmp_path / "plain")
    wanted = model(x)
    wrapped = WRAPPERS[wrapper](model)
    rounding = {"rtol": 1e-2, "atol": 1e-1} if wrapper.endswith("bf16") else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(wrapped(x), wanted, **rounding)
    assert fxpeft.active_adapters(wrapped) == ["mine"]
    fxpeft.save_adapter(wrapped, tmp_path / "wrapped")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "wrapped")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    with fxpeft.disabled(wrapped):
        assert not torch.allclose(wrapped(x), wanted, atol=1e-2)
    fxpeft.set_scale(wrapped, "mine", 0.5)
    assert not torch.allclose(wrapped(x), wanted, atol=1e-3)


@pytest.mark.parametrize("wrapper", [w for w in WRAPPERS if "fsdp" not in w])  # whose parameters are one by then
def test_an_adapter_that_comes_after(wrapper: str, tmp_path: Path) -> None:
    model, x = two_linears(), torch.randn(2, 5)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**CONFIG))
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    fxpeft.save_adapter(model, tmp_path)
    wrapped = WRAPPERS[wrapper](two_linears())
    fxpeft.load_adapter(wrapped, tmp_path)
    torch.testing.assert_close(unwrap(wrapped)(x).float(), model(x), rtol=1e-2, atol=1e-1)
    assert "0" in fxpeft.plan(wrapped, fxpeft.LoraConfig(target_modules="kind:linear"), roles=False).sites[0].name
    fxpeft.prepare_hotswap(wrapped, 8)
    fxpeft.hotswap(wrapped, tmp_path)
    with fxpeft.hold(wrapped):
        wrapped(x)
    fxpeft.release_hotswap(wrapped)
    fxpeft.fold(wrapped)
    fxpeft.unfold(wrapped)
    fxpeft.remove(wrapped)
    assert [type(m) for _, m in named_modules(wrapped)] == [nn.Sequential, nn.Linear, nn.ReLU, nn.Linear]


def test_fsdp1_trains_what_an_adapter_brings_whole() -> None:
    model, x = two_linears().train(), torch.randn(2, 5)
    config = {"r": 3, "target_modules": ["0"], "bias": "lora_only", "modules_to_save": ["2"]}
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**config))
    randomise(fxpeft.adapter_state_dict(model).values(), 1)
    model(x).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wrapped = WRAPPERS["fsdp1"](model)
    wrapped(x).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {"2.adapters.default.weight", "0.adapters.default.bias"} < wanted.keys() == found.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad)


def read_past(model: Any, ids: Tensor) -> Tensor:
    """Logits of a loss that multiplies by the head's weight; FSDP gathers it for the root's call."""
    weight = model.lm_head.weight
    full = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return model.model(ids).last_hidden_state @ full.t()


@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp2"])
def test_fsdp_sees_its_own_and_a_loss_the_copy_of_a_head(wrapper: str) -> None:
    ids, found = token_ids(), {}
    for sharded in (False, True):
        model = tiny_llama()
        fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        randomise(fxpeft.adapter_state_dict(model).values(), 1)
        model.forward = MethodType(read_past, model)  # type: ignore[method-assign]
        wrapped: Any = model
        if sharded and wrapper == "fsdp1":
            wrapped = WRAPPERS["fsdp1"](model)
        elif sharded:
            mesh = init_device_mesh("cpu", (1,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        for _ in range(2):
            loss = wrapped(ids).square().mean()
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[sharded] = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    assert "lm_head.adapters.default.weight" in found[False]
    assert found[False].keys() == found[True].keys()
    for name, grad in found[False].items():
        torch.testing.assert_close(found[True][name], grad)


def test_accelerate_trains_and_saves(tmp_path: Path) -> None:
    model, x = two_linears().train(), torch.randn(2, 5)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**CONFIG))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    accelerator = Accelerator(cpu=True)
    prepared, optimiser = accelerator.prepare(model, optimiser)
    accelerator.backward(prepared(x).pow(2).sum())
    optimiser.step()
    fxpeft.save_adapter(prepared, tmp_path)
    fresh = two_linears()
    fxpeft.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), model(x))
    assert not torch.allclose(fresh(x), two_linears()(x), atol=1e-3)


def test_sharded_parameters_say_what_to_do(tmp_path: Path) -> None:
    """One process holds all of them; a shard of two is what is left of the first."""
    model = two_linears()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**CONFIG))
    part = model.get_submodule("0.adapters.default")
    part.lora_A.data = part.lora_A.data.flatten()[:8]
    with pytest.raises(fxpeft.AdapterError, match=r"(?s)0: lora_A: expected \[3, 5\], found \[8\].*summon_full_params"):
        fxpeft.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_modules_that_tensor_parallelism_has_parted_are_refused_before_anything_is_changed() -> None:
    model = two_linears()
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
    before = {name: type(module) for name, module in model.named_modules()}
    prepare = partial(fxpeft.prepare_hotswap, bias="lora_only")
    for verb in (prepare, lambda m: fxpeft.add_adapter(m, fxpeft.LoraConfig(**CONFIG))):
        with pytest.raises(fxpeft.AdapterError, match="0: tensor parallelism has parted its weight and bias"):
            verb(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, target_modules=["2"]))
    model(torch.ones(2, 5)).sum().backward()


def test_roles_of_a_wrapped_model() -> None:
    model = tiny_llama()
    wanted = fxpeft.roles(model)
    assert fxpeft.roles(compiled(DDP(model))) == wanted
    fxpeft.add_adapter(DDP(model), fxpeft.LoraConfig(target_modules="role:attention.query"))
    model(token_ids())
    assert {name.rpartition(".")[2] for name in fxpeft.adapter_config(model).target_modules} == {"q_proj"}


def test_a_child_called_module_is_no_wrapper() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 4)

    model = Own()
    assert unwrap(model) is model
    assert submodule(compiled(model), "module") is model.module
    assert plain_name("a._orig_mod.module.b") == "a.module.b"
