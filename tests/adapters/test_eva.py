"""EVA: ranks and components against PEFT's, what is left as it was, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from peer_versions import LABELS, needs, since
from peft.tuners.lora.eva import initialize_lora_eva_weights
from picture import assert_same, picture
from tiny import VOCABULARY, logits, randomise, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxpeft
import fxpeft.adapters.installing
from fxpeft import AdapterError, LoraConfig
from fxpeft.adapters import eva
from fxpeft.adapters.calls import check_call

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = token_ids()
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (
        tiny_llama,
        {
            "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "rank_pattern": {"down_proj": 6, "v_proj": 3},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "rslora, an embedding": (
        tiny_llama,
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "embed_tokens", "down_proj"]},
    ),
    "sites that get no rank": (tiny_llama, {"r": 1, "lora_alpha": 3, "target_modules": "all-linear"}),
    "gpt2": (tiny_gpt2, {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc", "c_proj"], "use_dora": True}),
}  # fmt: skip


def texts(batches: int = 4, rows: int = 4) -> list[dict[str, Tensor]]:
    """Batches with padding and with labels that don't count."""
    generator = torch.Generator().manual_seed(3)
    out = []
    for _ in range(batches):
        ids = torch.randint(1, VOCABULARY, (rows, 12), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, 8:] = 0
        labels[:, :2] = -100
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return out


def started(case: str, **config: Any) -> Any:
    make, own = CASES[case]
    model = make()
    fxpeft.add_adapter(model, LoraConfig(init_lora_weights="eva", eva_config=config, **own))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("llama", {}), ("llama", {"rho": 3.0, "tau": 0.9, "use_label_mask": False}),
        ("rslora, an embedding", {"rho": 1.5, "adjust_scaling_factors": False}),
        ("sites that get no rank", {"rho": 4.0}), ("gpt2", {}),
    ],
)  # fmt: skip
def test_ranks_and_components_are_those_of_peft(case: str, config: dict[str, Any], tmp_path: Path) -> None:
    if config.get("use_label_mask", True):
        needs(*LABELS)
    make, own = CASES[case]
    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(**config), **own)
    )
    initialize_lora_eva_weights(theirs, texts(), show_progress_bar=False)
    wanted = theirs.peft_config["default"]
    ours = started(case, **config)
    fxpeft.initialize_eva(ours, texts(), progress=False)
    found: Any = fxpeft.adapter_config(ours)
    assert found.rank_pattern == {k.removeprefix("base_model.model."): v for k, v in wanted.rank_pattern.items()}
    assert found.alpha_pattern == wanted.alpha_pattern
    assert set(found.target_modules) == set(wanted.target_modules)
    if case == "sites that get no rank":
        assert len(found.target_modules) < 14
    else:
        assert len(set(found.rank_pattern.values())) > 1

    tensors = {k: v for k, v in fxpeft.adapter_state_dict(ours).items() if "embed" not in k}
    theirs_tensors = peft.get_peft_model_state_dict(theirs)
    assert tensors.keys() == {k for k in theirs_tensors if "embed" not in k and "lm_head" not in k}
    for key, value in tensors.items():
        torch.testing.assert_close(value, theirs_tensors[key], rtol=0, atol=1e-3)  # signs are PEFT's too
    assert_close(logits(ours), logits(make()), terms=1)

    randomise(p for p in ours.parameters() if p.requires_grad and p.ndim == 2)
    fxpeft.save_adapter(ours, tmp_path)
    again = peft.PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    assert_close(logits(again), logits(ours))
    fxpeft.prepare_hotswap(ours, 16, methods=("lora", "dora"))
    assert_close(logits(ours), logits(again))


@since(*LABELS)
def test_whitening() -> None:
    """PEFT divides in place, so sites that share an input are divided again and again there; one site is right."""
    values: dict[str, Any] = {"r": 4, "init_lora_weights": "eva", "target_modules": ["down_proj"]}
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(eva_config=peft.EvaConfig(whiten=True), **values))
    initialize_lora_eva_weights(theirs, texts(), show_progress_bar=False)
    wanted = peft.get_peft_model_state_dict(theirs)
    ours = tiny_llama()
    fxpeft.add_adapter(ours, LoraConfig(eva_config={"whiten": True}, **values))  # type: ignore[arg-type]
    fxpeft.initialize_eva(ours, texts(), progress=False)
    for key, value in fxpeft.adapter_state_dict(ours).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-3, atol=1e-3)
        assert "lora_B" in key or not torch.allclose(value.norm(dim=1), torch.ones(len(value)), atol=0.1)


def test_components_in_batches_are_those_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([9.0, 5.0, 3.0, 2.0, *(0.3 for _ in range(8))])
    rows = torch.randn(400, 12, generator=generator) * spread @ torch.linalg.qr(torch.randn(12, 12))[0] + 2
    components = eva.Components(4, 0.99)
    for batch in rows.split(50):
        components.add(batch)
    _, s, vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert components.vectors is not None
    cosines = torch.cosine_similarity(components.vectors.float(), vh[:4]).abs()
    torch.testing.assert_close(cosines, torch.ones(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(components.explained().float(), (s.square() / s.square().sum())[:4], rtol=1e-3, atol=0)
    assert components.has_settled(4)
    components.add(rows[:3])  # too few rows for four components: left out
    assert components.seen == 400


def test_sites_with_one_input_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[eva.Components] = []
    init = eva.Components.__init__

    def counted(self: eva.Components, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(eva.Components, "__init__", counted)
    model = started("llama")
    fxpeft.initialize_eva(model, texts(), progress=False)
    assert len(made) == 2 * 4  # per layer: q, k, v; o; gate, up; down


@pytest.mark.parametrize("enabled", [True, False])
def test_the_model_is_left_as_it_was(enabled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = started("llama")
    fxpeft.add_adapter(model, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "lm_head"]), "other")
    randomise(p for n, p in model.named_parameters() if ".other." in n)
    fxpeft.set_adapter(model, ["other", "default"])
    before = logits(model)
    if not enabled:
        fxpeft.disable_adapters(model)
    base = {k: v.clone() for k, v in model.state_dict().items() if "adapters" not in k}
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules() if "adapters" not in type(m).__name__]
    fxpeft.initialize_eva(model, DataLoader(texts(), batch_size=None))  # type: ignore[arg-type]
    assert "layers have converged" in capsys.readouterr().err
    assert [m.training for m in model.model.layers] == [True, False]
    assert model.training
    assert len(modes) > 10
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert hooks == [check_call]  # the model's own, none of EVA's
    assert all(torch.equal(model.state_dict()[k], v) for k, v in base.items())
    assert fxpeft.active_adapters(model) == ["other", "default"]
    model.eval()
    fxpeft.enable_adapters(model)
    assert_close(logits(model), before, terms=1)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".other." in n for n in trained)
    assert any(".default." in n for n in trained)


class Pair(nn.Module):
    """No language model: two inputs of its own, one site called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(6, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x) + self.right(input=y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["tuple", "mapping", "own"])
def test_batches_of_any_form(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 9, 6, generator=generator), torch.randn(2, 9, 5, generator=generator)) for _ in range(3)]
    tuples = Pair()
    fxpeft.add_adapter(tuples, LoraConfig(r=2, target_modules=["left", "right"], init_lora_weights="eva"))
    fxpeft.initialize_eva(tuples, batches, progress=False)
    model = Pair()
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["left", "right"], init_lora_weights="eva"))
    data: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "tuple": ([list(b) for b in batches], {}),
        "mapping": ([{"x": x, "y": y} for x, y in batches], {}),
        "own": ([(y, x) for x, y in batches], {"forward": lambda m, b: m(b[1], b[0])}),
    }
    fxpeft.initialize_eva(model, data[form][0], progress=False, **data[form][1])
    for key, value in fxpeft.adapter_state_dict(model).items():
        assert torch.equal(value, fxpeft.adapter_state_dict(tuples)[key])
    directions = fxpeft.adapter_state_dict(model)["base_model.model.left.lora_A.weight"]
    assert_close(directions @ directions.t(), torch.eye(len(directions)))


def test_positions_that_count_are_the_callers() -> None:
    left: Tensor = torch.zeros(2, 8, dtype=torch.bool)
    left[:, :4] = True
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 4, 6, generator=generator)
    batch = torch.cat((rows, 100 * torch.randn(2, 4, 6, generator=generator)), 1)
    found = []
    for data, mask in ((batch, left), (rows, None)):
        model = nn.Sequential(nn.Linear(6, 4))
        fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva"))
        fxpeft.initialize_eva(model, [data] * 2, rows=lambda b, c, mask=mask: mask, progress=False)  # type: ignore[misc]
        found.append(fxpeft.adapter_state_dict(model)["base_model.model.0.lora_A.weight"])
    torch.testing.assert_close(found[0], found[1])


# --- refusals ---


def once() -> Iterator[dict[str, Tensor]]:
    yield from texts(1)


class Unused(nn.Module):
    """A model with a site that its forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        ([], {}, r"dataloader: expected at least one batch"),
        (once, {}, r"dataloader: .*gone through again"),
        (texts(2, rows=1), {"rho": 3.0}, r"no batch has as many rows.*q_proj: 12 components"),
        (texts(), {"rho": 9.0}, r"r \* rho is more than .*q_proj: 36 components, 32 input features"),
    ],
)
def test_data_that_do_not_do(data: Any, config: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    values: dict[str, Any] = {"eva_config": config, "target_modules": ["q_proj"]}
    fxpeft.add_adapter(model, LoraConfig(r=4, init_lora_weights="eva", **values))
    before = picture(model, IDS)
    with pytest.raises(AdapterError, match=rf"(?s){message}"):
        fxpeft.initialize_eva(model, data() if callable(data) else data, progress=False)
    assert_same(before, picture(model, IDS))


def test_a_site_that_is_never_called_is_named() -> None:
    model = Unused()
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["used", "unused"], init_lora_weights="eva"))
    with pytest.raises(AdapterError, match=r"never calls these sites.*\n  unused"):
        fxpeft.initialize_eva(model, [torch.randn(9, 6)], progress=False)


def test_other_adapters_and_slots_are_refused() -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "principal")
    with pytest.raises(AdapterError, match=r"'principal': expected .*init_lora_weights='eva', found 'pissa'"):
        fxpeft.initialize_eva(model, texts(), "principal")
    with pytest.raises(AdapterError, match=r"no adapter named 'default'"):
        fxpeft.initialize_eva(model, texts())
    model = started("llama")
    fxpeft.prepare_hotswap(model, 8)
    with pytest.raises(AdapterError, match=r"release_hotswap"):
        fxpeft.initialize_eva(model, texts())


@pytest.mark.filterwarnings("default::UserWarning")
def test_sites_that_do_not_settle_are_told() -> None:
    model = started("llama", tau=1.0)
    with pytest.warns(UserWarning, match=r"(?s)after 1 passes these sites have not settled.*q_proj"):
        fxpeft.initialize_eva(model, texts(2), max_passes=1, progress=False)
    a = fxpeft.adapter_state_dict(model)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert_close(a @ a.t(), torch.eye(len(a)))


def test_a_failed_change_leaves_the_old_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = started("llama")
    randomise(p for p in model.parameters() if p.requires_grad)
    before = picture(model, IDS)
    rebind, calls = fxpeft.adapters.installing.rebind, []

    def fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:  # off, on again, and then the new one
            raise RuntimeError("no")
        rebind(*args)

    monkeypatch.setattr(fxpeft.adapters.installing, "rebind", fails)
    with pytest.raises(RuntimeError, match="no"):
        fxpeft.initialize_eva(model, texts(), progress=False)
    after = picture(model, IDS)
    for one in (before, after):  # the parameters are new objects
        one["parameters"] = [p[:2] for p in one["parameters"]]
    assert_same(before, after)
