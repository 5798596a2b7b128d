"""The point grammar: from what a user types to one instant of a group's history.

==========================  ==================================================================
text                        the instant asked for
==========================  ==================================================================
``latest``                  the newest instant that can be reached
``2026-11-22T10:31:07.25Z``  that time; without a zone it is local time; a date alone is midnight
``-90s -5m -2h -1d``        that long before now (also ``ms`` and ``w``; ``-1h30m`` adds up)
``tag:NAME`` or ``NAME``    the checkpoint of that name; words of this table need the ``tag:``
``flush`` or ``@flush``     the last instant at which a guest had flushed all it had written
``POINT~N``                 N records back: the state before the last N records of that point
==========================  ==================================================================

What can be reached is [floor, latest] without the gaps; a gap [from, to) is open at its end:
``to`` is the first instant of the next epoch. An instant that cannot be reached is refused with
its nearest neighbours, never moved silently; so is one that retention has thinned. ``latest`` and
``flush`` name the newest of a kind: they step over a gap.

Distance is resolved minus asked, in seconds: 0 for a time or a name, how old the state is
(negative) for ``latest`` and ``flush``, the way walked back for ``~N``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone, tzinfo

from blockrepl.errors import PointError, UsageError
from blockrepl.limits import NAME_PATTERN
from blockrepl.model.retention import Kept
from blockrepl.units import NANOSECONDS_PER_SECOND, format_instant

RECORDS_BACK_MAX = 10_000_000  # columns are read backwards to count them

_UNITS = {
    "ms": NANOSECONDS_PER_SECOND // 1000,
    "s": NANOSECONDS_PER_SECOND,
    "m": 60 * NANOSECONDS_PER_SECOND,
    "h": 3600 * NANOSECONDS_PER_SECOND,
    "d": 86400 * NANOSECONDS_PER_SECOND,
    "w": 7 * 86400 * NANOSECONDS_PER_SECOND,
}
_STEP = re.compile(r"(\d{1,12})(?:\.(\d{1,9}))?(ms|[smhdw])")
_RELATIVE = re.compile(rf"-(?:{_STEP.pattern})+")
_TIME = re.compile(
    r"(?P<day>\d{4}-\d{2}-\d{2})"
    r"(?:[Tt ](?P<clock>\d{2}:\d{2}(?::\d{2})?)(?:(?<=:\d{2}:\d{2})[.,](?P<fraction>\d{1,9}))?)?"
    r"(?P<zone>[Zz]|[+-]\d{2}:?\d{2})?"
)
_NAME = re.compile(NAME_PATTERN)
_EPOCH_START = datetime(1970, 1, 1, tzinfo=timezone.utc)
NOTHING_YET = "nothing can be reached yet, the first sync is not done"
_GRAMMAR_HINT = (
    "a point is latest, a time (2026-11-22T10:31:07Z), -5m, tag:NAME or flush; ~N goes N records"
    " back"
)


@dataclass(frozen=True, slots=True)
class Latest:
    pass


@dataclass(frozen=True, slots=True)
class Flush:
    pass


@dataclass(frozen=True, slots=True)
class Relative:
    back_ns: int


@dataclass(frozen=True, slots=True)
class Instant:
    at_ns: int


@dataclass(frozen=True, slots=True)
class Tag:
    name: str


@dataclass(frozen=True, slots=True)
class Point:
    """``text`` as typed, what it names, and how many records to go back from there."""

    text: str
    base: Latest | Flush | Relative | Instant | Tag
    records_back: int = 0


@dataclass(frozen=True, slots=True)
class Gap:
    """History missing in [from_ns, to_ns); ``to_ns`` is None while the gap is open."""

    from_ns: int
    to_ns: int | None


@dataclass(frozen=True, slots=True)
class History:
    """What there is of a group. Gaps are ascending and disjoint (see ``union``).

    ``last_flush(t)`` is the stamp of the last guest flush at or before t; ``records_back(t, n)``
    the stamp of the record that is newest once the last n at or before t are left out. None where
    there is none.
    """

    floor_ns: int | None
    latest_ns: int
    gaps: tuple[Gap, ...] = ()
    checkpoints: Mapping[str, int] = field(default_factory=dict)
    last_flush: Callable[[int], int | None] = lambda _at: None
    records_back: Callable[[int, int], int | None] = lambda _at, _count: None
    group: str = ""  # for what is said of it
    kept: Kept = field(default_factory=Kept)  # by retention


@dataclass(frozen=True, slots=True)
class Resolved:
    asked: str
    at_ns: int
    epoch: int
    distance_seconds: float


def union(gaps: Iterable[Gap]) -> tuple[Gap, ...]:
    """The gaps of several disks as one ascending, disjoint series."""
    merged: list[Gap] = []
    for gap in sorted(gaps, key=lambda gap: gap.from_ns):
        if gap.to_ns is not None and gap.to_ns <= gap.from_ns:
            continue
        last = merged[-1] if merged else None
        if last is None or (last.to_ns is not None and last.to_ns < gap.from_ns):
            merged.append(gap)
        elif last.to_ns is not None and (gap.to_ns is None or gap.to_ns > last.to_ns):
            merged[-1] = Gap(last.from_ns, gap.to_ns)
    return tuple(merged)


def parse(text: str, *, zone: tzinfo | None = None) -> Point:
    """Read a point. ``zone`` is that of times without one (None: the machine's). UsageError."""
    base_text, tilde, count_text = text.strip().partition("~")
    count = 0
    if tilde:
        if not re.fullmatch(r"\d{1,8}", count_text) or int(count_text) > RECORDS_BACK_MAX:
            raise UsageError(
                f"point {text!r}: after ~ comes a number of records up to {RECORDS_BACK_MAX}",
                hint=_GRAMMAR_HINT,
            )
        count = int(count_text)
    return Point(text, _parse_base(text, base_text, zone), count)


def check_checkpoint_name(name: str) -> str:
    """Refuse what means something else as a point: it would never be the checkpoint's name."""
    try:
        base = parse(name).base
    except UsageError:
        base = None  # shaped like a time, and none (2026-13-01); or no name at all
    if base != Tag(name):
        raise UsageError(
            f"{name!r} cannot be a checkpoint's name: as a point it means something else",
            hint="choose another name, such as before-upgrade",
            code="checkpoint-name",
        )
    return name


def _parse_base(
    text: str, base: str, zone: tzinfo | None
) -> Latest | Flush | Relative | Instant | Tag:
    if base == "latest":
        return Latest()
    if base in ("flush", "@flush"):
        return Flush()
    if _RELATIVE.fullmatch(base):
        return Relative(sum(_step_ns(*match.groups()) for match in _STEP.finditer(base)))
    if (match := _TIME.fullmatch(base)) is not None:
        return Instant(_time_ns(text, match, zone))
    name = base.removeprefix("tag:")
    if _NAME.fullmatch(name):
        return Tag(name)
    raise UsageError(f"point {text!r} is neither a time nor a name", hint=_GRAMMAR_HINT)


def _step_ns(whole: str, fraction: str | None, unit: str) -> int:
    ns = int(whole) * _UNITS[unit]
    if fraction:
        ns += int(fraction) * _UNITS[unit] // 10 ** len(fraction)
    return ns


def _time_ns(text: str, match: re.Match[str], zone: tzinfo | None) -> int:
    zone_text = (match["zone"] or "").upper().replace("Z", "+00:00")
    try:
        moment = datetime.fromisoformat(f"{match['day']}T{match['clock'] or '00:00'}{zone_text}")
        if not zone_text:
            moment = moment.replace(tzinfo=zone) if zone is not None else moment.astimezone()
        seconds = (moment - _EPOCH_START) // timedelta(seconds=1)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"point {text!r} is no valid time: {error}", hint=_GRAMMAR_HINT) from error
    fraction = (match["fraction"] or "").ljust(9, "0")
    return seconds * NANOSECONDS_PER_SECOND + int(fraction)


def epoch_at(history: History, at_ns: int) -> int:
    """1 before the first gap, one more after each."""
    return 1 + sum(gap.to_ns is not None and gap.to_ns <= at_ns for gap in history.gaps)


def nearest(history: History, at_ns: int) -> tuple[int | None, int | None]:
    """The last reachable instant up to ``at_ns`` and the first from it on."""
    before = after = None
    for first, last in _stretches(history):
        if first <= at_ns:
            found = history.kept.before(min(at_ns, last))
            before = found if found >= first else before
        if last >= at_ns and after is None:
            found = history.kept.after(max(at_ns, first))
            after = found if found <= last else None
    return before, after


def _stretches(history: History) -> list[tuple[int, int]]:
    """What can be reached, as ascending closed intervals."""
    if history.floor_ns is None:
        return []
    stretches = []
    start: int | None = history.floor_ns
    for gap in history.gaps:
        if start is not None and gap.from_ns > start:
            stretches.append((start, min(gap.from_ns - 1, history.latest_ns)))
        start = None if gap.to_ns is None else max(gap.to_ns, history.floor_ns)
        if start is None:
            break
    if start is not None:
        stretches.append((start, history.latest_ns))
    return [(first, last) for first, last in stretches if first <= last]


def resolve(point: Point, *, now_ns: int, history: History) -> Resolved:
    """The instant a point means. PointError when it cannot be reached."""
    asked_ns, at_ns = _base_instant(point, now_ns, history)
    if point.records_back:
        _require_reachable(point, at_ns, history)
        back_ns = history.records_back(at_ns, point.records_back)
        if back_ns is None or (history.floor_ns is not None and back_ns < history.floor_ns):
            raise _refused(
                point,
                f"history has fewer than {point.records_back} records before "
                f"{format_instant(at_ns)}"
                if point.records_back > 1
                else f"history has no record before {format_instant(at_ns)}",
                None,
                history.floor_ns,
            )
        at_ns = back_ns
    _require_reachable(point, at_ns, history)
    distance_ns = at_ns - asked_ns
    return Resolved(
        point.text, at_ns, epoch_at(history, at_ns), distance_ns / NANOSECONDS_PER_SECOND
    )


def _base_instant(point: Point, now_ns: int, history: History) -> tuple[int, int]:
    """The instant asked for and the one it means, before ``~N``."""
    base = point.base
    if isinstance(base, Instant):
        return base.at_ns, base.at_ns
    if isinstance(base, Relative):
        return now_ns - base.back_ns, now_ns - base.back_ns
    if isinstance(base, Tag):
        at_ns = history.checkpoints.get(base.name)
        if at_ns is None:
            raise PointError(
                f"point {point.text!r}: no checkpoint has the name {base.name}",
                hint=f"see them: blockrepl checkpoint list {history.group or 'GROUP'}",
                code="point-unknown",
            )
        return at_ns, at_ns
    newest, _ = nearest(history, history.latest_ns)
    if newest is None:
        raise _refused(point, NOTHING_YET, None, None)
    return now_ns, newest if isinstance(base, Latest) else _last_flush(point, newest, history)


def _last_flush(point: Point, newest_ns: int, history: History) -> int:
    """The last flush that can be reached: those inside a gap are stepped over."""
    bound: int | None = newest_ns
    while bound is not None:
        flush_ns = history.last_flush(bound)
        if flush_ns is None:
            break
        before, _ = nearest(history, flush_ns)
        if before == flush_ns:
            return flush_ns
        bound = before
    raise _refused(point, "no guest has flushed in this history", newest_ns, None)


def _require_reachable(point: Point, at_ns: int, history: History) -> None:
    before, after = nearest(history, at_ns)
    if before == at_ns:
        return
    asked = format_instant(at_ns) if 0 <= at_ns < 1 << 63 else "that instant"
    if history.floor_ns is None:
        why = NOTHING_YET
    elif at_ns < history.floor_ns:
        why = f"{asked} is before the floor"
    elif after is None and at_ns > history.latest_ns:
        why = f"{asked} is in the future"
    elif history.kept.before(at_ns) != at_ns:
        why = f"{asked} has been thinned by retention"
    else:
        why = f"{asked} is in a gap"
    raise _refused(point, why, before, after)


def _refused(point: Point, why: str, before: int | None, after: int | None) -> PointError:
    ways = [
        f"{format_instant(at_ns)} ({side})"
        for at_ns, side in ((before, "before"), (after, "after"))
        if at_ns is not None
    ]
    hint = f"nearest: {', '.join(ways)}" if ways else "see what there is: blockrepl status"
    return PointError(
        f"point {point.text!r} cannot be reached: {why}",
        hint=hint,
        nearest_before_ns=before,
        nearest_after_ns=after,
    )
