"""Payload: any bytes of a frame's payload, proven, without reading the rest of the frame.

A frame's block table is read and proven once, its blocks (64 KiB of payload) one by one as they
are needed; all that a read wants in one call of the compiled part (gather.h).

=============  =====================================================================
of a block     is kept
=============  =====================================================================
compressed     its payload, in a cache bounded in bytes
raw            only that it is proven, in the frame's table: the page cache has the rest
=============  =====================================================================

A digest that does not match raises DamageError that names segment and offset, and is logged once
per frame. Nothing here ever stands in for bytes that could not be read.
"""

from __future__ import annotations

import logging
from array import array
from pathlib import Path
from typing import Protocol

from blockrepl.errors import DamageError, PeerError, StorageError
from blockrepl.formats.frame import parse_blocks
from blockrepl.limits import BLOCK_BYTES, FRAME_PAYLOAD_BYTES_MAX, SEGMENT_FRAMES_MAX
from blockrepl.storage import _gather
from blockrepl.storage._gather import IMAGE, Blocks, Gather
from blockrepl.storage.read_memory import read_memory
from blockrepl.storage.reading import OpenFile, ReadFiles, damaged
from blockrepl.storage.segment_reader import SegmentReader

log = logging.getLogger(__name__)

INLINE_BLOCKS = 4  # proven where they are asked for: about 100 us
REPORTED_MAX = 10_000  # damaged frames that are told once each; later ones are told every time

assert _gather.BLOCK_BYTES == BLOCK_BYTES
# The keys of gather.c; a commit's batch may go beyond a segment's frames.
assert FRAME_PAYLOAD_BYTES_MAX // BLOCK_BYTES <= 1 << 8
assert SEGMENT_FRAMES_MAX <= 1 << 16

_WRONG = {
    _gather.ENDS_TOO_SOON: "the file ends too soon",
    _gather.WRONG_DIGEST: "frame block does not match its digest",
    _gather.WRONG_SIZE: "frame block does not decompress to its size",
    _gather.LEADS_OUT: "an index entry leads out of the frame's payload",
    _gather.WRONG_TABLE: "frame block table cannot be used",
}
_NO_FRAMES = array("Q")


class Segments(Protocol):
    """Where a segment is found by the place in an index entry."""

    def segment(self, at: int, /) -> SegmentReader: ...


class PayloadReader:
    """Reads payload through the index's segments. May be used by several threads."""

    def __init__(
        self, index: Segments, files: ReadFiles, block_cache_bytes: int | None = None
    ) -> None:
        """``block_cache_bytes``: for decompressed blocks, else as storage/read_memory.py says."""
        memory = read_memory()
        self._index = index
        self._files = files
        self.kept = Blocks(
            memory.tables, memory.payloads if block_cache_bytes is None else block_cache_bytes
        )
        self._reported: set[tuple[int, int]] = set()

    def fill(
        self, gather: Gather, target: memoryview, image: Path | None = None, *, wait: bool = True
    ) -> None:
        """Fill ``target`` with all that a gather wants. DamageError, StorageError.

        Without ``wait``: BlockingIOError when it would take a device's time, or a lot of ours.
        """
        held: list[OpenFile] = []  # until they are read
        opened = []
        for place in gather.files:
            if place == IMAGE:
                assert image is not None
                frames, end = _NO_FRAMES, 0
                held.append(self._files.open(image))
            else:
                segment = self._index.segment(place)
                frames, end = segment.frame_table()
                held.append(self._files.open(segment.path))
            opened.append((held[-1].descriptor, frames, end))
        failure = gather.read(self.kept, opened, target, wait, INLINE_BLOCKS)
        if failure is not None:
            reason, number, frame, _block, offset = failure
            place = gather.files[number]
            error = self._failure(place, image, frame, offset, reason)
            if isinstance(error, StorageError) and place != IMAGE:
                error.segment = self._index.segment(place).number
            raise error

    def _failure(
        self, place: int, image: Path | None, frame: int, offset: int, reason: int
    ) -> Exception:
        if reason not in _WRONG:
            if place != IMAGE or image is None:
                image = self._index.segment(place).path
            return self._files.failure(image, offset, reason)
        segment = self._index.segment(place)
        error = damaged(segment.path, offset, _WRONG[reason])
        if reason == _gather.WRONG_TABLE:
            error = _table_damage(segment, frame) or error
        elif reason == _gather.LEADS_OUT:
            error = damaged(segment.path, segment.frame_offset(frame), _WRONG[reason])
        self._report(place, frame, error)
        return error

    def _report(self, segment: int, frame: int, error: DamageError) -> None:
        if (segment, frame) not in self._reported:
            if len(self._reported) < REPORTED_MAX:
                self._reported.add((segment, frame))
            log.error("%s", error)


def _table_damage(segment: SegmentReader, frame: int) -> DamageError | None:
    """What is wrong with a frame's header, columns or block table."""
    try:
        header, _start, body = segment.body_start(frame)
        parse_blocks(header, body)
    except DamageError as error:
        return error
    except PeerError as error:
        return damaged(segment.path, segment.frame_offset(frame), error)
    return None
