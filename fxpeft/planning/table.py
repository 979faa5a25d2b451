"""Plans as text: a table with one row for all layers that are alike, and the difference of two plans."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxpeft.planning.data import PlanData, PlanRow


def collapse(names: Sequence[str]) -> list[str]:
    """Names that differ in their numbers only, as one: ``layers.{0-3,7}.q``; others as they are."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "#", name), []).append(name)
    lines = []
    for template, members in groups.items():
        numbers = [[int(part) for part in name.split(".") if part.isdecimal()] for name in members]
        columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        if len(members) == 1 or math.prod(map(len, columns)) != len(members):
            lines += members
            continue
        ranges = iter(str(c[0]) if len(c) == 1 else "{" + _ranges(c) + "}" for c in columns)
        lines.append(".".join(next(ranges) if part == "#" else part for part in template.split(".")))
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def size(count: float) -> str:
    """A count in three digits or so: ``1.23M``."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def plan_text(plan: PlanData) -> str:
    """The plan as a table, as wide as it needs to be."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=io.StringIO(), width=400)
    title = f"{type(plan.config).__name__} on {plan.model}"
    console.print(Text(f"{title}: {len(plan.sites)} sites, {plan.parameters:,} parameters"))
    console.print(plan_table(plan))
    for line in plan_notes(plan):
        console.print(Text(line))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def plan_table(plan: PlanData) -> Any:
    """The sites as rich's table, one row for all that differ in their layer only."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("site", "role", "kind"):
        table.add_column(heading, overflow="fold")
    for heading in ("n", "in", "out", "rank", "alpha", "parameters", "bytes", "flops/token", "kept/token"):
        table.add_column(heading, justify="right")
    alike: dict[tuple[Any, ...], list[PlanRow]] = {}
    for site in plan.sites:
        form = (re.sub(r"\d+", "#", v) if isinstance(v, str) else v for v in dataclasses.astuple(site))
        alike.setdefault(tuple(form), []).append(site)
    for sites in alike.values():
        one = sites[0]
        for name in (names := collapse([s.name for s in sites])):
            count = len(sites) if len(names) == 1 else 1
            table.add_row(
                name, one.role, one.kind, str(count), str(one.in_features), str(one.out_features), str(one.rank),
                "" if one.alpha is None else f"{one.alpha:g}",
                *(size(v * count) for v in (one.parameters, one.extra_bytes, one.flops, one.kept_here)),
            )  # fmt: skip
    table.add_section()
    totals = (size(v) for v in (plan.parameters, plan.extra_bytes, plan.flops, plan.kept))
    table.add_row("all", "", "", str(len(plan.sites)), "", "", "", "", *totals)
    return table


def plan_notes(plan: PlanData) -> list[str]:
    """What else the plan says: whole modules, what was left out and why."""
    lines = [f"trained whole: {', '.join(plan.saved)}"] if plan.saved else []
    if plan.brought:
        lines.append(f"beside the sites: {sum(row.parameters for row in plan.brought):,} parameters")
    lines += [f"shared by all sites: {tensor.name}, {tensor.parameters:,} parameters" for tensor in plan.shared]
    lines += [f"own copies of: {', '.join(collapse(plan.tensors))}"] if plan.tensors else []
    reasons: dict[str, list[str]] = {}
    for skip in plan.skipped:
        reasons.setdefault(skip.reason, []).append(skip.site)
    lines += [f"skipped, {reason}: {', '.join(collapse(sites))}" for reason, sites in reasons.items()]
    return [*lines, *plan.notes]


@dataclass(frozen=True)
class PlanDiff:
    """What changes from one plan to another. False where nothing does.

    Args:
        config: field -> values before and after. added, removed: sites.
        changed: site -> field -> values before and after.
    """

    config: dict[str, tuple[Any, Any]]
    added: tuple[PlanRow, ...]
    removed: tuple[PlanRow, ...]
    changed: dict[str, dict[str, tuple[Any, Any]]]
    parameters: tuple[int, int]

    def __bool__(self) -> bool:
        return bool(self.config or self.added or self.removed or self.changed)

    def __str__(self) -> str:
        if not self:
            return "no difference"
        lines = [f"{name}: {_short(before)} -> {_short(after)}" for name, (before, after) in self.config.items()]
        lines += [f"- {name}" for name in collapse([s.name for s in self.removed])]
        lines += [f"+ {name}" for name in collapse([s.name for s in self.added])]
        alike: dict[str, list[str]] = {}
        for name, fields in self.changed.items():
            what = ", ".join(f"{f} {before} -> {after}" for f, (before, after) in fields.items())
            alike.setdefault(what, []).append(name)
        lines += [f"~ {name}: {what}" for what, names in alike.items() for name in collapse(names)]
        before, after = self.parameters
        return "\n".join([*lines, f"parameters: {before:,} -> {after:,}"])


def diff_plans(before: PlanData, after: PlanData) -> PlanDiff:
    """Compare two plans, site by site."""
    old, new = before.config.to_dict(), after.config.to_dict()
    listed = ("target_modules", "exclude_modules", "target_parameters")  # sites tell what they come to
    config = {k: (old.get(k), new.get(k)) for k in (*old, *(k for k in new if k not in old))}
    sites, others = {s.name: s for s in before.sites}, {s.name: s for s in after.sites}
    changed = {
        name: fields
        for name in sites
        if name in others and (fields := _changed(dataclasses.asdict(sites[name]), dataclasses.asdict(others[name])))
    }
    return PlanDiff(
        {k: (a, b) for k, (a, b) in config.items() if a != b and k not in listed},
        tuple(s for n, s in others.items() if n not in sites), tuple(s for n, s in sites.items() if n not in others),
        changed, (before.parameters, after.parameters),
    )  # fmt: skip


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {k: (before[k], after[k]) for k in before if before[k] != after[k]}


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 80 else f"{text[:77]}..."
