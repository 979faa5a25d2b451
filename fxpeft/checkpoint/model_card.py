"""The model card beside an adapter: ``README.md``, by whose metadata the hub finds an adapter and its base model."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import yaml
from huggingface_hub import CardData, ModelCard
from torch import nn
from transformers import PreTrainedModel

from fxpeft.files import replace_files
from fxpeft.methods.config import AdapterConfig

CARD = "README.md"
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # what the hub takes as an id

_TEXT = """
# {title}

A{article} {method} adapter{of}.

```python
import fxpeft

fxpeft.load_adapter(model, "path or id of this repository")  # or peft.PeftModel.from_pretrained(model, ...)
```
"""


def write_card(folder: str | Path, model: nn.Module, config: AdapterConfig) -> None:
    """Write the card where there is none, else bring its metadata up to date and leave the text as it is.

    As in PEFT, the library's name and the base model are the adapter's; other fields and tags stay. A card whose
    metadata can't be read is left alone.
    """
    path = Path(folder) / CARD
    base = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    if base is not None and (not _REPOSITORY.fullmatch(base) or Path(base).exists()):
        base = None  # a folder of this machine means nothing on the hub, which refuses such a card
    if not path.exists():
        card = ModelCard(f"---\nlibrary_name: peft\n---\n{_text(Path(folder), config, base)}")
    else:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                content = file.read()
            card = ModelCard(content)
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            return
    before = copy.deepcopy(vars(card.data))
    _update(card.data, model, config, base)
    if not path.exists() or vars(card.data) != before:  # what is there stays to the byte where nothing is new
        replace_files({path: str(card).encode()})


def _update(data: CardData, model: nn.Module, config: AdapterConfig, base: str | None) -> None:
    data["library_name"] = "peft"  # the format: whoever loads it may use either
    given = data.get("tags") or []
    own = [given] if isinstance(given, str) else given
    tags = {str(tag) for tag in own if not str(tag).startswith("base_model:adapter:")}
    tags.update(getattr(model, "model_tags", None) or [])
    if isinstance(model, PreTrainedModel):
        tags.add("transformers")
    if config.peft_type == "LORA":
        tags.add("lora")
    if base is not None:
        tags.add(f"base_model:adapter:{base}")
        data["base_model"] = base
    data["tags"] = sorted(tags)
    if config.task_type == "CAUSAL_LM" and not data.get("pipeline_tag"):
        data["pipeline_tag"] = "text-generation"


def _text(folder: Path, config: AdapterConfig, base: str | None) -> str:
    method = config.peft_type.replace("_", " ")
    return _TEXT.format(
        title=folder.resolve().name, method=method, article="n" if method[0] in "AEIO" else "",
        of=f" of [{base}](https://huggingface.co/{base})" if base else "",
    )  # fmt: skip
