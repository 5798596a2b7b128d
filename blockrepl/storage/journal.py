"""The journal of one group: its open segment, and those that wait to be sealed.

Sealing happens in one thread of its own and is never waited for while frames come in. A segment
whose sealing found no room, or found damage, stays as it is: it is as readable as before, and is
tried again when the next one is sealed and after a restart.

Rows for the catalog are handed out once (``take_rows``): the caller writes them with what else is
due, and the catalog is never behind what a reader needs to find a durable frame.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from blockrepl.errors import StorageError
from blockrepl.formats.frame import FrameHeader
from blockrepl.storage.catalog import SegmentRow
from blockrepl.storage.durable import Durable
from blockrepl.storage.files import Files
from blockrepl.storage.home import make_directory
from blockrepl.storage.segment_recovery import Replay, recover
from blockrepl.storage.segment_writer import OpenSegment, SegmentWriter, create_segment, seal

logger = logging.getLogger(__name__)

DIRECTORY_NAME = "segments"


class Journal:
    """Recovers on construction; ``replay`` gets every frame of the unsealed segments.

    DamageError or StorageError when the journal cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        group: bytes,
        *,
        rows: Sequence[SegmentRow],
        durable: Durable | None,
        replay: Replay,
        files: Files,
        clock: Callable[[], int],
    ) -> None:
        self._directory = directory
        self._group = group
        self._files = files
        self._clock = clock
        make_directory(directory)
        known = {row.number: row for row in rows}
        self.recovered = recover(
            directory, group, rows=known, durable=durable, replay=replay, files=files
        )
        newest = self.recovered.newest or self._begin(self.recovered.next_number)
        self._sealed_bytes = sum(row.bytes for row in rows if row.sealed)
        self._sealed_bytes += sum(row.bytes for row in self.recovered.sealed)
        self._rows = [*self.recovered.sealed, open_row(newest)]
        self._writer = SegmentWriter(newest, files)
        self._sealer = ThreadPoolExecutor(1, "seal")
        self._sealing: list[tuple[OpenSegment, Future[int]]] = []
        self._unsealed: list[OpenSegment] = []
        for segment in self.recovered.unsealed:
            self._seal_later(segment)

    def _begin(self, number: int) -> OpenSegment:
        """Begin the first segment, or one behind a sealed file."""
        try:
            return create_segment(self._directory, self._group, number, self._clock(), self._files)
        except StorageError:
            for segment in self.recovered.unsealed:
                segment.close()
            raise

    @property
    def segment_number(self) -> int:
        return self._writer.segment.number

    @property
    def segment_bytes(self) -> int:
        return self._writer.segment.size_bytes

    @property
    def total_bytes(self) -> int:
        """Of all segment files, without indexes still being written."""
        waiting = (*(segment for segment, _ in self._sealing), *self._unsealed)
        return self._sealed_bytes + self.segment_bytes + sum(s.size_bytes for s in waiting)

    def open_rows(self) -> list[SegmentRow]:
        """The segments that are not sealed, as they are now. Any thread may ask."""
        waiting = (*self._unsealed, *(segment for segment, _ in self._sealing))
        return [open_row(segment) for segment in (*waiting, self._writer.segment)]

    def resized(self, by_bytes: int) -> None:
        """Retention has replaced sealed segments by others."""
        self._sealed_bytes += by_bytes

    def append(self, batch: Sequence[tuple[FrameHeader, memoryview]]) -> None:
        """Write frames and make them durable. StorageError: none of them is."""
        self._rotate()
        if batch:
            self._writer.append(batch)
        self._writer.sync()

    def take_rows(self) -> list[SegmentRow]:
        """What has changed since the last call. Once written, ``rows_written`` forgets it."""
        self._collect()
        return self._rows

    def rows_written(self) -> None:
        self._rows = []

    def _rotate(self) -> None:
        if not self._writer.segment.is_full:
            return
        new = create_segment(
            self._directory, self._group, self.segment_number + 1, self._clock(), self._files
        )
        old = self._writer.replace(new)
        self._rows += [open_row(old), open_row(new)]
        for segment in (*self._unsealed, old):
            self._seal_later(segment)
        self._unsealed = []

    def _seal_later(self, segment: OpenSegment) -> None:
        self._sealing.append((segment, self._sealer.submit(seal, segment, self._files)))

    def _collect(self, *, wait: bool = False) -> None:
        """Take in the outcome of sealings that are done."""
        for segment, future in [pair for pair in self._sealing if wait or pair[1].done()]:
            self._sealing.remove((segment, future))
            try:
                size_bytes = future.result()
            except StorageError as error:
                self._unsealed.append(segment)
                if error.code not in {"full", "damage"}:
                    raise
                logger.warning("%s", error)
                continue
            segment.close()
            self._sealed_bytes += size_bytes
            self._rows.append(replace(open_row(segment), sealed=True, bytes=size_bytes))

    def close(self) -> list[SegmentRow]:
        """Wait for sealings; close everything. The last rows. Never raises StorageError."""
        try:
            self._collect(wait=True)
        except StorageError as error:
            logger.error("%s", error)
        self._sealer.shutdown()
        waiting = [segment for segment, _ in self._sealing]
        for segment in (self._writer.segment, *self._unsealed, *waiting):
            segment.close()
        return [*self._rows, open_row(self._writer.segment)]


def open_row(segment: OpenSegment) -> SegmentRow:
    """The catalog's row of a segment that is not sealed."""
    return SegmentRow(
        segment.number,
        segment.created_ns,
        segment.first_stamp,
        segment.last_stamp,
        False,
        segment.size_bytes,
        len(segment.offsets),
    )
