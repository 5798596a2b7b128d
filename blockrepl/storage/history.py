"""The history of a replica, for readers beside (or without) a running receiver.

What is there, in the order in which it is read, so that no step can miss what an earlier one says:

1. the durable record: up to which instant, and which byte of the open segment, all is durable;
2. the catalog: disks, gaps, checkpoints (the receiver writes it before the durable record);
3. segment files, up to 1.

Without a durable record of this boot, or when it contradicts the files (a power cut: it is never
synced, so it may be an old one), the open segments are read to their last whole frame, marks the
catalog does not know yet are applied, and the newest instant is what the sources' watermarks allow
(storage/watermarks.py).
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from blockrepl.errors import StateError, StorageError
from blockrepl.formats.frame import KIND_MASK, U64, Columns, FrameHeader, RecordKind
from blockrepl.formats.marks import CheckpointMark, ConsistentMark, GapMark, GrowMark, Mark
from blockrepl.formats.segment import file_name, place
from blockrepl.model.points import Gap, History, Point, Resolved, resolve, union
from blockrepl.model.retention import Kept
from blockrepl.storage import catalog as catalogs
from blockrepl.storage import durable as durables
from blockrepl.storage.catalog import (
    Catalog,
    CheckpointRow,
    DiskRow,
    GapRow,
    GrowthRow,
    SegmentRow,
    sized_at,
)
from blockrepl.storage.durable import Durable
from blockrepl.storage.home import Home
from blockrepl.storage.index import JournalIndex
from blockrepl.storage.payload import PayloadReader
from blockrepl.storage.reading import GoneError, ReadFiles
from blockrepl.storage.retained import leftovers, read_kept
from blockrepl.storage.segment_reader import Known, SegmentReader
from blockrepl.storage.watermarks import newest_instant, sources_shown

log = logging.getLogger(__name__)


@dataclass(slots=True)
class State:
    """One consistent reading of durable record and catalog."""

    durable: Durable | None
    latest_ns: int
    disks: list[DiskRow]
    gaps: list[GapRow]
    checkpoints: dict[str, CheckpointRow]
    segments: dict[int, SegmentRow]
    kept: Kept = field(default_factory=Kept)
    growths: list[GrowthRow] = field(default_factory=list)
    reading: int = 0  # of the catalog, that ``segments`` are of; later ones are higher

    def disks_at(self, at_ns: int) -> list[DiskRow]:
        """The disks that a view of an instant has, with the size they had: synced by then, and not
        yet retired.
        """
        return [
            sized_at(disk, at_ns, self.growths)
            for disk in self.disks
            if disk.ready_ns is not None
            and disk.ready_ns <= at_ns
            and (disk.removed_ns is None or at_ns < disk.removed_ns)
        ]


class ReplicaHistory:
    """A group's replica, read-only: its points, and the way to the content of its disks."""

    def __init__(self, directory: Path, *, block_cache_bytes: int | None = None) -> None:
        self.directory = directory
        self.files = ReadFiles()
        self.catalog = Catalog.open_readonly(directory / catalogs.FILE_NAME)
        self.group = self.catalog.group_name
        self._seen: Durable | None = None
        self._readings = 0  # of the catalog
        self.index = JournalIndex(directory, self.catalog.group_id, self.files, self._sources_shown)
        self.payload = PayloadReader(self.index, self.files, block_cache_bytes)

    @classmethod
    def open(cls, home: Path, group: str) -> ReplicaHistory:
        """Open the replica of a group in a home. StateError when there is none."""
        directory = Home.open(home).replica_directory(group)
        if not (directory / catalogs.FILE_NAME).exists():
            others = ", ".join(groups(home)) or "none"
            raise StateError(
                f"no replica of a group {group} in {home}",
                hint=f"groups here: {others}; views are made on the receiver's host (--home)",
                code="no-group",
            )
        return cls(directory)

    def close(self) -> None:
        self.catalog.close()
        self.files.close()

    def __enter__(self) -> ReplicaHistory:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def image_path(self, disk: DiskRow) -> Path:
        return self.directory / "base" / f"{disk.name}.img"

    def state(self) -> State:
        durable = durables.read_durable(self.directory / durables.FILE_NAME)
        with self._reading() as reading:
            sources = {row.id: row for row in self.catalog.sources()}
            state = State(
                durable=durable,
                latest_ns=0,
                disks=self.catalog.disks(removed=True),
                gaps=self.catalog.gaps(),
                checkpoints={row.name: row for row in self.catalog.checkpoints()},
                segments={row.number: row for row in self.catalog.segments()},
                kept=read_kept(self.catalog),
                growths=self.catalog.growths(),
                reading=reading,
            )
        if durable is not None and self._holds(durable):
            state.latest_ns = durable.watermark
            return state
        log.warning("group %s: no true durable record, reading its open segments", self.group)
        state.durable = None
        self.refresh(state)
        watermarks = {source: row.watermark for source, row in sources.items()}
        numbers = {source: row.last_number for source, row in sources.items()}
        for segment in self.index.segments():
            for source, watermark in segment.watermarks.items():
                watermarks[source] = max(watermark, watermarks.get(source, 0))
            for source, number, mark in segment.marks:
                if number > numbers.get(source, 0):
                    _apply(state, mark)
        state.latest_ns = newest_instant(state.disks, watermarks)
        return state

    def _sources_shown(self) -> dict[bytes, int]:
        return sources_shown(self.catalog.disks(removed=True))

    @contextmanager
    def _reading(self) -> Iterator[int]:
        """One state of the catalog, and a number for it. Snapshots wait for each other, so the
        higher number is never of an older state, whichever thread goes on first.
        """
        with self.catalog.snapshot():
            self._readings += 1
            yield self._readings

    def _holds(self, durable: Durable) -> bool:
        if durable.boot != durables.this_boot():
            return False
        path = self.directory / "segments" / file_name(durable.segment_number)
        try:
            return path.stat().st_size >= durable.segment_bytes
        except FileNotFoundError:
            return False

    def refresh(self, state: State) -> None:
        """Make all that is durable as of ``state`` visible to lookups, and hide nothing newer."""
        if not self._refresh(state.segments.values(), state.durable, state.reading):
            # Retention may have replaced segments since the state was read.
            with self._reading() as reading:
                state.segments = {row.number: row for row in self.catalog.segments()}
                state.reading = reading
            self._refresh(state.segments.values(), state.durable, state.reading)

    def refresh_beside_receiver(self) -> None:
        """The same, as of now, in the receiver itself: it keeps a true durable record."""
        durable = durables.read_durable(self.directory / durables.FILE_NAME)
        if durable is None:
            raise StorageError(f"the durable record of {self.group} cannot be read")
        if durable != self._seen:
            with self._reading() as reading:
                rows = self.catalog.segments()
            self._refresh(rows, durable, reading)
            self._seen = durable

    def look_again(self) -> None:
        """Segments have been replaced: the next look is at all of them."""
        self._seen = None

    def _refresh(self, rows: Iterable[SegmentRow], durable: Durable | None, reading: int) -> bool:
        known = {row.number: Known.of(row) for row in rows}
        return self.index.refresh(
            known,
            None if durable is None else (durable.segment_number, durable.segment_bytes),
            leftovers(self.catalog),
            reading,
        )

    def history(self, state: State | None = None) -> History:
        """The value that points are resolved against."""
        now = state or self.state()
        floors = [disk.ready_ns for disk in now.disks if disk.ready_ns is not None]
        return History(
            floor_ns=min(floors, default=None),
            latest_ns=now.latest_ns,
            gaps=union_of(now.gaps, now.disks),
            checkpoints={row.name: row.at_ns for row in now.checkpoints.values()},
            last_flush=lambda at_ns: self._last_flush(now, at_ns),
            records_back=lambda at_ns, count: self._records_back(now, at_ns, count),
            group=self.group,
            kept=now.kept,
        )

    def resolve(self, point: Point, now_ns: int, state: State | None = None) -> Resolved:
        """The instant a point means in this group. PointError."""
        try:
            return resolve(point, now_ns=now_ns, history=self.history(state))
        except GoneError:  # retention has just replaced a segment that was looked into
            return resolve(point, now_ns=now_ns, history=self.history())

    def _last_flush(self, state: State, at_ns: int) -> int | None:
        best = 0
        for segment in self._segments_back(state, at_ns):
            row = _row(state, segment)
            if row is not None and row.sealed and row.last_stamp <= best:
                continue
            for header, ordinal in _headers_back(segment, state, at_ns):
                if header.last_stamp > best:
                    stamps = _flushes(segment.columns(ordinal), at_ns)
                    best = max(best, int(stamps.max()) if len(stamps) else 0)
        return best or None

    def _records_back(self, state: State, at_ns: int, count: int) -> int | None:
        """The (count + 1)-th newest stamp up to ``at_ns``."""
        found = _NewestFrames(count + 1, at_ns)
        for segment in self._segments_back(state, at_ns):
            row = _row(state, segment)
            if row is not None and row.sealed and row.last_stamp < found.least:
                continue
            for header, ordinal in _headers_back(segment, state, at_ns):
                if header.last_stamp >= found.least:
                    found.add(header, segment, ordinal)
            found.count()
        return found.stamp()

    def _segments_back(self, state: State, at_ns: int) -> Iterator[SegmentReader]:
        """Segments that may have a record up to an instant, newest first."""
        self.refresh(state)
        for segment in reversed(self.index.segments()):
            row = _row(state, segment)
            if row is None or not row.sealed or 0 < row.first_stamp <= at_ns:
                yield segment


class _NewestFrames:
    """Where the ``wanted``-th newest stamp up to an instant is, by the frames' headers.

    Of a frame that lies all on one side of it only the count matters. So the columns that are read
    are those of the few frames that it may be in: ten million records are no more than their
    40 000 headers.
    """

    def __init__(self, wanted: int, at_ns: int) -> None:
        self.least = 0  # the stamp that is asked for is not older
        self._wanted = wanted
        self._at_ns = at_ns
        self._records = 0
        self._rows = array("Q")  # first stamp, last stamp, records
        self._places: list[tuple[SegmentReader, int]] = []

    def add(self, header: FrameHeader, segment: SegmentReader, ordinal: int) -> None:
        self._rows.extend((header.first_stamp, header.last_stamp, header.record_count))
        self._places.append((segment, ordinal))
        self._records += header.record_count

    def count(self) -> None:
        """Bring ``least`` up to date."""
        if self._records >= self._wanted:
            first, last, records = self._columns()
            whole = last <= np.uint64(self._at_ns)  # of the others only some are
            self.least = _reached(first[whole], records[whole], self._wanted)

    def stamp(self) -> int | None:
        """None where there are not so many. DamageError."""
        if self._records < self._wanted:
            return None
        first, last, records = self._columns()
        at = np.uint64(self._at_ns)
        most = np.uint64(_reached(np.minimum(last, at), records, self._wanted))
        newer = (first > most) & (last <= at)
        wanted = self._wanted - int(records[newer].sum())
        read = np.flatnonzero(~newer & (last >= np.uint64(self.least)))
        stamps = np.concatenate([self._stamps(place) for place in read.tolist()])
        if len(stamps) < wanted:
            return None
        return int(np.partition(stamps, len(stamps) - wanted)[len(stamps) - wanted])

    def _columns(self) -> tuple[U64, U64, U64]:
        table = np.frombuffer(self._rows, np.uint64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]

    def _stamps(self, place: int) -> U64:
        segment, ordinal = self._places[place]
        stamps = segment.columns(ordinal).stamps
        return stamps[stamps <= np.uint64(self._at_ns)]


def _reached(stamps: U64, records: U64, wanted: int) -> int:
    """The stamp at which so many records are reached, newest first; 0 where they are fewer."""
    order = np.argsort(stamps)[::-1]
    place = int(np.searchsorted(np.cumsum(records[order]), np.uint64(wanted)))
    return int(stamps[order[place]]) if place < len(order) else 0


def union_of(gaps: Iterable[GapRow], disks: Iterable[DiskRow]) -> tuple[Gap, ...]:
    """The group's gaps. One that is open ends where its disk was retired: no view has it then."""
    removed = {disk.id: disk.removed_ns for disk in disks}
    return union(
        Gap(gap.from_ns, removed.get(gap.disk) if gap.to_ns is None else gap.to_ns) for gap in gaps
    )


def groups(home: Path) -> list[str]:
    """The groups that have a replica in a home, by name."""
    place = Home(home)
    return [
        name
        for name in place.groups()
        if (place.replica_directory(name) / catalogs.FILE_NAME).exists()
    ]


def _row(state: State, segment: SegmentReader) -> SegmentRow | None:
    """What the state says of a segment; None: the index has it from a later reading."""
    row = state.segments.get(segment.number)
    return row if row and place(row.number, row.generation) == segment.place else None


def _headers_back(
    segment: SegmentReader, state: State, at_ns: int
) -> Iterator[tuple[FrameHeader, int]]:
    """A segment's frames with records up to an instant of disks that its view has, newest first."""
    disks = {disk.id for disk in state.disks_at(at_ns)}
    for ordinal in range(segment.frame_count() - 1, -1, -1):
        header = segment.header(ordinal)
        if header.record_count and header.first_stamp <= at_ns and header.disk in disks:
            yield header, ordinal


def _flushes(columns: Columns, at_ns: int) -> U64:
    kinds = columns.kinds & np.uint8(KIND_MASK)
    stamps: U64 = columns.stamps[kinds == RecordKind.FLUSH]
    return stamps[stamps <= np.uint64(at_ns)]


def _apply(state: State, mark: Mark) -> None:
    """What the receiver will do with a mark when it recovers (storage/replica.py)."""
    match mark:
        case CheckpointMark():
            row = CheckpointRow(mark.name, mark.at_ns, mark.kind, mark.kept)
            state.checkpoints.setdefault(mark.name, row)
        case GapMark():
            disk = mark.disk.bytes
            ready = any(row.id == disk and row.ready_ns is not None for row in state.disks)
            if ready and not any(gap.disk == disk and gap.to_ns is None for gap in state.gaps):
                state.gaps.append(GapRow(disk, mark.from_ns, None))
        case ConsistentMark():
            disk = mark.disk.bytes
            for place, known in enumerate(state.disks):
                if known.id == disk and known.ready_ns is None:
                    state.disks[place] = replace(known, ready_ns=mark.at_ns)
                    return
            for place, gap in enumerate(state.gaps):
                if gap.disk == disk and gap.to_ns is None:
                    state.gaps[place] = replace(gap, to_ns=max(gap.from_ns, mark.at_ns))
        case GrowMark():
            disk = mark.disk.bytes
            for place, known in enumerate(state.disks):
                if known.id == disk and known.size_bytes < mark.size_bytes:
                    earlier = (growth.at_ns for growth in state.growths if growth.disk == disk)
                    at_ns = max(mark.at_ns, *earlier, 0)
                    state.growths.append(GrowthRow(disk, known.size_bytes, at_ns))
                    state.disks[place] = replace(known, size_bytes=mark.size_bytes)
