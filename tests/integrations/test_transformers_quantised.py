"""Quantised bases: bitsandbytes in 8 and 4 bit, torchao in int8 and int4; attach, train, save, swap, compile."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, logits, randomise, token_ids
from torch import Tensor, nn
from torch._dynamo.exc import RecompileError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import fxpeft
from fxpeft.testing import count_graphs, no_recompiles

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.skipif(
        find_spec("bitsandbytes") is None or find_spec("torchao") is None,
        reason="needs bitsandbytes and torchao: pip install 'fxpeft[quantised]'",
    ),
]
CONFIG: dict[str, Any] = {
    "r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 3},
}  # fmt: skip
KINDS = ["8 bit", "8 bit whole", "nf4", "nf4 twice", "int8", "int4"]  # whole: without LLM.int8's outlier columns
# in evaluation bitsandbytes' 4-bit kernel for CPUs rounds to bfloat16, so a sum in another order shows
KERNEL = {"8 bit": 1e-4, "8 bit whole": 1e-4, "nf4": 5e-3, "nf4 twice": 5e-3, "int8": 1e-4, "int4": 1e-4}
# 8 bit rounds its inputs too
EXACT = {"8 bit": 0.05, "8 bit whole": 0.05, "nf4": 1e-4, "nf4 twice": 1e-4, "int8": 1e-4, "int4": 1e-4}


def quantisation(kind: str) -> Any:
    if kind.startswith("8 bit"):
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0 if kind == "8 bit" else 0.0)
    if kind.startswith("nf4"):
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=kind == "nf4 twice",
        )  # fmt: skip
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if kind == "int4":  # not Int4WeightOnlyConfig: all its packing formats are for GPUs; see the test below
        return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Widths are multiples of bitsandbytes' block of 64; still nowhere square but in attention's own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    folder = str(tmp_path_factory.mktemp("base"))
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantised(base: str, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=quantisation(kind), device_map="cpu")


def dequantised(model: Any, base: str) -> Any:
    """A plain model with the numbers that the quantised weights stand for."""
    plain = LlamaForCausalLM.from_pretrained(base)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        weight: Any = module.weight
        if type(weight).__name__ == "Params4bit":
            import bitsandbytes.functional as bnb

            value = bnb.dequantize_4bit(weight.data, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            scale = weight.SCB if weight.SCB is not None else module.state.SCB
            value = weight.data.float() * scale[:, None] / 127
        else:
            value = weight.dequantize()
        plain.get_submodule(name).weight.data = value.float().reshape(plain.get_submodule(name).weight.shape)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_a_quantised_base(base: str, kind: str) -> None:
    """QLoRA: outputs and gradients are those of a plain model with the dequantised weights."""
    model = quantised(base, kind)
    reference = dequantised(model, base)
    for adapted in (model, reference):
        adapted.add_adapter(fxpeft.LoraConfig(**CONFIG))
        randomise(adapted.get_adapter_state_dict().values(), seed=1)
        adapted.train()
    assert {value.dtype for value in model.get_adapter_state_dict().values()} == {torch.float32}
    losses = []
    for adapted in (model, reference):
        loss = adapted(token_ids(), labels=token_ids()).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=EXACT[kind])
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    mine = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    assert len(mine) == 12
    for name, gradient in mine.items():
        scale = theirs[name].abs().max().item()
        assert scale > 0
        assert torch.allclose(gradient, theirs[name], atol=EXACT[kind] * max(scale, 0.1) * 2), name
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
    assert loss.item() < losses[0]


OTHERS: dict[str, dict[str, Any]] = {
    "a": {}, "b": {"r": 5, "lora_alpha": 3},
    "c": {"r": 8, "lora_alpha": 2, "target_modules": ["k_proj", "up_proj"], "rank_pattern": {"up_proj": 1}},
}  # fmt: skip


def saved_adapters(base: str, kind: str, folder: Path) -> dict[str, Tensor]:
    """Adapters of other ranks, alphas and targets saved below a folder, and what each of them gives."""
    expected = {}
    for seed, (name, other) in enumerate(OTHERS.items()):
        model = quantised(base, kind)
        model.add_adapter(fxpeft.LoraConfig(**{**CONFIG, **other}))
        randomise(model.get_adapter_state_dict().values(), seed)
        expected[name] = logits(model.eval())
        model.save_pretrained(folder / name)
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_swap(base: str, kind: str, tmp_path: Path) -> None:
    expected = saved_adapters(base, kind, tmp_path)
    for name in expected:
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", quantization_config=quantisation(kind), device_map="cpu"
    )
    assert torch.allclose(logits(loaded), expected["a"], atol=KERNEL[kind])
    model = quantised(base, kind)
    classes = [type(m) for m in model.modules()]
    bare = logits(model)
    model.enable_peft_hotswap(target_rank=8)
    for name in ("a", "b", "c", "a"):
        model.load_adapter(str(tmp_path / name), "default")
        assert torch.allclose(logits(model), expected[name], atol=KERNEL[kind])
        assert not torch.allclose(expected[name], bare, atol=0.1)
    model.disable_adapters()
    assert torch.allclose(logits(model), bare, atol=KERNEL[kind])
    fxpeft.remove(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.allclose(logits(model), bare, atol=KERNEL[kind])


@pytest.mark.parametrize("kind", ["8 bit", "8 bit whole", "nf4", "int8", "int4"])
def test_compiled_swaps(base: str, kind: str, tmp_path: Path) -> None:
    """Ranks, alphas, targets, off and on: nothing compiles after two forwards, and the numbers are those of eager.

    bitsandbytes' int8 operators give outputs whose shapes depend on values (the outlier columns of LLM.int8), so that
    torch.compile breaks the graph at each 8-bit layer. The parts between the breaks are reused like whole graphs. With
    llm_int8_threshold=0.0 there are no such columns and no breaks.
    """
    torch._dynamo.reset()
    expected = saved_adapters(base, kind, tmp_path)
    model = quantised(base, kind)
    bare = logits(model)
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(str(tmp_path / "a"), "default")
    compiled = torch.compile(model, backend="aot_eager")
    with count_graphs() as first:
        for _ in range(2):  # bitsandbytes changes its weights' layout in the first forward
            assert torch.allclose(logits(compiled), expected["a"], atol=KERNEL[kind])
    assert first.graphs > 0
    # what breaks a graph is bitsandbytes' own
    broken = [reason for reason in first.breaks if "output shape depends on input Tensor data" in reason]
    assert len(broken) == len(first.breaks)
    assert all("`bitsandbytes.int8_" in reason for reason in broken)
    assert bool(broken) == (kind == "8 bit")
    with no_recompiles(warm=True) as count:
        for name in ("b", "a", "c", "b"):
            model.load_adapter(str(tmp_path / name), "default")
            assert torch.allclose(logits(compiled), expected[name], atol=KERNEL[kind]), name
            model.disable_adapters()
            assert torch.allclose(logits(compiled), bare, atol=KERNEL[kind])
            model.enable_adapters()
            found = logits(compiled)
            assert torch.allclose(found, expected[name], atol=KERNEL[kind]), name
            assert torch.allclose(found, logits(model), atol=KERNEL[kind])
    assert count.graphs == 0


def test_outliers_compile_in_bitsandbytes_itself(base: str) -> None:
    """LLM.int8 without fxpeft: a layer's first input with no, one or several outlier columns is compiled, no other."""
    torch._dynamo.reset()
    compiled = torch.compile(quantised(base, "8 bit").model.layers[0].mlp.down_proj, backend="eager")

    def run(outliers: int) -> None:
        inputs = torch.randn(3, 192).clamp(-3, 3)
        inputs[0, :outliers] = 20.0
        with torch.no_grad():
            compiled(inputs)

    run(0)
    run(0)
    for outliers in (8, 1):
        with pytest.raises((RuntimeError, RecompileError), match=r"size mismatch at index 0"), no_recompiles(warm=True):
            run(outliers)
        run(outliers)
    with no_recompiles(warm=True):
        for outliers in (0, 1, 2, 3, 5, 0, 7):
            run(outliers)


def test_a_swap_without_slots_on_8_bit_is_seen_to_compile(base: str, tmp_path: Path) -> None:
    """What the test above would see, between graph breaks too."""
    torch._dynamo.reset()
    saved_adapters(base, "8 bit", tmp_path)
    model = quantised(base, "8 bit")
    model.load_adapter(str(tmp_path / "a"), "default")
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        logits(compiled)
    model.load_adapter(str(tmp_path / "b"), "default", hotswap=True)
    with pytest.raises((RuntimeError, RecompileError)), no_recompiles(warm=True):
        logits(compiled)
    with count_graphs() as count:
        logits(compiled)
    assert count.graphs > 0


def test_torchaos_own_int4_is_for_gpus() -> None:
    """Why int4 is tested with torchao's other config: once one of these serves a CPU, it belongs among KINDS."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    for packing in Int4PackingFormat:
        config = Int4WeightOnlyConfig(group_size=32, int4_packing_format=packing, set_inductor_config=False)
        module = nn.Sequential(nn.Linear(128, 192, dtype=torch.bfloat16))
        # mslk, for two of them, is a package for CUDA
        with pytest.raises((ImportError, NotImplementedError, AssertionError), match=r"mslk|'cpu'|CUDA"):
            quantize_(module, config)
