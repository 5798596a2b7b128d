"""The plan of a scrub at the source: which region of a disk to read when. Events and `now` in.

A pass visits every region of a disk once, in order:

==============  ==========================================================================
event           then
==============  ==========================================================================
``next``        the next region to read, or when to ask again
``answered``    the receiver has compared it: visited
``disturbed``   it was not quiet while it was read: again after RETRY_SECONDS[0], [1], ...;
                after the last of them it is skipped for this pass, and counted
``interrupted`` answers are lost (the session ended): what was under way is read again
``begin_now``   a new pass begins, at NOW_FACTOR times the rate
``cost``        only so much of a read was data: holes cost nothing
==============  ==========================================================================

The pass ends when nothing is left; the next one begins ``rest_seconds`` later. Hence a pass ends,
however busy the guest is, if its answers come.

Rate: over any interval, what is read is at most the rate times its length, plus one burst
(BURST_SECONDS of it and a region). A rate of 0 is off: only passes asked for, at NOW_FACTOR times
the default. ``math.inf`` is no limit. Regions that wait to be read again are bounded: when there
are WAITING_MAX, nothing new is begun before one of them.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

from blockrepl.limits import REGION_BYTES

RATE_DEFAULT = 20e6  # bytes per second
NOW_FACTOR = 10  # somebody waits for it
BURST_SECONDS = 0.1
REST_SECONDS = 60.0  # between passes: a small disk is not read all the time
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
WAITING_MAX = 1024
SKIPPED_NAMED_MAX = 100  # skipped regions that are named; all are counted


@dataclass(frozen=True, slots=True)
class Read:
    """Read this range now and send its digests. Its outcome is told with this value."""

    serial: int  # of all reads of the plan
    region: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to read before ``until``; infinite: before the next event."""

    until: float


@dataclass(slots=True)
class Pass:
    """Instants are the caller's ``now``, in seconds."""

    started: float
    regions: int
    is_asked_for: bool
    ended: float | None = None
    visited: int = 0
    skipped: int = 0
    skipped_regions: list[int] = field(default_factory=list)  # the first SKIPPED_NAMED_MAX

    @property
    def progress(self) -> float:
        """0 to 1."""
        return (self.visited + self.skipped) / self.regions


class ScrubPlan:
    """The scrub of one disk. ``current`` is the last pass begun."""

    def __init__(
        self,
        size_bytes: int,
        now: float,
        *,
        rate: float = RATE_DEFAULT,
        rest_seconds: float = REST_SECONDS,
    ) -> None:
        self.current: Pass | None = None
        self.rate = rate
        self.size_bytes = size_bytes
        self._rest_seconds = rest_seconds
        self._regions = -(-size_bytes // REGION_BYTES)
        self._next_pass_at = now
        self._ready_at = now  # the rate allows no read before
        self._serial = 0
        self._clear()

    def _clear(self) -> None:
        self._fresh = 0  # first region that has not been begun
        self._waiting: list[tuple[float, int]] = []  # heap: when due, region
        self._tries: dict[int, int] = {}  # of regions disturbed at least once
        self._under_way: dict[int, int] = {}  # regions by serial

    def next(self, now: float) -> Read | Wait:
        """What to read at ``now``."""
        if self.current is None or self.current.ended is not None:
            if not self.rate:
                return Wait(math.inf)
            if now < self._next_pass_at:
                return Wait(self._next_pass_at)
            self._begin(now, is_asked_for=False)
        due = self._due_at(now)
        if due > now:
            return Wait(due)
        region = self._take(now)
        offset = region * REGION_BYTES
        length = min(REGION_BYTES, self.size_bytes - offset)
        self._ready_at = max(self._ready_at, now - BURST_SECONDS) + length / self.rate_now
        self._serial += 1
        self._under_way[self._serial] = region
        return Read(self._serial, region, offset, length)

    def begin_now(self, now: float) -> None:
        """Begin a pass at once. Answers to what was read before no longer count."""
        self._begin(now, is_asked_for=True)

    def cost(self, read: Read, data_bytes: int) -> None:
        """What was read was data in part only."""
        self._ready_at -= (read.length - data_bytes) / self.rate_now

    @property
    def is_under_way(self) -> bool:
        return self.current is not None and self.current.ended is None

    @property
    def is_asked_for(self) -> bool:
        """Whether somebody waits for the last pass begun."""
        return self.current is not None and self.current.is_asked_for

    @property
    def rate_now(self) -> float:
        """Of the pass under way, in bytes per second."""
        if self._running().is_asked_for:
            return NOW_FACTOR * (self.rate or RATE_DEFAULT)
        return self.rate

    def answered(self, read: Read, now: float) -> None:
        if self._under_way.pop(read.serial, None) is not None:
            self._tries.pop(read.region, None)
            self._running().visited += 1
            self._end_if_done(now)

    def disturbed(self, read: Read, now: float) -> None:
        region = self._under_way.pop(read.serial, None)
        if region is None:
            return
        tries = self._tries.pop(region, 0)
        if tries < len(RETRY_SECONDS):
            self._tries[region] = tries + 1
            heapq.heappush(self._waiting, (now + RETRY_SECONDS[tries], region))
            return
        running = self._running()
        running.skipped += 1
        if len(running.skipped_regions) < SKIPPED_NAMED_MAX:
            running.skipped_regions.append(region)
        self._end_if_done(now)

    def interrupted(self, now: float) -> None:
        for region in self._under_way.values():
            heapq.heappush(self._waiting, (now, region))
        self._under_way.clear()

    def _begin(self, now: float, *, is_asked_for: bool) -> None:
        self._clear()
        self.current = Pass(now, self._regions, is_asked_for)

    def _running(self) -> Pass:
        assert self.current is not None
        return self.current

    def _due_at(self, now: float) -> float:
        """When there is something to read, the rate allowing."""
        if self._may_begin_fresh():
            return self._ready_at
        if not self._waiting:
            return math.inf
        return max(self._waiting[0][0], self._ready_at)

    def _may_begin_fresh(self) -> bool:
        return self._fresh < self._regions and len(self._waiting) < WAITING_MAX

    def _take(self, now: float) -> int:
        if self._waiting and (self._waiting[0][0] <= now or not self._may_begin_fresh()):
            return heapq.heappop(self._waiting)[1]
        self._fresh += 1
        return self._fresh - 1

    def _end_if_done(self, now: float) -> None:
        if self._fresh == self._regions and not self._waiting and not self._under_way:
            self._running().ended = now
            self._next_pass_at = now + self._rest_seconds
