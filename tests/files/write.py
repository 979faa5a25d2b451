"""Adds what the PEFT that is installed writes: run ``python tests/files/write.py`` in an environment with each.

It writes ``peft-X.Y/CASE/`` for every case of tests/peer_files.py, the outputs that PEFT's freshly loaded model gave,
and the names of its configs' fields into ``fields.json``. With ``--read`` it writes nothing: it loads what fxpeft makes
of the newest of these files (``fxpeft.json``, see tests/peers/test_releases.py) and says where PEFT warns, fails or
gives other outputs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from peer_files import CASES, CONFIG, FILES, WEIGHTS, Case, fill

RELEASE = ".".join(peft.__version__.split(".")[:2])
HERE = FILES / f"peft-{RELEASE}"


@torch.no_grad()
def fresh(case: Case, folder: Path) -> torch.Tensor:
    """The outputs of PEFT's freshly loaded model."""
    return case.run(peft.PeftModel.from_pretrained(case.base(), str(folder)).eval())


def write(name: str, case: Case) -> torch.Tensor:
    """One folder; the outputs."""
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(case.base(), getattr(peft, case.config)(**case.fields))
    fill(((n, p) for n, p in model.named_parameters() if p.requires_grad), seed=2)
    model.eval().save_pretrained(str(HERE / name))
    (HERE / name / "README.md").unlink(missing_ok=True)
    return fresh(case, HERE / name).clone()


def write_all() -> None:
    """A folder for each case, the outputs of all, and the fields."""
    shutil.rmtree(HERE, ignore_errors=True)
    save_file({name: write(name, case) for name, case in CASES.items()}, HERE / "outputs.safetensors")
    path, classes = FILES / "fields.json", {getattr(peft, case.config) for case in CASES.values()}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[RELEASE] = {c.__name__: " ".join(sorted(f.name for f in dataclasses.fields(c))) for c in classes}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read(name: str, case: Case, config: dict[str, Any], weights: Path, wanted: torch.Tensor) -> list[str]:
    """What goes wrong with a file of fxpeft's."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        shutil.copy(weights, folder)
        try:
            found = fresh(case, Path(folder))
        except (RuntimeError, TypeError, ValueError) as error:
            return [f"fails: {error}"]
        apart = float((found - wanted).abs().max() / wanted.abs().max())
    wrong = [f"other outputs, {apart:.2g} apart"] if apart > 1e-5 else []
    return wrong + [str(w.message) for w in told if "Unexpected keyword" in str(w.message)]


def read_all() -> int:
    """Print what goes wrong; how many cases that are."""
    newest = max(FILES.glob("peft-*"), key=lambda folder: folder.name)
    configs = json.loads((FILES / "fxpeft.json").read_text(encoding="utf-8"))
    wanted, bad = load_file(newest / "outputs.safetensors"), 0
    for name, case in CASES.items():
        wrong = read(name, case, configs[name], newest / name / WEIGHTS, wanted[name])
        bad += bool(wrong)
        print(f"PEFT {peft.__version__}, {name}:", *(wrong or ["the same outputs, no warning"]), sep="\n  ")
    return bad


if __name__ == "__main__":
    sys.exit(read_all() if "--read" in sys.argv else write_all())
