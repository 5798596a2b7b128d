"""Payload: any bytes of a frame's payload, proven, without reading the rest of the frame.

A frame's block table is read and proven once, its blocks (64 KiB of payload) one by one as they
are needed; both are kept in caches bounded in bytes. A digest that does not match raises
DamageError that names segment and offset, and is logged once per frame. Nothing here ever stands
in for bytes that could not be read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from blockrepl.errors import DamageError, PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Blocks, Buffer
from blockrepl.limits import BLOCK_BYTES
from blockrepl.storage.index import JournalIndex
from blockrepl.storage.reading import Cache, ReadFiles, damaged

log = logging.getLogger(__name__)

BLOCK_CACHE_BYTES = 64 * 1024 * 1024  # decompressed blocks, per process that reads
TABLE_CACHE_BYTES = 16 * 1024 * 1024  # block tables: of about 50 GiB of journal of full frames
REPORTED_MAX = 10_000  # damaged frames that are told once each; later ones are told every time


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

    def read_into(
        self, buffer: memoryview, segment: int, frame: int, position: int, *, wait: bool = True
    ) -> None:
        """Fill ``buffer`` with payload from byte ``position`` on. DamageError, StorageError."""
        done = 0
        while done < len(buffer):
            index, skip = divmod(position + done, BLOCK_BYTES)
            block = self._block(segment, frame, index, wait)
            count = min(len(block) - skip, len(buffer) - done)
            if count <= 0:
                raise self._damage(
                    segment, frame, self._index.segment(segment).frame_offset(frame),
                    "an index entry leads out of the frame's payload",
                )  # fmt: skip
            buffer[done : done + count] = memoryview(block)[skip : skip + count]
            done += count

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
        stored = self._files.read(path, last - first, offset, wait=wait)
        try:
            block = frames.decode_block(table.blocks, index, stored)
        except PeerError as error:
            raise self._damage(segment, frame, offset, error) from error
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
