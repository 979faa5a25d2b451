"""``torch.export`` of a prepared model, strict or not, with symbolic sizes: what swaps do to the program."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from block_nets import CONFIGS, Net, check_swaps, inputs, outputs, prepared
from closeness import assert_close
from torch.export import Dim, ExportedProgram

import fxpeft

X = inputs(4, 7)
SIZES = {"x": {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=64)}}


def export(model: Net, *, strict: bool) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (X,), dynamic_shapes=SIZES, strict=strict)


def saved(program: ExportedProgram) -> Any:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_of_static_rank_follows_every_swap(strict: bool) -> None:
    """It shares the slots with the model; a file has what they held when it was written."""
    model = prepared(rank="static")
    program = export(model, strict=strict)
    fxpeft.set_adapter(model, "five")
    file = saved(program)
    for x in (X, inputs(3, 5)):  # other sizes
        check_swaps(model, program.module(), x)
        assert_close(file(x), outputs(x)["five"])


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_of_dynamic_rank_has_the_rank_that_it_was_exported_at(strict: bool) -> None:
    model = prepared()
    fxpeft.set_adapter(model, "five")
    program = export(model, strict=strict)
    file = saved(program)
    for x in (X, inputs(3, 5)):
        assert_close(program.module()(x), outputs(x)["five"])
    for name in CONFIGS:
        fxpeft.set_adapter(model, name)
        assert_close(file(X), outputs(X)["five"])  # what was saved is as it was
    fxpeft.set_adapter(model, "five")
    fxpeft.set_scale(model, "five", -0.5)  # of the same rank
    assert_close(program.module()(X), model(X).detach())
