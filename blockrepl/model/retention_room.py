"""How long a group's history will be as long as promised, at today's rate. Values only.

==============================  ===================================================================
bound                           what happens at it
==============================  ===================================================================
the file system, no min-free    nothing is taken any more
min-free, max-size              the oldest goes, as far as it is neither promised nor pinned. Then
                                nothing is taken any more
==============================  ===================================================================

Nothing that is promised is ever given up: where the promise cannot be kept, replication stands
still. So that is what the warnings come before. What thinning will make smaller is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WARNING_DAYS = 7.0
ERROR_DAYS = 1.0
Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Room:
    """``held_bytes`` of the journal may not go now; of these ``pinned_bytes`` are pinned only."""

    journal_bytes: int
    held_bytes: int
    pinned_bytes: int
    bytes_per_day: int
    promised_days: float
    free_bytes: int  # of the file system, without what is to be left free
    has_min_free: bool
    size_limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """``days``: until nothing is taken any more; None: it can go on for good.

    Where what is promised is too much: ``needed_bytes`` for it, and ``capacity_bytes`` for them.
    """

    days: float | None
    needed_bytes: int | None = None
    capacity_bytes: int | None = None

    @property
    def level(self) -> Level:
        if self.days is None or self.days >= WARNING_DAYS:
            return "ok"
        return "error" if self.days < ERROR_DAYS else "warning"


def outlook(room: Room) -> Outlook:
    """The nearest of the bounds."""
    if not room.bytes_per_day:
        return Outlook(None)
    found = []
    if not room.has_min_free:
        found.append(Outlook(max(0, room.free_bytes) / room.bytes_per_day))
    else:
        found.append(_with_capacity(room, room.journal_bytes + room.free_bytes))
    if room.size_limit_bytes is not None:
        found.append(_with_capacity(room, room.size_limit_bytes))
    return min(found, key=lambda one: float("inf") if one.days is None else one.days)


def _with_capacity(room: Room, capacity_bytes: int) -> Outlook:
    """At a bound where the oldest goes."""
    needed_bytes = room.pinned_bytes + round(room.bytes_per_day * room.promised_days)
    if needed_bytes <= capacity_bytes:
        return Outlook(None)
    days = max(0, capacity_bytes - room.held_bytes) / room.bytes_per_day
    return Outlook(days, needed_bytes, capacity_bytes)
