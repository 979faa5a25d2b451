"""TRL's trainers on models that fxpeft has adapted: the same steps as with PEFT, reference and refusals included."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, randomise
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

import fxpeft
from fxpeft import LoraConfig

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "use_cpu": True, "bf16": False, "seed": 3,
    "learning_rate": 0.02, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
FIELDS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
WORDS = {"<pad>": 0, "<eos>": 1, **{chr(ord("a") + i): 2 + i for i in range(26)}}
PAIRS = {"prompt": ["a b c", "d e"], "chosen": [" f g", " h"], "rejected": [" i", " j k l"]}
LABELLED = {"prompt": ["a b c", "d e"], "completion": [" f g", " h"], "label": [True, False]}
DATA = {
    "SFT": {"text": ["a b c d", "d e f g h"]}, "Reward": PAIRS, "DPO": PAIRS, "KTO": LABELLED,
    "GRPO": {"prompt": PAIRS["prompt"]}, "RLOO": {"prompt": PAIRS["prompt"]},
}  # fmt: skip
SAMPLED = {"num_generations": 2, "max_completion_length": 3, "beta": 0.1}
MORE: dict[str, dict[str, Any]] = {"GRPO": SAMPLED, "RLOO": SAMPLED, "DPO": {"gradient_checkpointing": True}}


def tokenizer() -> PreTrainedTokenizerFast:
    tokenizers = importlib.import_module("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def base(kind: str = "SFT") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=2, num_labels=1,
    )  # fmt: skip
    return (LlamaForSequenceClassification if kind == "Reward" else LlamaForCausalLM)(config)


def trainer(kind: str, model: Any, folder: Path, **more: Any) -> Any:
    settings = {"gradient_checkpointing": False, **SETTINGS, **MORE.get(kind, {})}
    if kind in ("GRPO", "RLOO"):
        more["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
    config = getattr(trl, f"{kind}Config")(output_dir=str(folder), **settings)
    data = importlib.import_module("datasets").Dataset.from_dict(DATA[kind])
    torch.manual_seed(1)
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=config, train_dataset=data, processing_class=tokenizer(), **more
    )


def trained(model: Any) -> dict[str, torch.Tensor]:
    """What is trained, under the names that both libraries share."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.removeprefix("base_model.model."): p for name, p in named}


def run(made: Any) -> list[dict[str, float]]:
    """Train; the steps' figures."""
    set_seed(5)  # completions are drawn
    made.train()
    skip = ("train_", "_time", "num_tokens", "epoch")
    return [
        {k: v for k, v in step.items() if not any(part in k for part in skip)} for step in made.state.log_history[:2]
    ]


def assert_same_steps(ours: Any, theirs: Any) -> None:
    expected, found = run(theirs), run(ours)
    assert len(found) == 2
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)
    pairs = list(zip(trained(ours.model).items(), trained(theirs.model).items(), strict=True))
    assert pairs
    for (name, mine), (_, other) in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)


def same_adapters(kind: str, method: str = "Lora", **fields: Any) -> tuple[Any, Any]:
    """The same model adapted by fxpeft and by PEFT, with the same values."""
    peft = importlib.import_module("peft")
    mine, theirs = base(kind), peft.get_peft_model(base(kind), getattr(peft, f"{method}Config")(**fields))
    fxpeft.add_adapter(mine, getattr(fxpeft, f"{method}Config")(**fields))
    for model in (mine, theirs):
        randomise(trained(model).values(), seed=4)
    return mine, theirs


HEAD = {**FIELDS, "modules_to_save": ["lm_head"]}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SFT": ("SFT", "Lora", HEAD),
    "SFT with a prompt": ("SFT", "PromptTuning", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "Reward": ("Reward", "Lora", {**FIELDS, "task_type": "SEQ_CLS"}),
    "DPO": ("DPO", "Lora", {**HEAD, "use_dora": True}),
    **{kind: (kind, "Lora", FIELDS) for kind in ("KTO", "GRPO", "RLOO")},
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_came_with_an_adapter(case: str, tmp_path: Path) -> None:
    kind, method, fields = CASES[case]
    mine, theirs = same_adapters(kind, method, **fields)
    ours = trainer(kind, mine, tmp_path)
    if kind not in ("SFT", "Reward"):  # the reference is a copy of the adapter, not the base from disk
        assert ours.ref_model is None
        assert fxpeft.loaded_adapters(mine) == ["default", "ref"]
    assert_same_steps(ours, trainer(kind, theirs, tmp_path))
    assert fxpeft.active_adapters(mine) == ["default"]


def test_the_reference_is_a_copy_whatever_the_adapter_started_from(tmp_path: Path) -> None:
    model = base()
    fxpeft.add_adapter(model, LoraConfig(**FIELDS, init_lora_weights="pissa_niter_2"))  # type: ignore[arg-type]
    randomise(trained(model).values(), seed=4)
    fxpeft.set_scale(model, "default", 0.5)
    trainer("DPO", model, tmp_path)
    ids = torch.arange(2, 9)[None]
    expected = model(ids).logits
    with fxpeft.active(model, "ref"):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_the_reference_of_a_peft_config_is_the_adapter_switched_off(kind: str, tmp_path: Path) -> None:
    peft = importlib.import_module("peft")
    ours = trainer(kind, base(), tmp_path, peft_config=LoraConfig(**FIELDS))
    theirs = trainer(kind, base(), tmp_path, peft_config=peft.LoraConfig(**FIELDS))
    assert not isinstance(ours.model, peft.PeftModel)
    assert isinstance(theirs.model, peft.PeftModel)
    assert ours.ref_model is None
    for made in (ours, theirs):
        randomise(trained(made.model).values(), seed=4)
    assert_same_steps(ours, theirs)


@pytest.mark.parametrize("came", [True, False])
def test_the_first_step_is_at_the_reference(came: bool, tmp_path: Path) -> None:
    model, config = base(), LoraConfig(**FIELDS)
    if came:
        model.add_adapter(config)
        randomise(trained(model).values(), seed=4)
    made = trainer("DPO", model, tmp_path, **({} if came else {"peft_config": config}))
    before = {name: value.clone() for name, value in trained(model).items()}
    first, second = run(made)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["loss"] < first["loss"] - 1e-4
    assert all(not torch.equal(value, before[name]) for name, value in trained(model).items())


@pytest.mark.parametrize("kind", [kind for kind in DATA if kind != "Reward"])  # whose head is called
def test_an_adapted_head_is_refused(kind: str, tmp_path: Path) -> None:
    model = base()
    fxpeft.add_adapter(model, LoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer(kind, model, tmp_path)


@pytest.fixture
def dpo_module() -> Iterator[Callable[[], Any]]:
    """Imports the module of DPOTrainer as if it had not been."""
    name = "trl.trainer.dpo_trainer"
    before = importlib.import_module(name)

    def imported() -> Any:
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield imported
    sys.modules[name] = before


def test_trainers_that_are_imported_later(dpo_module: Callable[[], Any]) -> None:
    model = base()
    fxpeft.add_adapter(model, LoraConfig(**FIELDS))
    module = dpo_module()
    assert module.is_peft_model(model)
    assert not module.is_peft_model(base())
    fxpeft.uninstall()
    assert not module.is_peft_model(model)
    assert not dpo_module().is_peft_model(model)
    assert "get_base_model" not in dir(base())
