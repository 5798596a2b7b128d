"""The merged run's file: tables as told, names, damage."""

from __future__ import annotations

import re
from uuid import UUID

import pytest
from format_tables import struct_fields
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.errors import PeerError
from blockrepl.formats import merged_run
from blockrepl.formats.merged_run import MergedContents, MergedName, SegmentIdentity
from blockrepl.formats.segment import RunEntry

GROUP = bytes(range(16))
ENTRY = RunEntry(
    disk=UUID(int=1),
    directory_offset=40,
    chunks=1,
    long_chunks=0,
    count=1,
    first_stamp=1,
    last_stamp=2,
    digest=3,
)
SEGMENTS = [SegmentIdentity(number, number * 7, 1000 + number, 5) for number in (3, 4, 6)]
CONTENTS = MergedContents(
    name=str(MergedName.of(SEGMENTS)), first_stamp=1, last_stamp=2, runs=[ENTRY]
)


def told(part: str) -> list[int]:
    """Sizes of the fields that the docstring's row names, in order."""
    row = re.search(rf"^{part} .*?(?=^[a-z]|^==)", merged_run.__doc__ or "", re.M | re.S)
    assert row is not None
    text = re.sub(r"\s+", " ", row[0]).split("bytes: ", 1)[1]
    text = re.sub(r"group id \(16\)", "u128", text).replace("of bytes 0 to 31 of the trailer", "")
    return [8 if m == "magic" else int(m[1:]) // 8 for m in re.findall(r"magic|u\d+", text)]


def test_the_docstrings_tables_are_the_structs() -> None:
    for part, form, whole in (
        ("header", merged_run.HEADER, merged_run.HEADER_BYTES),
        ("trailer", merged_run.TRAILER, merged_run.TRAILER_BYTES),
    ):
        assert told(part) == [*(size for _, size in struct_fields(form)), 8]
        assert sum(told(part)) == whole
    assert f"magic ``{merged_run.MAGIC.decode()}``" in (merged_run.__doc__ or "")
    assert f"magic ``{merged_run.END_MAGIC.decode()}``" in (merged_run.__doc__ or "")


def test_a_name_tells_any_other_segment() -> None:
    """Guards the identity in MergedName.of: what it leaves out, a stale run could differ in."""
    name = MergedName.of(SEGMENTS)
    assert (name.first, name.last) == (3, 6)
    assert MergedName.parse(str(name)) == name
    others = {
        MergedName.of([SEGMENTS[0], SegmentIdentity(*changed), SEGMENTS[2]])
        for changed in ((4, 29, 1004, 5), (4, 28, 1005, 5), (4, 28, 1004, 6), (5, 28, 1004, 5))
    }
    assert len(others) == 4
    assert name not in others
    assert MergedName.of([SEGMENTS[0], SEGMENTS[2]]) != name


@pytest.mark.parametrize("name", ["", "x.run", f"{MergedName.of(SEGMENTS)}.tmp", "1-2-3.run"])
def test_other_files_are_no_merged_runs(name: str) -> None:
    assert MergedName.parse(name) is None


def test_header_and_contents_come_back_and_every_flipped_byte_is_found() -> None:
    header = merged_run.encode_header(GROUP)
    assert merged_run.decode_header(header) == GROUP
    for at in range(len(header)):
        with pytest.raises(PeerError):
            merged_run.decode_header(_flipped(header, at))
    end = merged_run.encode_end(CONTENTS, 99)
    trailer = end[-merged_run.TRAILER_BYTES :]
    offset, size, digest = merged_run.decode_trailer(trailer)
    assert (offset, size) == (99, len(end) - len(trailer))
    assert merged_run.decode_contents(end[:size], digest) == CONTENTS
    for at in range(len(trailer)):
        with pytest.raises(PeerError):
            merged_run.decode_trailer(_flipped(trailer, at))
    for at in range(size):
        with pytest.raises(PeerError):
            merged_run.decode_contents(_flipped(end[:size], at), digest)


@given(st.binary(max_size=60))
def test_foreign_bytes_raise_one_error(data: bytes) -> None:
    for parse in (merged_run.decode_header, merged_run.decode_trailer):
        with pytest.raises(PeerError):
            parse(data)


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
