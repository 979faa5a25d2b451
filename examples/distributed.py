"""One training, in one process, in two that each see half of every batch, or in two that hold the model in parts.

    python examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py           # DDP
    torchrun --nproc-per-node 2 examples/distributed.py --shard   # FSDP2

Each prints the same losses, saves the adapter, and serves what it saved. Runs offline on a tiny random Llama.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import fxpeft

STEPS, BATCH = 20, 4
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def base() -> LlamaForCausalLM:
    """The same weights in all processes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES))


def in_parts(model: LlamaForCausalLM) -> nn.Module:
    """Each layer a unit with the adapter that is in it."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train(model: nn.Module, rank: int, world: int) -> list[float]:
    """The mean losses of the processes, which each take their rows of every batch."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    starts = torch.randint(1, 50, (STEPS, BATCH, 1), generator=torch.Generator().manual_seed(1))
    losses = []
    for batch in starts + torch.arange(12):  # to count is what there is to learn
        own = batch[rank::world]
        loss: Tensor = model(input_ids=own, labels=own).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach() / world
        if world > 1:
            dist.all_reduce(mean)
        losses.append(round(mean.item(), 3))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true", help="FSDP2 in the place of DDP")
    parser.add_argument("--folder", type=Path, help="where the adapter is saved; by default nowhere for long")
    args = parser.parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")

    model = base()
    torch.manual_seed(1)  # DDP would give all the first one's values, FSDP takes them as they are
    fxpeft.add_adapter(
        model, fxpeft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    )  # before the model is wrapped
    wrapped: nn.Module = model
    if world > 1:
        wrapped = in_parts(model) if args.shard else DistributedDataParallel(model)
    losses = train(wrapped, rank, world)

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if args.shard or rank == 0:  # parts are gathered by all, and the first one writes
            fxpeft.save_adapter(wrapped, folder)
        if rank == 0:
            served = base().eval()
            fxpeft.prepare_hotswap(served, 8, modules_to_save=["lm_head"])
            fxpeft.load_adapter(served, folder)
            ids = torch.arange(1, 13)[None]
            print("losses", losses[::5], "served", round(served(input_ids=ids, labels=ids).loss.item(), 3))


if __name__ == "__main__":
    main()
