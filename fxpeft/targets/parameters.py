"""``target_parameters``: sites that are parameters of a module, by the rules of PEFT 0.21.

The experts of a mixture are held as one parameter ``[experts, out, in]`` that no module of their own multiplies,
so an adapter adds its update to the parameter (:mod:`fxpeft.passes.live.parameters`). Which names match, how the
parameters of one module are told apart in a file, and what is refused follow
``peft.tuners.tuners_utils.BaseTuner._inject_parameters`` and ``peft.tuners.lora.layer.ParamWrapper``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from fxpeft.errors import AdapterError, listing, short
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.modules import Modules
from fxpeft.model.reads import read_past
from fxpeft.model.skeleton import Skeleton
from fxpeft.passes.base import PassError, join
from fxpeft.passes.live import base_class
from fxpeft.passes.live.parameters import parameter_kind, parameter_value, parametrized
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.names import Selection
from fxpeft.passes.targets.operations import ParameterKind

ONE_REWRITE = (
    "it is a target, or brings a bias or itself as a whole, and one of its parameters is a target (target_parameters); "
    "a module takes one of these, so leave one out"
)


@dataclass(frozen=True)
class ParameterSite:
    """A parameter that is a site; ``wrapped`` is that of its :class:`~fxpeft.methods.base.SitePlan`."""

    kind: ParameterKind
    wrapped: int


def parameter_sites(
    config: AdapterConfig, modules: Modules, taken: Collection[str], saved: Collection[str]
) -> dict[str, ParameterSite]:
    """The parameters that ``target_parameters`` names, by dotted name.

    ``exclude_modules`` and ``layers_to_transform`` are about modules and don't count here, as in PEFT.

    Args:
        modules: the base's modules, named. taken: those that are targets. saved: those that the adapter brings.

    Raises:
        AdapterError: no parameter matches, or one can't be updated; all are named.
    """
    wanted = getattr(config, "target_parameters", None)
    if not wanted:
        return {}
    root = modules.get("")
    if isinstance(root, Skeleton) and not root.parameters_at:
        raise AdapterError(
            f"target_parameters={short(wanted)}: a program or package has no modules whose parameters an adapter could "
            "update. Serve the live model, or fold the adapter into it before capturing the program"
        )
    sites: dict[str, ParameterSite] = {}
    problems: list[str] = []
    named = Selection(wanted, "target_parameters")
    for name, module in modules.items():
        own = _matching(wanted, named, name, module)
        for index, site in enumerate(own):
            try:
                biased = getattr(config, "bias", "none") == "all" and parameter_value(module, "bias") is not None
                if name in taken or name in saved or biased:
                    raise PassError(ONE_REWRITE)
                kind = _kind(name, module, modules, site.rpartition(".")[2])
            except PassError as error:
                problems.append(f"{site}: {error}")
                continue
            sites[site] = ParameterSite(kind, len(own) - 1 - index)  # PEFT wraps in order: the last is outermost
    if problems:
        raise AdapterError(f"target_parameters: these can't be updated; nothing was changed.\n{listing(problems)}")
    if not sites:
        raise AdapterError(_nothing_found(wanted, modules))
    return sites


def _matching(wanted: str | Collection[str], named: Selection, name: str, module: nn.Module) -> list[str]:
    """A module's parameters that are named, in the order in which PEFT wraps them.

    With a parametrization in the module PEFT takes whole names only, sorted.
    """
    computed = parametrized(module)
    leaves = [*(leaf for leaf, p in module._parameters.items() if p is not None), *computed]
    sites = [join(name, leaf) for leaf in leaves]
    if not computed:
        return [site for site in sites if named(site)]
    whole = [wanted] if isinstance(wanted, str) else wanted
    return sorted(site for site in sites if site in whole)


def check_hosts(kinds: Mapping[str, Kind], saved: Collection[str], tensors: Collection[str]) -> None:
    """Refuse modules that would have to be rewritten both themselves and in what their forward reads."""
    owners = {path.rpartition(".")[0] for path in tensors} | set(saved) | {s for s, k in kinds.items() if not k.leaf}
    both = sorted(owners & {kind.host(site) for site, kind in kinds.items() if kind.leaf})
    if both:
        raise AdapterError(listing([f"{name}: {ONE_REWRITE}" for name in both]))


def _kind(name: str, module: nn.Module, modules: Mapping[str, nn.Module], leaf: str) -> ParameterKind:
    if not name:
        raise PassError("it is a parameter of the model itself, which has no module around it to write a file by")
    root = modules[""]
    if isinstance(root, Skeleton) and join(name, leaf) not in root.parameters_at:
        raise PassError("a program takes parameters that are stacks of matrices, this one is a module's own weight")
    past = read_past(name, modules)
    if past is not None and not past.called:
        raise PassError(f"{past.reader} reads it without calling its module, so the update would do nothing")
    if isinstance(module, nn.RNNBase):
        raise PassError(f"{base_class(module).__name__} reads its weights from a list of its own, not by name")
    return parameter_kind(module, leaf)


def _nothing_found(wanted: str | Collection[str], modules: Mapping[str, nn.Module]) -> str:
    stacks: list[str] = []
    others: list[str] = []
    whole: list[str] = []
    for name, module in modules.items():
        whole += [join(name, leaf) for leaf in parametrized(module)]
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                (stacks if parameter.ndim == 3 else others).append(leaf)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    asked = [w[-100:].rpartition(".")[2] for w in names[:20]]
    near = [n for w in asked for n in difflib.get_close_matches(w, {*stacks, *others}, n=5)]
    found = ", ".join(dict.fromkeys((*near, *stacks))) or ", ".join(dict.fromkeys(others)) or "none at all"
    text = f"no parameter of the model is named by target_parameters={short(wanted)}; nearest names: {found}"
    return f"{text}\nParametrized ones need their whole names:\n{listing(whole)}" if whole else text
