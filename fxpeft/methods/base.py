"""What a method is: shapes, a first value, training mathematics, slot values, checkpoint keys."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.parts import SharedPart as SharedPart
from fxpeft.methods.parts import SiteAdapter as SiteAdapter
from fxpeft.methods.parts import SitePlan as SitePlan
from fxpeft.model.wrappers import submodule
from fxpeft.passes.base import attribute, join
from fxpeft.passes.live import base_weight
from fxpeft.passes.rewrite.feed import Feed
from fxpeft.passes.rewrite.inject import Rewrite
from fxpeft.passes.slots.kronecker import Shapes
from fxpeft.passes.slots.slot import FEATURES, MULTIPLY
from fxpeft.passes.targets.kinds import Kind

C = TypeVar("C", bound=AdapterConfig)


class SlotValues(NamedTuple):
    """A site's adapter in the form that every slot takes, ranks first.

    ``a``: [rank, in, ...], ``b``: [rank, out], ``d``: [rank] float32; ``g_in``: [in], ``g_out``: [out],
    ``shift``: [out], float32, ``rotation``: [blocks, size, size] of the inputs, less the identity, ``w1`` and ``w2``:
    of a Kronecker product that is added, its scale in ``w1``, or ``None`` where the adapter has none. A method without
    ranks gives rank 0: ``SlotValues.without_ranks``.
    """

    a: Tensor
    b: Tensor
    d: Tensor
    g_in: Tensor | None = None
    g_out: Tensor | None = None
    shift: Tensor | None = None
    rotation: Tensor | None = None
    w1: Tensor | None = None
    w2: Tensor | None = None

    @classmethod
    def without_ranks(cls, kind: Kind, **features: Tensor) -> SlotValues:
        """Features alone."""
        like = next(iter(features.values()))
        a, b = like.new_empty(kind.a_shape(0)), like.new_empty(0, kind.out_features)
        return cls(a, b, like.new_empty(0), **features)

    def features(self) -> dict[str, Tensor]:
        """Name -> value of the gains, the shift, the rotation and the product that the adapter has."""
        return {name: value for name in FEATURES if (value := getattr(self, name)) is not None}

    def multiplies(self) -> list[str]:
        """Names of those that multiply what the base computes, or what it is given."""
        return [name for name in self.features() if name in MULTIPLY]


class Kept(NamedTuple):
    """What autograd keeps of a token where a method trains a site, beside the bare model's own."""

    input: bool = True  # the site's input, as it is
    own: int = 0  # how many numbers of the adapter's dtype, such as the input after A
    outputs: int = 0  # how many of the base's output, in its dtype


@dataclass(frozen=True)
class Base:
    """What a method may read at a site beside its parameters there.

    Args:
        root: the site's module, or a model that has it at ``path``; looked up where a method asks for it.
        own: parameter name -> the adapter's own value for it (``bias``, ``weight``).
        shared: name -> tensor that all sites of the adapter share; on the device of the first one.
        place: shapes of W1 and W2 where a slot has a place for a Kronecker product, and no other adapter is there.
    """

    root: nn.Module
    own: Mapping[str, Tensor] = field(default_factory=dict)
    path: str = ""
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    place: Shapes | None = None

    @property
    def module(self) -> nn.Module:
        """The site's module."""
        return submodule(self.root, self.path)

    def weight(self) -> Tensor:
        """``[out, in, ...]`` in float32, however it is stored; what accelerate has offloaded is fetched.

        Raises:
            PassError: it is no plain tensor.
        """
        return self._fetched(self._view).float()

    def set_weight(self, value: Tensor) -> None:
        """Write the adapter's own weight, ``[out, in, ...]``."""
        self._view().copy_(value)

    def _view(self) -> Tensor:
        plain, own = base_weight(self.module), self.own.get("weight")
        if own is None:
            return plain
        stored = attribute(self.module, "weight")
        return own.detach() if plain.stride() == stored.stride() else own.detach().t()

    def bias(self) -> Tensor | None:
        """``[out]`` in float32, fetched as the weight is, or ``None``."""
        bias = self._bias()
        return None if bias is None else self._fetched(self._bias).detach().float()

    def _bias(self) -> Any:
        bias = self.own.get("bias", attribute(self.module, "bias") if hasattr(self.module, "bias") else None)
        return bias if isinstance(bias, Tensor) else None

    def _fetched(self, read: Callable[[], Any]) -> Tensor:
        value: Tensor = read()
        if value.is_meta:
            with align_module_device(self.module):
                value = read().clone()  # the hook takes its own back
        return value


class Method(abc.ABC, Generic[C]):
    """One method. Everything that differs between methods is in its file.

    ``name`` is what ``prepare_hotswap(methods=...)`` calls it; ``needs``: declared name -> the slot
    features that it takes, where a method has variants.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str]
    older_types: ClassVar[Collection[str]] = ()  # what its files were called before
    needs: ClassVar[Mapping[str, Collection[str]]] = {}
    #: name of what all sites share -> its whole key in PEFT's files
    shared_keys: ClassVar[Mapping[str, str]] = {}
    config_class: type[C]
    #: fields of a config of that class that make it this method's, and not another's; ``...``: to be given
    variant: ClassVar[Mapping[str, Any]] = {}
    prefix: ClassVar[str] = "base_model.model."  # what PEFT puts before a module's name in a checkpoint
    #: the sites are what ``target_modules`` selects, and keys of files name them; else :meth:`find` has them
    targeted: ClassVar[bool] = True
    #: :meth:`rewrite` prepares the inputs of a forward, and doesn't rewrite a target: no place for it in a program
    feeds: ClassVar[bool] = False
    #: what an adapter does where :meth:`lower` can't say it, as ``a prompt adds tokens``: it can't be folded or
    #: converted, and has no slot at its sites
    unlowered: ClassVar[str] = ""
    #: an adapter's rows at an embedding (:mod:`fxpeft.methods.tokens`), below the module's name in PEFT's files
    tokens_key: ClassVar[str] = "token_adapter.trainable_tokens_delta"
    #: whether :meth:`lower` reads the base's weights, so that it is done anew where these are others
    follows_base: ClassVar[bool] = False
    #: whether :meth:`restore` reads them, for what no file holds
    found_in_base: ClassVar[bool] = False
    #: a site's plan follows from its place among all of them (:meth:`arranged`), so that a part of a model has others
    ordered: ClassVar[bool] = False
    #: those of :meth:`shapes` that are whole numbers: ``torch.int64``, never trained
    integers: ClassVar[Collection[str]] = ()
    #: parts of PEFT's keys that a number follows, since a site has several
    numbered: ClassVar[Collection[str]] = ()
    #: what of its kind only one can be active at a time, of all methods that say the same word: ``prompt``
    alone: ClassVar[str] = ""

    def takes(self, config: AdapterConfig) -> bool:
        """Whether a config is this method's: methods may share a ``peft_type``, the first one that takes it has it."""
        return isinstance(config, self.config_class)

    def declared(self, config: C) -> str:
        """Under which name the slots have to be declared for an adapter."""
        return self.name

    def resolve(self, config: C, model: nn.Module) -> C:
        """The config with the defaults filled in that depend on the model; ``target_modules`` is done already."""
        return config

    def find(self, model: nn.Module, config: C) -> tuple[C, dict[str, SitePlan]]:
        """The sites of a method that isn't ``targeted``, and the config with the model's numbers filled in."""
        raise NotImplementedError(f"{self.name}: its sites are what target_modules selects")

    @abc.abstractmethod
    def plan(self, config: C, site: str, kind: Kind) -> SitePlan:
        """Rank and scaling at a site; ``AdapterError`` where the method can't serve its kind."""

    def arranged(self, config: C, plans: Mapping[str, SitePlan], model: nn.Module) -> dict[str, SitePlan]:
        """The plans of all sites, in the model's order, with what follows from the model or that order.

        See :attr:`ordered`.
        """
        return dict(plans)

    @abc.abstractmethod
    def shapes(self, config: C, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape at one site."""

    def cost(self, config: C, plan: SitePlan, dtype: torch.dtype) -> tuple[int, int]:
        """How many numbers a fresh adapter has at one site, and in how many bytes."""
        counts = {name: math.prod(shape) for name, shape in self.shapes(config, plan).items()}
        return sum(counts.values()), sum(self.dtype(name, dtype).itemsize * count for name, count in counts.items())

    @abc.abstractmethod
    def keys(self, kind: Kind) -> dict[str, str]:
        """Parameter name -> PEFT's checkpoint suffix below the site's name."""

    @abc.abstractmethod
    def initialise(self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        """Fill fresh parameters in place."""

    def fresh(
        self, config: C, plan: SitePlan, base: Base, *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """A fresh adapter's parameters at one site."""
        shapes = self.shapes(config, plan)
        parameters = {
            name: torch.empty(shape, device=device, dtype=self.dtype(name, dtype)) for name, shape in shapes.items()
        }
        self.initialise(config, plan, parameters, base)
        return parameters

    def dtype(self, name: str, usual: torch.dtype = torch.float32) -> torch.dtype:
        """Of one of :meth:`shapes`, where what is trained has the usual one."""
        return torch.int64 if name in self.integers else usual

    def shared(self, config: C, plans: Mapping[str, SitePlan]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what all sites of an adapter share, as VeRA's factors; the names of ``shared_keys``.

        They lie on the device of the adapter's first site: on a model that is split over devices, :meth:`rewrite`'s
        function and :meth:`lower` move them.
        """
        return {}

    def initialise_shared(self, config: C, shared: Mapping[str, Tensor]) -> None:
        """Fill in place what all sites share: all of it for a fresh adapter, else what no file holds.

        It comes before :meth:`initialise` and :meth:`restore`, which may read it as ``base.shared``.
        """
        return

    def shared_trained(self, config: C) -> Collection[str]:
        """Those of :meth:`shared` that are trained, as VB-LoRA's bank of vectors."""
        return ()

    def shared_stored(self, config: C) -> Collection[str]:
        """Those of :meth:`shared` that a checkpoint holds; :meth:`initialise_shared` finds the others again."""
        return self.shared_keys.keys()

    def stored_shared(self, config: C, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole key -> tensor of what all sites share, as a checkpoint holds it."""
        stored = self.shared_stored(config)
        return {self.shared_keys[name]: value for name, value in shared.items() if name in stored}

    def frozen(self, config: C) -> Collection[str]:
        """Those of :meth:`shapes` that are never trained and in no checkpoint: they follow from the base."""
        return ()

    def untrained(self, config: C) -> Collection[str]:
        """Those of :meth:`shapes` that are never trained, and come with a checkpoint."""
        return ()

    def copied(self, config: C, names: Mapping[str, object]) -> list[str]:
        """Of all modules' names those that an adapter brings whole beside ``modules_to_save``, in order."""
        return []

    def saved_key(self, config: C, path: str, key: str) -> str:
        """The key of a tensor of a module that an adapter brings whole, without :attr:`prefix`."""
        return f"{path}.{key}"

    def brings_weight(self, config: C) -> bool:
        """Whether an adapter has its own value of each site's weight; it is in no checkpoint either."""
        return False

    def why_unfit(self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor]) -> str | None:
        """Why what a file holds at a site can't be, where shapes and dtypes don't tell; ``None``: it can."""
        return None

    def restore(self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        """Fill what no checkpoint holds in place, as it was when the adapter was fresh."""
        return

    @abc.abstractmethod
    def rewrite(self, name: str, config: C, site: SiteAdapter) -> Rewrite | Feed:
        """The training subgraph of an adapter; of a whole model, what prepares its inputs.

        Args:
            name: the operands' paths begin with it: the adapter's name in a program, its place among the
                active ones in a live model.
        """

    @abc.abstractmethod
    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        """The slot values that compute what the training subgraph computes, dropout aside.

        Views of ``parameters`` wherever that is possible.
        """

    def part(
        self, config: C, plan: SitePlan, parameters: Mapping[str, Tensor], *, strength: float = 1.0
    ) -> SiteAdapter:
        """The module that holds the parameters at one site while the adapter is attached."""
        frozen = {*self.frozen(config), *self.untrained(config)}
        return SiteAdapter(plan, parameters, dropout=self.dropout(config, plan.kind), strength=strength, frozen=frozen)

    def key(self, site: str, plan: SitePlan, name: str) -> str:
        """A parameter's whole checkpoint key."""
        return f"{self.prefix}{join(plan.kind.host(site), *plan.wrapped * ('base_layer',), self.keys(plan.kind)[name])}"

    def bare_keys(self) -> Collection[str]:
        """The keys in PEFT's files that name no module."""
        return self.shared_keys.values()

    def keep(self, plan: SitePlan, parameters: Mapping[str, Tensor], lowered: SlotValues) -> dict[str, Tensor]:
        """The parameters in memory that belongs to the adapter: views of ``lowered`` where that is exact."""
        return {name: value.detach().clone() for name, value in parameters.items()}

    def stored(self, config: C, site: str, plan: SitePlan, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters as a checkpoint holds them."""
        return {name: value for name, value in parameters.items() if name not in self.frozen(config)}

    def stored_shapes(self, config: C, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what :meth:`stored` gives at one site."""
        return {n: shape for n, shape in self.shapes(config, plan).items() if n not in self.frozen(config)}

    def taken(self, config: C, plan: SitePlan, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`stored`; of a file that doesn't fill the site some are missing."""
        return stored

    def stored_keys(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A file's tensors under the keys of today; of a method that isn't ``targeted``: whose keys name no modules."""
        return tensors

    def read(self, config: C, tensors: dict[str, Tensor]) -> tuple[C, dict[str, Tensor]]:
        """A file's config and tensors as the rest is written for, where files may say them in another way.

        Raises:
            CheckpointError: the tensors can't be read so.
        """
        return config, tensors

    def unfinished(self, sites: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What training goes on from and no checkpoint holds, since a checkpoint has what comes out of it."""
        return {}

    def resume(
        self,
        config: C,
        plans: Mapping[str, SitePlan],
        unfinished: Mapping[str, Tensor],
        finished: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, dict[str, Tensor]] | None:
        """The sites' parameters as :meth:`unfinished` had them; ``None`` where they don't give what is finished."""
        return None

    def penalty(self, config: C, sites: Iterable[SiteAdapter]) -> Tensor | None:
        """A term that is added to the model's loss while the adapter trains; ``None``: there is none."""
        return None

    def kept(self, config: C, plan: SitePlan) -> Kept:
        """What training a site keeps of a token, as the plan says it."""
        return Kept(False) if self.feeds else Kept(own=plan.rank)

    def flops(self, config: C, plan: SitePlan) -> int | None:
        """What the update at a site adds per token, as the plan says it; ``None``: what its parameters do."""
        return None

    def notes(self, config: C, plans: Mapping[str, SitePlan]) -> list[str]:
        """What the plan says of an adapter besides."""
        return []

    def dropout(self, config: C, kind: Kind) -> float:
        """Probability of dropping an input of the training subgraph."""
        return 0.0

    def unmerged(self, config: C) -> str:
        """What an adapter does that no change of the weights does, or nothing: then it isn't folded or converted."""
        return self.unlowered

    def invocation(self, config: C) -> tuple[int, ...]:
        """The tokens from the last occurrence of which on an adapter acts in a row; none: it acts on every token."""
        return ()

    def bias(self, config: C) -> str:
        """``none``, ``all`` or ``own`` (the sites'): whose bias the adapter trains."""
        value: Any = getattr(config, "bias", "none")
        return "own" if str(value).endswith("_only") else str(value)

    def scales(self, config: C) -> bool:
        """Whether the adapter has a scale that :func:`fxpeft.set_scale` can change."""
        return True
