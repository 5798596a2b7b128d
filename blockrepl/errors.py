"""The one exception tree.

Every error a user can see has a stable ``code``, an ``exit_status`` (1 failed, 2 wrong usage) and a
``hint`` that says what to do next. The class says whose fault it is:

====================  ==========================================================
class                 whose fault
====================  ==========================================================
UsageError            the caller's: a flag or an argument (exit status 2)
StateError            the user's surroundings: a name taken, a home not initialised
StorageError          a disk's or a file's
DamageError           stored bytes that no longer match their digest
PeerError             the other side's: foreign bytes that do not parse or lie
TrustError            an identity's: token, certificate, revocation, ownership
PointError            a point that cannot be reached; carries the nearest ones that can
====================  ==========================================================

Anything else that escapes is a defect of ours and keeps its traceback in the log.
"""

from __future__ import annotations


class BlockreplError(Exception):
    """Base of all expected failures. ``str(error)`` is one line that says what and why."""

    code = "failed"
    exit_status = 1

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if code is not None:
            self.code = code


def explain(error: BlockreplError) -> str:
    """What and why, and what to do, where there is only one line for it."""
    return f"{error}. {error.hint}".rstrip(". ")


class UsageError(BlockreplError):
    code = "usage"
    exit_status = 2


class StateError(BlockreplError):
    code = "state"


class StorageError(BlockreplError):
    code = "storage"
    segment: int | None = None  # of a journal, that could not be read; where that is known


class DamageError(StorageError):
    """Stored bytes do not match their digest: named by file and offset, never read as zeros."""

    code = "damage"
    offset: int | None = None  # in the file, where that is known


class PeerError(BlockreplError):
    """The only error a parser of foreign bytes raises."""

    code = "protocol"


class TrustError(BlockreplError):
    code = "trust"


class PointError(BlockreplError):
    """A point that cannot be reached. Nearest reachable instants in ns since the epoch, or None."""

    code = "point"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        code: str | None = None,
        nearest_before_ns: int | None = None,
        nearest_after_ns: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.nearest_before_ns = nearest_before_ns
        self.nearest_after_ns = nearest_after_ns
