"""Which fork a mount or an NBD server writes to: an old one, a new one, one for this time only."""

from __future__ import annotations

import time
from dataclasses import dataclass

from blockrepl.errors import StateError, UsageError
from blockrepl.limits import FORK_BLOCK_BYTES
from blockrepl.model import points
from blockrepl.model.points import Instant, Point, Resolved
from blockrepl.storage import forks
from blockrepl.storage.forks import OpenFork
from blockrepl.storage.history import ReplicaHistory
from blockrepl.units import NANOSECONDS_PER_SECOND, format_instant


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for. ``fork``: a name; the other two are for one that is made."""

    at: str | None = None
    writable: bool = False
    fork: str | None = None
    size_limit_bytes: int | None = None
    expires_seconds: float | None = None

    def __post_init__(self) -> None:
        makes = self.writable or self.fork is not None
        if (self.size_limit_bytes is not None or self.expires_seconds is not None) and not makes:
            raise UsageError(
                "a limit is a fork's", hint="add --writable, or --fork NAME to keep what is written"
            )
        if self.size_limit_bytes is not None and self.size_limit_bytes < FORK_BLOCK_BYTES:
            raise UsageError(
                f"a fork of at most {self.size_limit_bytes} bytes could not be written to",
                hint="give more to --size-limit, or leave it out for no limit",
            )
        if self.writable and self.fork is None and self.at is None:
            raise UsageError(
                "--writable needs to know of which instant",
                hint="add --at POINT, or --fork NAME to go on with a fork",
            )

    @property
    def is_fork(self) -> bool:
        return self.writable or self.fork is not None

    def arguments(self) -> list[str]:
        """The options of a command line that ask for the same."""
        options = [
            ("at", self.at),
            ("fork", self.fork),
            ("size-limit", self.size_limit_bytes),
            ("expires", None if self.expires_seconds is None else f"{int(self.expires_seconds)}s"),
        ]
        found = [f"--{name}={value}" for name, value in options if value is not None]
        return [*found, *(["--writable"] if self.writable else [])]


def resolve(history: ReplicaHistory, at: str) -> Resolved:
    """PointError, UsageError."""
    return history.resolve(points.parse(at), time.time_ns())


def create(history: ReplicaHistory, wanted: Wanted) -> tuple[OpenFork, Resolved]:
    """Make the fork that is wanted, and open it."""
    if wanted.at is None:
        raise UsageError(
            f"there is no fork {wanted.fork} yet", hint="add --at POINT to make it of that instant"
        )
    resolved = resolve(history, wanted.at)
    expires_ns = None
    if wanted.expires_seconds is not None:
        expires_ns = time.time_ns() + int(wanted.expires_seconds * NANOSECONDS_PER_SECOND)
    opened = forks.create(
        history,
        wanted.fork,
        resolved.at_ns,
        size_limit_bytes=wanted.size_limit_bytes,
        expires_ns=expires_ns,
    )
    return opened, resolved


def open_wanted(history: ReplicaHistory, wanted: Wanted) -> tuple[OpenFork, Resolved]:
    """Open the fork that is wanted; one that is not there is made. StateError, PointError."""
    if wanted.fork is None:
        return create(history, wanted)
    try:
        opened = forks.open_fork(history.directory, history.group, wanted.fork, time.time_ns())
    except StateError as error:
        if error.code != "no-fork" or wanted.at is None:
            raise
        return create(history, wanted)
    try:
        return opened, _still_there(history, opened, wanted)
    except BaseException:
        opened.close()
        raise


def _still_there(history: ReplicaHistory, opened: OpenFork, wanted: Wanted) -> Resolved:
    fork = opened.fork
    if wanted.size_limit_bytes is not None or wanted.expires_seconds is not None:
        raise UsageError(
            f"fork {fork.name} has its limits already", hint="leave --size-limit and --expires out"
        )
    if wanted.at is not None and (asked := resolve(history, wanted.at)).at_ns != fork.at_ns:
        raise StateError(
            f"fork {fork.name} is of {format_instant(fork.at_ns)}, "
            f"not of {format_instant(asked.at_ns)}",
            hint="leave --at out to go on with it, or give another name",
            code="other-instant",
        )
    text = f"fork {fork.name}"
    point = Point(text, Instant(fork.at_ns))
    return history.resolve(point, time.time_ns())
