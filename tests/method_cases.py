"""Every kind of target and every method, with a config of both libraries: what the method table is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from adapter_files import add
from closeness import assert_close
from tiny import randomise
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fxpeft


class Net(nn.Module):
    """Two targets of one kind that read the same input."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the targets take; their outputs' sum."""
        return self.first(x).tanh() + self.second(x)


@dataclass(frozen=True)
class KindCase:
    """A layer and an input for it."""

    layer: Callable[[], nn.Module]
    input: Callable[[], Tensor]

    def net(self) -> Net:
        net = Net(self.layer).eval()
        randomise((p for n, p in net.named_parameters() if n.endswith("bias")), seed=9)
        return net


def conv1d() -> Conv1D:
    """Transformers', whose weight is [in, out]; it starts so small that what multiplies it moves nothing."""
    made = Conv1D(10, 6)
    with torch.no_grad():
        made.weight.mul_(15)
    return made


KINDS = {
    "Linear": KindCase(lambda: nn.Linear(6, 10), lambda: torch.randn(3, 6)),
    "Conv1D": KindCase(conv1d, lambda: torch.randn(3, 6)),
    "Embedding": KindCase(lambda: nn.Embedding(9, 5), lambda: torch.arange(6).view(2, 3)),
    "Conv1d": KindCase(lambda: nn.Conv1d(6, 5, 3, padding=1), lambda: torch.randn(3, 6, 7)),
    "Conv2d": KindCase(lambda: nn.Conv2d(6, 5, (2, 3), stride=(1, 2)), lambda: torch.randn(3, 6, 5, 7)),
    "Conv3d": KindCase(lambda: nn.Conv3d(4, 5, (1, 2, 2)), lambda: torch.randn(3, 4, 2, 3, 4)),
}


@dataclass(frozen=True)
class MethodCase:
    """A config of both libraries, and the kinds that PEFT has no such method for."""

    ours: type[Any]
    theirs: type[Any]
    settings: dict[str, Any]
    declared: str
    refused: tuple[str, ...] = ()  # by fxpeft too
    alone: tuple[str, ...] = ()  # PEFT lacks them
    other: dict[str, Any] | None = None  # settings of a second adapter, which it is swapped with

    def config(self, **changes: Any) -> Any:
        return self.ours(target_modules=["first", "second"], **{**self.settings, **changes})


LINEAR = ("Embedding", "Conv1d", "Conv2d", "Conv3d")  # refused by methods of linear layers
OTHER = {"r": 2, "rank_pattern": {"first": 5}}
LORA = {"r": 4, "lora_alpha": 6, "rank_pattern": {"second": 3}, "alpha_pattern": {"second": 5}}
METHODS = {
    "LoRA": MethodCase(fxpeft.LoraConfig, peft.LoraConfig, LORA, "lora"),
    "rsLoRA": MethodCase(fxpeft.LoraConfig, peft.LoraConfig, {**LORA, "use_rslora": True}, "lora"),
    "LoRA with `lora_bias`": MethodCase(
        fxpeft.LoraConfig, peft.LoraConfig, {**LORA, "lora_bias": True}, "lora_bias", refused=("Embedding",)
    ),
    "DoRA": MethodCase(fxpeft.LoraConfig, peft.LoraConfig, {**LORA, "use_dora": True}, "dora"),
    "AdaLoRA": MethodCase(
        fxpeft.AdaLoraConfig, peft.AdaLoraConfig, {"init_r": 4, "lora_alpha": 6, "total_step": 9}, "adalora",
        refused=("Embedding", "Conv1d", "Conv3d"),
    ),
    "IA3": MethodCase(
        fxpeft.IA3Config, peft.IA3Config, {"feedforward_modules": ["second"]}, "ia3", refused=("Embedding",),
        alone=("Conv1d",),
    ),
    "LoHa": MethodCase(
        fxpeft.LoHaConfig, peft.LoHaConfig, {"r": 2, "alpha": 5, "rank_pattern": {"second": 3}}, "loha",
        refused=("Embedding", "Conv3d"), alone=("Conv1D",), other=OTHER,
    ),
    "LoKr": MethodCase(
        fxpeft.LoKrConfig, peft.LoKrConfig, {"r": 2, "alpha": 5, "decompose_factor": 2}, "lokr",
        refused=("Embedding", "Conv3d"), alone=("Conv1D",), other={"rank_pattern": {"first": 1}},
    ),
    "VeRA": MethodCase(
        fxpeft.VeraConfig, peft.VeraConfig, {"r": 4, "projection_prng_key": 3}, "vera", refused=LINEAR, other={"r": 7},
    ),
    "MiSS": MethodCase(
        fxpeft.MissConfig, peft.MissConfig, {"r": 4}, "miss", refused=LINEAR, alone=("Conv1D",), other={"r": 3},
    ),
    "MiSS with `bat`": MethodCase(
        fxpeft.MissConfig, peft.MissConfig, {"r": 1, "init_weights": "bat"}, "miss_bat", refused=LINEAR,
        alone=("Conv1D",), other={},
    ),
    "VB-LoRA": MethodCase(
        fxpeft.VBLoRAConfig, peft.VBLoRAConfig, {"r": 3, "num_vectors": 7, "vector_length": 1}, "vblora",
        refused=LINEAR, other={"r": 5},
    ),
    "DeLoRA": MethodCase(
        fxpeft.DeloraConfig, peft.DeloraConfig, {"r": 4, "rank_pattern": {"second": 3}, "lambda_pattern": {"first": 4}},
        "delora", refused=LINEAR, alone=("Conv1D",), other=OTHER,
    ),
    "HRA": MethodCase(
        fxpeft.HRAConfig, peft.HRAConfig, {"r": 5}, "hra", refused=("Embedding", "Conv1d", "Conv3d"),
        alone=("Conv1D", "Conv2d"), other={"r": 4, "apply_GS": True},
    ),
    "BEFT": MethodCase(fxpeft.BeftConfig, peft.BeftConfig, {}, "beft", refused=LINEAR, alone=("Conv1D",), other={}),
    "GraLoRA": MethodCase(
        fxpeft.GraloraConfig, peft.GraloraConfig, {"r": 3, "gralora_k": 1, "hybrid_r": 2, "alpha": 6}, "gralora",
        refused=LINEAR, other={"r": 2, "hybrid_r": 0},
    ),
    "DEFT": MethodCase(
        fxpeft.DeftConfig, peft.DeftConfig, {"r": 3, "alpha": 5}, "deft", refused=LINEAR,
        other={"r": 2, "decomposition_method": "qr"},
    ),
    "HiRA": MethodCase(
        fxpeft.HiraConfig, peft.HiraConfig, {"r": 3}, "hira", refused=LINEAR,
        other={"r": 5},
    ),
    "C3A": MethodCase(
        fxpeft.C3AConfig, peft.C3AConfig, {"block_size": 1}, "c3a", refused=LINEAR, alone=("Conv1D",), other={},
    ),
    "FourierFT": MethodCase(
        fxpeft.FourierFTConfig, peft.FourierFTConfig, {"n_frequency": 9, "scaling": 20.0}, "fourierft", refused=LINEAR,
        other={"n_frequency": 30, "random_loc_seed": 3},
    ),
    "SHiRA": MethodCase(
        fxpeft.ShiraConfig, peft.ShiraConfig, {"r": 1, "random_seed": 3}, "shira", refused=LINEAR, alone=("Conv1D",),
        other={"r": 2},
    ),
    "Super-Tuning": MethodCase(
        fxpeft.SupertuningConfig, peft.SupertuningConfig, {"sparsity": 0.5}, "supertuning", refused=LINEAR,
        alone=("Conv1D",), other={"sparsity": 0.7, "r": 2, "select_top": False},
    ),
    "RandLoRA": MethodCase(
        fxpeft.RandLoraConfig, peft.RandLoraConfig, {"r": 4, "randlora_alpha": 9, "projection_prng_key": 3}, "randlora",
        refused=LINEAR, other={"r": 2, "sparse": True},
    ),
    "RoAd": MethodCase(
        fxpeft.RoadConfig, peft.RoadConfig, {"group_size": 10}, "road", refused=LINEAR, alone=("Conv1D",),
        other={"group_size": 2, "variant": "road_4"},
    ),
    "WaveFT": MethodCase(
        fxpeft.WaveFTConfig, peft.WaveFTConfig, {"n_frequency": 20, "wavelet_family": "db2", "scaling": 2.0}, "waveft",
        refused=LINEAR, other={"n_frequency": 30, "use_idwt": False},
    ),
    "GLoRA": MethodCase(
        fxpeft.GloraConfig, peft.GloraConfig, {"r": 3, "config_D_E": "vector"}, "glora", refused=LINEAR,
        alone=("Conv1D",), other={"r": 2, "config_A_B": "vector"},
    ),
    "OSF": MethodCase(
        fxpeft.OSFConfig, peft.OSFConfig, {}, "osf", refused=LINEAR, alone=("Conv1D",), other={"effective_rank": 4},
    ),
    "PSOFT": MethodCase(
        fxpeft.PsoftConfig, peft.PsoftConfig, {"r": 5, "psoft_alpha": 6}, "psoft", refused=LINEAR, alone=("Conv1D",),
        other={"r": 3, "ab_svd_init": "pissa_init"},
    ),
    "PVeRA": MethodCase(
        fxpeft.PveraConfig, peft.PveraConfig, {"r": 4, "projection_prng_key": 3}, "pvera", refused=LINEAR,
        other={"r": 7},
    ),
    "TinyLoRA": MethodCase(
        fxpeft.TinyLoraConfig, peft.TinyLoraConfig, {"r": 4, "u": 25}, "tinylora",
        refused=("Conv1d", "Conv2d", "Conv3d"), other={"r": 2, "weight_tying": 1.0},
    ),
    "UniLoRA": MethodCase(
        fxpeft.UniLoraConfig, peft.UniLoraConfig, {"r": 3, "theta_d_length": 19}, "unilora", refused=LINEAR,
        other={"r": 5, "theta_d_length": 300},
    ),
    "AdaMSS": MethodCase(
        fxpeft.AdamssConfig, peft.AdamssConfig, {"r": 4, "num_subspaces": 2}, "adamss", refused=LINEAR,
        alone=("Conv1D",), other={"r": 5, "num_subspaces": 3, "subspace_rank": 2},
    ),
    "OFT": MethodCase(
        fxpeft.OFTConfig, peft.OFTConfig, {"oft_block_size": 6}, "oft", refused=LINEAR, alone=("Conv1D",),
        other={"r": 2, "oft_block_size": 0, "use_cayley_neumann": False},
    ),
    "BOFT": MethodCase(
        fxpeft.BOFTConfig, peft.BOFTConfig, {"boft_block_size": 3}, "boft", refused=LINEAR, alone=("Conv1D",),
        other={"boft_block_size": 0, "boft_block_num": 1},
    ),
}  # fmt: skip


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    return found


def adapted(method: MethodCase, kind: KindCase, seed: int = 0, **changes: Any) -> Net:
    """A net with an adapter whose every tensor is random; gains and magnitudes are around one."""
    net = kind.net()
    add(net, method.config(**changes), seed=seed)
    return net


MAX_RANK = 8


def served(kind: KindCase, name: str) -> Net:
    """A net with slots at both targets for every method that the kind has."""
    methods = dict.fromkeys(case.declared for case in METHODS.values() if name not in case.refused)
    net = kind.net()
    fxpeft.prepare_hotswap(net, MAX_RANK, targets=["first", "second"], methods=tuple(methods))
    return net


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of the tensors that a file holds, by their keys, parts of parameters too; VeRA's factors have none."""
    owners = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    found: dict[str, Tensor] = {}
    for key, tensor in fxpeft.adapter_state_dict(model).items():
        owner = owners.get(tensor.untyped_storage().data_ptr())
        if owner is not None and owner.grad is not None:
            grad = owner.grad.contiguous()
            found[key] = grad.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return found


def grads_of(peer: Any, model: Any, loss: Any) -> None:
    """The same gradients for everything that a file holds of both."""
    for each in (peer, model):
        each.zero_grad()
        loss(each).backward()
    held, names = gradients(model), dict[nn.Parameter, list[str]]()
    for name, p in peer.named_parameters(remove_duplicate=False):  # what sites share has several
        names.setdefault(p, []).append(name.replace(".default", ""))
    theirs = {next((n for n in own if n in held), own[0]): p.grad for p, own in names.items() if p.grad is not None}
    assert held.keys() == theirs.keys()
    for key, grad in held.items():
        assert theirs[key].abs().max() > 0
        assert_close(grad, theirs[key], size=float(theirs[key].abs().max()) + 0.1)


def beside_peft(kind: KindCase, config: Any, folder: Path) -> tuple[Net, Tensor, Tensor, Any]:
    """A net with a random adapter, an input, its output; and PEFT's net of its file.

    PEFT's output and gradients are the same, and what it writes is read again.
    """
    net, x = kind.net(), kind.input()
    add(net, config.changed(target_modules=["first", "second"]))
    wanted = output(net, x)
    assert (wanted - output(kind.net(), x)).abs().max() > 0.01
    fxpeft.save_adapter(net, folder)
    peer = peft.PeftModel.from_pretrained(kind.net(), str(folder), is_trainable=True).eval()
    assert_close(output(peer, x), wanted)
    peer.save_pretrained(str(folder / "theirs"))
    back = kind.net()
    fxpeft.load_adapter(back, folder / "theirs")
    assert_close(output(back, x), wanted)
    grads_of(peer, net, lambda each: each(x).square().mean())
    return net, x, wanted, peer


def drawn_as_in_peft(kind: KindCase, config: Any, folder: Path) -> None:
    """What is drawn in training is drawn as in PEFT, and does something."""
    net, x = kind.net(), kind.input()
    add(net, config.changed(target_modules=["first", "second"]))
    fxpeft.save_adapter(net, folder)
    peer = peft.PeftModel.from_pretrained(kind.net(), str(folder), is_trainable=True)
    found = []
    for each in (net.train(), peer.train()):
        torch.manual_seed(1)
        found.append(output(each, x))
    assert_close(*found)
    assert not torch.allclose(found[0], output(net.eval(), x), atol=1e-3)
