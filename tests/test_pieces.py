"""Content of an image as records: nothing missed, holes and zeros never become payload."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrepl import limits
from blockrepl.formats.frame import RecordKind
from blockrepl.storage.pieces import (
    DATA_REGIONS_MAX,
    HOLE_REGIONS_MAX,
    Piece,
    choose_regions,
    read_piece,
)
from blockrepl.units import GIB, KIB, MIB

REGION = limits.REGION_BYTES
BLOCK = limits.BLOCK_BYTES
Record = tuple[int, int, int]  # offset, length, kind


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def records(piece: Piece) -> list[Record]:
    found = piece.columns
    rows = zip(found.offsets.tolist(), found.lengths.tolist(), found.kinds.tolist(), strict=True)
    return list(rows)


def paint(piece: Piece, disk: bytearray) -> None:
    at = 0
    for offset, length, kind in records(piece):
        if kind == RecordKind.WRITE:
            disk[offset : offset + length] = piece.payload[at : at + length]
            at += length
        else:
            assert kind == RecordKind.ZERO
            disk[offset : offset + length] = bytes(length)
    assert at == len(piece.payload)


def stale_map(size_bytes: int, *regions: int) -> np.ndarray:
    stale = np.zeros(-(-size_bytes // REGION), np.uint8)
    stale[list(regions)] = 1
    return stale


# --- the property

EXTENTS = st.lists(
    st.tuples(
        st.integers(0, 11 * MIB // 512).map(lambda sector: sector * 512),
        st.sampled_from([512, 4 * KIB, BLOCK, BLOCK + 512, MIB, 3 * MIB]),
        st.sampled_from(["data", "zeros", "hole"]),
    ),
    max_size=8,
)


@given(
    extents=EXTENTS,
    size=st.integers(1, 12 * MIB // 512).map(lambda sectors: sectors * 512),
    chosen=st.lists(st.booleans(), min_size=12, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_pieces_carry_every_stale_region_and_touch_no_other(
    tmp_path_factory: pytest.TempPathFactory,
    extents: list[tuple[int, int, str]],
    size: int,
    chosen: list[bool],
) -> None:
    path = tmp_path_factory.mktemp("image") / "image"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(descriptor, size)
        for offset, length, what in extents:
            length = min(length, size - offset)
            if length > 0 and what != "hole":
                os.pwrite(
                    descriptor, random_bytes(length) * (what == "data") or bytes(length), offset
                )
        stale = np.array(chosen[: -(-size // REGION)], np.uint8)
        disk, truth = bytearray(b"\xaa" * size), path.read_bytes()
        expected = bytearray(disk)
        for region in np.nonzero(stale)[0].tolist():
            expected[region * REGION : (region + 1) * REGION] = truth[
                region * REGION : (region + 1) * REGION
            ]
        rounds = 0
        while stale.any():
            regions = choose_regions(descriptor, stale, size)
            assert stale[regions.start : regions.stop].all()
            assert len(regions) > 0
            piece = read_piece(descriptor, regions, size, 42)
            assert piece.regions == regions
            assert len(piece.payload) <= DATA_REGIONS_MAX * REGION
            assert set(piece.columns.stamps.tolist()) == {42}
            paint(piece, disk)
            stale[regions.start : regions.stop] = 0
            rounds += 1
        assert disk == expected
        assert rounds <= 12
    finally:
        os.close(descriptor)
        path.unlink()


# --- holes and zeros


def test_a_hole_is_one_zero_record(image: int) -> None:
    os.ftruncate(image, 8 * MIB)
    os.pwrite(image, b"x", 7 * MIB)
    regions = choose_regions(image, np.ones(8, np.uint8), 8 * MIB)
    assert regions == range(7)
    piece = read_piece(image, regions, 8 * MIB, 1)
    assert records(piece) == [(0, 7 * MIB, RecordKind.ZERO)]
    assert piece.payload == b""


def test_blocks_of_written_zeros_are_zero_records(image: int) -> None:
    os.pwrite(image, random_bytes(BLOCK) + bytes(14 * BLOCK) + random_bytes(BLOCK), 0)
    piece = read_piece(image, range(1), MIB, 1)
    assert records(piece) == [
        (0, BLOCK, RecordKind.WRITE),
        (BLOCK, 14 * BLOCK, RecordKind.ZERO),
        (15 * BLOCK, BLOCK, RecordKind.WRITE),
    ]
    assert len(piece.payload) == 2 * BLOCK


def test_a_hole_of_terabytes_goes_in_records_that_fit_their_length_field(image: int) -> None:
    size = 4096 * GIB
    os.ftruncate(image, size)
    stale = np.ones(size // REGION, np.uint8)
    sent = 0
    while stale.any():
        regions = choose_regions(image, stale, size)
        piece = read_piece(image, regions, size, 1)
        assert records(piece) == [(sent, len(regions) * REGION, RecordKind.ZERO)]
        sent += len(regions) * REGION
        stale[regions.start : regions.stop] = 0
        if sent == 16 * GIB:
            stale[: stale.size - HOLE_REGIONS_MAX] = 0  # the rest of the middle is alike
            sent = size - HOLE_REGIONS_MAX * REGION
    assert sent == size
    assert HOLE_REGIONS_MAX * REGION < 1 << 32


def test_a_hole_ends_where_a_region_is_not_stale(image: int) -> None:
    os.ftruncate(image, 8 * MIB)
    assert choose_regions(image, stale_map(8 * MIB, 2, 3, 5), 8 * MIB) == range(2, 4)


def test_a_region_that_begins_with_a_hole_is_read_whole(image: int) -> None:
    os.ftruncate(image, 4 * MIB)
    data = random_bytes(BLOCK)
    os.pwrite(image, data, MIB // 2)
    regions = choose_regions(image, np.ones(4, np.uint8), 4 * MIB)
    assert regions == range(1)
    piece = read_piece(image, regions, 4 * MIB, 1)
    assert records(piece) == [
        (0, MIB // 2, RecordKind.ZERO),
        (MIB // 2, BLOCK, RecordKind.WRITE),
        (MIB // 2 + BLOCK, MIB // 2 - BLOCK, RecordKind.ZERO),
    ]
    assert piece.payload == data


# --- ends


def test_data_goes_a_few_regions_at_a_time(image: int) -> None:
    os.pwrite(image, random_bytes(6 * MIB), 0)
    regions = choose_regions(image, np.ones(6, np.uint8), 6 * MIB)
    assert regions == range(DATA_REGIONS_MAX)
    assert len(read_piece(image, regions, 6 * MIB, 1).payload) == DATA_REGIONS_MAX * REGION


@pytest.mark.parametrize("size", [512, BLOCK - 512, BLOCK + 512, 2 * MIB + 1536])
def test_a_tail_shorter_than_a_region_ends_with_the_disk(image: int, size: int) -> None:
    data = random_bytes(size)
    os.pwrite(image, data, 0)
    regions = choose_regions(image, np.ones(-(-size // REGION), np.uint8), size)
    piece = read_piece(image, regions, size, 1)
    assert records(piece) == [(0, size, RecordKind.WRITE)]
    assert piece.payload == data


def test_a_tail_that_is_a_hole_ends_with_the_disk(image: int) -> None:
    size = 2 * MIB + 512
    os.ftruncate(image, size)
    piece = read_piece(image, choose_regions(image, np.ones(3, np.uint8), size), size, 1)
    assert records(piece) == [(0, size, RecordKind.ZERO)]


def test_a_file_shorter_than_its_disk_reads_as_zeros_behind_its_end(image: int) -> None:
    os.pwrite(image, b"\1" * 700, 0)
    piece = read_piece(image, range(2), 2 * MIB, 1)
    assert records(piece) == [
        (0, BLOCK, RecordKind.WRITE),
        (BLOCK, 2 * MIB - BLOCK, RecordKind.ZERO),
    ]
    assert piece.payload == b"\1" * 700 + bytes(BLOCK - 700)


def test_a_hole_that_the_guest_fills_meanwhile_still_fits_a_frame(image: int) -> None:
    size = 64 * MIB
    os.ftruncate(image, size)
    regions = choose_regions(image, np.ones(64, np.uint8), size)
    assert regions == range(64)
    os.pwrite(image, random_bytes(20 * MIB), 0)  # before it is read
    piece = read_piece(image, regions, size, 1)
    assert len(piece.payload) <= limits.FRAME_PAYLOAD_BYTES_MAX
    assert len(piece.columns.stamps) <= limits.FRAME_RECORDS_MAX
    assert 0 < len(piece.regions) < 64
    offset, length, _ = records(piece)[-1]
    assert offset + length == piece.regions.stop * REGION


def test_scattered_data_in_a_hole_that_was_chosen_still_fits_a_frame(image: int) -> None:
    size = 256 * MIB
    os.ftruncate(image, size)
    for region in range(256):
        os.pwrite(image, random_bytes(BLOCK), region * REGION + MIB // 2)
    piece = read_piece(image, range(256), size, 1)
    assert DATA_REGIONS_MAX * REGION <= len(piece.payload) <= limits.FRAME_PAYLOAD_BYTES_MAX
    offset, length, _ = records(piece)[-1]
    assert offset + length == piece.regions.stop * REGION == 64 * REGION
