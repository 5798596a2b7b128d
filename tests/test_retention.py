"""Retention as values: ladders, what they keep, and what can be reached afterwards."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrepl.errors import PointError, UsageError
from blockrepl.model.points import Gap, History, Instant, Point, nearest, resolve
from blockrepl.model.retention import (
    DEFAULT,
    Kept,
    Ladder,
    Rung,
    Stretch,
    advance,
    check_change,
    next_floor,
    parse_age,
    parse_ladder,
)
from blockrepl.model.retention_plan import Pinned, decide

S = 1_000_000_000
H, D = 3600 * S, 86400 * S
NOW = 1_800_000_000 * S + 12345


def test_a_ladder_reads_as_it_is_written() -> None:
    assert str(DEFAULT) == "all:1d,1m:1w,1h:90d"
    assert parse_ladder("all:24h, 1m:7d,1h:90d") == DEFAULT
    assert parse_ladder(str(DEFAULT)) == DEFAULT
    assert parse_age("30m") == 1800 * S


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a rung"),
        ("all", "not a rung"),
        ("all:0d", "no length of time"),
        ("1m:7d", "must keep every write"),
        ("all:1d,1h:12h", "ends no later than all:1d"),
        ("all:1d,1h:7d,1m:90d", "not a choice of those"),
        ("all:1d,7m:7d,1h:90d", "not a choice of those"),
        ("all:1d,2d:2d", "ends before its second point"),
        ("all:1d" + "".join(f",{2**n}m:{n + 2}d" for n in range(8)), "8 rungs at the most"),
    ],
)
def test_a_ladder_that_contradicts_itself_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_ladder(text)


def test_the_default_keeps_writes_then_minutes_then_hours() -> None:
    hours, minutes = DEFAULT.stretches(NOW)
    assert (hours.step_ns, minutes.step_ns) == (H, 60 * S)
    assert minutes.from_ns == hours.to_ns
    assert hours.from_ns == DEFAULT.floor(NOW)
    assert 0 <= NOW - D - minutes.to_ns < 60 * S
    assert 0 <= NOW - 7 * D - hours.to_ns < H
    assert 0 <= NOW - 90 * D - hours.from_ns < H


SMALL = Ladder((Rung(0, 20), Rung(5, 60), Rung(10, 100)))
ladders = st.sampled_from([SMALL, Ladder((Rung(0, 10), Rung(10, 40))), Ladder((Rung(0, 30),))])
pins = st.lists(st.integers(0, 400), max_size=4)


@st.composite
def advanced(draw: st.DrawFn) -> tuple[Kept, int, list[list[int]]]:
    """What several rounds of retention leave; the floor; the pins of each round."""
    kept, floor, now = Kept(), 0, 0
    rounds = []
    ladder = draw(ladders)
    for _ in range(draw(st.integers(1, 5))):
        now += draw(st.integers(0, 90))
        pinned = [at for at in draw(pins) if floor <= at <= now and kept.before(at) == at]
        floor = next_floor(ladder, now, kept, pinned, floor)
        kept = advance(kept, ladder.stretches(now), pinned, floor)
        rounds.append(pinned)
    return kept, floor, rounds


@settings(max_examples=50)
@given(advanced(), st.integers(0, 400))
def test_before_and_after_are_the_nearest_that_are_left(
    case: tuple[Kept, int, list[list[int]]], at: int
) -> None:
    kept, floor, _ = case
    left = [one for one in range(600) if one >= floor and _is_left(kept, one)]
    before = max((one for one in left if one <= at), default=None)
    after = min((one for one in left if one >= at), default=None)
    if at >= floor:
        assert kept.before(at) == before
        assert kept.after(at) == after


def _is_left(kept: Kept, at: int) -> bool:
    for one in kept.stretches:
        if one.from_ns < at <= one.to_ns:
            return at % one.step_ns == 0 or at in kept.instants
    return True


@given(advanced())
def test_what_is_pinned_stays_and_what_is_gone_never_comes_back(
    case: tuple[Kept, int, list[list[int]]],
) -> None:
    kept, floor, rounds = case
    for at in rounds[-1]:
        assert at >= floor
        assert kept.before(at) == at


@given(st.lists(st.integers(0, 90), min_size=2, max_size=8), ladders, ladders)
def test_a_point_that_is_gone_never_comes_back(
    steps: list[int], first: Ladder, second: Ladder
) -> None:
    kept, floor, now = Kept(), 0, 0
    gone: set[int] = set()
    for place, step in enumerate(steps):
        now += step
        ladder = first if place < len(steps) // 2 else second
        floor = next_floor(ladder, now, kept, [], floor)
        kept = advance(kept, ladder.stretches(now), [], floor)
        left = {one for one in range(now) if one >= floor and _is_left(kept, one)}
        assert not left & gone
        gone |= {one for one in range(now) if one not in left}


def test_all_that_thinning_has_left_of_a_pinned_interval_stays() -> None:
    # Guards "inside" in decide: once the fork that an instant was kept for was gone, bisect lost
    # that instant, though it was inside the interval that bisect pins.
    kept = Kept((Stretch(0, 400, 100),), (50, 150, 250, 350))
    ladder = Ladder((Rung(0, 20), Rung(100, 2000)))
    decision = decide(ladder, 1000, kept, [Pinned(100, 250)], 0)
    assert decision.kept.instants == (150, 250)
    decision = decide(ladder, 1000, kept, [Pinned(100, 250), Pinned(350, 350)], 0)
    assert decision.kept.instants == (150, 250, 350)


def test_what_was_thinned_is_refused_with_the_nearest_kept_points() -> None:
    kept = Kept((Stretch(0, 60, 10),), (33,))
    history = History(floor_ns=0, latest_ns=100, gaps=(Gap(44, 52),), kept=kept)
    assert nearest(history, 33) == (33, 33)
    assert nearest(history, 34) == (33, 40)
    assert nearest(history, 31) == (30, 33)
    assert nearest(history, 45) == (40, 60)
    assert nearest(history, 61) == (61, 61)
    with pytest.raises(PointError, match="thinned by retention") as refused:
        resolve(Point("x", Instant(34)), now_ns=100, history=history)
    assert (refused.value.nearest_before_ns, refused.value.nearest_after_ns) == (33, 40)


def test_a_ladder_must_choose_from_what_is_left() -> None:
    kept = Kept((Stretch(0, 10 * H, H),))
    check_change(parse_ladder("all:1d,30m:7d"), kept)
    check_change(parse_ladder("all:1d,4h:7d"), kept)
    with pytest.raises(UsageError, match="1h already"):
        check_change(parse_ladder("all:1d,7m:7d"), kept)
