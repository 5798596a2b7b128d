"""Retention: which points of a group's history are kept, by their age. Values only.

A ladder has rungs, the finest first: ``all:24h,1m:7d,1h:90d`` keeps every write for 24 hours, then
a point a minute until 7 days, then one an hour until 90 days. What is older than the last rung is
folded into the base images.

Rules:

1. The points that a rung keeps are the multiples of its step since 1970 (UTC). Each step is a
   multiple of the one before, so what a coarse rung keeps has been kept by every finer one, and a
   point that is gone never comes back.
2. A rung takes over at an *edge*: the newest multiple of its step that is older than the rung
   before it. Between two edges lies a stretch, (from, to]; of it, only the multiples of the step
   and the instants that were pinned then can be reached.
3. The floor is the newest multiple of the last step that is older than the last rung. It never
   passes a pinned instant.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from blockrepl.errors import UsageError
from blockrepl.units import NANOSECONDS_PER_SECOND

ALL = 0  # step of the rung that keeps every write
RUNGS_MAX = 8
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_RUNG = re.compile(r"(all|\d{1,9}[smhdw]):(\d{1,9})([smhdw])")
_HINT = "write it as all:24h,1m:7d,1h:90d: the distance of points, and until which age it holds"


@dataclass(frozen=True, slots=True)
class Rung:
    step_ns: int  # ALL: every write
    until_ns: int  # age


@dataclass(frozen=True, slots=True)
class Stretch:
    """In (from_ns, to_ns] only multiples of the step, and what was pinned, can be reached."""

    from_ns: int
    to_ns: int
    step_ns: int


@dataclass(frozen=True, slots=True)
class Ladder:
    rungs: tuple[Rung, ...]

    def __str__(self) -> str:
        return ",".join(
            f"{'all' if rung.step_ns == ALL else _written(rung.step_ns)}:{_written(rung.until_ns)}"
            for rung in self.rungs
        )

    def floor(self, now_ns: int) -> int:
        """Up to where history may be folded."""
        last = self.rungs[-1]
        return _align_down(now_ns - last.until_ns, last.step_ns)

    def stretches(self, now_ns: int) -> list[Stretch]:
        """How history is thinned as of now, the oldest first; what is newer is whole."""
        found = []
        begin = self.floor(now_ns)
        for place in range(len(self.rungs) - 1, 0, -1):
            rung, finer = self.rungs[place], self.rungs[place - 1]
            edge = _align_down(now_ns - finer.until_ns, rung.step_ns)
            if edge > begin:
                found.append(Stretch(begin, edge, rung.step_ns))
                begin = edge
        return found


DEFAULT = Ladder(
    (
        Rung(ALL, 86400 * NANOSECONDS_PER_SECOND),
        Rung(60 * NANOSECONDS_PER_SECOND, 7 * 86400 * NANOSECONDS_PER_SECOND),
        Rung(3600 * NANOSECONDS_PER_SECOND, 90 * 86400 * NANOSECONDS_PER_SECOND),
    )
)


def parse_ladder(text: str) -> Ladder:
    """Read a ladder. UsageError that says which rung contradicts which."""
    rungs = []
    for part in text.replace(" ", "").split(","):
        match = _RUNG.fullmatch(part)
        if match is None:
            raise UsageError(f"{part!r} is not a rung of a ladder", hint=_HINT)
        step = ALL if match[1] == "all" else parse_age(match[1])
        rungs.append((part, Rung(step, parse_age(match[2] + match[3]))))
    if len(rungs) > RUNGS_MAX:
        raise UsageError(f"a ladder has {RUNGS_MAX} rungs at the most", hint=_HINT)
    if rungs[0][1].step_ns != ALL:
        raise UsageError(
            f"the first rung must keep every write, {rungs[0][0]} does not", hint=_HINT
        )
    for part, rung in rungs:
        if rung.until_ns <= rung.step_ns:
            raise UsageError(f"rung {part} ends before its second point", hint=_HINT)
    for (finer_part, finer), (part, rung) in pairwise(rungs):
        if rung.until_ns <= finer.until_ns:
            raise UsageError(f"rung {part} ends no later than {finer_part} before it", hint=_HINT)
        if rung.step_ns <= finer.step_ns or (finer.step_ns and rung.step_ns % finer.step_ns):
            raise UsageError(
                f"the points of rung {part} are not a choice of those of {finer_part}", hint=_HINT
            )
    return Ladder(tuple(rung for _, rung in rungs))


def parse_age(text: str) -> int:
    """``90d`` as nanoseconds. UsageError."""
    match = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if match is None or not int(match[1]):
        raise UsageError(f"{text!r} is no length of time", hint="write it as 30m, 24h or 90d")
    return int(match[1]) * _SECONDS[match[2]] * NANOSECONDS_PER_SECOND


def _written(age_ns: int) -> str:
    seconds = age_ns // NANOSECONDS_PER_SECOND
    unit = next(unit for unit in ("w", "d", "h", "m", "s") if seconds % _SECONDS[unit] == 0)
    return f"{seconds // _SECONDS[unit]}{unit}"


def _align_down(at_ns: int, step_ns: int) -> int:
    return at_ns - at_ns % step_ns if step_ns else at_ns


# --- what can be reached


@dataclass(frozen=True, slots=True)
class Kept:
    """What thinning has left: stretches, ascending and disjoint, and single instants in them."""

    stretches: tuple[Stretch, ...] = ()
    instants: tuple[int, ...] = ()  # ascending

    def before(self, at_ns: int) -> int:
        """The newest instant up to this one that thinning has left; itself when it was spared."""
        stretch = self._stretch(at_ns)
        if stretch is None:
            return at_ns
        found = max(_align_down(at_ns, stretch.step_ns), stretch.from_ns)
        place = bisect_right(self.instants, at_ns)
        if place:
            found = max(found, self.instants[place - 1])
        return found if found > stretch.from_ns else self.before(stretch.from_ns)

    def after(self, at_ns: int) -> int:
        """The oldest instant from this one on that thinning has left."""
        stretch = self._stretch(at_ns)
        if stretch is None:
            return at_ns
        found = min(-_align_down(-at_ns, stretch.step_ns), stretch.to_ns)
        place = bisect_left(self.instants, at_ns)
        return min(found, self.instants[place]) if place < len(self.instants) else found

    def _stretch(self, at_ns: int) -> Stretch | None:
        place = bisect_left(self.stretches, at_ns, key=lambda stretch: stretch.to_ns)
        if place < len(self.stretches) and self.stretches[place].from_ns < at_ns:
            return self.stretches[place]
        return None


def next_floor(
    ladder: Ladder, now_ns: int, kept: Kept, pinned: Sequence[int], floor_ns: int
) -> int:
    """Up to where history may be folded as of now: a point that is left, behind no pin."""
    target = min([ladder.floor(now_ns), *pinned])
    return max(floor_ns, kept.before(target)) if target > floor_ns else floor_ns


def advance(old: Kept, wanted: Sequence[Stretch], pinned: Sequence[int], floor_ns: int) -> Kept:
    """What is left when history is thinned as wanted and the floor has risen.

    ``pinned`` instants that can still be reached stay so. What was coarser stays coarser: a ladder
    that was made finer brings nothing back.
    """
    edges = sorted(
        {floor_ns}
        | {edge for one in (*old.stretches, *wanted) for edge in (one.from_ns, one.to_ns)}
    )
    edges = [edge for edge in edges if edge >= floor_ns]
    stretches: list[Stretch] = []
    for begin, end in pairwise(edges):
        steps = [one.step_ns for one in (*old.stretches, *wanted) if one.from_ns < end <= one.to_ns]
        if not steps:
            continue
        step = max(steps)
        last = stretches[-1] if stretches else None
        if last is not None and last.to_ns == begin and last.step_ns == step:
            stretches[-1] = Stretch(last.from_ns, end, step)
        else:
            stretches.append(Stretch(begin, end, step))
    new = Kept(tuple(stretches))
    spared = {at for at in pinned if at > floor_ns and old.before(at) == at != new.before(at)}
    return Kept(new.stretches, tuple(sorted(spared)))


def check_change(ladder: Ladder, kept: Kept) -> None:
    """Refuse a ladder whose points are no choice of those that thinning has left. UsageError."""
    for rung in ladder.rungs[1:]:
        for one in kept.stretches:
            coarse, fine = max(rung.step_ns, one.step_ns), min(rung.step_ns, one.step_ns)
            if coarse % fine:
                raise UsageError(
                    f"history has been thinned to a point every {_written(one.step_ns)} already, "
                    f"one every {_written(rung.step_ns)} is no choice of those",
                    hint=f"choose a step that {_written(one.step_ns)} divides",
                )
