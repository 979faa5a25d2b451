"""PEFT's smaller methods in their other forms, beside PEFT: outputs, gradients, slots, the first values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import add
from closeness import assert_close
from method_cases import KindCase, beside_peft, drawn_as_in_peft, output
from safetensors.torch import load_file, save_file
from torch import nn

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = ["first", "second"]
KIND = KindCase(lambda: nn.Linear(12, 6), lambda: torch.randn(3, 2, 12))


@pytest.mark.parametrize(
    "config",
    [
        fxpeft.GraloraConfig(r=6, gralora_k=3, alpha=7),
        fxpeft.GraloraConfig(r=4, gralora_k=2, hybrid_r=3),
        fxpeft.DeftConfig(r=4, decomposition_method="qr"),
        fxpeft.DeftConfig(r=9, para=True),  # of 6 outputs there are 6
        fxpeft.DeftConfig(r=2, para=True, decomposition_method="qr"),
        fxpeft.C3AConfig(block_size=3),
        fxpeft.C3AConfig(block_size=6),
        fxpeft.PsoftConfig(r=4, psoft_orth=False, psoft_mag_a=False, psoft_alpha=3),
        fxpeft.PsoftConfig(r=5, use_cayley_neumann=True, cayley_neumann_eps=0.5, psoft_mag_b=False, psoft_alpha=2),
        fxpeft.PsoftConfig(r=3, psoft_svd="lowrank", random_seed=5, psoft_alpha=3),
        fxpeft.PveraConfig(r=3, d_initial=2.0),
        fxpeft.HiraConfig(r=4, init_weights="gaussian"),
        fxpeft.FourierFTConfig(n_frequency=11, scaling=12.0, random_loc_seed=5),
        fxpeft.TinyLoraConfig(r=9, u=5, weight_tying=0.5),
        fxpeft.TinyLoraConfig(u=5, save_projection=False, projection_seed=7, target_modules=BOTH),
        fxpeft.UniLoraConfig(r=2, theta_d_length=13, save_indices=True),
        fxpeft.UniLoraConfig(r=2, theta_d_length=200, proj_seed=3),
        fxpeft.AdamssConfig(r=5, num_subspaces=3, subspace_rank=2),
        fxpeft.AdamssConfig(r=3, num_subspaces=6, subspace_rank=3, random_seed=4),  # as many groups as outputs
        fxpeft.AdamssConfig(num_subspaces=2, subspace_rank=3, use_dynamic_rank=True, svd_threshold=0.5),
        fxpeft.ShiraConfig(r=3),
        fxpeft.SupertuningConfig(sparsity=0.8, r=3),
        fxpeft.SupertuningConfig(sparsity=0.8, select_top=False, save_precomputed_indices=False),
        fxpeft.RandLoraConfig(r=4, randlora_alpha=5, save_projection=False),
        fxpeft.RandLoraConfig(r=2, randlora_alpha=3, very_sparse=True),
        fxpeft.RoadConfig(group_size=6, variant="road_2"),
        fxpeft.RoadConfig(group_size=2, variant="road_4"),
        fxpeft.WaveFTConfig(n_frequency=40, scaling=3.0),
        fxpeft.WaveFTConfig(n_frequency=50, scaling=3.0, wavelet_family="db5", proportional_parameters=True),
        fxpeft.GloraConfig(r=3, config_A_B="constant", config_C="vector"),
        fxpeft.GloraConfig(config_A_B="vector", config_C="none", config_D_E="vector"),
        fxpeft.OSFConfig(effective_rank=5),
        fxpeft.OSFConfig(effective_rank=0.4),
    ],
    ids=lambda config: config.peft_type,
)  # fmt: skip
def test_other_forms(config: Any, tmp_path: Path) -> None:
    net, x, wanted, _ = beside_peft(KIND, config, tmp_path)
    fxpeft.fold(net)
    assert_close(output(net, x), wanted)
    fxpeft.unfold(net)
    fxpeft.prepare_hotswap(net, 24, methods=(type(config).peft_type.lower(),))
    assert_close(output(net, x), wanted)


@pytest.mark.parametrize("config", [
    fxpeft.GraloraConfig(r=4, hybrid_r=2, gralora_dropout=0.5), fxpeft.DeftConfig(r=3, deft_dropout=0.5),
    fxpeft.HiraConfig(r=3, hira_dropout=0.5), fxpeft.PsoftConfig(r=3, psoft_dropout=0.5),
    fxpeft.PveraConfig(r=3, pvera_dropout=0.5), fxpeft.PveraConfig(r=3, generator_seed=7),
    fxpeft.SupertuningConfig(sparsity=0.5, r=2, lora_dropout=0.5),
    fxpeft.RandLoraConfig(r=4, randlora_alpha=5, randlora_dropout=0.5),
    fxpeft.TinyLoraConfig(tinylora_dropout=0.5), fxpeft.UniLoraConfig(theta_d_length=21, unilora_dropout=0.5),
], ids=lambda config: config.peft_type)  # fmt: skip
def test_what_is_drawn_is_drawn_as_in_peft(config: Any, tmp_path: Path) -> None:
    drawn_as_in_peft(KIND, config, tmp_path)


@pytest.mark.parametrize("config", [
    fxpeft.BeftConfig(), fxpeft.GraloraConfig(hybrid_r=2), fxpeft.DeftConfig(alpha=5), fxpeft.HiraConfig(),
    fxpeft.C3AConfig(block_size=3, init_weights=True), fxpeft.PsoftConfig(r=4), fxpeft.PveraConfig(r=3),
    fxpeft.FourierFTConfig(n_frequency=5, init_weights=True), fxpeft.TinyLoraConfig(weight_tying=1.0),
    fxpeft.AdamssConfig(num_subspaces=2, subspace_rank=2),
    fxpeft.OSFConfig(),
    fxpeft.GloraConfig(r=3),
    fxpeft.WaveFTConfig(n_frequency=7),
    fxpeft.RoadConfig(group_size=2),
    fxpeft.RandLoraConfig(r=5),
    fxpeft.SupertuningConfig(sparsity=0.7, r=2),
    fxpeft.ShiraConfig(r=2),
], ids=lambda config: config.peft_type)  # fmt: skip
def test_a_fresh_one_changes_nothing_and_has_pefts_tensors(config: Any) -> None:
    net, x = KIND.net(), KIND.input()
    config = config.changed(target_modules=BOTH)
    fxpeft.add_adapter(net, config)
    assert_close(output(net, x), output(KIND.net(), x))
    theirs = getattr(peft, type(config).__name__)
    given = {k: v for k, v in config.to_dict().items() if k in theirs.__dataclass_fields__ and k != "peft_type"}
    peer = peft.get_peft_model(KIND.net(), theirs(**given))
    wanted = {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(peer).items()}
    twice = tuple(f".{site}.randlora_{factor}" for site in BOTH for factor in "AB")  # what all sites share, once more
    wanted = {key: shape for key, shape in wanted.items() if not key.endswith((*twice, ".zeros"))}
    assert {key: tuple(value.shape) for key, value in fxpeft.adapter_state_dict(net).items()} == wanted


@pytest.mark.parametrize("config", [
    fxpeft.GloraConfig(r=3, config_C="none"), fxpeft.OSFConfig(), fxpeft.AdamssConfig(num_subspaces=2),
], ids=lambda config: config.peft_type)  # fmt: skip
def test_the_names_that_parts_have_in_pefts_memory(config: Any, tmp_path: Path) -> None:
    _, x, wanted, peer = beside_peft(KIND, config, tmp_path)
    other = KIND.net()
    fxpeft.add_adapter(other, config.changed(target_modules=BOTH))
    held = {key: tensor for key, tensor in peer.state_dict().items() if ".default" in key}
    fxpeft.load_adapter_state_dict(other, held)
    assert_close(output(other, x), wanted)


def test_a_path_that_there_is_none_of_is_zero(tmp_path: Path) -> None:
    peer = beside_peft(KIND, fxpeft.GloraConfig(r=3, config_C="none"), tmp_path)[3]
    peer.save_pretrained(str(tmp_path / "theirs"))
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.first.glora_C.zeros"] += 1
    save_file(tensors, file)
    with pytest.raises(fxpeft.CheckpointError, match=r"first.glora_C.zeros: expected zeros"):
        fxpeft.load_adapter(KIND.net(), tmp_path / "theirs")


def test_settings_and_sites_that_do_not_fit_are_named() -> None:
    for make, message in (
        (lambda: fxpeft.GraloraConfig(r=5), "r: expected a multiple of gralora_k 2, found 5"),
        (lambda: fxpeft.GraloraConfig(hybrid_r=-1), "hybrid_r: expected 0 or a rank, found -1"),
        (lambda: fxpeft.PveraConfig(sample_at_inference=True), "sample_at_inference=True: expected False"),
        (lambda: fxpeft.HiraConfig.from_dict({"rank_pattern": {"a": 2}}), "rank_pattern .*PEFT 0.21 gives"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            make()
    for config, message in (
        (fxpeft.GraloraConfig(r=4, gralora_k=4), "first: gralora_k 4 doesn't divide its 6 outputs"),
        (fxpeft.C3AConfig(block_size=4), "first: block_size 4 doesn't divide its 6 outputs"),
        (fxpeft.PsoftConfig(r=7), "first: r: expected at most the 6 singular values .* found 7"),
        (fxpeft.FourierFTConfig(n_frequency=73), "first: n_frequency: expected at most its weight's 72 numbers"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            fxpeft.add_adapter(KIND.net(), config.changed(target_modules=BOTH))


def test_a_full_rank_needs_a_slot_of_it() -> None:
    net = KIND.net()
    add(net, fxpeft.C3AConfig(block_size=3, target_modules=BOTH))
    with pytest.raises(fxpeft.AdapterError, match="first: rank 6 is above max_rank 4"):
        fxpeft.prepare_hotswap(net, 4, methods=("c3a",))
