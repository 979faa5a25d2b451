"""Swaps and forwards on an accelerator: a swap writes on a stream of its own, in order with whoever reads.

The swap lock orders what threads enqueue; devices run it later. So a swap's writes wait for all that the streams were
given on which the model ran since the last one, and the next forward on each stream waits for the writes. What
comes from the host goes to the device beside the forwards that are under way; only the writes to slots wait.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fxpeft.passes.torch_private import skip_frame

ACCELERATORS = ("cuda", "xpu")  # whose work is asynchronous, in streams with events, and reads pinned memory


class Streams:
    """What is asked of torch."""

    def current(self, device: torch.device) -> Any:
        """The stream that this thread enqueues on."""
        return torch.accelerator.current_stream(device)

    def make(self, device: torch.device) -> Any:
        """A new stream."""
        return torch.Stream(device)

    def capturing(self, device: torch.device) -> bool:
        """Whether what this thread enqueues becomes a CUDA graph: to wait for events from outside would break it."""
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class StreamOrder:
    """Reads and writes of one model's slots, in the order of its swap lock.

    Args:
        devices: where the slots are.

    ``readers`` are the streams whose work comes after the last write, and perhaps before the next.
    """

    def __init__(self, devices: Collection[torch.device], streams: Streams | None = None) -> None:
        self.devices, self.streams = tuple(devices), streams or Streams()
        self.readers: dict[tuple[torch.device, int], Any] = {}
        self.written: dict[torch.device, Any] = {}
        self.own: dict[torch.device, Any] = {}

    def before_read(self) -> None:
        """Let this thread's streams wait for the last write, once each. Part of a forward that holds the lock.

        A forward that is captured reads nothing yet: whoever replays a graph without calling the model holds it.
        """
        for device in self.devices:
            if self.streams.capturing(device):
                continue
            stream = self.streams.current(device)
            key = device, stream.stream_id
            if key not in self.readers:
                if (event := self.written.get(device)) is not None:
                    stream.wait_event(event)
                self.readers[key] = stream

    @contextmanager
    def writing(self) -> Iterator[Callable[[], None]]:
        """What is enqueued inside goes to streams of its own; all later work of this thread's streams comes after it.

        Yields a function to call before the first write: from there on it comes after all reads, and after what this
        thread enqueued before.
        """
        if any(map(self.streams.capturing, self.devices)):
            yield lambda: None
            return
        callers = {device: self.streams.current(device) for device in self.devices}
        for device in self.devices:
            if device not in self.own:
                self.own[device] = self.streams.make(device)

        def ready() -> None:
            for device, own in self.own.items():
                own.wait_stream(callers[device])
            for (device, _), stream in tuple(self.readers.items()):
                self.own[device].wait_stream(stream)

        with ExitStack() as stack:
            for own in self.own.values():
                stack.enter_context(own)
            yield ready
            for device, own in self.own.items():
                self.written[device] = own.record_event()
        readers = {}
        for device, caller in callers.items():
            caller.wait_event(self.written[device])  # what it frees or writes next may have been read here
            readers[device, caller.stream_id] = caller
        self.readers = readers


skip_frame(StreamOrder.before_read, deep=True)  # Dynamo begins behind it
