"""``from_pretrained``, ``save_pretrained``, ``push_to_hub`` and ``pipeline`` with an adapter's folder or id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils.hub
from closeness import assert_close
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from tiny import logits, randomise, tiny_llama, token_ids
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import fxpeft

FILES = {"adapter_config.json", "adapter_model.safetensors"}
CONFIG: dict[str, Any] = {
    "r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 7},
    "alpha_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"],
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's folder."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def model(base: Path) -> Any:
    """The base with an adapter of random values."""
    model = LlamaForCausalLM.from_pretrained(base)
    model.add_adapter(fxpeft.LoraConfig(**CONFIG))
    randomise(model.get_adapter_state_dict().values())
    return model


@pytest.fixture
def adapter(model: Any, tmp_path: Path) -> Path:
    """The adapter's folder; it names the base's."""
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_save_pretrained_writes_two_files(model: Any, adapter: Path, base: Path) -> None:
    assert {path.name for path in adapter.iterdir()} == FILES
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["inference_mode"] is True
    tensors = load_file(adapter / "adapter_model.safetensors")
    own = model.get_adapter_state_dict()
    assert tensors.keys() == {f"base_model.model.{key}" for key in own}
    assert all(torch.equal(tensors[f"base_model.model.{key}"], value) for key, value in own.items())


def test_save_pretrained_arguments(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model.save_pretrained(tmp_path / "a", save_peft_format=False, max_shard_size="1KB", variant="v")
    assert load_file(tmp_path / "a" / "adapter_model.safetensors").keys() == model.get_adapter_state_dict().keys()
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
    changed = {key: value * 2 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "c", state_dict=changed)
    twice = load_file(tmp_path / "c" / "adapter_model.safetensors")
    assert all(torch.equal(twice[f"base_model.model.{k}"], 2 * v) for k, v in model.get_adapter_state_dict().items())
    model.add_adapter(fxpeft.LoraConfig(target_modules=["v_proj"]), "second")
    model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="Multiple active adapters detected"):
        model.save_pretrained(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_bare_model_is_saved_as_before(model: Any, base: Path, tmp_path: Path) -> None:
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in base.iterdir()}
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_a_model_that_saves_its_base_too(model: Any, base: Path, tmp_path: Path) -> None:
    # as GraniteSpeech does: the flag is switched off for a second save_pretrained
    model._hf_peft_config_loaded = False
    model.save_pretrained(tmp_path / "whole")
    model._hf_peft_config_loaded = True
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    model.delete_adapter("default")
    assert model._hf_peft_config_loaded is False


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_from_pretrained(model: Any, adapter: Path, cls: Any) -> None:
    loaded = cls.from_pretrained(adapter)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.active_adapters() == ["default"]
    assert not loaded.training
    assert not [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert_close(logits(loaded), logits(model.eval()), terms=1)
    named, info = cls.from_pretrained(adapter, adapter_name="mine", output_loading_info=True)
    assert named.active_adapters() == ["mine"]
    assert info["missing_keys"] == info["unexpected_keys"] == set()


def test_from_pretrained_in_half_precision(adapter: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16)
    assert {value.dtype for value in loaded.get_adapter_state_dict().values()} == {torch.bfloat16}


def test_without_install_the_adapter_is_not_found_where_peft_is_missing(adapter: Path) -> None:
    from transformers.utils.import_utils import is_peft_available

    fxpeft.uninstall()
    if is_peft_available():
        from peer_versions import TRANSFORMERS, needs

        needs(*TRANSFORMERS)
        theirs = AutoModelForCausalLM.from_pretrained(adapter).model.layers[0].mlp.down_proj
        assert type(theirs).__module__.startswith("peft.")
    else:
        with pytest.raises(ValueError, match="Unrecognized model"):
            AutoModelForCausalLM.from_pretrained(adapter)


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_subfolder(model: Any, adapter: Path, tmp_path: Path, cls: Any) -> None:
    shutil.move(adapter, tmp_path / "collection" / "first")
    expected = logits(model.eval())
    for kwargs in ({"subfolder": "first"}, {"adapter_kwargs": {"subfolder": "first"}}):
        assert_close(logits(cls.from_pretrained(tmp_path / "collection", **kwargs)), expected, terms=1)


def test_a_whole_model_with_an_adapter_in_it(model: Any, adapter: Path, base: Path) -> None:
    for path in adapter.iterdir():
        config = json.loads(path.read_text()) if path.suffix == ".json" else None
        if config is not None:
            config["base_model_name_or_path"] = None
            path.write_text(json.dumps(config))
        shutil.copy(path, base)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(base)), logits(model.eval()), terms=1)


def test_a_config_without_base_says_so(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(fxpeft.AdapterError, match="base_model_name_or_path: expected the base model's folder or id"):
        AutoModelForCausalLM.from_pretrained(adapter)


def test_body_of_the_base(model: Any, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["modules_to_save"] = None  # the body has no head
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    body = AutoModel.from_pretrained(adapter)
    with torch.no_grad():
        expected = model.eval().model(token_ids()).last_hidden_state
        assert_close(body(token_ids()).last_hidden_state, expected, terms=1)


class Hub:
    """Stands in for ``hf_hub_download``: puts files of folders into the hub's cache and notes what was asked."""

    def __init__(self, repos: dict[str, Path], cache: Path) -> None:
        self.repos, self.cache = repos, cache
        self.calls: list[tuple[str, str, dict[str, Any]]] = []

    def __call__(self, repo_id: str, filename: str, **kwargs: Any) -> str:
        self.calls.append((repo_id, filename, kwargs))
        inside = Path(kwargs.get("subfolder") or "") / filename
        path = self.repos[repo_id] / inside
        if not path.is_file():
            raise EntryNotFoundError(f"{repo_id} has no {inside}")
        commit = f"{len(repo_id):040x}"
        home = self.cache / f"models--{repo_id.replace('/', '--')}"
        found = home / "snapshots" / commit / inside
        for parent in (home / "refs", found.parent):
            parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / (kwargs["revision"] or "main")).write_text(commit)
        shutil.copy(path, found)
        return str(found)

    def asked(self, repo: str, key: str) -> set[Any]:
        return {kwargs.get(key) for r, _, kwargs in self.calls if r == repo}


@pytest.fixture
def hub(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    path = adapter / "adapter_config.json"
    content = {**json.loads(path.read_text()), "base_model_name_or_path": "org/base", "revision": "base-tag"}
    path.write_text(json.dumps(content))
    cache = adapter.parent / "cache"
    hub = Hub({"org/base": base, "org/adapter": adapter, "org/many": adapter.parent}, cache)
    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", hub)
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(cache))
    return hub


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_hub_arguments(model: Any, hub: Hub, cls: Any) -> None:
    expected = logits(model.eval())
    loaded = cls.from_pretrained("org/many", revision="v2", subfolder="adapter", token="secret")
    assert_close(logits(loaded), expected, terms=1)
    found = {name for repo, name, kwargs in hub.calls if repo == "org/many" and kwargs.get("subfolder") == "adapter"}
    assert found >= FILES
    assert {kw["revision"] for _, name, kw in hub.calls if name in FILES and kw.get("subfolder") == "adapter"} == {"v2"}
    assert {kw["token"] for _, name, kw in hub.calls if name in FILES} == {"secret"}
    # the base comes from the revision that the adapter was trained on, and from its own root
    weights = [kw for repo, name, kw in hub.calls if repo == "org/base" and name == "model.safetensors"]
    assert [(kw["revision"], kw.get("subfolder") or "") for kw in weights] == [("base-tag", "")]


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_plain_hub_id(model: Any, hub: Hub, cls: Any) -> None:
    loaded = cls.from_pretrained("org/adapter")
    assert_close(logits(loaded), logits(model.eval()), terms=1)
    assert {name for repo, name, _ in hub.calls if repo == "org/adapter"} >= FILES


def test_load_adapter_hub_arguments(hub: Hub) -> None:
    model = tiny_llama()
    model.load_adapter(
        "org/many", local_files_only=True, adapter_kwargs={"subfolder": "adapter", "revision": "v3", "token": "secret"}
    )
    assert hub.asked("org/many", "subfolder") == {"adapter"}
    assert hub.asked("org/many", "revision") == {"v3"}
    assert hub.asked("org/many", "token") == {"secret"}
    assert hub.asked("org/many", "local_files_only") == {True}


class Uploads:
    """Stands in for the hub's API: takes the commits that are made to it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[tuple[Any, dict[str, Any]]] = []
        self.messages: list[str] = []

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        self.created.append((repo_id, kwargs))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})()

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str, **kwargs: Any) -> str:
        assert repo_id.startswith("me/")
        for operation in operations:
            content = operation.path_or_fileobj
            self.files[operation.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
        self.messages.append(commit_message)
        return "commit"

    def create_branch(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("no branch was asked for")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Uploads:
    from huggingface_hub import ModelCard

    import fxpeft.integrations.transformers.saving as saving

    api = Uploads()
    for module in (transformers.utils.hub, saving):
        monkeypatch.setattr(module, "hf_api", lambda: api)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("card"))
    return api


def push(model: Any) -> str:
    return model.push_to_hub("tuned", commit_message="done")


def save_and_push(folder: Path) -> Callable[[Any], Any]:
    return lambda model: model.save_pretrained(folder / "tuned", push_to_hub=True, commit_message="done", private=True)


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_uploads_the_adapter_alone(model: Any, adapter: Path, uploads: Uploads, tmp_path: Path, way: str) -> None:
    (push if way == "push_to_hub" else save_and_push(tmp_path))(model)
    assert uploads.files.keys() == {*FILES, "README.md"}
    assert uploads.files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert uploads.messages == ["done"]
    assert uploads.created[0][0] == "tuned"
    assert uploads.created[0][1].get("private") is (True if way == "save_pretrained" else None)


def test_a_pushed_card_keeps_the_users_text(model: Any, uploads: Uploads, tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "README.md").write_text("---\nlicense: mit\n---\n\n# What I made\n")
    model.name_or_path = model.peft_config["default"].base_model_name_or_path = "org/base"
    save_and_push(tmp_path)(model)
    card = uploads.files["README.md"].decode()
    assert card.endswith("---\n\n# What I made\n")
    for line in ("license: mit", "base_model: org/base", "library_name: peft", "- base_model:adapter:org/base"):
        assert f"{line}\n" in card
