"""Filling a buffer from files, blocks and zeros: against a model, with every failure told."""

from __future__ import annotations

import errno
import os
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lz4.block
import pytest
import xxhash

from blockrepl.storage import _gather
from blockrepl.storage._gather import BLOCK_BYTES, Gather, ProvenBlocks

IMAGE = -1
RAW, PACKED = 0, 1  # frames: all blocks of one are stored raw, of the other compressed


@dataclass
class Store:
    """A segment file of two frames of three blocks, and a base image shorter than its disk."""

    segment: int
    image: int
    image_bytes: bytes
    payload: dict[int, bytes]
    blocks: dict[tuple[int, int], tuple[int, int, int, bool, int]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    rng = random.Random(1)
    payload = {
        RAW: rng.randbytes(3 * BLOCK_BYTES - 5000),
        PACKED: b"".join(bytes([n % 251]) * 512 for n in range(3 * 128)),
    }
    blocks = {}
    stored = b"head"
    for frame, data in payload.items():
        for index in range(3):
            plain = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            kept = plain if frame == RAW else lz4.block.compress(plain, store_size=False)
            digest = xxhash.xxh3_64_intdigest(kept)
            blocks[frame, index] = (len(stored), len(kept), len(plain), frame == RAW, digest)
            stored += kept
    image = rng.randbytes(300_000)
    (tmp_path / "segment").write_bytes(stored)
    (tmp_path / "image").write_bytes(image)
    segment, base = (os.open(tmp_path / name, os.O_RDONLY) for name in ("segment", "image"))
    yield Store(segment, base, image, payload, blocks)
    for descriptor in (segment, base):
        os.close(descriptor)


class Layout:
    """Random extents of a disk, and the bytes that they show."""

    def __init__(self, store: Store, seed: int) -> None:
        rng = random.Random(seed)
        self.bounds = array("Q", [rng.randrange(1000)])
        self.columns = [array("I"), array("I"), array("I")]
        self.truth = b""
        kinds = []
        for _ in range(rng.randrange(1, 40)):
            at = self.bounds[-1]
            kind = rng.choice([0, 0, 0, 1, 255])
            frame = rng.choice([RAW, PACKED])
            size = rng.choice([1, 512, 4096, rng.randrange(1, 100_000)])
            position = rng.randrange(len(store.payload[frame]) - size)
            kinds.append(kind)
            for column, value in zip(self.columns, (7, frame, position), strict=True):
                column.append(value)
            self.bounds.append(at + size)
            shown = bytes(size)
            if kind == 0:
                shown = store.payload[frame][position : position + size]
            elif kind == 255:
                shown = store.image_bytes[at : at + size].ljust(size, b"\0")
            self.truth += shown
        self.kinds = bytes(kinds)

    def gather(self, proven: ProvenBlocks, first: int, last: int) -> Gather:
        return gathered(proven, self.bounds, self.kinds, self.columns, first, last)


def gathered(
    proven: ProvenBlocks,
    bounds: array[int],
    kinds: bytes,
    columns: Sequence[array[int]],
    first: int,
    last: int,
) -> Gather:
    segments, frames, positions = columns
    return Gather(proven, bounds, kinds, segments, frames, positions, first, last)


def orders(store: Store, gather: Gather) -> list[tuple[int, int, int, int, int, bool, int]]:
    return [
        (number, store.segment, *store.blocks[frame, index])
        for number, (_segment, frame, index) in enumerate(gather.missing)
    ]


@pytest.mark.parametrize("flags", [0, os.RWF_NOWAIT])
def test_a_range_is_what_its_extents_show(store: Store, flags: int) -> None:
    proven = ProvenBlocks(4)
    for seed in range(60):
        layout = Layout(store, seed)
        start, end = layout.bounds[0], layout.bounds[-1]
        rng = random.Random(seed)
        for _ in range(3):
            first = rng.randrange(start, end)
            last = rng.randrange(first, end) + 1
            gather = layout.gather(proven, first, last)
            target = memoryview(bytearray(last - first))
            wanted = orders(store, gather)
            by_hand = [order for order in wanted if rng.random() < 0.3]
            for number, *_ in by_hand:
                _, frame, index = gather.missing[number]
                block = store.payload[frame][index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                assert gather.supply(number, block, target)
            rest = [order for order in wanted if order not in by_hand]
            failed, _, payloads = gather.prove(rest, target, flags)
            assert failed == -1
            for order, payload in zip(rest, payloads, strict=True):
                _, frame, index = gather.missing[order[0]]
                if frame == RAW:
                    assert payload is None
                    proven.add(7, frame, index, order[2], order[4])
                else:
                    at = index * BLOCK_BYTES
                    assert payload == store.payload[frame][at : at + BLOCK_BYTES]
            descriptors = {7: store.segment, IMAGE: store.image}
            assert set(gather.files()) <= descriptors.keys()
            assert gather.read(descriptors, target, flags) == (0, 0, 0)
            assert target == layout.truth[first - start : last - start]


def test_more_blocks_than_it_has_room_for_are_forgotten_not_confused(store: Store) -> None:
    """Guards the comparison of whole keys in ProvenBlocks.find."""
    proven = ProvenBlocks(3)
    for segment in range(500):
        proven.add(segment, 1, 2, segment * 10, 4096)
    remembered = 0
    for segment in range(1000):
        columns = (array("I", [segment]), array("I", [1]), array("I", [2 * BLOCK_BYTES]))
        gather = gathered(proven, array("Q", [0, 16]), b"\0", columns, 0, 16)
        remembered += not gather.missing
        assert segment < 500 or gather.missing
    assert 4 <= remembered <= 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"digest": 1}, _gather.WRONG_DIGEST),
        ({"offset": 1 << 30}, _gather.ENDS_TOO_SOON),
        ({"payload": -1}, _gather.WRONG_SIZE),
        ({"stored": BLOCK_BYTES + 1}, _gather.WRONG_SIZE),
        ({"payload": -60_000, "both": True}, _gather.WRONG_SIZE),
        ({"descriptor": -1}, errno.EBADF),
    ],
)
@pytest.mark.parametrize("frame", [RAW, PACKED])
def test_a_block_that_is_not_true_is_told(
    store: Store, change: dict[str, int], reason: int, frame: int
) -> None:
    columns = (array("I", [7]), array("I", [frame]), array("I", [0]))
    gather = gathered(ProvenBlocks(4), array("Q", [0, 9]), b"\0", columns, 0, 9)
    ((number, descriptor, offset, stored, payload, is_raw, digest),) = orders(store, gather)
    descriptor = change.get("descriptor", descriptor)
    offset += change.get("offset", 0)
    stored = change.get("stored", stored)
    payload += change.get("payload", 0)
    digest ^= change.get("digest", 0)
    order = (number, descriptor, offset, stored, payload, is_raw, digest)
    target = memoryview(bytearray(9))
    failed, told, _ = gather.prove([order], target, 0)
    assert (failed, told) == (0, reason)
    assert bytes(target) == bytes(9)


def test_an_entry_that_leads_out_of_its_block_is_told(store: Store) -> None:
    size = len(store.payload[RAW]) - 2 * BLOCK_BYTES
    columns = (array("I", [7]), array("I", [RAW]), array("I", [2 * BLOCK_BYTES + size - 5]))
    gather = gathered(ProvenBlocks(4), array("Q", [0, 9]), b"\0", columns, 0, 9)
    target = memoryview(bytearray(9))
    assert gather.prove(orders(store, gather), target, 0)[:2] == (0, _gather.LEADS_OUT)
    assert not gather.supply(0, store.payload[RAW][2 * BLOCK_BYTES :], target)


def test_a_segment_that_ends_too_soon_is_told_and_an_image_is_zeros(store: Store) -> None:
    proven = ProvenBlocks(4)
    proven.add(7, 0, 0, 1 << 30, BLOCK_BYTES)
    start = 1 << 20  # beyond the image's end
    bounds = array("Q", [start, start + 9, start + 20])
    columns = (array("I", [0, 7]), array("I", [0, 0]), array("I", [0, 0]))
    gather = gathered(proven, bounds, b"\xff\0", columns, start, start + 20)
    descriptors = {7: store.segment, IMAGE: store.image}
    target = memoryview(bytearray(20))
    assert gather.read(descriptors, target, 0) == (_gather.ENDS_TOO_SOON, 7, 1 << 30)
    assert bytes(target) == bytes(20)


def test_what_does_not_fit_is_refused(store: Store) -> None:
    columns = (array("I", [7]), array("I", [RAW]), array("I", [0]))
    bounds = array("Q", [10, 20])
    for first, last in ((9, 12), (12, 21), (14, 13)):
        with pytest.raises(ValueError, match="leads out of its window"):
            gathered(ProvenBlocks(4), bounds, b"\0", columns, first, last)
    with pytest.raises(ValueError, match="differ in length"):
        gathered(ProvenBlocks(4), array("Q", [10]), b"\0", columns, 10, 10)
    gather = gathered(ProvenBlocks(4), bounds, b"\0", columns, 10, 20)
    with pytest.raises(ValueError, match="too short"):
        gather.prove(orders(store, gather), bytearray(5), 0)
    with pytest.raises(ValueError, match="too short"):
        gather.supply(0, store.payload[RAW][:BLOCK_BYTES], bytearray(5))


def test_places_that_follow_one_another_in_different_files_are_read_from_each(store: Store) -> None:
    """Guards the comparison of sources in Gather._add."""
    proven = ProvenBlocks(4)
    proven.add(7, RAW, 0, 100, BLOCK_BYTES)
    columns = (array("I", [0, 7]), array("I", [0, RAW]), array("I", [0, 0]))
    gather = gathered(proven, array("Q", [0, 100, 200]), b"\xff\0", columns, 0, 200)
    target = memoryview(bytearray(200))
    assert gather.read({7: store.segment, IMAGE: store.image}, target, 0) == (0, 0, 0)
    assert target == store.image_bytes[:100] + os.pread(store.segment, 100, 100)
