"""What autograd keeps of a site: its input once, what is narrow, nothing that can be made again; equal gradients."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
from adapter_files import add, spread
from closeness import assert_close
from method_cases import KINDS, METHODS, adapted
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxpeft
from fxpeft import LoraConfig
from fxpeft.passes import forward_text
from fxpeft.passes.live import derived, recomputed

LORAS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.3},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
}
SITES = {"target_modules": ["first", "second", "third"], "r": 3, "lora_alpha": 5, "rank_pattern": {"second": 4}}


class Three(nn.Module):
    """Three targets, nowhere square; the first two read one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(48, 80), nn.Linear(48, 80, bias=False), nn.Linear(80, 40)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``[..., 48]``."""
        return self.third(self.first(x).tanh() + self.second(x))


def three(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    net = Three().to(dtype).requires_grad_(False).train()
    add(net, LoraConfig(**SITES, **settings))
    return net


def saved_by(net: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and one tensor for each memory that its backward keeps beside the net's own."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return run(), list(found.values())


def size(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def gradients(net: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Of everything that has one, and the output."""
    x = x.detach().requires_grad_(x.is_floating_point())
    net.zero_grad()
    torch.manual_seed(3)
    out = net(x) if run is None else run(x)
    (out.float().sin().sum()).backward()
    given = {"": x, **dict(net.named_parameters())}
    return {"output": out.detach()} | {name: t.grad.clone() for name, t in given.items() if t.grad is not None}


def check_gradients(net: nn.Module, x: Tensor) -> None:
    """Output and gradients are those of the same net whose values are kept, not made again."""
    found = gradients(net, x)
    with as_autograd_keeps_it():
        expected = gradients(net, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, message=f"{name}: ")


@contextmanager
def as_autograd_keeps_it() -> Iterator[None]:
    """A block in which values are kept, not made again, and gradients are autograd's."""
    with patch.object(recomputed, "is_recorded", lambda: True), patch.object(derived, "is_recorded", lambda: True):
        yield


@contextmanager
def as_a_call() -> Iterator[None]:
    """A block in which no gradients are written out: the form of what isn't known or not trained in whole."""
    with patch.object(derived, "is_recorded", lambda: True):
        yield


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", LORAS)
def test_nothing_wide_is_kept_but_the_input_once_and_what_the_base_gives(case: str) -> None:
    net, x = three(**LORAS[case]), torch.randn(7, 48).bfloat16().requires_grad_()
    bare = Three().bfloat16().requires_grad_(False)
    own = size(saved_by(bare, lambda: bare(x))[1])
    _, kept = saved_by(net, lambda: net(x))
    wide = [t for t in kept if t.shape[0] == 7 and t.shape[-1] > 4]
    # of the base, for the gradient of the gain; what dropout changes of it is in the adapter's dtype
    outputs = {"dora": 2, "dora, dropout": 4}.get(case, 0) * 7 * (80 + 80 + 40)
    assert case == "dora, dropout" or {t.dtype for t in wide} == {torch.bfloat16}
    assert size(wide) == own + 2 * 7 * (48 + 80) + outputs
    narrow = [t for t in kept if t.shape[:1] == (7,) and t.shape[-1] <= 4]
    assert size(narrow) == 4 * 7 * (3 + 4 + 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", LORAS)
def test_gradients_and_masks_are_those_of_autograd(case: str, dtype: torch.dtype) -> None:
    check_gradients(three(dtype, **LORAS[case]), torch.randn(5, 2, 48).to(dtype))


@pytest.mark.parametrize(
    ("method", "kind", "dropout"),
    [
        (method, kind, dropout)
        for method, case in METHODS.items()
        for kind in KINDS
        for dropout in ((0.0, 0.4) if issubclass(case.ours, fxpeft.LoraConfig) else (0.0,))
        if kind not in case.refused
    ],
)
def test_every_method_and_kind(method: str, kind: str, dropout: float) -> None:
    case = METHODS[method]
    net = adapted(case, KINDS[kind], **({"lora_dropout": dropout} if dropout else {}))
    for name, p in net.named_parameters():
        if "adapters" not in name:
            p.data, p.requires_grad = p.data.bfloat16(), False
    net.train()
    x = KINDS[kind].input()
    check_gradients(net, x.bfloat16() if x.is_floating_point() else x)


@pytest.mark.parametrize("case", ["lora", "dropout", "dora", "dora, dropout"])
def test_less_than_peft(case: str) -> None:
    """The input is kept once in the base's dtype where PEFT keeps a float32 copy for each site, and more."""
    x = torch.randn(64, 48).bfloat16().requires_grad_()
    bare, net = Three().bfloat16().requires_grad_(False).train(), three(**LORAS[case])
    theirs: Any = peft.get_peft_model(Three().bfloat16(), peft.LoraConfig(**SITES, **LORAS[case])).train()
    spread({n: p for n, p in theirs.named_parameters() if p.requires_grad})
    own, ours, others = (size(saved_by(m, functools.partial(m, x))[1]) for m in (bare, net, theirs))
    most = {"lora": 0.5, "dropout": 0.3, "dora": 0.3, "dora, dropout": 0.5}[case]
    assert 0 < ours - own < most * (others - own)


def test_checkpoints_see_one_mask_and_keep_nothing_inside() -> None:
    net, x = three(lora_dropout=0.4), torch.randn(6, 48).bfloat16()
    expected = gradients(net, x)
    for reentrant in (False, True):
        found = gradients(net, x, lambda x, r=reentrant: checkpoint(net, x, use_reentrant=r))  # type: ignore[misc]
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    given = x.clone().requires_grad_()
    _, kept = saved_by(net, lambda: checkpoint(net, given, use_reentrant=False))
    assert size(kept) <= size([given])


@pytest.mark.parametrize("case", ["dropout", "dora, dropout"])
def test_autocast_in_the_forward_holds_for_what_is_made_again(case: str) -> None:
    net, x = three(torch.float32, **LORAS[case]), torch.randn(6, 48)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)  # type: ignore[no-any-return]

    found = gradients(net, x, run)
    with as_autograd_keeps_it():
        expected = gradients(net, x, run)
    for name, value in expected.items():
        assert_close(found[name], value, size=float(value.abs().max()), message=f"{name}: ")


def test_a_parameter_that_is_used_twice_under_autocast_has_both_gradients() -> None:
    """Autocast keeps what it cast: that of a part without a graph must not stand in for one with."""
    net, x = three(torch.float32, lora_dropout=0.1), torch.randn(6, 48)
    a = net.first.adapters.default.lora_A

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float().sum() * 0 + (a @ a.t()).float()  # type: ignore[no-any-return]

    assert gradients(net, x, run)["first.adapters.default.lora_A"].abs().max() > 0.1


def test_gradients_of_gradients_and_transforms() -> None:
    net = three(torch.float64, use_dora=True, lora_dropout=0.3)
    for part in net.modules():
        if type(part) is nn.Dropout:
            part.eval()
    names, values = zip(*((n, p) for n, p in net.named_parameters() if "lora_" in n and "first" in n), strict=True)
    x = torch.randn(2, 48, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))[:, :2]  # type: ignore[no-any-return]

    leaves = [v.detach().double().requires_grad_() for v in values]
    place = next(i for i, name in enumerate(names) if "magnitude" in name)

    def of_two(x: Tensor, magnitude: Tensor) -> Tensor:  # A and B are held constant in the norm
        return call(x, *leaves[:place], magnitude, *leaves[place + 1 :])

    assert torch.autograd.gradcheck(of_two, (x, leaves[place]), fast_mode=True)
    assert torch.autograd.gradgradcheck(of_two, (x, leaves[place]), fast_mode=True)

    def loss(x: Tensor) -> Tensor:
        return call(x, *leaves).square().sum()

    wanted = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), wanted)
    tangent = torch.ones_like(x)
    torch.testing.assert_close(torch.func.jvp(loss, (x.detach(),), (tangent,))[1], wanted.sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent, wanted.sum())


def test_frozen_adapters_and_evaluation_keep_nothing_of_the_input() -> None:
    net, x = three(), torch.randn(6, 48).bfloat16().requires_grad_()
    fxpeft.set_requires_grad(net, "default", False)
    bare = Three().bfloat16().requires_grad_(False)
    assert size(saved_by(net, lambda: net(x))[1]) == size(saved_by(bare, lambda: bare(x))[1])
    with torch.no_grad():
        assert not net(x).requires_grad


def operators(net: nn.Module, x: Tensor) -> tuple[Counter[str], Counter[str]]:
    """Those of a forward, and of its backward, as they are without a mode that counts."""
    with patch.object(derived, "is_recorded", lambda: False), patch.object(recomputed, "is_recorded", lambda: False):
        with Calls() as forward:
            y = net(x)
        with Calls() as backward:
            y.backward(torch.ones_like(y))
    return forward.found, backward.found


@pytest.mark.parametrize("case", [case for case in LORAS if case != "dora, dropout"])
def test_no_product_is_made_twice_and_a_site_is_one_function(case: str) -> None:
    """With DoRA's dropout a gradient of the gradient would need more than is kept: it stays calls of autograd's."""
    net, x = three(**LORAS[case]), torch.randn(7, 48).bfloat16().requires_grad_()
    result: Any = net(x)
    assert type(result.grad_fn).__name__ == "_DerivedBackward"
    forward, backward = operators(net, x)
    bare = operators(Three().bfloat16().requires_grad_(False), x)
    products = [sum(found[name] for name in ("mm", "addmm", "addmm_")) for found in (forward, backward, *bare)]
    assert products[0] - products[2] == 3 * (3 if case == "dora" else 2)  # one is of its norm
    assert products[1] - products[3] == 3 * 4


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_what_is_frozen_in_part_keeps_no_more_than_it_needs(frozen: str) -> None:
    net, x = three(lora_dropout=0.2), torch.randn(7, 48).bfloat16().requires_grad_()
    for name, p in net.named_parameters():
        p.requires_grad_("lora" in name and frozen not in name)
    check_gradients(net, x)
    own = x.untyped_storage().data_ptr()
    kept = [t.untyped_storage().data_ptr() for t in saved_by(net, lambda: net(x))[1]]
    assert (own in kept) is (frozen == "lora_B")


@pytest.mark.parametrize("case", LORAS)
def test_gradients_of_gradients_through_what_is_kept(case: str) -> None:
    net = three(torch.float32, **LORAS[case])
    for module in net.modules():
        if isinstance(module, fxpeft.methods.base.SiteAdapter):
            module.double()
    x = torch.randn(4, 48, requires_grad=True)

    def second() -> list[Tensor]:
        torch.manual_seed(5)
        given = [x, *(p for p in net.parameters() if p.requires_grad)]
        first = torch.autograd.grad(net(x).sin().sum(), given, create_graph=True)
        return [*torch.autograd.grad(sum(g.double().square().sum() for g in first), given)]

    found = second()
    with as_autograd_keeps_it():
        expected = second()
    for one, other in zip(found, expected, strict=True):
        assert_close(one.float(), other.float(), size=float(other.abs().max()))


def test_two_adapters_of_one_site() -> None:
    net, x = three(lora_dropout=0.2), torch.randn(6, 48).bfloat16()
    add(net, LoraConfig(r=2, lora_alpha=3, target_modules=["first"], use_dora=True), "other", seed=1)
    fxpeft.set_adapter(net, ["default", "other"])
    net.train()
    found = gradients(net, x)
    assert forward_text(net.first).count("def _recomputed") == 2
    with as_autograd_keeps_it():
        expected = gradients(net, x)
    for name, value in expected.items():
        assert_close(found[name], value, message=f"{name}: ")


def test_compiled_is_one_graph_whose_backward_has_the_mask_of_its_forward() -> None:
    net = nn.Sequential(nn.Linear(48, 80)).requires_grad_(False).train()
    add(net, LoraConfig(r=3, lora_alpha=5, lora_dropout=0.4, target_modules=["0"]))
    net[0].adapters.double()  # type: ignore[operator]
    x, weight = torch.randn(6, 48), torch.randn(6, 80)
    loss = (torch.compile(net, fullgraph=True)(x) * weight).sum()
    loss.backward()
    part = net[0].adapters.default
    with fxpeft.disabled(net):
        base = (net(x) * weight).sum()
    # the update is linear in A and in B
    for p in (part.lora_A, part.lora_B):  # type: ignore[union-attr]
        assert_close((p * p.grad).sum().float() + base, loss)  # type: ignore[operator]


def test_the_partitioner_tells_what_is_kept_and_what_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    """By ``AOT_PARTITIONER_DEBUG=1``, which sets this constant, and ``TORCH_LOGS``, as the guide has them."""
    net, x = three(lora_dropout=0.2), torch.randn(7, 48).bfloat16()
    caplog.set_level("INFO", "torch._functorch.partitioners")
    with patch("torch._functorch.partitioners.AOT_PARTITIONER_DEBUG", True):
        torch.compile(net, backend="aot_eager_decomp_partition", fullgraph=True)(x)
    told = {line.partition(": ")[0]: line.partition(": ")[2] for line in caplog.messages}
    sizes = [size for size, _ in ast.literal_eval(told["Theoretical Per Activation Storage Sizes"])]
    # the input for both sites, not the cast that they have in common
    assert (sizes.count(7 * 48 * 2), sizes.count(7 * 48 * 4)) == (1, 0)
    assert [sizes.count(7 * rank * 4) for rank in (3, 4)] == [2, 1]
    assert not {7 * 80 * 4, 7 * 48, 7 * 80}.intersection(sizes)  # no other copy, no mask
    assert dict(ast.literal_eval(told["Count of Ops Rematerialized"]))["prims.convert_element_type"] >= 1
    assert "# remat/fw/bw" in told
