"""LoftQ: the quantisers from the papers' own numbers, the loop from PEFT's parts, and its own weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from picture import assert_same, picture
from safetensors.torch import load_file
from starts import IDS, MODELS, adapted, trained
from tiny import logits, tiny_llama
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import fxpeft
from fxpeft import AdapterError
from fxpeft.methods import inits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


NF4 = torch.tensor([  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nearest_nf4(weight: Tensor) -> Tensor:
    """NF4 written down as slowly as possible: every number on its own."""
    flat = weight.flatten()
    out = torch.empty_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        top = block.abs().max()
        for i, value in enumerate(block):
            out[start + i] = NF4[(NF4 - value / top).abs().argmin()] * top
    return out.view_as(weight)


def row_wise_int8(weight: Tensor) -> Tensor:
    """LLM.int8()'s rounding of a weight, which bitsandbytes takes in float16."""
    rows = []
    for row in weight.half():
        top = row.abs().max().float()
        rows.append((row.float() * 127 / top).round() * top / 127)
    return torch.stack(rows)


QUANTISERS = {4: nearest_nf4, 8: row_wise_int8}


@pytest.mark.parametrize("bits", QUANTISERS)
@pytest.mark.parametrize("shape", [(6, 40), (7, 9), (1, 64)])
def test_quantisers(bits: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found, wanted = inits.quantised(weight, bits), QUANTISERS[bits](weight)  # it may round to the next step
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if bits == 4 else 1e-3)
    assert 1e-4 < float((inits.quantised(weight, bits) - weight).abs().max()) < (0.5 if bits == 4 else 0.02)
    assert torch.equal(inits.quantised(torch.zeros(shape), bits), torch.zeros(shape))


@pytest.mark.parametrize("bits", QUANTISERS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_is_pefts_loop(bits: int, rounds: int) -> None:
    """PEFT's own ``loftq_init`` needs a GPU for its quantiser; this is its loop around ours."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    rest = weight.clone()
    for _ in range(rounds):
        wanted = QUANTISERS[bits](rest)
        parts = _low_rank_decomposition(weight - wanted, reduced_rank=5)
        rest = weight - parts["L"] @ parts["R"]
    q, a, b = inits.loftq(weight, 5, bits, rounds)
    torch.testing.assert_close(q, wanted, rtol=0, atol=1e-5 if bits == 4 else 2e-3)
    if bits == 4:
        assert_close(b @ a, parts["L"] @ parts["R"])
    assert torch.linalg.norm(q + b @ a - weight) < 0.85 * torch.linalg.norm(q - weight)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("dora", [False, True])
def test_loftq_runs_on_a_quantised_weight_of_its_own(case: str, dora: bool, tmp_path: Path) -> None:
    values = {"use_dora": dora, "lora_alpha": 4, "alpha_pattern": {}, "rank_pattern": {}}
    model = adapted(case, "loftq", **values)
    bare = MODELS[case][0]()
    untouched = picture(bare, IDS)
    site = next(m for m in model.modules() if hasattr(m, "adapters") and hasattr(m, "weight"))
    own = site.adapters.default
    weight, flip = site._parameters["weight"].detach(), isinstance(site, Conv1D)  # the attribute gives the adapter's
    q = own.weight.t() if flip else own.weight
    near = q + own.lora_B @ own.lora_A
    weight = weight.t() if flip else weight
    assert 0 < float(torch.linalg.norm(near - weight)) < 0.9 * float(torch.linalg.norm(q - weight))
    assert all(not n.endswith(".weight") for n, p in model.named_parameters() if "adapters" in n and p.requires_grad)

    quantised = copy.deepcopy(bare)  # the same model, its weights replaced by hand
    for name, module in model.named_modules():
        if hasattr(module, "adapters") and hasattr(module, "weight"):
            left, right = module.adapters.default.lora_B, module.adapters.default.lora_A
            change = (left @ right).t() if flip else left @ right
            quantised.get_submodule(name).weight.data = module.adapters.default.weight + change.detach()
    assert_close(logits(model), logits(quantised))

    trained(model)
    wanted = logits(model)
    fxpeft.prepare_hotswap(model, 8, methods=("lora", "dora"))
    assert_close(logits(model), wanted)
    with fxpeft.disabled(model):
        assert_close(logits(model), logits(bare), terms=0)
    fxpeft.release_hotswap(model)
    fxpeft.save_adapter(model, tmp_path)
    assert not any(key.endswith("base_layer.weight") for key in load_file(tmp_path / "adapter_model.safetensors"))
    fxpeft.load_adapter(bare, tmp_path)
    assert_close(logits(bare), wanted, terms=1)
    with pytest.raises(AdapterError, match=r"quantised weight of its own"):
        fxpeft.save_adapter(model, tmp_path / "plain", plain=True)
    assert not (tmp_path / "plain").exists()
    fxpeft.remove(bare)
    assert_same(untouched, picture(bare, IDS))


def test_slots_that_lack_a_place_for_the_quantised_weight_say_so() -> None:
    donor, model = adapted("llama", "loftq"), tiny_llama()
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj", "v_proj", "down_proj"])
    with pytest.raises(AdapterError, match=r"q_proj\.weight: has no slot; .*before prepare_hotswap"):
        fxpeft.add_adapter(model, fxpeft.adapter_config(donor), "late")
