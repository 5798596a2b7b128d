"""Bandwidth limits: what a user writes, which rate holds when, and the bucket that keeps to it.

==========================  ==================================================================
text                        meaning
==========================  ==================================================================
``50MB/s``                  at most so much at any time that no period names
``08:00-18:00=10MB/s``      at most so much in that period of every day, local time
``22:00-06:00=none``        a period may go past midnight; ``none``: no limit
==========================  ==================================================================

A rate is a number with K, M, G or T (powers of 1024, as sizes are everywhere), then ``B`` and
``/s`` if one likes. A period holds from its first minute until just before its last; ``24:00`` is
the end of the day. Periods must not meet, so there is never a question of which one holds.

The bucket: whoever finds it not in debt may send, however much, and the debt is paid off at the
rate. So a frame is never cut, a small one on a quiet link goes at once, and over any interval no
more is sent than the rate times its length and one frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from blockrepl.errors import UsageError
from blockrepl.limits import BANDWIDTH_BYTES_MIN
from blockrepl.units import parse_size

MINUTES_PER_DAY = 24 * 60
_PERIOD = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})", re.ASCII)
_HINT = "write 50MB/s, or 08:00-18:00=10MB/s for a part of the day; none is no limit"


@dataclass(frozen=True, slots=True)
class Period:
    """Minutes of the day; ``end`` is not in it, and lies before ``start`` past midnight."""

    start: int
    end: int
    bytes_per_second: int | None

    def holds_at(self, minute: int) -> bool:
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


@dataclass(frozen=True, slots=True)
class Rate:
    """None is no limit. ``until``: the minute of the day from which another one holds."""

    bytes_per_second: int | None
    until: int | None = None


@dataclass(frozen=True, slots=True)
class BandwidthLimit:
    bytes_per_second: int | None = None  # when no period holds
    periods: tuple[Period, ...] = ()

    def at(self, minute: int) -> Rate:
        """What holds at a minute of the day, local time."""
        for period in self.periods:
            if period.holds_at(minute):
                return Rate(period.bytes_per_second, period.end % MINUTES_PER_DAY)
        starts = sorted(period.start for period in self.periods)
        until = next((start for start in starts if start > minute), min(starts, default=None))
        return Rate(self.bytes_per_second, until)


def parse_limits(texts: Iterable[str]) -> BandwidthLimit:
    """What ``--limit`` says, given once or more often. UsageError."""
    plain: list[int | None] = []
    periods: list[Period] = []
    for text in texts:
        when, equals, rate = text.strip().rpartition("=")
        if not equals:
            plain.append(_rate(rate, text))
        else:
            periods.append(_period(when, _rate(rate, text), text))
    if len(plain) > 1:
        raise UsageError("two limits for the whole day", hint=_HINT)
    for minute in range(MINUTES_PER_DAY):
        if sum(period.holds_at(minute) for period in periods) > 1:
            raise UsageError(f"two limits hold at {format_minute(minute)}", hint=_HINT)
    return BandwidthLimit(plain[0] if plain else None, tuple(periods))


def _rate(text: str, whole: str) -> int | None:
    if text.strip().lower() == "none":
        return None
    size = parse_size(text.strip().lower().removesuffix("/s"))
    if size is None:
        raise UsageError(f"{whole!r} is not a limit", hint=_HINT)
    if size < BANDWIDTH_BYTES_MIN:
        raise UsageError(
            f"{whole!r} is too little to be of use",
            hint=f"at least {BANDWIDTH_BYTES_MIN // 1024}K/s; to send nothing, stop the agent",
        )
    return size


def _period(when: str, bytes_per_second: int | None, whole: str) -> Period:
    match = _PERIOD.fullmatch(when.strip())
    if match is None:
        raise UsageError(f"{whole!r} is not a limit", hint=_HINT)
    hours, minutes = [int(match[1]), int(match[3])], [int(match[2]), int(match[4])]
    start, end = (hour * 60 + minute for hour, minute in zip(hours, minutes, strict=True))
    if max(minutes) > 59 or start >= MINUTES_PER_DAY or end > MINUTES_PER_DAY or start == end:
        raise UsageError(f"{when.strip()!r} is not a period of the day", hint=_HINT)
    return Period(start, end, bytes_per_second)


def format_minute(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


@dataclass(slots=True)
class TokenBucket:
    """``now`` is any clock's, in seconds, that does not go back."""

    _debt_bytes: float = 0.0
    _updated: float = 0.0

    def wait_seconds(self, bytes_per_second: int | None, now: float) -> float:
        """Until something may be sent, if the rate stays what it has been since the last call."""
        if bytes_per_second is None:
            self._debt_bytes = 0.0
        else:
            self._debt_bytes -= bytes_per_second * (now - self._updated)
        self._updated = now
        if self._debt_bytes < 1 or bytes_per_second is None:  # less than a byte: rounding
            self._debt_bytes = 0.0
            return 0.0
        return self._debt_bytes / bytes_per_second

    def take(self, size_bytes: int) -> None:
        """So much is sent."""
        self._debt_bytes += size_bytes
