"""Filling a buffer from files, blocks and zeros: against a model, with every failure told."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import xxhash

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import HEADER, HEADER_BYTES, Columns, FrameHeader, FrameKind
from blockrepl.storage import _gather
from blockrepl.storage._gather import BLOCK_BYTES, IMAGE, Blocks, Gather

RAW, PACKED = 0, 1  # frames: all blocks of one are stored raw, of the other compressed
SEGMENT = 7
PROOFS_MAX = 1000
PAGE = mmap.PAGESIZE
Failure = tuple[int, int, int, int, int]


@dataclass
class Store:
    """A segment file of two frames of three blocks, and a base image shorter than its disk."""

    path: Path
    segment: int
    image: int
    image_bytes: bytes
    payload: list[bytes]
    headers: list[FrameHeader]
    offsets: array[int]
    end: int

    def opened(self, gather: Gather) -> list[tuple[int, array[int], int]]:
        of_image = (self.image, array("Q"), 0)
        return [
            of_image if place == IMAGE else (self.segment, self.offsets, self.end)
            for place in gather.files
        ]

    def read(
        self,
        gather: Gather,
        target: bytearray,
        blocks: Blocks | None = None,
        *,
        wait: bool = True,
        proofs_max: int = PROOFS_MAX,
    ) -> Failure | None:
        kept = blocks or Blocks(1 << 20, 1 << 20)
        return gather.read(kept, self.opened(gather), target, wait, proofs_max)

    def body(self, frame: int) -> int:
        return self.offsets[frame] + HEADER_BYTES

    def block(self, frame: int, index: int) -> tuple[int, int]:
        """Where a block is stored in the file, and in how many bytes."""
        data = os.pread(self.segment, self.headers[frame].body_bytes, self.body(frame))
        starts = frames.parse_blocks(self.headers[frame], data).offsets
        return self.body(frame) + int(starts[index]), int(starts[index + 1] - starts[index])

    def write(self, offset: int, data: bytes | bytearray) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def flip(self, offset: int) -> None:
        (byte,) = os.pread(self.segment, 1, offset)
        self.write(offset, bytes([byte ^ 0x10]))


def encoded(payload: bytes, records: int = 5) -> tuple[FrameHeader, bytes]:
    """A frame of as many writes, its header apart and all its bytes."""
    lengths = np.full(records, len(payload) // records, np.uint32)
    lengths[-1] += len(payload) % records
    stamps = np.arange(1, records + 1, dtype=np.uint64)
    columns = Columns(stamps, stamps * 4096, lengths, np.zeros(records, np.uint8))
    frame = frames.encode_frame(
        kind=FrameKind.RECORDS,
        group=b"g" * 16,
        source=b"s" * 16,
        disk=b"d" * 16,
        number=1,
        epoch=1,
        watermark=records,
        columns=columns,
        payload=payload,
    )
    return frame.header, b"".join(bytes(part) for part in frame.buffers)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    rng = random.Random(1)
    payload = [
        rng.randbytes(3 * BLOCK_BYTES - 5000),
        b"".join(bytes([n % 251]) * 512 for n in range(3 * 128)),
    ]
    headers, offsets, stored = [], array("Q"), b"head"
    for data in payload:
        header, frame = encoded(data)
        headers.append(header)
        offsets.append(len(stored))
        stored += frame
    image = rng.randbytes(300_000)
    path = tmp_path / "segment"
    path.write_bytes(stored + b"index")
    (tmp_path / "image").write_bytes(image)
    segment, base = (os.open(tmp_path / name, os.O_RDONLY) for name in ("segment", "image"))
    yield Store(path, segment, base, image, payload, headers, offsets, len(stored))
    for descriptor in (segment, base):
        os.close(descriptor)


class Layout:
    """Random extents of a disk, and the bytes that they show."""

    def __init__(self, store: Store, seed: int) -> None:
        rng = random.Random(seed)
        self.bounds = array("Q", [rng.randrange(1000)])
        self.columns = (array("I"), array("I"), array("I"))
        self.truth = b""
        kinds = []
        for _ in range(rng.randrange(1, 40)):
            at = self.bounds[-1]
            kind = rng.choice([0, 0, 0, 1, 255])
            frame = rng.choice([RAW, PACKED])
            size = rng.choice([1, 512, 4096, rng.randrange(1, 100_000)])
            position = rng.randrange(len(store.payload[frame]) - size)
            if not rng.randrange(8):  # whole blocks
                position, size = 0, 2 * BLOCK_BYTES
            kinds.append(kind)
            for column, value in zip(self.columns, (SEGMENT, frame, position), strict=True):
                column.append(value)
            self.bounds.append(at + size)
            shown = bytes(size)
            if kind == 0:
                shown = store.payload[frame][position : position + size]
            elif kind == 255:
                shown = store.image_bytes[at : at + size].ljust(size, b"\0")
            self.truth += shown
        self.kinds = bytes(kinds)

    def check(self, store: Store, rng: random.Random, blocks: Blocks) -> None:
        """Read any part of it, first as one who may not wait."""
        start, end = self.bounds[0], self.bounds[-1]
        first = rng.randrange(start, end)
        last = rng.randrange(first, end) + 1
        gather = Gather(self.bounds, self.kinds, *self.columns, first, last)
        target = bytearray(b"\xa5") * (last - first)
        failure = store.read(gather, target, blocks, wait=False, proofs_max=rng.randrange(4))
        if failure is not None:
            assert failure[0] == errno.EAGAIN
            target = bytearray(b"\xa5") * (last - first)
            assert store.read(gather, target, blocks) is None
        assert target == self.truth[first - start : last - start]


@pytest.mark.parametrize("room", [0, 100_000, 1 << 30])
def test_a_range_is_what_its_extents_show(store: Store, room: int) -> None:
    rng = random.Random(room)
    blocks = Blocks(min(room, 500), room)
    for seed in range(100):
        layout = Layout(store, seed)
        for _ in range(3):
            layout.check(store, rng, blocks)


def test_many_threads_with_room_for_next_to_nothing_read_what_is_there(store: Store) -> None:
    blocks = Blocks(200, 100_000)
    wrong: list[BaseException] = []

    def read(number: int) -> None:
        rng = random.Random(number)
        try:
            for seed in range(60):
                Layout(store, seed + number).check(store, rng, blocks)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def piece(place: int, frame: int, position: int, size: int = 9) -> Gather:
    """Some bytes of a frame's payload, at the beginning of a disk."""
    columns = (array("I", [place]), array("I", [frame]), array("I", [position]))
    return Gather(array("Q", [0, size]), b"\0", *columns, 0, size)


def test_what_is_kept_stays_under_its_limits(store: Store) -> None:
    blocks = Blocks(10_000, 300_000)
    most = 0
    for place in range(2000):
        target = bytearray(16)
        assert store.read(piece(place, PACKED, BLOCK_BYTES, 16), target, blocks) is None
        assert target == store.payload[PACKED][BLOCK_BYTES : BLOCK_BYTES + 16]
        most = max(most, blocks.payload_bytes)
        assert blocks.table_bytes <= 10_000
    assert 200_000 < most <= 300_000


@pytest.mark.parametrize("frame", [RAW, PACKED])
def test_a_block_is_proven_once_as_long_as_that_is_known(store: Store, frame: int) -> None:
    blocks = Blocks(1 << 20, 1 << 20)
    assert store.read(piece(SEGMENT, frame, 10), bytearray(9), blocks) is None
    store.flip(store.block(frame, 0)[0] + 100)
    target = bytearray(9)
    assert store.read(piece(SEGMENT, frame, 10), target, blocks) is None
    assert target == store.payload[frame][10:19]
    other = store.read(piece(SEGMENT + 1, frame, 10), bytearray(9), blocks)
    assert other is not None
    assert other[0] == _gather.WRONG_DIGEST


@pytest.mark.parametrize("size", [9, 4096, BLOCK_BYTES])
@pytest.mark.parametrize("frame", [RAW, PACKED])
@pytest.mark.parametrize("index", [0, 1])
def test_a_block_that_is_not_true_is_told(store: Store, frame: int, index: int, size: int) -> None:
    offset, stored = store.block(frame, index)
    for at in (0, stored // 2, stored - 1):
        store.flip(offset + at)
        gather = piece(SEGMENT, frame, index * BLOCK_BYTES, size)
        failure = store.read(gather, bytearray(size))
        assert failure == (_gather.WRONG_DIGEST, 0, frame, index, offset)
        store.flip(offset + at)


def test_every_flipped_byte_of_a_table_and_what_proves_it_is_noticed(store: Store) -> None:
    header = store.headers[PACKED]
    for at in range(HEADER_BYTES + header.blocks_offset):
        store.flip(store.offsets[PACKED] + at)
        failure = store.read(piece(SEGMENT, PACKED, 0), bytearray(9))
        assert failure is not None
        assert failure[0] == _gather.WRONG_TABLE
        assert failure[2] == PACKED
        store.flip(store.offsets[PACKED] + at)
    assert store.read(piece(SEGMENT, PACKED, 0), bytearray(9)) is None


def with_header(store: Store, offset: int, value: bytes) -> None:
    """Change a field of the packed frame's header, its digest true again."""
    data = bytearray(os.pread(store.segment, HEADER_BYTES, store.offsets[PACKED]))
    data[offset : offset + len(value)] = value
    data[HEADER.size :] = xxhash.xxh3_64_intdigest(data[: HEADER.size]).to_bytes(8, "little")
    store.write(store.offsets[PACKED], data)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (4, b"\2\0"),
        (6, b"\0"),
        (6, b"\5"),
        (68, (limits.FRAME_RECORDS_MAX + 1).to_bytes(4, "little")),
        (112, (limits.FRAME_PAYLOAD_BYTES_MAX + 1).to_bytes(8, "little")),
        (120, (limits.FRAME_BODY_BYTES_MAX + 1).to_bytes(4, "little")),
        (120, b"\1\0\0\0"),
        (124, b"\2\0\0\0"),
    ],
)
def test_a_header_that_the_format_refuses_is_refused(
    store: Store, offset: int, value: bytes
) -> None:
    """The compiled reader of headers against formats/frame.py."""
    with_header(store, offset, value)
    with pytest.raises(PeerError):
        frames.decode_header(os.pread(store.segment, HEADER_BYTES, store.offsets[PACKED]))
    failure = store.read(piece(SEGMENT, PACKED, 0), bytearray(9))
    assert failure is not None
    assert failure[0] == _gather.WRONG_TABLE


def test_the_largest_frame_is_read(tmp_path: Path) -> None:
    """Its columns are longer than what is read at first, and its limits are those of limits.py."""
    payload = random.Random(3).randbytes(limits.FRAME_PAYLOAD_BYTES_MAX)
    header, data = encoded(payload, limits.FRAME_RECORDS_MAX)
    (tmp_path / "segment").write_bytes(data)
    descriptor = os.open(tmp_path / "segment", os.O_RDONLY)
    try:
        for end in (len(data), HEADER_BYTES + header.blocks_offset - 1):
            gather = piece(SEGMENT, 0, len(payload) - 9)
            target = bytearray(9)
            opened = [(descriptor, array("Q", [0]), end)]
            failure = gather.read(Blocks(1 << 20, 0), opened, target, True, PROOFS_MAX)
            if end == len(data):
                assert failure is None
                assert target == payload[-9:]
    finally:
        os.close(descriptor)


def test_a_table_that_does_not_add_up_is_told(store: Store) -> None:
    header = store.headers[RAW]
    body = bytearray(os.pread(store.segment, header.blocks_offset, store.body(RAW)))
    body[-4] ^= 1  # the last block's stored bytes
    store.write(store.body(RAW), body)
    data = bytearray(os.pread(store.segment, HEADER_BYTES, store.offsets[RAW]))
    data[128:136] = xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")
    data[HEADER.size :] = xxhash.xxh3_64_intdigest(data[: HEADER.size]).to_bytes(8, "little")
    store.write(store.offsets[RAW], data)
    failure = store.read(piece(SEGMENT, RAW, 0), bytearray(9))
    assert failure is not None
    assert failure[0] == _gather.WRONG_TABLE


@pytest.mark.parametrize("frame", [RAW, PACKED])
def test_an_entry_that_leads_out_of_the_payload_is_told(store: Store, frame: int) -> None:
    size = len(store.payload[frame])
    assert store.read(piece(SEGMENT, frame, size - 9), bytearray(9)) is None
    for position in (size - 8, size, size + 5 * BLOCK_BYTES):
        failure = store.read(piece(SEGMENT, frame, position), bytearray(9))
        assert failure is not None
        assert (failure[0], failure[2]) == (_gather.LEADS_OUT, frame)
    failure = store.read(piece(SEGMENT, 2, 0), bytearray(9))
    assert failure is not None
    assert failure[0] == _gather.WRONG_TABLE  # a frame that the segment has not


def test_a_segment_that_ends_too_soon_is_told_and_an_image_is_zeros(store: Store) -> None:
    blocks = Blocks(1 << 20, 1 << 20)
    assert store.read(piece(SEGMENT, RAW, 0), bytearray(9), blocks) is None
    offset, _ = store.block(RAW, 0)
    os.truncate(store.path, offset + 4)
    start = 1 << 20  # beyond the image's end
    bounds = array("Q", [start, start + 9, start + 20])
    columns = (array("I", [0, SEGMENT]), array("I", [0, RAW]), array("I", [0, 0]))
    gather = Gather(bounds, b"\xff\0", *columns, start, start + 20)
    assert gather.files == [IMAGE, SEGMENT]
    target = bytearray(b"\xa5") * 9
    assert store.read(gather, bytearray(20), blocks) == (_gather.ENDS_TOO_SOON, 1, 0, 0, offset)
    assert store.read(Gather(bounds, b"\xff\0", *columns, start, start + 9), target) is None
    assert target == bytes(9)
    failure = store.read(piece(SEGMENT, RAW, 0), bytearray(9))
    assert failure == (_gather.ENDS_TOO_SOON, 0, RAW, 0, offset)


def test_a_read_that_fails_says_why(store: Store) -> None:
    gather = piece(SEGMENT, RAW, 0)
    opened = [(-1, store.offsets, store.end)]
    failure = gather.read(Blocks(0, 0), opened, bytearray(9), True, PROOFS_MAX)
    assert failure is not None
    assert failure[0] == errno.EBADF


def test_what_does_not_fit_is_refused(store: Store) -> None:
    columns = (array("I", [SEGMENT]), array("I", [RAW]), array("I", [0]))
    bounds = array("Q", [10, 20])
    for first, last in ((9, 12), (12, 21), (14, 13)):
        with pytest.raises(ValueError, match="leads out of its window"):
            Gather(bounds, b"\0", *columns, first, last)
    with pytest.raises(ValueError, match="differ in length"):
        Gather(array("Q", [10]), b"\0", *columns, 10, 10)
    gather = Gather(bounds, b"\0", *columns, 10, 20)
    with pytest.raises(ValueError, match="too short"):
        store.read(gather, bytearray(5))
    with pytest.raises(ValueError, match="a file is lacking"):
        gather.read(Blocks(0, 0), [], bytearray(10), True, PROOFS_MAX)


def test_places_that_follow_one_another_in_different_files_are_read_from_each(store: Store) -> None:
    """Guards the comparison of files where reads are joined."""
    blocks = Blocks(1 << 20, 1 << 20)
    assert store.read(piece(SEGMENT, RAW, 0), bytearray(9), blocks) is None
    place = store.block(RAW, 0)[0]
    columns = (array("I", [0, SEGMENT]), array("I", [0, RAW]), array("I", [0, 0]))
    bounds = array("Q", [place - 100, place, place + 100])
    target = bytearray(200)
    gather = Gather(bounds, b"\xff\0", *columns, place - 100, place + 100)
    assert store.read(gather, target, blocks) is None
    assert target == store.image_bytes[place - 100 : place] + store.payload[RAW][:100]


def test_what_little_lies_between_two_parts_of_an_image_may_be_anything(store: Store) -> None:
    """Guards the order of the steps: images are read across it, before it is filled."""
    columns = (
        array("I", [0, SEGMENT, 0, 0, 0]),
        array("I", [0, RAW, 0, 0, 0]),
        array("I", [0] * 5),
    )
    bounds = array("Q", [1000, 1300, 1400, 1500, 1600, 2000])
    gather = Gather(bounds, b"\xff\0\xff\1\xff", *columns, 1000, 2000)
    target = bytearray(b"\xa5") * 1000
    assert store.read(gather, target) is None
    shown = bytearray(store.image_bytes[1000:2000])
    shown[300:400], shown[500:600] = store.payload[RAW][:100], bytes(100)
    assert target == shown


@pytest.fixture
def holed() -> Iterator[int]:
    """The address of three pages of this process, the middle one of which cannot be read."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, 3 * PAGE, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0)
    assert libc.munmap(address + PAGE, PAGE) == 0
    yield address
    for page in (address, address + 2 * PAGE):
        assert libc.munmap(page, PAGE) == 0


def test_an_image_may_be_unreadable_where_nothing_is_wanted_of_it(store: Store, holed: int) -> None:
    """Guards the second reading of images, which does not go across what lies between."""
    bounds = array("Q", [holed + page * PAGE for page in range(4)])
    columns = (array("I", [0, SEGMENT, 0]), array("I", [0, RAW, 0]), array("I", [0, 0, 0]))
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        opened = [(memory, array("Q"), 0), (store.segment, store.offsets, store.end)]
        for last, failed in ((3, None), (2, errno.EIO)):
            kinds = b"\xff\0\xff" if failed is None else b"\xff\xff\xff"
            gather = Gather(bounds, kinds, *columns, holed, holed + last * PAGE)
            target = bytearray(b"\xa5") * (last * PAGE)
            failure = gather.read(
                Blocks(1 << 20, 1 << 20), opened[: len(gather.files)], target, True, PROOFS_MAX
            )
            assert (failure and failure[0]) == failed
            if failed is None:
                assert target == bytes(PAGE) + store.payload[RAW][:PAGE] + bytes(PAGE)
    finally:
        os.close(memory)
