"""Which format a file has, and which of its components a model is."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor

from fxpeft.checkpoint.adapter_file import site_scale
from fxpeft.checkpoint.formats.diffusers import Diffusers
from fxpeft.checkpoint.formats.kohya import Kohya
from fxpeft.checkpoint.formats.lycoris import as_lora, check, config_of
from fxpeft.checkpoint.formats.part import NORM, CheckpointFormat, Part, split
from fxpeft.checkpoint.inferred import infer_config, saved_of, targets_of, with_sites
from fxpeft.checkpoint.reading import Checkpoint
from fxpeft.errors import AdapterError, CheckpointError, listing, short
from fxpeft.methods import config_class
from fxpeft.methods.base import Method
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.lora import LoraConfig
from fxpeft.model.modules import Modules
from fxpeft.model.walk import base_values
from fxpeft.outside import dense
from fxpeft.passes.base import PassError
from fxpeft.passes.targets.kinds import Kind
from fxpeft.targets.saved import saved_modules

FORMATS: tuple[CheckpointFormat, ...] = (Kohya(), Diffusers())
LATER: Any = object()


def _later() -> Any:
    return LATER


@dataclass
class PipelineFile(Checkpoint):
    """A file of adapters of a pipeline's components, under the names that it has; :meth:`of` makes one a model's.

    Its own config and tensors are those of all components together, for who asks without a model: made when they are
    asked for.

    Args:
        parts: component -> its adapter. wanted: the component that the user named, or ``None``.
        written: the tensors under the keys that the file has.
    """

    config: AdapterConfig = field(default_factory=_later)
    tensors: dict[str, Tensor] = field(default_factory=_later)
    parts: dict[str, Part] = field(default_factory=dict)
    wanted: str | None = None
    written: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.config is LATER:
            del self.config, self.tensors
        else:
            super().__post_init__()

    def __getattr__(self, name: str) -> Any:
        if name not in ("config", "tensors"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        self.config, self.tensors = _checkpoint(_together(self.parts, self.source), self.source, None)
        super().__post_init__()
        return vars(self)[name]

    def of(self, modules: Modules) -> Checkpoint:
        """The adapter of the component that a model is, in the model's names.

        Raises:
            CheckpointError: no component's sites are the model's, or several's are and none was named.
        """
        named = {component: _names(part, modules) for component, part in self.parts.items()}
        if self.wanted is not None:
            chosen = list(self.only(self.wanted).parts)
        else:
            chosen = [component for component, names in named.items() if any(n in modules for n in names.values())]
        if len(chosen) != 1:
            found = [f"{component or '(none named)'}: {next(iter(named[component]), '')}" for component in self.parts]
            why = "no site of the file is one of" if not chosen else f"{' and '.join(chosen)} both have sites of"
            raise CheckpointError(
                f"{self.source}: {why} {type(modules.model).__name__}:\n{listing(found)}\n"
                + ("Say which it is: component=" if chosen else "Is it an adapter of another model?")
            )
        if left := sorted(set(self.parts) - set(chosen)):
            lines = [f"{component or '(none named)'}: {len(self.parts[component].sites())} sites" for component in left]
            warnings.warn(
                f"{self.source}: took {chosen[0] or 'what names no component'}, and left out the other components':\n"
                f"{listing(lines)}", stacklevel=5,
            )  # fmt: skip
        return self.component(chosen[0], modules, named[chosen[0]])

    def only(self, component: str) -> PipelineFile:
        """The file without the other components, which are another model's.

        Raises:
            CheckpointError: it has nothing for this one.
        """
        if component not in self.parts:
            raise CheckpointError(f"{self.source}: component={component!r}: the file has {_listed(self.parts)}")
        return PipelineFile(
            self.source, parts={component: self.parts[component]}, wanted=self.wanted, written=self.written
        )

    def component(self, component: str, modules: Modules, names: Mapping[str, str] | None = None) -> Checkpoint:
        """A component's adapter in a model's names.

        Args:
            names: site in the file -> in the model, where that was found before.

        Raises:
            CheckpointError: the model lacks a site; all are named.
        """
        part = self.parts[component]
        names = _names(part, modules) if names is None else names
        renamed = Part(
            {_renamed(key, names): tensor for key, tensor in part.tensors.items()},
            {names.get(site, site): alpha for site, alpha in part.alphas.items()}, part.settings,
        )  # fmt: skip
        config, tensors = _checkpoint(_with_norms(renamed, modules, self.source), self.source, modules)
        whole = [name for name in config.modules_to_save or () if name in modules]
        for path in saved_modules(modules, whole):  # a name is the end of others' too, which stay as they are
            for key, value in base_values(modules[path]).items():
                tensors.setdefault(f"{Method.prefix}{path}.{key}", value.detach())
        return Checkpoint(self.source, config, tensors)

    def fits(self, component: str, modules: Modules) -> bool:
        """Whether a model has all of a component's sites."""
        part = self.parts[component]
        names = _names(part, modules)
        return all(names[site] in modules for site in part.modules())


def read_file(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str, component: str | None = None
) -> PipelineFile:
    """A file of one of :data:`FORMATS`.

    Raises:
        CheckpointError: its keys are of none, or of none that holds a LoRA.
    """
    chosen = next((each for each in FORMATS if each.reads(tensors)), None)
    if chosen is None:
        raise CheckpointError(
            f"{source}: expected an adapter's file of {' or '.join(f.name for f in FORMATS)}, found these keys:\n"
            f"{listing(tensors)}"
        )
    tensors = dense(tensors, source)
    parts = chosen.read(tensors, metadata, source)
    for part in parts.values():
        check(part, source)
        sites = {*part.sites()}
        if missing := [site for site in part.alphas if site not in sites]:
            raise CheckpointError(f"{source}: alphas of sites that have no factors:\n{listing(missing)}")
    if "alpha" in metadata and not any(part.alphas or part.settings for part in parts.values()):
        warnings.warn(
            f"{source}: alpha = {short(metadata['alpha'])} in its header, and none in its keys: its tensors are taken "
            "as they are; where they were trained with it, set_scale(model, name, alpha / rank)", stacklevel=5,
        )  # fmt: skip
    return PipelineFile(source, parts=parts, wanted=component, written=tensors)


def _together(parts: Mapping[str, Part], source: str) -> Part:
    """All components' tensors and alphas, the components' names before the sites' where there are several."""
    together = Part()
    for name, part in parts.items():
        before = f"{name}." if len(parts) > 1 and name else ""
        together.tensors |= {f"{before}{key}": tensor for key, tensor in part.tensors.items()}
        together.alphas |= {f"{before}{site}": alpha for site, alpha in _alphas(part, source).items()}
    return together


def _alphas(part: Part, source: str) -> dict[str, float]:
    """Those that stand for themselves: scales are alpha / rank, whatever the part's own config says of them."""
    if part.settings is None or part.of_lycoris():
        return part.alphas
    config, _ = _checkpoint(part, source, None)
    ranks = {site: len(part.tensors[f"{site}.lora_A.weight"]) for site in part.sites()}
    return {site: site_scale(config, site, rank) * rank for site, rank in ranks.items()}


def _with_norms(part: Part, modules: Modules, source: str) -> Part:
    """The part with the norms that it brings as they are then: a file of LyCORIS' has what is added to the base's."""
    tensors = dict(part.tensors)
    for key in [key for key in tensors if key.rpartition(".")[2] in NORM]:
        site, _, name = key.rpartition(".")
        own = base_values(modules[site]).get(NORM[name]) if site in modules else None
        if own is None or own.shape != tensors[key].shape:
            found = "no such module" if own is None else f"{list(own.shape)} there"
            raise CheckpointError(f"{source}: {key}: {list(tensors[key].shape)} of a norm, and the model has {found}")
        tensors[f"{site}.{NORM[name]}"] = own.detach() + tensors.pop(key).to(own)
    return replace(part, tensors=tensors)


def _checkpoint(part: Part, source: str, modules: Modules | None) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """A config and PEFT's keys. An alpha for each site that has one in the file, and its rank where it has none.

    Raises:
        CheckpointError: what the keys and the settings say is none of these methods, or none of the model's.
    """
    others = part.of_lycoris()
    try:
        if others and part.settings is None:
            found, part = _of_lycoris(part, modules)
            if found is not None:
                return found[0], {f"{Method.prefix}{key}": tensor for key, tensor in found[1].items()}
        tensors = {f"{Method.prefix}{key}": tensor for key, tensor in part.tensors.items()}
        if part.settings is None:
            return _inferred(part, part.sites(), cast(LoraConfig, infer_config(tensors, modules))), tensors
        settings = {"peft_type": "LORA", **part.settings}
        kind = config_class(settings["peft_type"], source) if others else LoraConfig
        config: Any = kind.from_dict(settings, source=source, loading=True)
        if modules is not None:
            config = with_sites(config, tensors, modules)
        own = {f"^{re.escape(site)}": alpha for site, alpha in part.alphas.items()}
        return replace(config, alpha_pattern={**own, **(config.alpha_pattern or {})}), tensors
    except AdapterError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _of_lycoris(part: Part, modules: Modules | None) -> tuple[tuple[AdapterConfig, dict[str, Tensor]] | None, Part]:
    """PEFT's config of LoHas or LoKrs and their tensors; ``None``, and a part of LoRAs that do the same."""
    sites = part.sites()
    targets = targets_of(sites, modules)
    kinds = None if modules is None else {site: _kind(modules, site) for site in sites}
    names = {"target_modules": targets, "modules_to_save": saved_of(part.tensors, dict.fromkeys(sites)) or None}
    found = config_of(part, kinds, names)
    return found, part if found is not None else as_lora(part, kinds)


def _kind(modules: Modules, site: str) -> Kind:
    try:
        return modules.kind(site)
    except PassError as error:
        raise AdapterError(f"{site}: {error}") from error


def _inferred(part: Part, sites: list[str], config: LoraConfig) -> LoraConfig:
    if not part.alphas:
        return config
    every = {site: part.alphas.get(site, float(len(part.tensors[f"{site}.lora_A.weight"]))) for site in sites}
    usual = Counter(every.values()).most_common(1)[0][0]
    others = {f"^{re.escape(site)}": alpha for site, alpha in every.items() if alpha != usual}
    return replace(config, lora_alpha=usual, alpha_pattern=others)


def _names(part: Part, modules: Modules) -> dict[str, str]:
    """Site in the file -> in the model: itself, or what has its name without dots, and maybe other first atoms."""
    sites = part.modules()
    if not part.flat:
        return _below(sites, modules)
    flat: dict[str, list[str]] = {}
    for name in modules:
        flat.setdefault(name.replace(".", "_"), []).append(name)
    for site in sites[:1]:  # a component may lie deeper in the model that was trained, by the same atoms at each site
        heads = [site[: -len(name)] for name in flat if name and site.endswith(f"_{name}")]
        for head in ("", *sorted(heads, key=len)):
            found = {s: flat.get(s.removeprefix(head), []) for s in sites if s.startswith(head)}
            if len(found) == len(sites) and all(len(names) == 1 for names in found.values()):
                return {s: names[0] for s, names in found.items()}
    return {site: flat[site][0] if len(flat.get(site, ())) == 1 else site for site in sites}


def _below(sites: list[str], modules: Modules) -> dict[str, str]:
    """The same of dotted names: a text encoder's may begin with ``text_model``, which Transformers' no longer do."""
    first = sites[0].split(".") if sites else []
    for count in range(len(first)):
        head = "".join(f"{atom}." for atom in first[:count])
        if all(s.startswith(head) and s.removeprefix(head) in modules for s in sites):
            return {site: site.removeprefix(head) for site in sites}
    return {site: site for site in sites}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    place = split(key)
    return f"{names[place[0]]}.{place[1]}" if place is not None and place[0] in names else key


def _listed(components: Iterable[str]) -> str:
    return ", ".join(component or "none named" for component in components)
