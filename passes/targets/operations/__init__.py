"""The operations that are targets: a record each, in a file with its kind; ``OPERATIONS`` lists them."""

from fxpeft.passes.targets.kinds import Kind
from fxpeft.passes.targets.operations.conv import Conv
from fxpeft.passes.targets.operations.embedding import Embedding
from fxpeft.passes.targets.operations.linear import Linear
from fxpeft.passes.targets.operations.parameter import ParameterKind
from fxpeft.passes.targets.operations.registry import OPERATIONS, register_operation
from fxpeft.passes.targets.operations.spec import OpSpec, Places

__all__ = [
    "OPERATIONS",
    "Conv",
    "Embedding",
    "Kind",
    "Linear",
    "OpSpec",
    "ParameterKind",
    "Places",
    "register_operation",
]
