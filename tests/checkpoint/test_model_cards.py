"""The model card beside a saved adapter: the metadata that the hub reads, and the user's text untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from tiny import conv_net, tiny_bert, tiny_llama

import fxpeft

LORA: dict[str, Any] = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def based(build: Any, base: str) -> Any:
    model = build()
    model.name_or_path = model.config._name_or_path = base
    return model


def save(folder: Path, base: str = "org/base-1.5", config: Any = None) -> Path:
    model = based(tiny_llama, base)
    fxpeft.add_adapter(model, config or fxpeft.LoraConfig(**LORA))
    fxpeft.save_adapter(model, folder)
    return folder / "README.md"


METHODS: dict[str, Any] = {
    "lora": lambda lib: lib.LoraConfig(**LORA),
    "no task": lambda lib: lib.LoraConfig(r=3, target_modules=["q_proj"]),
    "ia3": lambda lib: lib.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "prompt": lambda lib: lib.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", METHODS)
def test_metadata_is_pefts(method: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(based(tiny_llama, "org/base-1.5"), METHODS[method](peft))
    theirs.save_pretrained(tmp_path / "theirs")
    card = save(tmp_path / "mine", config=METHODS[method](fxpeft))
    expected = metadata_load(tmp_path / "theirs" / "README.md")
    if method == "prompt":  # PEFT looks below a wrapper that prompts don't have
        expected["tags"] = sorted({*expected["tags"], "transformers"})
    assert metadata_load(card) == expected
    assert metadata_load(card)["base_model"] == "org/base-1.5"
    text = ModelCard.load(card).text
    assert text.startswith("\n# mine\n")
    assert "[org/base-1.5](https://huggingface.co/org/base-1.5)" in text


USERS = [
    "---\nlicense: mit\ntags:\n- mine\n- base_model:adapter:org/older\nbase_model: org/older\n---\n\n"
    "# My words\r\n\n{{ a }}\n",
    "# No metadata at all\n\nbut a rule\n\n---\n",
    "---\n---\nonly text, no newline at the end",
    "\ufeff# With a mark at its beginning — and ünïcode\n",
]


@pytest.mark.parametrize("content", USERS, ids=["metadata", "text", "empty metadata", "unicode"])
def test_the_users_text_stays(content: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content.encode())
    body = ModelCard(content).text
    card = save(tmp_path)
    assert card.read_bytes().endswith(body.encode())
    metadata = metadata_load(card)
    assert metadata["base_model"] == "org/base-1.5"
    assert metadata["library_name"] == "peft"
    assert {"lora", "transformers", "base_model:adapter:org/base-1.5"} <= set(metadata["tags"])
    if "license" in content:
        assert metadata["license"] == "mit"
        assert "mine" in metadata["tags"]
        assert "base_model:adapter:org/older" not in metadata["tags"]
    first = card.read_bytes()
    save(tmp_path)
    assert card.read_bytes() == first


@pytest.mark.parametrize("content", [b"---\n- a list\n---\ntext", b"---\na: [1\n---\ntext", b"\xff\xfe\x00 not utf-8"])
def test_a_card_that_no_one_can_read_is_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content)
    card = save(tmp_path)
    assert card.read_bytes() == content
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_folder_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    save(tmp_path)
    assert (tmp_path / "README.md").is_dir()
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("base", ["", "folder"])
def test_a_base_that_is_not_on_the_hub_is_not_named(base: str, tmp_path: Path) -> None:
    metadata = metadata_load(save(tmp_path / "adapter", base=base and str(tmp_path)))
    assert "base_model" not in metadata
    assert metadata["tags"] == ["lora", "transformers"]


def test_a_model_that_is_not_transformers(tmp_path: Path) -> None:
    model = conv_net()
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, target_modules=["line"]))
    fxpeft.save_adapter(model, tmp_path)
    assert metadata_load(tmp_path / "README.md") == {"library_name": "peft", "tags": ["lora"]}


def test_tags_of_the_model(tmp_path: Path) -> None:
    model = based(tiny_bert, "org/base")
    model.add_model_tags("news")
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=3, target_modules=["query"]))
    fxpeft.save_adapter(model, tmp_path)
    assert metadata_load(tmp_path / "README.md")["tags"] == [
        "base_model:adapter:org/base", "lora", "news", "transformers"
    ]  # fmt: skip


def test_transformers_own_saving_writes_no_card(tmp_path: Path) -> None:
    """As without fxpeft: its card comes with the push, and takes the text that is there."""
    fxpeft.install()
    try:
        model = based(tiny_llama, "org/base")
        model.add_adapter(fxpeft.LoraConfig(**LORA))
        model.save_pretrained(tmp_path)
    finally:
        fxpeft.uninstall()
    assert not (tmp_path / "README.md").exists()
