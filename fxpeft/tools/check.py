"""``fxpeft check``: whether an adapter loads on a model and swaps there, by shapes alone.

The model is on the meta device, and the adapter's tensors go there too: what a method works out of the base's weights,
such as DoRA's gains or PiSSA's start, has its shape there and no values.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

import fxpeft
from fxpeft.adapters.loading import load
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.checkpoint import read
from fxpeft.errors import AdapterError
from fxpeft.methods import method_of
from fxpeft.model.empty import empty_model
from fxpeft.model.modules import Modules
from fxpeft.passes.slots.rotation import BLOCK
from fxpeft.serving.declared import servable
from fxpeft.serving.lowering import lower
from fxpeft.serving.swap import serving_of
from fxpeft.tools.answers import Json, Source, show
from fxpeft.tools.convert import repeated

Base = Annotated[str, typer.Option("--model", metavar="MODEL", help="The base model's folder or hub id.")]


def check(
    adapter: Source,
    model: Base,
    max_rank: Annotated[int, typer.Option(min=2, help="Ranks that a slot holds.")] = 128,
    slots: Annotated[str, typer.Option(help="What has slots: a pattern.")] = "all-linear",
    as_json: Json = False,
) -> None:
    """Tell whether an adapter loads on a model, and whether it swaps there without recompiling; and why not."""
    found = read(adapter)
    bare = repeated(empty_model(model), found.config)
    answer: dict[str, Any] = {"loads": False, "swaps": False, "why_not": None, "sites": 0}
    layers, factor = getattr(found.config, "layer_replication", None), None
    try:
        made, values = load(Modules(bare), found, check_finite=True, shapes_only=True)
        answer.update(loads=True, sites=len(made.sites))
        factor = next((plan.factor for plan in made.sites.values() if plan.factor), None)
        declared = method_of(found.config).declared(found.config)
        if declared in servable():
            loaded = Adapter("checked", made, values)
            _prepare(bare, loaded, max_rank, slots, declared, factor)
            lower(bare, serving_of(state_of(bare)), loaded)
            answer["swaps"] = True
        else:
            answer["why_not"] = f"{declared} has no slot"
    except AdapterError as error:
        answer["why_not"] = str(error)
    words = [f"loads: {'yes' if answer['loads'] else 'no'}", f"swaps: {'yes' if answer['swaps'] else 'no'}"]
    words += [f"prepared with lokr_factor={factor}"] if factor and answer["swaps"] else []
    words += [f"on the base after fxpeft.replicate_layers(model, {layers})"] if layers else []
    show(as_json, answer, *words, *([answer["why_not"]] if answer["why_not"] else []))
    raise typer.Exit(0 if answer["swaps"] else 1)


def _prepare(bare: Any, adapter: Adapter, max_rank: int, slots: str, declared: str, factor: int | None) -> None:
    """Slots that are declared for what the adapter is, at the targets that are asked about."""
    made = adapter.plan
    blocks = max((plan.block for plan in made.sites.values()), default=0)
    with torch.device("meta"):
        fxpeft.prepare_hotswap(
            bare,
            max_rank,
            targets=slots,
            methods=[declared, *(["trainable_tokens"] if made.tokens and declared != "trainable_tokens" else [])],
            modules_to_save=list(adapter.values.saved),
            num_virtual_tokens=getattr(made.config, "num_virtual_tokens", None),
            token_modules=list(made.tokens) or None,
            max_tokens=max((len(rows.tokens) for rows in made.tokens.values()), default=None),
            max_block=max(blocks, BLOCK) if blocks else None,
            lokr_factor=factor,
        )
