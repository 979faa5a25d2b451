"""Folding: in place, all or nothing, exactly undone; what it refuses; and what else a folded model does."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import allowed, assert_close
from picture import assert_same, picture
from tiny import logits, randomise, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxpeft
from fxpeft import AdaLoraConfig, AdapterError, IA3Config, LoraConfig

IDS = token_ids()
EVERYTHING = ("lora", "lora_bias", "dora", "ia3", "adalora")
LORA: dict[str, Any] = {
    "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 5},
    "alpha_pattern": {r"layers\.1\..*\.down_proj": 2},
}  # fmt: skip


def add(model: nn.Module, name: str, seed: int, config: fxpeft.methods.config.AdapterConfig | None = None) -> None:
    fxpeft.add_adapter(model, config or LoraConfig(**LORA), name)
    randomise(fxpeft.adapter_state_dict(model, name).values(), seed)


def test_fold_takes_the_adapter_out_of_the_forward() -> None:
    model, bare = tiny_llama(), tiny_llama()
    add(model, "a", 1)
    running = logits(model)
    fxpeft.fold(model)
    assert [type(m) for m in bare.modules()] == [type(m) for n, m in model.named_modules() if ".adapters" not in n]
    assert_close(logits(model), running)
    assert float((logits(bare) - running).abs().max()) > 0.1
    assert not any(p.requires_grad for p in model.parameters())
    fxpeft.unfold(model)
    assert torch.equal(logits(model), running)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".adapters." in n)


def test_remove_unfolds_and_restores_everything() -> None:
    model = tiny_llama()
    before = picture(model, IDS)
    add(model, "a", 1, LoraConfig(**LORA, modules_to_save=["lm_head"]))
    fxpeft.fold(model)
    fxpeft.remove(model)
    assert_same(before, picture(model, IDS))


MIXES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "two loras": (tiny_llama, {"a": LoraConfig(**LORA), "b": LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"])}),
    "gains below": (
        tiny_bert,
        {
            "a": IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
            "b": LoraConfig(r=2, lora_alpha=5, target_modules=["query", "output.dense"], lora_bias=True),
        },
    ),
    "gains above": (
        tiny_bert,
        {
            "b": LoraConfig(r=2, lora_alpha=5, target_modules=["query", "output.dense"], lora_bias=True),
            "a": IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
        },
    ),
    "dora above, a bias brought": (
        tiny_gpt2,
        {
            "b": LoraConfig(r=2, lora_alpha=5, target_modules=["c_fc"], bias="all"),
            "c": AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["c_attn"]),
            "a": LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], use_dora=True),
        },
    ),
    "dora with dropout above": (
        tiny_llama,
        {
            "a": LoraConfig(**LORA),
            "b": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], use_dora=True, lora_dropout=0.5),
        },
    ),
    "a site in a module that another adapter brings": (
        tiny_bert,
        {
            "a": LoraConfig(r=2, lora_alpha=5, target_modules=["query"], modules_to_save=["pooler"]),
            "b": LoraConfig(r=2, lora_alpha=5, target_modules=["key", "pooler.dense"]),
        },
    ),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("keep", ["original", "delta"])
def test_several_fold_in_the_order_of_the_forward(mix: Any, keep: Any) -> None:
    model = mix[0]()
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    for seed, (name, config) in enumerate(mix[1].items()):
        add(model, name, seed, config)
    fxpeft.set_adapter(model, list(mix[1]))
    running = logits(model)
    fxpeft.fold(model, keep=keep)
    assert_close(logits(model), running)
    fxpeft.unfold(model)
    assert fxpeft.active_adapters(model) == list(mix[1])
    for key, value in model.state_dict().items():
        if key in bare and keep == "original":
            assert torch.equal(value, bare[key])
        elif key in bare:
            gain = any("gain" in n for n, m in MIXES.items() if m is mix)  # divided by again, and one may be near zero
            atol = 2e-4 * max(1.0, float(bare[key].abs().max())) if gain else allowed(bare[key], terms=1, size=1.0)
            torch.testing.assert_close(value, bare[key], rtol=0, atol=atol)
    assert_close(logits(model), running)


def test_folding_a_part_leaves_the_rest_on_top() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2)
    fxpeft.set_adapter(model, ["a", "b"])
    running = logits(model)
    fxpeft.fold(model, "b")
    assert (fxpeft.active_adapters(model), fxpeft.folded_adapters(model)) == (["a"], ["b"])
    assert_close(logits(model), running)
    fxpeft.set_adapter(model, [])
    alone = logits(model)
    fxpeft.unfold(model)
    assert fxpeft.active_adapters(model) == ["b"]
    assert_close(logits(model), alone)


def test_a_gain_above_what_stays_is_refused() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2, IA3Config(target_modules=["v_proj", "k_proj"], feedforward_modules=[]))
    fxpeft.set_adapter(model, ["a", "b"])
    before = logits(model)
    with pytest.raises(AdapterError, match=r"v_proj: a comes before b"):
        fxpeft.fold(model, "b")
    assert torch.equal(logits(model), before)
    fxpeft.fold(model, "a")  # from below there is no question
    assert_close(logits(model), before)


def test_dora_reads_the_folded_base() -> None:
    """On top of a folded adapter, live and in slots: a DoRA's gain is one of the weights that are there."""
    outputs = []
    for slots in (False, True):
        model = tiny_llama()
        add(model, "dora", 2, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_dora=True))
        add(model, "a", 1)
        if slots:
            fxpeft.prepare_hotswap(model, 8, methods=EVERYTHING)
        fxpeft.fold(model, "a")
        fxpeft.set_adapter(model, "dora")
        outputs.append(logits(model))
        fxpeft.set_adapter(model, [])
        fxpeft.refold(model, [])
        fxpeft.set_adapter(model, "dora")
        outputs.append(logits(model))
    alone = tiny_llama()
    add(alone, "dora", 2, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_dora=True))
    assert_close(outputs[0], outputs[2])
    assert_close(outputs[1], logits(alone))
    assert_close(outputs[3], logits(alone))
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-2


def test_slots_show_the_folded_base() -> None:
    """A prepared model has copies of the modules and biases that adapters may bring."""
    model = tiny_gpt2()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["c_fc"], bias="all", modules_to_save=["ln_f"])
    add(model, "a", 1, config)
    live = logits(model)
    fxpeft.prepare_hotswap(model, 4)
    fxpeft.fold(model)
    assert_close(logits(model), live)
    fxpeft.unfold(model)
    assert_close(logits(model), live)
    fxpeft.disable_adapters(model)
    assert torch.equal(logits(model), logits(tiny_gpt2()))


def test_strength_counts() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    fxpeft.set_scale(model, "a", -0.4)
    running = logits(model)
    fxpeft.fold(model)
    assert_close(logits(model), running)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_delta_drifts_by_rounding_only(dtype: torch.dtype, bound: float) -> None:
    model = tiny_llama(dtype)
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    add(model, "a", 1)
    changed = 0.0
    for _ in range(5):
        fxpeft.fold(model, keep="delta")
        assert not fxpeft.adapters.state.state_of(model).folded.originals
        folded = model.state_dict()
        changed = max(changed, *(float((folded[k] - v).abs().max()) for k, v in bare.items()))
        fxpeft.unfold(model)
    drift = max(float((model.state_dict()[k] - v).abs().max()) for k, v in bare.items())
    assert changed > 0.5
    assert 0 < drift < bound * changed, (drift, changed)


def test_delta_can_not_divide_by_zero() -> None:
    model = tiny_llama()
    add(model, "a", 1, IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    next(iter(fxpeft.adapter_state_dict(model).values()))[3] = 0
    before = logits(model)
    with pytest.raises(AdapterError, match=r"g_out holds zeros.*keep='original'"):
        fxpeft.fold(model, keep="delta")
    fxpeft.fold(model)
    fxpeft.unfold(model)
    assert torch.equal(logits(model), before)


def test_for_good() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    running = logits(model)
    fxpeft.fold(model, keep=None)
    assert_close(logits(model), running)
    with pytest.raises(AdapterError, match="a was folded with keep=None, so nothing was kept"):
        fxpeft.unfold(model)
    with pytest.raises(AdapterError, match="add it twice; it stays there"):
        fxpeft.set_adapter(model, "a")
    with pytest.raises(AdapterError, match="add it twice"):
        fxpeft.refold(model, "a")
    add(model, "b", 2)
    on_top = logits(model)
    fxpeft.fold(model)
    assert fxpeft.folded_adapters(model) == ["a", "b"]
    fxpeft.unfold(model)
    assert torch.equal(logits(model), on_top)
    fxpeft.delete_adapter(model, "b")
    fxpeft.delete_adapter(model, "a")
    assert_close(logits(model), running)
    assert "_fxpeft" not in vars(model)


@pytest.mark.parametrize("slots", [False, True], ids=["live", "slots"])
def test_merge_and_unload_leaves_a_plain_model(slots: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    attributes = [sorted(vars(m)) for m in model.modules()]
    add(model, "unused", 3)
    add(model, "a", 1)
    add(model, "b", 2)
    if slots:
        fxpeft.prepare_hotswap(model, 16)
    fxpeft.fold(model, "a")
    fxpeft.set_adapter(model, "b")
    running = logits(model)
    assert fxpeft.merge_and_unload(model, ["a", "b"]) is model
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert all(p.requires_grad for p in model.parameters())
    assert_close(logits(model), running)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))


def test_merge_and_unload_refuses_before_anything_changed() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2)
    fxpeft.fold(model, "a")
    before = picture(model, IDS)
    with pytest.raises(AdapterError, match="no adapter named 'c'"):
        fxpeft.merge_and_unload(model, "c")
    assert_same(before, picture(model, IDS))
    assert fxpeft.folded_adapters(model) == ["a"]


# --- what is refused ---


def test_safe_refuses_nan_and_names_the_weight() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    fxpeft.adapter_state_dict(model)[key][2, 1] = torch.nan
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"NaN or infinity in\n  model\.layers\.1\.self_attn\.v_proj\.weight\n"):
        fxpeft.fold(model, safe=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if ".adapters." not in k)
    assert fxpeft.active_adapters(model) == ["a"]
    fxpeft.fold(model)
    assert model.model.layers[1].self_attn.v_proj.weight.isnan().any()


def test_an_error_while_writing_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    add(model, "a", 1)
    before, running = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    for failing in ("exchange", "switch"):
        with monkeypatch.context() as patch:
            if failing == "exchange":
                copies, copy_ = [], Tensor.copy_

                def breaks(self: Tensor, *args: Any, copies: list[int] = copies, copy_: Any = copy_) -> Tensor:
                    copies.append(1)
                    if len(copies) == 4:
                        raise MemoryError
                    return copy_(self, *args)

                patch.setattr(Tensor, "copy_", breaks)
            else:
                calls, switch = [], fxpeft.transform.writing.switch

                def once(*args: Any, calls: list[int] = calls, switch: Any = switch) -> None:
                    calls.append(1)
                    if len(calls) == 1:
                        raise MemoryError
                    switch(*args)

                patch.setattr(fxpeft.transform.writing, "switch", once)
            with pytest.raises(MemoryError):
                fxpeft.fold(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert torch.equal(logits(model), running)
        assert fxpeft.folded_adapters(model) == []


def test_tied_weights_are_refused_or_right() -> None:
    model = tiny_gpt2()
    add(model, "a", 1, LoraConfig(r=2, lora_alpha=3, target_modules=["wte", "c_attn"]))
    before = picture(model, IDS)
    with pytest.raises(AdapterError, match=r"tied.*\n  transformer\.wte\.weight = lm_head\.weight\n.*untie them first"):
        fxpeft.fold(model)
    assert_same(before, picture(model, IDS))
    add(model, "head", 1, LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn"], modules_to_save=["lm_head"]))
    with pytest.raises(AdapterError, match="tied"):
        fxpeft.fold(model)
    fxpeft.set_adapter(model, "a")
    running = logits(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    fxpeft.fold(model)
    assert_close(logits(model), running)


def test_tied_weights_that_change_alike_stay_tied() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 3), nn.Linear(5, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) * self.two(x)

    net, x = Twins(), torch.randn(4, 5)
    bare = net.one.weight.detach().clone()
    fxpeft.add_adapter(net, LoraConfig(r=2, lora_alpha=3, target_modules=["one", "two"]), "a")
    own = fxpeft.adapter_state_dict(net)
    randomise(own.values(), 1)
    with pytest.raises(AdapterError, match=r"one\.weight = two\.weight"):
        fxpeft.fold(net)
    for key in own:
        own[key].copy_(own[key.replace(".two.", ".one.")])
    for keep in ("original", "delta"):
        running = net(x)
        fxpeft.fold(net, keep=keep)
        assert net.one.weight is net.two.weight
        assert_close(net(x), running)
        fxpeft.unfold(net)
        assert torch.allclose(net.one.weight, bare, atol=0 if keep == "original" else 1e-6)


def test_weights_that_overlap_in_memory_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
    flat = torch.randn(18)
    net[0].weight, net[1].weight = nn.Parameter(flat[:12].view(4, 3)), nn.Parameter(flat[6:].view(3, 4))
    fxpeft.add_adapter(net, LoraConfig(r=2, target_modules=["0"]), "a")
    with pytest.raises(AdapterError, match=r"0\.weight = 1\.weight"):
        fxpeft.fold(net)
    net[1].weight = nn.Parameter(torch.randn(3, 4))
    fxpeft.fold(net)


def test_a_bias_that_the_base_lacks() -> None:
    model = tiny_llama()
    add(model, "a", 1, LoraConfig(**LORA, lora_bias=True))
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: the adapter adds a bias and the base has"):
        fxpeft.fold(model)
    for key, value in fxpeft.adapter_state_dict(model).items():
        if key.endswith("lora_B.bias"):
            value.zero_()
    running = logits(model)
    fxpeft.fold(model)
    assert_close(logits(model), running)


class Doubled(nn.Linear):
    """A linear that scales its product, where torch.fx can see it, or not."""

    hidden = False

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden and float(x.sum()) > 1e9:  # control flow on data: no trace
            return x
        return nn.functional.linear(x, self.weight, self.bias) * 2 + self.weight.shape[0]


class ReadsTwice(nn.Linear):
    """A linear that looks at its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) / self.weight.abs().max()


class Quantised(nn.Linear):
    """A linear with integer weights."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight = nn.Parameter(torch.ones(self.weight.shape, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float(), self.bias)


def fits(module: nn.Module, x: Tensor, **config: Any) -> None:
    """A fold of one module computes what its adapter did."""
    net = nn.Sequential(module).eval()
    add(net, "a", 1, LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **config))
    running = net(x)
    fxpeft.fold(net)
    assert_close(net(x), running)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), "grouped convolution"),
    "circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), "pads with zeros"),
    "reflected point": (lambda: nn.Conv1d(4, 6, 1, padding=1, padding_mode="replicate"), "pads with zeros"),
    "dilated same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), "without dilation"),
    "max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), "rescales"),
    "opaque": (lambda: type("Opaque", (Doubled,), {"hidden": True})(5, 3), "can't look into Opaque.forward"),
    "reads twice": (lambda: ReadsTwice(5, 3), "for something else"),
    "quantised": (lambda: Quantised(5, 3), r"int8.*dequantise|can't look into"),
    "offloaded": (lambda: nn.Linear(5, 3, device="meta"), "offloaded"),
    "parametrised": (
        lambda: parametrize.register_parametrization(nn.Linear(5, 3), "weight", nn.Tanh()),
        "computed when it is read|can't look into",
    ),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(build: Callable[[], nn.Module], reason: str) -> None:
    net = nn.Sequential(build())
    fxpeft.add_adapter(net, LoraConfig(r=2, lora_alpha=3, target_modules="0"), "a")
    bound = type(net[0])
    with pytest.raises(AdapterError, match=rf"a can't be folded .* nothing was changed\.\n  0: .*({reason})"):
        fxpeft.fold(net)
    assert type(net[0]) is bound
    assert fxpeft.active_adapters(net) == ["a"]


def test_allowed() -> None:
    """The neighbours of what is refused."""
    fits(nn.Conv1d(4, 6, 3, padding_mode="circular"), torch.randn(2, 4, 8))
    fits(nn.Conv2d(4, 6, 1, padding="same", dilation=2), torch.randn(2, 4, 5, 6))
    fits(nn.Conv2d(4, 6, 3, padding=2, dilation=2), torch.randn(2, 4, 7, 6))
    fits(nn.Embedding(9, 4, padding_idx=0), torch.arange(9))
    fits(Doubled(5, 3), torch.randn(2, 5))
    fits(nn.Linear(5, 3).double(), torch.randn(2, 5, dtype=torch.double))
    fits(nn.Conv1d(4, 6, 3, padding=1, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.double), use_dora=True)


@pytest.mark.parametrize("feedforward", [[], ["0"]], ids=["output", "input"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_gains_of_grouped_and_padded_convolutions_fold(feedforward: list[str], padding_mode: Any) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode=padding_mode))
    x, bare = torch.randn(2, 4, 5, 6), copy.deepcopy(net)
    add(net, "a", 1, IA3Config(target_modules=["0"], feedforward_modules=feedforward))
    running = net(x)
    fxpeft.fold(net)
    assert_close(net(x), running, terms=1)
    assert float((running - bare(x)).abs().max()) > 0.1


# --- a folded model ---


def test_what_a_folded_model_refuses() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2)
    fxpeft.fold(model, "a")
    for call in (
        lambda: fxpeft.set_adapter(model, ["b", "a"]),
        lambda: fxpeft.set_scale(model, "a", 2),
        lambda: fxpeft.delete_adapter(model, "a"),
        lambda: fxpeft.disable_adapters(model),
        lambda: fxpeft.convert(model, "a"),
    ):
        with pytest.raises(AdapterError, match=r"'a' is folded into the base's weights.*unfold the model first"):
            call()
    with pytest.raises(AdapterError, match="a is folded already"):
        fxpeft.fold(model, "b")
    with pytest.raises(AdapterError, match="keep: expected"):
        fxpeft.fold(model, keep="originals")
    fxpeft.unfold(model)
    with pytest.raises(AdapterError, match="no adapter is folded"):
        fxpeft.unfold(model)
    fxpeft.disable_adapters(model)
    with pytest.raises(AdapterError, match="switched off"):
        fxpeft.fold(model)
    fxpeft.enable_adapters(model)
    fxpeft.set_adapter(model, [])
    with pytest.raises(AdapterError, match="no adapter is active; say which to fold: a, b"):
        fxpeft.fold(model)


def test_unfold_refuses_adapters_that_can_not_run_together() -> None:
    model = tiny_llama()
    for seed, name in enumerate("ab"):
        add(model, name, seed, LoraConfig(**LORA, modules_to_save=["lm_head"]))
    fxpeft.fold(model, "a")
    fxpeft.set_adapter(model, "b")
    before = logits(model)
    with pytest.raises(AdapterError, match="each brings its own\n  lm_head: a and b"):
        fxpeft.unfold(model)
    assert torch.equal(logits(model), before)
    fxpeft.refold(model, "b")
    assert fxpeft.folded_adapters(model) == ["b"]
    fxpeft.unfold(model)
    assert torch.equal(model.state_dict()["lm_head.weight"], tiny_llama().lm_head.weight)  # its attribute is b's
    assert not torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "half"])
def test_a_copy_unfolds_on_its_own(way: str, tmp_path: Path) -> None:
    model = tiny_llama()
    add(model, "a", 1)
    fxpeft.fold(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        other = copy.deepcopy(model).to(torch.bfloat16)
    folded = logits(model)
    fxpeft.remove(other)
    bare = tiny_llama() if way != "half" else tiny_llama().to(torch.bfloat16)
    assert all(torch.equal(v, bare.state_dict()[k]) for k, v in other.state_dict().items())
    assert torch.equal(logits(model), folded)


def test_refold_is_exact_however_often() -> None:
    model = tiny_llama()
    names = {"a": LoraConfig(**LORA), "b": LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "o_proj"])}
    names["c"] = LoraConfig(r=2, lora_alpha=5, target_modules=["k_proj"], modules_to_save=["lm_head"])
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    expected = {"": logits(model)}
    for seed, (name, config) in enumerate(names.items()):
        add(model, name, seed, config)
        expected[name] = logits(model)
    places = [p.data_ptr() for n, p in model.named_parameters() if ".adapters." not in n]
    first: dict[str, Tensor] = {}
    for i in range(100):
        name = "abc "[i * 7 % 4].strip()
        fxpeft.refold(model, name or [])
        assert fxpeft.folded_adapters(model) == ([name] if name else [])
        assert fxpeft.active_adapters(model) == []
        if i < 8:
            assert_close(logits(model), expected[name])
            assert torch.equal(first.setdefault(name, logits(model)), logits(model))
    fxpeft.refold(model, ["a", "b"])
    fxpeft.unfold(model)
    assert fxpeft.active_adapters(model) == ["a", "b"]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in bare.items())
    assert places == [p.data_ptr() for n, p in model.named_parameters() if ".adapters." not in n]


def test_a_refold_that_fails_leaves_the_old_one() -> None:
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2, LoraConfig(**LORA, lora_bias=True))
    fxpeft.refold(model, "a")
    before = logits(model)
    with pytest.raises(AdapterError, match="adds a bias and the base has none"):
        fxpeft.refold(model, "b")
    assert torch.equal(logits(model), before)
    assert fxpeft.folded_adapters(model) == ["a"]
    with torch._inductor.config.patch(freezing=True), pytest.raises(AdapterError, match="freezing"):
        fxpeft.refold(model, [])
    fxpeft.remove(model)
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_refold_of_a_delta_and_of_tied_sites() -> None:
    model = tiny_llama()
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    add(model, "a", 1)
    add(model, "b", 2)
    running = logits(model)
    fxpeft.fold(model, "a", keep="delta")
    fxpeft.refold(model, "b")
    assert_close(logits(model), running)
    fxpeft.unfold(model)
    for key, value in bare.items():
        assert_close(model.state_dict()[key], value, terms=1, size=1.0)  # the update's


def test_forwards_of_other_threads_see_one_adapter_whole() -> None:
    """On a prepared model a fold is one swap under its lock."""
    model = tiny_llama()
    add(model, "a", 1)
    add(model, "b", 2)
    fxpeft.prepare_hotswap(model, 8)
    expected = []
    for name in ("a", "b"):
        fxpeft.set_adapter(model, name)
        expected.append(logits(model))
    seen: list[Tensor] = []
    failed: list[BaseException] = []
    done = threading.Event()

    def forward() -> None:
        try:
            while not done.is_set():
                seen.append(logits(model))
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failed.append(error)

    thread = threading.Thread(target=forward)
    thread.start()
    swaps = 0
    while swaps < 20 or (len(seen) < 4 and thread.is_alive()):  # a busy machine may give the thread few turns
        fxpeft.refold(model, "ab"[swaps % 2])
        fxpeft.unfold(model)
        swaps += 1
    done.set()
    thread.join()
    assert not failed
    assert len(seen) > 3
    assert all(any(torch.allclose(s, e, atol=1e-4) for e in expected) for s in seen)


def test_a_prompt_is_no_weight() -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, fxpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "prompt")
    running = logits(model)
    with pytest.raises(AdapterError, match="prompt: a prompt adds tokens and changes no weight"):
        fxpeft.fold(model)
    with pytest.raises(AdapterError, match="a prompt adds tokens, which no LoRA does"):
        fxpeft.convert(model, "prompt")
    add(model, "a", 1)
    with pytest.raises(AdapterError, match="only LoRAs can be blended, found\n  prompt: prompt_tuning"):
        fxpeft.add_weighted_adapter(model, ["a", "prompt"], [1.0, 1.0], "c")
    fxpeft.fold(model)
    fxpeft.set_adapter(model, "prompt")
    assert float((logits(model) - running).abs().max()) > 0.01  # it runs on the folded base
    fxpeft.unfold(model)
    fxpeft.set_adapter(model, "prompt")
    assert torch.equal(logits(model), running)
