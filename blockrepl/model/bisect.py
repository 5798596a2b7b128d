"""Finding the last good instant between one that is good and one that is bad, by probing.

    good                                                     bad
     |---x---x---x---x---x---x---x---x---x---x---x---x---x---x|     x: content changes there
         known good  <- the answer lies between ->  known bad

Rules:

1. Only instants at which content changes are probed: between two of them all is the same.
2. The next probe halves the changes that are left. After skips it is taken elsewhere (at 1/4, 3/4,
   1/8, ...), so that a stretch in which nothing can be said is left behind.
3. It ends when every change between is probed, or SKIPS_MAX of them were skipped in vain. Where
   skips are left between good and bad, the answer is all of them.
4. The two ends are taken at their word, until one of them turns out to be next to the answer: then
   it is probed too. A command that says the same of everything is found out there.

What is next follows from the results alone, so a search that was broken off goes on as it was.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from blockrepl.errors import StateError
from blockrepl.formats.frame import U64
from blockrepl.units import format_instant

SKIPS_MAX = 50  # between good and bad


class Outcome(enum.Enum):
    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Candidates:
    """Ascending instants, strictly between two, at which content changes.

    ``weights``: how many changes each stands for. There may be more of them, to be asked for again
    when the interval is shorter: then ``is_all`` is false.
    """

    instants: U64
    weights: U64
    is_all: bool = True


@dataclass(frozen=True, slots=True)
class Probe:
    """``left``: about how many changes are still between good and bad."""

    at_ns: int
    left: int


@dataclass(frozen=True, slots=True)
class Found:
    """The first bad change came after ``good_ns``, and up to ``bad_ns``."""

    good_ns: int
    bad_ns: int
    skipped: tuple[int, ...]  # between, and so undecided


def step(
    good_ns: int,
    bad_ns: int,
    results: Mapping[int, Outcome],
    candidates: Callable[[int, int], Candidates],
    *,
    check_ends: bool = False,
) -> Probe | Found:
    """What to do next. StateError when an end is not what it was said to be, or all was skipped."""
    _check_end(good_ns, "good", results, Outcome.BAD)
    _check_end(bad_ns, "bad", results, Outcome.GOOD)
    if check_ends:
        for end_ns in (bad_ns, good_ns):
            if end_ns not in results:
                return Probe(end_ns, 0)
    low = max((at for at, each in results.items() if each == Outcome.GOOD), default=good_ns)
    high = min((at for at, each in results.items() if each == Outcome.BAD), default=bad_ns)
    skipped = sorted(at for at, each in results.items() if each == Outcome.SKIP and low < at < high)
    found = candidates(low, high)
    fresh = ~np.isin(found.instants, np.array(skipped, np.uint64))
    if fresh.any() and len(skipped) < SKIPS_MAX:
        left = int(found.weights.sum())
        return Probe(_choose(found, fresh, len(skipped)), left)
    for end_ns in (low, high):
        if end_ns in (good_ns, bad_ns) and end_ns not in results:
            return Probe(end_ns, 0)
    if results and all(each == Outcome.SKIP for each in results.values()):
        raise StateError(
            f"the command says neither good nor bad of any of {len(results)} instants",
            hint="it ended with 125 each time; look at what it does at one (mount --at)",
            code="bisect-skips",
        )
    return Found(low, high, tuple(skipped))


def _check_end(end_ns: int, said: str, results: Mapping[int, Outcome], other: Outcome) -> None:
    if results.get(end_ns) == other:
        raise StateError(
            f"the command says {other.value} of the point that was said to be {said} "
            f"({format_instant(end_ns)})",
            hint="look at what it does there (fork create, mount --fork), or give another point",
            code="bisect-ends",
        )


def _choose(found: Candidates, fresh: np.ndarray, skips: int) -> int:
    """The fresh candidate that is nearest to a fraction of what is left."""
    reached = np.cumsum(found.weights)
    wanted = _fraction(skips) * float(reached[-1])
    place = min(int(np.searchsorted(reached, wanted)), len(reached) - 1)
    places = np.flatnonzero(fresh)
    nearest = places[np.argmin(np.abs(places - place))]
    return int(found.instants[nearest])


def _fraction(skips: int) -> float:
    """1/2, 1/4, 3/4, 1/8, 5/8, 3/8, 7/8, ...: the bits of a counter, mirrored."""
    number, value, bit = skips + 1, 0.0, 0.5
    while number:
        value += bit * (number & 1)
        number >>= 1
        bit /= 2
    return value
