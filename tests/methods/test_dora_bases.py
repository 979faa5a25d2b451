"""DoRA reads its target's weight where the forward is called as a leaf, and where accelerate has put it away."""

from __future__ import annotations

import types
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from closeness import assert_close
from tiny import randomise, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft
from fxpeft import LoraConfig

MODES = {
    "line": lambda: nn.Conv1d(4, 5, 3, padding=1, padding_mode="circular"),
    "plane": lambda: nn.Conv2d(4, 5, (3, 2), padding=(2, 1), padding_mode="reflect", stride=2),
    "space": lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate", bias=False),
}
INPUTS = {"line": (3, 4, 7), "plane": (3, 4, 6, 7), "space": (2, 2, 4, 3, 5)}
CONFIG = {"r": 3, "lora_alpha": 5, "target_modules": ["0"], "use_dora": True}


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(MODES[kind]()).eval()


def randomised(model: nn.Module) -> nn.Module:
    tensors = fxpeft.adapter_state_dict(model)
    randomise(tensors.values())
    with torch.no_grad():
        for key, value in tensors.items():
            if "magnitude" in key:
                value.add_(1)
    return model


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    return found


@pytest.mark.parametrize("kind", MODES)
def test_a_padding_mode(kind: str, tmp_path: Path) -> None:
    model, x = net(kind), torch.randn(INPUTS[kind])
    fxpeft.add_adapter(model, LoraConfig(**CONFIG))
    assert_close(output(model, x), output(net(kind), x))  # fresh, it changes nothing
    randomised(model)
    fxpeft.save_adapter(model, tmp_path)
    peer = peft.PeftModel.from_pretrained(net(kind), str(tmp_path), is_trainable=True).eval()
    wanted = peer(x)
    assert (wanted - output(net(kind), x)).abs().max() > 0.05
    wanted.square().sum().backward()
    found = model(x)
    found.square().sum().backward()
    assert_close(found, wanted)
    theirs = {n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if p.grad is not None}
    ours = {p.data_ptr(): p.grad for p in model.parameters()}
    for key, value in fxpeft.adapter_state_dict(model).items():
        grad = ours[value.data_ptr()]
        assert grad is not None
        assert_close(grad, theirs.get(key, theirs.get(f"{key}.weight")))
    fxpeft.prepare_hotswap(model, 4, methods=("lora", "dora"))
    assert_close(output(model, x), wanted.detach())
    fxpeft.disable_adapters(model)
    assert torch.equal(output(model, x), output(net(kind), x))
    fxpeft.remove(model)
    assert type(model[0]) is type(net(kind)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_forward_that_was_replaced_on_the_instance(dropout: float, tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5)).eval()
        plain = model[0].forward
        model[0].forward = types.MethodType(lambda self, input: plain(input), model[0])
        return model

    model, x = randomised_dora(build(), dropout), torch.randn(3, 6)
    fxpeft.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    peer = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 5)), str(tmp_path)).eval()
    assert_close(output(model, x), output(peer, x))
    if dropout:
        assert not torch.allclose(output(model.train(), x), output(peer, x), rtol=0, atol=1e-3)


def randomised_dora(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    fxpeft.add_adapter(model, LoraConfig(**CONFIG, lora_dropout=dropout))
    return randomised(model)


def test_an_offloaded_base(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_dora=True)
    ids = token_ids()
    whole, offloaded = tiny_llama(), accelerate.cpu_offload(tiny_llama(), execution_device="cpu")
    assert offloaded.model.layers[0].mlp.down_proj.weight.is_meta
    bare = whole(ids).logits.detach()
    for model in (whole, offloaded):
        fxpeft.add_adapter(model, config)
        assert_close(model(ids).logits.detach(), bare)
        randomised(model)
    wanted = whole(ids).logits
    assert (wanted - bare).abs().max() > 0.05
    assert_close(offloaded(ids).logits, wanted)
    for model in (whole, offloaded):
        model(ids, labels=ids).loss.backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (whole, offloaded)]
    assert grads[0].keys() == grads[1].keys() != set()
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad)
    fxpeft.save_adapter(whole, tmp_path)
    fxpeft.prepare_hotswap(offloaded, 4, methods=("lora", "dora"))
    assert_close(offloaded(ids).logits.detach(), wanted.detach())
    assert offloaded.model.layers[0].mlp.down_proj.weight.is_meta
    fxpeft.disable_adapters(offloaded)
    assert_close(offloaded(ids).logits.detach(), bare, terms=1)
    fxpeft.enable_adapters(offloaded)
    fxpeft.hotswap(offloaded, tmp_path)
    assert_close(offloaded(ids).logits.detach(), wanted.detach())


def test_an_offloaded_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    x = torch.randn(3, 6)
    randomised_dora(model)
    wanted, values = output(model, x), {k: v.clone() for k, v in fxpeft.adapter_state_dict(model).items()}
    torch.manual_seed(0)
    offloaded = accelerate.cpu_offload(nn.Sequential(nn.Linear(6, 5)).eval(), execution_device="cpu")
    assert offloaded[0].bias.is_meta
    fxpeft.prepare_hotswap(offloaded, 4, targets=["0"], methods=("dora",))
    fxpeft.add_adapter(offloaded, LoraConfig(**CONFIG))
    fxpeft.hotswap(offloaded, values)
    assert_close(output(offloaded, x), wanted)
