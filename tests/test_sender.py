"""The sender's session: its window, what acknowledgements free, and where to go on with a disk."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.errors import PeerError
from blockrepl.formats.messages import Attached, AttachedDisk
from blockrepl.session.sender import (
    DiskState,
    GroupSender,
    Release,
    Resume,
    RingState,
    resume,
)

GROUP = UUID(int=3)


def sender(window_messages: int = 4, window_bytes: int = 100, next_number: int = 10) -> GroupSender:
    answer = Attached(group="web", group_id=GROUP, next_number=next_number, watermark=50, disks=[])
    return GroupSender.attached(answer, window_messages, window_bytes)


def send(group: GroupSender, size_bytes: int = 10, watermark: int = 60, name: str = "") -> int:
    number = group.take_number()
    group.sent(size_bytes, watermark, Release(checkpoint=name))
    return number


# --- numbers


def test_numbers_go_on_where_the_receiver_asks_without_gaps() -> None:
    group = sender()
    assert group.group == GROUP.bytes
    assert [group.take_number() for _ in range(3)] == [10, 11, 12]


# --- window


def test_the_window_is_full_by_messages() -> None:
    group = sender(window_messages=2, window_bytes=1000)
    send(group)
    assert group.has_room(10)
    send(group)
    assert not group.has_room(10)
    group.acknowledged(1, 10)
    assert group.has_room(10)


def test_the_window_is_full_by_bytes() -> None:
    group = sender(window_messages=100, window_bytes=100)
    send(group, size_bytes=60)
    assert group.has_room(40)
    assert not group.has_room(41)
    send(group, size_bytes=40)
    assert not group.has_room(1)
    group.acknowledged(1, 10)
    assert group.has_room(60)
    assert group.in_flight_bytes == 40


@given(st.lists(st.integers(1, 40)), st.lists(st.integers(0, 5)))
def test_the_window_is_never_passed_and_all_that_is_sent_comes_free_once_in_order(
    sizes: list[int], answers: list[int]
) -> None:
    group = sender(window_messages=4, window_bytes=100)
    waiting = list(enumerate(sizes))
    freed: list[str] = []
    in_flight: list[int] = []
    acknowledged = 0
    for answer in [*answers, *[4] * len(sizes)]:
        while waiting and group.has_room(waiting[0][1]):
            index, size = waiting.pop(0)
            send(group, size, name=str(index))
            in_flight.append(size)
        assert len(in_flight) == group.in_flight_messages <= 4
        assert sum(in_flight) == group.in_flight_bytes <= 100
        count = min(answer, len(in_flight))
        acknowledged += count
        del in_flight[:count]
        freed += [
            release.checkpoint
            for release in group.acknowledged(acknowledged, group.next_number - 1)
        ]
    assert freed == [str(index) for index in range(len(sizes))]


# --- acknowledgements


def test_nothing_is_free_before_it_is_acknowledged() -> None:
    group = sender()
    send(group, watermark=70)
    assert group.acknowledged(0, 9) == []
    assert group.in_flight_messages == 1
    assert group.durable_watermark == 50


def test_an_acknowledgement_covers_all_before_it_in_order() -> None:
    group = sender()
    for name in ("a", "b", "c"):
        send(group, name=name)
    assert [release.checkpoint for release in group.acknowledged(2, 11)] == ["a", "b"]
    assert [release.checkpoint for release in group.acknowledged(3, 12)] == ["c"]


def test_the_same_acknowledgement_twice_frees_nothing_more() -> None:
    group = sender()
    send(group)
    assert len(group.acknowledged(1, 10)) == 1
    assert group.acknowledged(1, 10) == []


def test_the_durable_watermark_follows_and_never_goes_back() -> None:
    group = sender()
    send(group, watermark=90)
    send(group, watermark=80)  # a base frame carries the watermark before it
    group.acknowledged(1, 10)
    assert group.durable_watermark == 90
    group.acknowledged(2, 11)
    assert group.durable_watermark == 90


@pytest.mark.parametrize(
    ("messages", "number"),
    [(3, 11), (1 << 63, 11), (0, 11), (2, 12), (2, 1 << 63)],
    ids=["more-than-sent", "far-more", "goes-back", "number-not-sent", "far-number"],
)
def test_a_receiver_that_acknowledges_what_cannot_be_lies(messages: int, number: int) -> None:
    group = sender()
    send(group)
    send(group)
    group.acknowledged(1, 10)
    with pytest.raises(PeerError):
        group.acknowledged(messages, number)
    assert group.in_flight_messages == 1


def test_base_frames_are_acknowledged_without_a_number_of_their_own() -> None:
    group = sender()
    group.sent(10, 50, Release(regions=(1, 2)))
    assert [release.regions for release in group.acknowledged(1, 9)] == [(1, 2)]


# --- where to go on: the table, row by row

RING, OTHER = 77, 78


def known(state: DiskState, ring_id: int, next_sequence: int) -> AttachedDisk:
    return AttachedDisk(
        id=UUID(int=1), epoch=1, state=state, ring_id=ring_id, next_sequence=next_sequence
    )


def ring(*, has_stale: bool = False, tail: int = 100, head: int = 200) -> RingState:
    return RingState(RING, tail, head, has_stale)


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


@pytest.mark.parametrize("state", ["empty", "ready", "gap"])
@pytest.mark.parametrize("ring_id", [0, OTHER])
def test_a_new_ring_with_nothing_stale_follows_one_that_was_retired_in_order(
    ring_id: int, state: DiskState
) -> None:
    answer = known(state, ring_id, 5)
    assert resume(answer, ring(), same_replica=True) == Resume(100, mark_all_stale=False, gap=False)
