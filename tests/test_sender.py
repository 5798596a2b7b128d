"""The sender's session: its window, what acknowledgements free, and where to go on with a disk."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.errors import PeerError
from blockrepl.formats.messages import AttachedDisk
from blockrepl.session.sender import DiskState, Resume, RingState, SendWindow, resume


@dataclass(frozen=True)
class Message:
    number: int
    size_bytes: int = 10


def window(window_messages: int = 4, window_bytes: int = 100) -> SendWindow[Message]:
    return SendWindow(window_messages, window_bytes)


# --- window


def test_the_window_is_full_by_messages() -> None:
    sent = window(window_messages=2, window_bytes=1000)
    sent.sent(Message(10))
    assert sent.has_room(10)
    sent.sent(Message(11))
    assert not sent.has_room(10)
    sent.acknowledged(1, 10)
    assert sent.has_room(10)


def test_the_window_is_full_by_bytes() -> None:
    sent = window(window_messages=100, window_bytes=100)
    sent.sent(Message(10, 60))
    assert sent.has_room(40)
    assert not sent.has_room(41)
    sent.sent(Message(11, 40))
    assert not sent.has_room(1)
    sent.acknowledged(1, 10)
    assert sent.has_room(60)
    assert sent.size_bytes == 40


@given(st.lists(st.integers(1, 40)), st.lists(st.integers(0, 5)))
def test_the_window_is_never_passed_and_all_that_is_sent_comes_free_once_in_order(
    sizes: list[int], answers: list[int]
) -> None:
    sent = window(window_messages=4, window_bytes=100)
    waiting = [Message(number, size) for number, size in enumerate(sizes, 1)]
    everything = list(waiting)
    freed: list[Message] = []
    in_flight: list[Message] = []
    acknowledged = 0
    for answer in [*answers, *[4] * len(sizes)]:
        while waiting and sent.has_room(waiting[0].size_bytes):
            in_flight.append(waiting[0])
            sent.sent(waiting.pop(0))
        assert len(in_flight) == len(sent.items) <= 4
        assert sum(one.size_bytes for one in in_flight) == sent.size_bytes <= 100
        count = min(answer, len(in_flight))
        acknowledged += count
        del in_flight[:count]
        freed += sent.acknowledged(acknowledged, acknowledged)
    assert freed == everything


# --- acknowledgements


def test_nothing_is_free_before_it_is_acknowledged() -> None:
    sent = window()
    sent.sent(Message(10))
    assert sent.acknowledged(0, 9) == []
    assert len(sent.items) == 1


def test_an_acknowledgement_covers_all_before_it_in_order() -> None:
    sent = window()
    for number in (10, 11, 12):
        sent.sent(Message(number))
    assert sent.acknowledged(2, 11) == [Message(10), Message(11)]
    assert sent.acknowledged(3, 12) == [Message(12)]


def test_the_same_acknowledgement_twice_frees_nothing_more() -> None:
    sent = window()
    sent.sent(Message(10))
    assert len(sent.acknowledged(1, 10)) == 1
    assert sent.acknowledged(1, 10) == []


@pytest.mark.parametrize(
    ("messages", "number"),
    [(3, 11), (1 << 63, 11), (0, 11), (2, 12), (2, 1 << 63)],
    ids=["more-than-sent", "far-more", "goes-back", "number-not-sent", "far-number"],
)
def test_a_receiver_that_acknowledges_what_cannot_be_lies(messages: int, number: int) -> None:
    sent = window()
    sent.sent(Message(10))
    sent.sent(Message(11))
    sent.acknowledged(1, 10)
    with pytest.raises(PeerError):
        sent.acknowledged(messages, number)
    assert len(sent.items) == 1


def test_base_frames_are_acknowledged_without_a_number_of_their_own() -> None:
    sent = window()
    sent.sent(Message(0))
    assert sent.acknowledged(1, 9) == [Message(0)]


# --- where to go on: the table, row by row

RING, OTHER = 77, 78


def known(state: DiskState, ring_id: int, next_sequence: int) -> AttachedDisk:
    return AttachedDisk(
        id=UUID(int=1), epoch=1, state=state, ring_id=ring_id, next_sequence=next_sequence
    )


def ring(
    *,
    has_stale: bool = False,
    tail: int = 100,
    head: int = 200,
    durable: int = 100,
    is_first: bool = False,
) -> RingState:
    return RingState(RING, tail, head, has_stale, durable, is_first)


@pytest.mark.parametrize("has_stale", [False, True])
@pytest.mark.parametrize("ring_id", [0, RING, OTHER])
@pytest.mark.parametrize("state", ["empty", "ready", "gap"])
def test_another_replica_makes_everything_stale(
    state: DiskState, ring_id: int, has_stale: bool
) -> None:
    answer = known(state, ring_id, 1 << 40)  # of whatever ring that replica knew
    assert resume(answer, ring(has_stale=has_stale), same_replica=False) == Resume(
        200, mark_all_stale=True, gap=state == "ready"
    )


@pytest.mark.parametrize("has_stale", [False, True])
@pytest.mark.parametrize("next_sequence", [100, 150, 200])
@pytest.mark.parametrize("state", ["empty", "ready", "gap"])
def test_the_same_ring_goes_on_at_the_receivers_next_record(
    state: DiskState, next_sequence: int, has_stale: bool
) -> None:
    answer = known(state, RING, next_sequence)
    assert resume(answer, ring(has_stale=has_stale), same_replica=True) == Resume(
        next_sequence, mark_all_stale=False, gap=False
    )


@pytest.mark.parametrize("state", ["empty", "ready", "gap"])
def test_a_receiver_that_lost_durable_records_gets_everything_again(state: DiskState) -> None:
    assert resume(known(state, RING, 99), ring(), same_replica=True) == Resume(
        100, mark_all_stale=True, gap=state == "ready"
    )


def test_a_receiver_that_is_ahead_of_the_ring_lies() -> None:
    with pytest.raises(PeerError):
        resume(known("ready", RING, 201), ring(), same_replica=True)


@pytest.mark.parametrize(("state", "gap"), [("empty", False), ("ready", True), ("gap", False)])
@pytest.mark.parametrize("ring_id", [0, OTHER])
def test_a_new_ring_with_stale_regions_is_a_gap_once_the_first_sync_is_done(
    ring_id: int, state: DiskState, gap: bool
) -> None:
    answer = known(state, ring_id, 5)
    assert resume(answer, ring(has_stale=True), same_replica=True) == Resume(
        100, mark_all_stale=False, gap=gap
    )


@pytest.mark.parametrize("ring_id", [0, OTHER])
def test_the_ring_of_the_first_sync_says_itself_what_it_lacks_while_it_is_the_only_one(
    ring_id: int,
) -> None:
    answer = known("ready", ring_id, 0)
    assert resume(answer, ring(has_stale=True, is_first=True), same_replica=True) == Resume(
        100, mark_all_stale=False, gap=ring_id == OTHER
    )


@pytest.mark.parametrize("state", ["empty", "ready", "gap"])
@pytest.mark.parametrize("ring_id", [0, OTHER])
def test_a_new_ring_with_nothing_stale_follows_one_that_was_retired_in_order(
    ring_id: int, state: DiskState
) -> None:
    answer = known(state, ring_id, 5)
    assert resume(answer, ring(), same_replica=True) == Resume(100, mark_all_stale=False, gap=False)


@pytest.mark.parametrize("has_stale", [False, True])
@pytest.mark.parametrize("state", ["empty", "ready", "gap"])
@pytest.mark.parametrize("ring_id", [0, OTHER])
def test_a_receiver_that_knows_nothing_of_a_ring_that_let_go_of_records_has_lost_them(
    ring_id: int, state: DiskState, has_stale: bool
) -> None:
    # Guards "ring.tail > ring.durable" in resume: a store restored from a copy of before the ring's
    # first records, or a spool that is gone, and an agent killed before it could note anything.
    answer = known(state, ring_id, 5)
    assert resume(answer, ring(has_stale=has_stale, durable=99), same_replica=True) == Resume(
        100, mark_all_stale=True, gap=state == "ready"
    )
