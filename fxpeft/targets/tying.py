"""``ensure_weight_tying`` meets a model: what has one weight with the input embeddings follows them, as in PEFT 0.21.

An adapter that adapts the embeddings, or such a module, adapts both with the same factors; one that brings one of them
whole brings one weight for both. Which of them a config names is the same to PEFT: it writes the embeddings' name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from transformers import PreTrainedModel

from fxpeft.errors import AdapterError
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.modules import Modules
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import Selection
from fxpeft.targets.tokens import one_weight

NAMED = ("embed_tokens", "lm_head")  # by these PEFT knows that a config is of embeddings


def with_tied_targets(
    config: AdapterConfig, targets: Sequence[str], modules: Modules
) -> tuple[AdapterConfig, list[str], list[str]]:
    """The targets with the embeddings, a config that means them, and beside these what follows the embeddings."""
    first, tied = _tied(config, modules)
    own, found = config.target_modules, [name for name in (first, *tied) if name in targets]
    if not found or _named(config.modules_to_save or ()):
        return config, list(targets), []  # where both are asked for PEFT ties what is saved
    if isinstance(own, list):
        asks = _named(own)
    else:  # by an end alone, in PEFT too
        asks = isinstance(own, str) and any(map(Selection(own, "target_modules"), NAMED))
    if not asks:
        return config, list(targets), []
    if isinstance(own, str):
        own = rf"(?:{own}|^{re.escape(first)}$)"
    elif isinstance(own, list):
        own = [*(entry for entry in own if not _means(entry, tied)), *([] if first in own else [first])]
    return config.changed(target_modules=own), [first, *(n for n in targets if n not in (first, *tied))], tied


def with_tied_saved(config: AdapterConfig, modules: Modules) -> tuple[AdapterConfig, list[str]]:
    """The config with the embeddings among ``modules_to_save``, and what follows these."""
    first, tied = _tied(config, modules)
    own = config.modules_to_save or []
    if not tied or not _named(own):
        return config, []
    kept = [entry for entry in own if not _means(entry, tied)]
    return config.changed(modules_to_save=[*kept, *([] if first in kept else [first])]), tied


def check_tied(kinds: Mapping[str, Kind], first: str, tied: Sequence[str]) -> None:
    """Refuse what doesn't follow embeddings.

    Raises:
        AdapterError: it is no linear layer.
    """
    if odd := [f"{name} ({kinds[name]})" for name in tied if not kinds[name].is_linear]:
        raise AdapterError(
            f"ensure_weight_tying: {', '.join(odd)} has one weight with {first}: expected a linear layer, which alone "
            "follows embeddings in PEFT; leave embeddings out of target_modules"
        )


def _tied(config: AdapterConfig, modules: Modules) -> tuple[str, list[str]]:
    if not getattr(config, "ensure_weight_tying", False) or not isinstance(modules.model, PreTrainedModel):
        return "", []
    first, *tied = one_weight(modules)
    return (first, tied) if tied else ("", [])


def _named(entries: Collection[str]) -> bool:
    return any(entry.rpartition(".")[2] in NAMED for entry in entries)


def _means(entry: str, names: Collection[str]) -> bool:
    return any(f".{name}".endswith(f".{entry}") for name in names)
