"""The bridge beside PEFT: the same script gives the same outputs, and files that each other loads."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from picture import assert_same, picture
from safetensors.torch import load_file
from tiny import VOCABULARY, randomise, tiny_bert, tiny_llama, token_ids
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import fxpeft
from fxpeft.integrations import peft as bridge
from fxpeft.testing import no_recompiles

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

IDS = token_ids()
LORA: dict[str, Any] = {
    "r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3},
    "alpha_pattern": {"q_proj": 7}, "task_type": "CAUSAL_LM",
}  # fmt: skip
OTHER: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def start(library: Any, config: Any) -> Any:
    """A model whose adapter has the same random values in both libraries."""
    model = library.get_peft_model(tiny_llama(), config)
    for key, value in sorted(lora(model, "default").items()):
        randomise([value], seed=sum(map(ord, key)))
    return model


def lora(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors by what is called the same in both."""
    found = {}
    for key, value in model.named_parameters():
        if f".{name}." not in key or "lora_" not in key:
            continue
        site = key.replace("base_model.model.", "").partition(".adapters." if ".adapters." in key else ".lora_")[0]
        found[f"{site}.{'A' if 'lora_A' in key else 'B'}"] = value.data
    return found


def script(library: Any, config_class: Any, folder: Path) -> list[Any]:
    """What people write for PEFT; what was seen on the way."""
    seen: list[Any] = []
    model = start(library, config_class(**LORA))
    assert isinstance(model, library.PeftModel)
    seen += [model.get_nb_trainable_parameters(), model.active_adapter, model.active_adapters]
    seen += [list(model.peft_config), model.peft_config["default"].r, model.active_peft_config.lora_alpha]
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        seen.append(loss.detach())
    model.eval()
    with torch.no_grad():
        seen.append(model(IDS).logits)
        with model.disable_adapter():
            seen.append(model(IDS).logits)
        seen.append(model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, attention_mask=IDS * 0 + 1))
        model.save_pretrained(folder / "trained")

        model.add_adapter("second", config_class(**OTHER))
        seen += [model.active_adapter, trained(model)]
        model.set_adapter("second")
        randomise([value for _, value in sorted(lora(model, "second").items())], seed=5)
        seen += [model.active_adapter, trained(model), model(IDS).logits]
        model.set_adapter("default", inference_mode=True)
        seen.append(trained(model))
        model.set_requires_grad("second")
        seen.append(trained(model))
        model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "blend", combination_type="cat")
        seen += [model.active_adapter, trained(model)]
        model.set_adapter("blend")
        seen += [model(IDS).logits, list(model.peft_config)]
        model.save_pretrained(folder / "all")
        model.save_pretrained(folder / "one", selected_adapters=["second"])
        with pytest.raises(ValueError, match="selected_adapters"):
            model.save_pretrained(folder / "none", selected_adapters=["x"])
        model.set_adapter("default")
        model.delete_adapter("blend")
        seen += [model.active_adapters, list(model.peft_config)]
        model.load_adapter(folder / "all" / "blend", "again")
        seen += [model.active_adapters, trained(model), model.training]
        model.set_adapter("again", inference_mode=True)
        seen.append(model(IDS).logits)
        model.load_adapter(folder / "trained", "default")  # other values into one of that name
        model.set_adapter("default")
        seen.append(model(IDS).logits)
        model.merge_adapter()
        seen += [model(IDS).logits, model.active_adapters]
        model.unmerge_adapter()
        seen.append(model(IDS).logits)
        model.disable_adapter_layers()
        seen.append(model(IDS).logits)
        model.enable_adapter_layers()
        base = model.get_base_model()
        assert isinstance(base, LlamaForCausalLM)
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged) is LlamaForCausalLM
        seen += [merged(IDS).logits, sorted(merged.state_dict()), [type(m).__name__ for m in merged.modules()]]

    loaded = library.PeftModel.from_pretrained(tiny_llama(), folder / "trained")
    seen += [loaded(IDS).logits.detach(), trained(loaded), loaded.training]
    loaded = library.PeftModel.from_pretrained(tiny_llama(), str(folder / "all"), "mine", is_trainable=True)
    seen += [loaded(IDS).logits.detach(), trained(loaded), loaded.active_adapter]
    bare = loaded.unload()
    assert type(bare) is LlamaForCausalLM
    seen.append(bare(IDS).logits.detach())
    return seen


def trained(model: nn.Module) -> dict[str, bool]:
    """Adapter -> whether it is trained."""
    found: dict[str, set[bool]] = {}
    for key, value in model.named_parameters():
        for name in ("default", "second", "blend", "again", "mine"):
            if f".{name}." in key and "lora_" in key:
                found.setdefault(name, set()).add(value.requires_grad)
    assert all(len(values) == 1 for values in found.values())
    return {name: values.pop() for name, values in found.items()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], Path, list[Any]]:
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    return ours, script(bridge, fxpeft.LoraConfig, ours), theirs, script(peft, peft.LoraConfig, theirs)


def test_the_same_script_sees_the_same(ran: Any) -> None:
    _, ours, _, theirs = ran
    assert len(ours) == len(theirs)
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(one, Tensor) and one.is_floating_point():
            torch.testing.assert_close(
                one, other, rtol=0, atol=2e-5, msg=lambda text, step=step: f"step {step}: {text}"
            )
        elif isinstance(one, Tensor):
            assert torch.equal(one, other), step
        else:
            assert one == other, step


FOLDERS = ("trained", "all", "all/second", "all/blend", "one/second")


def test_it_writes_the_same_files(ran: Any) -> None:
    ours, _, theirs, _ = ran
    for folder in set(FOLDERS) - {"all/blend"}:  # whose ranks PEFT fills up with zeros
        mine, its = (load_file(root / folder / "adapter_model.safetensors") for root in (ours, theirs))
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, its[key], rtol=0, atol=2e-5)
        configs = [json.loads((root / folder / "adapter_config.json").read_text()) for root in (ours, theirs)]
        for field in ("peft_type", "task_type", "r", "rank_pattern", "inference_mode", "base_model_name_or_path"):
            assert configs[0][field] == configs[1][field], field
    found = [sorted(str(p.relative_to(root)) for p in root.rglob("adapter_*")) for root in (ours, theirs)]
    assert found[0] == found[1]


def test_each_loads_what_the_other_wrote(ran: Any) -> None:
    ours, _, theirs, _ = ran
    for folder in FOLDERS:
        outputs = []
        for root in (ours, theirs):
            for library in (bridge, peft):
                outputs.append(library.PeftModel.from_pretrained(tiny_llama(), root / folder)(IDS).logits.detach())
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], rtol=0, atol=2e-5)
        assert (outputs[0] - tiny_llama()(IDS).logits).abs().max() > 0.01


def test_it_takes_pefts_own_configs_without_importing_peft(tmp_path: Path) -> None:
    model = start(bridge, peft.LoraConfig(**LORA))
    assert isinstance(model.peft_config["default"], fxpeft.LoraConfig)
    assert torch.equal(model(IDS).logits, start(bridge, fxpeft.LoraConfig(**LORA))(IDS).logits)
    model.add_adapter("second", peft.LoraConfig(**OTHER))
    model.save_pretrained(tmp_path)
    loaded = bridge.PeftModel.from_pretrained(
        tiny_llama(), tmp_path, config=peft.LoraConfig(**{**LORA, "lora_alpha": 20, "alpha_pattern": {}})
    )
    doubled = peft.PeftModel.from_pretrained(
        tiny_llama(), tmp_path, config=peft.LoraConfig(**{**LORA, "lora_alpha": 20, "alpha_pattern": {}})
    )
    torch.testing.assert_close(loaded(IDS).logits, doubled(IDS).logits, rtol=0, atol=2e-5)
    with pytest.raises(TypeError, match="should be one of fxpeft's configs"):
        bridge.get_peft_model(tiny_llama(), object())


@pytest.mark.slow
def test_it_needs_no_peft(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["peft"] = None  # every import of it fails
import fxpeft
from torch import nn
model = fxpeft.get_peft_model(nn.Sequential(nn.Linear(3, 4)), fxpeft.LoraConfig(r=2, target_modules=["0"]))
model.save_pretrained(sys.argv[1])
fxpeft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 4)), sys.argv[1]).print_trainable_parameters()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("trainable params: 0 || all params: 30")


def test_the_active_adapter_deleted() -> None:
    for library, config in ((bridge, fxpeft.LoraConfig), (peft, peft.LoraConfig)):
        model = start(library, config(**LORA))
        model.add_adapter("second", config(**LORA))
        model.delete_adapter("default")
        assert model.active_adapters == ["second"]
        assert trained(model) == {"second": True}
    model = start(bridge, fxpeft.LoraConfig(**LORA))
    model.delete_adapter("default")  # after which PEFT's can't be called
    assert (model.active_adapters, model.peft_config) == ([], {})
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    model.add_adapter("third", fxpeft.LoraConfig(**LORA))
    assert model.active_adapter == "third"


def test_the_model_is_the_model() -> None:
    """Its class, names and ``state_dict`` are its own, and come back bit for bit."""
    model = tiny_llama()
    keys = list(model.state_dict())
    before = picture(model, IDS)
    bridged = bridge.get_peft_model(model, fxpeft.LoraConfig(**LORA))
    assert bridged is model
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, fxpeft.PeftModel)
    assert not isinstance(tiny_llama(), fxpeft.PeftModel)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).from_pretrained.__func__ is LlamaForCausalLM.from_pretrained.__func__
    assert type(bridge.get_peft_model(tiny_llama(), fxpeft.LoraConfig(**LORA))) is type(model)
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    assert bridged.get_base_model() is model
    assert type(bridged.base_model).__name__ == "LlamaModel"
    assert bridged.unload() is model
    assert_same(before, picture(model, IDS))
    bridge.PeftModel(model, fxpeft.LoraConfig(**LORA))
    fxpeft.remove(model)  # takes out the adapters; the methods stay until unload
    assert isinstance(model, fxpeft.PeftModel)
    assert bridged.active_adapters == []
    assert bridged.peft_config == {}
    bridged.unload()
    assert_same(before, picture(model, IDS))


class Abstract(nn.Module):
    """A module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[batch, 6]``."""
        out: Tensor = self.base_model(x)
        return out


def test_any_module() -> None:
    model = Abstract()
    bridged = bridge.get_peft_model(model, fxpeft.LoraConfig(r=2, target_modules=["base_model"]), "mine")
    assert bridged.base_model is model._modules["base_model"]
    assert bridge.get_peft_model(
        nn.Sequential(nn.Linear(3, 4)), fxpeft.LoraConfig(r=2, target_modules=["0"])
    ).base_model
    assert type(bridged.unload()) is Abstract


@pytest.mark.parametrize("prepared", [False, True], ids=["live", "prepared"])
@pytest.mark.parametrize("prompt", [False, True], ids=["lora", "prompt"])
def test_copies_and_pickles(prepared: bool, prompt: bool) -> None:
    config = fxpeft.PromptTuningConfig(num_virtual_tokens=3) if prompt else fxpeft.LoraConfig(**LORA)
    model = bridge.get_peft_model(tiny_llama(), config)
    randomise((p for p in model.parameters() if p.requires_grad), seed=2)
    if prepared:
        methods = ("prompt_tuning",) if prompt else ("lora",)
        fxpeft.prepare_hotswap(model, 8, methods=methods, num_virtual_tokens=3 if prompt else None)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert isinstance(copied, fxpeft.PeftModel)
            assert torch.equal(copied(IDS).logits, model(IDS).logits)
            assert type(copied.unload()) is LlamaForCausalLM
    assert type(model.unload()) is LlamaForCausalLM


def test_a_bridge_over_a_model_that_is_prepared_or_has_a_prompt() -> None:
    model = tiny_llama()
    fxpeft.add_adapter(model, fxpeft.PromptTuningConfig(num_virtual_tokens=3), "prompt")
    before = model(IDS).logits
    fxpeft.prepare_hotswap(
        model, 8, targets=["q_proj", "down_proj"], methods=("lora", "prompt_tuning"), num_virtual_tokens=3
    )
    bridged = bridge.get_peft_model(model, fxpeft.LoraConfig(**LORA), "lora")
    bridged.set_adapter("prompt")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before)
    with fxpeft.hold(model):
        assert bridged.active_adapters == ["prompt"]
    assert type(bridged.unload()) is LlamaForCausalLM
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    model = tiny_llama()
    before = picture(model, IDS)
    with pytest.raises(fxpeft.AdapterError, match="no module of the model is a target"):
        bridge.get_peft_model(model, fxpeft.LoraConfig(r=2, target_modules=["nowhere"]))
    with pytest.raises(fxpeft.CheckpointError):
        bridge.PeftModel.from_pretrained(model, tmp_path)
    assert_same(before, picture(model, IDS))
    bridged = bridge.get_peft_model(model, fxpeft.LoraConfig(**LORA))
    with pytest.raises(fxpeft.AdapterError, match="writes no pickles"):
        bridged.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="not present"):
        bridged.delete_adapter("x")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_gradient_checkpoints_that_are_switched_on_before_or_after(reentrant: bool, first: bool) -> None:
    grads = []
    for library, config in ((bridge, fxpeft.LoraConfig), (peft, peft.LoraConfig)):
        model = tiny_llama()
        options = {"use_reentrant": reentrant}
        if first:
            model.gradient_checkpointing_enable(options)
        model = library.get_peft_model(model, config(**LORA))
        for key, value in sorted(lora(model, "default").items()):
            randomise([value], seed=sum(map(ord, key)))
        if not first:
            model.gradient_checkpointing_enable(options)
        model.train()(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad])
    assert len(grads[0]) == len(grads[1]) == 8
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_reentrant_checkpoints_of_a_model_that_takes_no_ids() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 36, "image_size": 8, "patch_size": 4, "num_labels": 3}
    for library, config in ((bridge, fxpeft.LoraConfig), (peft, peft.LoraConfig)):
        model = ViTForImageClassification(ViTConfig(num_hidden_layers=2, num_attention_heads=4, **sizes))
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model = library.get_peft_model(model, config(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.train()(pixel_values=torch.randn(2, 3, 8, 8)).logits.sum().backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        assert len(trained) == 4
        assert all(grad is not None and grad.abs().max() > 0 for grad in trained)


def test_where_it_differs(tmp_path: Path) -> None:
    """What the guide's table says beside what the script above shows."""
    model = start(bridge, fxpeft.LoraConfig(**LORA, init_lora_weights="olora"))
    wanted = model(IDS).logits
    model.merge_adapter()
    with pytest.raises(fxpeft.AdapterError, match="would add it twice"):
        model.set_adapter("default")
    with pytest.raises(fxpeft.AdapterError, match="can't be switched off"), model.disable_adapter():
        raise AssertionError("it was entered")
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, wanted)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "not there"))
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert theirs.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(theirs(IDS).logits, wanted, rtol=0, atol=2e-5)
    fxpeft.add_adapter(model, fxpeft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "gain")
    model.set_adapter(["default", "gain"])
    assert model.active_adapter == ["default", "gain"]


def test_a_head_is_trained_and_saved(tmp_path: Path) -> None:
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = bridge.get_peft_model(tiny_bert(), fxpeft.LoraConfig(**config))
    randomise((p for p in model.parameters() if p.requires_grad), seed=3)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=0, atol=2e-5)
    assert isinstance(model.merge_and_unload(), BertForSequenceClassification)


@pytest.mark.slow
def test_it_swaps_in_one_compiled_graph(tmp_path: Path) -> None:
    torch._dynamo.reset()
    start(bridge, fxpeft.LoraConfig(**OTHER)).save_pretrained(tmp_path)
    model = start(bridge, fxpeft.LoraConfig(**LORA))
    fxpeft.prepare_hotswap(model, 8, targets=["q_proj", "v_proj", "down_proj"])
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), no_recompiles():
        compiled(IDS)
        model.load_adapter(tmp_path, "second")
        assert model.active_adapter == "default"
        for name in ("second", "default"):
            model.set_adapter(name)
            torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5)
        model.load_adapter(tmp_path, "default")
        wanted = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)(IDS).logits
        torch.testing.assert_close(compiled(IDS).logits, wanted, rtol=0, atol=2e-5)


def test_in_trainer(tmp_path: Path) -> None:
    rows = torch.randint(1, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row, "of no use": 1} for row in rows]
    outputs, names = [], []
    for kind, library, config in (("ours", bridge, fxpeft.LoraConfig), ("theirs", peft, peft.LoraConfig)):
        model = start(library, config(**LORA))
        args = TrainingArguments(
            str(tmp_path / kind), max_steps=4, per_device_train_batch_size=2, learning_rate=0.05, save_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=11, gradient_checkpointing=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=data)
        trainer.train()
        trainer.save_model(str(tmp_path / kind / "final"))
        outputs.append(model.eval()(IDS).logits.detach())
        names.append(sorted(p.name for p in (tmp_path / kind / "checkpoint-4").iterdir()))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)
    assert names[0] == names[1]
    found = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours" / "final")(IDS).logits
    torch.testing.assert_close(found, outputs[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_trainer_resumes_where_fxpeft_is_installed(tmp_path: Path, name: str) -> None:
    rows = torch.randint(1, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row} for row in rows]

    def trainer(steps: int) -> Trainer:
        torch.manual_seed(7)
        model = bridge.get_peft_model(tiny_llama(), fxpeft.LoraConfig(**LORA), name)
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=2, learning_rate=0.05, save_steps=2,
            lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, seed=11,
        )  # fmt: skip
        return Trainer(model=model, args=args, train_dataset=data)

    with fxpeft.installed():
        whole = trainer(4)
        whole.train()
        resumed = trainer(4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    a, b = (t.model.eval()(IDS).logits.detach() for t in (whole, resumed))  # type: ignore[union-attr, operator]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
