"""LoRA against PEFT: files both ways, outputs, gradients and slots."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from beside import Case, check_sums, from_peft, gradients, output
from closeness import assert_close
from tiny import VOCABULARY, conv_net, randomise, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONVS = ["line", "plane", "grouped", "space"]


CASES = {
    "llama": Case(
        tiny_llama,
        {
            "r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
            "rank_pattern": {"down_proj": 7, r"layers\.1\..*\.q_proj": 1}, "alpha_pattern": {"v_proj": 3},
            "use_rslora": True,
        },
    ),
    "llama without rslora": Case(
        tiny_llama,
        {
            "r": 3, "lora_alpha": 5, "target_modules": r".*\.(gate|up)_proj", "task_type": "CAUSAL_LM",
            "alpha_pattern": {r"layers.0.*up_proj": 2},
        },
    ),
    "all-linear": Case(tiny_llama, {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
    "default targets": Case(tiny_llama, {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"}),
    "layers": Case(
        tiny_llama,
        {
            "r": 5, "lora_alpha": 4, "target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
    "exclude": Case(
        tiny_llama, {"r": 5, "lora_alpha": 4, "target_modules": ["k_proj", "up_proj"], "exclude_modules": r".*\.0\..*"}
    ),
    "exclude by suffix": Case(
        tiny_llama,
        {"r": 5, "lora_alpha": 4, "target_modules": ["k_proj", "v_proj"], "exclude_modules": ["self_attn.k_proj"]},
    ),
    "modules to save": Case(
        tiny_llama, {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}
    ),
    "lora_bias": Case(
        tiny_llama,
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "down_proj"], "lora_bias": True,
            "rank_pattern": {"down_proj": 3},
        },
    ),
    "gpt2": Case(
        tiny_gpt2,
        {
            "r": 4, "lora_alpha": 10, "target_modules": ["c_attn", "wte"], "fan_in_fan_out": True,
            "rank_pattern": {"h.1.attn.c_attn": 6}, "task_type": "CAUSAL_LM",
        },
    ),
    "gpt2, bias": Case(
        tiny_gpt2,
        {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "lora_only"},
    ),
    "convolutions": Case(
        conv_net,
        {
            "r": 4, "lora_alpha": 6, "target_modules": CONVS, "rank_pattern": {"grouped": 6, "line": 3},
            "alpha_pattern": {"space": 2},
        },
    ),
    "convolutions, lora_bias": Case(
        conv_net, {"r": 4, "lora_alpha": 6, "target_modules": ["line", "plane", "space"], "lora_bias": True}
    ),
    "bert": Case(
        tiny_bert, {"r": 4, "lora_alpha": 6, "target_modules": ["query", "intermediate.dense"], "task_type": "SEQ_CLS"}
    ),
    "bert, own bias": Case(
        tiny_bert,
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["query", "intermediate.dense"], "task_type": "SEQ_CLS",
            "bias": "lora_only",
        },
    ),
    "bert, every bias": Case(
        tiny_bert,
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["value", "output.dense"], "task_type": "SEQ_CLS", "bias": "all",
            "rank_pattern": {"attention.output.dense": 3},
        },
    ),
    "bfloat16": Case(
        lambda: tiny_llama(torch.bfloat16),
        {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"], "alpha_pattern": {"v_proj": 3}},
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@EVERY
def test_loads_what_peft_saved(case: Case, tmp_path: Path) -> None:
    wanted = from_peft(case, tmp_path)
    model = case.build()
    fxpeft.load_adapter(model, tmp_path)
    assert_close(output(model), wanted)
    fxpeft.remove(model)
    assert torch.equal(output(model), output(case.build()))


@EVERY
def test_peft_loads_what_fxpeft_saved(case: Case, tmp_path: Path) -> None:
    model = case.build()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**case.config))
    randomise(fxpeft.adapter_state_dict(model).values())
    fxpeft.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.build(), str(tmp_path)).eval()
    with torch.no_grad():
        assert_close(output(theirs), output(model))


def superfluous(key: str, case: Case) -> bool:
    """Keys of PEFT that change nothing: frozen embeddings, and with ``bias="all"`` the head's bias again."""
    embeds = {"embed_tokens", "wte"} & set(case.config.get("target_modules", ()))
    frozen = key.endswith("base_layer.weight") or (key.endswith("lm_head.weight") and bool(embeds))
    return frozen or ".original_module." in key or ".modules_to_save." in key


@EVERY
def test_saves_what_it_loaded(case: Case, tmp_path: Path) -> None:
    """The same keys and values as PEFT's file, the frozen embedding weights aside that PEFT adds."""
    from_peft(case, tmp_path)
    model = case.build()
    fxpeft.load_adapter(model, tmp_path)
    theirs = peft.load_peft_weights(str(tmp_path))
    ours = fxpeft.adapter_state_dict(model)
    assert ours.keys() == {k for k in theirs if not superfluous(k, case)}
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@EVERY
def test_slots_compute_the_same(case: Case, tmp_path: Path) -> None:
    wanted = from_peft(case, tmp_path)
    model = case.build()
    fxpeft.load_adapter(model, tmp_path, "mine")
    fxpeft.prepare_hotswap(model, 16, methods=("lora", "lora_bias") if case.config.get("lora_bias") else ("lora",))
    with torch.no_grad():
        assert_close(output(model), wanted)
        fxpeft.disable_adapters(model)
        assert torch.equal(output(model), output(case.build()))
        fxpeft.enable_adapters(model)
        fxpeft.hotswap(model, tmp_path, "mine")
        assert_close(output(model), wanted)
        fxpeft.release_hotswap(model)
        assert_close(output(model), wanted)


@pytest.mark.parametrize("name", [n for n in CASES if n != "bfloat16"])
def test_gradients_are_pefts(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    from_peft(case, tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.build(), str(tmp_path), is_trainable=True).eval()
    wanted = gradients(output(theirs), theirs, peft.get_peft_model_state_dict(theirs))
    model = case.build()
    fxpeft.load_adapter(model, tmp_path, trainable=True)
    found = gradients(output(model), model, fxpeft.adapter_state_dict(model))
    assert found.keys() == {k for k in wanted if not superfluous(k, case)}
    assert any("lora_" in k for k in found)
    for key, value in found.items():
        assert float(wanted[key].abs().max()) > 0, key
        size = max(1.0, float(wanted[key].abs().max()))  # the loss's weights are about one, and a key's bias cancels
        assert_close(value, wanted[key], size=size)


def test_adapters_of_a_half_precision_base_are_float32(tmp_path: Path) -> None:
    from_peft(CASES["bfloat16"], tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(torch.bfloat16), str(tmp_path))
    model = tiny_llama(torch.bfloat16)
    fxpeft.load_adapter(model, tmp_path)
    dtypes = {p.dtype for n, p in theirs.named_parameters() if "lora_" in n}
    assert {t.dtype for t in fxpeft.adapter_state_dict(model).values()} == dtypes == {torch.float32}


class ScaledWords(nn.Module):
    """Gemma's embedding, which multiplies what it looks up, below a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Gemma3TextScaledWordEmbedding(VOCABULARY, 6, 0, embed_scale=2.5)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids to numbers."""
        return self.head(self.words(ids))


def scaled_words() -> ScaledWords:
    torch.manual_seed(0)
    return ScaledWords().eval()


def test_an_embedding_that_scales_scales_the_update_too(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        scaled_words(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["words", "head"])
    ).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path))
    ids, model = token_ids(), scaled_words()
    fxpeft.load_adapter(model, tmp_path)
    with torch.no_grad():
        wanted = theirs(ids)
        assert float((wanted - scaled_words()(ids)).abs().max()) > 0.1
        assert_close(model(ids), wanted)
        fxpeft.prepare_hotswap(model, 8)
        assert_close(model(ids), wanted)


@pytest.mark.parametrize("slots", [False, True], ids=["training", "slots"])
def test_adapters_add_up_as_in_peft(slots: bool, tmp_path: Path) -> None:
    """Of other ranks, scales and targets; one of them also alone, at a strength of its own, and none."""
    settings = {
        "a": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"]},
        "b": {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}},
    }
    check_sums(tiny_llama, settings, tmp_path, output, slots=slots)
