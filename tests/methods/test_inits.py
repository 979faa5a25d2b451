"""Starts of a LoRA: PEFT's numbers, training, slots, what is refused; the base is never touched."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from peer_versions import needs
from picture import assert_same, picture
from starts import FROM_BASE, IDS, MODELS, adapted, config, peft_twin, trained
from tiny import conv_net, logits, randomise, tiny_llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fxpeft
from fxpeft import AdapterError, EvaConfig, LoftQConfig, LoraConfig
from fxpeft.methods import inits
from fxpeft.testing import assert_swaps_clean

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


# --- the numbers are PEFT's ---


def layer_of(model: peft.PeftModel) -> Any:
    return next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))


class Line(nn.Module):
    """One linear layer, stored either way."""

    def __init__(self, conv1d: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = Conv1D(5, 9) if conv1d else nn.Linear(9, 5)
        randomise(self.line.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("init", "conv1d"), [("pissa", False), ("pissa", True), ("olora", False), ("pissa_niter_3", False)]
)
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_and_residual_are_those_of_peft(init: str, conv1d: bool, rslora: bool) -> None:
    values: dict[str, Any] = {"r": 4, "lora_alpha": 7, "target_modules": ["line"], "use_rslora": rslora}
    theirs = layer_of(peft.get_peft_model(Line(conv1d), peft.LoraConfig(init_lora_weights=True, **values)))
    weight = theirs.base_layer.weight.detach().clone()
    torch.manual_seed(4)
    theirs.olora_init("default") if init == "olora" else theirs.pissa_init("default", init)

    ours = Line(conv1d)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        fxpeft.add_adapter(ours, LoraConfig(init_lora_weights=init, **values))
    tensors = fxpeft.adapter_state_dict(ours)
    for side in ("lora_A", "lora_B"):
        assert_close(tensors[f"base_model.model.line.{side}.weight"], getattr(theirs, side)["default"].weight)
    first = ours.line.adapters.default
    assert torch.equal(first.lora_A0, first.lora_A)
    assert torch.equal(first.lora_B0, first.lora_B)
    update = theirs.scaling["default"] * first.lora_B0 @ first.lora_A0
    assert_close(weight - (update.t() if conv1d else update), theirs.base_layer.weight)
    assert torch.equal(ours.line.weight, weight)
    assert float(update.abs().max()) > 0.1


def test_orthogonal_factors_are_those_of_peft() -> None:
    theirs = layer_of(peft.get_peft_model(Line(), peft.LoraConfig(r=4, target_modules=["line"])))
    torch.manual_seed(4)
    theirs.orthogonal_init("default")
    torch.manual_seed(4)
    a, b = inits.orthogonal(4, 9, 5)
    assert_close(a, theirs.lora_A["default"].weight, terms=1)
    assert_close(b, theirs.lora_B["default"].weight, terms=1)
    assert_close(b @ a, torch.zeros(5, 9), terms=1, size=1.0)
    assert min(float(a.abs().max()), float(b.abs().max())) > 0.05


# --- at the start nothing changes, and the base is never touched ---


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", [*FROM_BASE, "orthogonal", "eva"])
def test_output_at_the_start_is_the_bases(case: str, dora: bool, init: str) -> None:
    bare = MODELS[case][0]()
    before = {k: v.clone() for k, v in bare.state_dict().items()}
    model = adapted(case, init, use_dora=dora)
    exact = not dora and init in (*FROM_BASE, "eva")
    assert_close(logits(model), logits(bare), terms=0 if exact else 1)
    own = {k: v for k, v in model.state_dict().items() if "adapters" not in k}
    assert own.keys() == before.keys()
    assert all(torch.equal(own[k], v) for k, v in before.items())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", FROM_BASE)
def test_removal_leaves_the_model_as_it_was(init: str, dora: bool) -> None:
    model = tiny_llama()
    before = picture(model, IDS)
    fxpeft.add_adapter(model, LoraConfig(**config("llama", init, use_dora=dora)))
    trained(model)
    assert float((logits(model) - before["output"]).abs().max()) > 1e-2
    with fxpeft.disabled(model):
        assert torch.equal(logits(model), before["output"])
    fxpeft.remove(model)
    assert_same(before, picture(model, IDS))


def test_an_embedding_starts_as_with_true_as_in_peft() -> None:
    model = adapted("llama", "pissa")
    part = model.model.embed_tokens.adapters.default
    assert not part.lora_A.any()
    assert part.lora_B.any()
    assert not hasattr(part, "lora_A0")


def test_half_precision_base_starts_as_it_is_and_keeps_float32_factors() -> None:
    model = tiny_llama(torch.bfloat16)
    base = logits(model)
    fxpeft.add_adapter(model, LoraConfig(**config("llama", "pissa")))
    assert torch.equal(logits(model), base)
    part = model.model.layers[0].self_attn.q_proj.adapters.default
    assert part.lora_A0.dtype == part.lora_A.dtype == torch.float32


# --- training ---


def follow(theirs: Any, ours: Any) -> None:
    """Give PEFT's model the values of ours."""
    tensors = {k: v.detach().clone() for k, v in fxpeft.adapter_state_dict(ours).items()}
    found = peft.set_peft_model_state_dict(theirs, tensors)
    assert not found.unexpected_keys


@pytest.mark.parametrize(
    ("case", "init", "dora", "dropout"),
    [
        ("llama", "pissa", False, 0.0), ("llama", "pissa", False, 0.4), ("llama", "pissa", True, 0.0),
        ("llama", "pissa", True, 0.4), ("llama", "olora", False, 0.0), ("llama", "olora", True, 0.4),
        ("gpt2", "pissa", False, 0.4), ("gpt2", "pissa", True, 0.0), ("llama", "orthogonal", False, 0.4),
    ],
)  # fmt: skip
def test_function_and_gradients_are_those_of_peft(case: str, init: str, dora: bool, dropout: float) -> None:
    """On the residual base, as PEFT's; the part that the adapter takes off sees no dropout."""
    ours = trained(adapted(case, init, use_dora=dora, lora_dropout=dropout))
    theirs = peft_twin(case, init, use_dora=dora, lora_dropout=dropout)
    follow(theirs, ours)
    found = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        if dropout:
            model.train()
        for module in model.modules():  # the model's own dropout draws the same numbers in both
            if isinstance(module, nn.Dropout) and "adapters" not in name:
                module.train(dropout > 0 and module.p == dropout)
        torch.manual_seed(11)
        out = model(IDS).logits
        out.float().log_softmax(-1).square().mean().backward()
        grads = {
            n.replace("base_model.model.", "").replace(".base_layer", "").replace("adapters.default.", "")
            .replace(".default", "").replace(".weight", ""): p.grad
            for n, p in model.named_parameters() if p.grad is not None
        }  # fmt: skip
        found[name] = out.detach(), grads
    assert_close(found["ours"][0], found["theirs"][0])
    mine = {
        re.sub(r"embed_tokens\.lora_([AB])", r"embed_tokens.lora_embedding_\1", k): v
        for k, v in found["ours"][1].items()
    }
    assert mine.keys() == found["theirs"][1].keys()
    for key, value in found["theirs"][1].items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-6)
    assert float((found["ours"][0] - logits(MODELS[case][0]())).abs().max()) > 1e-3


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", [*FROM_BASE, "orthogonal", "loftq", "eva"])
def test_a_step_trains_the_factors_and_nothing_else(init: str, dora: bool) -> None:
    model = adapted("llama", init, use_dora=dora)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    plain = tiny_llama()
    same = {k: v for k, v in config("llama", init).items() if k not in ("init_lora_weights", "loftq_config")}
    fxpeft.add_adapter(plain, LoraConfig(use_dora=dora, **same))
    assert trainable == {n for n, p in plain.named_parameters() if p.requires_grad}
    assert fxpeft.trainable_parameters(model, show=False) == fxpeft.trainable_parameters(plain, show=False)
    fxpeft.disable_adapters(model)
    fxpeft.enable_adapters(model)
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad}

    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(IDS).logits.log_softmax(-1).square().mean().backward()
    optimiser.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= trainable
    assert {k for k in changed if "q_proj" in k} >= {k for k in trainable if "q_proj" in k and k.endswith("lora_B")}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", FROM_BASE)
def test_copies_pickles_and_state_dicts_keep_the_start(init: str, dora: bool) -> None:
    model = trained(adapted("llama", init, use_dora=dora))
    wanted = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), wanted)
    fresh = adapted("llama", init, use_dora=dora)
    trained(fresh, seed=1)
    assert float((logits(fresh) - wanted).abs().max()) > 1e-3
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), wanted)
    for name, start in fresh.named_buffers():
        if name.endswith("lora_A0"):
            start.zero_()
    assert float((logits(fresh) - wanted).abs().max()) > 1e-4  # the start does take part


# --- slots ---


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", [*FROM_BASE, "orthogonal"])
def test_slot_equals_the_training_subgraph(case: str, init: str, dora: bool) -> None:
    model = trained(adapted(case, init, use_dora=dora))
    wanted = {1.0: logits(model)}
    fxpeft.set_scale(model, "default", 0.6)
    wanted[0.6] = logits(model)
    fxpeft.set_scale(model, "default", 1.0)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    fxpeft.prepare_hotswap(model, 12, methods=("lora", "dora"))
    for scale, value in wanted.items():
        fxpeft.set_scale(model, "default", scale)
        assert_close(logits(model), value)
    with fxpeft.disabled(model):
        assert_close(logits(model), logits(MODELS[case][0]()), terms=0)
    fxpeft.set_scale(model, "default", 1.0)
    fxpeft.release_hotswap(model)
    assert_close(logits(model), wanted[1.0], terms=1)
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) for k, v in tensors.items())


def test_a_slot_counts_the_start_too() -> None:
    model = trained(adapted("llama", "pissa"))
    wanted = logits(model)
    with pytest.raises(AdapterError, match=r"v_proj: rank 12 is above max_rank 8"):
        fxpeft.prepare_hotswap(model, 8)
    assert torch.equal(logits(model), wanted)


def test_swaps_of_such_adapters_do_not_recompile(tmp_path: Path) -> None:
    folders = []
    for i, init in enumerate(("pissa", "olora", "orthogonal")):
        values = config("llama", init) | {"target_modules": ["q_proj", "v_proj", "down_proj"]}
        model = tiny_llama()
        fxpeft.add_adapter(model, LoraConfig(**values))
        trained(model, seed=i)
        fxpeft.save_adapter(model, tmp_path / init)
        folders.append(str(tmp_path / init))
    report = assert_swaps_clean(tiny_llama(), folders, {"input_ids": IDS, "use_cache": False}, max_rank=12)
    assert report.graphs == 1


# --- what can't be started so ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "pissa", "r": 17}, r"v_proj: init_lora_weights='pissa' gives at most 16 ranks.*rank 17"),
        ({"init_lora_weights": "olora", "rank_pattern": {"v_proj": 20}}, r"v_proj: .*at most 16 ranks.*rank 20"),
        ({"init_lora_weights": "loftq", "r": 17, "loftq_config": {"loftq_bits": 8}}, r"v_proj: .*at most 16 ranks"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"v_proj": 5}}, r"v_proj: .*even rank, found 5"),
    ],
)  # fmt: skip
def test_ranks_that_a_start_cannot_have(values: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    before = picture(model, IDS)
    with pytest.raises(AdapterError, match=message):
        fxpeft.add_adapter(model, LoraConfig(target_modules=["v_proj", "q_proj"], **values))
    assert_same(before, picture(model, IDS))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "eva", "loftq"])
def test_convolutions_have_no_such_start_as_in_peft(init: str) -> None:
    values = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    with pytest.raises(AdapterError, match=rf"plane: init_lora_weights='{init}' is for linear layers"):
        fxpeft.add_adapter(conv_net(), LoraConfig(r=2, target_modules=["plane"], init_lora_weights=init, **values))
    if init != "loftq":  # PEFT's config for it needs scipy
        with pytest.raises(ValueError, match="Unknown initialization"):
            peft.get_peft_model(conv_net(), peft.LoraConfig(r=2, target_modules=["plane"], init_lora_weights=init))


@pytest.mark.parametrize(("spoil", "message"), [("nan", "NaN"), ("meta", "meta device")])
def test_weights_that_cannot_be_decomposed(spoil: str, message: str) -> None:
    model = tiny_llama()
    line = model.model.layers[1].self_attn.q_proj
    if spoil == "meta":
        line.to("meta")
    else:
        line.weight.data[3, 3] = float("nan")
    with pytest.raises(AdapterError, match=rf"layers\.1\.self_attn\.q_proj: .*{message}"):
        fxpeft.add_adapter(model, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    assert not hasattr(model, "_fxpeft")


# --- the config ---


def test_config_is_pefts_both_ways() -> None:
    ours = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(8, 3), target_modules=["q"])  # type: ignore[arg-type]
    assert ours.to_dict()["loftq_config"] == {"loftq_bits": 8, "loftq_iter": 3}
    assert LoraConfig.from_dict(ours.to_dict()) == ours
    assert ours.loftq_config == vars(peft.LoftQConfig(loftq_bits=8, loftq_iter=3))  # PEFT keeps it so too
    eva = LoraConfig(init_lora_weights="eva", eva_config={"rho": 3}, target_modules=["q"])  # type: ignore[arg-type]
    assert eva.eva_config == EvaConfig(rho=3)
    assert eva.to_dict()["eva_config"] == {**peft.EvaConfig(rho=3).__dict__}
    assert LoraConfig.from_dict(eva.to_dict()) == eva
    assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    assert LoraConfig(init_lora_weights="OLoRA").init_lora_weights == "olora"
    for cls, other in ((EvaConfig, peft.EvaConfig), (LoftQConfig, peft.LoftQConfig)):
        assert vars(cls()) == vars(other())
    needs(21, "leaves a dict for eva_config")
    assert peft.LoraConfig(init_lora_weights="eva", eva_config=eva.to_dict()["eva_config"]).eva_config.rho == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "pissa_niter_0"}, r"init_lora_weights: expected .*'pissa_niter_16'.*'pissa_niter_0'"),
        ({"init_lora_weights": "pissa_niter_x"}, r"init_lora_weights.*found 'pissa_niter_x'"),
        ({"init_lora_weights": "lora_gb"}, r"init_lora_weights.*found 'lora_gb'"),
        ({"init_lora_weights": "pissa", "lora_bias": True}, r"lora_bias=True needs"),
        ({"init_lora_weights": "loftq"}, r"'loftq' needs loftq_config"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}, r"loftq_bits: expected 4 or 8, found 2"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, r"loftq_iter: expected a positive"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"bits": 4}},
            r"LoftQConfig has no fields bits; it has loftq_b",
        ),
        ({"init_lora_weights": "loftq", "loftq_config": [4]}, r"loftq_config: expected a dict or a LoftQConfig"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, r"eva_config\.rho: expected at least 1, found 0\.5"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": "2"}}, r"eva_config\.rho: expected a number, found '2'"),
        (
            {"init_lora_weights": "eva", "eva_config": {"tau": 1.5}},
            r"eva_config\.tau: expected a number between 0 and 1",
        ),
        ({"init_lora_weights": "eva", "eva_config": {"rhoo": 2}}, r"EvaConfig has no fields rhoo"),
        ({"init_lora_weights": "eva", "eva_config": 2.0}, r"expected a EvaConfig or a dict"),
    ],
)
def test_config_values_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        LoraConfig(**values)


def test_fields_of_another_start_are_ignored_with_a_warning_as_in_peft() -> None:
    with pytest.warns(UserWarning, match=r"loftq_config has no effect with init_lora_weights=True"):
        assert LoraConfig(loftq_config={"loftq_bits": 4}).loftq_config == {}
    with pytest.warns(UserWarning, match=r"eva_config has no effect with init_lora_weights='pissa'"):
        LoraConfig(init_lora_weights="pissa", eva_config=EvaConfig())


@pytest.mark.parametrize("values", [{"init_lora_weights": "pissa"}, {"eva_config": EvaConfig()}])
def test_adalora_has_no_such_start(values: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=next(iter(values))):
        fxpeft.AdaLoraConfig(total_step=10, **values)
