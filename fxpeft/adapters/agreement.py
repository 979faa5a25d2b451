"""What several processes do to a model that they hold in parts, or to files that one of them writes: all of it or none.

Every process calls the same function. Where one fails, each of the others raises an error that says why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxpeft.checkpoint import Checkpoint
from fxpeft.errors import AdapterError, clipped, listing
from fxpeft.model.placement import ZERO
from fxpeft.passes.torch_private import FSDP

Group = Any  # a process group; None: all processes


class Agreement:
    """One change that processes make in steps, and take no step further where one of them failed.

    Args:
        groups: every process hears of every other through one after the other; none: there are no others.
        failed: begins the error of those that did not fail.
    """

    def __init__(self, groups: Sequence[Group], failed: str) -> None:
        self.groups, self.failed = groups, failed

    def step(self, found: Checkpoint | None = None, *, last: bool = False) -> None:
        """Wait for the others to come as far.

        Args:
            found: what each of them has to have read alike: what they gather on the way depends on it.
            last: no step comes after it.

        Raises:
            AdapterError: another process failed, or read something else.
        """
        if not self.groups:
            return
        heard = self._tell("", "" if found is None else _content(found))
        if last:
            self.groups = ()
        me = dist.get_rank()
        reasons = [f"process {rank}: {why}" for rank, (why, _) in heard.items() if why]
        if not reasons:
            reasons = [f"process {rank} read another adapter" for rank, own in heard.items() if own != heard[me]]
        if reasons:
            self.groups = ()
            raise AdapterError(f"{self.failed}:\n{listing(reasons)}")

    def fail(self, error: BaseException) -> None:
        """Tell the others, who wait at their next step."""
        if self.groups:
            self._tell(clipped(f"{type(error).__name__}: {error}"), "")
            self.groups = ()

    def _tell(self, why: str, content: str) -> dict[int, tuple[str, str]]:
        """What all processes say: rank -> why it failed, if it did, and what it read."""
        groups, self.groups = self.groups, ()  # where this raises, nobody hears anything more
        heard = {dist.get_rank(): (why, content)}
        for group in groups:
            each: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(each, heard, group=group)
            heard = {rank: said for part in each for rank, said in part.items()}
        self.groups = groups
        return dict(sorted(heard.items()))


@contextmanager
def agreed(groups: Sequence[Group], failed: str) -> Iterator[Agreement]:
    """A block that is done by all processes or by none: an error before the last step is told to the others."""
    agreement = Agreement(groups, failed)
    try:
        yield agreement
    except BaseException as error:
        agreement.fail(error)
        raise


def change_of_parts(model: nn.Module) -> Any:
    """:func:`agreed` for a change of a model's adapters, by the processes that hold parts of it."""
    return agreed(holders(model), "another process failed, so nothing was changed here")


@contextmanager
def written(*, together: bool) -> Iterator[bool]:
    """A block in which files are written, as a rule by the first process alone; yields whether this is that one.

    Args:
        together: all processes are here, having gathered what is written. At the block's end it is written for each.

    Raises:
        AdapterError: another process could not write.
    """
    groups = [None] if together and in_group() else []
    with agreed(groups, "another process failed to write") as agreement:
        yield not groups or dist.get_rank() == 0
        agreement.step(last=True)


def in_group() -> bool:
    """Whether this process is one of several that torch knows of."""
    return dist.is_available() and dist.is_initialized()


def holders(model: nn.Module) -> Sequence[Group]:
    """The groups of processes that hold parts of a model (FSDP, ZeRO-3, tensor parallelism); none: it is whole here."""
    if not in_group() or dist.get_world_size() == 1:
        return []
    parameters = list(model.parameters())
    mesh = next((mesh for p in parameters if (mesh := getattr(p, "device_mesh", None)) is not None), None)
    if mesh is not None:
        return mesh.get_all_groups()  # type: ignore[no-any-return]
    managed = any(hasattr(p, ZERO) for p in parameters) or any(FSDP in vars(module) for module in model.modules())
    return [None] if managed else []


def _content(found: Checkpoint) -> str:
    """A hash of a checkpoint's config and tensors."""
    config = {name: sorted(v) if isinstance(v, set) else v for name, v in found.config.to_dict().items()}
    digest = hashlib.blake2b(repr(sorted(config.items())).encode())
    for key, tensor in sorted(found.tensors.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
