"""The order of swaps and forwards on a device, on streams and events that only write down what they are told."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from swapping import NAMES, X, close, lock_of, prepared
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxpeft
from fxpeft.adapters.state import state_of
from fxpeft.passes.slots.copies import Copies
from fxpeft.passes.slots.room import lay_out
from fxpeft.serving import swap
from fxpeft.serving.staging import StreamOrder, Streams
from fxpeft.serving.swap import Serving, serving_of

CPU, META = torch.device("cpu"), torch.device("meta")


class FakeStream:
    """A queue: what was enqueued on it, and what it waited for."""

    def __init__(self, device: FakeDevice, number: int) -> None:
        self.device, self.stream_id, self.log = device, number, list[Any]()

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: tuple[FakeStream, int]) -> None:
        assert not self.device.graph, "it would break the capture"
        self.log.append(("wait", event))

    def record_event(self) -> tuple[FakeStream, int]:
        return self, len(self.log)

    def __enter__(self) -> FakeStream:
        self.device.stack.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        assert self.device.stack.pop() is self

    def done(self) -> list[str]:
        """What has certainly run before what is enqueued next."""
        reached: dict[FakeStream, int] = {}
        ahead = [(self, len(self.log))]
        while ahead:
            stream, place = ahead.pop()
            start, reached[stream] = reached.get(stream, 0), max(place, reached.get(stream, 0))
            ahead += [entry[1] for entry in stream.log[start:place] if isinstance(entry, tuple)]
        return [entry for stream, place in reached.items() for entry in stream.log[:place] if isinstance(entry, str)]


class FakeDevice(Streams):
    """Streams for one device; ``stack`` ends with the current one."""

    def __init__(self) -> None:
        self.graph = False
        self.streams = list[FakeStream]()
        self.stack = [self.make(CPU)]

    def current(self, device: torch.device) -> FakeStream:
        return self.stack[-1]

    def make(self, device: torch.device) -> FakeStream:
        self.streams.append(FakeStream(self, len(self.streams)))
        return self.streams[-1]

    def capturing(self, device: torch.device) -> bool:
        return self.graph


def test_reads_and_writes_of_many_streams_are_in_order() -> None:
    """Every write comes after all reads before it, every read after the write before it, whatever the streams."""
    device = FakeDevice()
    order, side = StreamOrder([CPU], device), [device.make(CPU) for _ in range(3)]
    main, so_far = device.stack[0], list[str]()
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        stream = [main, *side][int(torch.randint(4, (), generator=generator))]
        with stream:
            if int(torch.randint(3, (), generator=generator)):
                order.before_read()
                read = f"read {number}"
                last = next((n for n in reversed(so_far) if n.startswith("write")), None)
                assert last is None or last in stream.done()
                stream.log.append(read)
                so_far.append(read)
            else:
                with order.writing() as ready:
                    current = device.current(CPU)
                    assert current not in (main, *side)
                    current.log.append(f"transfer {number}")
                    ready()
                    assert set(so_far) <= set(current.done())
                    current.log.append(f"write {number}")
                so_far.append(f"write {number}")
                assert f"write {number}" in stream.done()  # what this thread frees is read no more
    assert len(device.streams) == 5  # one of its own, for ever


def test_the_transfer_waits_for_nobody_and_a_stream_waits_once() -> None:
    device = FakeDevice()
    order, main = StreamOrder([CPU], device), device.stack[0]
    order.before_read()
    main.log.append("read")
    with order.writing() as ready:
        own = device.current(CPU)
        assert own.log == []
        ready()
        assert "read" in own.done()
    waits = len(main.log)
    for _ in range(3):
        order.before_read()
    assert len(main.log) == waits
    other = device.make(CPU)
    with other:
        for _ in range(3):
            order.before_read()
    assert len(other.log) == 1


def test_a_capture_waits_for_no_event_from_outside() -> None:
    device = FakeDevice()
    order, graph = StreamOrder([CPU], device), device.make(CPU)
    with order.writing() as ready:
        ready()
    device.graph = True
    with graph:
        order.before_read()
        with order.writing() as ready:
            assert device.current(CPU) is graph
            ready()
    assert graph.log == []
    device.graph = False
    with graph:  # a replay inside of a hold
        order.before_read()
    assert len(graph.log) == 1


def test_a_write_that_raises_leaves_the_order_to_the_one_that_repairs() -> None:
    device = FakeDevice()
    order, main = StreamOrder([CPU], device), device.stack[0]
    order.before_read()
    main.log.append("read")

    def broken_off() -> None:
        with order.writing() as ready:
            ready()
            device.current(CPU).log.append("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert device.stack == [main]
    with order.writing() as ready:
        ready()
        device.current(CPU).log.append("whole")
    assert set(main.done()) == {"read", "half", "whole"}


@pytest.fixture
def served(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Sequential, FakeDevice]:
    """A prepared model whose CPU passes for a device with streams."""
    device = FakeDevice()
    monkeypatch.setattr(swap, "ACCELERATORS", ("cpu",))
    monkeypatch.setattr(swap, "StreamOrder", lambda devices: StreamOrder(devices, device))
    return prepared(folders), device


def test_swaps_and_forwards_of_a_model_go_by_the_order(
    served: tuple[nn.Sequential, FakeDevice], outputs: dict[str, Tensor]
) -> None:
    model, device = served
    main, own = device.streams[:2]
    for name in NAMES:
        before = len(own.log)
        fxpeft.set_adapter(model, name)
        assert len(own.log) > before
        model[1].up.register_forward_hook(lambda *args: device.current(CPU).log.append("read"))
        assert close(model(X), outputs[name])
        fxpeft.set_adapter(model, name)
        assert own.done().count("read") == main.log.count("read")
    side = device.make(CPU)
    with side:
        assert close(model(X), outputs[NAMES[-1]])
    assert len([entry for entry in side.log if entry != "read"]) == 1
    third = device.make(CPU)
    with fxpeft.hold(model), third:  # it began on another stream
        model(X)
    assert third.log
    assert "read" in third.log
    fxpeft.set_adapter(model, "a")
    assert own.done().count("read") == sum(s.log.count("read") for s in device.streams)


@pytest.mark.parametrize("lanes", [1, 2])
def test_what_an_adapter_brings_is_written_where_its_ranks_are(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device, seen = FakeDevice(), list[FakeStream]()
    monkeypatch.setattr(swap, "ACCELERATORS", ("cpu",))
    monkeypatch.setattr(swap, "StreamOrder", lambda devices: StreamOrder(devices, device))
    shown = swap.show_copies
    monkeypatch.setattr(swap, "show_copies", lambda *args: (seen.append(device.current(CPU)), shown(*args)))
    model: Any = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3)).eval()
    model.dummy_inputs = {"input": torch.zeros(2, 6)}
    fxpeft.prepare_hotswap(model, 4, targets=["0"], modules_to_save=["1"], lanes=lanes)
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    assert len(seen) == (2 if lanes == 1 else 4)  # of rows whose adapters bring none, too
    assert all(stream is device.streams[1] for stream in seen)


@pytest.mark.parametrize("number", [1, 2])
def test_a_failed_swap_leaves_the_old_adapter_and_the_callers_stream(
    number: int, served: tuple[nn.Sequential, FakeDevice], outputs: dict[str, Tensor]
) -> None:
    model, device = served

    class Failing(TorchDispatchMode):
        left = number

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.is_mutable:
                self.left -= 1
                if self.left == 0:
                    raise MemoryError
            return func(*args, **(kwargs or {}))

    with Failing(), pytest.raises(MemoryError):
        fxpeft.set_adapter(model, "b")
    assert device.stack == device.streams[:1]
    assert fxpeft.active_adapters(model) == ["a"]
    assert close(model(X), outputs["a"])


def test_copies_and_pickles_have_an_order_of_their_own(served: tuple[nn.Sequential, FakeDevice]) -> None:
    model, _ = served
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert lock_of(twin).before_read is None
        fxpeft.set_adapter(twin, "b")
        serving = serving_of(state_of(twin))
        assert serving.order not in (None, serving_of(state_of(model)).order)
        assert lock_of(twin).before_read is not None


def test_the_cpu_has_no_order(folders: dict[str, str]) -> None:
    model = prepared(folders)
    serving = serving_of(state_of(model))
    assert isinstance(serving, Serving)
    assert serving.order is None
    assert serving.lock.before_read is None


def test_an_adapter_goes_to_a_device_in_one_transfer_for_each_piece_of_memory() -> None:
    shapes = [(3, 7), (5,), (3, 7), (4, 9), (3, 7)]
    _, sources = lay_out([(shape, torch.float32, CPU) for shape in shapes], align=16)
    places = [torch.zeros(shape, device=META) for shape in shapes]
    copies = Copies(zip(places, sources, strict=True))
    seen: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Calls():
        copies.stage()
    assert [name for name in seen if "copy" in name] == ["_to_copy.default"]
    assert all(source.is_meta and to.shape == source.shape for to, source in copies.arrived)
    seen.clear()
    with Calls():
        copies.run()
    assert [name for name in seen if "copy" in name] == ["_foreach_copy_.default"]
    assert copies.arrived == []
