"""``fxpeft.installed``: Transformers' methods are fxpeft's inside the block, and what they were after it."""

from __future__ import annotations

import contextlib

import pytest
from tiny import tiny_llama
from transformers import PreTrainedModel

import fxpeft
from fxpeft import LoraConfig


@pytest.fixture(autouse=True)
def _bare() -> None:
    fxpeft.uninstall()  # the tests here start without


def test_inside_and_after() -> None:
    before = dict(vars(PreTrainedModel))
    with fxpeft.installed():
        model = tiny_llama()
        model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
        assert fxpeft.active_adapters(model) == ["default"]
    assert dict(vars(PreTrainedModel)) == before
    assert fxpeft.active_adapters(model) == ["default"]  # adapters stay on their models


def test_after_an_error_and_nested() -> None:
    before = dict(vars(PreTrainedModel))
    with contextlib.suppress(ZeroDivisionError), fxpeft.installed():
        inside = dict(vars(PreTrainedModel))
        with fxpeft.installed():
            pass
        assert dict(vars(PreTrainedModel)) == inside != before
        raise ZeroDivisionError
    assert dict(vars(PreTrainedModel)) == before


def test_installed_before() -> None:
    bare = dict(vars(PreTrainedModel))
    fxpeft.install()
    before = dict(vars(PreTrainedModel))
    with fxpeft.installed():
        assert dict(vars(PreTrainedModel)) == before
        fxpeft.uninstall()
        assert dict(vars(PreTrainedModel)) == bare
    again = vars(PreTrainedModel)
    assert again.keys() == before.keys()
    assert all((again[name] is bare.get(name)) is (before[name] is bare.get(name)) for name in before)
