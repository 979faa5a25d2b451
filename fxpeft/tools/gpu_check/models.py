"""A Llama with random weights, adapters for it in folders, and what each of them has to give."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxpeft
from fxpeft.methods.config import AdapterConfig
from fxpeft.testing import no_recompiles
from fxpeft.tools.gpu_check.check import Setting
from fxpeft.tools.gpu_check.compare import TOLERANCE, Outputs

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_RANK = 16
# ranks 1 to MAX_RANK, targets that are subsets of each other's and not, patterns, another scale
LORAS: dict[str, Any] = {
    "wide": {"r": MAX_RANK, "lora_alpha": 24, "target_modules": ALL},
    "patterns": {
        "r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"down_proj": 11, r"layers\.1\..*\.v_proj": 1}, "alpha_pattern": {"v_proj": 2},
    },
    "one": {"r": 1, "lora_alpha": 2, "target_modules": ["o_proj", "up_proj"]},
}  # fmt: skip


def llama(setting: Setting, dtype: torch.dtype | None = None, *, hidden: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """The same numbers each time, rounded to a dtype.

    Args:
        hidden: a multiple of 128; by default what is enough to be right or wrong.
    """
    width = hidden or (64 if setting.tiny else 512)
    heads = max(4, width // 128)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, tie_word_embeddings=False,
        max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    with setting.device:
        model: Any = LlamaForCausalLM(config)
    found: LlamaForCausalLM = model.to(dtype or setting.dtype).eval().requires_grad_(False)
    return found


def token_ids(setting: Setting, length: int = 24, batch: int = 2) -> Tensor:
    """Fixed ones; padding, 0, is not among them."""
    ids = torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids.to(setting.device)


@torch.no_grad()
def logits(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """A forward at the tokens, a prompt's virtual ones left out; a copy, for a CUDA graph writes the next over it."""
    found: Tensor = model(input_ids=ids, use_cache=False)["logits"]  # a package gives a dict
    return found[:, -ids.shape[1] :].clone()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Move every number of the adapter that trains, so that the output moves by about a third; gains stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            row = math.prod(parameter.shape[1:])
            noise = torch.randn((2, *parameter.shape), generator=generator).to(parameter.device)
            parameter.mul_(1 + 0.3 * noise[0]).add_(noise[1] * 0.5 / math.sqrt(row if parameter.dim() > 1 else 100))


def save(make: Callable[[], nn.Module], config: AdapterConfig, path: Path, seed: int) -> str:
    """The folder of an adapter whose every number is random."""
    model = make()
    fxpeft.add_adapter(model, config)
    randomise(model, seed)
    fxpeft.save_adapter(model, path)
    return str(path)


def pointers(model: nn.Module) -> dict[str, int]:
    """Where each tensor of the slots lies."""
    return {name: tensor.data_ptr() for name, tensor in model.named_buffers() if ".slot." in f".{name}"}


@dataclass
class Served:
    """Folders, what each has to give, and a prepared model that has loaded them all.

    Args:
        wanted: a folder's name, or ``off`` -> its output, by its training subgraph. ids: the input.
    """

    model: LlamaForCausalLM
    folders: Mapping[str, str]
    outputs: Outputs
    ids: Tensor

    def show(self, name: str, *, from_folder: bool = False) -> None:
        """Swap; ``off`` switches adapters off."""
        if name == "off":
            fxpeft.disable_adapters(self.model)
            return
        if from_folder:
            fxpeft.hotswap(self.model, self.folders[name])
        else:
            fxpeft.set_adapter(self.model, name)
        fxpeft.enable_adapters(self.model)

    def walk(self, forward: Callable[..., Any], *, rounds: int = 2) -> int:
        """Swap between all of them, in memory and from folders; returns how many swaps there were.

        Raises:
            AssertionError: a wrong output, or a slot that moved in memory.
            torch._dynamo.exc.RecompileError: something recompiled.
        """
        before, swaps = pointers(self.model), 0
        assert before
        with no_recompiles():
            for turn in range(rounds):
                for name in [*self.outputs.wanted][:: -1 if turn % 2 else 1]:
                    self.show(name)
                    self.outputs.expect(logits(forward, self.ids), name, f"round {turn}, {name}")
                    swaps += 1
            held = next(iter(self.folders))  # under this name the others come from their folders
            self.show(held)
            for name in [*[n for n in self.folders if n != held], held]:
                self.show(name, from_folder=True)
                self.outputs.expect(logits(forward, self.ids), name, f"{name} from its folder")
                swaps += 1
        if moved := [name for name, place in pointers(self.model).items() if before.get(name) != place]:
            raise AssertionError(f"moved in memory: {', '.join(moved)}")
        return swaps


@contextmanager
def served(
    setting: Setting,
    configs: Mapping[str, AdapterConfig] | None = None,
    *,
    make: Callable[[], LlamaForCausalLM] | None = None,
    rank: Any = "dynamic",
    methods: tuple[str, ...] = ("lora",),
    prepare: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> Iterator[Served]:
    """A prepared model with adapters, those of :data:`LORAS` by default.

    Args:
        make: the bare model. prepare: further arguments of ``prepare_hotswap``.
    """
    make = make or (lambda: llama(setting))
    chosen = configs or {name: fxpeft.LoraConfig(**values) for name, values in LORAS.items()}
    ids = token_ids(setting)
    with tempfile.TemporaryDirectory(prefix="fxpeft-gpu-check-") as root:
        folders = {name: save(make, chosen[name], Path(root, name), n) for n, name in enumerate(chosen)}
        wanted = {"off": logits(make(), ids)}
        for name, folder in folders.items():
            fresh = make()
            fxpeft.load_adapter(fresh, folder)
            wanted[name] = logits(fresh, ids)
        model = make()
        dtype = wanted["off"].dtype
        fxpeft.prepare_hotswap(
            model, rank=rank, methods=methods, **{"max_rank": MAX_RANK, "targets": ALL, **(prepare or {})}
        )
        for name, folder in folders.items():
            fxpeft.load_adapter(model, folder, name)
        yield Served(model, folders, Outputs(wanted, tolerance or TOLERANCE[dtype]), ids)
