"""Default targets: PEFT's table, attention found by watching a forward, and all-linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from tiny import tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import fxpeft
from fxpeft import AdapterError, LoraConfig
from fxpeft.methods import METHODS
from fxpeft.methods.defaults import OWN_TARGETS, TARGETS
from fxpeft.targets.attention import attention_targets
from fxpeft.targets.defaults import default_targets


def test_table_is_pefts() -> None:
    theirs = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {k: v if isinstance(v, str) else list(v) for k, v in theirs.items()} == TARGETS


@pytest.mark.parametrize("method", [method for method in METHODS if method.targeted], ids=lambda method: method.name)
def test_a_methods_own_table_is_pefts(method: Any) -> None:
    theirs = getattr(peft.utils.constants, f"TRANSFORMERS_MODELS_TO_{method.peft_type}_TARGET_MODULES_MAPPING", {})
    own = {**TARGETS, **OWN_TARGETS.get(method.name, {})}
    wanted = {k: v if isinstance(v, str) else list(v) for k, v in theirs.items()}
    assert {k: own.get(k) for k in wanted} == wanted


# --- watching a forward ---

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
GPT = {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
VIT = {**SIZES, "image_size": 16, "patch_size": 8, "num_channels": 3}
del VIT["vocab_size"], VIT["max_position_embeddings"]
MODELS: dict[str, tuple[Any, str, dict[str, Any], set[str]]] = {
    "llama": (AutoModelForCausalLM, "llama", {**SIZES, "num_key_value_heads": 2}, {"q_proj", "v_proj"}),
    "gpt2": (AutoModelForCausalLM, "gpt2", GPT, {"c_attn"}),
    "bert": (AutoModelForSequenceClassification, "bert", SIZES, {"query", "value"}),
    "opt": (
        AutoModelForCausalLM, "opt",
        {**SIZES, "ffn_dim": 36, "word_embed_proj_dim": 24, "pad_token_id": 1}, {"q_proj", "v_proj"},
    ),
    "t5": (
        AutoModelForSeq2SeqLM, "t5",
        {"vocab_size": 40, "d_model": 24, "d_kv": 6, "d_ff": 36, "num_layers": 2, "num_heads": 4}, {"q", "v"},
    ),
    "vit": (AutoModelForImageClassification, "vit", VIT, {"q_proj", "v_proj"}),
    "gpt_neox": (AutoModelForCausalLM, "gpt_neox", SIZES, {"query_key_value"}),
    "phi3": (
        AutoModelForCausalLM, "phi3",
        {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}, {"qkv_proj"},
    ),
    "distilbert": (
        AutoModel, "distilbert",
        {"vocab_size": 40, "dim": 24, "hidden_dim": 36, "n_layers": 2, "n_heads": 4}, {"q_lin", "v_lin"},
    ),
}  # fmt: skip


def make(case: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    loader, model_type, sizes, _ = MODELS[case]
    try:
        return loader.from_config(AutoConfig.for_model(model_type, **sizes), attn_implementation=attention)
    except ValueError as error:
        pytest.skip(f"{case} has no {attention}: {str(error)[:60]}")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", MODELS)
def test_watching_finds_the_queries_and_values(case: str, attention: str) -> None:
    model = make(case, attention)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)).eval()
    names = {n.rpartition(".")[2] for n in attention_targets(model)}
    assert names == MODELS[case][3]
    assert [m for m in model.modules() if not m.training] == [frozen]
    assert not any(m._forward_hooks for m in model.modules())
    sites = [n for n, m in model.named_modules() if n.rpartition(".")[2] in names and not list(m.children())]
    fxpeft.add_adapter(model, LoraConfig(r=2, lora_alpha=5, target_modules=attention_targets(model)))
    adapted = [n.replace(".adapters.default", "") for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert sorted(adapted) == sorted(sites)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert", "opt", "t5"])
def test_watching_agrees_with_the_table(case: str) -> None:
    model = make(case, "eager" if case == "t5" else "sdpa")
    assert sorted(attention_targets(model)) == sorted(default_targets(model))


class Odd(nn.Module):
    """An attention whose projections nobody could guess; ``written`` chooses how it is written."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.written = written
        self.entry, self.ada, self.bob, self.eve = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)
        self.leave = nn.Linear(6, 3)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"x": torch.ones(2, 4, 5)}

    def forward(self, x: Tensor) -> Tensor:
        h = self.entry(x)
        q, k, v = self.ada(h).tanh() * 2, self.bob(h), self.eve(h)
        if self.written == "fused":
            return self.leave(F.scaled_dot_product_attention(q, k, v))
        if self.written == "operators":
            return self.leave((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v)
        scores = torch.bmm(q, k.mT) / 2
        scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
        return self.leave(torch.matmul(F.dropout(torch.softmax(scores, -1), training=self.training), v))


class Shell(nn.Module):
    """Two odd attentions, and a linear that shares the name of a projection."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.one, self.two = Odd(written), Odd(written)
        self.other = nn.ModuleDict({"ada": nn.Linear(3, 5)})

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return self.one.dummy_inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.other["ada"](self.one(x)))


@pytest.mark.parametrize("written", ["fused", "operators", "masked"])
def test_home_made_model_with_unknown_names(written: str) -> None:
    model = Odd(written)
    assert attention_targets(model) == ["ada", "eve"]
    fxpeft.add_adapter(model, LoraConfig(r=2, lora_alpha=5))
    assert {k.split(".")[2] for k in fxpeft.adapter_state_dict(model)} == {"ada", "eve"}


@pytest.mark.parametrize("written", ["fused", "operators", "masked"])
def test_full_names_where_a_suffix_would_take_more(written: str) -> None:
    assert attention_targets(Shell(written)) == ["one.ada", "one.eve", "two.ada", "two.eve"]


class NoInputs(nn.Module):
    """Says nothing about its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x)


class WrongInputs(NoInputs):
    """Names inputs that it doesn't take."""

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"y": torch.ones(2, 5)}


class Picky(WrongInputs):
    """Fails on them in its own way."""

    def forward(self, y: Any) -> Tensor:
        return y.pixels


class NoAttention(NoInputs):
    """A softmax and a matrix product are no attention yet."""

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"x": torch.ones(2, 5)}

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x).softmax(-1) @ self.line.weight


@pytest.mark.parametrize("kind", [NoInputs, WrongInputs, Picky, NoAttention])
def test_nothing_to_find_is_an_error_that_says_what_to_do(kind: Callable[[], nn.Module]) -> None:
    model = kind()
    assert attention_targets(model) == []
    with pytest.raises(AdapterError, match=r"no default target_modules for \w+ .*name target_modules, or use 'all-lin"):
        fxpeft.add_adapter(model, LoraConfig())
    assert not any(m._forward_hooks for m in model.modules())
    assert "_fxpeft" not in vars(model)


# --- the same sites as PEFT ---


def sites_of(model: nn.Module) -> list[str]:
    names = (n.replace(".adapters.default", "") for n, m in model.named_modules() if hasattr(m, "lora_A"))
    return sorted(n.removeprefix("base_model.model.") for n in names)


@pytest.mark.parametrize("targets", ["all-linear", None])
@pytest.mark.parametrize(
    ("factory", "task"),
    [(tiny_llama, "CAUSAL_LM"), (tiny_llama, None), (tiny_bert, "SEQ_CLS"), (tiny_bert, None), (tiny_gpt2, None)],
)
def test_sites_are_pefts(factory: Callable[[], Any], task: str | None, targets: str | None) -> None:
    values: dict[str, Any] = {"r": 2, "lora_alpha": 5, "target_modules": targets, "task_type": task}
    model = factory()
    fxpeft.add_adapter(model, LoraConfig(**values))
    theirs = peft.get_peft_model(factory(), peft.LoraConfig(**values))
    assert sites_of(model) == sites_of(theirs)
    saved = {k for k in peft.get_peft_model_state_dict(theirs) if "lora_" not in k}
    assert {k for k in fxpeft.adapter_state_dict(model) if "lora_" not in k} == saved
