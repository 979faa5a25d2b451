"""A plan's content: what goes to each site, kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fxpeft.errors import AdapterError
from fxpeft.methods import config_class
from fxpeft.methods.config import AdapterConfig
from fxpeft.passes.base import Skip
from fxpeft.passes.targets.flow import Flow

FORMAT = 1
P = TypeVar("P", bound="PlanData")


class Later:
    """A dataclass, some fields of which are found out where one of them is first asked for: what finds them stands in
    ``_later`` till then. A pickle or a copy has them all."""

    def __getattr__(self, name: str) -> Any:
        later = vars(self).get("_later")
        if later is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        later(name)
        return getattr(self, name)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = {f.name: f.default_factory for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        vars(self).update({name: make() for name, make in made.items() if callable(make)} | state)


@dataclass(frozen=True)
class PlanRow(Later):
    """One site's row in a :class:`fxpeft.Plan`: for people, where a ``SitePlan`` is what an adapter is made by.

    Args:
        role: what it does in the data flow; empty where that is not known.
        in_features, out_features: of the site's weight. alpha: ``None`` for a method without one.
        scaling: the factor of the update. parameters: how many the adapter has here.
        extra_bytes: of those parameters. flops: what the update adds per token (per position of a
            convolution's output), two for a multiplication and its addition.
        kept: bytes per token that training the site keeps for the backward pass beside the bare model's own and its
            input; of a stack of experts, per row that goes to one. kept_input: bytes of its input, where that is kept.
        update: of a parameter, ``split`` or ``whole weight``: how its update meets the input, and why.
        input_of: the site before that reads the same input and counts it; empty where none does or is known to.
    """

    name: str
    role: str
    kind: str
    in_features: int
    out_features: int
    rank: int
    alpha: float | None
    scaling: float
    parameters: int
    extra_bytes: int
    flops: int
    kept: int = 0  # an older plan, in JSON or in a pickle, has none of these
    kept_input: int = 0
    update: str = ""
    input_of: str = field(default_factory=str)

    @property
    def kept_here(self) -> int:
        """Bytes per token, its input among them where no site before counts it."""
        return self.kept + (0 if self.input_of else self.kept_input)


@dataclass(frozen=True)
class SharedRow:
    """The row of what is beside the sites: a tensor that all of them share, there once however many they are; a module,
    a parameter or rows of an embedding that the adapter brings.

    Args:
        parameters: how many numbers it has. extra_bytes: of those.
    """

    name: str
    parameters: int
    extra_bytes: int


@dataclass(frozen=True)
class PlanData(Later):
    """What :class:`fxpeft.Plan` holds.

    Args:
        model: the base's class. config: patterns and defaults resolved, as it would be saved.
        sites: what goes where. skipped: what could be adapted and isn't, and why.
        saved, tensors: modules and single parameters that the adapter brings whole.
        notes: what could not be found out.
        shared: what all sites share. brought: what it brings whole, and the rows of embeddings that it trains.
    """

    model: str
    config: AdapterConfig
    sites: tuple[PlanRow, ...]
    skipped: tuple[Skip, ...] = field(default_factory=tuple)  # a default of the class would hide that it comes later
    saved: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    flow: Flow | None = field(default_factory=lambda: None, compare=False, repr=False)
    shared: tuple[SharedRow, ...] = ()
    brought: tuple[SharedRow, ...] = ()

    def _rows(self) -> tuple[PlanRow | SharedRow, ...]:
        return (*self.sites, *self.shared, *self.brought)

    @property
    def parameters(self) -> int:
        """Parameters of all sites together, of what they share, and of what the adapter brings whole."""
        return sum(row.parameters for row in self._rows())

    @property
    def extra_bytes(self) -> int:
        """Bytes of those parameters."""
        return sum(row.extra_bytes for row in self._rows())

    @property
    def flops(self) -> int:
        """What all updates add per token."""
        return sum(site.flops for site in self.sites)

    @property
    def kept(self) -> int:
        """Bytes per token that training keeps for the backward pass; an input that several sites read counts once."""
        return sum(site.kept_here for site in self.sites)

    def to_json(self) -> str:
        """The plan as JSON, for :meth:`from_json`."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("config", "flow")}
        content["sites"] = [dataclasses.asdict(site) for site in self.sites]
        content |= {name: [dataclasses.asdict(row) for row in getattr(self, name)] for name in ("shared", "brought")}
        content["skipped"] = [dataclasses.asdict(skip) for skip in self.skipped]
        return json.dumps({"format": FORMAT, **content, "config": self.config.to_dict()}, indent=2)

    @classmethod
    def from_json(cls: type[P], text: str) -> P:
        """Read a plan that :meth:`to_json` wrote.

        Raises:
            AdapterError: it is no plan, or of another format.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise AdapterError(f"plan: expected JSON, found what can't be read as such: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise AdapterError(f"plan: expected an object with format {FORMAT}, found {found!r}")
        values = content.get("config")
        if not isinstance(values, dict):
            raise AdapterError(f"plan: expected a config, found {values!r}")
        config = config_class(values.get("peft_type"), "plan").from_dict(values, source="plan")
        try:
            saved, tensors, notes = (tuple(_of_type(v, str) for v in content[n]) for n in ("saved", "tensors", "notes"))
            return cls(
                _of_type(content["model"], str), config,
                tuple(_read(PlanRow, site) for site in content["sites"]),
                tuple(_read(Skip, skip) for skip in content["skipped"]), saved, tensors, notes,
                shared=tuple(_read(SharedRow, tensor) for tensor in content.get("shared", ())),
                brought=tuple(_read(SharedRow, row) for row in content.get("brought", ())),
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise AdapterError(f"plan: expected what Plan.to_json writes, found {error}") from None


def _of_type(value: Any, wanted: type) -> Any:
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"{value!r} where {wanted.__name__} was expected")
    return value


def _read(cls: type[Any], values: Any) -> Any:
    """A dataclass of strings and numbers, its types checked."""
    numbers = {"int": int, "float": (int, float), "float | None": (int, float, type(None)), "str": str}
    names = {f.name: numbers[str(f.type)] for f in dataclasses.fields(cls)}
    missing = dataclasses.MISSING
    needed = {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}
    if not isinstance(values, dict) or not needed <= set(values) <= set(names):
        raise TypeError(f"{values!r} where {cls.__name__} was expected")
    return cls(**{name: _of_type(value, names[name]) for name, value in values.items()})  # type: ignore[arg-type]
