"""Files of adapters that start from the base's weight: both ways with PEFT, and as plain LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file
from starts import FROM_BASE, MODELS, adapted, peft_twin, trained
from tiny import logits, tiny_llama

import fxpeft
from fxpeft import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("case", "init"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa"), ("llama", "orthogonal")]
)
@pytest.mark.parametrize("dora", [False, True])
def test_files_both_ways_with_peft(case: str, init: str, dora: bool, tmp_path: Path) -> None:
    theirs = trained(peft_twin(case, init, use_dora=dora))
    wanted = logits(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = MODELS[case][0]()
    bare = logits(model)
    assert float((wanted - bare).abs().max()) > 1e-3
    fxpeft.load_adapter(model, tmp_path / "theirs")
    assert_close(logits(model), wanted)
    fxpeft.save_adapter(model, tmp_path / "ours")
    stored, kept = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours"))
    whole = init == "orthogonal"  # where the base's weight stays whole, targeted embeddings are saved as PEFT does
    assert kept.keys() == {k for k in stored if (whole or "base_layer" not in k) and "lm_head" not in k}
    again = peft.PeftModel.from_pretrained(MODELS[case][0](), str(tmp_path / "ours")).eval()
    assert again.peft_config["default"].init_lora_weights == init
    assert_close(logits(again), wanted)
    fxpeft.remove(model)
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("init", FROM_BASE)
@pytest.mark.parametrize("rslora", [False, True])
def test_plain_file_needs_only_the_untouched_base(case: str, init: str, rslora: bool, tmp_path: Path) -> None:
    model = trained(adapted(case, init, use_rslora=rslora))
    wanted = logits(model)
    fxpeft.save_adapter(model, tmp_path, plain=True)
    theirs = peft.PeftModel.from_pretrained(MODELS[case][0](), str(tmp_path)).eval()
    assert theirs.peft_config["default"].init_lora_weights is True
    assert theirs.peft_config["default"].r == 8
    assert_close(logits(theirs), wanted)
    other = MODELS[case][0]()
    fxpeft.load_adapter(other, tmp_path)
    assert_close(logits(other), wanted)
    assert_close(logits(model), wanted, terms=0)  # saving changed nothing
    assert fxpeft.adapter_config(model).init_lora_weights == init  # type: ignore[attr-defined]


@pytest.mark.parametrize("prepared", [False, True])
def test_plain_dora_file(prepared: bool, tmp_path: Path) -> None:
    model = trained(adapted("llama", "pissa", use_dora=True))
    wanted = logits(model)
    if prepared:
        fxpeft.prepare_hotswap(model, 12, methods=("dora",))
    fxpeft.save_adapter(model, tmp_path, plain=True)
    assert_close(logits(peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()), wanted)


@pytest.mark.parametrize(("case", "init"), [("llama", "pissa_niter_2"), ("gpt2", "pissa_niter_2"), ("gpt2", "olora")])
def test_a_start_that_peft_could_not_find_again_is_saved_plainly(case: str, init: str, tmp_path: Path) -> None:
    model = trained(adapted(case, init))
    fxpeft.save_adapter(model, tmp_path)
    assert_close(logits(peft.PeftModel.from_pretrained(MODELS[case][0](), str(tmp_path)).eval()), logits(model))


def test_a_random_start_that_is_gone_is_told(tmp_path: Path) -> None:
    model = trained(adapted("llama", "pissa_niter_30"))
    fxpeft.save_adapter(model, tmp_path, plain=False)
    other = tiny_llama()
    with pytest.warns(UserWarning, match=r"pissa_niter_30 starts at random.*plain=True"):
        fxpeft.load_adapter(other, tmp_path)
    assert 1e-7 < float((logits(other) - logits(model)).abs().max()) < 1e-2  # 30 iterations come near


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "eva"])
def test_plain_file_of_another_start(init: Any, tmp_path: Path) -> None:
    model = trained(adapted("llama", init))
    fxpeft.save_adapter(model, tmp_path, plain=True)
    other = tiny_llama()
    fxpeft.load_adapter(other, tmp_path)
    assert_close(logits(other), logits(model), terms=0)
    found = fxpeft.adapter_config(other)
    assert (found.init_lora_weights, found.r) == (True, 4)  # type: ignore[attr-defined]


def test_plain_file_of_another_method_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, fxpeft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match=r"plain=True is for LoRA and DoRA, found IA3"):
        fxpeft.save_adapter(model, tmp_path / "x", plain=True)


def test_a_file_for_weights_that_cannot_be_decomposed_is_refused(tmp_path: Path) -> None:
    fxpeft.save_adapter(trained(adapted("llama", "pissa")), tmp_path)
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(fxpeft.CheckpointError, match=r"layers\.1\.self_attn\.q_proj: .*holds NaN"):
        fxpeft.load_adapter(model, tmp_path)
    assert before == [(n, type(m)) for n, m in model.named_modules()]
