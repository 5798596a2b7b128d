"""What retention is to do next with a group's segments. Values only; see model/retention.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from blockrepl.model.retention import Kept, Ladder, Stretch, advance, next_floor

BATCH_SEGMENTS = 4  # thinned together when there are as many: more versions meet their successors
OVERDUE_STEPS = 10  # a smaller batch is thinned when its oldest record is so much past its edge


class Segment(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def first_stamp(self) -> int: ...
    @property
    def last_stamp(self) -> int: ...
    @property
    def sealed(self) -> bool: ...
    @property
    def bytes(self) -> int: ...
    @property
    def step_ns(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Pinned:
    """Every instant in [first_ns, last_ns] stays."""

    first_ns: int
    last_ns: int


@dataclass(frozen=True, slots=True)
class Decision:
    kept: Kept
    floor_ns: int


def decide(
    ladder: Ladder,
    now_ns: int,
    kept: Kept,
    pins: Sequence[Pinned],
    floor_ns: int,
    room_ns: int = 0,
) -> Decision:
    """What can be reached from now on. ``room_ns``: a floor that limits of room ask for."""
    firsts = [pin.first_ns for pin in pins]
    floor = next_floor(ladder, now_ns, kept, firsts, floor_ns)
    if room_ns > floor:
        floor = max(floor, kept.before(min([room_ns, *firsts])))
    # An interval that is pinned is not thinned at all, nor what is newer.
    begin = min((pin.first_ns for pin in pins if pin.first_ns < pin.last_ns), default=None)
    wanted = []
    last, end = ladder.rungs[-1], ladder.floor(now_ns)
    # What a pin keeps from being folded is thinned like the oldest rung.
    held = [Stretch(floor, end, last.step_ns)] if last.step_ns and end > floor else []
    for one in (*held, *ladder.stretches(now_ns)):
        end = one.to_ns if begin is None else min(one.to_ns, begin - begin % one.step_ns)
        if end > one.from_ns:
            wanted.append(Stretch(one.from_ns, end, one.step_ns))
    # Of what was thinned before, a pin has what was left of it then, whoever that was spared for.
    inside = [at for at in kept.instants if any(pin.first_ns <= at <= pin.last_ns for pin in pins)]
    return Decision(advance(kept, wanted, firsts + inside, floor), floor)


def floor_for_room(segments: Sequence[Segment], excess_bytes: int, promised_from_ns: int) -> int:
    """Up to where folding frees so much, without what is promised; 0 for nothing."""
    floor_ns = 0
    for segment in segments:
        if excess_bytes <= 0 or not segment.sealed:
            break
        floor_ns = max(floor_ns, segment.last_stamp)
        excess_bytes -= segment.bytes
    return min(floor_ns, promised_from_ns)


def next_batch(
    segments: Sequence[Segment], kept: Kept, failed: frozenset[int] = frozenset()
) -> tuple[list[int], int]:
    """Numbers of consecutive segments to thin together, and the step; none, and 0."""
    for stretch in reversed(kept.stretches):
        batch: list[Segment] = []
        for segment in segments:
            fits = (
                segment.sealed
                and segment.step_ns < stretch.step_ns
                and 0 < segment.last_stamp <= stretch.to_ns
                and segment.first_stamp > stretch.from_ns
                and segment.number not in failed
            )
            if fits:
                batch.append(segment)
            if batch and (not fits or len(batch) == BATCH_SEGMENTS):
                break
        if not batch:
            continue
        overdue = stretch.to_ns - batch[0].first_stamp > OVERDUE_STEPS * stretch.step_ns
        if len(batch) == BATCH_SEGMENTS or overdue:
            return [segment.number for segment in batch], stretch.step_ns
    return [], 0
