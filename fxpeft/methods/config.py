"""What every adapter config has: PEFT's field names, checked types, and PEFT's JSON both ways."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from fxpeft.errors import AdapterError, clipped, listing, short
from fxpeft.outside import why_odd
from fxpeft.passes.targets.names import NameSelector, check_expression
from fxpeft.passes.targets.patterns import is_pattern, pattern
from fxpeft.passes.targets.regex import limited
from fxpeft.passes.targets.terms import Pattern, PatternError

Self = TypeVar("Self", bound="AdapterConfig")
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
LARGEST_SCALE = 3.4e38
#: fields of a trained adapter's config that change nothing of what it computes, and where they would: the field that
#: has to be on for that, or the value of init_lora_weights
HARMLESS: Mapping[str, tuple[str, object]] = {
    **dict.fromkeys(
        (
            "use_asa",
            "asa_target_subspaces",
            "init_warmup",
            "final_warmup",
            "mask_interval",
            "asa_importance_beta",
            "asa_uncertainty_beta",
            "asa_schedule_exponent",
        ),
        ("", None),
    ),  # how AdaMSS trained
    "corda_config": ("init_lora_weights", "corda"),
    "lora_ga_config": ("init_lora_weights", "lora_ga"),
    "megatron_core": ("megatron_config", ...),
    "merge_weights": ("", None),  # PEFT 0.2: whether evaluation merged
    "qalora_group_size": ("use_qalora", ...),
    "runtime_config": ("", None),  # PEFT's hints on where to compute
    "transformers_version": ("", None),
    "unsloth_fixed": ("", None),
}


@dataclass
class AdapterConfig:
    """Fields that all methods share, with PEFT 0.21's names, meanings and defaults.

    Args:
        task_type: one of PEFT's task types; ``SEQ_CLS``, ``TOKEN_CLS`` and ``QUESTION_ANS`` train
            the model's head too, as in PEFT.
        base_model_name_or_path, revision: the base model, recorded in the checkpoint.
        inference_mode: the adapter is not trainable.
        target_modules: names or dotted suffixes; or one regular expression for the whole name; or
            ``"all-linear"``; or a pattern, as an object, a string or among the names
            (:mod:`fxpeft.passes.targets.patterns`); ``None`` takes the architecture's attention projections.
        exclude_modules: same forms; wins over ``target_modules``.
        modules_to_save: modules trained as a whole and saved with the adapter.
        layers_to_transform, layers_pattern: only these layer indices.

    Raises:
        AdapterError: a value of the wrong type or out of range; the field is named.
    """

    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    target_modules: str | Pattern | Collection[str] | None = None
    exclude_modules: str | Pattern | Collection[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    peft_type: ClassVar[str]
    #: fields that select by name or pattern
    selecting: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules")
    #: fields whose keys are patterns of site names
    patterns: ClassVar[tuple[str, ...]] = ()
    #: fields of PEFT's config that fxpeft knows but doesn't offer yet, with PEFT's default
    unsupported: ClassVar[Mapping[str, Any]] = {}
    #: why not, where there is more to say
    reasons: ClassVar[Mapping[str, str]] = {}
    #: fields that PEFT 0.17 lacks or reads otherwise -> the release from which on they mean what they do here
    since: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for name in self.patterns:
            setattr(self, name, getattr(self, name) or {})
        for name in self.selecting:
            value = getattr(self, name)
            if isinstance(value, Collection) and all(isinstance(v, str) for v in value) and not isinstance(value, str):
                setattr(self, name, sorted(set(value)))
        self.check_types()
        for name in self.selecting:
            value = getattr(self, name)
            for text in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
                if isinstance(value, str) or is_pattern(text):
                    check_pattern(name, text)
        for name in ("modules_to_save", "layers_pattern"):
            value = getattr(self, name) or ()
            for text in (value,) if isinstance(value, str) else value:
                if not text.isidentifier():
                    check_pattern(name, text)
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise AdapterError(f"task_type: expected one of {', '.join(TASK_TYPES)}, found {self.task_type!r}")
        entries = [] if self.target_modules is None else self.target_modules
        if isinstance(entries, str | Pattern) or any(is_pattern(e) for e in entries):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    what = "string" if isinstance(entries, str) else "pattern"
                    raise AdapterError(f"{name} can't be used when target_modules is a {what}; write it in the pattern")
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("layers_pattern needs layers_to_transform: say which layers")
        for name in self.patterns:
            for key in getattr(self, name):
                check_pattern(name, key)

    def check_positive(self, *names: str) -> None:
        """Refuse these fields, or values of patterns among them, below one; ``None`` is none."""
        for where, value in self._values(names):
            if value <= 0:
                raise AdapterError(f"{where}: expected a positive integer, found {value}")

    def check_at_most(self, most: int, *names: str) -> None:
        """Refuse these fields above a number: so many steps are made, and a file could ask for them without end."""
        for where, value in self._values(names):
            if value > most:
                raise AdapterError(f"{where}: expected at most {most}, found {value}")

    def check_probability(self, *names: str) -> None:
        """Refuse these fields outside of [0, 1)."""
        for where, value in self._values(names):
            if not 0 <= value < 1:
                raise AdapterError(f"{where}: expected a probability in [0, 1), found {value}")

    def _values(self, names: Collection[str]) -> Iterator[tuple[str, Any]]:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, dict):
                yield from ((f"{name}[{short(key)}]", own) for key, own in value.items())
            elif value is not None:
                yield name, value

    def check_types(self) -> None:
        """Check every field against its annotation; files from elsewhere come through here too."""
        hints = _hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not _fits(value, hints[f.name]):
                raise AdapterError(
                    f"{type(self).__name__}.{f.name}: expected {_readable(hints[f.name])}, found {short(value)}"
                )
            if (why := why_odd(value)) is not None:
                raise AdapterError(f"{type(self).__name__}.{f.name}: {why}")

    def changed(self: Self, **fields: object) -> Self:
        """A copy with other values in some fields, unchecked: what fxpeft itself worked out for a model."""
        new = copy.copy(self)
        vars(new).update(fields)
        return new

    def selector(self) -> NameSelector:
        """The targets by name; ``target_modules`` must be resolved: not ``None``, ``all-linear`` or a pattern."""
        targets, exclude = self.target_modules, self.exclude_modules or ()
        assert targets is not None
        assert not isinstance(targets, Pattern)
        assert not isinstance(exclude, Pattern)
        return NameSelector(targets, exclude, self.modules_to_save or (), *self.layer_filter())

    def layer_filter(self) -> tuple[list[int] | None, Collection[str]]:
        """``layers_to_transform`` and ``layers_pattern`` as lists."""
        layers, names = self.layers_to_transform, self.layers_pattern or ()
        return [layers] if isinstance(layers, int) else layers, [names] if isinstance(names, str) else names

    def to_dict(self) -> dict[str, Any]:
        """The config as PEFT writes it to ``adapter_config.json``, in the oldest format from 0.17 on that holds it.

        A field that came later (``since``) is written where it is not at its default, and ``peft_version`` then names
        the newest release that one of them needs. Without such a field there is no ``peft_version``, as in the files of
        PEFT 0.17, which warns of it; later ones take its absence for their own. ``unsupported`` fields are at their
        defaults and in no file, nor are those that a method takes no value of. So no PEFT is told of fields that it
        doesn't know where they say nothing.
        """
        own = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.init}
        own = {name: value for name, value in own.items() if name not in self.since or value != _default(self, name)}
        needed = [self.since[name] for name in own if name in self.since]
        for name in self.selecting:
            if isinstance(own.get(name), Pattern):  # not resolved yet; "& name:**" marks a text of bare names as one
                text = str(own[name])
                own[name] = text if is_pattern(text) else f"({text}) & name:**"
        if own.get("layers_pattern") and own["layers_to_transform"] == 0:
            own["layers_to_transform"] = [0]  # which PEFT before 0.21 took for none
        version = {"peft_version": max(needed, key=_numbers)} if needed else {}
        return {**own, "peft_type": self.peft_type, **version}

    @classmethod
    def from_dict(
        cls: type[Self],
        values: Mapping[str, Any],
        source: str = "config",
        *,
        loading: bool = False,
        strict: bool = True,
    ) -> Self:
        """Read a config that PEFT or fxpeft wrote.

        Args:
            loading: the adapter was trained already: null stands for a default, a whole number may be written as 8.0,
                and what matters in training alone is passed over.
            strict: refuse fields that are unknown and not empty, also when loading; otherwise they are told of.

        Raises:
            AdapterError: an unknown or unsupported field that is not at its default, or a value of
                the wrong type; every such field is named.
        """
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        rest = {k: v for k, v in values.items() if k not in known and k not in ("peft_type", "peft_version")}
        # a field that only a later PEFT knows is harmless while it is off
        active = {k: v for k, v in rest.items() if v and v != cls.unsupported.get(k)}
        if loading:
            active = {k: v for k, v in active.items() if not _is_harmless(k, values)}
        unknown = {k: v for k, v in active.items() if k not in cls.unsupported}
        if loading and unknown and not strict:
            lines = (f"{short(k)[1:-1]} = {short(v)}" for k, v in unknown.items())
            warnings.warn(
                f"{source}: fields that {cls.__name__} doesn't know are passed over:\n{listing(lines)}\nThe adapter is "
                "loaded where each of its tensors has a place; strict=True refuses it.",
                stacklevel=2,
            )
            active = {k: v for k, v in active.items() if k not in unknown}
        if active:
            lines = (
                f"{short(k)[1:-1]} = {short(v)} ({'unsupported' if k in cls.unsupported else 'unknown'})"
                + (f": {cls.reasons[k]}" if k in cls.reasons else "")
                for k, v in active.items()
            )
            raise AdapterError(
                f"{source}: fields that {cls.__name__} can't honour:\n{listing(lines)}\n"
                "Set them to their defaults, or use an adapter that was trained without them."
            )
        own = {k: v for k, v in values.items() if k in known}
        if loading:
            if own.get("base_model_name_or_path") == "":  # so PEFT before 0.21 wrote that there is no name
                del own["base_model_name_or_path"]
            hints = _hints(cls)
            own = {k: _whole(v, hints[k]) for k, v in own.items() if v is not None or _fits(None, hints[k])}
        try:
            return cls(**own)
        except AdapterError as error:
            raise AdapterError(f"{source}: {clipped(str(error))}") from None


@dataclass
class RankConfig(AdapterConfig):
    """Fields of the low-rank methods.

    Args:
        r: rank. lora_alpha: the update is scaled by ``lora_alpha / r``, or by
            ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        rank_pattern, alpha_pattern: name suffix or regular expression -> the site's own value.
    """

    r: int = 8
    lora_alpha: int | float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)

    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("r", "rank_pattern")
        for where, alpha in self._values(("lora_alpha", "alpha_pattern")):
            if abs(alpha) > LARGEST_SCALE:
                raise AdapterError(f"{where}: expected a number whose float32 is finite, found {alpha}")


def _plain(value: Any) -> Any:
    """A copy that JSON can hold; patterns are left to their own text."""
    nested = dataclasses.is_dataclass(value) and not isinstance(value, type | Pattern)
    return dataclasses.asdict(value) if nested else copy.deepcopy(value)


def _default(config: AdapterConfig, name: str) -> Any:
    own = type(config).__dataclass_fields__[name]
    return own.default if own.default_factory is dataclasses.MISSING else own.default_factory()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def check_pattern(name: str, text: str) -> None:
    """Refuse a text that ``name`` can't be matched with."""
    try:
        if is_pattern(text):
            pattern(text)
        else:
            check_expression(text, name)
    except PatternError as error:
        raise AdapterError(str(error) if str(error).startswith(f"{name}: ") else f"{name}: {error}") from None


@contextmanager
def matching() -> Iterator[None]:
    """One budget of time for all matches with a config's patterns in a block or in the decorated function.

    Raises:
        AdapterError: it was spent: the pattern is tried in too many ways.
    """
    with limited():
        try:
            yield
        except PatternError as error:
            raise AdapterError(str(error)) from None


def _is_harmless(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a field has no effect on what a trained adapter computes, beside the other fields."""
    if name not in HARMLESS:
        return False
    other, effective = HARMLESS[name]
    return not values.get(other) if effective is ... else not other or values.get(other) != effective


def _whole(value: Any, hint: Any) -> Any:
    """A float that is a whole number as an integer, where only an integer is expected."""
    if _fits(value, hint):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() and _fits(int(value), hint) else value
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in items}
        made: Any = whole if isinstance(value, dict) else list(whole.values())
        return made if _fits(made, hint) else value
    return value


_known_hints: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    """Field annotations, resolved once per class: a swap from a file checks a config each time."""
    if cls not in _known_hints:
        _known_hints[cls] = typing.get_type_hints(cls)
    return _known_hints[cls]


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if origin is not None:  # list[...], Collection[...]
        holds = isinstance(value, list if origin is list else list | tuple | set | frozenset)
        return holds and all(_fits(v, args[0]) for v in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else hint)  # JSON writes 0.0 as 0 too


def _readable(hint: Any) -> str:
    if not typing.get_origin(hint):
        return str(hint.__name__)
    return str(hint).replace("typing.", "").replace("collections.abc.", "")
