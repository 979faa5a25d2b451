"""Files from another layout of the model: its modules had other names, or each expert its own, when it was trained.

Transformers renames the keys of a base's checkpoint when a model's modules moved; the same table holds for an
adapter's keys. The rename is chosen for each key on its own, and every key is accounted for: one that has no
place under any of its names keeps its own, and whoever assigns the tensors tells of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform

from fxpeft.checkpoint.formats import PipelineFile
from fxpeft.checkpoint.keys import apart, below_module
from fxpeft.checkpoint.reading import Checkpoint
from fxpeft.errors import CheckpointError, listing
from fxpeft.methods import method_of
from fxpeft.methods.config import AdapterConfig, matching
from fxpeft.methods.lora import LoraConfig
from fxpeft.model.modules import Modules
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.targets.names import pattern_value
from fxpeft.passes.targets.operations.registry import kinds
from fxpeft.passes.targets.terms import Pattern
from fxpeft.targets import experts
from fxpeft.targets.parameters import parameter_sites
from fxpeft.targets.resolve import has_pattern, spelled

WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save|original_module)(?=\.)")


@dataclass(frozen=True)
class Key:
    """A key: the module that it belongs to, and what follows.

    Args:
        tail: from the module's name on, with the dot.
        inner: the parameter of a method that it is, or ``""`` for a tensor of the module's own.
    """

    host: str
    tail: str
    inner: str


@matching()
def for_model(modules: Modules, found: Checkpoint) -> Checkpoint:
    """A file's adapter for a model: of a pipeline's file the one of the component that the model is.

    Raises:
        CheckpointError: no component's sites are the model's, or several's are.
    """
    return found.of(modules) if isinstance(found, PipelineFile) else found


@matching()
def in_layout_of(
    model: nn.Module | Modules,
    found: Checkpoint,
    *,
    key_mapping: Mapping[str, str] | None = None,
    conversions: Sequence[WeightTransform] | None = None,
) -> Checkpoint:
    """A file with the names that the model has now, in its keys and in its config; itself where it has them.

    Args:
        key_mapping: regular expression -> replacement, for keys without PEFT's prefix; the first that hits a key
            renames it, as in ``PeftModel.from_pretrained``.
        conversions: Transformers' table of this model, with the user's own entries; asked for where it is needed.

    Raises:
        CheckpointError: two keys mean one place, or an expert's tensors don't fit.
    """
    modules = Modules.of(model)
    found = for_model(modules, found)
    model, method = modules.model, method_of(found.config)
    if not method.targeted:
        named = method.stored_keys(below_module(model, found.tensors, method.prefix))
        return found if named is found.tensors else replace(found, tensors=dict(named))
    shared, below = apart(found.tensors, method.shared_keys)
    if shared:
        rest = replace(found, tensors=below)
        renamed = in_layout_of(modules, rest, key_mapping=key_mapping, conversions=conversions)
        return found if renamed is rest else replace(renamed, tensors={**renamed.tensors, **shared})
    own = below_module(model, found.tensors, method.prefix)
    found = found if own is found.tensors else replace(found, tensors=own)
    tensors = {_mapped(key.removeprefix(method.prefix), key_mapping): t for key, t in found.tensors.items()}
    every = {f".{s}": name for kind in kinds() for name, s in method.keys(kind).items()}
    suffixes = dict(sorted(every.items(), key=lambda item: -len(item[0])))
    keys = {key: _parsed(key, suffixes) for key in tensors}
    whole = isinstance(model, PreTrainedModel)
    places = {(key.host, "" if key.inner else key.tail): key for key in keys.values()}  # A and B have one
    if not whole or (conversions is None and all(_fits(model, key) for key in places.values())):
        return replace(found, tensors=tensors) if key_mapping else found
    assert isinstance(model, PreTrainedModel)
    table = list(get_model_conversion_mapping(model) if conversions is None else conversions)
    renames = [copy.deepcopy(c) for c in table if isinstance(c, WeightRenaming)]  # they note that they were used
    names = _chosen(model, keys, renames, found.source)
    config, out = found.config, {name: tensors[key] for key, name in names.items()}
    left = {key: part for key, part in keys.items() if key not in names}
    moved = {keys[key].host: _parsed(name, suffixes).host for key, name in names.items()}
    config = _following(modules, config, {old: new for old, new in moved.items() if old != new}, renames)
    if left and isinstance(config, LoraConfig):
        config = _fused(modules, config, table, left, tensors, out, [*moved, *moved.values()], renames, found.source)
    same = not key_mapping and config is found.config and all(key == name for key, name in names.items())
    if same:
        return found
    out.update({key: tensors[key] for key in left})
    return replace(found, config=config, tensors=out)


def _mapped(key: str, mapping: Mapping[str, str] | None) -> str:
    for pattern, replacement in (mapping or {}).items():
        renamed, hits = re.subn(pattern, replacement, key)
        if hits:
            return renamed
    return key


def _parsed(key: str, suffixes: Mapping[str, str]) -> Key:
    """A key in its parts. ``suffixes``: end of a key -> parameter of the method, the longest first."""
    suffix = next((s for s in suffixes if key.endswith(s)), None)
    if suffix is not None:
        host = key.removesuffix(suffix)
        bare = WRAPPED.sub("", f"{host}.")[:-1]
        return Key(bare, key.removeprefix(bare), suffixes[suffix]) if host.startswith(bare) else Key(host, suffix, "")
    wrapped = WRAPPED.search(key)
    if wrapped is not None:
        return Key(key[: wrapped.start()], key[wrapped.start() :], "")
    owner, _, leaf = key.rpartition(".")
    return Key(owner, f".{leaf}", "")


def _fits(model: nn.Module, key: Key) -> bool:
    """Whether the model has the module, and the tensor where the key is one of the module's own."""
    module = unwrap(model)
    for part in key.host.split(".") if key.host else ():
        child = module._modules.get(part)  # aliases of old names are properties
        if child is None:
            return False
        module = unwrap(child)
    if key.inner or WRAPPED.match(key.tail):
        return True
    leaf = key.tail.removeprefix(".")
    return leaf in module._parameters or leaf in module._buffers


def _renamed(host: str, tail: str, renames: Sequence[WeightRenaming]) -> Iterator[str]:
    """A module's name as Transformers renames it: where its weight goes, or where the key itself would."""
    for suffix in dict.fromkeys((".weight", tail)):
        name = f"{host}{suffix}"
        for rename in renames:
            name, _ = rename.rename_source_key(name)
        if name.endswith(suffix):
            yield name.removesuffix(suffix)


def _candidates(model: PreTrainedModel, key: Key, renames: Sequence[WeightRenaming], own_first: bool) -> Iterator[str]:
    prefix = f"{model.base_model_prefix}."
    names = [*_renamed(key.host, key.tail, renames)]
    for name in [key.host, *names] if own_first else [*names, key.host]:
        yield name
        # an adapter of a model with a head fits its body, and the reverse
        yield name.removeprefix(prefix) if name.startswith(prefix) else f"{prefix}{name}"


def _chosen(
    model: PreTrainedModel, keys: Mapping[str, Key], renames: Sequence[WeightRenaming], source: str
) -> dict[str, str]:
    """Key -> its name in the model, of those that have a place: renamed as Transformers does, else as it is."""
    clashes: list[str] = []
    for own_first in (False, True):
        chosen: dict[str, str] = {}
        for key, part in keys.items():
            for host in _candidates(model, part, renames, own_first):
                if _fits(model, replace(part, host=host)):
                    chosen[key] = f"{host}{part.tail}"
                    break
        seen: dict[str, str] = {}
        clashes = [f"{seen[n]} and {k}: {n}" for k, n in chosen.items() if seen.setdefault(n, k) != k]
        if not clashes:
            return chosen
    raise CheckpointError(f"{source}: two keys mean one place in the model; nothing was changed.\n{listing(clashes)}")


def _following(
    modules: Modules, config: AdapterConfig, moved: Mapping[str, str], renames: Sequence[WeightRenaming]
) -> AdapterConfig:
    """The config of a file whose modules moved: it selects them, and gives them the ranks and scales of before."""
    if not moved:
        return config
    config = copy.deepcopy(config)
    for field in config.patterns:
        values: dict[str, object] = getattr(config, field)
        own = {
            f"^{re.escape(new)}": pattern_value(values, old, None, field)
            for old, new in moved.items()
            if pattern_value(values, old, None, field) != pattern_value(values, new, None, field)
        }
        stay = {k: v for k, v in values.items() if not any(pattern_value({k: 1}, old, 0, field) for old in moved)
                or any(pattern_value({k: 1}, new, 0, field) for new in moved.values())}  # fmt: skip
        setattr(config, field, {**{k: v for k, v in own.items() if v is not None}, **stay})
    saved = config.modules_to_save
    if saved:
        config.modules_to_save = [
            next((new for old, new in moved.items() if old.endswith(name)), name)
            if not any(m.endswith(name) for m in modules) else name
            for name in saved
        ]  # fmt: skip
    targets = config.target_modules
    known = targets is None or isinstance(targets, Pattern) or targets == "all-linear"
    if known or has_pattern(targets) or has_pattern(config.exclude_modules):
        return config
    asked = config.selector()
    chosen = asked.select(modules)
    # what the names of before selected and those of now don't, and the reverse: exclude_modules has old names too
    lost = {new for old, new in moved.items() if asked(old) and not asked(new)}
    hosts = set(moved.values())
    gained = {m for m in chosen if m not in hosts and (old := _before(m, renames)) != m and not asked(old)}
    if lost or gained:
        config.target_modules = spelled([m for m in modules if m in lost or (m in chosen and m not in gained)], modules)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def _before(name: str, renames: Sequence[WeightRenaming]) -> str:
    """A module's name as Transformers writes it for older ones; its own where the table can't be read backwards."""
    key = f"{name}.weight"
    for rename in reversed(renames):
        try:
            key, _ = rename.reverse_transform().rename_source_key(key)
        except (ValueError, NotImplementedError):
            return name
    return key.removesuffix(".weight")


def _fused(
    modules: Modules,
    config: LoraConfig,
    table: Sequence[WeightTransform],
    left: dict[str, Key],
    tensors: Mapping[str, Tensor],
    out: dict[str, Tensor],
    hosts: Iterable[str],
    renames: Sequence[WeightRenaming],
    source: str,
) -> LoraConfig:
    """Move the experts' tensors of ``left`` to ``out``, fused; returns the config that selects them."""
    known = experts.stacks(modules, table)
    prefix = f"{modules.model.base_model_prefix}."
    parts: dict[str, dict[tuple[int, int], tuple[str, dict[str, Tensor]]]] = {}
    found: dict[str, experts.Stack] = {}
    for key, part in list(left.items()):
        if not part.inner or not known:
            continue
        names = [*_renamed(part.host, part.tail, renames), part.host]
        names += [n.removeprefix(prefix) if n.startswith(prefix) else f"{prefix}{n}" for n in names]
        place = next((p for p in (experts.branch_of(name, known) for name in names) if p is not None), None)
        if place is None:
            continue
        stack, *at = place
        found[stack.site] = stack
        _, factors = parts.setdefault(stack.site, {}).setdefault((at[0], at[1]), (part.host, {}))
        if part.inner in factors:
            raise CheckpointError(f"{source}: {key}: another key of the file means the same place")
        factors[part.inner] = tensors[key]
        del left[key]
    if not parts:
        return config
    fused = {site: experts.fuse(found[site], own, config, source) for site, own in parts.items()}
    old = [name for own in parts.values() for name, _ in own.values()]
    config = experts.with_stacks(modules, config, fused, old, hosts)
    method = method_of(config)
    for site, each in parameter_sites(config, modules, (), ()).items():
        if site in fused:
            plan = replace(method.plan(config, site, each.kind), wrapped=each.wrapped)
            out[method.key(site, plan, "lora_A")] = fused[site].a
            out[method.key(site, plan, "lora_B")] = fused[site].b
    return config
