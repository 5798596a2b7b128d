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

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockrepl.errors import DamageError, PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Blocks, Buffer
from blockrepl.limits import BLOCK_BYTES
from blockrepl.storage import _gather
from blockrepl.storage._gather import Gather, ProvenBlocks
from blockrepl.storage.index import JournalIndex
from blockrepl.storage.reading import Cache, ReadFiles, damaged
from blockrepl.storage.segment_reader import TABLE_READ_BYTES

log = logging.getLogger(__name__)

BLOCK_CACHE_BYTES = 64 * 1024 * 1024  # decompressed blocks, per process that reads
TABLE_CACHE_BYTES = 16 * 1024 * 1024  # block tables: of about 50 GiB of journal of full frames
PROVEN_BITS = 18  # proven raw blocks remembered: of 16 GiB of journal, in 5 MB
REPORTED_MAX = 10_000  # damaged frames that are told once each; later ones are told every time

assert _gather.BLOCK_BYTES == BLOCK_BYTES


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
        self._blocks: Cache[tuple[int, int, int], Buffer] = Cache(block_cache_bytes, len)
        self._reported: set[tuple[int, int]] = set()
        self.proven = ProvenBlocks(PROVEN_BITS)

    def path(self, segment: int) -> Path:
        return self._index.segment(segment).path

    def supply(self, gather: Gather, target: memoryview, *, wait: bool) -> None:
        """Fill in what a gather lacks. DamageError, StorageError.

        Without ``wait``: BlockingIOError when it would take a device's time.
        """
        waits = False
        for number, (segment, frame, index) in enumerate(gather.missing):
            try:
                block = self._block(segment, frame, index, False)
            except BlockingIOError:
                if not wait:
                    raise
                if not waits:
                    self._will_need(gather.missing[number:])
                    waits = True
                block = self._block(segment, frame, index, True)
            if not gather.supply(number, block, target):
                raise self._damage(
                    segment, frame, self._index.segment(segment).frame_offset(frame),
                    "an index entry leads out of the frame's payload",
                )  # fmt: skip

    def _will_need(self, blocks: list[tuple[int, int, int]]) -> None:
        """Let the device fetch all of them at once: one after the other, each would be a wait."""
        for segment, frame in {(segment, frame) for segment, frame, _ in blocks}:
            if self._tables.get((segment, frame)) is None:
                reader = self._index.segment(segment)
                self._files.will_need(reader.path, TABLE_READ_BYTES, reader.frame_offset(frame))
        for segment, frame, index in blocks:
            if self._blocks.get((segment, frame, index)) is None:
                table = self._table(segment, frame, True)
                if index < len(table.blocks.digests):
                    first, last = table.blocks.offsets[index : index + 2].tolist()
                    path = self._index.segment(segment).path
                    self._files.will_need(path, last - first, table.body_offset + first)

    def _block(self, segment: int, frame: int, index: int, wait: bool) -> Buffer:
        block = self._blocks.get((segment, frame, index))
        if block is not None:
            return block
        table = self._table(segment, frame, wait)
        if index >= len(table.blocks.digests):
            return b""
        first, last = table.blocks.offsets[index : index + 2].tolist()
        path = self._index.segment(segment).path
        offset = table.body_offset + first
        stored: Buffer
        if wait:
            stored = self._files.read(path, last - first, offset)
        else:
            stored = self._files.read_cached(path, last - first, offset)
        try:
            block = frames.decode_block(table.blocks, index, stored)
        except PeerError as error:
            raise self._damage(segment, frame, offset, error) from error
        if table.blocks.raw[index]:
            self.proven.add(segment, frame, index, offset, len(block))
        else:
            self._blocks.put((segment, frame, index), block)
        return block

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

    def _damage(self, segment: int, frame: int, offset: int, why: object) -> DamageError:
        error = damaged(self._index.segment(segment).path, offset, why)
        self._report(segment, frame, error)
        return error

    def _report(self, segment: int, frame: int, error: DamageError) -> None:
        if (segment, frame) not in self._reported:
            if len(self._reported) < REPORTED_MAX:
                self._reported.add((segment, frame))
            log.error("%s", error)
