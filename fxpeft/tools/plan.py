"""``fxpeft plan``: what an adapter of any method would put where, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import fxpeft
from fxpeft.errors import AdapterError, short
from fxpeft.tools.answers import Json, Model, Target, show


def plan(
    model: Model,
    target: Target = None,
    exclude: Annotated[str | None, typer.Option(help="A pattern for what to leave out.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Default: the method's.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The update is scaled by alpha / rank, in most methods.")] = None,
    method: Annotated[str, typer.Option(help="As in methods= of prepare_hotswap: lora, dora, vera, oft, ...")] = "lora",
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the method's config, as JSON, repeatable."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan here, as JSON.")] = None,
    draw: Annotated[Path | None, typer.Option(help="Draw a layer into this .svg, .png or .pdf.")] = None,
    layer: Annotated[int, typer.Option(help="The layer to draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Show what an adapter would put where; only the model's config is read."""
    from fxpeft.methods import config_for
    from fxpeft.model.empty import empty_model
    from fxpeft.planning.table import plan_notes, plan_table

    fields: dict[str, Any] = {"base_model_name_or_path": model}
    # one text is PEFT's regular expression or a pattern; a name alone is meant as a name
    if target and len(target) == 1 and (target[0] == "all-linear" or not target[0].isidentifier()):
        fields["target_modules"] = target[0]
    elif target:
        fields["target_modules"] = target
    if exclude is not None:
        fields["exclude_modules"] = exclude
    config = config_for(method, {**fields, **_fields(given or ())}, rank=rank, alpha=alpha)
    made = fxpeft.plan(empty_model(model), config)
    if save is not None:
        save.write_text(made.to_json() + "\n", encoding="utf-8")
    if draw is not None:
        made.draw(layer, draw)
    head = f"{type(made.config).__name__} on {made.model}: {len(made.sites)} sites, {made.parameters:,} parameters"
    show(as_json, json.loads(made.to_json()) if as_json else None, head, plan_table(made), *plan_notes(made))


def _fields(given: Sequence[str]) -> dict[str, Any]:
    """Fields and their values, which are JSON, or text where they aren't."""
    fields: dict[str, Any] = {}
    for each in given:
        name, found, value = each.partition("=")
        if not found or not name:
            raise AdapterError(f"--set: expected FIELD=VALUE, found {short(each)}")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields
