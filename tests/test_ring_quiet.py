"""A piece of the image that is called quiet is exactly what the records before it made of it.

First with the real server under load; then case by case, with a ring written step by step.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from oracle.writers import Pace, load, run_while
from ring_writer import RingWriter
from serving import Disk, Replay, place

from blockrepl import limits
from blockrepl.formats.frame import RecordKind
from blockrepl.storage.ring import RingReader, create_ring
from blockrepl.units import KIB, MIB
from scripts.guest.pair import Pair

__all__ = ["place"]

SIZE = 8 * MIB
RECORD_KINDS = [RecordKind.WRITE, RecordKind.ZERO, RecordKind.TRIM]


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_called_quiet_is_what_the_records_say(place: Pair, seed: int) -> None:
    """Guards both looks of is_quiet: at the ranges in flight, and at the records since."""
    disk = Disk(place, size_bytes=16 * MIB, ring_bytes=256 * MIB)
    disk.make_cold()
    disk.start()
    replay = Replay(disk.reader(), bytes(disk.size_bytes))
    reader = replay.reader
    choose = random.Random(seed)
    image = os.open(disk.image, os.O_RDONLY)
    quiet = restless = 0

    def look() -> bool:
        nonlocal quiet, restless
        length = choose.choice((4 * KIB, 64 * KIB, 256 * KIB))
        room = disk.size_bytes // choose.choice((16, 1))  # most of the load is in a sixteenth
        start = choose.randrange(0, room - length, 4096)
        since = reader.position()
        data = os.pread(image, length, start)
        if not reader.is_quiet(start, start + length, since):
            restless += 1
            return restless < 5000
        quiet += 1
        if since.sequence > replay.next:
            replay.drain(until_ns=reader.stamp(since.sequence - 1))
        assert replay.next == since.sequence
        assert data == replay.content[start : start + length], f"[{start}, +{length}) {since}"
        return quiet < 1500 or restless < 300

    try:
        with load(disk.socket, disk.size_bytes, seed=seed, pace=Pace(0.0)) as running:
            run_while(running, look, poll_seconds=0)
    finally:
        os.close(image)
    assert reader.dropped() == 0
    assert quiet > 200
    assert restless > 200


@pytest.fixture
def ring(tmp_path: Path) -> RingReader:
    path = tmp_path / "d.ring"
    create_ring(
        path,
        disk=bytes(16),
        size_bytes=SIZE,
        region_bytes=limits.REGION_BYTES,
        ring_bytes=limits.RING_BYTES_MIN,
        clock_offset=0,
        stale=np.zeros(SIZE // limits.REGION_BYTES, np.uint8),
    )
    return RingReader(path, bytes(16))


@pytest.fixture
def writer(ring: RingReader) -> RingWriter:
    return RingWriter(ring.path)


START, END = 2 * MIB - 4096, 2 * MIB + 4096
# ranges beside [START, END), and ranges that share a byte with it
BESIDE = [(0, START), (END, SIZE), (START - 512, START), (END, END + 1)]
MEETING = [(0, START + 1), (END - 1, SIZE), (START, END), (START + 512, START + 513), (0, SIZE)]


@pytest.mark.parametrize("span", BESIDE + MEETING)
def test_a_write_in_flight_disturbs_its_own_range(
    ring: RingReader, writer: RingWriter, span: tuple[int, int]
) -> None:
    since = ring.position()
    writer.take_range(100, *span)
    assert ring.is_quiet(START, END, since) == (span in BESIDE)
    writer.release_range(100)
    assert ring.is_quiet(START, END, since)  # a refused request: it has changed nothing


@pytest.mark.parametrize("kind", RECORD_KINDS)
@pytest.mark.parametrize("span", BESIDE + MEETING)
def test_a_record_since_disturbs_its_own_range(
    ring: RingReader, writer: RingWriter, span: tuple[int, int], kind: RecordKind
) -> None:
    before = ring.position()
    if kind == RecordKind.WRITE:
        writer.write(span[0], bytes(span[1] - span[0]))
    else:
        writer.append(kind, span[0], span[1] - span[0])
    assert ring.is_quiet(START, END, before) == (span in BESIDE)
    assert ring.is_quiet(START, END, ring.position())


def test_a_flush_disturbs_nothing(ring: RingReader, writer: RingWriter) -> None:
    since = ring.position()
    writer.append(RecordKind.FLUSH)
    assert ring.is_quiet(0, SIZE, since)


def test_a_stale_region_is_not_quiet(ring: RingReader) -> None:
    since = ring.position()
    for region in (1, 2):
        ring.stale[region] = 1
        assert not ring.is_quiet(START, END, since)
        ring.stale[region] = 0
    ring.stale[[0, 3]] = 1
    assert ring.is_quiet(START, END, since)


def test_a_drop_is_noticed_though_its_region_is_synced_meanwhile(
    ring: RingReader, writer: RingWriter
) -> None:
    since = ring.position()
    writer.drop(START, 512)
    ring.begin_sync(START // limits.REGION_BYTES)
    assert not ring.is_quiet(START, END, since)
    ring.end_sync(START // limits.REGION_BYTES)
    assert not ring.is_quiet(START, END, since)
    assert ring.is_quiet(START, END, ring.position())


def test_a_write_cut_off_by_a_kill_is_noticed_though_it_is_cleaned_up_meanwhile(
    ring: RingReader, writer: RingWriter
) -> None:
    since = ring.position()
    writer.take_range(3, START, END)
    ring.recover_in_flight(5)
    for region in (1, 2):
        ring.begin_sync(region)
    assert not ring.is_quiet(START, END, since)


def test_a_ring_that_has_gone_round_cannot_tell(ring: RingReader, writer: RingWriter) -> None:
    since = ring.position()
    slots = ring.geometry.slot_count
    for number in range(slots - 1):
        writer.append(RecordKind.FLUSH)
        ring.release(number + 1)
    assert ring.is_quiet(0, SIZE, since)
    writer.append(RecordKind.FLUSH)
    assert not ring.is_quiet(0, SIZE, since)


def test_a_record_is_found_on_both_sides_of_the_wrap(ring: RingReader, writer: RingWriter) -> None:
    for number in range(ring.geometry.slot_count - 2):
        writer.append(RecordKind.FLUSH)
        ring.release(number + 1)
    for at in range(4):
        since = ring.position()
        for number in range(4):
            writer.append(RecordKind.TRIM, START if number == at else 0, 512)
        assert not ring.is_quiet(START, END, since)
        assert ring.is_quiet(START + 512, END, since)
