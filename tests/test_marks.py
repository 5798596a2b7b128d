"""Marks: round trips, and what a source may not say."""

from __future__ import annotations

import json
import re
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats import marks
from blockrepl.formats.marks import CheckpointMark, ConsistentMark, GapMark, GrowMark

STAMPS = st.integers(0, (1 << 63) - 1)
NAMES = st.from_regex(re.compile(limits.NAME_PATTERN), fullmatch=True)
DISK = str(UUID(int=5))

MARKS = st.one_of(
    st.builds(
        CheckpointMark,
        name=NAMES,
        at_ns=STAMPS,
        kind=st.sampled_from(["crash", "application"]),
        kept=st.booleans(),
    ),
    st.builds(GapMark, disk=st.uuids(), from_ns=STAMPS),
    st.builds(ConsistentMark, disk=st.uuids(), at_ns=STAMPS),
    st.builds(
        GrowMark,
        disk=st.uuids(),
        at_ns=STAMPS,
        size_bytes=st.integers(1, limits.DISK_BYTES_MAX // 512).map(lambda count: count * 512),
    ),
)


@given(MARKS)
def test_a_mark_comes_back_as_it_was_and_fits_its_frame(
    mark: marks.Mark,
) -> None:
    data = marks.encode_mark(mark)
    assert marks.decode_mark(data) == mark
    assert len(data) <= limits.MARK_BYTES_MAX


def test_the_docstring_names_the_marks_there_are() -> None:
    told = re.findall(r"^([a-z]+) {2,}(?:``|from)", marks.__doc__ or "", re.MULTILINE)
    assert told == [
        kind.model_fields["mark"].default
        for kind in (CheckpointMark, GapMark, ConsistentMark, GrowMark)
    ]


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        None,
        {"mark": "floor", "at_ns": 1},
        {"mark": "checkpoint", "at_ns": 1},
        {"mark": "checkpoint", "name": "", "at_ns": 1},
        {"mark": "checkpoint", "name": "a" * 64, "at_ns": 1},
        {"mark": "checkpoint", "name": "../x", "at_ns": 1},
        {"mark": "checkpoint", "name": ".x", "at_ns": 1},
        {"mark": "checkpoint", "name": "a\n", "at_ns": 1},
        {"mark": "checkpoint", "name": "a/b", "at_ns": 1},
        {"mark": "checkpoint", "name": "A", "at_ns": 1},
        {"mark": "checkpoint", "name": "ok", "at_ns": -1},
        {"mark": "checkpoint", "name": "ok", "at_ns": 1 << 63},
        {"mark": "checkpoint", "name": "ok", "at_ns": 1, "kind": "clean"},
        {"mark": "gap", "disk": "root", "from_ns": 1},
        {"mark": "gap", "disk": DISK},
        {"mark": "gap", "disk": DISK, "from_ns": 1 << 63},
        {"mark": "consistent", "disk": DISK, "at_ns": None},
    ],
)
def test_a_mark_that_says_nothing_sound_is_refused(content: object) -> None:
    with pytest.raises(PeerError):
        marks.decode_mark(json.dumps(content).encode())


def test_what_a_later_version_adds_is_passed_over() -> None:
    data = json.dumps({"mark": "gap", "disk": DISK, "from_ns": 1, "cause": "x"}).encode()
    assert marks.decode_mark(data) == GapMark(disk=UUID(DISK), from_ns=1)


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        marks.decode_mark(data)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 60_000,
        b'{"mark":' * 7_000,
        b'{"mark":"gap","disk":"' + DISK.encode() + b'","from_ns":' + b"9" * 50_000 + b"}",
        b'{"mark":"gap","disk":"' + DISK.encode() + b'","from_ns":1e999}',
        b'{"mark":"checkpoint","name":"\\ud800","at_ns":1}',
        b'{"mark":"gap","disk":"' + DISK.encode() + b'","from_ns":NaN}',
    ],
    ids=["deep-list", "deep-object", "long-number", "infinite", "surrogate", "nan"],
)
def test_json_made_to_hurt_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        marks.decode_mark(data)
