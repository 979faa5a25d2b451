"""Folding against PEFT's merge: every method on every kind of target, from PEFT's files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from tiny import conv_net, randomise, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EVERYTHING = ("lora", "lora_bias", "dora", "ia3", "adalora")


def plain_convs() -> nn.Module:
    """The convolutions whose update is a change of the weight, each followed by what the next one takes."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"line": nn.Conv1d(3, 8, 3, padding=1), "plane": nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
         "one": nn.Conv2d(6, 5, 1, bias=False), "space": nn.Conv3d(1, 7, (1, 2, 2))}
    ).eval()  # fmt: skip


LINEARS = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 10, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 3}}


@dataclass(frozen=True)
class Case:
    """A model and a config of PEFT."""

    build: Callable[[], nn.Module]
    config: peft.PeftConfig

    def __str__(self) -> str:
        return next(name for name, case in CASES.items() if case is self)


def lora(**values: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**values)


CASES = {
    "lora": Case(tiny_llama, lora(**LORA, target_modules=LINEARS)),
    "rslora, embedding": Case(tiny_llama, lora(**LORA, target_modules=[*LINEARS, "embed_tokens"], use_rslora=True)),
    "lora_bias, head": Case(
        tiny_bert,
        lora(r=4, lora_alpha=6, target_modules=["query", "output.dense"], lora_bias=True, task_type="SEQ_CLS"),
    ),
    "every bias": Case(tiny_bert, lora(r=4, lora_alpha=6, target_modules=["value"], bias="all", task_type="SEQ_CLS")),
    "Conv1D": Case(
        tiny_gpt2,
        lora(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, rank_pattern={"c_fc": 6}),
    ),
    "convolutions": Case(
        plain_convs,
        lora(r=4, lora_alpha=6, target_modules=["line", "plane", "one", "space"], rank_pattern={"space": 3}),
    ),
    "dora": Case(tiny_llama, lora(**LORA, target_modules=[*LINEARS, "embed_tokens"], use_dora=True, lora_dropout=0.1)),
    "dora, bias": Case(
        tiny_bert, lora(r=4, lora_alpha=6, target_modules=["query", "output.dense"], use_dora=True, bias="lora_only")
    ),
    "dora, Conv1D": Case(
        tiny_gpt2, lora(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True)
    ),
    "dora, convolutions": Case(
        plain_convs, lora(r=4, lora_alpha=6, target_modules=["line", "plane", "space"], use_dora=True)
    ),
    "ia3": Case(
        tiny_bert,
        peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "ia3, Conv1D": Case(
        tiny_gpt2,
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "ia3, convolution": Case(
        plain_convs, peft.IA3Config(target_modules=["plane", "one"], feedforward_modules=["one"])
    ),
    "adalora": Case(
        tiny_llama, peft.AdaLoraConfig(init_r=5, lora_alpha=7, target_r=3, total_step=9, target_modules=LINEARS)
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=str)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """The model's logits, or those of all convolutions side by side."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if not isinstance(inner, nn.ModuleDict):
        return model(token_ids()).logits
    sizes = {"line": (3, 9), "plane": (2, 8, 7), "one": (6, 4, 4), "space": (1, 2, 5, 5)}
    generator = torch.Generator().manual_seed(3)
    return torch.cat(
        [inner[name](torch.randn(2, *size, generator=generator)).flatten(1) for name, size in sizes.items()], 1
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if ".adapters." not in k and ".slot." not in k}


@EVERY
def test_folds_to_what_peft_merges_to(case: Case, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(case.build(), case.config).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path))
    unmerged = output(theirs)
    merged = theirs.merge_and_unload(safe_merge=True)

    model = case.build()
    bare, bare_output = weights(model), output(model)
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    assert float((unmerged - bare_output).abs().max()) > 3e-4
    fxpeft.load_adapter(model, tmp_path, "a")
    for slots in (False, True):
        if slots:
            fxpeft.prepare_hotswap(model, 8, methods=EVERYTHING)
        running = output(model)
        fxpeft.fold(model)
        assert fxpeft.folded_adapters(model) == ["a"]
        assert fxpeft.active_adapters(model) == []
        assert_close(output(model), running)
        assert_close(output(model), unmerged)
        for key, value in merged.state_dict().items():
            assert_close(weights(model)[key], value)
        assert places == {n: p.data_ptr() for n, p in model.named_parameters() if n in places}
        fxpeft.unfold(model)
        assert all(torch.equal(v, bare[k]) for k, v in weights(model).items())
        assert torch.equal(output(model), running)

    plain = fxpeft.merge_and_unload(model)
    assert plain is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in merged.named_modules()]
    assert_close(output(model), output(merged))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sums_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Against the sum in float64; PEFT rounds the update to the base's dtype before it adds it."""
    theirs = peft.get_peft_model(tiny_llama(torch.float32), CASES["lora"].config)
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path))
    model = tiny_llama(dtype)
    site = model.model.layers[1].self_attn.v_proj
    before = site.weight.detach().clone().double()
    fxpeft.load_adapter(model, tmp_path, "a")
    parts = {k: v.double() for k, v in fxpeft.adapter_state_dict(model).items() if "layers.1.self_attn.v_proj" in k}
    a, b = (next(v for k, v in parts.items() if f"lora_{x}" in k) for x in "AB")
    fxpeft.fold(model)
    exact = before + b @ a * (10 / 3)
    assert site.weight.dtype == dtype
    # one rounding, and the scale 10 / 3, which slots hold in float32
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 2e-7
    assert bool(((site.weight.detach().double() - exact).abs() <= bound).all())


def test_convolutions_whose_update_is_no_change_of_the_weight_are_refused(tmp_path: Path) -> None:
    """PEFT merges the circular one to other outputs without a word."""
    theirs = peft.get_peft_model(conv_net(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["line"])).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path))
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        unmerged = theirs(x)
        assert float((theirs.merge_and_unload()(x) - unmerged).abs().max()) > 1e-2
    model = conv_net()
    fxpeft.load_adapter(model, tmp_path)
    with pytest.raises(fxpeft.AdapterError, match=r"line: the update pads with zeros.*circular"):
        fxpeft.fold(model)
    with torch.no_grad():
        assert_close(model(x), unmerged)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_above_a_lora_is_pefts(dropout: float, tmp_path: Path) -> None:
    """In evaluation a dropout changes nothing, and DoRA's gain is one of what the adapter below gives, too."""
    configs = {
        "a": lora(**LORA, target_modules=LINEARS),
        "b": lora(r=3, lora_alpha=5, target_modules=["q_proj"], use_dora=True, lora_dropout=dropout),
    }
    theirs = peft.get_peft_model(tiny_llama(), configs["a"], adapter_name="a").eval()
    theirs.add_adapter("b", configs["b"])
    randomise(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(str(tmp_path))
    theirs.base_model.set_adapter(["a", "b"])
    model = tiny_llama()
    for name in configs:
        fxpeft.load_adapter(model, tmp_path / name, name)
    fxpeft.set_adapter(model, ["a", "b"])
    assert_close(output(model), output(theirs))
    fxpeft.fold(model)
    assert_close(output(model), output(theirs))
