"""The scrub's plan: every region once a pass, never above the rate, and a pass ends."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrepl.limits import REGION_BYTES
from blockrepl.model import scrub
from blockrepl.model.scrub import (
    BURST_SECONDS,
    NOW_FACTOR,
    RATE_DEFAULT,
    RETRY_SECONDS,
    Read,
    ScrubPlan,
    Wait,
)

sizes = st.integers(1, 40 * REGION_BYTES)
rates = st.floats(1e5, 1e9) | st.just(math.inf)


def run_pass(
    plan: ScrubPlan,
    now: float,
    *,
    is_quiet: Callable[[Read], bool] = lambda read: True,
    answer_seconds: Callable[[], float] = lambda: 0.0,
) -> tuple[float, list[tuple[float, Read]]]:
    """Drive one pass to its end: when that was, and what was read when."""
    reads: list[tuple[float, Read]] = []
    outcomes: list[tuple[float, int, Read, bool]] = []
    before = plan.current if plan.current and plan.current.ended is not None else None
    for _ in range(100_000):
        while outcomes and min(outcomes)[0] <= now:
            outcome = min(outcomes)
            outcomes.remove(outcome)
            _, _, read, quiet = outcome
            (plan.answered if quiet else plan.disturbed)(read, now)
        running = plan.current
        if running is not None and running is not before and running.ended is not None:
            return now, reads
        step = plan.next(now)
        if isinstance(step, Read):
            reads.append((now, step))
            outcomes.append((now + answer_seconds(), step.serial, step, is_quiet(step)))
        else:
            assert step.until > now  # or it would be asked for ever
            now = min([step.until, *(outcome[0] for outcome in outcomes)])
            assert now < math.inf, "the pass is stuck"
    raise AssertionError("the pass does not end")


@given(sizes, rates, st.integers())
def test_a_quiet_disk_is_read_whole_and_once_a_pass(size: int, rate: float, seed: int) -> None:
    plan = ScrubPlan(size, 5.0, rate=rate, rest_seconds=7.0)
    ended, reads = run_pass(plan, 5.0, answer_seconds=random.Random(seed).random)
    at = 0
    for _, read in reads:
        assert (read.offset, read.region) == (at, at // REGION_BYTES)
        at += read.length
    assert at == size
    done = plan.current
    assert done is not None
    assert (done.progress, done.skipped, done.started, done.ended) == (1.0, 0, 5.0, ended)
    assert plan.next(ended) == Wait(ended + 7.0)
    assert run_pass(plan, ended + 7.0)[1][0][1].region == 0


@settings(max_examples=60)
@given(sizes, rates, st.floats(0, 1), st.booleans(), st.integers())
def test_no_interval_sees_more_than_the_rate_and_a_burst(
    size: int, rate: float, busy: float, asked_for: bool, seed: int
) -> None:
    chance = random.Random(seed)
    plan = ScrubPlan(size, 0.0, rate=rate)
    if asked_for:
        plan.begin_now(0.0)
        rate *= NOW_FACTOR
    _, reads = run_pass(
        plan, 0.0, is_quiet=lambda _: chance.random() >= busy, answer_seconds=chance.random
    )
    if rate == math.inf:
        return
    burst = rate * BURST_SECONDS + REGION_BYTES
    for first in range(len(reads)):
        total = 0
        for when, read in reads[first:]:
            total += read.length
            assert total <= rate * (when - reads[first][0]) + burst + 1


@settings(max_examples=60)
@given(sizes, st.floats(0, 1), st.integers())
def test_a_pass_ends_however_busy_the_disk_is(size: int, busy: float, seed: int) -> None:
    chance = random.Random(seed)
    plan = ScrubPlan(size, 0.0, rate=math.inf)
    visited: set[int] = set()

    def is_quiet(read: Read) -> bool:
        quiet = chance.random() >= busy
        if quiet:
            assert read.region not in visited
            visited.add(read.region)
        return quiet

    _, reads = run_pass(plan, 0.0, is_quiet=is_quiet, answer_seconds=chance.random)
    done = plan.current
    assert done is not None
    assert done.progress == 1.0
    assert done.visited == len(visited)
    tries = Counter(read.region for _, read in reads)
    skipped = set(tries) - visited
    assert set(done.skipped_regions) == skipped
    assert all(tries[region] == 1 + len(RETRY_SECONDS) for region in skipped)
    assert visited | skipped == set(range(done.regions))


def test_a_disturbed_region_is_read_again_after_growing_delays() -> None:
    plan = ScrubPlan(REGION_BYTES, 0.0, rate=math.inf)
    _, reads = run_pass(plan, 0.0, is_quiet=lambda _: False)
    whens = [when for when, _ in reads]
    delays = [later - earlier for earlier, later in pairwise(whens)]
    assert delays == list(RETRY_SECONDS)


def test_what_waits_to_be_read_again_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "WAITING_MAX", 3)
    plan = ScrubPlan(50 * REGION_BYTES, 0.0, rate=math.inf)
    for _ in range(3):
        step = plan.next(0.0)
        assert isinstance(step, Read)
        plan.disturbed(step, 0.0)
    assert plan.next(0.0) == Wait(RETRY_SECONDS[0])
    step = plan.next(RETRY_SECONDS[0])
    assert isinstance(step, Read)
    assert step.region < 3
    plan.disturbed(step, RETRY_SECONDS[0])
    assert run_pass(plan, RETRY_SECONDS[0], is_quiet=lambda _: False)


def test_a_pass_that_is_asked_for_begins_anew_and_is_faster() -> None:
    size = 300 * REGION_BYTES
    plan = ScrubPlan(size, 0.0)
    begun = plan.next(0.0)
    assert isinstance(begun, Read)
    plan.begin_now(1.0)
    again = plan.next(1.0)
    assert isinstance(again, Read)
    assert again.region == begun.region == 0
    plan.answered(begun, 1.0)  # of the pass before
    assert plan.current is not None
    assert plan.current.visited == 0
    plan.answered(again, 1.0)
    ended, _ = run_pass(plan, 1.0)
    assert ended - 1.0 <= size / RATE_DEFAULT / NOW_FACTOR
    assert isinstance(plan.next(ended), Wait)


def test_a_rate_of_zero_is_off_but_for_passes_asked_for() -> None:
    plan = ScrubPlan(4 * REGION_BYTES, 0.0, rate=0)
    assert plan.next(1e9) == Wait(math.inf)
    plan.begin_now(1e9)
    assert isinstance(plan.next(1e9), Read)


def test_what_was_under_way_when_the_session_ended_is_read_again() -> None:
    plan = ScrubPlan(3 * REGION_BYTES, 0.0, rate=math.inf)
    first, second = plan.next(0.0), plan.next(0.0)
    assert isinstance(first, Read)
    assert isinstance(second, Read)
    plan.answered(first, 0.0)
    plan.interrupted(1.0)
    plan.answered(second, 1.0)  # an answer after all; too late
    again, third = plan.next(1.0), plan.next(1.0)
    assert isinstance(again, Read)
    assert isinstance(third, Read)
    assert (again.region, third.region) == (1, 2)
    plan.answered(again, 2.0)
    plan.answered(third, 2.0)
    assert plan.current is not None
    assert plan.current.ended == 2.0
