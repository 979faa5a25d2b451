"""A bridge for scripts that are written for PEFT: ``get_peft_model`` and ``PeftModel`` on fxpeft's adapters.

What they give is the model itself. It keeps its names, its ``state_dict`` and its class, of which its own is now a
subclass with PEFT's methods; ``unload`` and ``merge_and_unload`` give the class back. PEFT is not imported.
"""

from __future__ import annotations

import copyreg
import functools
import os
from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from fxpeft import adapters, checkpoint, serving, transform
from fxpeft.adapters.agreement import written
from fxpeft.adapters.change import changing
from fxpeft.adapters.saving import adapter_files, write_adapter
from fxpeft.adapters.state import find_state, is_prepared, state_of
from fxpeft.errors import AdapterError
from fxpeft.integrations.transformers import loading, model_methods
from fxpeft.integrations.transformers.held import held_adapter
from fxpeft.integrations.transformers.model_state import (
    LOADED,
    PROPERTIES,
    adapters_of,
    add_beside,
    others_active,
    train_parts,
)
from fxpeft.integrations.transformers.saving import unfinished, write_unfinished
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.wrappers import unwrap
from fxpeft.passes.live import base_class, change_class, generated_class
from fxpeft.passes.live.locked import unlocked

BASE = "_fxpeft_bridged"  # on a bridged model's class: the class that the model had


class _Bridge(ABCMeta):
    """The type of :class:`PeftModel` and of the classes below it, which are pickled by the class that they bridge.

    What is called on ``PeftModel`` itself stands here, so that a bridged model's class has its own ``from_pretrained``.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """``PeftModel(model, config)`` is :func:`get_peft_model`."""
        return get_peft_model(*args, **kwargs) if cls is PeftModel else super().__call__(*args, **kwargs)

    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: object = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        torch_device: object = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load an adapter into a model and give it PEFT's methods.

        Args:
            model_id: a folder, or an id on the hub.
            is_trainable: train it further; the model is put in evaluation mode otherwise.
            config: takes the place of the file's; one of fxpeft's or of PEFT's.
            ephemeral_gpu_offload, low_cpu_mem_usage, torch_device: accepted; nothing is ever held twice, and an adapter
                lives beside its modules.
            kwargs: more arguments of :func:`fxpeft.load_adapter`, ``subfolder``, ``revision`` and ``token`` among them.

        Raises:
            AdapterError: as :func:`fxpeft.load_adapter`; nothing was changed.
        """
        model = unwrap(model)
        source = os.fspath(model_id)
        if config is None:
            adapters.load_adapter(
                model, source, adapter_name, trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype,
                key_mapping=key_mapping, **kwargs,
            )  # fmt: skip
        else:
            found = loading.read(source, config, None, download=kwargs)
            found = checkpoint.in_layout_of(model, found, key_mapping=key_mapping)
            adapters.inject(
                model, found.tensors, found.config, adapter_name, trainable=is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )  # fmt: skip
        if is_trainable:
            train_parts(state_of(model).get(adapter_name))
        else:
            model.eval()
        return _enter(model)


class PeftModel(nn.Module, metaclass=_Bridge):
    """A model with PEFT's methods: what :func:`get_peft_model` and ``PeftModel.from_pretrained`` give."""

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The adapters' configs by name; fxpeft's, whose fields are called as PEFT's."""
        return {name: adapter.config for name, adapter in adapters_of(self).items()}

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part, merged ones too."""
        state = find_state(self)
        merged = state.folded.names if state is not None and state.folded is not None else []
        return [] if state is None else [*merged, *(name for name in state.active if name not in merged)]

    @property
    def active_adapter(self) -> str | list[str]:
        """The one adapter that takes part, or a list where there are several or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> AdapterConfig:
        """The active adapter's config."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def base_model(self) -> nn.Module:
        """What the bare model has by this name (a Transformers model: itself without its head), or the model."""
        own: nn.Module = getattr(super(), "base_model", None) or self._modules.get("base_model") or self
        return own

    def get_base_model(self) -> nn.Module:
        """The model itself, with its adapters in it."""
        return self

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        adapters.trainable_parameters(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are."""
        count = adapters.trainable_parameters(self, show=False)
        return count.trainable, count.total

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: object = None,
    ) -> None:
        """Write every adapter, ``default`` to the folder itself and others each to a folder of their name in it.

        Args:
            selected_adapters: these only.
            path_initial_model_for_weight_conversion: any, for a plain LoRA of one that started from the base's
                weights; see ``plain`` of :func:`fxpeft.save_adapter`. Nothing is read from there.
            state_dict: the model's, gathered elsewhere; values are taken from it.
            max_shard_size: accepted, as Transformers passes it; an adapter is one file.

        Raises:
            ValueError: no such adapter. AdapterError: ``safe_serialization=False``, which nobody needs to read.
        """
        if not safe_serialization:
            raise AdapterError("safe_serialization=False: expected True: fxpeft writes no pickles")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if missing := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"selected_adapters: no adapter named {', '.join(missing)}; {list(self.peft_config)}")
        plain = True if path_initial_model_for_weight_conversion is not None else None
        if state_dict is not None and not is_main_process:  # one process alone may have gathered it
            return
        held = {name: held_adapter(self, name, state_dict) for name in names}
        options: Any = {"plain": plain, "save_embedding_layers": save_embedding_layers, "state_dict": state_dict}
        files = {name: adapter_files(self, adapter, **options) for name, adapter in held.items()}
        gathered = state_dict is None and any(held[name] is not adapters_of(self)[name] for name in held)
        with written(together=gathered):
            for name, adapter in held.items() if is_main_process else ():
                folder = Path(save_directory) if name == "default" else Path(save_directory) / name
                write_adapter(self, folder, *files[name])
                write_unfinished(folder, unfinished(adapter))

    def add_adapter(self, adapter_name: str, peft_config: object, low_cpu_mem_usage: bool = False) -> None:
        """Add a fresh adapter; unlike :func:`fxpeft.add_adapter` it isn't made the active one.

        Args:
            peft_config: one of fxpeft's configs or of PEFT's; that of an adapter of the model itself: for a copy of
                that adapter. low_cpu_mem_usage: accepted.
        """
        add_beside(self, adapter_name, peft_config)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: object = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Load an adapter without making it the active one, or other values into one of that name.

        Args:
            is_trainable: train it; the model is put in evaluation mode otherwise.
            torch_device, ephemeral_gpu_offload, low_cpu_mem_usage: accepted; an adapter lives beside its modules.
            kwargs: more arguments of :func:`fxpeft.load_adapter`.
        """
        source = os.fspath(model_id)
        if adapter_name not in self.peft_config:
            with others_active(self):
                adapters.load_adapter(
                    self, source, adapter_name, trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype,
                    key_mapping=key_mapping, **kwargs,
                )  # fmt: skip
            if is_trainable and not is_prepared(self):
                adapters.set_requires_grad(self, adapter_name)
                train_parts(state_of(self).get(adapter_name))
        elif is_prepared(self):
            serving.hotswap(self, source, adapter_name, key_mapping=key_mapping, **kwargs)
        else:
            found = checkpoint.in_layout_of(self, checkpoint.read(source, **kwargs), key_mapping=key_mapping)
            adapters.load_adapter_state_dict(self, found.tensors, adapter_name)
        if not is_trainable:
            self.eval()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter, or several, the active ones, and train them unless ``inference_mode``."""
        adapters.set_adapter(self, adapter_name)
        if not is_prepared(self):  # slots are not trained
            adapters.set_requires_grad(self, adapter_name, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters or freeze them, active or not."""
        adapters.set_requires_grad(self, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Where the active one goes, the first that is left becomes active."""
        model_methods.delete_adapter(self, adapter_name)  # type: ignore[arg-type]

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Run the base model alone inside a ``with`` block."""
        return adapters.disabled(self)

    def disable_adapter_layers(self) -> None:
        """Run the base model alone until :meth:`enable_adapter_layers`."""
        adapters.disable_adapters(self)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters take part again."""
        adapters.enable_adapters(self)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        **kwargs: Any,
    ) -> None:
        """Combine LoRAs to a new one, as :func:`fxpeft.add_weighted_adapter`, without making it the active one."""
        with others_active(self):
            transform.add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **kwargs)  # type: ignore[arg-type]

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, the active ones by default, into the base's weights, until :meth:`unmerge_adapter`."""
        transform.fold(self, adapter_names, safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the weights, which are bit for bit what they were."""
        transform.unfold(self)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: str | Sequence[str] | None = None
    ) -> nn.Module:
        """Merge adapters for good, forget all and give the model its class back: the model itself, bare.

        Args:
            progressbar: accepted.
        """
        return _leave(transform.merge_and_unload(self, adapter_names, safe=safe_merge))

    def unload(self) -> nn.Module:
        """Take all adapters out and give the model its class back: the model itself, as it was."""
        if find_state(self) is not None:
            serving.remove(self)
        return _leave(self)


setattr(PeftModel, LOADED, PROPERTIES[LOADED])  # by which Transformers knows a model with adapters


def get_peft_model(
    model: nn.Module,
    peft_config: object,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Add a fresh adapter to a model and give it PEFT's methods.

    Args:
        model: any module; it is changed in place and returned.
        peft_config: one of fxpeft's configs, such as :class:`fxpeft.LoraConfig`, or of PEFT's.
        mixed: accepted: adapters of several methods go together in any case.
        revision: of the base model, noted in the config.
        low_cpu_mem_usage: accepted.

    Raises:
        AdapterError: as :func:`fxpeft.add_adapter`; nothing was changed. TypeError: no config.
    """
    model, config = unwrap(model), loading.as_config(peft_config)
    adapters.add_adapter(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
    adapter = state_of(model).get(adapter_name)
    adapter.config.revision = revision if revision is not None else config.revision
    train_parts(adapter)
    return _enter(model)


# --- a model's class ---


def _bridged(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a model's class that has PEFT's methods; the same one for all models that are there."""
    for cls in type.__subclasses__(base):
        if vars(cls).get(BASE) is base:
            return cls
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        BASE: base,
    }
    if callable(getattr(base, "generate", None)):
        members["generate"] = _generate(base)
    made: Any = _Bridge(base.__name__, (PeftModel, base), members)
    return made  # type: ignore[no-any-return]


def _generate(base: Any) -> Callable[..., Any]:
    """A model's ``generate``, which takes adapters for each row too."""

    @functools.wraps(base.generate)
    def generate(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return base.generate(self, *args, **kwargs)
        with serving.rows(self, adapter_names):
            return self.generate(*args, **kwargs)

    return generate


def _enter(model: nn.Module) -> PeftModel:
    if not isinstance(model, PeftModel):
        _change_class(model, _bridged(base_class(model)))
    checkpoints = getattr(model, "is_gradient_checkpointing", False)
    if checkpoints and not getattr(model, "_require_grads_hooks", None):  # Transformers asks for text models alone
        model.enable_input_require_grads()  # type: ignore[operator]
    assert isinstance(model, PeftModel)
    return model


def _leave(model: nn.Module) -> nn.Module:
    _change_class(model, getattr(base_class(model), BASE))
    return model


def _change_class(model: nn.Module, cls: type[nn.Module]) -> None:
    """Give a model another class of its own, below its rewrite and its lock where it has them."""
    with changing(model):
        now: Any = unlocked(type(model))
        source = vars(now).get("_fxpeft_source")
        change_class(model, cls if source is None else generated_class(cls, source, now._fxpeft_mixin))


def _reduce(cls: type) -> str | tuple[Any, ...]:
    base = vars(cls).get(BASE)
    return cls.__qualname__ if base is None else (_bridged, (base,))


copyreg.pickle(_Bridge, _reduce)
