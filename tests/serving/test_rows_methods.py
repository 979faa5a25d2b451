"""Every method, at every kind of target that it takes, in one batch: each row is what its adapter gives alone."""

from __future__ import annotations

import pytest
import torch
from adapter_files import add
from method_cases import KINDS, METHODS, Net

import fxpeft


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_in_one_batch(kind: str) -> None:
    cases = {f"m{number}": case for number, case in enumerate(METHODS.values()) if kind not in case.refused}
    inputs = [KINDS[kind].input() for _ in range(len(cases) + 1)]
    x = torch.cat(inputs)[: len(cases) + 1]

    def net() -> Net:
        made = KINDS[kind].net()
        made.dummy_inputs = {"x": x[:2]}
        return made

    model, names = net(), [*cases, None]
    declared = list(dict.fromkeys(case.declared for case in cases.values()))
    fxpeft.prepare_hotswap(model, 256, targets=["first", "second"], methods=declared, lanes=len(cases))
    expected = {None: net()(x).detach()}
    for seed, (name, case) in enumerate(cases.items()):
        live = net()
        tensors = add(live, case.config(), seed=seed)
        expected[name] = live(x).detach()  # type: ignore[index]
        fxpeft.add_adapter(model, case.config(), name)
        fxpeft.load_adapter_state_dict(model, {key: value.clone() for key, value in tensors.items()}, name)
    fxpeft.set_adapter(model, [])
    for turn in range(2):
        order = names[turn:] + names[:turn]
        with torch.no_grad(), fxpeft.rows(model, order):
            found = model(x)
        for row, name in enumerate(order):
            torch.testing.assert_close(found[row], expected[name][row], rtol=1e-5, atol=1e-5)  # type: ignore[index]
