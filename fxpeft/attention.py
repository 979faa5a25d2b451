"""Find a model's query and value projections by watching one forward, whatever they are called."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from fxpeft.passes.names import NameSelector

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_MATMUL = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, torch.baddbmm, Tensor.bmm}


class _Watch(TorchFunctionMode):
    """Carries the names of the modules that a tensor was projected by through every operation.

    ``scores`` carries, from the product of queries and keys on, the two operands' names; the
    product of the softmax with a third tensor is then an attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names = WeakTensorKeyDictionary()
        self.scores = WeakTensorKeyDictionary()
        self.weights = WeakTensorKeyDictionary()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func is F.scaled_dot_product_attention:
            q, v = (kwargs[n] if n in kwargs else args[i] for n, i in (("query", 0), ("value", 2)))
            self.found |= self._of(q) | self._of(v)
        names = frozenset[str]().union(*(self._of(t) for t in tensors))
        first = tensors[0] if tensors else None
        for out in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            self.names[out] = names
            if func in _MATMUL and first in self.weights:
                self.found |= self.weights[first] | self._of(tensors[1])
            elif func in _MATMUL and len(tensors) > 1:
                self.scores[out] = self._of(tensors[-2])
            elif func in _SOFTMAX and first in self.scores:
                self.weights[out] = self.scores[first]
            else:
                for carried in (self.scores, self.weights):
                    held = next((carried[t] for t in tensors if t in carried), None)
                    if held is not None:
                        carried[out] = held
        return result

    def _of(self, tensor: Tensor) -> frozenset[str]:
        found: frozenset[str] = self.names.get(tensor, frozenset())  # type: ignore[no-untyped-call]
        return found


def attention_targets(model: nn.Module) -> list[str]:
    """Names of the modules that project an attention's queries and values, fused ones included.

    Runs the model once on its ``dummy_inputs``, a vision model on an empty image. Returns suffixes
    where they select the same modules, full names otherwise; nothing where the model has no dummy
    inputs or no attention.
    """
    inputs = _inputs(model)
    if inputs is None:
        return []
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    watch = _Watch()

    def mark(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                watch.names[output] = frozenset({name})

        return hook

    device = next(model.parameters()).device
    modes = [(m, m.training) for m in model.modules()]
    with ExitStack() as stack:
        for name, module in linears:
            stack.callback(module.register_forward_hook(mark(name)).remove)
        for part, training in modes:
            stack.callback(setattr, part, "training", training)
        model.eval()
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch)
        try:
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
        except Exception:  # noqa: BLE001 - these inputs are not the model's: nothing can be learned from them
            return []
    found = [n for n, _ in linears if n in watch.found]
    suffixes = list(dict.fromkeys(n.rpartition(".")[2] for n in found))
    selected = NameSelector(suffixes).select(n for n, _ in model.named_modules())
    return suffixes if sorted(selected) == sorted(found) else found


def _inputs(model: nn.Module) -> dict[str, Any] | None:
    config = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    # transformers' own dummy_inputs are token ids, also for a model that takes none
    if getattr(model, "main_input_name", None) == "pixel_values" and size is not None:
        shape = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.zeros(1, channels, *shape, dtype=next(model.parameters()).dtype)}
    inputs = getattr(model, "dummy_inputs", None)
    return inputs if isinstance(inputs, dict) else None
