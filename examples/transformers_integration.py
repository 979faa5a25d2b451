"""The flow of Transformers' guide to adapters, on fxpeft and without PEFT, on a tiny local model.

    python examples/transformers_integration.py

Only the call of install, and where LoraConfig comes from, differ from what the guide shows.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fxpeft
from fxpeft import LoraConfig


def make_base(folder: Path) -> str:
    """A random model in place of a checkpoint from the hub."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def train(model: LlamaForCausalLM, folder: Path, seed: int) -> None:
    """A few steps on random text."""
    rows = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(seed))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, learning_rate=0.05, use_cpu=True, report_to=[], disable_tqdm=True,
        logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data).train()


def main() -> None:
    """Add, train, save, load, switch and swap."""
    fxpeft.install()
    work = Path(tempfile.mkdtemp())
    base = make_base(work / "base")
    ids = torch.arange(16).view(2, 8)

    # add and train
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    train(model, work / "run", seed=1)
    model.save_pretrained(work / "first")
    print("saved:", sorted(path.name for path in (work / "first").iterdir()))

    # a module that is trained as a whole, beside the low-rank updates
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]))
    train(model, work / "run", seed=2)
    model.save_pretrained(work / "with_head")

    # load: the adapter's folder names its base; or load it into a model that is there
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(work / "with_head")
        print("active:", model.active_adapters())
        model = AutoModelForCausalLM.from_pretrained(base)
        bare = model(ids).logits
        model.load_adapter(str(work / "first"), adapter_name="first")
        first = model(ids).logits

        # a second adapter, and which one is used
        model.add_adapter(LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), adapter_name="second")
        model.set_adapter("first")
        assert torch.equal(model(ids).logits, first)
        model.set_adapter(["first", "second"])
        print("active:", model.active_adapters())
        model.disable_adapters()
        assert torch.equal(model(ids).logits, bare)
        model.enable_adapters()
        model.delete_adapter("second")

        # hotswap, plain: another adapter in the place of one of the same name
        model.load_adapter(str(work / "with_head"), adapter_name="first", hotswap=True)
        swapped = model(ids).logits
        assert torch.allclose(swapped, AutoModelForCausalLM.from_pretrained(work / "with_head")(ids).logits, atol=1e-5)

        # hotswap in a compiled model: other ranks and other targets, and nothing recompiles
        model = AutoModelForCausalLM.from_pretrained(base)
        model.enable_peft_hotswap(target_rank=16)  # before the first adapter, and before compiling
        model.load_adapter(str(work / "with_head"), adapter_name="default")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(ids)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name, expected in (("first", first), ("with_head", swapped), ("first", first)):
                model.load_adapter(str(work / name), adapter_name="default")
                assert torch.allclose(compiled(ids).logits, expected, atol=1e-5)
    print("three swaps, no recompile")


if __name__ == "__main__":
    main()
