"""Adapters on models whose weights tensor parallelism has parted between two processes, beside one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM
from two_processes import in_two_processes

import fxpeft
from fxpeft import FxpeftError, LoraConfig

# q, k and v: rows; o and down: columns; lm_head: rows, whose outputs are gathered
LLAMA: dict[str, Any] = {
    "r": 3, "lora_alpha": 7, "rank_pattern": {"o_proj": 2}, "init_lora_weights": False,
    "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"],
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"}, "bias": {"bias": "lora_only"},
}  # fmt: skip


class Net(nn.Module):
    """Rows, then columns, then a module that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.down(torch.tanh(self.up(x))))
        return y


def parted(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def x_of() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(2))


def trained(model: Any, x: Tensor, call: Any = None) -> tuple[list[float], Tensor | None]:
    """Losses, and the input's gradient where it has one.

    Args:
        call: how the model is called, where not by itself.
    """
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, foreach=False)
    losses = []
    for _ in range(3):
        output = (model if call is None else call)(x)
        loss = getattr(output, "logits", output).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
        optimiser.zero_grad()
    return losses, x.grad


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in fxpeft.adapter_state_dict(model).items()}


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except FxpeftError as error:
        return str(error)
    return ""


def everything(rank: int, folder: Path) -> dict[str, Any]:
    """All that two processes are asked here, in one launch."""
    said: dict[str, Any] = {}
    net = parted(Net())
    said["refused"] = {
        name: message(lambda own=own: fxpeft.add_adapter(net, LoraConfig(target_modules="all-linear", **own)))
        for name, own in REFUSED.items()
    }
    ia3 = fxpeft.IA3Config(target_modules="all-linear", feedforward_modules=[])
    said["refused"]["ia3"] = message(lambda: fxpeft.add_adapter(net, ia3))
    said["refused"]["saved"] = message(
        lambda: fxpeft.add_adapter(net, LoraConfig(target_modules=["head"], modules_to_save=["up"]))
    )
    for name, given in {"gains": {"methods": ("lora", "ia3")}, "lanes": {"lanes": 2}}.items():
        said["refused"][name] = message(lambda given=given: fxpeft.prepare_hotswap(net, 4, **given))
    said["untouched"] = not hasattr(net, "_fxpeft")
    torch.manual_seed(5 + rank)  # each draws other first values
    config = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
    fxpeft.add_adapter(net, config)
    said["first"] = state(net)
    said["held"] = {name: list(getattr(p, "_local_tensor", p).shape) for name, p in net.named_parameters()}
    said["losses"], said["gradient"] = trained(net, x_of().requires_grad_())
    said["last"] = state(net)
    fxpeft.save_adapter(net, folder / "net")
    said["fold"] = message(lambda: fxpeft.fold(net))
    said["prepare"] = message(lambda: fxpeft.prepare_hotswap(net, 4))
    said["kept"] = all(torch.equal(value, said["last"][key]) for key, value in state(net).items())

    def again(mesh: Any) -> nn.Module:
        other = parallelize_module(Net(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fxpeft.add_adapter(other, config)
        fxpeft.load_adapter_state_dict(other, said["first"])
        return other

    net = again(init_device_mesh("cpu", (2,)))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    said["other losses"] = [trained(net, x_of().requires_grad_(), compiled)[0]]
    for shape in ((1, 2), (2, 1)):  # beside FSDP2
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        net = again(mesh["tensor"])
        fully_shard(net, mesh=mesh["data"])
        said["other losses"].append(trained(net, x_of())[0])
        fxpeft.save_adapter(net, folder / f"{shape[0]} by {shape[1]}")

    odd = nn.Sequential(nn.Linear(6, 9))
    parallelize_module(odd, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    said["refused"]["odd"] = message(lambda: fxpeft.add_adapter(odd, LoraConfig(target_modules=["0"])))

    late = Net()
    fxpeft.add_adapter(late, config)
    said["late"] = message(lambda: parted(late))

    served = parted(Net())
    fxpeft.prepare_hotswap(served, 4)
    fxpeft.load_adapter(served, folder / "net")
    x = x_of().requires_grad_()
    said["served"] = served(x)
    said["served"].square().mean().backward()
    said["served"], said["served gradient"] = said["served"].detach(), x.grad
    with torch.no_grad():
        fxpeft.hotswap(served, {key: 2 * value for key, value in said["first"].items()})
        said["swapped"] = served(x_of())
        with fxpeft.disabled(served):
            said["bare"] = served(x_of())

    llama = LlamaForCausalLM.from_pretrained(folder / "base", tp_plan="auto").train()
    fxpeft.load_adapter(llama, folder / "llama", trainable=True)
    said["llama losses"], _ = trained(llama, token_ids())
    fxpeft.save_adapter(llama, folder / "trained")
    with torch.no_grad():
        said["llama"] = llama.eval()(token_ids()).logits
        fxpeft.remove(llama)
        fxpeft.prepare_hotswap(llama, 4, targets=LLAMA["target_modules"])
        fxpeft.load_adapter(llama, folder / "trained")
        said["llama served"] = llama(token_ids()).logits
        fxpeft.remove(llama)
        said["llama bare"] = llama(token_ids()).logits
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    base = tiny_llama()
    base.save_pretrained(folder / "base")
    fxpeft.add_adapter(base, LoraConfig(**LLAMA))
    randomise((p for p in base.parameters() if p.requires_grad), seed=3)
    fxpeft.save_adapter(base, folder / "llama")
    return folder, in_two_processes(everything, folder, folder)


def one_process(values: dict[str, Tensor]) -> nn.Module:
    net = Net()
    fxpeft.add_adapter(net, LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"))
    fxpeft.load_adapter_state_dict(net, values)
    return net


@pytest.mark.slow
def test_an_adapter_is_parted_with_its_module_and_trains_as_in_one_process(said: Any) -> None:
    folder, per_process = said
    net = one_process(per_process[0]["first"])
    losses, gradient = trained(net, x_of().requires_grad_())
    saved = load_file(folder / "net" / "adapter_model.safetensors")
    for each in per_process:
        shapes = {name.replace("adapters.default.", ""): shape for name, shape in each["held"].items()}
        assert [shapes["up.lora_A"], shapes["up.lora_B"]] == [[3, 6], [5, 3]]
        assert [shapes["down.lora_A"], shapes["down.lora_B"]] == [[3, 5], [4, 3]]
        assert [shapes["head.lora_A"], shapes["head.lora_B"]] == [[3, 4], [3, 3]]
        assert all(torch.equal(each["first"][key], value) for key, value in per_process[0]["first"].items())
        assert each["losses"] == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(each["gradient"], gradient)
        assert each["last"].keys() == saved.keys() == fxpeft.adapter_state_dict(net).keys()
        for key, value in fxpeft.adapter_state_dict(net).items():
            torch.testing.assert_close(each["last"][key], value.detach(), rtol=1e-4, atol=1e-5)
            assert torch.equal(each["last"][key], saved[key])


@pytest.mark.slow
def test_compiled_and_beside_fsdp2_it_trains_as_in_one_process(said: Any) -> None:
    folder, per_process = said
    net = one_process(per_process[0]["first"])
    losses, _ = trained(net, x_of())
    for each in per_process:
        for other in each["other losses"]:
            assert other == pytest.approx(losses, rel=1e-5)
    for place in ("1 by 2", "2 by 1"):
        saved = load_file(folder / place / "adapter_model.safetensors")
        assert saved.keys() == fxpeft.adapter_state_dict(net).keys()
        for key, value in fxpeft.adapter_state_dict(net).items():
            torch.testing.assert_close(saved[key], value.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_slots_of_parted_modules_serve_what_one_process_serves(said: Any) -> None:
    for each in said[1]:
        net = one_process(each["last"])
        x = x_of().requires_grad_()
        y = net(x)
        y.square().mean().backward()
        torch.testing.assert_close(each["served"], y.detach())
        torch.testing.assert_close(each["served gradient"], x.grad)
        fxpeft.load_adapter_state_dict(net, {key: 2 * value for key, value in each["first"].items()})
        torch.testing.assert_close(each["swapped"], net(x_of()).detach())
        torch.testing.assert_close(each["bare"], Net()(x_of()).detach())


@pytest.mark.slow
def test_tp_plan_auto_trains_saves_and_serves(said: Any, tmp_path: Path) -> None:
    folder, per_process = said
    model = tiny_llama().train()
    fxpeft.load_adapter(model, folder / "llama", trainable=True)
    losses, _ = trained(model, token_ids())
    wanted = model.eval()(token_ids()).logits.detach()
    fxpeft.save_adapter(model, tmp_path)
    files = [load_file(place / "adapter_model.safetensors") for place in (tmp_path, folder / "trained")]
    assert files[0].keys() == files[1].keys()
    assert "base_model.model.lm_head.base_layer.weight" in files[0]  # as PEFT saves it
    for key, value in files[0].items():
        torch.testing.assert_close(files[1][key], value, rtol=1e-4, atol=1e-4)
    for each in per_process:
        assert each["llama losses"] == pytest.approx(losses, rel=1e-4)
        for name, logits in (("llama", wanted), ("llama served", wanted), ("llama bare", None)):
            expected = tiny_llama()(token_ids()).logits if logits is None else logits
            torch.testing.assert_close(each[name], expected, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
def test_what_cannot_be_parted_is_refused_before_anything_is_changed(said: Any) -> None:
    for each in said[1]:
        assert each["untouched"]
        for name, text in each["refused"].items():
            assert "tensor parallelism has parted" in text, name
        assert (
            "up: tensor parallelism has parted its weight and bias, and lora_dropout=0.1" in each["refused"]["dropout"]
        )
        for method in ("dora", "ia3"):
            assert f"{method} can't be parted with it" in each["refused"][method]
        assert "[9, 6], doesn't fall into 2 equal parts" in each["refused"]["odd"]
        assert "up: Linear.weight is here in part: fold into a model that one process holds" in each["fold"]
        assert "slots are whole: save_adapter it" in each["prepare"]
        assert each["kept"]
        assert "modules_to_save can't have a copy of it" in each["refused"]["saved"]
        assert "would part its weight, and not the adapter that it has: part the model first" in each["late"]
