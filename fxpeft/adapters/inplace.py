"""Base weights written in place, all or nothing, and what was there before: what a fold rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fxpeft.errors import AdapterError, listing
from fxpeft.methods.base import SlotValues
from fxpeft.model.walk import base_modules, site_module
from fxpeft.passes.base import attribute, join
from fxpeft.passes.live.parameters import parameter_kind
from fxpeft.passes.live.product import Product, check_stored, product_of
from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.targets.kinds import Kind

Keep = Literal["original", "delta"]


@dataclass
class Folded:
    """Which adapters are in a model's weights, and how they get out again.

    Args:
        originals: dotted name -> the bare model's value.
        steps: with ``keep="delta"``: site -> what was done to its weight, in order.
    """

    names: list[str]
    keep: Keep
    originals: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, list[SlotValues]] = field(default_factory=dict)

    def bare(self, model: nn.Module) -> dict[str, Tensor]:
        """Dotted name -> value of everything that has to be written to have the bare model again."""
        writes = dict(self.originals)
        name_of = first_name(model) if self.steps else str
        for site, steps in self.steps.items():
            module, product, path = product_at(model, site)
            stored = attribute(module, product.weight).detach()
            weight = product.view(accumulator(stored))
            for values in reversed(steps):
                weight = unfold_weight(product.kind, weight, values)
            writes[name_of(path)] = product.view(weight).to(stored.dtype)
        return writes


def product_at(model: nn.Module, site: str) -> tuple[nn.Module, Product, str]:
    """A site's module, what its fold changes, and the dotted name of the weight.

    Raises:
        PassError: as :func:`product_of`.
    """
    module, leaf = site_module(model, site)
    if not leaf:
        product = product_of(module)
        return module, product, join(site, product.weight)
    check_stored(module, leaf)
    return module, Product(parameter_kind(module, leaf), leaf, False, None), site


def fold_weight(kind: Kind, weight: Tensor, values: SlotValues) -> Tensor:
    """``g_out * (W + B^T diag(d) A) (I + R)^T * g_in`` of a weight ``[out, in, ...]``, in the weight's dtype."""
    if values.d.numel():
        weight = weight + _delta(kind, weight, values)
    if values.rotation is not None:
        weight = _times(weight, _whole(weight, values.rotation).transpose(1, 2))
    gain = _gain(kind, weight, values)
    return weight if gain is None else weight * gain


def unfold_weight(kind: Kind, weight: Tensor, values: SlotValues) -> Tensor:
    """The inverse of :func:`fold_weight`, up to rounding."""
    gain = _gain(kind, weight, values)
    if gain is not None:
        weight = weight / gain
    if values.rotation is not None:
        weight = _times(weight, torch.linalg.inv(_whole(weight, values.rotation)).transpose(1, 2))
    return weight - _delta(kind, weight, values) if values.d.numel() else weight


def _delta(kind: Kind, weight: Tensor, values: SlotValues) -> Tensor:
    a, b, d = (t.to(weight) for t in (values.a, values.b, values.d))
    return kind.delta(a * d.view(-1, *(1 for _ in a.shape[1:])), b)


def _whole(weight: Tensor, rotation: Tensor) -> Tensor:
    return torch.eye(rotation.shape[1]).to(weight) + rotation.to(weight)


def _times(weight: Tensor, blocks: Tensor) -> Tensor:
    """A weight ``[out, in, ones]`` whose blocks of inputs are multiplied with ``[blocks, size, size]``."""
    parts = weight.reshape(len(weight), len(blocks), -1).transpose(0, 1)
    return torch.bmm(parts, blocks).transpose(0, 1).reshape(weight.shape)


def _gain(kind: Kind, weight: Tensor, values: SlotValues) -> Tensor | None:
    """What multiplies the weight, in a shape that broadcasts over ``[out, in, ...]``."""
    gain: Tensor | None = None
    if values.g_out is not None:
        gain = values.g_out.to(weight).unsqueeze(1)
    if values.g_in is not None:
        # an output sees the inputs of its own group only
        inputs = values.g_in.to(weight).view(kind.groups, -1).repeat_interleave(kind.out_features // kind.groups, dim=0)
        gain = inputs if gain is None else gain * inputs
    return None if gain is None else gain.view(*gain.shape, *(1 for _ in weight.shape[2:]))


def accumulator(tensor: Tensor) -> Tensor:
    """A tensor in the dtype that sums are made in: float32, or float64 where it has that."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def values_at(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """Copies of tensors of the model."""
    return {path: attribute(model, path).detach().clone() for path in paths}


def put_back(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values that were there before, each in the memory of its tensor, with as little of torch as can be."""
    Copies((attribute(model, path).detach(), value) for path, value in values.items()).run()


@torch.no_grad()
def exchange(model: nn.Module, writes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write values into the model's own memory; returns copies of what was there. On an error nothing stays."""
    before = values_at(model, writes)
    try:
        for path, value in writes.items():
            tensor: Tensor = attribute(model, path)
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # such a one is written only so
                tensor.copy_(value)
    except BaseException:
        put_back(model, before)
        raise
    return before


def check_finite(writes: Mapping[str, Tensor], names: list[str]) -> None:
    """Refuse NaN and infinity."""
    wrong = [path for path, value in writes.items() if not torch.isfinite(value).all()]
    if wrong:
        raise AdapterError(
            f"folding {', '.join(names)} would give NaN or infinity in\n{listing(wrong)}\nnothing was changed; the "
            "adapter is broken, or the base's dtype too narrow for the sum"
        )


def settle_shared(model: nn.Module, writes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes whose memory nothing else reads, one for each piece of memory.

    Tied weights are one piece of memory with several names. They can be written where all names get
    the same values, and not where one of them would change behind its module's back.

    Raises:
        AdapterError: the latter; all are named.
    """
    kept: dict[str, Tensor] = {}
    clashes = []
    for paths in _shared(model):
        written = [path for path in paths if path in writes]
        if not written:
            continue
        first = writes[written[0]]
        shapes = {attribute(model, path).shape for path in paths}
        if len(shapes) > 1 or len(written) < len(paths) or not all(torch.equal(first, writes[p]) for p in written[1:]):
            clashes.append(" = ".join(paths))
        else:
            kept[paths[0]] = first
    if clashes:
        raise AdapterError(
            "these weights are tied, so folding an adapter into one changes the other too; nothing was changed.\n"
            f"{listing(clashes)}\nLeave the site out of the adapter, or untie them first: "
            "module.weight = nn.Parameter(module.weight.detach().clone()) and config.tie_word_embeddings = False"
        )
    return kept


def first_name(model: nn.Module) -> Callable[[str], str]:
    """A function from a tensor's dotted name to the first name of the same memory."""
    first = {path: paths[0] for paths in _shared(model) for path in paths}
    return lambda path: first.get(path, path)


def _shared(model: nn.Module) -> list[list[str]]:
    """The dotted names of the base's tensors, those together that share memory."""
    spans: list[tuple[str, int, int, int, str]] = []
    groups: list[list[str]] = []
    for site, module in base_modules(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            path = join(site, name)
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
                groups.append([path])
                continue
            size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            end = start + size * tensor.element_size()
            spans.append((str(tensor.device), start, end, len(spans), path))
    reach, device = 0, ""
    order: dict[str, int] = {path: index for *_, index, path in spans}
    for where, start, end, _, path in sorted(spans):
        if where != device or start >= reach:
            groups.append([])
            reach = 0
        groups[-1].append(path)
        reach, device = max(reach, end), where
    return [sorted(paths, key=lambda path: order.get(path, 0)) for paths in groups]
