"""The point grammar against a second, naive reading of the same history."""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.errors import PointError, UsageError
from blockrepl.model import points
from blockrepl.model.points import Gap, History, Point, Resolved
from blockrepl.units import format_instant

SECOND = 1_000_000_000
NOW = 1_795_343_467 * SECOND


def resolve(text: str, history: History, now_ns: int = NOW) -> Resolved:
    return points.resolve(points.parse(text), now_ns=now_ns, history=history)


def history_of(stamps: list[int], flushes: list[int], **rest: object) -> History:
    def records_back(at_ns: int, count: int) -> int | None:
        seen = sorted(stamp for stamp in stamps if stamp <= at_ns)
        return seen[-1 - count] if len(seen) > count else None

    def last_flush(at_ns: int) -> int | None:
        return max((stamp for stamp in flushes if stamp <= at_ns), default=None)

    return History(records_back=records_back, last_flush=last_flush, **rest)  # type: ignore[arg-type]


PLAIN = history_of(
    [NOW - n * SECOND for n in range(2, 60)],
    [NOW - 10 * SECOND, NOW - 25 * SECOND],
    floor_ns=NOW - 60 * SECOND,
    latest_ns=NOW - SECOND,
    gaps=(Gap(NOW - 30 * SECOND, NOW - 20 * SECOND),),
    checkpoints={"before-upgrade": NOW - 40 * SECOND, "lost": NOW - 22 * SECOND},
)


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("latest", points.Latest()),
        ("flush", points.Flush()),
        ("@flush", points.Flush()),
        ("-90s", points.Relative(90 * SECOND)),
        ("-1.5h", points.Relative(5400 * SECOND)),
        ("-1h30m", points.Relative(5400 * SECOND)),
        ("-250ms", points.Relative(SECOND // 4)),
        ("-1d", points.Relative(86400 * SECOND)),
        ("tag:latest", points.Tag("latest")),
        ("before-upgrade", points.Tag("before-upgrade")),
        ("tag:2026-11-22", points.Tag("2026-11-22")),
        ("1970-01-01T00:00:01.25Z", points.Instant(1_250_000_000)),
        ("1970-01-01T01:00:00.000000001+01:00", points.Instant(1)),
        ("1970-01-02T00:00Z", points.Instant(86400 * SECOND)),
        ("1970-01-02 00:00:01Z", points.Instant(86401 * SECOND)),
    ],
)
def test_each_form_of_a_point_is_read(text: str, base: object) -> None:
    assert points.parse(text) == Point(text, base, 0)  # type: ignore[arg-type]
    assert points.parse(f"{text}~3").records_back == 3


@pytest.mark.parametrize(
    "text",
    ["", "~", "latest~", "latest~-1", "latest~x", "-", "-5", "-5y", "--5m", "tag:", "tag:../x",
     "2026-13-01", "2026-11-22T25:00Z", "2026-11-22T10:31:07.0123456789Z", "A", "a/b", "x" * 64,
     "latest~99999999"],
)  # fmt: skip
def test_a_malformed_point_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        points.parse(text)
    assert caught.value.hint


def test_a_time_without_zone_is_local() -> None:
    berlin = timezone(timedelta(hours=1))
    parsed = points.parse("1970-01-01T01:00:02", zone=berlin)
    assert parsed.base == points.Instant(2 * SECOND)
    local = datetime(2026, 7, 1, 12, 0, 0).astimezone()
    assert points.parse("2026-07-01T12:00:00").base == points.Instant(
        int(local.timestamp()) * SECOND
    )


@given(st.integers(0, (1 << 62)))
def test_a_written_instant_is_read_back(at_ns: int) -> None:
    assert points.parse(format_instant(at_ns)).base == points.Instant(at_ns)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_wrong_usage(text: str) -> None:
    with contextlib.suppress(UsageError):
        points.parse(text)


def test_latest_is_the_last_reachable_instant_and_says_how_old_it_is() -> None:
    assert resolve("latest", PLAIN) == Resolved("latest", NOW - SECOND, 2, -1.0)


def test_flush_steps_over_a_gap() -> None:
    assert resolve("flush", PLAIN).at_ns == NOW - 10 * SECOND
    gone = history_of(
        [],
        [NOW - 25 * SECOND, NOW - 50 * SECOND],
        floor_ns=PLAIN.floor_ns,
        latest_ns=PLAIN.latest_ns,
        gaps=PLAIN.gaps,
    )
    assert resolve("flush", gone).at_ns == NOW - 50 * SECOND


def test_flush_without_a_flush_is_refused() -> None:
    with pytest.raises(PointError, match="flushed"):
        resolve("flush", history_of([], [], floor_ns=0, latest_ns=NOW))


def test_records_back_leaves_out_that_many_records() -> None:
    assert resolve("latest~1", PLAIN).at_ns == NOW - 3 * SECOND
    assert resolve("latest~0", PLAIN).at_ns == NOW - SECOND
    assert resolve("before-upgrade~2", PLAIN).at_ns == NOW - 42 * SECOND
    assert resolve("flush~1", PLAIN).at_ns == NOW - 11 * SECOND
    assert resolve(f"{format_instant(NOW - 5 * SECOND)}~1", PLAIN).at_ns == NOW - 6 * SECOND
    with pytest.raises(PointError, match="gap"):
        resolve("latest~24", PLAIN)
    with pytest.raises(PointError) as caught:
        resolve("latest~1000", PLAIN)
    assert caught.value.nearest_after_ns == PLAIN.floor_ns
    assert "fewer than 1000 records before" in str(caught.value)
    with pytest.raises(PointError, match="has no record before"):
        resolve("latest~1", history_of([NOW], [], floor_ns=NOW, latest_ns=NOW))


def test_the_epoch_counts_the_gaps_that_have_ended() -> None:
    assert resolve("before-upgrade", PLAIN).epoch == 1
    assert resolve("-20s", PLAIN).epoch == 2


@pytest.mark.parametrize(
    ("text", "why", "before", "after"),
    [
        ("-25s", "gap", NOW - 30 * SECOND - 1, NOW - 20 * SECOND),
        ("lost", "gap", NOW - 30 * SECOND - 1, NOW - 20 * SECOND),
        ("-2m", "before the floor", None, NOW - 60 * SECOND),
        ("-0s", "future", NOW - SECOND, None),
        ("2099-01-01T00:00:00Z", "future", NOW - SECOND, None),
    ],
)
def test_what_cannot_be_reached_is_refused_with_its_neighbours(
    text: str, why: str, before: int | None, after: int | None
) -> None:
    with pytest.raises(PointError, match=why) as caught:
        resolve(text, PLAIN)
    assert (caught.value.nearest_before_ns, caught.value.nearest_after_ns) == (before, after)
    for at_ns in (before, after):
        assert at_ns is None or format_instant(at_ns) in caught.value.hint


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(PointError, match="no checkpoint"):
        resolve("nope", PLAIN)
    with pytest.raises(PointError) as caught:
        resolve("nope", History(floor_ns=0, latest_ns=NOW, group="web"))
    assert caught.value.hint.endswith("blockrepl checkpoint list web")


def test_a_group_whose_first_sync_is_not_done_has_no_points() -> None:
    for text in ("latest", "-1s", "flush"):
        with pytest.raises(PointError):
            resolve(text, History(floor_ns=None, latest_ns=NOW))


@given(
    floor=st.integers(0, 30),
    latest=st.integers(0, 60),
    spans=st.lists(st.tuples(st.integers(0, 60), st.none() | st.integers(0, 60)), max_size=5),
    asked=st.integers(-1, 70),
)
def test_refusals_and_neighbours_match_a_naive_reading(
    floor: int, latest: int, spans: list[tuple[int, int | None]], asked: int
) -> None:
    gaps = [Gap(first, last) for first, last in spans]
    history = History(floor, latest, points.union(gaps))

    def in_gap(at: int) -> bool:
        return any(
            gap.from_ns <= at
            and (gap.to_ns is None or (gap.from_ns < gap.to_ns and at < gap.to_ns))
            for gap in gaps
        )

    reachable = [at for at in range(floor, latest + 1) if not in_gap(at)]
    before = max((at for at in reachable if at <= asked), default=None)
    after = min((at for at in reachable if at >= asked), default=None)
    assert points.nearest(history, asked) == (before, after)
    point = Point("x", points.Instant(asked))
    if asked in reachable:
        assert points.resolve(point, now_ns=0, history=history).at_ns == asked
    else:
        with pytest.raises(PointError) as caught:
            points.resolve(point, now_ns=0, history=history)
        assert caught.value.nearest_before_ns == before
        assert caught.value.nearest_after_ns == after
