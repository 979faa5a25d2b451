"""TinyLoRA, UniLoRA and AdaMSS on whole models, beside PEFT: what a site has follows from the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import add
from closeness import assert_close
from method_cases import grads_of
from safetensors.torch import load_file, save_file
from tiny import logits, randomise, tiny_llama, token_ids

import fxpeft
from fxpeft.targets.sites import make_plan

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = [
    fxpeft.TinyLoraConfig(r=3, u=9, weight_tying=0.4, save_projection=False),
    fxpeft.TinyLoraConfig(r=2, u=5, weight_tying=1.0, target_modules=["q_proj", "down_proj", "embed_tokens"]),
    fxpeft.UniLoraConfig(r=3, theta_d_length=50, target_modules="all-linear"),
    fxpeft.UniLoraConfig(r=3, theta_d_length=50, save_indices=True),
    fxpeft.AdamssConfig(r=9, num_subspaces=3, subspace_rank=2, target_modules=["q_proj", "down_proj"]),
]


def peer_of(config: Any, model: Any) -> Any:
    theirs = getattr(peft, type(config).__name__)
    given = {k: v for k, v in config.to_dict().items() if k in theirs.__dataclass_fields__ and k != "peft_type"}
    return peft.get_peft_model(model, theirs(**given)).eval()


@pytest.mark.parametrize("config", CASES, ids=lambda config: config.peft_type)
def test_both_ways_with_peft(config: Any, tmp_path: Path) -> None:
    model, bare, ids = tiny_llama(), logits(tiny_llama()), token_ids()
    add(model, config, scale=0.5)
    wanted = logits(model)
    assert (wanted - bare).abs().max() > 0.01
    fxpeft.save_adapter(model, tmp_path / "ours")
    peer = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"), is_trainable=True).eval()
    assert_close(logits(peer), wanted)
    grads_of(peer, model, lambda each: each(ids, labels=ids).loss)
    peer = peer_of(config, tiny_llama())
    trained = ("tinylora_v", "theta", "adamss_A", "adamss_B")
    randomise((p for n, p in peer.named_parameters() if any(part in n for part in trained)), seed=4, scale=0.5)
    peer.save_pretrained(str(tmp_path / "theirs"))
    loaded, fresh = tiny_llama(), tiny_llama()
    fxpeft.load_adapter(loaded, tmp_path / "theirs")
    assert_close(logits(loaded), logits(peer))
    assert_close(logits(fxpeft.adopt(peer)), logits(loaded))
    assert logits(loaded).sub(bare).abs().max() > 0.01
    fxpeft.add_adapter(fresh, config)  # what follows from a seed, or from the base, is PEFT's
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    own = fxpeft.adapter_state_dict(fresh)
    assert own.keys() == {key for key in theirs if "base_layer" not in key}  # PEFT saves an embedding beside
    fixed = [key for key in own if key.endswith(("_P", "indices_A", "indices_B", "scales_A", "scales_B"))]
    assert all(torch.equal(own[key], theirs[key]) for key in fixed)
    for key in (key for key in own if key.endswith("newB")):
        assert_close(own[key], theirs[key])
    fxpeft.load_adapter_state_dict(model, {key: theirs[key] for key in own})
    assert_close(logits(model), logits(loaded))


def test_places_follow_from_the_whole_model(tmp_path: Path) -> None:
    model = tiny_llama()
    plan = make_plan(model, CASES[0])
    assert [plan.sites[site].place for site in plan.sites] == [*range(len(plan.sites))]
    add(model, CASES[2])
    fxpeft.save_adapter(model, tmp_path)
    part = tiny_llama()
    part.model.layers = part.model.layers[:1]
    with pytest.raises(fxpeft.CheckpointError, match=r"partial=True: .*unilora has follows from its place"):
        fxpeft.load_adapter(part, tmp_path, partial=True)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    program = torch.export.export(net, (torch.randn(2, 4),))
    with pytest.raises(fxpeft.AdapterError, match="its place in the model, and this is a program"):
        fxpeft.rewrite(program, fxpeft.UniLoraConfig(target_modules=["0"]))


@pytest.mark.parametrize(("config", "change", "message"), [
    (CASES[1], lambda t: t.pop("base_model.tinylora_v.0"), "tinylora_v"),
    (CASES[0], lambda t: t.pop("base_model.tinylora_v.0"), "expected vectors of u 9 from 0 on, found"),
    (CASES[0], lambda t: t.update({"base_model.tinylora_v.0": torch.ones(3)}), "expected vectors of u 9 from 0 on"),
    (CASES[3], lambda t: next(v for k, v in t.items() if k.endswith("indices_B")).fill_(50), "below theta_d_length 50"),
    (CASES[3], lambda t: t.update({k: v.float() for k, v in t.items() if k.endswith("indices_B")}), "expected int64"),
    (CASES[4], lambda t: t.pop(next(k for k in t if k.endswith("adamss_B.1"))), "adamss_A and adamss_B of each group"),
    (CASES[4], lambda t: t.update({k: v[:, 1:].clone() for k, v in t.items() if k.endswith("_B.0")}), "group 0: exp"),
    (CASES[4], lambda t: t.update({
        k: torch.cat([v, v[:1]]) if k.endswith("B.0") else v[1:] for k, v in t.items() if k.endswith(("s_B.0", "s_B.1"))
    }), "fall into groups of .* here, and of .* in the file"),
    (fxpeft.ShiraConfig(r=1), lambda t: next(v for k, v in t.items() if "indices" in k).fill_(-1), "in .32, 32."),
    (fxpeft.SupertuningConfig(), lambda t: next(v for k, v in t.items() if "indices" in k).fill_(1024), "below 1024"),
], ids=range(10))  # fmt: skip
def test_damaged_files_are_refused(config: Any, change: Any, message: str, tmp_path: Path) -> None:
    model = tiny_llama()
    add(model, config)
    fxpeft.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(fxpeft.CheckpointError, match=message):
        fxpeft.load_adapter(tiny_llama(), tmp_path)


def test_files_that_asa_trained_are_read(tmp_path: Path) -> None:
    peer = peer_of(CASES[4].changed(target_modules=["q_proj"]), tiny_llama())
    peer.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_asa": True, "asa_target_subspaces": 3}))
    model = tiny_llama()
    fxpeft.load_adapter(model, tmp_path)
    assert "use_asa" not in fxpeft.adapter_config(model).to_dict()
    with pytest.raises(fxpeft.AdapterError, match=r"use_asa = True .unsupported.: groups don't stop training"):
        fxpeft.AdamssConfig.from_dict({"use_asa": True})


def test_settings_without_sense_are_refused() -> None:
    for make, message in (
        (lambda: fxpeft.TinyLoraConfig(weight_tying=1.5), "weight_tying: expected a number from 0 to 1, found 1.5"),
        (lambda: fxpeft.UniLoraConfig(proj_seed=-1), "proj_seed: expected a seed from 0"),
        (lambda: fxpeft.UniLoraConfig(r=300), "r: expected at most 256, found 300"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            make()
