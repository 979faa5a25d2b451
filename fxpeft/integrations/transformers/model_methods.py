"""The adapter methods of ``PreTrainedModel``, backed by fxpeft: :data:`METHODS` is what ``install`` puts there.

Parameters, defaults, return values and errors are those of transformers 5.23. A model that PEFT
has adapted keeps Transformers' own methods.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig

from fxpeft import adapters
from fxpeft.adapters.agreement import change_of_parts
from fxpeft.adapters.change import changes, changing, ordinary
from fxpeft.adapters.installing import install_adapter
from fxpeft.adapters.name import check_adapter_name
from fxpeft.adapters.state import Adapter, is_prepared, state_of
from fxpeft.adapters.values import fresh_values
from fxpeft.errors import AdapterError
from fxpeft.integrations.transformers import loading
from fxpeft.integrations.transformers.held import held_adapter, loaded_state, only_active, without_prefix
from fxpeft.integrations.transformers.model_state import (
    LOADED,
    PROPERTIES,
    adapters_of,
    add,
    add_beside,
    belongs_to_peft,
    leave_slots,
    logger,
    prepare,
    swap,
    train_parts,
)  # fmt: skip
from fxpeft.integrations.transformers.releases import LoadStateDictInfo, log_report
from fxpeft.methods import method_of
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.modules import Modules
from fxpeft.passes.torch_private import COMPILED
from fxpeft.serving.swap import serving_of
from fxpeft.targets.experts import converted
from fxpeft.targets.sites import make_plan


@changes
def add_adapter(self: PreTrainedModel, adapter_config: AdapterConfig, adapter_name: str | None = None) -> None:
    """Add a fresh adapter for training, make it the active one and freeze the base.

    Args:
        adapter_config: one of fxpeft's configs, or of PEFT's. An adapter beside others has their type.
        adapter_name: ``"default"`` where it is not given.

    With the name first it is the method of PEFT's models, as TRL calls it: see :func:`add_beside`.

    Raises:
        ValueError: the name is taken, or the config doesn't fit the model. TypeError: no config.
    """
    if isinstance(adapter_config, str):
        add_beside(self, adapter_config, adapter_name)
        return
    name = check_adapter_name(adapter_name or "default")
    _check_free(self, name)
    if isinstance(adapter_config, Mapping):
        raise TypeError(f"adapter_config should be a config, such as LoraConfig. Got {type(adapter_config)} instead.")
    config = loading.as_config(adapter_config)
    _check_type(self, config)
    # Transformers notes the base in the caller's own object
    adapter_config.base_model_name_or_path = config.base_model_name_or_path = vars(self).get("name_or_path") or None
    loading.check_injectable(config)
    modules = Modules(self)
    plan = make_plan(modules, converted(modules, config), heads=False)
    leave_slots(self)
    new = Adapter(name, plan, fresh_values(self, plan, autocast=True))
    install_adapter(self, new)
    train_parts(new)


@ordinary()
def load_adapter(
    self: PreTrainedModel,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
    is_trainable: bool = False,
    hotswap: bool | Literal["auto"] = "auto",
    local_files_only: bool = False,
    adapter_kwargs: dict[str, Any] | None = None,
    load_config: LoadStateDictConfig | None = None,
    **kwargs: Any,
) -> LoadStateDictInfo:
    """Load an adapter and make it the active one, or swap it in for the one of that name.

    Args:
        peft_model_id: a folder, or an id on the hub.
        adapter_name: ``"default"`` where it is not given.
        peft_config, adapter_state_dict: in place of what is in the files: a config, fxpeft's, PEFT's or a
            dict; tensors under PEFT's keys, with or without the prefix ``base_model.model.``.
        low_cpu_mem_usage: accepted; nothing is ever held twice.
        is_trainable: train it further; the model is put in evaluation mode otherwise.
        hotswap: replace the adapter of that name. ``"auto"``: where there is one and
            ``enable_peft_hotswap`` was called. Nothing recompiles after that; without it, where
            the new adapter has the old one's shapes.
        adapter_kwargs: ``subfolder``, ``revision``, ``token``, ... of the adapter, as ``kwargs`` may.
        load_config, kwargs: fields of Transformers' ``LoadStateDictConfig``.

    Returns:
        What was missing (it got first values), unexpected (it was left out) or of another shape.

    Raises:
        ValueError, OSError, RuntimeError: as Transformers raises them; also for an adapter that
            doesn't fit the model at all. The model is then as it was.
    """
    name = check_adapter_name(adapter_name or "default")
    options, download = loading.options_of(peft_model_id, load_config, local_files_only, adapter_kwargs, kwargs)
    source = peft_model_id or options.pretrained_model_name_or_path
    _swaps(self, name, hotswap)  # what is wrong with it is told before files are read
    if source is None and adapter_state_dict is None and peft_config is None:
        raise ValueError(
            "You should either pass a `peft_model_id` or a `peft_config` and `adapter_state_dict` to load an adapter."
        )
    with change_of_parts(self) as agreement:
        found = loading.read(
            source, peft_config, adapter_state_dict, download=download, use_safetensors=options.use_safetensors
        )
        with changing(self):
            agreement.step(found, last=not is_prepared(self))
            swaps = _swaps(self, name, hotswap)
            _check_swappable(self, found.config) if swaps else _check_type(self, found.config)
            # the table of from_pretrained has the user's key_mapping too
            fitted = loading.fit(self, found, name, trainable=is_trainable, conversions=options.weight_mapping)
            # a report of tensors that can't be used is an error, so it comes before anything is changed
            log_report(self, found.source, options.ignore_mismatched_sizes, fitted.info, logger)
            new = Adapter(name, fitted.plan, fitted.values)
            swap(self, new) if swaps else add(self, new)
            if is_trainable:
                train_parts(state_of(self).get(name))
            else:
                self.eval()  # type: ignore[no-untyped-call]
            agreement.step(last=True)
    return fitted.info


def _swaps(model: PreTrainedModel, name: str, hotswap: bool | Literal["auto"]) -> bool:
    """Whether an adapter is to replace the one of its name; ``ValueError`` where it can't."""
    known = name in adapters_of(model)
    if hotswap == "auto":
        hotswap = known and getattr(model, "_hotswap_enabled", False)
    if hotswap and not known:
        raise ValueError("To hotswap an adapter, there must already be an existing adapter with the same adapter name.")
    if not hotswap:
        _check_free(model, name)
    return hotswap


@changes
def set_adapter(self: PreTrainedModel, adapter_name: list[str] | str) -> None:
    """Make one adapter, or a list of them, the active and trainable ones.

    Raises:
        ValueError: no such adapter.
    """
    state = loaded_state(self)
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    missing = [name for name in names if name not in state.adapters]
    if missing and isinstance(adapter_name, str):
        raise ValueError(
            f"Adapter with name {adapter_name} not found. Please pass the correct adapter name among "
            f"{list(state.adapters)}"
        )
    if missing:
        raise ValueError(
            f"Following adapter(s) could not be found: {', '.join(missing)}. Make sure you are passing the correct "
            f"adapter name(s). current loaded adapters are: {list(state.adapters)}"
        )
    before = {name: state.adapters[name].config.inference_mode for name in names}
    if state.serving is None:  # slots are not trained, and there adapters may share a config
        for name in names:
            state.adapters[name].config.inference_mode = False  # Transformers trains what was set, loaded or new
    try:
        adapters.set_adapter(self, names)
    except BaseException:
        for name, value in before.items():
            state.adapters[name].config.inference_mode = value
        raise


@changes
def enable_adapters(self: PreTrainedModel) -> None:
    """Let the active adapters take part in the forward again; ``ValueError`` where there is none."""
    loaded_state(self)
    adapters.enable_adapters(self)


@changes
def disable_adapters(self: PreTrainedModel) -> None:
    """Run the base model alone; ``ValueError`` where there is no adapter."""
    loaded_state(self)
    adapters.disable_adapters(self)


def active_adapters(self: PreTrainedModel) -> list[str]:
    """Names of the active adapters; ``ValueError`` where there is none."""
    return list(loaded_state(self).active)


def active_adapter(self: PreTrainedModel) -> str:
    """Name of the first active adapter, as before Transformers had several; ``ValueError`` where there is none."""
    warnings.warn("`active_adapter` is deprecated, use `active_adapters` instead.", FutureWarning, stacklevel=2)
    return active_adapters(self)[0]


def get_adapter_state_dict(
    self: PreTrainedModel, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys, without the prefix ``base_model.model.``.

    Args:
        adapter_name: the active one where it is not given.
        state_dict: take the values from this ``state_dict`` of the model, gathered elsewhere perhaps.

    Raises:
        ValueError: no such adapter, or not all of its values are in ``state_dict``.
    """
    loaded_state(self)
    name = adapter_name if adapter_name is not None else only_active(self)
    return without_prefix(held_adapter(self, name, state_dict))


@changes
def delete_adapter(self: PreTrainedModel, adapter_names: list[str] | str) -> None:
    """Forget adapters. Where the active ones go, the first that is left becomes the active one, as in PEFT.

    Raises:
        ValueError: one of them is not there; none was deleted.
    """
    state = loaded_state(self)
    names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
    missing = [name for name in names if name not in state.adapters]
    if missing:
        raise ValueError(f"The following adapter(s) are not present and cannot be deleted: {', '.join(missing)}")
    was_active = bool(state.active)
    for name in names:
        adapters.delete_adapter(self, name)
    if was_active and state.adapters and not state.active:
        left = next(iter(state.adapters))
        warnings.warn(f"The active adapter was deleted. Setting active adapter to {left}.", stacklevel=3)
        adapters.set_adapter(self, left)
    if not state.adapters:
        vars(self).pop(LOADED, None)


@changes
def enable_peft_hotswap(
    self: PreTrainedModel, target_rank: int = 128, check_compiled: Literal["error", "warn", "ignore"] = "error"
) -> None:
    """Prepare for adapters that replace each other without recompiling, whatever their ranks, scales and targets.

    Call it before the first adapter is loaded, and compile afterwards. With the first adapter that is
    loaded frozen, every linear module but the head, and whatever else that adapter touches, gets a slot.

    Args:
        target_rank: the highest rank to come; the ranks of all active adapters together count.
        check_compiled: what to do where an adapter is loaded or ``model.compile()`` was called already.

    Raises:
        RuntimeError: that is so, and ``check_compiled`` is ``"error"``. ValueError: a wrong argument.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled should be 'error', 'warn' or 'ignore', got {check_compiled!r} instead.")
    if target_rank < 1:
        raise AdapterError(f"target_rank: expected a positive integer, found {target_rank}")
    present = bool(adapters_of(self))
    late = present or getattr(self, COMPILED, None) is not None
    what = "loading the first adapter" if present else "compiling the model"
    if late and check_compiled == "error":
        raise RuntimeError(f"Call `enable_peft_hotswap` before {what}.")
    if late and check_compiled == "warn":
        logger.warning(f"It is recommended to call `enable_peft_hotswap` before {what} to avoid recompilation.")
    before = getattr(self, "_hotswap_enabled", False), self._prepare_peft_hotswap_kwargs
    self._hotswap_enabled = True
    self._prepare_peft_hotswap_kwargs = {"target_rank": target_rank, "check_compiled": check_compiled}
    try:
        if present and all(a.config.inference_mode for a in adapters_of(self).values()):
            prepare(self)
    except BaseException:
        self._hotswap_enabled, self._prepare_peft_hotswap_kwargs = before
        raise


# --- what they check first ---


def _check_free(model: PreTrainedModel, name: str) -> None:
    if name in adapters_of(model):
        raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")


def _check_swappable(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Transformers swaps LoRA alone; here a LoRA replaces others too where slots were declared for both."""
    others = [a.config for a in adapters_of(model).values() if a.config.peft_type != "LORA"]
    state = state_of(model)
    declared = set() if state.serving is None else set(serving_of(state).methods)
    both = {method_of(c).declared(c) for c in (config, *others)} <= declared
    if config.peft_type != "LORA" or (others and not both):
        raise ValueError("Hotswapping is currently only supported for LoRA, please set `hotswap=False`.")


def _check_type(model: PreTrainedModel, config: AdapterConfig) -> None:
    others = {n: a.config.peft_type for n, a in adapters_of(model).items() if a.config.peft_type != config.peft_type}
    if others:
        raise AdapterError(
            f"a second adapter needs the type of the first: expected {', '.join(set(others.values()))}, found "
            f"{config.peft_type}; delete_adapter {', '.join(others)}, or use fxpeft's own functions"
        )


def _shared(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, or Transformers' own on a model that PEFT has adapted."""
    theirs = getattr(PreTrainedModel, method.__name__, None)

    @functools.wraps(method)
    def choose(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return (theirs if theirs is not None and belongs_to_peft(self) else method)(self, *args, **kwargs)

    return choose


METHODS: tuple[Callable[..., Any], ...] = (
    add_adapter, load_adapter, set_adapter, enable_adapters, disable_adapters, active_adapters, active_adapter,
    get_adapter_state_dict, delete_adapter, enable_peft_hotswap,
)  # fmt: skip


def members() -> dict[str, Any]:
    """What ``install`` sets on ``PreTrainedModel``. Called before it does, for what is there now."""
    return {**{method.__name__: _shared(method) for method in METHODS}, **PROPERTIES}
