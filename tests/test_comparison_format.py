"""COMPARE and VERDICT on the wire: the docstring's tables, round trips, and lying peers."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace

import pytest
from format_tables import byte_table, struct_fields
from hypothesis import given
from hypothesis import strategies as st

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats import comparison
from blockrepl.formats.comparison import (
    BLOCKS_MAX,
    Compare,
    Purpose,
    Verdict,
    block_count,
    decode_compare,
    decode_verdict,
    encode_compare,
    encode_verdict,
)
from blockrepl.formats.messages import AGENT_ACCEPTS, RECEIVER_ACCEPTS, MessageType
from blockrepl.limits import COMPARE_BLOCK_BYTES, COMPARE_BYTES_MAX
from blockrepl.storage.digests import digest_blocks, zero_digests

SAMPLE = Compare(
    b"g" * 16, b"d" * 16, (1 << 64) - 1, Purpose.SCRUB, 1_800_000_000_000_000_000,
    3 * COMPARE_BLOCK_BYTES, COMPARE_BLOCK_BYTES + 512, bytes(range(32)),
)  # fmt: skip

compares = st.builds(
    lambda at, length, **rest: Compare(
        offset=at * COMPARE_BLOCK_BYTES, length=length, digests=b"x" * 16 * block_count(length),
        **rest,
    ),
    st.integers(0, 1 << 20),
    st.integers(1, COMPARE_BYTES_MAX),
    group=st.binary(min_size=16, max_size=16),
    disk=st.binary(min_size=16, max_size=16),
    token=st.integers(0, (1 << 64) - 1),
    purpose=st.sampled_from(Purpose),
    stamp=st.integers(0, (1 << 63) - 1),
)  # fmt: skip


@given(compares)
def test_a_comparison_comes_back_as_it_was(compare: Compare) -> None:
    payload = encode_compare(compare)
    assert decode_compare(payload) == decode_compare(memoryview(payload)) == compare
    assert len(payload) <= RECEIVER_ACCEPTS[MessageType.COMPARE]


@given(st.integers(1, BLOCKS_MAX), st.data())
def test_a_verdict_comes_back_as_it_was(count: int, data: st.DataObject) -> None:
    differing = data.draw(st.sets(st.integers(0, count - 1)))
    verdict = Verdict(b"g" * 16, 7, count, tuple(sorted(differing)))
    payload = encode_verdict(verdict)
    assert decode_verdict(payload) == decode_verdict(memoryview(payload)) == verdict
    assert len(payload) <= AGENT_ACCEPTS[MessageType.VERDICT]


def test_the_tables_of_the_docstring_are_the_structs() -> None:
    # Of the digests the table says "16 n"; the bitmap's size is not a number at all.
    compare, verdict = comparison._COMPARE, comparison._VERDICT
    fields = [*struct_fields(compare), (compare.size, 16), *struct_fields(verdict)]
    assert byte_table(comparison.__doc__) == fields
    payload = encode_compare(SAMPLE)
    assert payload[40] == Purpose.SCRUB
    assert payload[57:65] == (COMPARE_BLOCK_BYTES + 512).to_bytes(8, "little")
    # Bit 0 of the first byte is the first block.
    assert encode_verdict(Verdict(b"g" * 16, 7, 10, (0, 9)))[28:] == b"\x01\x02"


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    for decode in (decode_compare, decode_verdict):
        with suppress(PeerError):
            decode(data)


@given(st.data())
def test_any_byte_changed_is_taken_or_refused(data: st.DataObject) -> None:
    for decode, sample in (
        (decode_compare, encode_compare(SAMPLE)),
        (decode_verdict, encode_verdict(Verdict(b"g" * 16, 7, 10, (1,)))),
    ):
        changed = bytearray(sample)
        changed[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
        with suppress(PeerError):
            decode(changed)


LIES = {
    "an unaligned offset": {"offset": 512},
    "a range beyond any disk": {"offset": limits.DISK_BYTES_MAX},
    "no bytes": {"length": 0, "digests": b""},
    "more than a message's worth": {
        "length": COMPARE_BYTES_MAX + 1,
        "digests": bytes(16 * (BLOCKS_MAX + 1)),
    },
    "a digest too few": {"digests": bytes(16)},
    "half a digest": {"digests": bytes(40)},
    "an instant beyond all": {"stamp": 1 << 63},
    "an unknown purpose": {"purpose": 3},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lying_comparison_is_refused(lie: dict[str, object]) -> None:
    with pytest.raises(PeerError):
        decode_compare(encode_compare(replace(SAMPLE, **lie)))  # type: ignore[arg-type]


def test_a_lying_verdict_is_refused() -> None:
    good = encode_verdict(Verdict(b"g" * 16, 7, 10, ()))
    for lie in (
        good[:-1],
        good + b"\0",
        good[:-1] + b"\x04",  # a block it does not have
        good[:24] + bytes(4),
        good[:24] + (BLOCKS_MAX + 1).to_bytes(4, "little") + bytes(BLOCKS_MAX // 8 + 1),
    ):
        with pytest.raises(PeerError):
            decode_verdict(lie)


# digests


@given(st.binary(max_size=300), st.integers(0, 3 * COMPARE_BLOCK_BYTES), st.integers(0, 1 << 18))
def test_digests_are_those_of_the_blocks(piece: bytes, at: int, length: int) -> None:
    data = bytearray(length)
    data[at : at + len(piece)] = piece
    del data[length:]
    blocks = [data[i : i + COMPARE_BLOCK_BYTES] for i in range(0, len(data), COMPARE_BLOCK_BYTES)]
    expected = b"".join(hashlib.sha256(block).digest()[:16] for block in blocks)
    assert digest_blocks(data) == digest_blocks(memoryview(data)) == expected


@given(st.integers(0, 1 << 18))
def test_zeros_have_the_digests_of_zeros(length: int) -> None:
    assert zero_digests(length) == digest_blocks(bytes(length))
