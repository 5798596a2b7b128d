"""How fast an agent's scrubs may read; what its disks have in common.

The rate is shared by all disks with a pass under way, and gives way to the guests: a disk's scrub
takes of it what the replication of its group leaves. But a pass ends however busy the guest is: a
scrub never takes less than ends a pass in PASS_SECONDS, within the bounds of LEAST_SHARE. What was
written at random is read back in many pieces, which costs the receiver more than storing as many
bytes. A pass that somebody waits for takes the higher bound.
"""

from __future__ import annotations

import trio

from blockrepl.model.scrub import RATE_DEFAULT, ScrubPlan

UNDER_WAY_MAX = 2  # comparisons of all of an agent's scrubs: hides the round trip
LEAST_SHARE = (0.05, 0.25)  # of the rate, at the busiest guest
PASS_SECONDS = 7 * 86400.0  # of a pass beside it, where that takes no more than the higher share
METER_SECONDS = 1.0  # over which the speed of replication is measured


class ScrubPool:
    """What all scrubs of an agent share. ``rate`` in bytes per second; 0: only when asked for."""

    def __init__(self, rate: float = RATE_DEFAULT) -> None:
        self.rate = rate
        self.places = trio.Semaphore(UNDER_WAY_MAX)
        self._plans: set[ScrubPlan] = set()

    def add(self, plan: ScrubPlan) -> None:
        self._plans.add(plan)

    def remove(self, plan: ScrubPlan) -> None:
        self._plans.discard(plan)

    def share(self, plan: ScrubPlan, replicated_per_second: float) -> float:
        """The rate of one of the disks that have a pass under way, itself counted in."""
        disks = 1 + sum(other is not plan and other.is_under_way for other in self._plans)
        rate = self.rate or RATE_DEFAULT
        low, high = LEAST_SHARE
        due = high if plan.is_asked_for else disks * plan.size_bytes / PASS_SECONDS / rate
        left = 1 - replicated_per_second / rate
        return self.rate * max(left, min(max(low, due), high)) / disks


class Meter:
    """How fast a counter that never goes back grows, as of the last METER_SECONDS or more."""

    def __init__(self, count: int = 0) -> None:
        self.per_second = 0.0
        self._since = trio.current_time()
        self._before = count

    def read(self, count: int) -> float:
        """Take the counter's value; units per second."""
        now = trio.current_time()
        if now >= self._since + METER_SECONDS:
            self.per_second = (count - self._before) / (now - self._since)
            self._since, self._before = now, count
        return self.per_second
