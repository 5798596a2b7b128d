"""What comes out of a nursery, when it is ours."""

from __future__ import annotations

from blockrepl.errors import BlockreplError, StorageError


def ours_of(group: BaseExceptionGroup[BaseException]) -> BlockreplError:
    """The first of a group of our errors and the system's. Raises the group if there are others.

    For a caller that raises it: what is raised inside ``except*`` comes out in a group again.
    """
    ours, others = group.split((BlockreplError, OSError))
    if ours is None or others is not None:
        raise group
    error: BaseException = ours
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, BlockreplError):
        return error
    return StorageError(str(error), hint="the agent tries again by itself")
