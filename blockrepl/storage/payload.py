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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockrepl.errors import DamageError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Blocks
from blockrepl.limits import BLOCK_BYTES, FRAME_PAYLOAD_BYTES_MAX, SEGMENT_FRAMES_MAX
from blockrepl.storage import _gather
from blockrepl.storage._gather import Gather, ProvenBlocks
from blockrepl.storage.index import JournalIndex
from blockrepl.storage.reading import Cache, OpenFile, ReadFiles, damaged
from blockrepl.storage.segment_reader import TABLE_READ_BYTES

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


@dataclass(frozen=True, slots=True)
class _Stored:
    """A missing block of a gather, and where it is stored."""

    number: int
    place: Place
    file: OpenFile
    offset: int
    stored_bytes: int
    payload_bytes: int
    is_raw: bool
    digest: int


@dataclass(frozen=True, slots=True)
class _Table:
    """Blocks of a frame and where its body starts in the file."""

    blocks: Blocks
    body_offset: int

    def cost(self) -> int:
        return 256 + 17 * len(self.blocks.digests)


class PayloadReader:
    """Reads payload through the index's segments. May be used by several threads."""

    def __init__(
        self, index: JournalIndex, files: ReadFiles, block_cache_bytes: int = BLOCK_CACHE_BYTES
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
        wanted: list[_Stored] = []
        for number, place in enumerate(gather.missing):
            block = self._blocks.get(place)
            if block is None:
                wanted.append(self._stored(number, place, wait))
            elif not gather.supply(number, block, target):
                raise self._damage(place, self._frame_offset(place), _LEADS_OUT)
        if wanted:
            self._prove(gather, wanted, target, wait)

    def _prove(self, gather: Gather, wanted: list[_Stored], target: memoryview, wait: bool) -> None:
        orders = [
            (
                each.number,
                each.file.descriptor,
                each.offset,
                each.stored_bytes,
                each.payload_bytes,
                each.is_raw,
                each.digest,
            )
            for each in wanted
        ]
        failed, reason, payloads = gather.prove(orders, target, 0 if wait else os.RWF_NOWAIT)
        if failed >= 0:
            stored = wanted[failed]
            if reason in _WRONG:
                raise self._damage(stored.place, stored.offset, _WRONG[reason])
            raise self._files.failure(self.path(stored.place[0]), stored.offset, reason)
        for each, payload in zip(wanted, payloads, strict=True):
            if payload is None:
                self.proven.add(*each.place, each.offset, each.payload_bytes)
            else:
                self._blocks.put(each.place, payload)

    def _fetch_tables(self, places: list[Place]) -> None:
        """Let the device fetch all tables at once: one after the other, each would be a wait."""
        needed = {(segment, frame) for segment, frame, _ in places}
        needed = {key for key in needed if self._tables.get(key) is None}
        if len(needed) > 1:
            for segment, frame in needed:
                reader = self._index.segment(segment)
                self._files.will_need(reader.path, TABLE_READ_BYTES, reader.frame_offset(frame))

    def _stored(self, number: int, place: Place, wait: bool) -> _Stored:
        segment, frame, index = place
        table = self._table(segment, frame, wait)
        blocks = table.blocks
        if index >= len(blocks.digests):
            raise self._damage(place, self._frame_offset(place), _LEADS_OUT)
        first, last = blocks.offsets[index : index + 2].tolist()
        return _Stored(
            number,
            place,
            self._files.file(self.path(segment)),
            table.body_offset + first,
            last - first,
            min(BLOCK_BYTES, blocks.payload_bytes - index * BLOCK_BYTES),
            bool(blocks.raw[index]),
            int(blocks.digests[index]),
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
            blocks = frames.parse_blocks(header, body)
            # Copies: a view would keep the columns beside the table alive.
            table = _Table(
                Blocks(blocks.offsets, blocks.raw, np.array(blocks.digests), blocks.payload_bytes),
                start,
            )
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
