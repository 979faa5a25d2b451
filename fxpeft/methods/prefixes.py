"""What prefix tuning and its kin share: keys and values of virtual tokens before each layer's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fxpeft.errors import AdapterError
from fxpeft.methods.parts import SitePlan
from fxpeft.methods.prompt_inputs import cache_argument
from fxpeft.methods.prompts import HEADS, HIDDEN, LAYERS, P, PromptMethod, PromptPlan, first_number, forward_arguments
from fxpeft.passes.live import base_class


class PrefixMethod(PromptMethod[P]):
    """A row holds key and value of one virtual token in every layer; an encoder-decoder's decoder gets them."""

    in_cache = True

    def site(self, model: PreTrainedModel) -> str:
        kinds = {str(k) for k in getattr(model.config.get_text_config(), "layer_types", None) or ()}
        if any(not k.endswith("attention") or "linear" in k for k in kinds):
            raise AdapterError(f"{base_class(model).__name__} has layers without keys and values: {sorted(kinds)}")
        backbone = model.base_model_prefix
        for name in ("", backbone):
            host = model.get_submodule(name) if name == "" or name in model._modules else None
            if host is None or "inputs_embeds" not in (arguments := forward_arguments(host)):
                continue
            if cache_argument(arguments) in ("cache", "past_key_values"):
                return name
        raise AdapterError(f"{base_class(model).__name__}.forward takes no cache of keys and values, so no prefix")

    def resolved(self, model: PreTrainedModel, config: P) -> P:
        resolved = super().resolved(model, config)
        grouped = model.config.get_text_config().to_dict().get("num_key_value_heads") is not None
        for name, expected in _key_values(model).items():
            # for grouped queries PEFT replaces heads and width, so that those of the queries can stand there
            if getattr(config, name) not in (None, expected) and not (grouped and name != "num_layers"):
                raise AdapterError(
                    f"{name}: expected {expected}, that of {base_class(model).__name__}'s keys and values, found "
                    f"{getattr(config, name)}; is it a prefix of another base model?"
                )
            setattr(resolved, name, expected)
        return resolved

    def layer_shapes(self, model: PreTrainedModel, config: P) -> tuple[tuple[int, int] | None, ...]:
        """PEFT's rule for layers that are not alike: each takes the first of the heads, and of their numbers.

        Raises:
            AdapterError: a layer has more heads than the widest ones, so that it would get no prefix.
        """
        each = _layer_shapes(model)
        assert config.num_attention_heads is not None
        assert config.token_dim is not None
        heads, width = config.num_attention_heads, config.token_dim // config.num_attention_heads
        short = [i for i, shape in enumerate(each) if shape and (shape[0] > heads or shape[1] > width)]
        if short:
            raise AdapterError(
                f"{base_class(model).__name__}: a prefix holds {heads} key-value heads of width {width} a layer, those "
                f"of its widest layers, and layers {short} have more heads, so they would get none of it and count "
                "positions differently; use prompt tuning"
            )
        return () if all(shape == (heads, width) for shape in each) else each

    def check(self, model: PreTrainedModel, config: P) -> None:
        said = model.config.get_text_config().to_dict()
        places = set((getattr(model, "hf_device_map", None) or {}).values()) - {"cpu", "disk"}
        if len(places) > 1:
            raise AdapterError(
                f"prefix tuning doesn't work on a model that is split over {len(places)} devices: load it on one, or "
                "use prompt tuning"
            )
        decoder = said.get("num_decoder_layers", said.get("decoder_layers"))
        if config.task_type == "SEQ_2_SEQ_LM" and decoder not in (None, config.num_layers):
            raise AdapterError(f"num_layers: the decoder has {decoder}, but PEFT's format takes the encoder's number, "
                               f"{config.num_layers}")  # fmt: skip


def _key_values(model: PreTrainedModel) -> dict[str, int]:
    """Layers, and heads and width of their keys and values; PEFT's rule for grouped queries."""
    own: Any = model.config.get_text_config()
    said = own.to_dict()  # whose attributes can't be asked for what differs between layers
    layers, heads, width = (first_number(own, names) for names in (LAYERS, HEADS, HIDDEN))
    size, groups = width // heads, said.get("num_key_value_heads")
    if groups is not None:
        size, heads = said.get("head_dim") or size, groups
        # of layers that are not alike, the widest say it
        for shape in _layer_shapes(model):
            if shape is not None and shape[1] > size:
                heads, size = shape
    return {"num_layers": layers, "num_attention_heads": heads, "token_dim": size * heads}


def _layer_shapes(model: PreTrainedModel) -> tuple[tuple[int, int] | None, ...]:
    """Each layer's key-value heads and their width, ``None`` where it reads an earlier layer's; ``()``: all alike."""
    own: Any = model.config.get_text_config()
    said, layers = own.to_dict(), first_number(own, LAYERS)
    if said.get("per_layer_config"):
        found = [(layer.num_key_value_heads, layer.head_dim) for layer in own.per_layer_config]
    elif said.get("global_head_dim"):  # Gemma 4 before transformers 5.15
        alike = (own.num_key_value_heads, own.head_dim)
        wide = (said.get("num_global_key_value_heads") or own.num_key_value_heads, own.global_head_dim)
        found = [alike if kind == "sliding_attention" else wide for kind in own.layer_types]
    elif said.get("num_kv_shared_layers"):
        found = [(own.num_key_value_heads, own.head_dim)] * layers
    else:
        return ()
    shared = layers - (said.get("num_kv_shared_layers") or 0)
    return tuple(shape if i < shared else None for i, shape in enumerate(found))


def prefix_of(plan: SitePlan, cache: Any) -> Tensor:
    """The prefix that a filled cache begins with, ``[virtual, 2 * layers * heads * width]``.

    Args:
        cache: a ``Cache`` of one row, or key and value of each layer, ``[1, heads, tokens, width]``.

    Raises:
        AdapterError: an encoder-decoder's, too few tokens, or another model's.
    """
    assert isinstance(plan, PromptPlan)
    if plan.task == "SEQ_2_SEQ_LM":
        raise AdapterError("past_key_values: PEFT lays an encoder-decoder's prefix out in another way than its cache")
    shapes = plan.shapes or ((plan.heads, plan.width // (2 * plan.layers * plan.heads)),) * plan.layers
    made: Tensor | None = None
    for number, shape in enumerate(shapes):
        if shape is None:
            continue
        for half, held in enumerate(_held(cache, number)):
            if held.ndim != 4 or (held.shape[0], held.shape[1], held.shape[3]) != (1, *shape):
                wanted = f"[1, {shape[0]}, tokens, {shape[1]}]"
                raise AdapterError(f"past_key_values: layer {number}: expected {wanted}, found {list(held.shape)}")
            if held.shape[2] < plan.rank:
                raise AdapterError(
                    f"past_key_values: expected the first {plan.rank} tokens, as num_virtual_tokens says, found "
                    f"{held.shape[2]} in layer {number}"
                )
            if made is None:
                made = held.new_zeros(
                    plan.rank, 2 * plan.layers, plan.heads, plan.width // (2 * plan.layers * plan.heads)
                )
            made[:, 2 * number + half, : shape[0], : shape[1]] = held[0, :, : plan.rank].transpose(0, 1)
    assert made is not None
    return made.flatten(1)


def _held(cache: Any, number: int) -> tuple[Tensor, Tensor]:
    """A layer's keys and values, of all tokens that it has seen."""
    layers = getattr(cache, "layers", cache)
    if number >= len(layers):
        raise AdapterError(f"past_key_values: expected layer {number} in it, found {len(layers)} layers")
    layer = layers[number]
    if not hasattr(layer, "keys"):
        return layer[0], layer[1]
    if layer.keys is None:
        raise AdapterError("past_key_values: expected a cache that a forward has filled, found an empty one")
    seen = int(layer.get_seq_length())
    if seen > layer.keys.shape[2]:
        raise AdapterError(
            f"past_key_values: layer {number} keeps {layer.keys.shape[2]} tokens of the {seen} that it has seen, and "
            "the first are gone; read a shorter text"
        )
    return layer.keys[:, :, :seen], layer.values[:, :, :seen]
