"""Block-diagonal factors, as files hold them: one block below the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxpeft.errors import AdapterError, short
from fxpeft.passes.targets.one_node import one_node


@dataclass
class BdLoraConfig:
    """``use_bdlora`` of a LoRA (BD-LoRA): ``peft.tuners.lora.BdLoraConfig``.

    Args:
        target_modules_bd_a, target_modules_bd_b: parts of the names of sites whose A, or B, is block-diagonal.
        nblocks: in how many blocks. match_strict: refuse sites that neither names.

    Raises:
        AdapterError: a field of another type, or no block.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        for name in ("target_modules_bd_a", "target_modules_bd_b"):
            found = getattr(self, name)
            if found is not None and not (isinstance(found, list | tuple) and all(isinstance(n, str) for n in found)):
                raise AdapterError(f"use_bdlora.{name}: expected parts of names, found {short(found)}")
        if type(self.nblocks) is not int or self.nblocks < 1:
            raise AdapterError(f"use_bdlora.nblocks: expected a positive integer, found {short(self.nblocks)}")

    def blocks(self, site: str) -> tuple[int, int]:
        """Of how many blocks A and B are at a site.

        Raises:
            AdapterError: both are named, or neither though one has to be.
        """
        of_a, of_b = (
            any(part in site for part in named or ()) for named in (self.target_modules_bd_a, self.target_modules_bd_b)
        )
        if of_a and of_b:
            raise AdapterError(f"{site}: use_bdlora: named by target_modules_bd_a and by target_modules_bd_b")
        if self.match_strict and not of_a and not of_b:
            raise AdapterError(
                f"{site}: use_bdlora: named by neither target_modules_bd_a nor target_modules_bd_b; set "
                "match_strict=False for a plain LoRA there"
            )
        return self.nblocks if of_a else 1, self.nblocks if of_b else 1


@one_node
def unblocked(factor: Tensor, blocks: int) -> Tensor:
    """``[rows, columns / blocks]`` to the block-diagonal ``[rows, columns]``."""
    if blocks == 1:
        return factor
    made: Tensor = torch.block_diag(*factor.chunk(blocks))  # type: ignore[no-untyped-call]
    return made
