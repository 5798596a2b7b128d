"""What a frame lets go of is the same when it is built and when it is read back from the spool."""

from __future__ import annotations

from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outgoing import DISK, RING, bytes_of, content, marked, records

from blockrepl import limits
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Columns, FrameKind, RecordKind
from blockrepl.formats.marks import CheckpointMark, ConsistentMark, GapMark, Mark, decode_mark
from blockrepl.session.release import HeldReleases, Release, release_of
from blockrepl.units import MIB

MARKS: dict[str, tuple[Mark, Release]] = {
    "checkpoint": (CheckpointMark(name="a", at_ns=5), Release(checkpoint="a")),
    "gap": (GapMark(disk=DISK, from_ns=7), Release(DISK.bytes, gap_from=7)),
    "consistent": (ConsistentMark(disk=DISK, at_ns=9), Release(DISK.bytes, consistent=True)),
}


@pytest.mark.parametrize(("mark", "wanted"), MARKS.values(), ids=MARKS)
def test_a_mark_lets_go_of_what_it_says(mark: Mark, wanted: Release) -> None:
    frame, _ = marked(3, mark)
    body = memoryview(bytes_of(frame))[frames.HEADER_BYTES :]
    again = decode_mark(frames.decode_payload(frame.header, body))
    assert release_of(frame.header, None, mark) == wanted
    assert release_of(frame.header, None, again) == wanted


def test_the_end_of_a_sync_lets_go_of_the_records_before_it() -> None:
    frame, mark = marked(3, ConsistentMark(disk=DISK, at_ns=9), ring_id=RING, first_sequence=41)
    found = release_of(frame.header, None, mark)
    assert found == Release(DISK.bytes, RING, next_sequence=41, consistent=True)


def test_records_let_go_of_the_ring_up_to_the_last_of_them() -> None:
    found = release_of(records(3, 41).header, None, None)
    assert found == Release(DISK.bytes, RING, next_sequence=42)


def test_a_watermark_alone_lets_go_of_nothing() -> None:
    frame = frames.encode_frame(
        kind=FrameKind.RECORDS,
        group=UUID(int=1).bytes,
        source=bytes(16),
        number=1,
        watermark=5,
    )
    assert release_of(frame.header, None, None).next_sequence == 0


def test_content_lets_go_of_its_regions_and_if_journaled_of_the_records_before_it() -> None:
    frame, found = content(3, 41, 6)
    assert release_of(frame.header, found, None) == Release(DISK.bytes, RING, 41, (6,))
    base, found = content(0, 41, 6)
    assert release_of(base.header, found, None) == Release(DISK.bytes, RING, 0, (6,))


def test_what_has_no_number_is_held_until_one_behind_it_is_durable() -> None:
    held = HeldReleases()
    first, second = Release(DISK.bytes, regions=(1,)), Release(DISK.bytes, regions=(2,))
    held.hold(7, first)
    held.hold(9, second)
    assert held.take(7) == []  # frames before 7
    assert held.take(8) == [first]
    assert held.take(9) == []
    held.clear()
    assert held.take(100) == []


EXTENTS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=6)


@given(EXTENTS)
def test_regions_are_all_those_that_a_byte_of_it_lies_in(rows: list[tuple[int, int]]) -> None:
    # Guards ``- np.uint64(1)`` in release._regions: the region behind would count as sent.
    quarter = MIB // 4
    extents = [(first * quarter, count * quarter) for first, count in rows]
    found = Columns(
        np.full(len(extents), 1000, np.uint64),
        np.array([offset for offset, _ in extents], np.uint64),
        np.array([length for _, length in extents], np.uint32),
        np.full(len(extents), RecordKind.ZERO, np.uint8),
    )
    header = content(3, 0, 0)[0].header
    wanted = {
        at // limits.REGION_BYTES
        for offset, length in extents
        for at in range(offset, offset + length, quarter)
    }
    assert release_of(header, found, None).regions == tuple(sorted(wanted))
