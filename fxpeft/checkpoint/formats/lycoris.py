"""LyCORIS' LoHa and LoKr in files of image tools: PEFT's config of them, or LoRAs of the same updates.

PEFT's two methods are LyCORIS', site by site. A config of PEFT's has one method, one way to decompose convolutions and
one factor for all sites, and no magnitudes; a file of LyCORIS' may have any at each. What no config says is read as
LoRAs: both lower exactly to A and B of more ranks, and a magnitude is DoRA's then.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxpeft.checkpoint.formats.part import LYCORIS, MOST, Part, shaped, split
from fxpeft.errors import AdapterError, CheckpointError, listing
from fxpeft.methods import method_of
from fxpeft.methods.loha import PAIRS, LoHaConfig
from fxpeft.methods.loha import rank_first as loha_ranks
from fxpeft.methods.lokr import LoKrConfig
from fxpeft.methods.lokr import rank_first as lokr_ranks
from fxpeft.methods.lycoris import LycorisConfig
from fxpeft.passes.targets.kinds import Kind

Factors = Mapping[str, Tensor]


def config_of(
    part: Part, kinds: Mapping[str, Kind] | None, names: dict[str, Any]
) -> tuple[LycorisConfig, dict[str, Tensor]] | None:
    """PEFT's config of a part, and its tensors as PEFT lays them out; ``None`` where no config says them.

    Args:
        kinds: site -> what it is; ``None``: no model is at hand, and matrices are taken for linear layers'.
        names: ``target_modules`` and ``modules_to_save``.
    """
    sites = part.factors()
    methods = {name.partition("_")[0] for own in sites.values() for name in own}
    if methods not in ({"hada"}, {"lokr"}):
        return None
    own = {site: kinds[site] if kinds is not None else flat(factors) for site, factors in sites.items()}
    if any(not kind.is_linear and (len(kind.kernel) not in (1, 2) or kind.groups > 1) for kind in own.values()):
        return None
    if methods == {"lokr"} and any("lokr_w2" in sites[site] and len(kind.kernel) == 1 for site, kind in own.items()):
        return None  # of which PEFT makes another product
    tensors = dict(part.tensors)
    for site, factors in sites.items():  # PEFT gives a core two dimensions of a kernel, whatever the kernel has
        deeper = {name: t.unsqueeze(-1) for name, t in factors.items() if "_t" in name and t.dim() == 3}
        factors |= deeper
        tensors |= {f"{site}.{name}": tensor for name, tensor in deeper.items()}
    ranks = {site: _rank(factors) for site, factors in sites.items()}
    alphas = {site: scale(part.alphas.get(site), factors) * ranks[site] for site, factors in sites.items()}
    rank, others = _usual(ranks)
    alpha, other_alphas = _usual(alphas)
    shared: dict[str, Any] = {
        "r": rank, "rank_pattern": others, "alpha": alpha, "alpha_pattern": other_alphas, **names,
        "use_effective_conv2d": any("_t" in name for factors in sites.values() for name in factors),
    }  # fmt: skip
    for config in [LoHaConfig(**shared)] if methods == {"hada"} else _lokr(sites, shared):
        if kinds is None or _says(config, own, sites):
            return config, tensors
    return None


def as_lora(part: Part, kinds: Mapping[str, Kind] | None) -> Part:
    """The part with a LoRA at each site, to the same updates.

    Raises:
        AdapterError: updates of another size than the weights that they are of; all are named.
    """
    tensors, alphas, wrong = dict(part.tensors), dict(part.alphas), list[str]()
    for site, own in part.factors().items():
        if not any(name.startswith(LYCORIS) for name in own):
            continue
        size, kind = flat(own), kinds[site] if kinds is not None else flat(own)
        there = [kind.out_features, math.prod(kind.a_shape(1)[1:])]
        if kinds is None and min(there) * sum(there) > MOST:
            raise AdapterError(
                f"{site}: small factors of an update of {there}: where no model is at hand, expected one of at most "
                f"{MOST} numbers in its factors; load it into its model"
            )
        # a LoRA of a weight that is dilated is not, where the padding is "same"
        other = f" in {kind.groups} groups" if kind.groups > 1 else "" if kind.like_target else ", dilated"
        if [size.out_features, size.in_features] != there or other:
            found = [size.out_features, size.in_features]
            wrong.append(f"{site}: an update of {found}, and the model's weight is {there}{other}")
            continue
        a, b = ranks_of(own, kinds[site] if kinds is not None else None)
        for name in own:
            if name.startswith(LYCORIS):
                del tensors[f"{site}.{name}"]
        ones = (1 for _ in a.shape[2:])
        tensors[f"{site}.lora_A.weight"], tensors[f"{site}.lora_B.weight"] = a, b.t().reshape(*b.t().shape, *ones)
        alphas[site] = scale(alphas.get(site), own) * len(a)
    if wrong:
        raise AdapterError(f"updates that the model has no weights for:\n{listing(wrong)}")
    return shaped(replace(part, tensors=tensors, alphas=alphas, settings=None))


def ranks_of(own: Factors, kind: Kind | None) -> tuple[Tensor, Tensor]:
    """A site's update as A ``[ranks, in, *kernel]`` and B ``[ranks, out]``, without its scale.

    Args:
        kind: ``None``: A's inputs and kernel are one dimension.
    """
    kind = flat(own) if kind is None else kind
    if "lokr_w2" in own and len(kind.kernel) == 1:
        w2 = own["lokr_w2"].flatten(1)
        own = {**own, "lokr_w2_a": torch.eye(len(w2)).to(w2), "lokr_w2_b": w2}
        own.pop("lokr_w2")
    return lokr_ranks(kind, own) if any(name.startswith("lokr") for name in own) else loha_ranks(kind, own)


def scale(alpha: float | None, own: Factors) -> float:
    """A site's scale: alpha / rank, and 1 where it has no alpha, or no rank: two whole matrices of a LoKr."""
    rank = next((len(own[name]) for name in _SAYING if name in own), None)
    return alpha / rank if rank and alpha is not None else 1.0


_SAYING = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # their rows are the rank


def _rank(own: Factors) -> int:
    """The rank; of two whole matrices one of which PEFT makes them."""
    found = next((len(own[name]) for name in _SAYING if name in own), None)
    return found if found is not None else -(-max(*own["lokr_w1"].shape, *own["lokr_w2"].shape[:2]) // 2)


def flat(own: Factors) -> Kind:
    """A linear layer of as many inputs as a site has, its kernel's included."""
    core = next((own[name].shape[2:] for name in ("hada_t1", "lokr_t2") if name in own), ())
    side = 1 if core else 0
    if "hada_w1_a" in own:
        return Kind(own["hada_w1_b"].shape[1] * math.prod(core), own["hada_w1_a"].shape[side])
    out, into = _first(own)
    if "lokr_w2" in own:
        w2 = own["lokr_w2"].flatten(1)
        return Kind(into * w2.shape[1], out * len(w2))
    return Kind(into * own["lokr_w2_b"].shape[1] * math.prod(core), out * own["lokr_w2_a"].shape[side])


def check(part: Part, source: str) -> None:
    """Refuse LyCORIS' factors that make no update.

    Raises:
        CheckpointError: some are missing, too many or of other sizes than the others; all sites are named.
    """
    sites = part.factors()
    problems = [
        f"{key}: beside no {key.rpartition('.')[2][:4]}_w1"
        for key in part.tensors
        if (place := split(key)) is not None and place[1].startswith(LYCORIS) and place[0] not in sites
    ]
    for site, own in sites.items():
        names = {name for name in own if name != "lora_magnitude_vector"}
        if not any(name.startswith(LYCORIS) for name in names):
            continue
        found = ", ".join(f"{name} {list(own[name].shape)}" for name in sorted(names))
        if names not in _LAYOUTS:
            problems.append(f"{site}: these are no LoHa's or LoKr's: {found}")
        elif not all(_fit(own, *pair) for pair in _PAIRS if pair[0] in own) or not _alike(own):
            problems.append(f"{site}: their sizes don't fit: {found}")
    if problems:
        raise CheckpointError(f"{source}: factors that make no update:\n{listing(problems)}")


_PAIRS = (*PAIRS, ("lokr_w1_a", "lokr_w1_b", ""), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
_FOUR = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_FIRST = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_SECOND = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
_LAYOUTS = [_FOUR, _FOUR | {"hada_t1", "hada_t2"}, *({*one, *two} for one in _FIRST for two in _SECOND)]


def _fit(own: Factors, a: str, b: str, core: str) -> bool:
    """Whether two matrices have one rank, which a core between them has twice."""
    if own[a].dim() != 2 or own[b].dim() != 2:
        return False
    rank = len(own[b])
    return own[core].shape[:2] == (rank, len(own[a])) == (rank, rank) if core in own else own[a].shape[1] == rank


def _alike(own: Factors) -> bool:
    """Whether the two products of a LoHa are of one size and rank, and what a LoKr has whole has sides."""
    if "hada_w1_a" in own:
        return all(own[one].shape == own[two].shape for one, two in zip(*PAIRS, strict=True) if one in own)
    return all(own[n].dim() == 2 if n == "lokr_w1" else own[n].dim() >= 2 for n in ("lokr_w1", "lokr_w2") if n in own)


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(site)}": value for site, value in values.items() if value != usual}


def _lokr(sites: Mapping[str, Factors], shared: dict[str, Any]) -> Iterator[LoKrConfig]:
    """The configs that may say these factors, the likeliest first."""
    sizes = Counter(size for own in sites.values() for size in _first(own))
    both = any("lokr_w1_a" in own for own in sites.values())
    for factor in (-1, *(size for size, _ in sizes.most_common(16))):
        yield LoKrConfig(**shared, decompose_factor=factor, decompose_both=both)


def _first(own: Factors) -> tuple[int, int]:
    """The shape of W1."""
    if "lokr_w1" in own:
        return own["lokr_w1"].shape[0], own["lokr_w1"].shape[1]
    return len(own["lokr_w1_a"]), own["lokr_w1_b"].shape[1]


def _says(config: LycorisConfig, kinds: Mapping[str, Kind], sites: Mapping[str, Factors]) -> bool:
    """Whether PEFT makes exactly these factors for a config."""
    method = method_of(config)
    return all(
        method.shapes(config, method.plan(config, site, kinds[site]))
        == {name: tuple(tensor.shape) for name, tensor in own.items()}
        for site, own in sites.items()
    )
