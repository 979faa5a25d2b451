"""The life of adapters on a live model: add, activate, sum, switch off, scale, delete, remove, refuse."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from picture import assert_same, picture
from tiny import logits, randomise, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import fxpeft
import fxpeft.adapters.attach
from fxpeft import AdapterError, LoraConfig

IDS = token_ids()
PATTERNS: dict[str, Any] = {
    "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"v_proj": 5}, "alpha_pattern": {r"layers\.1\..*\.down_proj": 2},
}  # fmt: skip


def add(model: nn.Module, name: str, seed: int, **values: Any) -> None:
    fxpeft.add_adapter(model, LoraConfig(**(values or PATTERNS)), name)
    randomise(fxpeft.adapter_state_dict(model, name).values(), seed, scale=0.2)


def test_fresh_adapter_changes_nothing_but_names() -> None:
    model, bare = tiny_llama(), tiny_llama()
    fxpeft.add_adapter(model, LoraConfig(**PATTERNS))
    assert torch.equal(logits(model), logits(bare))
    keys = [k for k in model.state_dict() if ".adapters." not in k]
    assert keys == list(bare.state_dict())
    assert all(isinstance(m, type(bare.get_submodule(n))) for n, m in model.named_modules() if "adapters" not in n)
    randomise(fxpeft.adapter_state_dict(model).values())
    assert not torch.allclose(logits(model), logits(bare))


def test_sum_of_active_adapters_is_the_formula() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    x, bare = torch.randn(5, 6), copy.deepcopy(net)
    configs = {
        "a": LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"], alpha_pattern={"2": 3}),
        "b": LoraConfig(r=3, lora_alpha=4, target_modules=["0"], use_rslora=True),
        "c": LoraConfig(r=4, lora_alpha=6, target_modules=["2"], lora_bias=True),
    }
    scale = {("a", "0"): 5 / 2, ("a", "2"): 3 / 2, ("b", "0"): 4 / 3**0.5, ("c", "2"): 6 / 4}
    for seed, (name, config) in enumerate(configs.items()):
        fxpeft.add_adapter(net, config, name)
        randomise(fxpeft.adapter_state_dict(net, name).values(), seed)

    def expected(*names: str) -> Tensor:
        h = x
        for layer in ("0", "1", "2"):
            y = bare.get_submodule(layer)(h)
            for name in names:
                if (name, layer) in scale:
                    t = fxpeft.adapter_state_dict(net, name)
                    key = f"base_model.model.{layer}.lora"
                    bias = t.get(f"{key}_B.bias", torch.zeros(1))
                    update = h @ t[f"{key}_A.weight"].T @ t[f"{key}_B.weight"].T + bias
                    y = y + scale[name, layer] * update
            h = y
        return h

    for names in (["a"], ["b"], ["c"], ["a", "b"], ["c", "a"], ["a", "b", "c"], []):
        fxpeft.set_adapter(net, names)
        assert fxpeft.active_adapters(net) == names
        assert_close(net(x), expected(*names))
    fxpeft.set_adapter(net, ["b", "b"])
    assert fxpeft.active_adapters(net) == ["b"]


def test_enable_disable_and_with_block() -> None:
    model = tiny_llama()
    bare = logits(model)
    add(model, "a", 1)
    on = logits(model)
    fxpeft.disable_adapters(model)
    assert torch.equal(logits(model), bare)
    assert fxpeft.active_adapters(model) == ["a"]
    with fxpeft.disabled(model):
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), bare), "was off before the block"
    fxpeft.enable_adapters(model)
    with contextlib.suppress(KeyError), fxpeft.disabled(model):
        raise KeyError
    assert torch.equal(logits(model), on)


def test_delete_keeps_the_others() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    first = logits(model)
    add(model, "b", 2, r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"])
    fxpeft.set_adapter(model, ["a", "b"])
    fxpeft.delete_adapter(model, "b")
    assert fxpeft.active_adapters(model) == ["a"]
    assert torch.equal(logits(model), first)
    assert not any(".b." in k for k in model.state_dict())
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear


def test_delete_of_the_last_adapter_restores_the_model() -> None:
    model = tiny_llama()
    before = picture(model, IDS)
    add(model, "a", 1)
    fxpeft.delete_adapter(model, "a")
    assert_same(before, picture(model, IDS))
    with pytest.raises(AdapterError, match="has no adapters"):
        fxpeft.active_adapters(model)


CONFIGS: dict[str, dict[str, Any]] = {
    "patterns": PATTERNS,
    "all-linear": {"r": 2, "lora_alpha": 5, "target_modules": "all-linear", "lora_dropout": 0.3},
    "embedding": {"r": 2, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "bias": {"r": 2, "lora_alpha": 5, "target_modules": "all-linear", "bias": "all", "lora_bias": True},
}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("values", [CONFIGS["all-linear"], CONFIGS["bias"]], ids=["all-linear", "bias"])
def test_remove_restores_other_models(make: Any, values: dict[str, Any]) -> None:
    model = make()
    before = picture(model, IDS)
    add(model, "a", 1, **values)
    assert not torch.equal(logits(model), before["output"])
    fxpeft.remove(model)
    assert_same(before, picture(model, IDS))


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_remove_restores_the_model_bit_for_bit(values: dict[str, Any]) -> None:
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    before = picture(model, IDS)
    add(model, "a", 1, **values)
    add(model, "b", 2)
    fxpeft.set_adapter(model, ["b", "a"])
    assert not torch.equal(logits(model), before["output"])
    fxpeft.remove(model)
    assert_same(before, picture(model, IDS))


def tied_llama() -> LlamaForCausalLM:
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("make", [tiny_llama, tied_llama])
def test_base_is_frozen_and_gets_its_requires_grad_back(make: Any) -> None:
    model = make()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    add(model, "a", 1, r=2, lora_alpha=5, target_modules=["embed_tokens", "q_proj"])
    add(model, "b", 2)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".adapters.b." in n for n in trained)
    fxpeft.set_adapter(model, "a")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * (1 + 2)
    assert all(".adapters.a." in n for n in trained)
    fxpeft.remove(model)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (make is tied_llama)


def test_state_dict_has_pefts_keys_and_shares_memory() -> None:
    model = tiny_llama()
    add(model, "a", 1, r=2, lora_alpha=5, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    found = fxpeft.adapter_state_dict(model)
    site = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    names = [site.format(i, f) for i in (0, 1) for f in "AB"] + ["base_model.model.lm_head.weight"]
    names += [f"base_model.model.model.embed_tokens.lora_embedding_{f}" for f in "AB"]
    assert sorted(found) == sorted(names)
    before = logits(model)
    found[site.format(0, "B")].zero_()
    assert not torch.equal(logits(model), before)


def test_trainable_parameters_are_counted_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    base = sum(p.numel() for p in model.parameters())
    assert fxpeft.trainable_parameters(model, show=False) == fxpeft.adapters.parameters.ParameterCount(base, base)
    assert capsys.readouterr().out == ""
    add(model, "a", 1, r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5})
    count = 2 * (3 * (32 + 32) + 5 * (32 + 16))
    counted = fxpeft.trainable_parameters(model)
    assert (counted.trainable, counted.total) == (count, base + count)
    share = 100 * count / (base + count)
    line = f"trainable params: {count:,} || all params: {base + count:,} || trainable%: {share:.4f}\n"
    assert capsys.readouterr().out == line
    fxpeft.set_adapter(model, [])
    assert fxpeft.trainable_parameters(model, show=False).trainable == 0


def test_scale_multiplies_the_adapters_own() -> None:
    x, net = torch.randn(3, 6), nn.Sequential(nn.Linear(6, 4))
    bare = net(x)
    add(net, "a", 1, r=2, lora_alpha=5, target_modules=["0"])
    add(net, "b", 2, r=3, lora_alpha=4, target_modules=["0"])
    updates = {}
    for name in "ab":
        fxpeft.set_adapter(net, name)
        updates[name] = net(x) - bare
    fxpeft.set_adapter(net, ["a", "b"])
    fxpeft.set_scale(net, "a", -0.5)
    torch.testing.assert_close(net(x), bare - 0.5 * updates["a"] + updates["b"])
    fxpeft.set_scale(net, "a", 2.0)  # not cumulative
    fxpeft.set_scale(net, "b", 0.0)
    torch.testing.assert_close(net(x), bare + 2 * updates["a"])
    with pytest.raises(AdapterError, match="no adapter named 'c'; loaded: a, b"):
        fxpeft.set_scale(net, "c", 1.0)


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_bias_is_the_adapters_and_the_bases_own_stay(mode: str) -> None:
    model = tiny_bert()
    own = {k: v.clone() for k, v in model.state_dict().items()}
    bare = logits(model)
    add(model, "a", 1, r=2, lora_alpha=5, target_modules=["query", "value"], bias=mode)
    found = fxpeft.adapter_state_dict(model)
    biases = [k for k in found if k.endswith(".bias")]
    assert len(biases) == (4 if mode == "lora_only" else sum(k.endswith(".bias") for k in own))
    trained = logits(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in own.items())
    for key in found.keys() - set(biases):
        found[key].zero_()
    assert not torch.allclose(logits(model), bare), "the biases alone have an effect"
    assert not torch.allclose(logits(model), trained)
    with fxpeft.disabled(model):
        assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("name", ["my-adapter", "1", "_1-", "lora_A", "adapters", "a" * 128])
def test_odd_names_work(name: str) -> None:
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    bare = net(x)
    add(net, name, 1, r=2, lora_alpha=5, target_modules=["0"], bias="lora_only")
    assert not torch.allclose(net(x), bare)
    fxpeft.delete_adapter(net, name)
    assert torch.equal(net(x), bare)


# --- what is refused ---


@pytest.mark.parametrize(
    "name", ["", "a.b", "a b", "éa", "a/b", "forward", "weight_norm.", "train", "_parameters", "class", "None"]
)
def test_name_that_cannot_be_an_attribute(name: str) -> None:
    model = tiny_llama()
    before = picture(model, IDS)
    with pytest.raises(AdapterError, match="adapter name"):
        fxpeft.add_adapter(model, LoraConfig(**PATTERNS), name)
    assert_same(before, picture(model, IDS))


def test_taken_and_unknown_names() -> None:
    model = tiny_llama()
    with pytest.raises(AdapterError, match="LlamaForCausalLM has no adapters: call add_adapter"):
        fxpeft.set_adapter(model, "a")
    add(model, "a", 1)
    before = picture(model, IDS)
    with pytest.raises(AdapterError, match="an adapter named 'a' already"):
        fxpeft.add_adapter(model, LoraConfig(**PATTERNS), "a")
    for call in (fxpeft.set_adapter, fxpeft.delete_adapter, fxpeft.adapter_state_dict):
        with pytest.raises(AdapterError, match="no adapter named 'b'; loaded: a"):
            call(model, "b")
    with pytest.raises(AdapterError, match="no adapter named 'b'"):
        fxpeft.set_adapter(model, ["a", "b"])
    assert_same(before, picture(model, IDS))


@pytest.mark.parametrize(
    ("values", "path"), [({"modules_to_save": ["classifier"]}, "classifier"), ({"bias": "lora_only"}, "0.*query.bias")]
)
def test_adapters_that_bring_the_same_module_cannot_be_active_together(values: dict[str, Any], path: str) -> None:
    model = tiny_bert()
    config = {"r": 2, "lora_alpha": 5, "target_modules": ["query"], **values}
    add(model, "a", 1, **config)
    add(model, "b", 2, **config)
    before = picture(model, IDS)
    with pytest.raises(AdapterError, match=rf"(?s)can't be active together.*{path}: a and b"):
        fxpeft.set_adapter(model, ["a", "b"])
    assert_same(before, picture(model, IDS))
    fxpeft.set_adapter(model, "a")
    assert not torch.equal(logits(model), before["output"])


def test_several_active_need_a_name_to_save(tmp_path: Path) -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2)
    fxpeft.set_adapter(model, ["a", "b"])
    with pytest.raises(AdapterError, match="2 adapters are active; say which one: a, b"):
        fxpeft.save_adapter(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class Attention(nn.Module):
    """nn.MultiheadAttention between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention, self.norm = nn.Linear(6, 8), nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
        self.after = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.after(self.norm(self.attention(h, h, h)[0]))


def test_multihead_attention_is_refused_by_name_and_skipped_by_all_linear() -> None:
    net = Attention()
    with pytest.raises(AdapterError, match=r"attention\.out_proj: nn\.MultiheadAttention reads .*exclude_modules"):
        fxpeft.add_adapter(net, LoraConfig(target_modules=["before", "out_proj"]))
    assert "_fxpeft" not in vars(net)
    fxpeft.add_adapter(net, LoraConfig(r=2, target_modules="all-linear"))
    assert {k.split(".")[2] for k in fxpeft.adapter_state_dict(net)} == {"before", "after"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("norm", r"norm: LayerNorm is no kind of target: expected linear.*exclude_modules"),
        ("attention", r"attention: MultiheadAttention is no kind of target"),
    ],
)
def test_module_of_no_known_kind_is_refused(target: str, message: str) -> None:
    net = Attention()
    with pytest.raises(AdapterError, match=message):
        fxpeft.add_adapter(net, LoraConfig(target_modules=["before", target]))
    assert "_fxpeft" not in vars(net)


def test_a_whole_block_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.mlp: LlamaMLP is no kind of target"):
        fxpeft.add_adapter(model, LoraConfig(target_modules=["q_proj", "mlp"]))


def test_nothing_found_lists_the_nearest_names() -> None:
    with pytest.raises(AdapterError, match=r"(?s)no module.*\['q_prj'\].*nearest names: q_proj") as caught:
        fxpeft.add_adapter(tiny_llama(), LoraConfig(target_modules=["q_prj"]))
    assert "v_proj" in str(caught.value)


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_inside_install_leaves_the_model_as_it_was(
    adapted: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = tiny_llama(), 0
    if adapted:
        add(model, "first", 1)
    before = picture(model, IDS)
    real = fxpeft.adapters.attach.rewrite_module

    def fail(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("third site")
        real(*args, **kwargs)

    monkeypatch.setattr("fxpeft.adapters.attach.rewrite_module", fail)
    with pytest.raises(error, match="third site"):
        fxpeft.add_adapter(model, LoraConfig(r=2, lora_alpha=5, target_modules="all-linear"), "second")
    assert_same(before, picture(model, IDS))


def test_functional_weight_read_elsewhere_is_not_confused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.inner(x), self.inner.weight.t())

    net = Tied()
    x = torch.randn(3, 6)
    add(net, "a", 1, r=2, lora_alpha=5, target_modules=["inner"])
    torch.testing.assert_close(net(x), net.inner(x) @ net.inner.weight)
