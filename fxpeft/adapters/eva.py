"""EVA (https://arxiv.org/abs/2410.07170): A starts as the principal directions of what a site sees in the data.

The components of every site's input are computed batch by batch; then the adapter's ranks go to where
they explain the most variance. PEFT's ``tuners/lora/eva.py``, whose results these are.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxpeft.adapters.change import ordinary
from fxpeft.adapters.contexts import disabled
from fxpeft.adapters.installing import replace_attached
from fxpeft.adapters.starting import asking, in_mode
from fxpeft.adapters.state import Adapter, state_of
from fxpeft.adapters.values import fresh_values
from fxpeft.errors import AdapterError, listing
from fxpeft.methods.base import SitePlan
from fxpeft.methods.inits import EvaConfig
from fxpeft.methods.lora import LoraConfig
from fxpeft.model.wrappers import submodule, unwrap
from fxpeft.passes.targets.names import pattern_value
from fxpeft.targets.sites import make_plan


@ordinary()
def initialize_eva(
    model: nn.Module,
    dataloader: Iterable[Any],
    name: str = "default",
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    rows: Callable[[Any, EvaConfig], Tensor | None] | None = None,
    max_passes: int = 10,
    progress: bool = True,
) -> None:
    """Give a fresh adapter with ``init_lora_weights="eva"`` its A and its ranks; B is zero.

    The bare model runs on batch after batch, in evaluation mode, until the components of every site
    have settled (``eva_config.tau``); sites that see the same input share one computation. Then each
    site's rank is set in ``rank_pattern``, and sites that got none are left out. Embeddings stay as
    they are.

    Args:
        dataloader: batches on any device; it is gone through again while sites have not settled.
        forward: how to run the model on a batch; default: ``model(**batch)``, ``model(*batch)`` or
            ``model(batch)``, as the batch is a mapping, a sequence or a tensor.
        rows: which positions count: a mask over the leading dimensions of the sites' inputs, or
            ``None`` for all of them. Default: PEFT's for language models, by ``attention_mask`` and
            ``labels``; all positions where a batch has no ``input_ids`` or an input another shape.
        max_passes: after so many passes over the data a site is taken as it is, with a warning.
        progress: show a bar.

    Raises:
        AdapterError: not an EVA adapter, slots are prepared, no data, or batches with fewer rows
            than a site needs components; nothing was changed.
    """
    model, state = unwrap(model), state_of(model)
    adapter, config = asking(state, name, "eva")
    if state.serving is not None:
        raise AdapterError("initialize_eva changes ranks that are trained: call release_hotswap(model) before it")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise AdapterError(
            "initialize_eva sees one process's data, so processes would get different ranks; run it in one process, "
            "save_adapter, and load_adapter(..., trainable=True) in all of them"
        )
    plans = {site: plan for site, plan in adapter.plan.sites.items() if plan.kind.is_linear}
    run = _Run(model, config.eva_config or EvaConfig(), forward or _forward, rows or language_rows)
    with torch.no_grad(), disabled(model), in_mode(model, training=False):
        sites = _search(run, dataloader, plans, max_passes, progress)
    new = _with_components(model, adapter, config, sites)
    replace_attached(model, state, new)


@dataclass
class Components:
    """Principal components of rows that come in batches: PEFT's ``IncrementalPCA``.

    Args:
        count: how many. vectors: [count, features], values: [count], descending: singular values.
        settled: [count]: whether a vector hardly moved in the last step.
    """

    count: int
    tau: float
    seen: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    vectors: Tensor | None = None
    values: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32))
    settled: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def add(self, x: Tensor) -> None:
        """Take a batch of rows, ``[rows, features]`` float32; too few for the components are left out."""
        if len(x) < self.count:
            return
        own = x.double().mean(0)
        total = self.seen + len(x)
        moved = own - self.mean
        self.squares = self.squares + (x - own).square().sum() + moved.square().sum() * self.seen * len(x) / total
        before = self.vectors
        if before is None:
            stacked = x - own.float()
        else:  # in double precision from here on, as in PEFT
            correction = (self.seen / total * len(x)) ** 0.5 * moved
            stacked = torch.cat((self.values[:, None] * before, x - x.mean(0), correction[None]))
        with torch.random.fork_rng():
            torch.manual_seed(42)  # PEFT's: the same data give the same components
            _, s, v = torch.svd_lowrank(stacked, 2 * self.count, niter=4)
        vectors = v.t()[: self.count]
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        self.vectors, self.values = vectors * largest.sign(), s[: self.count]
        self.mean = self.mean + moved * len(x) / total
        self.seen = total
        if before is not None:
            self.settled = torch.cosine_similarity(self.vectors, before) >= self.tau

    def explained(self) -> Tensor:
        """The share of the rows' variance that each component explains."""
        return self.values.square() / self.squares

    def has_settled(self, rank: int) -> bool:
        """Whether the first ``rank`` components have."""
        return rank == 0 or (len(self.settled) > 0 and bool(self.settled[:rank].all()))


@dataclass
class _Run:
    model: nn.Module
    config: EvaConfig
    forward: Callable[[nn.Module, Any], Any]
    rows: Callable[[Any, EvaConfig], Tensor | None]

    def inputs(self, batch: Any, sites: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Run the model on a batch; every site's input rows, ``[rows, features]``, go to its function."""
        batch = _moved(batch, next(self.model.parameters()).device)
        mask = self.rows(batch, self.config)

        def hook(take: Callable[[Tensor], None]) -> Callable[..., None]:
            def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                at = None if mask is None else mask.bool().to(x.device)
                chosen = x[at] if at is not None and x.shape[:-1] == at.shape else x.reshape(-1, x.shape[-1])
                take(chosen.detach().float())

            return see

        hooks = [
            submodule(self.model, site).register_forward_pre_hook(hook(take), with_kwargs=True)
            for site, take in sites.items()
        ]
        try:
            self.forward(self.model, batch)
        finally:
            for handle in hooks:
                handle.remove()


def _search(
    run: _Run, dataloader: Iterable[Any], plans: Mapping[str, SitePlan], max_passes: int, progress: bool
) -> dict[str, Tensor]:
    """Site -> its components, ``[rank, in]`` with the rank that it got."""
    if not plans:
        raise AdapterError("EVA is for linear layers, as in PEFT; the adapter has none")
    ranks = {site: plan.rank for site, plan in plans.items()}
    leader = _groups(run, dataloader, list(ranks))
    most = {site: round(rank * run.config.rho) for site, rank in ranks.items()}
    shared = {lead: max(most[s] for s in ranks if leader[s] == lead) for lead in dict.fromkeys(leader.values())}
    found = {lead: Components(count, run.config.tau) for lead, count in shared.items()}
    wide = [
        f"{site}: {c.count} components, {plans[site].kind.in_features} input features"
        for site, c in found.items()
        if c.count > plans[site].kind.in_features
    ]
    if wide:
        raise AdapterError(f"EVA: r * rho is more than these sites have inputs:\n{listing(wide)}\nlower r or rho")
    given = {site: shared[leader[site]] for site in ranks}
    busy = set(found)
    with tqdm(desc="EVA", unit="batch", disable=not progress, leave=False) as bar:
        for number, batch in enumerate(_batches(dataloader, max_passes, found)):
            busy = {lead for lead, c in found.items() if not c.has_settled(given[lead])}
            bar.set_description(f"{sum(leader[s] not in busy for s in ranks)}/{len(ranks)} layers have converged")
            if not busy:
                break
            run.inputs(batch, {lead: found[lead].add for lead in busy})
            if all(c.vectors is not None for c in found.values()):
                given = _share_out(found, leader, sum(ranks.values()))
            bar.update(number + 1 - bar.n)
        else:
            busy = {lead for lead, c in found.items() if not c.has_settled(given[lead])}
    if busy:
        warnings.warn(
            f"EVA: after {max_passes} passes these sites have not settled; lower eva_config.tau or give it more data\n"
            f"{listing(sorted(busy))}",
            stacklevel=3,
        )
    result = {}
    for site in ranks:
        components = found[leader[site]]
        assert components.vectors is not None
        vectors = components.vectors[: given[site]]
        if run.config.whiten:
            vectors = vectors / components.values[: given[site], None].sqrt()
        result[site] = vectors
    return result


def _batches(dataloader: Iterable[Any], passes: int, found: Mapping[str, Components]) -> Iterator[Any]:
    """Batch after batch, from the start again after the last one."""
    for _ in range(passes):
        yield from dataloader
        few = [f"{site}: {c.count} components" for site, c in found.items() if c.vectors is None]
        if few:
            raise AdapterError(
                "EVA: no batch has as many rows (tokens that count) as these sites need components:\n"
                f"{listing(few)}\nuse larger batches, a smaller r or rho, or eva_config use_label_mask=False"
            )


def _groups(run: _Run, dataloader: Iterable[Any], sites: list[str]) -> dict[str, str]:
    """Site -> the first of the sites that saw the same input in the first batch."""
    if iter(dataloader) is dataloader:
        raise AdapterError("dataloader: expected one that can be gone through again, such as a DataLoader or a list")
    batch = next(iter(dataloader), None)
    if batch is None:
        raise AdapterError("dataloader: expected at least one batch, found none")
    seen: dict[str, tuple[Any, ...]] = {}

    def note(site: str) -> Callable[[Tensor], None]:
        return lambda x: seen.update(
            {site: (x.shape, hashlib.blake2b(x.cpu().contiguous().numpy().tobytes()).digest())}
        )

    run.inputs(batch, {site: note(site) for site in sites})
    missing = [site for site in sites if site not in seen]
    if missing:
        raise AdapterError(
            f"EVA: the forward never calls these sites; take them out of the targets\n{listing(missing)}"
        )
    first: dict[tuple[Any, ...], str] = {}
    return {site: first.setdefault(seen[site], site) for site in sites}


def _share_out(found: Mapping[str, Components], leader: Mapping[str, str], budget: int) -> dict[str, int]:
    """Site -> rank: the budget goes to the components that explain the most, PEFT's ``_get_rank_distribution``."""
    order = [*found, *(site for site in leader if site not in found)]
    explained = {lead: components.explained() for lead, components in found.items()}
    owners = [site for site in order for _ in explained[leader[site]]]
    device = next(iter(explained.values())).device
    best = torch.cat([explained[leader[site]].to(device) for site in order]).argsort(descending=True)[:budget]
    counts = Counter(owners[i] for i in best.tolist())
    given = {site: counts[site] for site in order}
    for site in order:  # of sites with one input the first has the most, for it is the one that is watched
        lead = leader[site]
        if given[lead] < given[site]:
            given[lead], given[site] = given[site], given[lead]
    return given


def _with_components(model: nn.Module, adapter: Adapter, config: LoraConfig, found: Mapping[str, Tensor]) -> Adapter:
    """The adapter with these components as its A, and with as many ranks; PEFT's ``_load_eva_state_dict``."""
    assert config.eva_config is not None
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    kept = []
    for site, old in adapter.plan.sites.items():
        rank = len(found[site]) if site in found else old.rank
        if not rank:
            continue
        kept.append(site)
        alpha = pattern_value(config.alpha_pattern, site, config.lora_alpha, "alpha_pattern")
        if rank != old.rank and config.eva_config.adjust_scaling_factors:
            alpha *= rank / old.rank
        if rank != config.r:
            ranks[site] = rank
        if alpha != config.lora_alpha:
            alphas[site] = alpha
    new = replace(config, target_modules=kept, rank_pattern=ranks, alpha_pattern=alphas)
    plan = make_plan(model, new, heads=False)
    if plan.sites.keys() != set(kept):  # a name may be the end of another one's
        exact = "|".join(map(re.escape, kept))
        plan = make_plan(
            model, replace(new, target_modules=exact, layers_to_transform=None, layers_pattern=None), heads=False
        )
    before, fresh = adapter.current(), fresh_values(model, plan, autocast=True)
    sites = {site: before.sites[site] for site in plan.sites}
    for site in plan.sites.keys() & found.keys():
        sites[site] = {n: p.to(sites[site][n]) for n, p in fresh.sites[site].items()}
        sites[site]["lora_A"].copy_(found[site])
    tensors = {path: before.tensors[path] for path in plan.tensors}
    return Adapter(adapter.name, plan, replace(before, sites=sites, tensors=tensors), adapter.strength)


def language_rows(batch: Any, config: EvaConfig) -> Tensor | None:
    """The tokens that are no padding and have a label, PEFT's ``prepare_model_inputs_fn_language_modeling``."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return None
    mask: Tensor = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    labels = batch.get("labels")
    if config.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != config.label_mask_value)
    return mask


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return type(batch)(_moved(value, device) for value in batch) if isinstance(batch, list | tuple) else batch
