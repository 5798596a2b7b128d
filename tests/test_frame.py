"""The frame: round trips, every damage found, and no lie that costs more than an error."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import lz4.block
import numpy as np
import pytest
import xxhash
from format_tables import byte_table, field, struct_fields
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Columns, EncodedFrame, FrameHeader, FrameKind, RecordKind

GROUP, SOURCE, DISK = bytes([1]) * 16, bytes([2]) * 16, bytes([3]) * 16
BLOCK = limits.BLOCK_BYTES
U64_MAX = (1 << 64) - 1

Record = tuple[int, int, int, int]  # stamp, offset, length, kind


def columns(records: list[Record]) -> Columns:
    return Columns(
        np.array([r[0] for r in records], np.uint64),
        np.array([r[1] for r in records], np.uint64),
        np.array([r[2] for r in records], np.uint32),
        np.array([r[3] for r in records], np.uint8),
    )


def build(records: list[Record], payload: bytes, kind: FrameKind = FrameKind.RECORDS) -> bytes:
    return joined(encode(records, payload, kind))


def encode(records: list[Record], payload: bytes, kind: FrameKind) -> EncodedFrame:
    return frames.encode_frame(
        kind=kind,
        group=GROUP,
        source=SOURCE,
        disk=DISK,
        number=7,
        epoch=3,
        watermark=11,
        ring_id=13,
        first_sequence=17,
        columns=columns(records),
        payload=payload,
    )


def joined(frame: EncodedFrame) -> bytes:
    return b"".join(bytes(buffer) for buffer in frame.buffers)


def read(data: bytes) -> tuple[FrameHeader, Columns, bytes]:
    """What every reader does with a frame's bytes."""
    header = frames.decode_header(data)
    body = data[frames.HEADER_BYTES :]
    frames.check_body(header, body)
    return header, frames.parse_columns(header, body), frames.decode_payload(header, body)


def reseal(header: FrameHeader, table: bytes, blocks: bytes, **changes: int | FrameKind) -> bytes:
    """A frame whose digests are right, whatever it says: what a peer that lies can send."""
    sealed = replace(
        header,
        body_bytes=len(table) + len(blocks),
        digest=xxhash.xxh3_64_intdigest(table),
    )
    return frames.encode_header(replace(sealed, **changes)) + table + blocks  # type: ignore[arg-type]


SAMPLE_RECORDS: list[Record] = [
    (100, 4096, 5, RecordKind.WRITE),
    (101, 0, 1 << 31, RecordKind.TRIM),
    (101, 512, 3, RecordKind.WRITE | frames.FUA),
    (130, 0, 0, RecordKind.FLUSH),
]
SAMPLE = build(SAMPLE_RECORDS, b"hello123")

# A frame of version 1, as it was written first. Journals hold such bytes: they must stay readable.
RECORDED = (
    "4252463101000100010101010101010101010101010101010202020202020202020202020202020203030303"
    "0303030303030303030303030700000000000000030000000400000064000000000000008200000000000000"
    "0b000000000000000d00000000000000110000000000000008000000000000006800000001000000bb421218"
    "c97699bad91989b6ce3d9c7c6400000000000000650000000000000065000000000000008200000000000000"
    "0010000000000000000000000000000000020000000000000000000000000000050000000000008003000000"
    "00000000000280032f2956424757c4ce0800008068656c6c6f313233"
)


# --- layout


def test_the_docstrings_byte_table_is_the_struct() -> None:
    fields = struct_fields(frames.HEADER)
    assert byte_table(frames.__doc__) == [*fields, (frames.HEADER.size, 8)]
    assert frames.HEADER_BYTES == 144


def test_each_field_is_where_the_table_says() -> None:
    data = SAMPLE
    header = frames.decode_header(data)
    table = 4 * frames.RECORD_BYTES + frames.BLOCK_ENTRY_BYTES
    values: list[int | bytes] = [
        b"BRF1",
        1,
        FrameKind.RECORDS,
        0,
        GROUP,
        SOURCE,
        DISK,
        7,  # number
        3,  # epoch
        4,  # record count
        100,
        130,
        11,  # watermark
        13,  # ring id
        17,  # first sequence
        8,  # payload bytes
        table + 8,
        1,  # block count
        xxhash.xxh3_64_intdigest(data[144 : 144 + table]),
        xxhash.xxh3_64_intdigest(data[:136]),
    ]
    found = [field(data, place) for place in byte_table(frames.__doc__)]
    expected = [
        int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
        for value in values
    ]
    assert found == expected
    assert header.blocks_offset == table
    assert header.frame_bytes == len(data)


def test_a_frame_written_by_the_first_version_is_read_and_written_the_same() -> None:
    assert bytes.fromhex(RECORDED) == SAMPLE
    header, found, payload = read(bytes.fromhex(RECORDED))
    assert (header.number, header.watermark, payload) == (7, 11, b"hello123")
    assert found.kinds.tolist() == [record[3] for record in SAMPLE_RECORDS]


# --- round trips


@st.composite
def frame_contents(draw: st.DrawFn) -> tuple[list[Record], bytes]:
    kinds = st.sampled_from([k | fua for k in RecordKind for fua in (0, frames.FUA)])
    size = st.one_of(st.integers(0, 5000), st.integers(0, 3 * BLOCK))
    rows = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1 << 60), size, kinds)))
    seed = draw(st.integers(0, 1 << 32))
    stamp, records, parts = 1, [], []
    generator = np.random.default_rng(seed)
    for step, offset, length, kind in rows:
        stamp += step
        records.append((stamp, offset, length, kind))
        if kind & frames.KIND_MASK == RecordKind.WRITE:
            parts.append(bytes(length) if step % 2 else generator.bytes(length))
    return records, b"".join(parts)


@given(frame_contents(), st.sampled_from([FrameKind.RECORDS, FrameKind.BASE, FrameKind.SYNC]))
@settings(max_examples=60, deadline=None)
def test_a_frame_comes_back_as_it_was(
    contents: tuple[list[Record], bytes], kind: FrameKind
) -> None:
    records, payload = contents
    encoded = encode(records, payload, kind)
    header, found, data = read(joined(encoded))
    assert header == encoded.header
    assert data == payload
    rows = zip(found.stamps, found.offsets, found.lengths, found.kinds, strict=True)
    assert [tuple(int(value) for value in row) for row in rows] == records
    assert int(found.payload_lengths().sum()) == len(payload)
    assert (header.first_stamp, header.last_stamp) == (
        (records[0][0], records[-1][0]) if records else (0, 0)
    )


def test_each_block_is_read_and_proven_without_the_others() -> None:
    payload = np.random.default_rng(1).bytes(BLOCK) + bytes(BLOCK) + b"tail" * 100
    data = build([(1, 0, len(payload), RecordKind.WRITE)], payload)
    header = frames.decode_header(data)
    body = data[frames.HEADER_BYTES :]
    blocks = frames.parse_blocks(header, body[: header.blocks_offset])
    assert blocks.raw.tolist() == [True, False, False]
    for index in range(3):
        stored = body[int(blocks.offsets[index]) : int(blocks.offsets[index + 1])]
        block = frames.decode_block(blocks, index, stored)
        assert bytes(block) == payload[index * BLOCK : (index + 1) * BLOCK]
        with pytest.raises(PeerError):
            frames.decode_block(blocks, index, stored[:-1])


def test_blocks_that_do_not_shrink_are_passed_on_without_a_copy() -> None:
    noise = np.random.default_rng(2).bytes(5 * BLOCK)
    payload = bytearray(noise[: 2 * BLOCK] + bytes(BLOCK) + noise[2 * BLOCK :] + b"end")
    encoded = encode([(1, 0, len(payload), RecordKind.WRITE)], payload, FrameKind.RECORDS)  # type: ignore[arg-type]
    before, packed, behind = encoded.buffers[1:]
    assert len(before) == 2 * BLOCK
    assert len(packed) < BLOCK // 100
    assert len(behind) == 3 * BLOCK + len(b"end")
    for raw in (before, behind):
        assert isinstance(raw, memoryview)
        assert raw.obj is payload
    assert read(b"".join(encoded.buffers))[2] == payload


# --- damage


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_found(mask: int) -> None:
    for at in range(len(SAMPLE)):
        damaged = bytearray(SAMPLE)
        damaged[at] ^= mask
        with pytest.raises(PeerError):
            read(bytes(damaged))


def test_every_flipped_byte_of_several_blocks_is_found() -> None:
    payload = np.random.default_rng(3).bytes(BLOCK) + b"ab" * (BLOCK // 2) + b"end"
    data = build([(1, 0, len(payload), RecordKind.WRITE)], payload)
    head = frames.HEADER_BYTES + frames.decode_header(data).blocks_offset
    places = {*range(head), *range(head, len(data), 509), *range(len(data) - 600, len(data))}
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(PeerError):
            read(bytes(damaged))


@pytest.mark.parametrize("block", range(3))
def test_a_body_is_proven_to_its_last_block_without_its_payload_being_decoded(block: int) -> None:
    # Guards `first_damaged` in check_body.
    payload = np.random.default_rng(3).bytes(BLOCK) + b"ab" * (BLOCK // 2) + b"end"
    data = build([(1, 0, len(payload), RecordKind.WRITE)], payload)
    header, body = frames.decode_header(data), bytearray(data[frames.HEADER_BYTES :])
    frames.check_body(header, body)
    first, after = frames.parse_blocks(header, body).offsets[block : block + 2].tolist()
    for at in (first, after - 1):
        damaged = bytearray(body)
        damaged[at] ^= 1
        with pytest.raises(PeerError):
            frames.check_body(header, damaged)


def test_every_truncation_and_any_surplus_is_found() -> None:
    for size in range(len(SAMPLE)):
        with pytest.raises(PeerError):
            read(SAMPLE[:size])
    with pytest.raises(PeerError):
        read(SAMPLE + b"\0")


@given(st.binary(max_size=400))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        frames.decode_header(data)


# --- lies


HEADER = frames.decode_header(SAMPLE)
TABLE = SAMPLE[frames.HEADER_BYTES :][: HEADER.blocks_offset]
BLOCKS = SAMPLE[frames.HEADER_BYTES + HEADER.blocks_offset :]


def test_the_sample_resealed_is_the_sample() -> None:
    assert reseal(HEADER, TABLE, BLOCKS) == SAMPLE


@pytest.mark.parametrize(
    "lie",
    [
        {"record_count": (1 << 32) - 1},
        {"record_count": limits.FRAME_RECORDS_MAX + 1},
        {"payload_bytes": U64_MAX},
        {"payload_bytes": limits.FRAME_PAYLOAD_BYTES_MAX + 1},
        {"body_bytes": (1 << 32) - 1},
        {"body_bytes": limits.FRAME_BODY_BYTES_MAX + 1},
        {"body_bytes": 0},
        {"block_count": (1 << 32) - 1},
        {"block_count": 0},
        {"block_count": 2},
        {"first_stamp": 131},
        {"record_count": 0},
        {"record_count": 0, "first_stamp": 0},
        {"record_count": 0, "first_stamp": 0, "last_stamp": 0},
        {"kind": FrameKind.MARK},
    ],
)
def test_sizes_that_lie_are_refused_by_the_header_alone(lie: dict[str, int]) -> None:
    forged = frames.encode_header(replace(HEADER, **lie))  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        with pytest.raises(PeerError):
            frames.decode_header(forged)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * 1024


@pytest.mark.parametrize("payload_bytes", [0, limits.MARK_BYTES_MAX + 1])
def test_a_mark_has_a_payload_within_its_limit(payload_bytes: int) -> None:
    blocks = -(-payload_bytes // BLOCK)
    header = replace(
        HEADER,
        kind=FrameKind.MARK,
        record_count=0,
        payload_bytes=payload_bytes,
        block_count=blocks,
        body_bytes=blocks * frames.BLOCK_ENTRY_BYTES,
    )
    with pytest.raises(PeerError, match="mark"):
        frames.decode_header(frames.encode_header(header))


@pytest.mark.parametrize(("field_at", "value"), [(4, 2), (6, 0), (6, 5)])
def test_an_unknown_version_or_kind_is_refused(field_at: int, value: int) -> None:
    data = bytearray(SAMPLE[: frames.HEADER.size])
    data[field_at] = value
    data += xxhash.xxh3_64_digest(bytes(data))[::-1]
    with pytest.raises(PeerError, match="not known"):
        frames.decode_header(bytes(data))


def columns_table(change: Callable[[Columns], None]) -> bytes:
    changed = columns(SAMPLE_RECORDS)
    change(changed)
    plain = b"".join(
        column.tobytes()
        for column in (changed.stamps, changed.offsets, changed.lengths, changed.kinds)
    )
    return plain + TABLE[len(plain) :]


def _swap_stamps(c: Columns) -> None:
    c.stamps[1], c.stamps[2] = 102, 101


def _lengthen(c: Columns) -> None:
    c.lengths[0] += 1


def _write_more(c: Columns) -> None:
    c.kinds[1] = RecordKind.WRITE  # its two gigabytes are not there


def _first_stamp(c: Columns) -> None:
    c.stamps[0] = 99


def _last_stamp(c: Columns) -> None:
    c.stamps[3] = U64_MAX


@pytest.mark.parametrize(
    "change", [_swap_stamps, _lengthen, _write_more, _first_stamp, _last_stamp]
)
def test_columns_that_contradict_the_frame_are_refused(change: Callable[[Columns], None]) -> None:
    forged = reseal(HEADER, columns_table(change), BLOCKS)
    with pytest.raises(PeerError):
        read(forged)


def blocks_frame(blocks: list[tuple[bytes, bool]], payload_bytes: int) -> bytes:
    """A frame of one write with these stored blocks: (bytes, raw)."""
    table = (
        np.array([1, 0], np.uint64).tobytes()
        + np.array([payload_bytes], np.uint32).tobytes()
        + bytes([RecordKind.WRITE])
        + b"".join(xxhash.xxh3_64_digest(stored)[::-1] for stored, _ in blocks)
        + np.array(
            [len(stored) | (frames.RAW_BIT if raw else 0) for stored, raw in blocks], np.uint32
        ).tobytes()
    )
    return reseal(
        replace(HEADER, record_count=1, first_stamp=1, last_stamp=1),
        table,
        b"".join(stored for stored, _ in blocks),
        payload_bytes=payload_bytes,
        block_count=len(blocks),
    )


def test_a_hand_made_frame_reads() -> None:
    assert read(blocks_frame([(b"abc", True)], 3))[2] == b"abc"


@pytest.mark.parametrize(
    ("stored", "raw", "payload_bytes"),
    [
        (b"", False, 5),
        (b"", True, 5),
        (b"abcd", True, 5),
        (b"abcdef", True, 5),
        (b"\xff" * 300, False, 5),
        (lz4.block.compress(bytes(10 * BLOCK), store_size=False), False, BLOCK),
        (lz4.block.compress(bytes(10), store_size=False), False, 11),
        (lz4.block.compress(bytes(12), store_size=False), False, 11),
    ],
    ids=["empty", "empty-raw", "short", "long", "no-lz4", "bomb", "too-little", "too-much"],
)
def test_a_block_that_is_not_what_it_says_is_refused(
    stored: bytes, raw: bool, payload_bytes: int
) -> None:
    with pytest.raises(PeerError):
        read(blocks_frame([(stored, raw)], payload_bytes))


def test_a_payload_is_proven_to_decompress_a_block_at_a_time() -> None:
    # Guards the loop in check_payload: what it has decompressed is not kept.
    payload = bytes(limits.FRAME_PAYLOAD_BYTES_MAX)
    stored = lz4.block.compress(payload[:BLOCK], store_size=False)
    data = blocks_frame([(stored, False)] * (len(payload) // BLOCK), len(payload))
    header, body = frames.decode_header(data), memoryview(data)[frames.HEADER_BYTES :]
    tracemalloc.start()
    try:
        frames.check_payload(header, body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * BLOCK


def test_decompression_takes_no_more_than_a_block() -> None:
    bomb = blocks_frame([(lz4.block.compress(bytes(1 << 24), store_size=False), False)], BLOCK)
    tracemalloc.start()
    try:
        with pytest.raises(PeerError):
            read(bomb)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < len(bomb) + 4 * BLOCK


@given(
    counts=st.tuples(st.integers(0, 5), st.integers(0, 3 * BLOCK)),
    body=st.binary(max_size=300),
    kind=st.sampled_from(FrameKind),
    stamps=st.tuples(st.integers(0, 3), st.integers(0, U64_MAX)),
    stored=st.lists(st.tuples(st.binary(max_size=40), st.booleans()), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_a_peer_with_right_digests_gets_no_further_than_an_error(
    counts: tuple[int, int],
    body: bytes,
    kind: FrameKind,
    stamps: tuple[int, int],
    stored: list[tuple[bytes, bool]],
) -> None:
    record_count, payload_bytes = counts
    column_bytes = (body * frames.RECORD_BYTES + bytes(200))[: record_count * frames.RECORD_BYTES]
    table = (
        column_bytes
        + b"".join(xxhash.xxh3_64_digest(block)[::-1] for block, _ in stored)
        + np.array(
            [len(block) | (frames.RAW_BIT if raw else 0) for block, raw in stored], np.uint32
        ).tobytes()
    )
    forged = reseal(
        HEADER,
        table,
        b"".join(block for block, _ in stored),
        kind=kind,
        record_count=record_count,
        payload_bytes=payload_bytes,
        block_count=-(-payload_bytes // BLOCK),
        first_stamp=stamps[0],
        last_stamp=stamps[1],
    )
    try:
        header, found, payload = read(forged)
    except PeerError:
        return
    assert len(payload) == header.payload_bytes
    assert len(found.stamps) == header.record_count
