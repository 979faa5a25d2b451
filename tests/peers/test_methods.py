"""Every method on every kind of target beside PEFT; what passes becomes the table in the guide."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from method_cases import KINDS, METHODS, OTHER, KindCase, MethodCase, adapted, gradients, output, served
from tiny import randomise, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

import fxpeft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "methods.md"


def trains(method: MethodCase, kind: KindCase, folder: Path) -> None:
    """Gradients are PEFT's; some steps lower a loss; the base stays as it was."""
    net, x = adapted(method, kind), kind.input()
    wanted = torch.randn_like(output(net, x))
    if not any(KINDS[alone] is kind for alone in method.alone):
        fxpeft.save_adapter(net, folder)
        peer = peft.PeftModel.from_pretrained(kind.net(), str(folder), is_trainable=True).eval()
        (peer(x) - wanted).square().mean().backward()
        (net(x) - wanted).square().mean().backward()
        named = peer.named_parameters(remove_duplicate=False)
        grads = {n.replace(".default", ""): p.grad for n, p in named if p.grad is not None}
        found = gradients(net)
        for key in fxpeft.adapter_state_dict(net):
            grad = grads.get(key, grads.get(f"{key}.weight"))
            if key not in found:  # VeRA's factors, DeLoRA's norms
                assert grad is None
                continue
            assert grad is not None, key
            assert grad.abs().max() > 0
            assert_close(found[key], grad)
        net.zero_grad()
    base = {n: p.detach().clone() for n, p in net.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), lr=0.03)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = (net(x) - wanted).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert base
    assert all(torch.equal(p, base[n]) for n, p in net.named_parameters() if n in base)


def serves(method: MethodCase, kind: KindCase, folder: Path) -> None:
    """The slot computes what the training subgraph does, in float32 and bfloat16, at any rank mode."""
    for dtype in (torch.float32, torch.bfloat16):
        for rank in ("dynamic", "static"):
            net, x = adapted(method, kind).to(dtype), kind.input()
            x = x.to(dtype) if x.is_floating_point() else x
            bare, trained = output(kind.net().to(dtype), x), output(net, x)
            assert (trained.float() - bare.float()).abs().max() > 0.05
            fxpeft.prepare_hotswap(net, 8, methods=(method.declared,), rank=rank)  # type: ignore[arg-type]
            assert_close(output(net, x), trained)
            fxpeft.disable_adapters(net)
            assert torch.equal(output(net, x), bare)


@functools.cache
def compiled(kind: str) -> tuple[nn.Module, Callable[..., Any]]:
    """A kind's net with slots for all of its methods, compiled by Inductor: once for all cells of its column."""
    net = served(KINDS[kind], kind)
    graph = torch.compile(net, fullgraph=True)
    output(graph, KINDS[kind].input())
    return net, graph


def swaps(method: MethodCase, kind: KindCase, folder: Path) -> None:
    """Two adapters, of other values and ranks, and none, in one graph of Inductor's that serves other methods too."""
    usual = {} if method.declared in ("ia3", "adalora") else OTHER
    changes = usual if method.other is None else method.other
    nets, x = [adapted(method, kind), adapted(method, kind, seed=1, **changes)], kind.input()
    net, graph = compiled(next(name for name, case in KINDS.items() if case is kind))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, each in enumerate(nets):
            fxpeft.save_adapter(each, folder / str(i))
            fxpeft.load_adapter(net, folder / str(i), f"a{i}")
        for i in (0, 1, 0):
            fxpeft.set_adapter(net, f"a{i}")
            assert_close(output(graph, x), output(nets[i], x))
        fxpeft.disable_adapters(net)
        assert_close(output(graph, x), output(kind.net(), x), terms=1)
        fxpeft.enable_adapters(net)
        for i in (0, 1):
            fxpeft.delete_adapter(net, f"a{i}")


def folds(method: MethodCase, kind: KindCase, folder: Path) -> None:
    """Merged into the weights it computes the same, and the weights come back bit for bit."""
    net, x = adapted(method, kind), kind.input()
    wanted, weights = output(net, x), {n: p.clone() for n, p in kind.net().named_parameters()}
    fxpeft.fold(net)
    assert_close(output(net, x), wanted)
    assert not all(torch.equal(net.get_parameter(n), p) for n, p in weights.items())
    fxpeft.unfold(net)
    assert all(torch.equal(net.get_parameter(n), p) for n, p in weights.items())
    assert_close(output(net, x), wanted)


def reads(method: MethodCase, kind: KindCase, folder: Path) -> None:
    """What PEFT saved."""
    settings = {**method.settings, "target_modules": ["first", "second"]}
    if method.ours is not fxpeft.AdaLoraConfig:
        peer = peft.get_peft_model(kind.net(), method.theirs(**settings)).eval()
    else:
        peer = peft.PeftModel(kind.net(), method.theirs(**settings)).eval()
    parts = (
        "lora_",
        "ia3_",
        "hada_",
        "lokr_",
        "vera_lambda",
        "miss_",
        "vblora_",
        "hra_",
        "oft_",
        "boft_",
        "beft_",
        "gralora_",
        "deft_",
        "hira_",
        "c3a_",
        "fourierft_",
        "psoft_",
        "pvera_lambda",
        "tinylora_v",
        "unilora_theta",
        "adamss_A",
        "adamss_B",
        "osf_svd_params",
        "glora_",
        "waveft_",
        "road_",
        "randlora_lambda",
        "randlora_gamma",
        "supertuning_values",
        "shira_weight",
    )
    randomise((p for n, p in peer.named_parameters() if any(part in n for part in parts)), seed=3)
    peer.save_pretrained(str(folder))
    net, x = kind.net(), kind.input()
    fxpeft.load_adapter(net, folder)
    assert_close(output(net, x), output(peer, x))
    assert (output(net, x) - output(kind.net(), x)).abs().max() > 0.01


def writes(method: MethodCase, kind: KindCase, folder: Path) -> None:
    """PEFT reads what was saved."""
    net, x = adapted(method, kind), kind.input()
    fxpeft.save_adapter(net, folder)
    peer = peft.PeftModel.from_pretrained(kind.net(), str(folder)).eval()
    assert_close(output(peer, x), output(net, x))


CHECKS = {"T": trains, "S": serves, "H": swaps, "F": folds, "R": reads, "W": writes}
passed: dict[tuple[str, str], list[str]] = {}


def run(method: str, kind: str, folder: Path) -> None:
    """All checks of one cell; what passes is noted."""
    case, cell = METHODS[method], passed.setdefault((method, kind), [])
    cell.clear()
    for letter, check in CHECKS.items():
        if letter in "RW" and kind in case.alone:
            continue
        (folder / letter).mkdir(parents=True)
        check(case, KINDS[kind], folder / letter)
        cell.append(letter)


CELLS = [(m, k) for m, case in METHODS.items() for k in KINDS if k not in case.refused]


@pytest.mark.parametrize(("method", "kind"), CELLS)
def test_method_on_kind(method: str, kind: str, tmp_path: Path) -> None:
    run(method, kind, tmp_path)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "Embedding"])  # whose LoRA has no dropout
def test_dora_with_dropout_trains_as_in_peft(kind: str, tmp_path: Path) -> None:
    net, x = adapted(METHODS["DoRA"], KINDS[kind], lora_dropout=0.4).train(), KINDS[kind].input()
    fxpeft.save_adapter(net, tmp_path)
    peer = peft.PeftModel.from_pretrained(KINDS[kind].net(), str(tmp_path), is_trainable=True).train()
    found = []
    for model in (net, peer):
        torch.manual_seed(5)
        found.append(model(x))
    assert_close(*found)
    assert not torch.allclose(found[0], output(net.eval(), x), atol=1e-3)


@pytest.mark.parametrize(("method", "kind"), [(m, k) for m, case in METHODS.items() for k in case.refused])
def test_kind_that_a_method_refuses_is_named_and_the_model_stays(method: str, kind: str) -> None:
    net = KINDS[kind].net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(fxpeft.AdapterError, match=r"^first: .*leave the site out"):
        fxpeft.add_adapter(net, METHODS[method].config())
    assert type(net.first) is type(KINDS[kind].layer())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
def test_default_targets_are_those_of_peft(build: Callable[[], Any]) -> None:
    for ours, theirs in (
        (fxpeft.IA3Config(), peft.IA3Config()),
        (fxpeft.AdaLoraConfig(total_step=5), peft.AdaLoraConfig(total_step=5)),
    ):
        model = build()
        fxpeft.add_adapter(model, ours)
        peer = peft.get_peft_model(build(), theirs)
        found, expected = fxpeft.adapter_config(model), peer.peft_config["default"]
        assert set(found.target_modules) == set(expected.target_modules)
        if isinstance(found, fxpeft.IA3Config):
            assert set(found.feedforward_modules) == set(expected.feedforward_modules)
        keys = peft.get_peft_model_state_dict(peer)
        assert {k: v.shape for k, v in fxpeft.adapter_state_dict(model).items()} == {
            k: v.shape for k, v in keys.items()
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feedforward_modules": ["third"]}, "feedforward_modules: expected a part of target_modules.* lacks third"),
        ({"feedforward_modules": 3}, "feedforward_modules: expected"),
        ({"init_ia3_weights": "ones"}, "init_ia3_weights: expected bool"),
    ],
)
def test_wrong_ia3_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(fxpeft.AdapterError, match=message):
        METHODS["IA3"].config(**changes)


def test_ia3_on_an_unknown_architecture_asks_for_names() -> None:
    with pytest.raises(fxpeft.AdapterError, match="no default target_modules of IA3 for Net"):
        fxpeft.add_adapter(KINDS["Linear"].net(), fxpeft.IA3Config())
    with pytest.raises(fxpeft.AdapterError, match="no default feedforward_modules for Net"):
        fxpeft.add_adapter(KINDS["Linear"].net(), fxpeft.IA3Config(target_modules=["first"]))


def table() -> str:
    """The guide's table of what passed."""
    lines = ["| method | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for method, case in METHODS.items():
        cells = ["" if k in case.refused else "".join(passed[method, k]) for k in KINDS]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_in_the_guide_says_what_passed(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for method, kind in CELLS:
        if (method, kind) not in passed:  # this test alone was asked for
            run(method, kind, tmp_path / method / kind)
    text, start, end = GUIDE.read_text(encoding="utf-8"), "<!-- methods -->\n", "\n<!-- end methods -->"
    before, _, rest = text.partition(start)
    found, _, after = rest.partition(end)
    if request.config.getoption("--fxpeft-update"):
        GUIDE.write_text(before + start + table() + end + after, encoding="utf-8")
        found = table()
    assert found == table()


def test_a_table_that_says_more_than_passed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for cell in CELLS:  # whatever ran before
        monkeypatch.setitem(passed, cell, ["T"] if cell == CELLS[0] else passed.get(cell, []))
    assert table() not in GUIDE.read_text(encoding="utf-8")
