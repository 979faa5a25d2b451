"""The passes of the backend by name, in the order in which they run: another one is a file beside this and a line."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fxpeft.passes.backend.backend_pass import ACTIVE, IDLE, BackendPass
from fxpeft.passes.backend.clean import CleanPass
from fxpeft.passes.backend.fold_inactive import FoldInactivePass
from fxpeft.passes.backend.group import GroupPass
from fxpeft.passes.base import PassError

BUILT_IN: tuple[type[BackendPass], ...] = (
    FoldInactivePass,
    GroupPass,
    CleanPass,
)
NAMES = tuple(each.name for each in BUILT_IN)


def chosen(passes: Collection[str | BackendPass]) -> tuple[BackendPass, ...]:
    """The passes that are named or given.

    Named ones run in the registry's order, in whichever they are named; your own run where they stand among them.

    Raises:
        PassError: an unknown name, or what is no pass.
    """
    own = [each for each in passes if isinstance(each, BackendPass)]
    unknown = [each for each in passes if not isinstance(each, BackendPass) and each not in NAMES]
    if isinstance(passes, str) or unknown:
        raise PassError(
            f"passes: expected some of {', '.join(NAMES)}, found {passes!r}; a pass of your own is an object of a "
            "class below fxpeft.passes.BackendPass"
        )
    for each in own:
        name = getattr(each, "name", None)
        if not isinstance(name, str) or not name.isidentifier() or name in NAMES:
            raise PassError(
                f"passes: {type(each).__name__}.name: expected an identifier other than {', '.join(NAMES)}, "
                f"found {name!r}"
            )
        if not isinstance(each.uuid, str | bytes | None):
            raise PassError(f"passes: {each.name}.uuid: expected text, bytes or None, found {type(each.uuid).__name__}")
        if not set(each.graphs) <= {IDLE, ACTIVE} or not each.graphs:
            raise PassError(f"passes: {each.name}.graphs: expected some of {IDLE}, {ACTIVE}, found {each.graphs!r}")
    if own and not isinstance(passes, Sequence):
        raise PassError(f"passes: expected a sequence, for yours run where they stand, found a {type(passes).__name__}")
    named = (made() for made in BUILT_IN if made.name in [each for each in passes if isinstance(each, str)])
    places = (each if isinstance(each, BackendPass) else next(named, None) for each in passes)
    return tuple(each for each in places if each is not None)
