"""The oracle's checker: true views pass, each planted fault is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
from oracle import stamps
from oracle.checker import check
from oracle.history import WRITE, ZERO, History, Request, View
from oracle.stamps import DAMAGED, ZEROS, identity
from oracle.synthetic import SECTORS, Event, history_of, make_events, replay, view_of

SEEDS = range(6)


def last_instant(events: list[Event]) -> int:
    return max(event.request.ended_ns for event in events)


def instants(events: list[Event], seed: int, count: int = 40) -> list[int]:
    choose = random.Random(seed)
    return [choose.randint(0, last_instant(events) + 10) for _ in range(count)]


def same(a: View, b: View) -> bool:
    return bool((a.sectors == b.sectors).all())


def share(a: Request, b: Request) -> bool:
    return a.first < b.after and b.first < a.after


def contested(events: list[Event], index: int) -> bool:
    """Whether another request was in flight with this one on the same sectors."""
    this = events[index].request
    others = (event.request for event in events[:index] + events[index + 1 :])
    return any(
        share(this, o) and o.issued_ns <= this.ended_ns and this.issued_ns <= o.ended_ns
        for o in others
    )


def definite(events: list[Event], seed: int) -> list[tuple[int, int]]:
    """(index of an event, instant after its end before which nothing else happened or began)."""
    found = []
    for index, event in enumerate(events[:-1]):
        at = event.request.ended_ns
        others = events[:index] + events[index + 1 :]
        quiet = all(not e.request.issued_ns <= at <= e.request.ended_ns for e in others)
        if quiet and events[index + 1].at_ns > at:
            found.append((index, at))
    random.Random(seed).shuffle(found)
    assert found
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_true_views_are_legal(seed: int) -> None:
    events = make_events(seed)
    views = [view_of(events, at) for at in instants(events, seed)]
    assert check(history_of(events), views) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cut_one_record_too_early_is_refused(seed: int) -> None:
    events = make_events(seed)
    refused = 0
    for index, at in definite(events, seed):
        view = replay(events[:index], at)
        if contested(events, index) or same(view, view_of(events, at)):
            continue  # may have happened before what it was in flight with; zeros over zeros
        [problem, *_] = check(history_of(events), [view])
        assert "lost or stale" in problem
        refused += 1
    assert refused


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cut_one_record_too_late_is_refused(seed: int) -> None:
    events = make_events(seed)
    refused = 0
    for index, at in definite(events, seed):
        if events[index + 1].request.kind == WRITE:
            [problem, *_] = check(history_of(events), [replay(events[: index + 2], at)])
            assert "future" in problem
            refused += 1
    assert refused


@pytest.mark.parametrize("seed", SEEDS)
def test_two_swapped_records_are_refused(seed: int) -> None:
    """Neighbours that share sectors and were one after the other, in the wrong order."""
    events = make_events(seed)
    refused = 0
    for index, event in enumerate(events[:-1]):
        for later in range(index + 1, min(index + 6, len(events))):
            a, b = event.request, events[later].request
            if a.kind == WRITE and a.ended_ns < b.issued_ns and share(a, b):
                swapped = [*events[:index], events[later], *events[index + 1 : later], event]
                after = [e for e in events[later + 1 :] if e.at_ns <= b.ended_ns]
                view = replay(swapped + after, b.ended_ns)
                shared = view.sectors[max(a.first, b.first) : min(a.after, b.after)]
                if (shared == identity(a.writer, a.sequence)).any():
                    assert check(history_of(events), [view])
                    refused += 1
    assert refused


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kept_buffer_is_refused(seed: int) -> None:
    """A record whose content is what a later request put into the same memory."""
    events = make_events(seed)
    writes = [event for event in events if event.request.kind == WRITE]
    for early, late in zip(writes[100:110], writes[110:120], strict=True):
        view = view_of(events, early.request.ended_ns)
        place = slice(early.request.first, early.request.after)
        view.sectors[place] = identity(*late.request[:2])
        assert check(history_of(events), [view])


def test_content_in_the_wrong_place_is_damage() -> None:
    data = stamps.encode(1, 1, 0, 4) + stamps.encode(1, 2, 100, 4) + bytes(512)
    assert stamps.decode(data).tolist() == [identity(1, 1)] * 4 + [DAMAGED] * 4 + [ZEROS]


def test_a_torn_sector_is_damage() -> None:
    data = bytearray(stamps.encode(1, 1, 0, 3))
    data[600:1024] = stamps.encode(1, 3, 0, 3)[600:1024]
    assert stamps.decode(bytes(data)).tolist() == [identity(1, 1), DAMAGED, identity(1, 1)]


def one_view(history: History, at_ns: int, *runs: tuple[int, int]) -> list[str]:
    """Check a view given as (identity, sectors) runs; the rest is zeros."""
    content = [number for number, count in runs for _ in range(count)]
    content += [ZEROS] * (SECTORS - len(content))
    return check(history, [View(at_ns, np.array(content, np.int64))])


def test_damage_is_refused() -> None:
    history = History([Request(1, 1, WRITE, 0, 2, 10, 20)], SECTORS)
    assert "origin" in one_view(history, 30, (identity(1, 1), 1), (DAMAGED, 1))[0]
    assert "origin" in one_view(history, 30, (identity(1, 1), 3))[0]
    assert "origin" in one_view(history, 30, (identity(7, 7), 2))[0]


def test_half_of_an_acknowledged_request_is_refused() -> None:
    history = History([Request(1, 1, WRITE, 0, 4, 10, 20)], SECTORS)
    assert one_view(history, 15, (identity(1, 1), 4)) == []
    assert one_view(history, 15) == []
    assert "lost or stale" in one_view(history, 15, (identity(1, 1), 2))[0]


def test_half_of_an_unacknowledged_request_is_legal_and_so_is_none() -> None:
    history = History([Request(1, 1, WRITE, 0, 4, 10, 20, acknowledged=False)], SECTORS)
    assert one_view(history, 30, (identity(1, 1), 2)) == []
    assert one_view(history, 30) == []


def test_an_unacknowledged_request_cannot_happen_after_the_server_was_lost() -> None:
    lost = Request(1, 1, WRITE, 0, 4, 10, 20, acknowledged=False)
    history = History([lost, Request(2, 1, WRITE, 0, 4, 30, 40)], SECTORS)
    assert "lost or stale" in one_view(history, 50, (identity(1, 1), 4))[0]


def test_zeros_where_only_an_older_zero_was_are_refused() -> None:
    history = History(
        [Request(1, 1, ZERO, 0, 4, 10, 20), Request(1, 2, WRITE, 0, 4, 30, 40)], SECTORS
    )
    assert "lost or stale" in one_view(history, 50)[0]


def test_zeros_where_a_newer_zero_was_are_legal() -> None:
    history = History(
        [Request(1, 1, WRITE, 0, 4, 10, 20), Request(1, 2, ZERO, 0, 4, 30, 40)], SECTORS
    )
    assert one_view(history, 50) == []
    assert "lost or stale" in one_view(history, 50, (identity(1, 1), 4))[0]


def test_requests_in_flight_together_have_one_order() -> None:
    history = History(
        [Request(1, 1, WRITE, 0, 4, 10, 40), Request(2, 1, WRITE, 0, 4, 20, 50)], SECTORS
    )
    assert one_view(history, 60, (identity(1, 1), 4)) == []
    assert one_view(history, 60, (identity(2, 1), 4)) == []
    mixed = one_view(history, 60, (identity(1, 1), 2), (identity(2, 1), 2))
    assert "circle" in mixed[0]


def test_a_chain_of_orders_cannot_leave_the_intervals() -> None:
    """Overlapping pairs say third, second, first; but the first had ended before the third."""
    history = History(
        [
            Request(1, 1, WRITE, 0, 2, 10, 30),
            Request(2, 1, WRITE, 1, 4, 20, 60),
            Request(3, 1, WRITE, 3, 5, 40, 70),
        ],
        SECTORS,
    )
    first, second, third = (identity(writer, 1) for writer in (1, 2, 3))
    assert one_view(history, 80, (first, 1), (second, 2), (third, 2)) == []
    wrong = one_view(history, 80, (first, 2), (second, 2), (third, 1))
    assert any("cannot have come before" in problem for problem in wrong)


def test_views_agree_on_the_order() -> None:
    history = History(
        [Request(1, 1, WRITE, 0, 2, 10, 90), Request(2, 1, WRITE, 0, 2, 20, 100)], SECTORS
    )
    both = np.full(SECTORS, ZEROS, np.int64)
    first, second = both.copy(), both.copy()
    first[:2], second[:2] = identity(1, 1), identity(2, 1)
    assert check(history, [View(30, first), View(200, second)]) == []
    # shown, then gone, then back
    assert check(history, [View(30, first), View(40, second), View(200, first)])
    # a later view without what an earlier one had
    assert "lost or stale" in check(history, [View(30, first), View(40, both)])[0]
