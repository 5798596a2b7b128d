"""Thinning: sealed segments written anew, without the versions that no point can show.

Consecutive segments are taken together. Each record is next asked for at an instant: its own, or
the first kept one after it (`asked_at`). Records of a disk with the same answer are never told
apart: of them only what shows last is needed. All intervals are resolved at once, by shifting the
addresses of each into a range of its own.

What shows is written in order of stamp, under the numbers that were read, in a generation of its
own, and sealed. The stamps stay what they were. So lookups find in the new segments, at every
instant that can be reached, just what they found in the old ones. Flushes and marks are left out:
the former name no point that is kept, the latter are in the catalog.

Cost: about 150 bytes of memory per record, ENTRIES_MAX of them at a time; every payload that stays
is read, proven and compressed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blockrepl import limits
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import U8, U32, U64, Buffer, Columns, FrameKind, RecordKind
from blockrepl.formats.run import Run, concatenate, from_frames
from blockrepl.formats.segment import file_name
from blockrepl.model import extents
from blockrepl.model.retention import Kept
from blockrepl.storage._gather import Gather
from blockrepl.storage.catalog import SegmentRow
from blockrepl.storage.files import Files, failure
from blockrepl.storage.index import SHOWS_DATA
from blockrepl.storage.payload import PayloadReader
from blockrepl.storage.reading import ReadFiles
from blockrepl.storage.runs import directory_cache
from blockrepl.storage.segment_reader import Known, SegmentReader
from blockrepl.storage.segment_writer import OpenSegment, SegmentWriter, create_segment, seal

ENTRIES_MAX = 1_000_000  # of all disks, read together
_ADDRESSES = 1 << 62  # for all intervals of a disk that are resolved at once
Pace = Callable[[int], None]  # called with the bytes written; may wait


@dataclass(frozen=True, slots=True)
class _Survivors:
    """What shows, in order of stamp. ``places``: which of the segments that were read."""

    starts: U64
    lengths: U32
    stamps: U64
    kinds: U8
    places: U32
    frames: U32
    positions: U32

    def __len__(self) -> int:
        return len(self.starts)


class _Segments:
    """The segments that are read, by place; what PayloadReader asks an index for."""

    def __init__(self, directory: Path, group: bytes, rows: Sequence[SegmentRow]) -> None:
        self.files = ReadFiles()
        self.readers: list[SegmentReader] = []
        directories = directory_cache()
        for row in rows:
            path = directory / file_name(row.number, row.generation)
            reader = SegmentReader(path, row.number, group, self.files, directories, row.generation)
            reader.refresh(Known.of(row))
            for damage in reader.damage:
                raise damage.error
            self.readers.append(reader)

    def segment(self, place: int) -> SegmentReader:
        return self.readers[place]

    def entries(self) -> dict[bytes, Run]:
        """All entries, by disk, from the frames themselves; their ``segments`` are our places."""
        parts: dict[bytes, list[Run]] = {}
        for place, reader in enumerate(self.readers):
            ordinals: dict[bytes, list[int]] = {}
            for ordinal in range(reader.frame_count()):
                header = reader.header(ordinal)
                if header.record_count:
                    ordinals.setdefault(header.disk, []).append(ordinal)
            for disk, mine in ordinals.items():
                run = from_frames([reader.columns(one) for one in mine], mine, place)
                if len(run):
                    parts.setdefault(disk, []).append(run)
        return {disk: concatenate(parts[disk]) for disk in sorted(parts)}


def fitting(directory: Path, group: bytes, rows: Sequence[SegmentRow]) -> list[SegmentRow]:
    """As many of the first rows as are thinned together, at least one. StorageError."""
    read = _Segments(directory, group, rows)
    try:
        records, count = 0, 0
        for reader in read.readers:
            records += sum(
                reader.header(ordinal).record_count for ordinal in range(reader.frame_count())
            )
            if count and records > ENTRIES_MAX:
                break
            count += 1
        return list(rows[:count])
    finally:
        read.files.close()


def asked_at(kept: Kept, stamps: U64) -> U64:
    """For each stamp the first instant from it on that can be reached; its own where all can."""
    answers = stamps.copy()
    instants = np.array([*kept.instants, (1 << 64) - 1], np.uint64)
    for stretch in kept.stretches:
        inside = (stamps > np.uint64(stretch.from_ns)) & (stamps <= np.uint64(stretch.to_ns))
        step = np.uint64(stretch.step_ns)
        due = (stamps[inside] + (step - np.uint64(1))) // step * step
        due = np.minimum(due, np.uint64(stretch.to_ns))
        answers[inside] = np.minimum(due, instants[np.searchsorted(instants, stamps[inside])])
    return answers


def thin(
    directory: Path,
    group: bytes,
    rows: Sequence[SegmentRow],
    kept: Kept,
    *,
    step_ns: int,
    files: Files | None = None,
    pace: Pace = lambda _size_bytes: None,
) -> list[SegmentRow]:
    """Write consecutive sealed segments anew; the rows that stand for theirs, files durable.

    None is written where nothing is left of them. DamageError, StorageError: files of the new
    generation may be left, the old ones are as before.
    """
    read = _Segments(directory, group, rows)
    payload = PayloadReader(read, read.files)
    writer = _Writer(directory, group, rows, step_ns, files or Files(), pace)
    try:
        for disk, run in read.entries().items():
            left = _survivors(run, kept)
            for frame in _frames(left, payload, group, disk):
                writer.append(frame)
        return writer.finish()
    except BaseException:
        writer.discard()
        raise
    finally:
        writer.close()
        read.files.close()


def _survivors(run: Run, kept: Kept) -> _Survivors:
    """What of a disk's records any point can show."""
    run = run.oldest_first()
    answers = asked_at(kept, run.stamps)
    span = max(1, int((run.starts + run.lengths).max()))  # 0: empty records at 0, and no others
    found: list[_Survivors] = []
    intervals = np.unique(answers)
    count = max(1, _ADDRESSES // span)
    for first in range(0, len(intervals), count):
        chosen = intervals[first : first + count]
        which = np.flatnonzero((answers >= chosen[0]) & (answers <= chosen[-1]))
        shift = np.searchsorted(chosen, answers[which]).astype(np.uint64) * np.uint64(span)
        found.append(_showing(run.take(which), shift, len(chosen) * span))
    return _joined(found)


def _showing(run: Run, shift: U64, last: int) -> _Survivors:
    starts = run.starts + shift
    flat = extents.resolve(starts, starts + run.lengths, 0, last)
    shown = flat.winners != extents.BASE
    winners = flat.winners[shown]
    into = flat.starts[shown] - starts[winners]
    positions = run.positions[winners] + into.astype(np.uint32)
    return _Survivors(
        run.starts[winners] + into,
        (flat.ends[shown] - flat.starts[shown]).astype(np.uint32),
        run.stamps[winners],
        run.kinds[winners],
        run.segments[winners],
        run.frames[winners],
        np.where(run.kinds[winners] == RecordKind.WRITE, positions, 0).astype(np.uint32),
    )


def _joined(parts: list[_Survivors]) -> _Survivors:
    """All, by stamp; equal stamps overlap nowhere now, so their order does not matter."""
    columns = [
        np.concatenate([getattr(part, name) for part in parts]) for name in _Survivors.__slots__
    ]
    order = np.lexsort((columns[0], columns[2]))
    return _Survivors(*(column[order] for column in columns))


def _frames(
    left: _Survivors, payload: PayloadReader, group: bytes, disk: bytes
) -> Iterator[tuple[frames.FrameHeader, Buffer]]:
    """The survivors as frames: of at most so many records and, but for one, so much payload."""
    is_write = left.kinds == RecordKind.WRITE
    sizes = np.where(is_write, left.lengths, 0).astype(np.uint64)
    ends = np.cumsum(sizes)
    first = 0
    while first < len(left):
        begin = int(ends[first] - sizes[first])
        fitting = int(
            np.searchsorted(ends, begin + limits.FRAME_PAYLOAD_BYTES_TARGET, side="right")
        )
        last = min(max(fitting, first + 1), first + limits.FRAME_RECORDS_MAX, len(left))
        data = bytearray(int(ends[last - 1]) - begin)
        _fill(data, left, first + np.flatnonzero(is_write[first:last]), payload)
        columns = Columns(
            left.stamps[first:last],
            left.starts[first:last],
            left.lengths[first:last],
            left.kinds[first:last],
        )
        encoded = frames.encode_frame(
            kind=FrameKind.RECORDS,
            group=group,
            source=frames.NO_ID,
            disk=disk,
            number=0,
            watermark=0,
            columns=columns,
            payload=data,
        )
        yield encoded.header, b"".join(encoded.buffers)
        first = last


def _fill(
    data: bytearray,
    left: _Survivors,
    which: npt.NDArray[np.intp],
    payload: PayloadReader,
) -> None:
    """Read the payload of some writes, one after the other. DamageError, StorageError."""
    gather = Gather(
        np.append(np.zeros(1, np.uint64), np.cumsum(left.lengths[which], dtype=np.uint64)).data,
        np.full(len(which), SHOWS_DATA, np.uint8).data,
        left.places[which].data,
        left.frames[which].data,
        left.positions[which].data,
        0,
        len(data),
    )
    payload.fill(gather, memoryview(data))


class _Writer:
    """Writes frames into new segments that stand for the rows."""

    def __init__(
        self,
        directory: Path,
        group: bytes,
        rows: Sequence[SegmentRow],
        step_ns: int,
        files: Files,
        pace: Pace,
    ) -> None:
        self._directory = directory
        self._group = group
        self._left = list(rows)
        self._step_ns = step_ns
        self._files = files
        self._pace = pace
        self._writer: SegmentWriter | None = None
        self._row = rows[0]
        self._done: list[SegmentRow] = []
        self._begun: list[str] = []

    def append(self, frame: tuple[frames.FrameHeader, Buffer]) -> None:
        if self._writer is not None and self._writer.segment.is_full and self._left:
            self._seal(self._writer.segment)
            self._writer = None
        if self._writer is None:
            self._writer = SegmentWriter(self._begin(self._left.pop(0)), self._files)
        self._writer.append([frame])
        self._pace(frame[0].frame_bytes)

    def _begin(self, row: SegmentRow) -> OpenSegment:
        generation = row.generation + 1
        # Another time of making: merged runs of the old segment are not those of the new one.
        self._row = replace(row, generation=generation, created_ns=row.created_ns + 1)
        name = file_name(self._row.number, self._row.generation)
        try:
            (self._directory / name).unlink(missing_ok=True)  # of an attempt that failed
        except OSError as error:
            raise failure(error, f"cannot remove {name}") from error
        self._begun.append(name)
        return create_segment(
            self._directory, self._group, row.number, self._row.created_ns, self._files, generation
        )

    def _seal(self, segment: OpenSegment) -> None:
        size_bytes = seal(segment, self._files)
        segment.close()
        self._done.append(
            replace(
                self._row,
                first_stamp=segment.first_stamp,
                last_stamp=segment.last_stamp,
                sealed=True,
                bytes=size_bytes,
                frames=len(segment.offsets),
                step_ns=self._step_ns,
            )
        )

    def finish(self) -> list[SegmentRow]:
        if self._writer is not None:
            self._seal(self._writer.segment)
            self._writer = None
        return self._done

    def discard(self) -> None:
        """Give back the room that was taken: it may be what the journal lacks."""
        for name in self._begun:
            with suppress(OSError):  # else with the next pass
                (self._directory / name).unlink(missing_ok=True)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.segment.close()
