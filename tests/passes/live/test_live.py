"""Live modules: a generated forward on every kind of module, copied, saved, hooked, and taken off again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from graphs import lora
from processes import python
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxpeft.passes import Conv, Embedding, Linear, PassError
from fxpeft.passes.live import (
    Container,
    bare_copy,
    base_class,
    generated_source,
    is_bound,
    kind_of,
    replace_module,
    rewrite_module,
    trace_module,
    unbind,
)


class Untraceable(nn.Linear):
    """Its output depends on its input's values, so torch.fx can't trace it."""

    def forward(self, x: Tensor) -> Tensor:
        """Triple where the sum is positive."""
        y = super().forward(x)
        return y * 3 if x.sum() > 0 else y


class Moody(nn.Linear):
    """Its graph in training is another one."""

    def forward(self, x: Tensor) -> Tensor:
        """Doubled in training."""
        y = super().forward(x)
        return y * 2 if self.training else y


class Scaled(nn.Linear):
    """Traced inside: what is added to the linear is scaled too."""

    factor = 3.0

    def forward(self, x: Tensor) -> Tensor:
        """Scaled output."""
        return super().forward(x) * self.factor


class ScaledWords(nn.Embedding):
    """As Gemma's."""

    def forward(self, input: Tensor) -> Tensor:
        """Scaled output."""
        return super().forward(input) * 4.0


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 10),
    "no bias": lambda: nn.Linear(6, 10, bias=False),
    "transformers Conv1D": lambda: Conv1D(10, 6),
    "embedding": lambda: nn.Embedding(7, 6, padding_idx=1),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2),
    "grouped": lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2),
    "circular": lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
    "conv2d": lambda: nn.Conv2d(3, 5, (3, 2), padding=(1, 0), dilation=(2, 1)),
    "grouped 2d": lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False),
    "conv3d": lambda: nn.Conv3d(2, 4, (1, 2, 3)),
    "untraceable": lambda: Untraceable(6, 10),
    "moody": lambda: Moody(6, 10),
    "scaled": lambda: Scaled(6, 10),
    "scaled embedding": lambda: ScaledWords(7, 6),
}
EVERY = pytest.mark.parametrize("name", MODULES)


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A module with random weights, biases too, and an input for it."""
    torch.manual_seed(1)
    module = MODULES[name]().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if isinstance(module, nn.Embedding):
        return module, torch.tensor([[1, 5, 2], [0, 6, 3]])
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module, torch.randn(2, module.in_channels, *(6 for _ in module.kernel_size))
    return module, torch.randn(2, 3, 6).abs()


def adapt(module: nn.Module, *names: str) -> None:
    """Give a module adapters of these names, ``mine`` by default, as fxpeft lays them out."""
    kind = kind_of(module)
    holder, rewrites = Container(), []
    for seed, name in enumerate(names or ("mine",)):
        rewrite, part = lora(kind, name, seed=seed), Container()
        for path, value in rewrite.operands.items():
            leaf = path.rpartition(".")[2]
            if isinstance(value, nn.Parameter):
                part.register_parameter(leaf, value)
            else:
                part.register_buffer(leaf, value, persistent=False)
        holder.add_module(name, part)
        rewrites.append(rewrite)
    module.add_module("adapters", holder)
    rewrite_module(module, rewrites, name="the.site")


def update(module: nn.Module, x: Tensor, name: str = "mine") -> Tensor:
    """``1.75 B A x`` written out."""
    part = module.get_submodule(f"adapters.{name}")
    a, b = part.get_parameter("a"), part.get_parameter("b")
    if isinstance(module, nn.Embedding):
        return 1.75 * a.t()[x] @ b.t()
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 1.75 * x @ (b @ a).t()
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    low = convolve(x, a, None, module.stride, module.padding, module.dilation)
    groups = module.groups
    blocks = low.reshape(len(x), groups, a.shape[0] // groups, -1)
    y = torch.einsum("ngrs,gor->ngos", blocks, b.reshape(groups, b.shape[0] // groups, -1))
    return 1.75 * y.reshape(len(x), b.shape[0], *low.shape[2:])


@EVERY
def test_computes_the_formula(name: str) -> None:
    module, x = make(name)
    bare = module(x).detach()
    adapt(module)
    inside = {"scaled": 3.0, "scaled embedding": 4.0}.get(name, 1.0)
    wanted = bare + inside * update(module, x)
    assert float((wanted - bare).detach().abs().max()) > 0.1
    assert_close(module(x), wanted)
    module(x).sum().backward()
    for operand in ("a", "b"):
        assert float(module.get_parameter(f"adapters.mine.{operand}").grad.abs().max()) > 0


@EVERY
def test_unbind_restores_the_module(name: str) -> None:
    module, x = make(name)
    cls, attributes, bare = type(module), list(vars(module)), module(x)
    keys = list(module.state_dict())
    adapt(module)
    assert is_bound(module)
    assert isinstance(module, cls)
    assert base_class(module) is cls
    assert [k for k in module.state_dict() if not k.startswith("adapters.")] == keys
    unbind(module)
    del module.adapters
    assert type(module) is cls
    assert not is_bound(module)
    assert list(vars(module)) == attributes
    assert list(module.state_dict()) == keys
    assert torch.equal(module(x), bare)
    unbind(module)  # and once more does nothing
    assert type(module) is cls


@EVERY
def test_binding_again_replaces(name: str) -> None:
    module, x = make(name)
    adapt(module)
    first = module(x)
    adapt(module, "mine", "other")
    inside = {"scaled": 3.0, "scaled embedding": 4.0}.get(name, 1.0)
    assert_close(module(x), first + inside * update(module, x, "other"))


@EVERY
def test_a_deep_copy_is_its_own(name: str) -> None:
    module, x = make(name)
    adapt(module)
    twin = copy.deepcopy(module)
    output = module(x)
    assert type(twin) is type(module)
    assert torch.equal(twin(x), output)
    with torch.no_grad():
        twin.get_parameter("adapters.mine.b").zero_()
    assert torch.equal(module(x), output)
    assert not torch.allclose(twin(x), output)


@EVERY
def test_pickles(name: str) -> None:
    module, x = make(name)
    adapt(module)
    twin = pickle.loads(pickle.dumps(module))
    assert type(twin) is type(module)
    assert torch.equal(twin(x), module(x))
    unbind(twin)
    assert type(twin) is base_class(module)


def test_loads_in_a_fresh_process(tmp_path: Path) -> None:
    """Classes that a fresh process can import: all modules but the ones defined in this file."""
    saved = {}
    for name in MODULES:
        module, x = make(name)
        if type(module).__module__ == __name__:
            continue
        adapt(module)
        saved[name] = (nn.Sequential(module), x, module(x).detach())
    torch.save(saved, tmp_path / "saved.pt")
    script = (
        "import sys, torch\n"
        "torch.set_num_threads(2)\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "for name, (module, x, wanted) in saved.items():\n"
        "    torch.testing.assert_close(module(x), wanted, rtol=0, atol=1e-6)\n"
        "    assert type(module[0]).__name__.startswith('Adapted'), name\n"
        "print(len(saved))\n"
    )
    result = python("-c", script, tmp_path / "saved.pt", cwd=tmp_path)
    assert (result.returncode, result.stdout.strip()) == (0, str(len(saved))), result.stderr
    assert len(saved) == 10


def test_sites_of_one_kind_share_one_class() -> None:
    modules = [nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(4, 3)]
    for module in modules:
        adapt(module)
    assert len({type(m) for m in modules}) == 1
    other = nn.Linear(6, 10)
    adapt(other, "another")
    assert type(other) is not type(modules[0])
    scaled = Scaled(6, 10)
    adapt(scaled)
    assert issubclass(type(scaled), Scaled)


def test_the_source_can_be_read() -> None:
    module = nn.Linear(6, 10)
    adapt(module)
    source = generated_source(module)
    compile(source, "generated", "exec")
    assert "adapters" in source
    assert "def forward(self, input" in source


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(6, 10), Linear(6, 10)),
        (Conv1D(10, 6), Linear(6, 10)),
        (Untraceable(6, 10), Linear(6, 10)),
        (nn.Conv2d(4, 6, (3, 1), groups=2), Conv(4, 6, (3, 1), (1, 1), (0, 0), (1, 1), 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds(module: nn.Module, kind: Linear | Conv) -> None:
    assert kind_of(module) == kind
    assert isinstance(kind_of(nn.Embedding(7, 6)), Embedding)


@pytest.mark.parametrize(
    "module",
    [
        nn.ModuleList([nn.Linear(2, 3)]), nn.ModuleDict(), nn.Sequential(nn.Linear(2, 3)), nn.LayerNorm(3), nn.ReLU(),
        nn.ConvTranspose1d(2, 3, 1), nn.Module(), nn.MultiheadAttention(4, 2), nn.Sequential(),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_what_is_no_target_says_so(module: nn.Module) -> None:
    cls = type(module)
    with pytest.raises(PassError, match=rf"{cls.__name__} is no kind of target: expected linear, embedding"):
        trace_module(module)
    with pytest.raises(PassError, match=rf"a\.b: {cls.__name__} is no kind of target"):
        rewrite_module(module, [lora(Linear(2, 3))], name="a.b")
    assert type(module) is cls


def test_redirects_need_no_target() -> None:
    module, x = nn.LayerNorm(6), torch.randn(2, 6)
    bias = nn.Parameter(torch.randn(6))
    module.adapters = Container()
    module.adapters.register_parameter("bias", bias)
    rewrite_module(module, [], name="norm", redirects={"bias": ("bias", bias)})
    assert_close(module(x), F.layer_norm(x, (6,), module.weight, bias), terms=1)


def test_a_redirect_of_what_is_not_read_names_the_site() -> None:
    module = Untraceable(6, 10)
    redirects = {"bias": ("mine.bias", nn.Parameter(torch.zeros(10)))}
    with pytest.raises(PassError, match=r"a\.site: .*"):
        rewrite_module(module, [lora(Linear(6, 10))], name="a.site", redirects=redirects)
    assert type(module) is Untraceable


def test_another_module_answers() -> None:
    module, x = nn.Linear(6, 10), torch.randn(2, 6)
    holder = Container()
    holder.add_module("mine", nn.Linear(6, 4))
    module.add_module("adapters", holder)
    replace_module(module, "adapters.mine")
    assert torch.equal(module(x), holder.get_submodule("mine")(x))
    bare = bare_copy(module)
    assert type(bare) is nn.Linear
    assert list(bare.state_dict()) == ["weight", "bias"]
    unbind(module)
    assert torch.equal(module(x), bare(x))
