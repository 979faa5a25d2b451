"""``trainable_token_indices`` meets a model: whose rows an adapter has of its own, by the rules of PEFT 0.21.

A tied head follows the embedding, and has no rows of its own (``peft.utils.other.set_additional_trainable_modules``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fxpeft.errors import AdapterError, listing, short
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.tokens import TokenRows, TrainableTokens, TrainableTokensConfig
from fxpeft.model.modules import Modules
from fxpeft.model.placement import parted
from fxpeft.model.walk import embedding_layer, output_head
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.base import PassError
from fxpeft.passes.targets.names import Endings


def with_tokens(
    config: AdapterConfig, modules: Modules, taken: Collection[str]
) -> tuple[AdapterConfig, dict[str, TokenRows]]:
    """Module -> the rows that the adapter brings there, and the config that means them in PEFT too.

    Args:
        taken: what the adapter adapts or brings as a whole, and can't have rows of.

    Raises:
        AdapterError: a module of no name here, one of another kind, a token that it has no row for.
    """
    indices: Any = getattr(config, "trainable_token_indices", None)
    own: Mapping[str, Sequence[int]]
    if isinstance(config, TrainableTokensConfig):
        if config.target_modules is None:
            config = config.changed(target_modules=[input_embeddings(modules)])
        own = dict.fromkeys(TrainableTokens().selected(config, modules), config.token_indices)
    elif indices is None:
        return config, {}
    else:
        own = _named(indices, modules)
    if both := [name for name in own if name in taken]:
        raise AdapterError(
            f"trained tokens: {', '.join(both)}: an adapter that adapts a module, or brings it whole, can't have rows "
            "of it too, as in PEFT; take it out of target_modules and modules_to_save"
        )
    rows = {name: TokenRows(_kind(name, modules), tuple(tokens)) for name, tokens in own.items()}
    _check_rows(rows)
    return config, _tied(rows, modules, taken, getattr(config, "ensure_weight_tying", False))


def token_modules(modules: Modules, wanted: Sequence[str] | None) -> dict[str, TokenRows]:
    """The modules that slots for rows are for, tied ones included; rows of no tokens yet.

    Args:
        wanted: names or ends of such; ``None``: the input embeddings.

    Raises:
        AdapterError: as :func:`with_tokens`.
    """
    names = [input_embeddings(modules)] if wanted is None else list(_named(dict.fromkeys(wanted, ()), modules))
    return _tied({name: TokenRows(_kind(name, modules), ()) for name in names}, modules, (), False)


def input_embeddings(modules: Modules) -> str:
    """The name of a model's own input embeddings.

    Raises:
        AdapterError: it doesn't say which they are.
    """
    layer: Any = embedding_layer(modules.model, "input")
    layer = None if layer is None else unwrap(layer)
    found = next((name for name, module in modules.items() if module is layer), None)
    found = found or next((name for name in modules if name.rpartition(".")[2] == "embed_tokens"), None)
    if found is None:
        raise AdapterError(
            f"trained tokens: {type(modules.model).__name__} doesn't say which its input embeddings are; name them: "
            "trainable_token_indices={'name': [...]}, or target_modules"
        )
    return found


def _named(indices: Sequence[int] | Mapping[str, Sequence[int]], modules: Modules) -> dict[str, Sequence[int]]:
    if not isinstance(indices, Mapping):
        return {input_embeddings(modules): indices}
    ends = Endings(list(indices))
    found = {name: indices[next(iter(own))] for name in modules if (own := list(ends.of(name)))}
    if missing := [key for key in indices if not any(key in ends.of(name) for name in found)]:
        raise AdapterError(f"trainable_token_indices: no module of the model is named\n{listing(map(short, missing))}")
    return found


def _kind(name: str, modules: Modules) -> Any:
    module = modules[name]
    if leaves := parted(module):
        raise AdapterError(f"{name}: tensor parallelism has parted its {' and '.join(leaves)}, so it can't have tokens")
    if why := modules.idle(name):
        raise AdapterError(f"{name}: {why}, so its tokens would do nothing")
    try:
        kind = modules.kind(name)
    except PassError as error:
        raise AdapterError(f"{name}: {error}; tokens are rows of an embedding or of a linear head") from None
    if kind.name not in ("embedding", "linear") or getattr(module, "max_norm", None) is not None:
        found = kind.name if kind.name != "embedding" else "an embedding with max_norm, which rescales what it looks up"
        raise AdapterError(f"{name}: tokens are rows of an embedding or of a linear head, found {found}")
    return kind


def _check_rows(rows: Mapping[str, TokenRows]) -> None:
    """Refuse tokens beyond the last row."""
    for name, own in rows.items():
        count = own.kind.in_features if own.kind.looks_up else own.kind.out_features
        if beyond := [token for token in own.tokens if token >= count]:
            raise AdapterError(
                f"trained tokens: {name} has {count} rows, found token {beyond[0]}; were tokens added without "
                "model.resize_token_embeddings?"
            )


def _tied(
    rows: Mapping[str, TokenRows], modules: Modules, taken: Collection[str], ensure: bool
) -> dict[str, TokenRows]:
    """The rows with those of the modules that have one weight with the input embeddings, and follow them.

    Raises:
        AdapterError: ``ensure_weight_tying``, and the tied modules have other tokens.
    """
    if not isinstance(modules.model, PreTrainedModel):
        return dict(rows)
    first, *tied = one_weight(modules)
    if first not in rows or not tied:
        return dict(rows)
    others = [name for name in tied if name in rows and rows[name].tokens != rows[first].tokens]
    if others and ensure:
        raise AdapterError(
            f"ensure_weight_tying: {first} and {', '.join(others)} have one weight, and other tokens in "
            "trainable_token_indices; give them the same ones"
        )
    if others:
        return dict(rows)
    if both := [name for name in tied if name in taken]:
        raise AdapterError(
            f"trained tokens: {', '.join(both)} has one weight with {first} and follows it, and is adapted or brought "
            "whole too, which can't be both, as in PEFT; take it out of target_modules and modules_to_save"
        )
    return {**rows, **{name: TokenRows(_kind(name, modules), rows[first].tokens, first) for name in tied}}


def one_weight(modules: Modules) -> list[str]:
    """The input embeddings, and the modules that have their weight.

    Offloaded weights (accelerate) are no longer one; there the model's config says it of its head.
    """
    first, head = input_embeddings(modules), output_head(modules.model)
    weight = _weight(modules[first])
    says: Any = getattr(modules.model, "config", None)
    offloaded = weight is not None and weight.is_meta and getattr(says, "tie_word_embeddings", False)

    def tied(module: nn.Module) -> bool:
        own = _weight(module)
        same = offloaded and module is head and own is not None and own.is_meta and own.shape == weight.shape
        return weight is not None and (own is weight or bool(same))

    return [first, *(name for name, module in modules.items() if name != first and tied(module))]


def _weight(module: nn.Module) -> Any:
    return module._parameters.get("weight")
