"""An adapter computed from others: a LoRA with given factors at given sites, added like a loaded one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxpeft.adapters.installing import install_adapter
from fxpeft.adapters.state import Adapter
from fxpeft.errors import AdapterError, listing
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lora import LoraConfig
from fxpeft.methods.values import Values
from fxpeft.model.walk import base_modules
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.base import attribute
from fxpeft.passes.targets.kinds import Kind
from fxpeft.targets.sites import AdapterPlan, make_plan

COPIED = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "lora_dropout", "inference_mode")


def add_lora(model: nn.Module, name: str, values: Values, sources: Sequence[Adapter], **fields: Any) -> None:
    """Add a LoRA of scale 1 with these factors and make it the active one.

    Its config selects exactly the sites of ``values``, each at the rank of its A, in fxpeft and in PEFT.

    Args:
        values: sites' ``lora_A``, ``lora_B`` and, at all or none, ``lora_B_bias``; modules and biases.
        sources: the adapters it was computed from; what is no matter of sites is the first one's.
        fields: fields of the config that differ from that.
    """
    model = unwrap(model)
    plan = _plan(model, values, sources, fields)
    for path in plan.tensors:  # biases that no source had: a new adapter's are the base's
        values.tensors.setdefault(path, attribute(model, path).detach().clone())
    install_adapter(model, Adapter(name, plan, values))


def _plan(model: nn.Module, values: Values, sources: Sequence[Adapter], fields: dict[str, Any]) -> AdapterPlan:
    configs = [adapter.config for adapter in sources]
    ranks = {site: len(parts["lora_A"]) for site, parts in values.sites.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    own = {f"^{re.escape(site)}": r for site, r in ranks.items() if r != rank}
    modes = {getattr(config, "bias", "none") for config in configs}
    first = configs[0]
    settings: dict[str, Any] = {f: getattr(first, f) for f in COPIED if hasattr(first, f)}
    settings |= {
        "r": rank, "lora_alpha": rank, "rank_pattern": own, "alpha_pattern": dict(own),
        "bias": next((mode for mode in ("all", "lora_only") if mode in modes), "none"),
        "modules_to_save": list(dict.fromkeys(m for c in configs for m in c.modules_to_save or ())) or None,
        "trainable_token_indices": {n: list(t.tokens) for a in sources for n, t in a.plan.tokens.items()} or None,
        "layer_replication": next((r for c in configs if (r := getattr(c, "layer_replication", None))), None),
        "lora_bias": any("lora_B_bias" in parts for parts in values.sites.values()), **fields,
    }  # fmt: skip
    why = "they select others"
    for targets in _targets(configs, list(ranks)):
        try:
            plan = make_plan(model, LoraConfig(target_modules=targets, **settings), heads=False)
        except AdapterError as error:
            why = str(error)  # shorter names can select what can't be adapted; the next ones are more exact
            continue
        if plan.sites.keys() == ranks.keys() and set(plan.saved) == values.saved.keys():
            return plan
    names = ", ".join(adapter.name for adapter in sources)
    raise AdapterError(f"no config selects exactly the sites and modules_to_save of {names}: {why}")


def _targets(configs: Sequence[AdapterConfig], sites: list[str]) -> Iterator[list[str] | str]:
    """Ways to say which sites, the readable ones first."""
    lists = [c.target_modules for c in configs if isinstance(c.target_modules, list)]
    if len(lists) == len(configs):
        yield sorted({target for targets in lists for target in targets})
    yield sorted(sites)
    yield "|".join(map(re.escape, sites))


def brought(adapters: Sequence[Adapter]) -> Values:
    """The modules and biases that the adapters bring, copied.

    Raises:
        AdapterError: two of them bring the same.
    """
    out, clashes = Values(), []
    for adapter in adapters:
        own = adapter.current().clone(sites=False)
        clashes += [f"{p}: {adapter.name}" for p in (*own.saved, *own.tensors) if p in out.saved or p in out.tensors]
        out.saved.update(own.saved)
        out.tensors.update(own.tensors)
        clashes += [f"{name}: {adapter.name}" for name in own.tokens if name in out.tokens]
        out.tokens.update(own.tokens)
    if clashes:
        raise AdapterError(
            f"more than one adapter brings its own\n{listing(clashes)}\nwhich can't be blended; leave one of them out"
        )
    return out


def in_order(model: nn.Module, adapters: Sequence[Adapter]) -> list[str]:
    """The sites that any of the adapters has, as they stand in the model."""
    wanted = {site for adapter in adapters for site in adapter.plan.sites}
    return [name for name, _ in base_modules(unwrap(model)) if name in wanted]


def factorise(
    kind: Kind, delta: Tensor, rank: int, *, clamp: float | None = None, full_matrices: bool = False,
    driver: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The nearest product of A, in ``kind.a_shape``, and B, in ``kind.b_shape``, to an update ``[out, in, ...]``.

    Args:
        clamp: a quantile of both factors' entries at which they are cut, as in PEFT.
    """
    u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=full_matrices, driver=driver)
    return _shaped(kind, u[:, : len(s)] * s, v[: len(s)], rank, clamp)


def refactorise(kind: Kind, a: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As :func:`factorise`, of an update given by its factors ``[n, in, ...]`` and ``[n, out]``.

    The decomposition is one of ``n x n``, so it costs nothing beside that of the whole update.
    """
    qa, ra = torch.linalg.qr(a.flatten(1).t())
    qb, rb = torch.linalg.qr(rows.t())
    u, s, v = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    return _shaped(kind, qb @ (u * s), v @ qa.t(), rank, None)


def _shaped(kind: Kind, b: Tensor, a: Tensor, rank: int, clamp: float | None) -> tuple[Tensor, Tensor]:
    """The leading ranks, filled up with zeros where there are fewer."""
    b, a = b[:, :rank], a[:rank]
    if clamp is not None:
        bound = _quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        b, a = b.clamp(-bound, bound), a.clamp(-bound, bound)
    missing = rank - len(a)
    if missing > 0:
        b, a = nn.functional.pad(b, (0, missing)), nn.functional.pad(a, (0, 0, 0, missing))
    return a.reshape(kind.a_shape(rank)).contiguous(), b.reshape(kind.b_shape(rank)).contiguous()


def _quantile(values: Tensor, q: float) -> Tensor:
    """``torch.quantile``, which takes no more than 16 million values."""
    place = q * (len(values) - 1)
    below = int(place)
    ordered = values.sort().values
    return torch.lerp(ordered[below], ordered[min(below + 1, len(values) - 1)], place - below)


def refuse_parameters(adapters: Iterable[Adapter], what: str) -> None:
    """Refuse adapters with sites that are parameters, for what is defined on modules only."""
    found = [f"{a.name}: {site}" for a in adapters for site, plan in a.plan.sites.items() if plan.kind.leaf]
    if found:
        raise AdapterError(
            f"{what} takes sites that are modules (target_modules), found parameters (target_parameters):\n"
            f"{listing(found)}\nActivate the adapters together, or fold them, which both take parameters too."
        )
