"""Adapters in training: gradients, dtypes, copies, checkpointing, torch.compile and a Trainer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import randomise, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import fxpeft
from fxpeft import LoraConfig
from fxpeft.methods.base import SiteAdapter

IDS = token_ids()
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (tiny_llama, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 2}}),
    "llama-bias": (tiny_llama, {"lora_bias": True, "modules_to_save": ["lm_head"]}),
    "llama-dora": (tiny_llama, {"use_dora": True, "lora_dropout": 0.0, "bias": "lora_only"}),
    "gpt2": (tiny_gpt2, {"bias": "all", "rank_pattern": {"c_attn": 5}}),
    "bert": (tiny_bert, {"bias": "lora_only", "task_type": "SEQ_CLS"}),
}


def adapted(case: str = "llama", **values: Any) -> Any:
    make, own = MODELS[case]
    model = make()
    fxpeft.add_adapter(model, LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", **own, **values))
    randomise(fxpeft.adapter_state_dict(model).values(), scale=0.2)
    return model


def loss_of(model: Any) -> Tensor:
    return model(IDS).logits.float().log_softmax(-1).square().mean()  # type: ignore[no-any-return]


def gradients(model: nn.Module, run: Any = None) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(run if run is not None else model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value)


@pytest.mark.parametrize("case", MODELS)
def test_one_step_changes_the_adapter_and_nothing_else(case: str) -> None:
    model = adapted(case).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".adapters.default." in n for n in trained)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05)
    assert gradients(model).keys() <= trained.keys()
    optimiser.step()
    # an embedding's padding row, an unused token's row: some entries, but no whole tensor, may stay
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trained)


class Net(nn.Module):
    """An embedding, a linear and a grouped convolution, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.line, self.conv = nn.Embedding(40, 6), nn.Linear(6, 4), nn.Conv1d(4, 8, 3, groups=2)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.line(self.table(ids)).tanh().transpose(1, 2)).square().mean()


@pytest.mark.parametrize(
    "values",
    [{}, {"use_rslora": True}, {"bias": "all"}, {"modules_to_save": ["line"]}, {"rank_pattern": {"conv": 2}}],
)
def test_gradients_are_the_slope_of_the_loss(values: dict[str, Any]) -> None:
    model = Net()
    targets = ["table", "conv"] if "modules_to_save" in values else ["table", "line", "conv"]
    fxpeft.add_adapter(model, LoraConfig(r=4, lora_alpha=7, target_modules=targets, **values))
    randomise(fxpeft.adapter_state_dict(model).values())
    model(IDS).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.dtype == torch.float64 for p in trained)
    steps = [torch.randn_like(p) for p in trained]
    slope = sum((p.grad * s).sum() for p, s in zip(trained, steps, strict=True))  # type: ignore[operator]
    losses = []
    with torch.no_grad():
        for move in (1e-5, -2e-5):
            for p, s in zip(trained, steps, strict=True):
                p.add_(s, alpha=move)
            losses.append(model(IDS))
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-5, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(reentrant: bool) -> None:
    model = adapted().train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    all_close(gradients(model), expected)


def test_gradient_checkpointing_with_dropout_sees_one_mask() -> None:
    model = adapted(lora_dropout=0.5).train()
    torch.manual_seed(3)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    all_close(gradients(model), expected)
    torch.manual_seed(4)
    key = "model.layers.0.mlp.up_proj.adapters.default.lora_B"
    assert not torch.allclose(gradients(model)[key], expected[key])


def test_dropout_is_off_in_evaluation() -> None:
    model = adapted(lora_dropout=0.5)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


# --- copies and casts ---


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
def test_copy_of_a_model_with_adapters_lives_on_its_own(copied: Callable[[Any], Any], case: str) -> None:
    model = adapted(case)
    with torch.no_grad():
        expected = model(IDS).logits
        twin = copied(model)
        assert torch.equal(twin(IDS).logits, expected)
        for tensor in fxpeft.adapter_state_dict(twin).values():
            tensor.zero_()
        assert not torch.equal(twin(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected), "they share nothing"
        fxpeft.remove(twin)
        bare = MODELS[case][0]()
        assert torch.equal(twin(IDS).logits, bare(IDS).logits)
        assert torch.equal(model(IDS).logits, expected)
    assert [type(m) for m in twin.modules()] == [type(m) for m in bare.modules()]
    fxpeft.delete_adapter(model, "default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_keeps_the_scale_exact(dtype: torch.dtype) -> None:
    model = adapted()
    fxpeft.set_scale(model, "default", 0.3)
    expected = model(IDS).logits
    model.to(dtype)
    sites = [m for m in model.modules() if isinstance(m, SiteAdapter)]
    assert len(sites) == 2 * 7
    for site in sites:
        assert site.scaling.dtype == torch.float32
        assert site.scaling.item() == torch.tensor(site.plan.scaling * 0.3).item()
    found = model(IDS).logits
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_base_has_float32_adapters_where_asked(autocast: bool) -> None:
    model = tiny_llama(torch.bfloat16)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"])
    fxpeft.add_adapter(model, config, autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    assert model(IDS).logits.dtype == torch.bfloat16
    loss_of(model.train()).backward()


@pytest.mark.parametrize("autocast", [torch.bfloat16])
def test_torch_autocast(autocast: torch.dtype) -> None:
    model = adapted()
    expected = model(IDS).logits
    with torch.autocast("cpu", autocast):
        found = model(IDS).logits
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


# --- torch.compile ---


@pytest.mark.parametrize(
    ("how", "case"),
    [("layers", "llama"), ("full", "llama-bias"), ("full", "gpt2"), ("full", "bert")],
)
def test_compiled_equals_eager_gradients_too(how: str, case: str) -> None:
    torch._dynamo.reset()
    model = adapted(case)
    expected, expected_grads = model(IDS).logits.detach(), gradients(model)
    run: Any = model
    if how == "layers":
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    else:
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(run(IDS).logits, expected)
    all_close(gradients(model, run), expected_grads)
    assert fxpeft.active_adapters(run) == ["default"], "the compiled wrapper is taken too"


def test_compiled_follows_switching() -> None:
    torch._dynamo.reset()
    model = adapted()
    run: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    bare = tiny_llama()(IDS).logits
    on = model(IDS).logits
    assert_close(run(IDS).logits, on)
    with fxpeft.disabled(run):
        assert_close(run(IDS).logits, bare)
    fxpeft.set_scale(run, "default", 0.0)
    assert_close(run(IDS).logits, bare)
    fxpeft.set_scale(run, "default", 1.0)
    assert_close(run(IDS).logits, on)
    fxpeft.remove(run)
    assert_close(run(IDS).logits, bare)


# --- a real run ---


class Tokens(Dataset[dict[str, Tensor]]):
    """The same eight random sequences, over and over."""

    def __init__(self) -> None:
        self.ids = token_ids(batch=8, length=12)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", modules_to_save=["lm_head"]),
        LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"]),
        fxpeft.IA3Config(modules_to_save=["lm_head"]),
    ],
    ids=["lora", "dora", "ia3"],
)
def test_trainer_lowers_the_loss_and_the_result_reloads(config: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    own = {k: v.clone() for k, v in model.state_dict().items()}
    fxpeft.add_adapter(model, config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=15, per_device_train_batch_size=8, learning_rate=0.03,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 15
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in own.items())
    fxpeft.save_adapter(model, tmp_path / "adapter")
    again = tiny_llama()
    fxpeft.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
