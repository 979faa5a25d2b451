"""A call's own scale, ``cross_attention_kwargs={"scale": s}`` and the like: diffusers' outputs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from image_models import close, flow, flux, image, peft_randomise, random, randomise, unet
from torch import Tensor

import fxpeft
from fxpeft.errors import AdapterError, LockError

SCALES = (0.5, 1.0, 0.0, -2.0)
TARGETS = {"unet": ["to_q", "conv1", "ff.net.2"], "flux": ["to_q", "proj_out", "linear"]}
MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Tensor], str]] = {
    "unet": (unet, image, "cross_attention_kwargs"), "flux": (flux, flow, "joint_attention_kwargs"),
}  # fmt: skip


def settings(kind: str, dora: bool, **changes: Any) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[kind], "use_dora": dora, **changes}


def of_peft(kind: str, dora: bool = False) -> list[Tensor]:
    make, run, argument = MODELS[kind]
    theirs: Any = make()
    theirs.add_adapter(peft.LoraConfig(**settings(kind, dora)))
    peft_randomise(theirs, 1)
    return [run(theirs, **{argument: {"scale": s}}) for s in SCALES]


def ours(kind: str, dora: bool, tmp_path: Path) -> Any:
    """The same adapter, from PEFT's file."""
    make, _, _ = MODELS[kind]
    theirs: Any = make()
    peft.inject_adapter_in_model(peft.LoraConfig(**settings(kind, dora)), theirs)
    peft_randomise(theirs, 1)
    theirs.peft_config = {"default": peft.LoraConfig(**settings(kind, dora))}
    return fxpeft.adopt(theirs)


@pytest.mark.parametrize("prepared", [False, True], ids=["live", "slots"])
@pytest.mark.parametrize(("kind", "dora"), [("unet", False), ("unet", True), ("flux", False)])
def test_as_diffusers_with_peft(tmp_path: Path, kind: str, dora: bool, prepared: bool) -> None:
    _, run, argument = MODELS[kind]
    model = ours(kind, dora, tmp_path)
    bare = run(MODELS[kind][0]())
    if prepared:
        fxpeft.prepare_hotswap(model, 8, methods=("lora", "dora") if dora else ("lora",))
    expected = of_peft(kind, dora)
    whole = run(model)
    assert close(whole, expected[1])
    for scale, output in zip(SCALES, expected, strict=True):
        given = {"scale": scale}
        assert close(run(model, **{argument: given}), output), scale
        assert given == {"scale": scale}
        assert torch.equal(run(model), whole)  # a scale is its call's alone
    assert not close(expected[0], expected[1], 1e-3)
    if not dora:
        assert close(expected[2], bare)
    fxpeft.set_scale(model, "default", 0.5)
    assert close(run(model, **{argument: {"scale": -4.0}}), expected[3])
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), run(model))
    assert close(run(twin), expected[0])


def test_what_cant_have_a_scale_says_so() -> None:
    model: Any = unet()
    fxpeft.add_adapter(model, fxpeft.IA3Config(target_modules=["to_k"], feedforward_modules=[]))
    randomise(model, 1)
    for prepared in (False, True):
        if prepared:
            fxpeft.prepare_hotswap(model, 8, methods=("ia3",))
        whole = image(model)
        for given, match in (
            (0.5, r"asks for the scale 0\.5, and adapter 'default', ia3, has none"),
            (float("nan"), "a finite"),
        ):
            with pytest.raises(AdapterError, match=match):
                image(model, cross_attention_kwargs={"scale": given})
        assert torch.equal(image(model, cross_attention_kwargs={"scale": 1.0}), whole)
        assert torch.equal(image(model), whole)


def test_inside_a_hold_another_scale_is_refused() -> None:
    model: Any = unet()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**settings("unet", False)))
    randomise(model, 1)
    fxpeft.prepare_hotswap(model, 8)
    whole = image(model)
    with fxpeft.hold(model):
        with pytest.raises(LockError, match=r"asks for the scale 0\.5 inside a hold"):
            image(model, cross_attention_kwargs={"scale": 0.5})
        assert torch.equal(image(model, cross_attention_kwargs={"scale": 1.0}), whole)
    assert not close(image(model, cross_attention_kwargs={"scale": 0.5}), whole, 1e-3)
    part = middle(model)
    image(model)
    assert torch.equal(part, middle(model))  # what is called on its own next has the adapter's own


@torch.no_grad()
def middle(model: Any) -> Tensor:
    found: Tensor = model.mid_block(random(2, 16, 4, 4), random(2, 32), encoder_hidden_states=random(2, 5, 12))
    return found


def test_threads_with_scales_of_their_own() -> None:
    model: Any = unet()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(**settings("unet", False)))
    randomise(model, 1)
    fxpeft.prepare_hotswap(model, 8)
    expected = {s: image(model, cross_attention_kwargs={"scale": s}) for s in (0.5, 2.0)} | {1.0: image(model)}
    wrong: list[float] = []

    def call(scale: float) -> None:
        for _ in range(6):
            given = {} if scale == 1 else {"cross_attention_kwargs": {"scale": scale}}
            if not torch.equal(image(model, **given), expected[scale]):
                wrong.append(scale)

    threads = [threading.Thread(target=call, args=(scale,)) for scale in (*expected, 0.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_rows_of_lanes_have_it_too() -> None:
    model: Any = unet()
    for name in ("a", "b"):
        fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=["to_q", "ff.net.2"]), name)
        randomise(model, ord(name), name)
    both = {n: ((fxpeft.set_adapter(model, n)), fxpeft.set_scale(model, n, 0.5), image(model))[2] for n in "ab"}
    for name in "ab":
        fxpeft.set_scale(model, name, 1.0)
    model.dummy_inputs = {
        "sample": random(2, 4, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": random(2, 5, 12),
    }  # fmt: skip
    fxpeft.prepare_hotswap(model, 8, lanes=2)
    given = {"cross_attention_kwargs": {"scale": 0.5}}
    with fxpeft.rows(model, ["a", "b"]):
        found = image(model, **given)
    assert close(found[0], both["a"][0])
    assert close(found[1], both["b"][1])
    fxpeft.set_adapter(model, "a")
    assert close(image(model, **given), both["a"])


def test_a_backward_after_the_call_has_its_scale() -> None:
    grads = []
    for scale in (None, 0.5):
        model: Any = unet()
        fxpeft.add_adapter(model, fxpeft.LoraConfig(**settings("unet", False)))
        randomise(model, 1)
        if scale is None:
            fxpeft.set_scale(model, "default", 0.5)
        given = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
        generator = torch.Generator().manual_seed(3)
        x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
        model(x, torch.tensor([3]), context, **given).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
