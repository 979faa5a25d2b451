"""An adapter's config read off the keys and shapes of its tensors, where nobody kept ``adapter_config.json``."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal

from torch import Tensor, nn

from fxpeft.checkpoint.keys import check_adapters_own, file_keys, parts_known
from fxpeft.errors import AdapterError, listing
from fxpeft.methods import method_of
from fxpeft.methods.base import Method
from fxpeft.methods.config import AdapterConfig, matching
from fxpeft.methods.ia3 import IA3Config
from fxpeft.methods.lora import LoraConfig
from fxpeft.model.modules import Modules
from fxpeft.outside import dense
from fxpeft.passes.targets.names import NameSelector, Selection, pattern_value
from fxpeft.targets.resolve import spelled

_LORA = {"lora_A", "lora_B", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
_WHOLE = "say so in a config, and pass that too"


def infer_config(
    state_dict: Mapping[str, Tensor], model: nn.Module | Modules | None = None, *, lora_alpha: float | None = None
) -> AdapterConfig:
    """A config whose sites and ranks are those of an adapter's tensors: LoRA, DoRA or IA3.

    Args:
        state_dict: PEFT's keys, of a file or of a model's modules.
        model: lets target modules be said in short, and exactly where a name is the end of another.
        lora_alpha: no tensor says it. ``None``: every site's own rank, so that all scales are 1.

    Raises:
        AdapterError: the tensors are of several adapters, of a method whose config holds more than they say, or no
            adapter's.
    """
    return _inferred(peft_keys(state_dict), None if model is None else Modules.of(model), lora_alpha)


def peft_keys(state_dict: Mapping[str, Tensor], *, shapes_only: bool = False) -> dict[str, Tensor]:
    """An adapter's tensors under the keys of PEFT's files, all with PEFT's prefix.

    Args:
        shapes_only: tensors may be on the meta device; they get values that are no one's.

    Raises:
        CheckpointError: a key or value of another sort; they are of several adapters, or some are the base's.
    """
    source = "the state_dict"
    if shapes_only:
        state_dict = {
            key: value.new_zeros((), device="cpu").expand(value.shape)
            if isinstance(value, Tensor) and value.is_meta else value
            for key, value in state_dict.items()
        }  # fmt: skip
    found = file_keys(dense(state_dict, source), source)
    check_adapters_own(found, source)
    parts = parts_known()
    return {key if parts.is_bare(key) else f"{Method.prefix}{_bare(key)}": tensor for key, tensor in found.items()}


@matching()
def with_sites(config: AdapterConfig, tensors: Mapping[str, Tensor], modules: Modules) -> AdapterConfig:
    """A config with the sites and ranks of an adapter's tensors in place of its own; PEFT's rule.

    Raises:
        AdapterError: the config targets parameters, whose experts' ranks no key tells apart.
    """
    if not method_of(config).targeted:
        return config
    if getattr(config, "target_parameters", None):
        raise AdapterError(
            "target_parameters: their sites and ranks can't be read off a state_dict, nor in PEFT; save the config "
            "beside the tensors and call load_adapter"
        )
    parts = _parts(tensors)
    own = config.target_modules
    if isinstance(own, str | list) and own != "all-linear":
        said = config.selector().select(modules)
        if _says(config, said, tensors, parts):
            return config.changed()
        _compare(said, list(parts))
    changes: dict[str, Any] = {
        "target_modules": targets_of(list(parts), modules), "exclude_modules": None, "layers_to_transform": None,
        "layers_pattern": None,
    }  # fmt: skip
    saved = [*(config.modules_to_save or ()), *saved_of(tensors, parts)]
    changes["modules_to_save"] = list(dict.fromkeys(saved)) or None
    if isinstance(config, LoraConfig):
        rank, others = _ranks(parts)
        changes |= {"r": rank, "rank_pattern": others}
    if isinstance(config, IA3Config) and config.feedforward_modules is not None:
        named = Selection(config.feedforward_modules, "feedforward_modules")
        inner = [site for site in parts if named(site)]
        changes |= {"target_modules": sorted(parts), "feedforward_modules": inner}
    settable = {f.name for f in fields(config) if f.init}
    return replace(config, **{name: value for name, value in changes.items() if name in settable})


def _says(
    config: AdapterConfig, said: list[str], tensors: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, Tensor]]
) -> bool:
    """Whether a config that selects these sites says what its tensors do, as that of a LoRA which was saved whole."""
    if not isinstance(config, LoraConfig) or {*said} != {*parts} or saved_of(tensors, parts):
        return False
    ranks = {site: len(a) for site, own in parts.items() if (a := own.get("lora_A")) is not None and a.ndim}
    pattern = config.rank_pattern
    return len(ranks) == len(parts) and all(
        rank == (pattern_value(pattern, site, config.r) if pattern else config.r) for site, rank in ranks.items()
    )


def _inferred(tensors: Mapping[str, Tensor], modules: Modules | None, alpha: float | None) -> AdapterConfig:
    parts = _parts(tensors)
    if "prompt_embeddings" in tensors:
        raise AdapterError(f"state_dict: a prompt's tensor doesn't say which method made it; {_WHOLE}")
    if any(key.endswith("trainable_tokens_delta") for key in tensors):
        raise AdapterError(f"state_dict: rows of an embedding don't say which tokens they are of; {_WHOLE}")
    if not parts:
        raise AdapterError(f"state_dict: no key is a LoRA's or an IA3's:\n{listing(tensors)}")
    every = {part for own in parts.values() for part in own}
    shared: dict[str, Any] = {
        "target_modules": targets_of(list(parts), modules), "modules_to_save": saved_of(tensors, parts) or None,
    }  # fmt: skip
    if every == {"ia3_l"}:
        gains = {site: own["ia3_l"] for site, own in parts.items()}
        if any(gain.ndim != 2 for gain in gains.values()):
            raise AdapterError(f"state_dict: a convolution's ia3_l doesn't say what it multiplies; {_WHOLE}")
        inner = [site for site, gain in gains.items() if gain.shape[0] == 1]
        # each by its whole name: its last atom may be another site's that multiplies outputs
        return IA3Config(**{**shared, "target_modules": sorted(parts)}, feedforward_modules=inner)
    if "ia3_l" in every or every & {"lora_E", "lora_ranknum"}:
        what = "AdaLoRA's schedule and ranks are" if "ia3_l" not in every else "these keys are of two methods, which is"
        raise AdapterError(f"state_dict: {what} not in its tensors; {_WHOLE}")
    if more := sorted(every - _LORA):
        raise AdapterError(
            f"state_dict: {', '.join(more)}: a method whose config holds more than its tensors; {_WHOLE}"
        )
    rank, others = _ranks(parts)
    settings: dict[str, Any] = {"lora_alpha": rank, "alpha_pattern": dict(others)}
    if alpha is not None:
        settings = {"lora_alpha": alpha}
    return LoraConfig(
        r=rank, rank_pattern=others, use_dora="lora_magnitude_vector" in every, lora_bias="lora_B.bias" in every,
        bias=_bias(tensors, parts), **settings, **shared,
    )  # fmt: skip


def _bare(key: str) -> str:
    return key.removeprefix(Method.prefix)


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Site -> part of PEFT's key -> tensor."""
    parts: dict[str, dict[str, Tensor]] = {}
    known = parts_known().part
    for key, tensor in tensors.items():
        match = known.fullmatch(_bare(key))
        if match is not None and not match["part"].endswith("trainable_tokens_delta"):
            part = f"{match['part']}.bias" if match["leaf"] == "bias" else match["part"]
            parts.setdefault(match["site"], {})[part] = tensor
    nested = [site for site in parts if site.endswith(".base_layer")]
    if nested:
        raise AdapterError(
            f"state_dict: sites around sites are updates of parameters (target_parameters), which no key tells apart; "
            f"save the config beside the tensors and call load_adapter:\n{listing(nested)}"
        )
    return parts


def _ranks(parts: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, dict[str, int]]:
    """The most frequent rank, and the others' by their sites' names."""
    ranks = {}
    for site, own in parts.items():
        a = own.get("lora_A", own.get("lora_embedding_A"))
        if a is None:
            raise AdapterError(f"state_dict: {site} has {', '.join(own)}, but no lora_A, whose rows are its rank")
        if not a.ndim:
            raise AdapterError(
                f"state_dict: {site}: expected a matrix, found one number for lora_A, whose rows are its rank"
            )
        ranks[site] = len(a)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(site)}": rank for site, rank in ranks.items() if rank != usual}


def targets_of(sites: list[str], modules: Modules | None) -> list[str] | str:
    """The sites as PEFT reads them: their last atoms where these say exactly the same."""
    if modules is None:
        return sorted(sites)
    missing = [site for site in sites if site not in modules]
    if missing:
        raise AdapterError(f"state_dict: {type(modules.model).__name__} has no such modules:\n{listing(missing)}")
    last = sorted({site.rpartition(".")[2] for site in sites})
    if set(NameSelector(last).select(modules)) == set(sites):
        return last
    return spelled([name for name in modules if name in sites], modules)


def saved_of(tensors: Mapping[str, Tensor], parts: Mapping[str, object]) -> list[str]:
    """Modules of which the tensors bring more than a bias."""
    owners: dict[str, set[str]] = {}
    known = parts_known()
    for key in [key for key in tensors if not known.is_bare(key)]:
        short = _bare(key).replace(".modules_to_save.", ".")
        owner, _, leaf = short.rpartition(".")
        if known.part.fullmatch(short) is None and owner and owner not in parts and not owner.endswith(".base_layer"):
            owners.setdefault(owner, set()).add(leaf)
    return [owner for owner, leaves in owners.items() if leaves != {"bias"}]


def _bias(tensors: Mapping[str, Tensor], parts: Mapping[str, object]) -> Literal["none", "all", "lora_only"]:
    """PEFT's word for the biases that the tensors bring beside whole modules."""
    saved = saved_of(tensors, parts)
    owners = {_bare(key).rpartition(".")[0].removesuffix(".base_layer") for key in _biases(tensors)} - {*saved}
    return "all" if owners - {*parts} else "lora_only" if owners else "none"


def _biases(tensors: Iterable[str]) -> list[str]:
    known = parts_known().part
    return [key for key in tensors if key.endswith(".bias") and known.fullmatch(_bare(key)) is None]


def _compare(said: list[str], found: list[str]) -> None:
    """Warn, as PEFT does, where the config selects other sites than the tensors have."""
    more, less = sorted({*found} - {*said}), sorted({*said} - {*found})
    if more or less:
        lines = [
            f"{title}\n{listing(names)}"
            for title, names in (
                ("only in the state_dict, and taken:", more),
                ("only in the config, and left out:", less),
            )
            if names
        ]
        warnings.warn(
            "the config's target_modules are not the state_dict's sites, which count:\n" + "\n".join(lines),
            RuntimeWarning, stacklevel=5,
        )  # fmt: skip
