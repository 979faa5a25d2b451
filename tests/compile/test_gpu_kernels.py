"""What Inductor makes of slots for a GPU, without one: fake tensors of a device that answers as an H100 does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._inductor import config as inductor
from torch._inductor.utils import get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fxpeft

MAX_RANK = 16
H100 = SimpleNamespace(
    type="cuda", index=0, name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    total_memory=80 * 2**30, L2_cache_size=50 * 2**20, gcnArchName="", is_integrated=0,
)  # fmt: skip


class Interface(device_interface.CudaInterface):
    """What Inductor asks a GPU."""

    class Worker(device_interface.CudaInterface.Worker):
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: H100)

    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_compute_capability = staticmethod(lambda device=None: 90)
    get_device_properties = staticmethod(lambda device=None: H100)
    get_raw_stream = staticmethod(lambda device=None: 0)
    is_available = staticmethod(lambda: True)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)


def on_gpu(model: nn.Module, mode: FakeTensorMode) -> None:
    """Give every tensor of a model a fake one of a GPU in its place."""
    moved: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and id(tensor) not in moved:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                        moved[id(tensor)] = nn.Parameter(fake, False) if held is module._parameters else fake
                    held[name] = None if tensor is None else moved[id(tensor)]


@contextmanager
def inductor_for_gpu() -> Iterator[None]:
    """Let Inductor generate code for a GPU that torch itself may not have been built for, and may lack Triton for."""
    torch.compile(nn.Linear(3, 4))(torch.ones(2, 3))  # fills Inductor's tables of patterns, with real tensors
    torch._dynamo.reset()
    nothing = mock.Mock(return_value=None)
    with ExitStack() as stack, torch.no_grad():
        device_interface.get_interface_for_device("cpu")
        for target, value in {
            "torch.cuda.get_device_properties": lambda *args: H100,
            "torch.cuda.get_device_capability": lambda *args: (9, 0),
            "torch.cuda.current_device": lambda: 0,
            "torch._inductor.fx_passes.joint_graph.lazy_init": nothing,
            "torch._inductor.fx_passes.post_grad.lazy_init": nothing,
            "torch._inductor.scheduler.has_triton": lambda *args: True,
            "torch.utils._triton.triton_hash_with_backend": lambda *args: "none",
        }.items():
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, {"cuda": Interface}))
        stack.enter_context(inductor.patch(joint_graph_constant_folding=False, fx_graph_cache=False))
        yield
    torch._dynamo.reset()


@pytest.fixture
def mode() -> FakeTensorMode:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: fxpeft.gpu_check asks it")
    return FakeTensorMode()


def two_layers(methods: tuple[str, ...] = ("lora",), **options: Any) -> nn.Module:
    net = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Tanh(), nn.Linear(96, 32)).eval().bfloat16()
    fxpeft.prepare_hotswap(net, MAX_RANK, methods=methods, **options)
    return net


def code_of(net: nn.Module, mode: FakeTensorMode, **options: Any) -> str:
    on_gpu(net, mode)
    with inductor_for_gpu(), mode:
        x = torch.empty(4, 64, device="cuda", dtype=torch.bfloat16)
        (code, *_) = get_code(torch.compile(net, fullgraph=True, **options), x)
    return code


def test_a_slot_is_two_products_of_the_ranks_in_use_and_one_kernel(mode: FakeTensorMode) -> None:
    code = code_of(two_layers(), mode)
    assert "device_str='cuda'" in code
    assert "_cpu(" not in code.partition("class Runner")[2]  # nothing of it runs on the machine
    call = code[code.index("def call(") :]
    rank = re.search(r"(s\d+) = arg\d+_1", call)
    assert rank
    products = re.findall(r"extern_kernels\.(?:mm|addmm)\(.*", call)
    assert len(products) == 6  # the base's, A's and B's, at both sites
    assert sum(f", {rank[1]})" in each or f"({rank[1]}," in each for each in products) == 4
    kernels = re.findall(r"^(triton_\w+) = async_compile", code, re.MULTILINE)
    assert len(kernels) == 2, kernels  # d's, which both sites share, and tanh with the first site's sum
    assert "tl.where" in code  # a rank whose d is zero adds nothing, whatever is in A


def test_gains_and_shifts_are_in_those_kernels(mode: FakeTensorMode) -> None:
    code = code_of(two_layers(("lora", "dora", "ia3", "lora_bias")), mode)
    call = code[code.index("def call(") :]
    assert len(re.findall(r"extern_kernels\.(?:mm|addmm)\(", call)) == 6
    kernels = re.findall(r"(triton_\w+)\.run\(", call)
    assert len(kernels) == 5, kernels  # the first gain; for each site d and the rest, with the next gain in it


def test_what_a_cuda_graph_needs(mode: FakeTensorMode) -> None:
    """Every input but the user's own and the rank lies on the GPU at a place that stays."""
    from torch._inductor import compile_fx

    found: dict[str, Any] = {}
    real = compile_fx._compile_fx_inner

    def inner(graph: Any, inputs: Any, **options: Any) -> Any:
        found.update(inputs=inputs, **options)
        return real(graph, inputs, **options)

    net = two_layers()
    with mock.patch.object(compile_fx, "_compile_fx_inner", inner):
        code_of(net, mode)
    tensors = {n: t for n, t in enumerate(found["inputs"]) if isinstance(t, Tensor)}
    assert len(found["inputs"]) - len(tensors) == 1  # the rank in use, as a number: its carrier is not read
    assert {t.device.type for t in tensors.values()} == {"cuda"}
    moving = tensors.keys() - set(found["static_input_idxs"])
    assert [tuple(tensors[n].shape) for n in moving] == [(4, 64)]  # copied at each replay; the slots are not


class Crossings(TorchDispatchMode):
    """What copies between the machine and the GPU, or waits for the GPU to say a number."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        places = {
            leaf.device.type
            for leaf in torch.utils._pytree.tree_leaves((args, kwargs, result))
            if isinstance(leaf, Tensor)
        }
        self.count += "cuda" in places
        if len(places) > 1 or func is torch.ops.aten._local_scalar_dense.default:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("rank", ["dynamic", "static"])
def test_an_eager_forward_never_waits_for_the_gpu(rank: Any, mode: FakeTensorMode) -> None:
    """So it can be recorded as a CUDA graph, and the machine runs ahead."""
    net = two_layers(("lora", "dora", "ia3", "lora_bias"), rank=rank)
    on_gpu(net, mode)
    with mode, torch.no_grad():
        x = torch.empty(4, 64, device="cuda", dtype=torch.bfloat16)
        with Crossings() as crossings:
            assert net(x).device.type == "cuda"
    assert crossings.count > 20
    assert not crossings.found


def test_the_check_can_fail(mode: FakeTensorMode) -> None:
    with mode, Crossings() as crossings:
        torch.ones(3, device="cuda").to("cpu")
    assert crossings.found == ["aten._to_copy.default"]
