"""``target_parameters`` that ``torch.nn.utils.parametrize`` computes: the update comes on top of it, as in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import randomise
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import fxpeft
from fxpeft import AdapterError, LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


class Half(nn.Module):
    """A parametrization that keeps the shape."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x.tanh()


class Experts(nn.Module):
    """A stack of matrices, computed, and a plain one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 7, 5))
        self.down = nn.Parameter(torch.randn(4, 7))
        parametrize.register_parametrization(self, "up", Half())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.up).tanh().sum(1) @ self.down.t()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = parametrize.register_parametrization(nn.Linear(6, 5), "weight", Half())
        self.experts = Experts()
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(self.first(x).tanh()))


CONFIG: dict[str, Any] = {
    "r": 3, "lora_alpha": 7, "target_modules": ["last"], "rank_pattern": {"last": 2},
    "target_parameters": ["first.weight", "experts.up", "experts.down"],
}  # fmt: skip


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def adapted(seed: int = 0, **changes: Any) -> Net:
    model = net()
    fxpeft.add_adapter(model, LoraConfig(**{**CONFIG, **changes}))
    randomise(fxpeft.adapter_state_dict(model).values(), seed)
    return model


X = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))


def test_outputs_gradients_and_files_are_pefts(tmp_path: Path) -> None:
    peer: Any = peft.get_peft_model(net(), peft.LoraConfig(**CONFIG)).eval()
    randomise((p for n, p in peer.named_parameters() if "lora_" in n), seed=2)
    peer.save_pretrained(tmp_path / "peft")
    model = net()
    fxpeft.load_adapter(model, tmp_path / "peft", trainable=True)
    found, wanted = model(X), peer(X)
    assert_close(found, wanted, terms=1)
    assert (found - net()(X)).abs().max() > 0.1
    found.square().mean().backward()
    wanted.square().mean().backward()
    own, theirs = ({p.shape: p.grad for p in m.parameters() if p.grad is not None} for m in (model, peer))
    assert own.keys() == theirs.keys()
    assert len(own) > 4
    for shape, gradient in own.items():
        assert_close(gradient, theirs[shape])
    fxpeft.save_adapter(model, tmp_path / "fxpeft")
    again = peft.PeftModel.from_pretrained(net(), str(tmp_path / "fxpeft")).eval()
    with torch.no_grad():
        assert_close(again(X), found.detach(), terms=1)


def test_a_weight_that_is_computed_from_several() -> None:
    """PEFT adds the adapter, and its forward raises AttributeError."""
    torch.manual_seed(0)
    model, bare = (nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.Linear(5, 4)) for _ in range(2))
    bare.load_state_dict(model.state_dict())
    fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=7, target_modules=[], target_parameters=["0.weight"]))
    randomise(fxpeft.adapter_state_dict(model).values())
    a, b = fxpeft.adapter_state_dict(model).values()
    with torch.no_grad():
        wanted = bare[1](bare[0](X) + X @ (7 / 3 * b @ a).t())
        assert_close(model(X), wanted, terms=1)
    assert (wanted - bare(X)).abs().max() > 0.1


def test_a_name_in_part_meets_no_parametrized_parameter_as_in_peft() -> None:
    model = net()
    with pytest.raises(AdapterError, match=r"need their whole names:\n  first.weight\n  experts.up"):
        fxpeft.add_adapter(model, LoraConfig(target_modules=[], target_parameters=["up"]))
    peer = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["last"], target_parameters=["up"]))
    assert not any("first" in n or "experts" in n for n, _ in peer.named_parameters() if "lora" in n)
    fxpeft.add_adapter(model, LoraConfig(target_modules=[], target_parameters="in=5 & experts.up"))
    assert fxpeft.adapter_config(model).target_parameters == ["experts.up"]


@pytest.mark.slow
@torch.no_grad()
def test_compiled_slots_swap_and_leave_nothing(tmp_path: Path) -> None:
    nets = [adapted(), adapted(1, r=5, lora_alpha=2)]
    served = net()
    before = copy.deepcopy(served.state_dict())
    classes = [type(m) for m in served.modules()]
    parameters = CONFIG["target_parameters"]
    fxpeft.prepare_hotswap(served, 8, targets=["last"], target_parameters=parameters)
    for i, each in enumerate(nets):
        fxpeft.save_adapter(each, tmp_path / str(i))
        fxpeft.load_adapter(served, tmp_path / str(i), f"a{i}")
    torch._dynamo.reset()
    compiled = torch.compile(served)
    compiled(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in (0, 1, 0):
            fxpeft.set_adapter(served, f"a{i}")
            assert_close(compiled(X), nets[i](X))
        fxpeft.disable_adapters(served)
        assert_close(compiled(X), net()(X), terms=1)
    fxpeft.remove(served)
    assert [type(m) for m in served.modules()] == classes
    assert served.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in served.state_dict().items())


def test_a_copy_and_a_fold() -> None:
    model = adapted()
    with torch.no_grad():
        assert_close(copy.deepcopy(model)(X), model(X), terms=0)
        before = model(X)
        with pytest.raises(AdapterError, match="not stored but computed when it is read"):
            fxpeft.fold(model)
        assert_close(model(X), before, terms=0)
