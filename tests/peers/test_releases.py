"""Files of every release of PEFT from 0.17 on, and what each of them knows of what is written; see files/write.py."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from peer_files import CASES, CONFIG, FILES, WEIGHTS, Case
from peer_versions import STACKS as OLD_STACKS
from peer_versions import needs
from safetensors.torch import load_file
from torch import Tensor

import fxpeft
from fxpeft.errors import CheckpointError
from fxpeft.methods.config import AdapterConfig

RELEASES = sorted(folder.name.removeprefix("peft-") for folder in FILES.glob("peft-*"))
NEWEST = RELEASES[-1]
FIELDS = {
    release: {name: set(fields.split()) for name, fields in own.items()}
    for release, own in json.loads((FILES / "fields.json").read_text(encoding="utf-8")).items()
}
CONFIGS: dict[str, type[AdapterConfig]] = {
    case.config: getattr(fxpeft, case.config) for case in CASES.values()
}  # the names are PEFT's
STACKS = ("experts", "square")


def wanted(release: str, name: str) -> Tensor:
    return load_file(FILES / f"peft-{release}" / "outputs.safetensors")[name]


@torch.no_grad()
def outputs(case: Case, folder: Path) -> Tensor:
    model = case.base()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "(?s).*PEFT before 0.21 saved none")  # a test of its own below
        fxpeft.load_adapter(model, folder)
    return case.run(model)


def saved(case: Case, source: Path, folder: Path) -> dict[str, Any]:
    """Load and save; the config."""
    model = case.base()
    fxpeft.load_adapter(model, source)
    fxpeft.save_adapter(model, folder)
    written: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return written


def test_every_release_has_all_cases() -> None:
    assert RELEASES[:5] == ["0.17", "0.18", "0.19", "0.20", "0.21"]
    assert set(FIELDS) == set(RELEASES)
    for release in RELEASES:
        assert {path.name for path in (FILES / f"peft-{release}").iterdir() if path.is_dir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("release", RELEASES)
def test_what_a_release_wrote_loads(release: str, name: str, tmp_path: Path) -> None:
    """To the outputs that the release gave; what is saved then is the same whichever release it was."""
    case, source = CASES[name], FILES / f"peft-{release}" / name
    with torch.no_grad():
        bare = case.run(case.base())
    own = wanted(release, name)[..., -bare.shape[-2] :, :]  # without the places of a prompt's tokens
    assert (own - bare).abs().max() > 0.1
    if (release, name) == ("0.17", "square"):  # it names no release: as in the PEFT of today
        needs(*OLD_STACKS)
        with torch.no_grad():
            theirs = case.run(peft.PeftModel.from_pretrained(case.base(), str(source)).eval())
        assert_close(outputs(case, source), theirs)
        return
    assert_close(outputs(case, source), wanted(release, name))
    golden = json.loads((FILES / "fxpeft.json").read_text(encoding="utf-8"))[name]
    assert saved(case, source, tmp_path) == golden
    assert_close(outputs(case, tmp_path), wanted(release, name))


@pytest.mark.parametrize("name", CASES)
def test_what_is_written(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The config is the one that ``files/write.py --read`` tries with each release; the one named knows all in it."""
    case, source = CASES[name], FILES / f"peft-{NEWEST}" / name
    config = saved(case, source, tmp_path)
    path = FILES / "fxpeft.json"
    golden = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if request.config.getoption("--fxpeft-update"):
        golden[name] = config
        path.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert config == golden[name]
    stored, kept = load_file(source / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert stored.keys() == kept.keys()
    assert all(torch.equal(stored[key], kept[key]) for key in stored)
    named = config.get("peft_version", "0.17.0").rpartition(".")[0]
    assert set(config) <= FIELDS[named][case.config]
    assert ("peft_version" in config) == (name in STACKS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_later_field_is_written_where_it_says_something(name: str) -> None:
    cls, values = CONFIGS[name], {"total_step": 9} if name == "AdaLoraConfig" else {}
    plain = cls(**values).to_dict()
    assert set(plain) <= FIELDS["0.17"][name]
    assert set(plain) == {f.name for f in dataclasses.fields(cls) if f.init and f.name not in cls.since} | {"peft_type"}
    for field, release in cls.since.items():
        assert field in FIELDS[release.rpartition(".")[0]][name]
    for later in RELEASES[1:]:
        assert set(plain) <= FIELDS[later][name]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (fxpeft.PrefixTuningConfig(num_virtual_tokens=3, init_weights="zero"), "init_weights"),
        (fxpeft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"]), "target_parameters"),
    ],
)
def test_the_release_that_a_field_needs_is_named(config: AdapterConfig, field: str) -> None:
    written = config.to_dict()
    assert written["peft_version"] == "0.19.0"
    assert set(written) <= FIELDS["0.19"][type(config).__name__]
    assert type(config).from_dict(json.loads(json.dumps(written))) == config
    assert "peft_version" not in config.changed(**{field: None}).to_dict()


def test_layer_zero_is_written_as_peft_before_0_21_takes_it() -> None:
    config = fxpeft.LoraConfig(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers")
    assert config.to_dict()["layers_to_transform"] == [0]
    assert config.layers_to_transform == 0
    alone = fxpeft.LoraConfig(target_modules=["q_proj"], layers_to_transform=0)
    assert alone.to_dict()["layers_to_transform"] == 0


def test_biases_that_peft_before_0_21_left_out_are_the_bases(tmp_path: Path) -> None:
    """``bias="lora_only"``: PEFT loads such a file. One that names 0.21 is damaged where it has none."""
    source, case = FILES / "peft-0.20" / "biases", CASES["biases"]
    assert not any("bias" in key for key in load_file(source / WEIGHTS))
    model = case.base()
    with pytest.warns(UserWarning, match=r"biases: bias='lora_only', but no bias is in the file: PEFT before 0\.21"):
        fxpeft.load_adapter(model, source, trainable=True)
    biases = [key for key in fxpeft.adapter_state_dict(model) if "bias" in key]
    assert biases == [
        f"base_model.model.transformer.h.0.{name}.base_layer.bias" for name in ("attn.c_attn", "mlp.c_fc")
    ]
    values = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    (tmp_path / CONFIG).write_text(json.dumps({**values, "peft_version": "0.21.2"}), encoding="utf-8")
    (tmp_path / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match=r"doesn't fill:\n.*c_attn\.bias"):
        fxpeft.load_adapter(case.base(), tmp_path)


@pytest.mark.parametrize("name", ["", None])
def test_a_base_without_a_name(name: str | None, tmp_path: Path) -> None:
    """PEFT before 0.21 wrote it as ``""``; saving then takes the model's own name."""
    source, case = FILES / "peft-0.20" / "lora", CASES["lora"]
    values = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    assert values["base_model_name_or_path"] == ""
    (tmp_path / CONFIG).write_text(json.dumps({**values, "base_model_name_or_path": name}), encoding="utf-8")
    (tmp_path / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
    model = case.base()
    model.name_or_path = "me/tiny"
    fxpeft.load_adapter(model, tmp_path)
    assert fxpeft.adapter_config(model).base_model_name_or_path is None
    fxpeft.save_adapter(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["base_model_name_or_path"] == "me/tiny"


@pytest.mark.parametrize("name", STACKS)
def test_stacks_of_experts_of_an_older_release_swap(name: str) -> None:
    """Two layouts in one slot, one after the other."""
    case = CASES[name]
    folders = {release: FILES / f"peft-{release}" / name for release in ("0.18", "0.21")}
    model = case.base()
    fxpeft.prepare_hotswap(
        model,
        4,
        targets=case.fields["target_modules"],
        target_parameters=case.fields["target_parameters"],
    )
    fxpeft.load_adapter(model, folders["0.21"])
    for release in ("0.18", "0.21", "0.18"):
        fxpeft.hotswap(model, folders[release])
        with torch.no_grad():
            assert_close(case.run(model), wanted(release, name))


@pytest.mark.parametrize("named", [18, None, "0.18" * 9999, "zero", "0.180.0", "0.21.0"])
def test_an_odd_release_is_none(named: object, tmp_path: Path) -> None:
    """A square stack is read as today's unless the file names an older release."""
    source, case = FILES / "peft-0.21" / "square", CASES["square"]
    values = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    (tmp_path / CONFIG).write_text(json.dumps({**values, "peft_version": named}), encoding="utf-8")
    (tmp_path / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
    assert_close(outputs(case, tmp_path), wanted("0.21", "square"))


def test_the_installed_peft_has_the_fields_that_are_stored() -> None:
    release = ".".join(peft.__version__.split(".")[:2])
    if release not in FIELDS:
        pytest.skip(f"no files of PEFT {release} here: run tests/files/write.py, then this file with --fxpeft-update")
    for name, fields in FIELDS[release].items():
        assert {f.name for f in dataclasses.fields(getattr(peft, name))} == fields
