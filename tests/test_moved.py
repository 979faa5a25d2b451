"""Imports and pickles by the module paths of 0.1.0."""

import importlib
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fxpeft
from fxpeft.moved import MOVED

PICKLES = Path(__file__).parent / "pickles"  # torch.save of whole models, written before the modules moved


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_the_module_at_the_new_one(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} moved to {MOVED[old]}"):
        module = importlib.import_module(old)
    new = importlib.import_module(MOVED[old])
    names = [name for name, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__]
    for name in names:
        assert getattr(module, name) is getattr(new, name)
    with pytest.raises(AttributeError):
        _ = module.no_such_name


def test_a_path_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fxpeft.no_such_module")


@pytest.mark.parametrize("kind", ["live", "prepared"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_was_pickled_before_the_move_loads(kind: str) -> None:
    saved = torch.load(PICKLES / f"{kind}.pt", weights_only=False)
    model = saved["model"]
    assert fxpeft.active_adapters(model) == ["two"]
    for name, expected in saved["outputs"].items():
        fxpeft.set_adapter(model, name)
        torch.testing.assert_close(model(saved["x"]), expected)
    fxpeft.remove(model)
    assert not any(torch.allclose(model(saved["x"]), expected) for expected in saved["outputs"].values())


def test_what_is_imported_by_new_paths_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for new in set(MOVED.values()):
            importlib.import_module(new)
