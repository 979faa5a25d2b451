"""LoRA on parameters against PEFT: experts of mixtures and plain matrices; files both ways, gradients, slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from beside import Case, check_sums, from_peft, gradients, output
from closeness import assert_close
from peer_versions import STACKS, since
from tiny import VOCABULARY, randomise, tiny_llama
from torch import Tensor, nn

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}  # fmt: skip


def mixtral(experts: int = 3, dtype: torch.dtype = torch.float32, implementation: str = "grouped_mm") -> nn.Module:
    torch.manual_seed(0)
    config = {**DECODER, "num_experts_per_tok": min(2, experts), "num_local_experts": experts}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**config))
    model.set_experts_implementation(implementation)
    return model.to(dtype).eval()


def qwen3_moe() -> nn.Module:
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(**DECODER, num_experts=4, moe_intermediate_size=20, head_dim=8, decoder_sparse_step=2)
    return tf.Qwen3MoeForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    """Its experts are stored [experts, in, out]."""
    torch.manual_seed(0)
    config = tf.GptOssConfig(**DECODER, num_local_experts=3, head_dim=8, pad_token_id=0)
    model = tf.GptOssForCausalLM(config).eval()
    randomise((p for n, p in model.named_parameters() if n.endswith(("bias", "sinks"))), seed=5)
    return model


class Scores(nn.Module):
    """Matrices that no linear module holds, read through a method, by a forward that calls its parent's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(7, 5))
        self.second = nn.Parameter(torch.randn(1, 4, 7))
        self.calls = 0

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first.t())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.hidden(x) @ self.second[0].t()


class Doubled(Scores):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def matrices() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), Doubled())


CASES = {
    "mixtral": Case(
        mixtral,
        {
            "r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "o_proj"],
            "target_parameters": [*EXPERTS, "gate.weight"], "rank_pattern": {"experts.down_proj": 3, "o_proj": 1},
            "alpha_pattern": {r"layers\.1\..*gate_up_proj": 3},
        },
    ),
    "mixtral, a loop": Case(
        lambda: mixtral(implementation="eager"),
        {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": EXPERTS, "use_rslora": True},
    ),
    "mixtral, batched": Case(
        lambda: mixtral(implementation="batched_mm"),
        {"r": 1, "lora_alpha": 2, "target_modules": [], "target_parameters": EXPERTS},
    ),
    "mixtral, default modules": Case(
        mixtral, {"r": 3, "lora_alpha": 5, "target_parameters": ["model.layers.1.mlp.experts.down_proj"]}
    ),
    "mixtral, one expert": Case(
        lambda: mixtral(experts=1), {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": EXPERTS}
    ),
    "qwen3 moe": Case(
        qwen3_moe,
        {
            "r": 5, "lora_alpha": 4, "target_parameters": ["gate_up_proj", "down_proj"], "task_type": "CAUSAL_LM",
            "rank_pattern": {"gate_up_proj": 2}, "modules_to_save": ["lm_head"],
        },
    ),
    "gpt-oss": Case(
        gpt_oss,
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "rank_pattern": {"gate_up_proj": 2},
            "target_parameters": [*EXPERTS, "experts.gate_up_proj_bias", "router.weight"],
        },
    ),
    "linear": Case(
        tiny_llama,
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"],
            "target_parameters": ["v_proj.weight", "lm_head.weight"],
        },
    ),
    "matrices": Case(
        matrices,
        {
            "r": 3, "lora_alpha": 5, "target_modules": ["0"], "target_parameters": ["first", "1.second"],
            "rank_pattern": {"second": 2},
        },
    ),
    "bfloat16": Case(
        lambda: mixtral(dtype=torch.bfloat16),
        {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
}  # fmt: skip
SAME_IN_ALL = ("linear", "gpt-oss")  # matrices, and stacks whose module says is_transposed
MARKS = {name: () if name in SAME_IN_ALL else (since(*STACKS),) for name in CASES}
EVERY = pytest.mark.parametrize("case", [pytest.param(c, id=name, marks=MARKS[name]) for name, c in CASES.items()])


@EVERY
def test_loads_what_peft_saved_and_saves_the_same(case: Case, tmp_path: Path) -> None:
    wanted = from_peft(case, tmp_path)
    model, bare = case.build(), output(case.build())
    classes = [type(m) for m in model.modules()]
    before = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    fxpeft.load_adapter(model, tmp_path)
    assert_close(output(model), wanted)
    theirs, ours = peft.load_peft_weights(str(tmp_path)), fxpeft.adapter_state_dict(model)
    assert ours.keys() == {k for k in theirs if ".base_layer.weight" not in k}
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert before.keys() < model.state_dict().keys()  # the base's own names are all there
    fxpeft.remove(model)
    assert torch.equal(output(model), bare)
    assert [type(m) for m in model.modules()] == classes
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(v.data_ptr() == before[k][0] and torch.equal(v, before[k][1]) for k, v in after.items())


@EVERY
def test_peft_loads_what_fxpeft_saved(case: Case, tmp_path: Path) -> None:
    model = case.build()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**case.config))
    assert_close(output(model), output(case.build()))  # B starts at zero
    randomise(fxpeft.adapter_state_dict(model).values())
    fxpeft.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.build(), str(tmp_path)).eval()
    with torch.no_grad():
        assert_close(output(theirs), output(model))


@EVERY
def test_slots_and_folds_compute_the_same(case: Case, tmp_path: Path) -> None:
    wanted = from_peft(case, tmp_path)
    model, bare = case.build(), output(case.build())
    fxpeft.load_adapter(model, tmp_path, "mine")
    fxpeft.prepare_hotswap(model, 16)
    with torch.no_grad():
        assert_close(output(model), wanted)
        fxpeft.disable_adapters(model)
        assert_close(output(model), bare, terms=1)
        fxpeft.enable_adapters(model)
        fxpeft.hotswap(model, tmp_path, "mine")
        assert_close(output(model), wanted)
        fxpeft.fold(model)
        assert_close(output(model), wanted)
        fxpeft.unfold(model)
        assert_close(output(model), wanted)
        fxpeft.save_adapter(model, tmp_path / "again")
        fxpeft.release_hotswap(model)
        assert_close(output(model), wanted)
    written = peft.load_peft_weights(str(tmp_path / "again"))
    assert all(torch.equal(written[k], v) for k, v in fxpeft.adapter_state_dict(model).items())
    assert fxpeft.merge_and_unload(model) is model
    assert_close(output(model), wanted)
    theirs = peft.PeftModel.from_pretrained(case.build(), str(tmp_path)).merge_and_unload()
    assert_close(output(theirs), output(model))


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS[n]) for n in CASES if n != "bfloat16"])
def test_gradients_are_pefts(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    from_peft(case, tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.build(), str(tmp_path), is_trainable=True).eval()
    wanted = gradients(output(theirs), theirs, peft.get_peft_model_state_dict(theirs))
    model = case.build()
    fxpeft.load_adapter(model, tmp_path, trainable=True)
    found = gradients(output(model), model, fxpeft.adapter_state_dict(model))
    assert found.keys() == {k for k in wanted if ".base_layer.weight" not in k}
    assert sum("lora_" in k for k in found) == sum("lora_" in k for k in fxpeft.adapter_state_dict(model))
    for key, value in found.items():
        assert float(wanted[key].abs().max()) > 0, key
        size = max(1.0, float(wanted[key].abs().max()))  # the loss's weights are about one, and a key's bias cancels
        assert_close(value, wanted[key], size=size)


@since(19, "takes one adapter with target_parameters")
@pytest.mark.parametrize("slots", [False, True], ids=["training", "slots"])
def test_adapters_add_up_as_in_peft(slots: bool, tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {
        "a": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
        "b": {
            "r": 3, "lora_alpha": 2, "target_modules": ["v_proj"], "target_parameters": EXPERTS,
            "rank_pattern": {"down_proj": 5},
        },
    }  # fmt: skip
    check_sums(mixtral, settings, tmp_path, output, slots=slots)


def test_adapters_of_other_parameters_live_together() -> None:
    """Which PEFT refuses, since it tells parameters apart by the nesting of its wrappers."""
    model = mixtral()
    bare, alone = output(model), {}
    for name, parameter in (("up", EXPERTS[0]), ("down", EXPERTS[1])):
        fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=[], target_parameters=[parameter]), name)
        randomise(fxpeft.adapter_state_dict(model).values(), seed=len(name))
        alone[name] = output(model)
    fxpeft.set_adapter(model, ["up", "down"])
    both = output(model)
    assert all(float((both - other).abs().max()) > 0.01 for other in (bare, *alone.values()))
    fxpeft.delete_adapter(model, "up")
    assert torch.equal(output(model), alone["down"])
    fxpeft.delete_adapter(model, "down")
    assert torch.equal(output(model), bare)


@since(*STACKS)
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_first_values_are_distributed_as_in_peft(init: bool | str) -> None:
    config = {"r": 4, "target_modules": [], "target_parameters": EXPERTS, "init_lora_weights": init}
    model = mixtral(experts=8)
    theirs = peft.get_peft_model(mixtral(experts=8), peft.LoraConfig(**config))
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**config))
    wanted = peft.get_peft_model_state_dict(theirs)
    for key, value in fxpeft.adapter_state_dict(model).items():
        assert value.shape == wanted[key].shape
        torch.testing.assert_close(value.std(), wanted[key].std(), rtol=0.15, atol=0)
        if init != "gaussian":
            torch.testing.assert_close(value.abs().max(), wanted[key].abs().max(), rtol=0.05, atol=0)


def test_autocast_computes_what_peft_computes(tmp_path: Path) -> None:
    """The updated weight keeps its dtype, so autocast rounds it once, as it would round the base's."""
    from_peft(CASES["mixtral"], tmp_path)
    theirs = peft.PeftModel.from_pretrained(mixtral(), str(tmp_path)).eval()
    model = mixtral()
    fxpeft.load_adapter(model, tmp_path)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, found = output(theirs), output(model)
        off = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    assert off < 2e-2
