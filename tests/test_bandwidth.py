"""Bandwidth limits: the grammar, the hours of the day, the bucket; and what they hold back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from blockrepl.errors import UsageError
from blockrepl.model.bandwidth import (
    MINUTES_PER_DAY,
    BandwidthLimit,
    Period,
    Rate,
    TokenBucket,
    format_minute,
    parse_limits,
)
from blockrepl.services.shaping import HELD_SECONDS, Shaper
from blockrepl.units import GIB, KIB, MIB


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        ("50MB/s", 50 * MIB),
        ("50MiB/s", 50 * MIB),
        ("50m", 50 * MIB),
        ("1G/s", GIB),
        ("16k", 16 * KIB),
        (" 20000 ", 20000),
        ("none", None),
    ],
)
def test_a_rate_is_a_size_by_the_second(text: str, bytes_per_second: int | None) -> None:
    assert parse_limits([text]) == BandwidthLimit(bytes_per_second)


def test_periods_of_the_day_come_before_the_rest() -> None:
    limit = parse_limits(["08:00-18:00=10MB/s", "22:30-06:00=none", "50MB/s"])
    assert limit.at(8 * 60) == Rate(10 * MIB, 18 * 60)
    assert limit.at(18 * 60 - 1) == Rate(10 * MIB, 18 * 60)
    assert limit.at(18 * 60) == Rate(50 * MIB, 22 * 60 + 30)
    assert limit.at(23 * 60) == Rate(None, 6 * 60)
    assert limit.at(0) == Rate(None, 6 * 60)
    assert limit.at(7 * 60) == Rate(50 * MIB, 8 * 60)
    assert parse_limits([]).at(0) == Rate(None, None)
    whole = parse_limits(["0:00-24:00=1M"])
    assert whole.at(0) == whole.at(MINUTES_PER_DAY - 1) == Rate(MIB, 0)


@pytest.mark.parametrize(
    "texts",
    [
        ["fast"],
        [""],
        ["-5M"],
        ["5M/h"],
        ["1K"],
        ["0"],
        ["5M", "6M"],
        ["08:00=5M"],
        ["08:00-25:00=5M"],
        ["08:60-09:00=5M"],
        ["24:00-01:00=5M"],
        ["08:00-08:00=5M"],
        ["08:00-18:00="],
        ["=5M"],
        ["08:00-18:00=5M", "17:59-19:00=6M"],
        ["22:00-06:00=5M", "05:00-07:00=6M"],
        ["٠٨:00-18:00=5M"],
    ],
)
def test_what_is_no_limit_is_refused_with_what_to_write(texts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_limits(texts)
    assert caught.value.hint


@given(st.lists(st.one_of(st.text(), st.from_regex(r"\d\d?:\d\d-\d\d?:\d\d=\d+[kmg]")), max_size=3))
def test_any_text_is_a_limit_or_a_usage_error(texts: list[str]) -> None:
    try:
        limit = parse_limits(texts)
    except UsageError:
        return
    for minute in range(MINUTES_PER_DAY):
        rate = limit.at(minute)
        if rate.until is not None:
            assert 0 <= rate.until < MINUTES_PER_DAY
            between = minute
            while between != rate.until:
                assert limit.at(between).bytes_per_second == rate.bytes_per_second
                between = (between + 1) % MINUTES_PER_DAY
    assert format_minute(485) == "08:05"


@given(
    st.integers(16 * KIB, 100 * MIB),
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 8 * MIB)), min_size=1),
)
def test_no_more_is_sent_than_the_rate_allows_and_one_frame(
    bytes_per_second: int, wishes: list[tuple[float, int]]
) -> None:
    # Guards the debt in TokenBucket: over any interval.
    bucket, now, sent = TokenBucket(), 0.0, list[tuple[float, int]]()
    for pause, size in wishes:
        now += pause
        wait_seconds = bucket.wait_seconds(bytes_per_second, now)
        now += wait_seconds
        assert bucket.wait_seconds(bytes_per_second, now) == 0.0
        bucket.take(size)
        sent.append((now, size))
    for first, (begun, _) in enumerate(sent):
        before = 0
        for at, size in sent[first:]:
            assert before <= bytes_per_second * (at - begun) * 1.000001 + 1
            before += size


def test_a_quiet_link_saves_up_nothing() -> None:
    bucket = TokenBucket()
    bucket.wait_seconds(MIB, 0.0)
    assert bucket.wait_seconds(MIB, 3600.0) == 0.0
    bucket.take(2 * MIB)
    assert bucket.wait_seconds(MIB, 3600.0) == 2.0


# --- the agent's


def clock_from(start: datetime) -> Callable[[], datetime]:
    begun = trio.current_time()
    return lambda: start + timedelta(seconds=trio.current_time() - begun)


async def test_data_waits_its_turn_and_a_period_that_ends_frees_it(
    autojump_clock: MockClock,
) -> None:
    limit = BandwidthLimit(None, (Period(8 * 60, 18 * 60, 100 * KIB),))
    shaper = Shaper(limit, clock_from(datetime(2026, 11, 22, 17, 59, 0)))
    done: list[tuple[str, float]] = []
    begun = trio.current_time()

    async def send(name: str) -> None:
        await shaper.shape(MIB)
        done.append((name, trio.current_time() - begun))

    async with trio.open_nursery() as nursery:
        for name in ("first", "second", "third"):
            nursery.start_soon(send, name)
            await trio.testing.wait_all_tasks_blocked()
        assert not done or done[0][0] == "first"
        await trio.sleep(1.0)
        assert shaper.is_holding
    assert [name for name, _ in done] == ["first", "second", "third"]
    assert [at for _, at in done] == pytest.approx([0.0, 10.24, 20.48])
    with trio.fail_after(600):
        for _ in range(100):  # a thousand seconds' worth, but the period ends after a minute
            await shaper.shape(MIB)
    assert 58 <= trio.current_time() - begun <= 62
    await trio.sleep(HELD_SECONDS + 11)
    assert not shaper.is_holding


async def test_a_wait_that_is_cancelled_costs_nobody_anything(autojump_clock: MockClock) -> None:
    shaper = Shaper(BandwidthLimit(100 * KIB))
    await shaper.shape(100 * KIB)
    with trio.move_on_after(0.5):
        await shaper.shape(8 * MIB)
    with trio.fail_after(0.6):
        await shaper.shape(1)
