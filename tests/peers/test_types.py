"""All of PEFT's types in the guide's table: what is here by what the tests found, and why the others are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest

import fxpeft
from fxpeft.methods import METHODS, config_class

ROOT = Path(__file__).parents[2]
GUIDE, README = ROOT / "examples" / "guides" / "methods.md", ROOT / "README.md"
START, END = "<!-- types -->\n", "\n<!-- end types -->"
COLUMNS = {  # in the README's table of what each method can do
    "LORA": "LoRA", "ADALORA": "AdaLoRA", "IA3": "IA3", "PROMPT_TUNING": "prompt tuning", "P_TUNING": "p-tuning",
    "PREFIX_TUNING": "prefix tuning", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA", "MISS": "MiSS",
    "VBLORA": "VB-LoRA", "DELORA": "DeLoRA", "HRA": "HRA", "OFT": "OFT", "BOFT": "BOFT",
    "LN_TUNING": "LN tuning", "TRAINABLE_TOKENS": "trainable tokens", "MULTITASK_PROMPT_TUNING": "multitask prompts",
    "CPT": "CPT", "CARTRIDGE": "cartridge",
}  # fmt: skip
ROWS = {  # in the guide's table of what each method can do
    "BEFT": "BEFT", "GRALORA": "GraLoRA", "DEFT": "DEFT", "HIRA": "HiRA", "C3A": "C3A", "FOURIERFT": "FourierFT",
    "PSOFT": "PSOFT", "PVERA": "PVeRA", "TINYLORA": "TinyLoRA", "UNILORA": "UniLoRA",
    "SHIRA": "SHiRA", "SUPERTUNING": "Super-Tuning", "RANDLORA": "RandLoRA", "ROAD": "RoAd", "WAVEFT": "WaveFT",
    "GLORA": "GLoRA", "OSF": "OSF",
    "ADAMSS": "AdaMSS",
}  # fmt: skip
EXACT = "**exact**: trains, files both ways, swaps"
FULL = ("OSF", "C3A", "GLORA", "WAVEFT", "ROAD", "RANDLORA", "SUPERTUNING", "SHIRA", "FOURIERFT", "HIRA")
FOLD, NOT = "not here; would only fold", "not here; can't be static"
REST = {
    "FROD": (FOLD, "the whole weight anew"),
    "PEANUT": (FOLD, "a small network of the base's weight"),
    "ADAPTION_PROMPT": (NOT, "a second attention, with a gate"),
    "LILY": (NOT, "a router mixes factors by the input"),
    "POLY": (NOT, "tasks are an argument of every forward"),
    "SHADOW": (NOT, "a network beside the model, by the input"),
    "XLORA": (NOT, "a router mixes adapters by the input"),
}


def found(column: str) -> dict[str, str]:
    """Row -> what a method's column in the README says, which tests/test_method_matrix.py has found."""
    text = README.read_text(encoding="utf-8").partition("<!-- matrix -->\n")[2].partition("<!-- end matrix -->")[0]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    place = head.index(column)
    return {row[0].partition(" (")[0]: row[place] for row in rows}


def table() -> str:
    lines = ["| type | here | |", "|---|---|---|"]
    for peft_type in sorted(peft.PeftType):
        if (column := COLUMNS.get(peft_type.value)) is not None:
            cells = found(column)
            assert (cells["trains"], cells["PEFT's files, both ways"]) == ("yes", "yes")
            assert cells["swaps in one compiled graph"] == "yes"
            folds = "folds too" if cells["folds into the weights"] else "a prompt is no change of weights"
            lines.append(f"| {peft_type.value} | {EXACT} | {folds} |")
        elif (row := ROWS.get(peft_type.value)) is not None:
            assert f"\n| {row} | TSHFRW |" in GUIDE.read_text(encoding="utf-8")
            full = "of full rank: swaps where a slot has as many ranks as the weight's smaller side"
            verdict = "trains, files both ways, folds" if peft_type.value in FULL else EXACT
            lines.append(f"| {peft_type.value} | {verdict} | {full if peft_type.value in FULL else 'folds too'} |")
        else:
            verdict, why = REST[peft_type.value]
            lines.append(f"| {peft_type.value} | {verdict} | {why} |")
    return "\n".join(lines)


def test_every_type_is_in_one_of_the_tables() -> None:
    names = {peft_type.value for peft_type in peft.PeftType}
    assert names == COLUMNS.keys() | ROWS.keys() | REST.keys()
    assert len(names) == len(COLUMNS) + len(ROWS) + len(REST)
    assert {method.peft_type for method in METHODS} == COLUMNS.keys() | ROWS.keys()
    for name in REST:
        with pytest.raises(fxpeft.AdapterError, match=f"expected one of .*LORA.*, found '{name}'"):
            config_class(name, "a file")


def test_the_guide_says_so(request: pytest.FixtureRequest) -> None:
    before, _, rest = GUIDE.read_text(encoding="utf-8").partition(START)
    said, _, after = rest.partition(END)
    if request.config.getoption("--fxpeft-update"):
        GUIDE.write_text(before + START + table() + END + after, encoding="utf-8")
        said = table()
    assert said == table()


FIELDS = "<!-- fields -->\n", "\n<!-- end fields -->"


def test_every_field_of_a_lora_is_here_or_refused_with_the_reason(request: pytest.FixtureRequest) -> None:
    ours, theirs = fxpeft.LoraConfig, {f.name for f in dataclasses.fields(peft.LoraConfig) if f.init}
    known = {f.name for f in dataclasses.fields(ours)}
    passed_over = {
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
    }  # beside another, or no matter
    assert theirs - known - passed_over == set(ours.reasons)
    assert set(ours.reasons) <= set(ours.unsupported)
    wanted = "\n".join(
        ["| field | why |", "|---|---|", *(f"| `{n}` | {why} |" for n, why in sorted(ours.reasons.items()))]
    )
    before, _, rest = GUIDE.read_text(encoding="utf-8").partition(FIELDS[0])
    said, _, after = rest.partition(FIELDS[1])
    if request.config.getoption("--fxpeft-update"):
        GUIDE.write_text(before + FIELDS[0] + wanted + FIELDS[1] + after, encoding="utf-8")
        said = wanted
    assert said == wanted
