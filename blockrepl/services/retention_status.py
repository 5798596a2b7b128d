"""What retention keeps of a group, what will go next and when, and how long the room lasts.

From a replica's files, so that it can be told of a receiver that does not run as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from blockrepl.errors import StateError
from blockrepl.model.retention import ALL, Kept, Ladder, check_change
from blockrepl.model.retention_room import Level, Outlook, Room, outlook
from blockrepl.storage.catalog import Catalog, SegmentRow
from blockrepl.storage.forks import all_pins
from blockrepl.storage.retained import Policy, read_kept, read_policy
from blockrepl.units import NANOSECONDS_PER_SECOND, format_bytes, format_instant

HOUR_NS = 3600 * NANOSECONDS_PER_SECOND
DAY_NS = 24 * HOUR_NS
NAMES_TOLD = 5  # of checkpoints, in an error of one line
PINS_TOLD = 50  # in `status`, which is a message to the sources, too


class StretchStatus(BaseModel):
    """History in [from, to]; ``step_seconds`` 0: every write."""

    from_ns: int
    to_ns: int
    step_seconds: float
    journal_bytes: int


class PinStatus(BaseModel):
    what: str
    first_ns: int
    last_ns: int


class Upcoming(BaseModel):
    """Within a day from now, this much of history becomes coarser, or goes."""

    what: str  # thin, fold
    from_ns: int
    to_ns: int
    step_seconds: float
    held_by: list[str]


class RetentionStatus(BaseModel):
    """``level`` is a warning, or an error, before history cannot be as long as promised
    (model/retention_room.py); ``reason`` says why it is.
    """

    group: str
    policy: Policy
    floor: str | None
    floor_ns: int | None
    latest: str | None
    latest_ns: int | None
    stretches: list[StretchStatus]
    pins: list[PinStatus]
    upcoming: list[Upcoming]
    journal_bytes: int
    free_bytes: int
    bytes_per_day: int
    days_left: float | None  # None: nothing was written in the last day
    promised_seconds: float  # of history with every write that nothing may shorten
    held_seconds: float | None
    promise_days_left: float | None  # None: the promise can be kept for good
    level: Level
    reason: str = ""
    problem: str = ""


class HistoryOutlook(BaseModel):
    """What `status` says of it, with the PINS_TOLD oldest pins."""

    level: Level
    reason: str
    promised_seconds: float
    held_seconds: float | None
    pins: list[PinStatus]
    pin_count: int
    free_bytes: int
    bytes_per_day: int
    days_left: float | None
    promise_days_left: float | None

    @classmethod
    def of(cls, status: RetentionStatus) -> HistoryOutlook:
        told = status.model_dump() | {
            "pins": status.pins[:PINS_TOLD],
            "pin_count": len(status.pins),
        }
        return cls.model_validate({name: told[name] for name in cls.model_fields})


def describe_retention(
    directory: Path,
    catalog: Catalog,
    rows: Sequence[SegmentRow],
    latest_ns: int,
    problem: str = "",
    policy: Policy | None = None,
) -> RetentionStatus:
    """The state of a group's retention, or what it were with another ``policy``. Blocks.

    ``rows`` and ``latest_ns``: as `Replica.segments` and `Replica.newest_ns` have them, for age is
    measured from there. StorageError.
    """
    policy = policy or read_policy(catalog)
    kept = read_kept(catalog)
    floors = [row.ready_ns for row in catalog.disks(removed=True) if row.ready_ns is not None]
    floor_ns = min(floors, default=None)
    pins = [
        PinStatus(what=pin.what, first_ns=pin.first_ns, last_ns=pin.last_ns)
        for pin in all_pins(directory, time.time_ns())
    ]
    pins += [
        PinStatus(what=f"checkpoint {one.name}", first_ns=one.at_ns, last_ns=one.at_ns)
        for one in catalog.checkpoints()
        if one.kept
    ]
    place = os.statvfs(directory)
    free_bytes = place.f_bavail * place.f_frsize
    per_day = _bytes_per_day(rows, floor_ns, latest_ns)
    room_bytes = max(0, free_bytes - policy.free_bytes)
    seen = outlook(_room(policy, rows, pins, latest_ns, per_day, free_bytes))
    has_history = floor_ns is not None and latest_ns >= floor_ns
    return RetentionStatus(
        group=catalog.group_name,
        policy=policy,
        floor=format_instant(floor_ns) if floor_ns is not None else None,
        floor_ns=floor_ns,
        latest=format_instant(latest_ns) if has_history else None,
        latest_ns=latest_ns if has_history else None,
        stretches=_stretches(kept, rows, floor_ns, latest_ns) if has_history else [],
        pins=sorted(pins, key=lambda pin: pin.first_ns),
        upcoming=_upcoming(policy.rungs(), kept, pins, floor_ns, latest_ns, DAY_NS)
        if floor_ns is not None
        else [],
        journal_bytes=sum(row.bytes for row in rows),
        free_bytes=free_bytes,
        bytes_per_day=per_day,
        days_left=room_bytes / per_day if per_day else None,
        promised_seconds=policy.promised_ns() / NANOSECONDS_PER_SECOND,
        held_seconds=(latest_ns - floor_ns) / NANOSECONDS_PER_SECOND
        if floor_ns is not None and has_history
        else None,
        promise_days_left=seen.days,
        level="error" if problem else seen.level,
        reason=problem or _reason(seen, per_day),
        problem=problem,
    )


def _bytes_per_day(rows: Sequence[SegmentRow], floor_ns: int | None, latest_ns: int) -> int:
    """Of the last day. A history that is younger counts for as long as it is, or an hour."""
    begin_ns = max(latest_ns - DAY_NS, min(floor_ns or 0, latest_ns - HOUR_NS))
    written = sum(row.bytes for row in rows if row.last_stamp > begin_ns)
    return round(written * DAY_NS / (latest_ns - begin_ns))


def _room(
    policy: Policy,
    rows: Sequence[SegmentRow],
    pins: list[PinStatus],
    latest_ns: int,
    per_day: int,
    free_bytes: int,
) -> Room:
    promised_from_ns = latest_ns - policy.promised_ns()
    held_from_ns = min([promised_from_ns, *(pin.first_ns for pin in pins)])
    held = [row for row in rows if row.last_stamp > held_from_ns or not row.sealed]
    return Room(
        journal_bytes=sum(row.bytes for row in rows),
        held_bytes=sum(row.bytes for row in held),
        pinned_bytes=sum(row.bytes for row in held if row.last_stamp <= promised_from_ns),
        bytes_per_day=per_day,
        promised_days=policy.promised_ns() / DAY_NS,
        free_bytes=free_bytes - policy.free_bytes,
        has_min_free=policy.free_bytes > 0,
        size_limit_bytes=policy.size_bytes,
    )


def _reason(seen: Outlook, per_day: int) -> str:
    if seen.level == "ok" or seen.days is None:
        return ""
    rate = f"at today's rate, {format_bytes(per_day)} a day,"
    if seen.needed_bytes is None or seen.capacity_bytes is None:
        return f"{rate} the file system is full in {seen.days:.1f} days: nothing is taken then"
    return (
        f"{rate} the history that is promised takes {format_bytes(seen.needed_bytes)}, and there "
        f"is room for {format_bytes(seen.capacity_bytes)}: it is used up in {seen.days:.1f} days, "
        "and nothing is taken then"
    )


def _stretches(
    kept: Kept, rows: Sequence[SegmentRow], floor_ns: int | None, latest_ns: int
) -> list[StretchStatus]:
    bounds = [(one.from_ns, one.to_ns, one.step_ns) for one in kept.stretches]
    begin = bounds[-1][1] if bounds else floor_ns or 0
    bounds.append((begin, latest_ns, ALL))
    return [
        StretchStatus(
            from_ns=first,
            to_ns=last,
            step_seconds=step_ns / NANOSECONDS_PER_SECOND,
            journal_bytes=sum(
                row.bytes for row in rows if first < min(row.last_stamp, latest_ns) <= last
            ),
        )
        for first, last, step_ns in bounds
    ]


def check_policy(catalog: Catalog, policy: Policy) -> None:
    """UsageError when it does not parse, or contradicts itself or what is kept already. Blocks."""
    policy.promised_ns()
    check_change(policy.rungs(), read_kept(catalog))


def check_shortening(catalog: Catalog, status: RetentionStatus, wanted: Policy) -> None:
    """Refuse a policy that lets go of history at once that the present one keeps. StateError.

    Blocks. Of limits of room it is expected: they are not looked at.
    """
    if status.floor_ns is None or status.latest_ns is None:
        return
    kept, floor_ns, latest_ns = read_kept(catalog), status.floor_ns, status.latest_ns
    due, goes = (
        _upcoming(policy.rungs(), kept, status.pins, floor_ns, latest_ns, 0)
        for policy in (status.policy, wanted)
    )
    goes = [one for one in goes if one not in due]
    if not goes:
        return
    parts = [
        f"from {format_instant(one.from_ns)} to {format_instant(one.to_ns)} "
        + ("nothing" if one.what == "fold" else f"only a point every {one.step_seconds:g} s")
        + " stays"
        for one in goes
    ]
    names = [one.name for one in catalog.checkpoints() if not one.kept and _goes(one.at_ns, goes)]
    if len(names) == 1:
        parts.append(f"the checkpoint {names[0]} goes too")
    elif names:
        rest = len(names) - NAMES_TOLD
        told, last = (names[:NAMES_TOLD], f"{rest} more") if rest > 0 else (names[:-1], names[-1])
        parts.append(f"the checkpoints {', '.join(told)} and {last} go too")
    raise StateError(
        f"that ladder lets go of history that is there now: {'; '.join(parts)}",
        hint="add --shorten if that is what you want",
        code="shortens",
    )


def _goes(at_ns: int, goes: list[Upcoming]) -> bool:
    return any(
        one.from_ns < at_ns <= one.to_ns
        and (one.what == "fold" or at_ns % round(one.step_seconds * NANOSECONDS_PER_SECOND))
        for one in goes
    )


def _upcoming(
    ladder: Ladder,
    kept: Kept,
    pins: list[PinStatus],
    floor_ns: int,
    latest_ns: int,
    ahead_ns: int,
) -> list[Upcoming]:
    """What so much more of history changes."""
    later_ns = latest_ns + ahead_ns
    found = []
    floor_then = ladder.floor(later_ns)
    if floor_then > floor_ns:
        found.append(("fold", floor_ns, floor_then, 0.0))
    for one in ladder.stretches(later_ns):
        done = max((old.to_ns for old in kept.stretches if old.step_ns >= one.step_ns), default=0)
        begin = max(one.from_ns, done, floor_ns)
        end = min(one.to_ns, latest_ns)
        if end > begin:
            found.append(("thin", begin, end, one.step_ns / NANOSECONDS_PER_SECOND))
    return [
        Upcoming(
            what=what,
            from_ns=first,
            to_ns=last,
            step_seconds=step,
            held_by=list(
                dict.fromkeys(
                    pin.what for pin in pins if pin.first_ns <= last and pin.last_ns >= first
                )
            ),
        )
        for what, first, last, step in found
    ]
