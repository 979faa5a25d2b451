"""Convolutions of one, two and three dimensions: their modules and what they are in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from fxpeft.passes.targets import convolution
from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.operations.spec import OpSpec, Places
from fxpeft.passes.targets.reading import Unsupported, Weight, argument

aten = torch.ops.aten
_MODULES: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CALLS = (
    F.conv1d, F.conv2d, F.conv3d, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv3d.padding, aten.convolution.default,
)  # fmt: skip


@dataclass(frozen=True)
class Conv(Kind):
    """``F.conv1d`` / ``conv2d`` / ``conv3d``, grouped or not.

    A is a convolution over all input channels with the target's own kernel, stride and padding;
    B is a 1x1 convolution with the target's groups (PEFT's ``lora.layer._ConvNd``). PEFT's A has no
    dilation, which fits a dilated target with ``padding="same"`` only: there A has none here
    either, elsewhere it has the target's.
    """

    kernel: tuple[int, ...] = ()
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    family = "conv"
    is_linear = False
    takes_lanes = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """``conv1d``, ``conv2d`` or ``conv3d``."""
        return f"conv{len(self.kernel)}d"

    @property
    def takes_rotation(self) -> bool:  # type: ignore[override]
        """Whether its kernel is of ones: in a wider one's weight features would rotate with positions."""
        return self.groups == 1 and all(size == 1 for size in self.kernel)

    @property
    def takes_kronecker(self) -> bool:  # type: ignore[override]
        """Whether it has no groups; of three dimensions no adapter is such a product."""
        return self.groups == 1 and len(self.kernel) < 3

    @property
    def feature_dimension(self) -> int:  # type: ignore[override]
        """Before the sizes."""
        return -1 - len(self.kernel)

    def settings(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("kernel", "stride", "padding", "dilation", "groups")}

    @classmethod
    def of_settings(cls, in_features: int, out_features: int, settings: Mapping[str, Any]) -> Conv:
        stride, padding, dilation = (_setting(settings[k]) for k in ("stride", "padding", "dilation"))
        kernel, groups = tuple(settings["kernel"]), int(settings["groups"])
        return cls(in_features, out_features, kernel, stride, padding, dilation, groups)

    def a_shape(self, rank: int) -> tuple[int, ...]:
        return (rank, self.in_features, *self.kernel)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        return (self.out_features, rank // self.groups, *(1 for _ in self.kernel))

    def check_rank(self, rank: int) -> str | None:
        if rank > 0 and rank % self.groups:
            return f"rank must be divisible by the convolution's {self.groups} groups, found {rank}"
        return super().check_rank(rank)

    def _conv(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = getattr(F, self.name)(*args, **kwargs)
        return out

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        return self._conv(x.type_as(a), a, None, self.stride, self.padding, self._dilation_of_a)

    def reduce_rows(self, x: Tensor, a: Tensor) -> Tensor:
        return convolution.convolve(x.type_as(a), a, self.stride, self.padding, self._dilation_of_a)

    @property
    def _dilation_of_a(self) -> Any:
        return 1 if self.padding == "same" else self.dilation

    @property
    def like_target(self) -> bool:  # type: ignore[override]
        """Whether A is dilated as the target is."""
        return self.padding != "same" or all(d == 1 for d in _sizes(self.dilation))

    def scale(self, h: Tensor, d: Tensor) -> Tensor:
        return (h * self.per_output(d)).type_as(h)

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        return self._conv(h, b, groups=self.groups)

    def expand_rows(self, h: Tensor, b: Tensor) -> Tensor:
        # a slot's B is dense: a grouped one is written there with zeros off its blocks
        return convolution.mix(h, b.t(), len(self.kernel))

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def per_output(self, c: Tensor) -> Tensor:
        return c.view(-1, *(1 for _ in self.kernel))

    def leading(self, x: Tensor) -> torch.Size:
        return x.shape[: x.ndim - len(self.kernel) - 1]  # a batch, or nothing

    def per_row(self, c: Tensor, x: Tensor) -> Tensor:
        return c.view(*c.shape, *(1 for _ in self.kernel))

    def rows(self, b: Tensor) -> Tensor:
        flat = b.flatten(1)  # [out, rank / groups]
        if self.groups == 1:
            return flat.t()
        blocks = flat.view(self.groups, self.out_features // self.groups, -1)
        dense: Tensor = torch.block_diag(*blocks.transpose(1, 2))  # type: ignore[no-untyped-call]
        return dense

    def unrows(self, rows: Tensor, rank: int) -> Tensor:
        if self.groups == 1:
            return rows.t().reshape(self.b_shape(rank))
        per_group, per_out = rank // self.groups, self.out_features // self.groups
        blocks = rows.view(self.groups, per_group, self.groups, per_out)
        diagonal = torch.stack([blocks[g, :, g].t() for g in range(self.groups)])
        return diagonal.reshape(self.b_shape(rank))

    def why_no_delta(self, module: nn.Module) -> str | None:
        if self.groups > 1:
            return "the update of a grouped convolution mixes all groups, and its weight can't"
        pads = self.padding not in (0, "valid", (0,) * len(self.kernel))
        wide = any(k > 1 for k in self.kernel)
        if wide and not self.like_target:
            return 'with padding="same" and dilation the update is a convolution without dilation'
        if getattr(module, "padding_mode", "zeros") != "zeros" and pads and (wide or self.padding != "same"):
            return f"the update pads with zeros, the convolution with padding_mode={module.padding_mode!r}"
        return None


def _sizes(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _setting(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _read(node: Node, weight: Weight) -> Conv:
    if node.target is aten.convolution.default and node.args[6]:
        raise Unsupported("a transposed convolution")
    defaults = enumerate((("stride", 1), ("padding", 0), ("dilation", 1)), 3)
    stride, padding, dilation = (_setting(argument(node, (i, n), d)) for i, (n, d) in defaults)
    groups: Any = node.args[8] if node.target is aten.convolution.default else argument(node, (6, "groups"), 1)
    shape = weight.shape
    return Conv(shape[1] * groups, shape[0], tuple(shape[2:]), stride, padding, dilation, groups)


def _of_module(module: nn.Module) -> Conv | None:
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    return Conv(
        module.in_channels, module.out_channels, tuple(module.kernel_size), module.stride, module.padding,
        module.dilation, module.groups,
    )  # fmt: skip


def _stub(kind: Kind, biased: bool) -> nn.Module:
    assert isinstance(kind, Conv)
    made: Any = _MODULES[len(kind.kernel)]
    settings = (_setting(value) for value in (kind.kernel, kind.stride, kind.padding, kind.dilation))
    module: nn.Module = made(kind.in_features, kind.out_features, *settings, kind.groups, bias=biased)
    return module


CONVOLUTION = OpSpec(
    kind=Conv,
    names=("conv1d", "conv2d", "conv3d"),
    calls=dict.fromkeys(_CALLS, Places()),
    read=_read,
    modules=tuple(_MODULES.values()),
    of_module=_of_module,
    stub=_stub,
)
