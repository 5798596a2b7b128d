"""Payload: any bytes of a frame's payload, proven, without reading the rest of the frame.

A frame's block table is read and proven once, its blocks (64 KiB of payload) one by one as they
are needed.

=============  =====================================================================
of a block     is kept
=============  =====================================================================
compressed     its payload, in a cache bounded in bytes
raw            only that it is proven, and where it lies: the page cache has the rest
=============  =====================================================================

A digest that does not match raises DamageError that names segment and offset, and is logged once
per frame. Nothing here ever stands in for bytes that could not be read.
"""

from __future__ import annotations

import errno
import logging
import os
from array import array
from pathlib import Path
from typing import Protocol

import numpy as np

from blockrepl.errors import DamageError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Blocks
from blockrepl.limits import BLOCK_BYTES, FRAME_PAYLOAD_BYTES_MAX, SEGMENT_FRAMES_MAX
from blockrepl.storage import _gather
from blockrepl.storage._gather import Gather, ProvenBlocks
from blockrepl.storage.reading import Cache, OpenFile, ReadFiles, damaged
from blockrepl.storage.segment_reader import TABLE_READ_BYTES, SegmentReader

log = logging.getLogger(__name__)

BLOCK_CACHE_BYTES = 64 * 1024 * 1024  # decompressed blocks, per process that reads
TABLE_CACHE_BYTES = 16 * 1024 * 1024  # block tables: of about 50 GiB of journal of full frames
INLINE_BLOCKS = 4  # proven where they are asked for: about 100 us
PROVEN_BITS = 18  # proven raw blocks remembered: of 16 GiB of journal, in 5 MB
REPORTED_MAX = 10_000  # damaged frames that are told once each; later ones are told every time

assert _gather.BLOCK_BYTES == BLOCK_BYTES
# The keys of _gather.ProvenBlocks; a commit's batch may go beyond a segment's frames.
assert FRAME_PAYLOAD_BYTES_MAX // BLOCK_BYTES <= 1 << 8
assert SEGMENT_FRAMES_MAX <= 1 << 16

_LEADS_OUT = "an index entry leads out of the frame's payload"
_WRONG = {
    _gather.ENDS_TOO_SOON: "the file ends too soon",
    _gather.WRONG_DIGEST: "frame block does not match its digest",
    _gather.WRONG_SIZE: "frame block does not decompress to its size",
    _gather.LEADS_OUT: _LEADS_OUT,
}
Place = tuple[int, int, int]  # segment, frame, block


# As Gather.prove takes it: number, descriptor, offset, stored bytes, payload bytes, is raw, digest.
Order = tuple[int, int, int, int, int, bool, int]


class _Table:
    """Blocks of a frame, and where each is stored in the file. Plain arrays: see content.Window."""

    __slots__ = ("digests", "offsets", "payload_bytes", "raw")

    def __init__(self, blocks: Blocks, body_offset: int) -> None:
        offsets = blocks.offsets + np.uint64(body_offset)
        self.offsets = array("Q", offsets.tobytes())
        self.digests = array("Q", np.asarray(blocks.digests).tobytes())
        self.raw = blocks.raw.tobytes()
        self.payload_bytes = blocks.payload_bytes

    def cost(self) -> int:
        return 400 + 17 * len(self.digests)


class Segments(Protocol):
    """Where a segment is found by the place in an index entry."""

    def segment(self, at: int, /) -> SegmentReader: ...


class PayloadReader:
    """Reads payload through the index's segments. May be used by several threads."""

    def __init__(
        self, index: Segments, files: ReadFiles, block_cache_bytes: int = BLOCK_CACHE_BYTES
    ) -> None:
        self._index = index
        self._files = files
        self._tables: Cache[tuple[int, int], _Table] = Cache(TABLE_CACHE_BYTES, _Table.cost)
        self._blocks: Cache[Place, bytes] = Cache(block_cache_bytes, len)
        self._reported: set[tuple[int, int]] = set()
        self.proven = ProvenBlocks(PROVEN_BITS)

    def path(self, segment: int) -> Path:
        return self._index.segment(segment).path

    def supply(self, gather: Gather, target: memoryview, *, wait: bool) -> None:
        """Fill in what a gather lacks. DamageError, StorageError.

        Without ``wait``: BlockingIOError when it would take a device's time, or a lot of ours.
        """
        if not wait and len(gather.missing) > INLINE_BLOCKS:
            raise BlockingIOError(errno.EAGAIN, "many blocks to prove")
        if wait:
            self._fetch_tables(gather.missing)
        orders: list[Order] = []
        opened: dict[int, OpenFile] = {}  # held until their blocks are read
        for number, place in enumerate(gather.missing):
            block = self._blocks.get(place)
            if block is None:
                orders.append(self._order(number, place, opened, wait))
            elif not gather.supply(number, block, target):
                raise self._damage(place, self._frame_offset(place), _LEADS_OUT)
        if orders:
            self._prove(gather, orders, target, wait)

    def _prove(self, gather: Gather, orders: list[Order], target: memoryview, wait: bool) -> None:
        failed, reason, payloads = gather.prove(orders, target, 0 if wait else os.RWF_NOWAIT)
        if failed >= 0:
            number, _, offset, *_ = orders[failed]
            place = gather.missing[number]
            if reason in _WRONG:
                raise self._damage(place, offset, _WRONG[reason])
            raise self._files.failure(self.path(place[0]), offset, reason)
        for (number, _, offset, _, payload_bytes, *_), payload in zip(
            orders, payloads, strict=True
        ):
            place = gather.missing[number]
            if payload is None:
                self.proven.add(*place, offset, payload_bytes)
            else:
                self._blocks.put(place, payload)

    def _fetch_tables(self, places: list[Place]) -> None:
        """Let the device fetch all tables at once: one after the other, each would be a wait."""
        needed = {(segment, frame) for segment, frame, _ in places}
        needed = {key for key in needed if self._tables.get(key) is None}
        if len(needed) > 1:
            for segment, frame in needed:
                reader = self._index.segment(segment)
                self._files.will_need(reader.path, TABLE_READ_BYTES, reader.frame_offset(frame))

    def _order(self, number: int, place: Place, opened: dict[int, OpenFile], wait: bool) -> Order:
        segment, frame, index = place
        table = self._table(segment, frame, wait)
        if index >= len(table.digests):
            raise self._damage(place, self._frame_offset(place), _LEADS_OUT)
        file = opened.get(segment)
        if file is None:
            file = opened[segment] = self._files.open(self.path(segment))
        offset = table.offsets[index]
        return (
            number,
            file.descriptor,
            offset,
            table.offsets[index + 1] - offset,
            min(BLOCK_BYTES, table.payload_bytes - index * BLOCK_BYTES),
            table.raw[index] != 0,
            table.digests[index],
        )

    def _frame_offset(self, place: Place) -> int:
        return self._index.segment(place[0]).frame_offset(place[1])

    def _table(self, segment: int, frame: int, wait: bool) -> _Table:
        table = self._tables.get((segment, frame))
        if table is None:
            try:
                header, start, body = self._index.segment(segment).body_start(frame, wait=wait)
            except DamageError as error:
                self._report(segment, frame, error)
                raise
            table = _Table(frames.parse_blocks(header, body), start)
            self._tables.put((segment, frame), table)
        return table

    def _damage(self, place: Place, offset: int, why: object) -> DamageError:
        error = damaged(self.path(place[0]), offset, why)
        self._report(place[0], place[1], error)
        return error

    def _report(self, segment: int, frame: int, error: DamageError) -> None:
        if (segment, frame) not in self._reported:
            if len(self._reported) < REPORTED_MAX:
                self._reported.add((segment, frame))
            log.error("%s", error)
