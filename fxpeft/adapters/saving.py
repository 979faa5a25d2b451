"""An adapter of a model to tensors and files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from fxpeft import checkpoint
from fxpeft.adapters.embeddings import SaveEmbeddings, embedding_tensors
from fxpeft.adapters.plain import has_to_be_plain
from fxpeft.adapters.plain import plain as as_plain
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.checkpoint.model_card import write_card
from fxpeft.errors import AdapterError, listing
from fxpeft.methods.values import Values
from fxpeft.model.wrappers import unwrap


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's tensors as they are now, under PEFT's keys."""
    values = adapter.current()
    _check_whole(adapter, values)
    return checkpoint.to_tensors(adapter.plan, values)


def _check_whole(adapter: Adapter, current: Values) -> None:
    """Refuse parameters of which this process holds a part only."""
    own = adapter.values.flat()
    cut = [
        f"{place or field}: {name}: expected {list(own[field, place, name].shape)}, found {list(value.shape)}"
        for (field, place, name), value in current.flat().items()
        if field in ("sites", "shared") and value.shape != own[field, place, name].shape
    ]
    if cut:
        raise AdapterError(
            f"adapter {adapter.name!r}: its parameters are not whole here:\n{listing(cut)}\nwith FSDP1, call this "
            "inside of FullyShardedDataParallel.summon_full_params(model), on every process"
        )


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
        AdapterError: no such adapter, or it is no plain LoRA of the base.
    """
    adapter = state_of(model).chosen(name)
    write_adapter(model, path, adapter, plain=plain, save_embedding_layers=save_embedding_layers)


def write_adapter(
    model: nn.Module, path: str | Path, adapter: Adapter, *, plain: bool | None, save_embedding_layers: SaveEmbeddings
) -> None:
    """Write an adapter's files, see :func:`save_adapter`."""
    if plain or (plain is None and has_to_be_plain(unwrap(model), adapter)):
        adapter = as_plain(adapter)
    embeddings = embedding_tensors(unwrap(model), adapter, save_embedding_layers)
    checkpoint.write(path, unwrap(model), adapter.config, adapter_tensors(adapter) | embeddings)
    write_card(path, unwrap(model), adapter.config)


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's checkpoint keys; they share memory with the adapter."""
    return adapter_tensors(state_of(model).chosen(name))
