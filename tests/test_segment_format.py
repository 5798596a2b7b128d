"""The segment's header, trailer and contents: their tables, round trips, damage."""

from __future__ import annotations

import re
from uuid import UUID

import pytest
import xxhash
from format_tables import field, struct_fields
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.errors import PeerError
from blockrepl.formats import segment
from blockrepl.formats.segment import Contents, RunEntry, SegmentHeader, Trailer

U64 = st.integers(0, (1 << 64) - 1)
HEADER = SegmentHeader(bytes(range(16)), 7, 11)
TRAILER = Trailer(13, 17, 19, 23)
CONTENTS = Contents(
    frames_end=64,
    frame_table_offset=93,
    frame_count=1,
    frame_table_digest=5,
    runs=[
        RunEntry(
            disk=UUID(int=1),
            directory_offset=64,
            chunks=1,
            long_chunks=0,
            count=1,
            first_stamp=1,
            last_stamp=2,
            digest=3,
        )
    ],
)


def described(part: str) -> list[int]:
    """Sizes of the fields that the docstring's row names, in order."""
    row = re.search(rf"^{part} .*?(?=^[a-z]|^==)", segment.__doc__ or "", re.MULTILINE | re.DOTALL)
    assert row is not None
    text = re.sub(r"\s+", " ", row[0]).split("bytes: ", 1)[1]
    sizes = []
    for item in text.split(", "):
        word = re.match(r"(magic)|u(32|64)|.*\((\d+)\)$|(\d+) bytes zero", item)
        assert word is not None, item
        magic, bits, count, zeros = word.groups()
        sizes.append(8 if magic else int(bits) // 8 if bits else int(count or zeros))
    return sizes


def test_the_docstrings_tables_are_the_structs() -> None:
    for part, form, whole in (
        ("header", segment.HEADER, segment.HEADER_BYTES),
        ("trailer", segment.TRAILER, segment.TRAILER_BYTES),
    ):
        assert described(part) == [*(size for _, size in struct_fields(form)), 8]
        assert sum(described(part)) == whole
    assert f"{segment.HEADER_BYTES} bytes: magic ``{segment.MAGIC.decode()}``" in segment.__doc__
    assert f"{segment.TRAILER_BYTES} bytes: magic ``{segment.SEAL_MAGIC.decode()}``" in (
        segment.__doc__
    )


def test_each_field_is_where_the_table_says() -> None:
    data = segment.encode_header(HEADER)
    places = [*struct_fields(segment.HEADER), (segment.HEADER.size, 8)]
    group = int.from_bytes(HEADER.group, "little")
    magic = int.from_bytes(segment.MAGIC, "little")
    digest = xxhash.xxh3_64_intdigest(data[:56])
    assert [field(data, place) for place in places] == [magic, 1, 0, group, 7, 11, 0, digest]

    data = segment.encode_trailer(TRAILER)
    places = [*struct_fields(segment.TRAILER), (segment.TRAILER.size, 8)]
    magic = int.from_bytes(segment.SEAL_MAGIC, "little")
    digest = xxhash.xxh3_64_intdigest(data[:40])
    assert [field(data, place) for place in places] == [magic, 13, 17, 19, 23, digest]


def test_file_names_sort_by_number() -> None:
    numbers = [1, 9, 10, 99_999, 100_000]
    assert sorted(map(segment.file_name, reversed(numbers))) == list(
        map(segment.file_name, numbers)
    )


# --- header


@given(st.binary(min_size=16, max_size=16), U64, U64)
def test_a_header_comes_back_as_it_was(group: bytes, number: int, created: int) -> None:
    header = SegmentHeader(group, number, created)
    assert segment.decode_header(segment.encode_header(header)) == header


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_of_a_header_is_found(mask: int) -> None:
    for at in range(segment.HEADER_BYTES):
        damaged = bytearray(segment.encode_header(HEADER))
        damaged[at] ^= mask
        with pytest.raises(PeerError):
            segment.decode_header(bytes(damaged))


def test_every_truncation_of_a_header_is_found() -> None:
    data = segment.encode_header(HEADER)
    for size in range(len(data)):
        with pytest.raises(PeerError):
            segment.decode_header(data[:size])
    assert segment.decode_header(data + b"frames") == HEADER


def test_an_unknown_version_is_refused() -> None:
    data = bytearray(segment.encode_header(HEADER))
    data[8] = 2
    data[56:] = xxhash.xxh3_64_digest(bytes(data[:56]))[::-1]
    with pytest.raises(PeerError, match="version 2"):
        segment.decode_header(bytes(data))


# --- trailer: what does not check is no seal, and no error


@given(U64, U64, U64, U64)
def test_a_trailer_comes_back_as_it_was(a: int, b: int, c: int, d: int) -> None:
    assert segment.decode_trailer(segment.encode_trailer(Trailer(a, b, c, d))) == Trailer(
        a, b, c, d
    )


def test_a_trailer_with_a_flipped_byte_is_no_seal() -> None:
    for at in range(segment.TRAILER_BYTES):
        damaged = bytearray(segment.encode_trailer(TRAILER))
        damaged[at] ^= 0x40
        assert segment.decode_trailer(bytes(damaged)) is None


def test_half_a_trailer_is_no_seal() -> None:
    data = segment.encode_trailer(TRAILER)
    for size in range(len(data)):
        assert segment.decode_trailer(data[:size]) is None
    assert segment.decode_trailer(data + b"\0") is None


@given(st.binary(min_size=segment.TRAILER_BYTES, max_size=segment.TRAILER_BYTES))
def test_other_bytes_are_no_seal(data: bytes) -> None:
    assert segment.decode_trailer(data) is None
    assert segment.decode_trailer(segment.SEAL_MAGIC + data[8:]) is None


# --- contents


def sealed(data: bytes) -> Trailer:
    return Trailer(0, len(data), xxhash.xxh3_64_intdigest(data), 0)


def test_contents_come_back_as_they_were() -> None:
    data = CONTENTS.model_dump_json().encode()
    assert segment.decode_contents(sealed(data), data) == CONTENTS


def test_every_flipped_byte_and_cut_of_contents_is_found() -> None:
    data = CONTENTS.model_dump_json().encode()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x01
        with pytest.raises(PeerError):
            segment.decode_contents(sealed(data), bytes(damaged))
        with pytest.raises(PeerError):
            segment.decode_contents(sealed(data), data[:at])


@given(st.binary(max_size=100))
def test_garbage_with_the_right_digest_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        segment.decode_contents(sealed(data), data)
