"""An adapter of a model to tensors and files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fxpeft import checkpoint
from fxpeft.adapters.agreement import written
from fxpeft.adapters.embeddings import SaveEmbeddings, embedding_tensors
from fxpeft.adapters.gathering import whole_adapter
from fxpeft.adapters.plain import has_to_be_plain
from fxpeft.adapters.plain import plain as as_plain
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.checkpoint.model_card import write_card
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.wrappers import unwrap


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter that is whole here, as they are now, under PEFT's keys."""
    return checkpoint.to_tensors(adapter.plan, adapter.current())


def save_adapter(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    plain: bool | None = None,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's format, atomically.

    Beside them lies a model card, ``README.md``, whose metadata names the base model; text that is there stays.
    Where processes hold parts of the adapter (FSDP, ZeRO-3), all of them call this: they gather it, and the first one
    writes.

    Args:
        path: a folder, made where missing.
        name: which adapter; the active one by default.
        plain: write a LoRA with ``init_lora_weights=True``, which needs nothing but the base. One
            that started with PiSSA or OLoRA has twice the rank then; ``False`` keeps its rank, and
            loading it decomposes the base's weights again. Default: only where loading could not
            find the start again, as with ``pissa_niter_N``.
        save_embedding_layers: write the base's input and output embeddings too, as PEFT does; ``"auto"``: those that
            are targets, and both where the vocabulary was resized.

    Raises:
        AdapterError: no such adapter, or it is no plain LoRA of the base, or it is not whole here and nothing can
            gather it; nothing was written. Or another process, which was to write, could not.
    """
    adapter = state_of(model).chosen(name)
    whole = whole_adapter(model, adapter)
    files = adapter_files(model, whole, plain=plain, save_embedding_layers=save_embedding_layers)
    with written(together=whole is not adapter) as here:
        if here:
            write_adapter(model, path, *files)


def adapter_files(
    model: nn.Module,
    adapter: Adapter,
    *,
    plain: bool | None,
    save_embedding_layers: SaveEmbeddings,
    state_dict: Mapping[str, Tensor] | None = None,
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """What is written of an adapter that is whole here, see :func:`save_adapter`: its config and its tensors.

    Args:
        state_dict: as in :func:`~fxpeft.adapters.embeddings.embedding_tensors`.
    """
    if plain or (plain is None and has_to_be_plain(unwrap(model), adapter)):
        adapter = as_plain(adapter)
    embeddings = embedding_tensors(model, adapter, save_embedding_layers, state_dict)
    return adapter.config, adapter_tensors(adapter) | embeddings


def write_adapter(model: nn.Module, path: str | Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Write an adapter's files and its model card."""
    checkpoint.write(path, unwrap(model), config, tensors)
    write_card(path, unwrap(model), config)


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's checkpoint keys; they share memory with the adapter.

    Where processes hold parts of it, all of them call this, and each gets copies of the whole ones.
    """
    return adapter_tensors(whole_adapter(model, state_of(model).chosen(name)))
