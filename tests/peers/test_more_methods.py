"""What PEFT's other methods have beside what all methods are asked for in tests/peers/test_methods.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import add, spread
from closeness import assert_close
from method_cases import KINDS, KindCase, grads_of, output
from peft.tuners.lokr.layer import factorization
from tiny import logits, randomise, tiny_gpt2, tiny_llama, token_ids
from torch import nn

import fxpeft
from fxpeft.methods.lokr import two_factors

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = ["first", "second"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Linear", {"decompose_both": True, "r": 1, "decompose_factor": 1}),
        ("Linear", {"r": 9}),  # W2 is one matrix
        ("Conv1d", {"r": 9}),  # and of three dimensions
        ("Conv2d", {"r": 9}),
        ("Conv1d", {"r": 2, "use_effective_conv2d": True}),
        ("Conv2d", {"r": 2, "use_effective_conv2d": True, "decompose_factor": 1}),
    ],
)
def test_every_form_of_lokr(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    net, x = KINDS[kind].net(), KINDS[kind].input()
    add(net, fxpeft.LoKrConfig(alpha=3, target_modules=BOTH, **settings))
    wanted = output(net, x)
    assert (wanted - output(KINDS[kind].net(), x)).abs().max() > 0.01
    fxpeft.save_adapter(net, tmp_path)
    peer = peft.PeftModel.from_pretrained(KINDS[kind].net(), str(tmp_path), is_trainable=True).eval()
    assert_close(output(peer, x), wanted)
    grads_of(peer, net, lambda each: each(x).square().mean())
    fxpeft.prepare_hotswap(net, 8, methods=("lokr",))
    assert_close(output(net, x), wanted)


def test_sizes_are_taken_apart_as_in_peft() -> None:
    for size in (1, 2, 12, 127, 128, 320, 640, 1280, 4096, 11008):
        for factor in (-1, 1, 2, 4, 7, 8, 16, 100):
            assert two_factors(size, factor) == factorization(size, factor)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d"])
def test_loha_of_a_kernel(kind: str, tmp_path: Path) -> None:
    """PEFT's own backward of this form takes one product's factors for the other's, so differences are the measure."""
    net, x = KINDS[kind].net(), KINDS[kind].input()
    add(net, fxpeft.LoHaConfig(r=2, alpha=3, target_modules=BOTH, use_effective_conv2d=True))
    wanted = output(net, x)
    assert (wanted - output(KINDS[kind].net(), x)).abs().max() > 0.01
    fxpeft.save_adapter(net, tmp_path)
    peer = peft.PeftModel.from_pretrained(KINDS[kind].net(), str(tmp_path), is_trainable=True).eval()
    assert_close(output(peer, x), wanted)
    peer, x = peer.double(), x.double()
    net.double()(x).square().mean().backward()
    for name, p in net.first.adapters.default.named_parameters():
        theirs, way, ends = getattr(peer.base_model.model.first, name)["default"], torch.randn_like(p), []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                theirs.add_(way, alpha=step)
                ends.append(peer(x).square().mean())
                theirs.add_(way, alpha=-step)
        assert p.grad is not None
        assert_close((p.grad * way).sum().float(), ((ends[0] - ends[1]) / 2e-4).float(), size=1.0)
    net.float()
    fxpeft.prepare_hotswap(net, 8, methods=("loha",))
    assert_close(output(net, x.float()), wanted)


@pytest.mark.parametrize("config", [fxpeft.LoHaConfig, fxpeft.LoKrConfig])
@pytest.mark.parametrize("dropout", [{"rank_dropout": 0.5}, {"module_dropout": 0.5}])
def test_what_peft_drops_is_dropped(config: Any, dropout: dict[str, float], tmp_path: Path) -> None:
    net, x = KINDS["Linear"].net(), torch.randn(4, 6)
    add(net, config(r=3, alpha=3, target_modules=["first"], **dropout))
    fxpeft.save_adapter(net, tmp_path)
    peer = peft.PeftModel.from_pretrained(KINDS["Linear"].net(), str(tmp_path), is_trainable=True)
    off = on = 0
    for seed in range(8):
        found = []
        for each in (net.train(), peer.train()):
            torch.manual_seed(seed)
            found.append(output(each, x))
        assert_close(*found)
        changed = not torch.allclose(found[0], output(net.eval(), x))
        on, off = on + (not changed), off + changed
    assert off
    assert on or "rank_dropout" in dropout


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (fxpeft.LoHaConfig, peft.LoHaConfig, {"r": 3}),
        (fxpeft.MissConfig, peft.MissConfig, {"r": 4, "init_weights": False}),
        (fxpeft.LoKrConfig, peft.LoKrConfig, {"r": 2, "init_weights": "lycoris"}),
        (fxpeft.VeraConfig, peft.VeraConfig, {"r": 5, "projection_prng_key": 7, "save_projection": False}),
        (fxpeft.VeraConfig, peft.VeraConfig, {"r": 5, "init_weights": False, "vera_dropout": 0.3}),
        (fxpeft.DeloraConfig, peft.DeloraConfig, {"r": 3, "lambda_pattern": {"v_proj": 4}}),
        (fxpeft.LoHaConfig, peft.LoHaConfig, {"r": 2, "init_weights": False, "alpha_pattern": {"q_proj": 5}}),
    ],
)
def test_fresh_ones_are_pefts(ours: Any, theirs: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(4)
    peer = peft.get_peft_model(tiny_llama(), theirs(**settings)).eval()
    peer.save_pretrained(str(tmp_path))
    torch.manual_seed(4)
    model = tiny_llama()
    fxpeft.add_adapter(model, ours(**settings))
    keys = peft.get_peft_model_state_dict(peer)
    own = fxpeft.adapter_state_dict(model)
    assert own.keys() == keys.keys()
    for key in keys:
        assert own[key].shape == keys[key].shape
    if ours is fxpeft.DeloraConfig or settings.get("projection_prng_key"):  # nothing random, or by a seed of their own
        fxpeft.load_adapter(model, tmp_path, "theirs")
        first = [model.adapters] if hasattr(model, "adapters") else [
            m.adapters for m in model.modules() if "adapters" in m._modules
        ]  # fmt: skip
        for name in ("delora_lambda", "delora_w_norm", "vera_lambda_d"):
            for each in first:
                if hasattr(each.default, name):
                    assert_close(getattr(each.default, name), getattr(each.theirs, name))
        if ours is fxpeft.VeraConfig:
            for name in ("vera_A", "vera_B"):
                assert torch.equal(getattr(first[0].default.shared, name), getattr(peer.base_model, name)["default"])
    loaded = tiny_llama()
    fxpeft.load_adapter(loaded, tmp_path)
    assert_close(logits(loaded), logits(peer))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_norms_are_trained_as_in_peft(build: Any, tmp_path: Path) -> None:
    model, ids = build(), token_ids()
    bare = logits(model)
    fxpeft.add_adapter(model, fxpeft.LNTuningConfig())
    assert_close(logits(model), bare)
    tensors = fxpeft.adapter_state_dict(model)
    assert all(".ln_tuning_layers." in key for key in tensors)
    spread(tensors, seed=2)
    wanted = logits(model)
    fxpeft.save_adapter(model, tmp_path / "ours")
    peer = peft.PeftModel.from_pretrained(build(), str(tmp_path / "ours"), is_trainable=True).eval()
    assert_close(logits(peer), wanted)
    grads_of(peer, model, lambda each: each(ids, labels=ids).loss)
    randomise((p for p in peer.parameters() if p.requires_grad), seed=5)
    peer.save_pretrained(str(tmp_path / "theirs"))
    loaded = build()
    fxpeft.load_adapter(loaded, tmp_path / "theirs")
    assert_close(logits(loaded), logits(peer))
    adopted = fxpeft.adopt(peer)
    assert_close(logits(adopted), logits(loaded))
    fxpeft.fold(model)
    assert_close(logits(model), wanted)
    fxpeft.unfold(model)
    fxpeft.prepare_hotswap(model, methods=("ln_tuning",))
    assert_close(logits(model), wanted)
    fxpeft.remove(model)
    assert_close(logits(model), bare, terms=0)


def test_a_head_beside_the_norms_keeps_its_own_key(tmp_path: Path) -> None:
    model = tiny_llama()
    add(model, fxpeft.LNTuningConfig(modules_to_save=["lm_head"]))
    fxpeft.save_adapter(model, tmp_path)
    peer = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert_close(logits(peer), logits(model))
    assert "base_model.model.lm_head.weight" in fxpeft.adapter_state_dict(model)


@pytest.mark.parametrize(("settings", "declared"), [
    ({"r": 4, "mini_r": 5, "init_weights": "mini"}, "miss"), ({"r": 1, "init_weights": "bat"}, "miss_bat"),
    ({"r": 3, "init_weights": "bat"}, "miss_bat"),
])  # fmt: skip
def test_other_forms_of_miss(settings: dict[str, Any], declared: str, tmp_path: Path) -> None:
    kind = KINDS["Linear"] if settings["r"] != 3 else KindCase(lambda: nn.Linear(6, 9), KINDS["Linear"].input)
    net, x = kind.net(), kind.input()
    add(net, fxpeft.MissConfig(**settings, target_modules=BOTH))
    fxpeft.save_adapter(net, tmp_path)
    peer = peft.PeftModel.from_pretrained(kind.net(), str(tmp_path), is_trainable=True).eval()
    assert_close(output(peer, x), output(net, x))
    grads_of(peer, net, lambda each: each(x).square().mean())
    wanted = output(net, x)
    fxpeft.fold(net)
    assert_close(output(net, x), wanted)
    fxpeft.unfold(net)
    fxpeft.prepare_hotswap(net, 8, methods=(declared,))
    assert_close(output(net, x), wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fxpeft.VBLoRAConfig(num_vectors=2, topk=3), "topk: expected at most num_vectors 2"),
        (lambda: fxpeft.LoHaConfig(r=0), "r: expected a positive integer"),
        (lambda: fxpeft.LoHaConfig(module_dropout=1.0), "module_dropout: expected a probability"),
        (lambda: fxpeft.DeloraConfig(rank_pattern={"a": 0}), r"rank_pattern\['a'\]: expected a positive integer"),
        (lambda: fxpeft.VeraConfig(vera_dropout=-1), "vera_dropout: expected a probability"),
        (lambda: fxpeft.LNTuningConfig(target_modules="role:norm"), "target_modules: expected names"),
    ],
)
def test_wrong_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(fxpeft.AdapterError, match=message):
        make()


def test_sites_that_do_not_fit_are_named() -> None:
    for config, message in (
        (fxpeft.VBLoRAConfig(vector_length=5, target_modules=BOTH), "first: vector_length 5 doesn't divide its 6"),
        (fxpeft.MissConfig(r=4, init_weights="bat", target_modules=BOTH), "first: init_weights='bat': .*found 4"),
        (fxpeft.MissConfig(r=7, target_modules=BOTH), "first: r: expected at most its 6 inputs, found 7"),
        (fxpeft.MissConfig(r=3, mini_r=4, init_weights="mini", target_modules=BOTH), "first: mini_r 4 doesn't divide"),
        (fxpeft.LNTuningConfig(target_modules=["norm"]), "no module of the model is named by target_modules"),
        (fxpeft.LNTuningConfig(), "no default target_modules of LN tuning for Net"),
    ):  # fmt: skip
        with pytest.raises(fxpeft.AdapterError, match=message):
            fxpeft.add_adapter(KINDS["Linear"].net(), config)


def test_vectors_without_their_logits(tmp_path: Path) -> None:
    settings = {"r": 3, "num_vectors": 7, "vector_length": 1, "topk": 3, "target_modules": BOTH}
    peer = peft.get_peft_model(KINDS["Linear"].net(), peft.VBLoRAConfig(**settings, save_only_topk_weights=True)).eval()
    randomise((p for n, p in peer.named_parameters() if "vblora_" in n), seed=3)
    peer.save_pretrained(str(tmp_path / "theirs"))
    net, x = KINDS["Linear"].net(), KINDS["Linear"].input()
    fxpeft.load_adapter(net, tmp_path / "theirs", trainable=True)
    assert_close(output(net, x), output(peer, x))
    fxpeft.save_adapter(net, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(KINDS["Linear"].net(), str(tmp_path / "ours")).eval()
    assert_close(output(again, x), output(peer, x))
    net(x).square().mean().backward()  # it trains on
    optimiser = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.5)
    optimiser.step()
    assert output(net, x).isfinite().all()
    tensors = fxpeft.adapter_state_dict(net)
    key = next(key for key in tensors if key.endswith("A_topk_indices"))
    assert tensors[key].dtype is torch.uint8
    fxpeft.prepare_hotswap(net, 8, methods=("vblora",))
    config = fxpeft.adapter_config(net)
    for wrong, message in (
        ({key: tensors[key] + 7}, "expected numbers of vectors below num_vectors 7"),
        ({key.replace("indices", "weights"): torch.ones(2)}, "expected weights beside it"),
    ):
        with pytest.raises(fxpeft.CheckpointError, match=message):
            fxpeft.inject(net, {**tensors, **wrong}, config, "b")
