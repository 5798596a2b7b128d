"""The segment reader: what other processes than the receiver see of a segment file.

===========================  ======================================================================
the file                     is read by
===========================  ======================================================================
sealed, its index is true    index runs in place: only what a lookup needs (storage/runs.py)
sealed, its index is not     its frames, like an open one, up to where they end; one warning
open, or still to be sealed  its frames' headers and columns, from where the last scan stopped
===========================  ======================================================================

Frames are only ever appended, so ordinals, offsets and entries stay what they are when a segment
is sealed; the reader then lets go of the entries it held in memory.

*Known* is what was durable when somebody said so (the durable record, the catalog). Within it a
frame must be whole and true. What is not is damage, kept with the oldest stamp it may concern:
lookups from that stamp on must fail, older points stay readable. Behind a header that is not true
there may be frames of any source, also of one that lags and of which this segment has shown none
yet. Beyond what is known, the file ends at the first frame that is cut short or does not match its
digests, payload included.

A segment that is known to be sealed is not looked at before it is asked for something: a long
journal has thousands, and their index is in merged runs.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from blockrepl.errors import DamageError, PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats import segment as segments
from blockrepl.formats.frame import HEADER_BYTES, Columns, FrameHeader, FrameKind
from blockrepl.formats.marks import Mark, decode_mark
from blockrepl.formats.run import Run, concatenate, from_frames
from blockrepl.storage.catalog import SegmentRow
from blockrepl.storage.reading import ReadFiles, damaged
from blockrepl.storage.runs import DirectoryCache, FileRun, MemoryRun, MendedRun, RunSource

log = logging.getLogger(__name__)

SCAN_READ_BYTES = 64 * 1024  # header and columns of a frame of 4 KiB records, with some to spare
TABLE_READ_BYTES = 8 * 1024  # header, columns and block table of a frame of 256 records


@dataclass(frozen=True, slots=True)
class Known:
    """What of a segment file was durable: its first bytes, its first frames, whichever is more."""

    bytes: int = 0
    frames: int = 0
    first_stamp: int = 0  # no record in the segment is older
    last_stamp: int = 0  # sealed only: nor newer; 0: it has no records
    created_ns: int = 0  # sealed only
    sealed: bool = False
    generation: int = 0  # how often it was written anew

    @classmethod
    def of(cls, row: SegmentRow) -> Known:
        return cls(
            row.bytes,
            row.frames,
            row.first_stamp,
            row.last_stamp,
            row.created_ns,
            row.sealed,
            row.generation,
        )

    @property
    def scanned_bytes(self) -> int:
        """Bytes of frames that must be whole; of a sealed segment its frames say it."""
        return 0 if self.sealed else self.bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Records of ``disk`` (None: of any) from ``first_stamp`` on cannot all be found."""

    disk: bytes | None
    first_stamp: int
    error: DamageError


class SegmentReader:
    """One segment file. ``refresh`` before use; lookups may run in other threads meanwhile."""

    def __init__(
        self,
        path: Path,
        number: int,
        group: bytes,
        files: ReadFiles,
        directories: DirectoryCache,
        generation: int = 0,
        watermarks_before: Callable[[Set[bytes]], Mapping[bytes, int]] | None = None,
    ) -> None:
        """``watermarks_before``: what the segments before this one say of all sources but some;
        without it, only what is known of this one bounds what damage may hide.
        """
        self.path = path
        self.number = number
        self.place = segments.place(number, generation)
        self._sealed = False
        # Of the frames scanned: watermarks by source, and marks with source and frame number.
        self.watermarks: dict[bytes, int] = {}
        self.marks: list[tuple[bytes, int, Mark]] = []
        self._damage: tuple[Damage, ...] = ()
        self._group = group
        self._files = files
        self._directories = directories
        self._watermarks_before = watermarks_before
        self._put_off: Known | None = None
        self._lock = threading.Lock()
        self._offsets: array[int] = array("Q")
        self._end = segments.HEADER_BYTES
        self._frames_seen = 0
        self._runs: dict[bytes, tuple[RunSource, ...]] = {}
        self._table: segments.Contents | None = None
        self._checked_header = False

    @property
    def sealed(self) -> bool:
        """Whether its index is used in place."""
        self._look()
        return self._sealed

    @property
    def damage(self) -> tuple[Damage, ...]:
        self._look()
        return self._damage

    def runs(self, disk: bytes) -> tuple[RunSource, ...]:
        self._look()
        return self._runs.get(disk, ())

    def disks(self) -> list[bytes]:
        """Those that have records here."""
        self._look()
        return sorted(self._runs)

    def spans(self) -> dict[bytes, tuple[int, int]]:
        """The oldest and the newest stamp of each disk's records."""
        self._look()
        return {
            disk: (min(run.first_stamp for run in runs), max(run.last_stamp for run in runs))
            for disk, runs in self._runs.items()
        }

    @property
    def end(self) -> int:
        """Up to where its frames have been taken up, without a look."""
        return self._end

    def refresh(self, known: Known, *, limit: int | None = None) -> None:
        """See what has been appended, or that the file has been sealed. DamageError, StorageError.

        Nothing beyond ``limit`` bytes is looked at, all of it is known then.
        """
        with self._lock:
            if self._sealed or self._put_off is not None:
                return  # once it is known to be sealed, an older word does not change that
            if known.sealed and not self._checked_header:
                self._put_off = known
                return
            self._take_up(known, limit)

    def _look(self) -> None:
        """Do what was put off."""
        if self._put_off is None:
            return
        with self._lock:
            if self._put_off is not None:
                self._take_up(self._put_off, None)
                self._put_off = None

    def _take_up(self, known: Known, limit: int | None) -> None:
        if not self._checked_header:
            self._check_header(known)
        # Before the catalog says so, a trailer may be the end of what a source made a disk write.
        contents = self._contents() if known.sealed else None
        if contents is not None:
            self._adopt(contents)
        else:
            self._scan(known, limit)

    def frame_count(self) -> int:
        self._look()
        return self._frame_count()

    def _frame_count(self) -> int:
        return self._table.frame_count if self._table is not None else len(self._offsets)

    def frame_table(self) -> tuple[array[int], int]:
        """Where each frame begins in the file, and where the last one ends. DamageError."""
        self._look()
        return self._frame_table()

    def _frame_table(self) -> tuple[array[int], int]:
        if self._table is not None and len(self._offsets) < self._table.frame_count:
            self._offsets = self._read_frame_table(self._table)
        return self._offsets, self._end

    def frame_offset(self, ordinal: int) -> int:
        """Where a frame begins in the file. DamageError."""
        self._look()
        return self._frame_offset(ordinal)

    def _frame_offset(self, ordinal: int) -> int:
        self._frame_table()
        if ordinal >= len(self._offsets):
            raise self._damaged(0, f"an index entry leads to frame {ordinal}, which it has not")
        return int(self._offsets[ordinal])

    def header(self, ordinal: int) -> FrameHeader:
        """A frame's header. DamageError."""
        self._look()
        return self._header(ordinal)

    def _header(self, ordinal: int) -> FrameHeader:
        offset = self._frame_offset(ordinal)
        try:
            return frames.decode_header(self._files.read(self.path, HEADER_BYTES, offset))
        except PeerError as error:
            raise self._damaged(offset, error) from error

    def body_start(self, ordinal: int) -> tuple[FrameHeader, int, bytes]:
        """A frame's header, its body's file offset, and its proven columns and block table."""
        offset = self.frame_offset(ordinal)
        start = offset + HEADER_BYTES
        # One read for nearly all frames; the file goes on behind the last one with its index.
        wanted = min(TABLE_READ_BYTES, self._end - offset)
        data = self._files.read(self.path, wanted, offset)
        try:
            header = frames.decode_header(data)
            body = data[HEADER_BYTES : HEADER_BYTES + header.blocks_offset]
            if len(body) < header.blocks_offset:
                body = self._files.read(self.path, header.blocks_offset, start)
            frames.check_table(header, body)
        except PeerError as error:
            raise self._damaged(offset, error) from error
        return header, start, body

    def columns(self, ordinal: int) -> Columns:
        header, _start, body = self.body_start(ordinal)
        return frames.parse_columns(header, body)

    def _check_header(self, known: Known) -> None:
        data = self._files.read(self.path, segments.HEADER_BYTES, 0)
        try:
            header = segments.decode_header(data)
        except PeerError as error:
            raise self._damaged(0, error) from error
        if header.group != self._group or header.number != self.number:
            raise DamageError(f"{self.path} is a segment of another group or number")
        if known.sealed and header.created != known.created_ns:
            raise DamageError(f"{self.path} is not the segment that the catalog knows")
        self._checked_header = True

    def _contents(self) -> segments.Contents | None:
        size = self._files.size(self.path)
        tail = size - segments.TRAILER_BYTES
        if tail < segments.HEADER_BYTES:
            return None
        trailer = segments.decode_trailer(self._files.read(self.path, segments.TRAILER_BYTES, tail))
        if trailer is None:
            return None
        data = self._files.read(self.path, trailer.contents_bytes, trailer.contents_offset)
        try:
            return segments.decode_contents(trailer, data)
        except PeerError as error:
            log.warning("%s; its frames are read instead", self._damaged(tail, error))
            return None

    def _adopt(self, contents: segments.Contents) -> None:
        """Use the index of a file that has been sealed."""
        self._runs = {entry.disk.bytes: (self._file_run(entry),) for entry in contents.runs}
        self._table = contents
        self._end = contents.frames_end
        self._damage = ()
        self._sealed = True

    def _file_run(self, entry: segments.RunEntry) -> MendedRun:
        run = FileRun(self.path, entry, self._files, self._directories)
        return MendedRun(run, partial(self._rebuilt, entry.disk.bytes))

    def _rebuilt(self, disk: bytes, error: DamageError) -> Run:
        """The entries of a disk from the frames, where the index run is damaged."""
        log.warning("%s; rebuilt from the segment's frames", error)
        ordinals = [n for n in range(self.frame_count()) if self.header(n).disk == disk]
        return from_frames([self.columns(n) for n in ordinals], ordinals, self.place)

    def _read_frame_table(self, contents: segments.Contents) -> array[int]:
        size = contents.frame_count * 8
        data = self._files.read(self.path, size, contents.frame_table_offset)
        if xxhash.xxh3_64_intdigest(data) == contents.frame_table_digest:
            table = array("Q")
            table.frombytes(data)
            return table
        error = self._damaged(contents.frame_table_offset, "frame table does not match its digest")
        log.warning("%s; rebuilt from the segment's frames", error)
        table = array("Q")
        offset = segments.HEADER_BYTES
        while offset < contents.frames_end:
            table.append(offset)
            try:
                header = frames.decode_header(self._files.read(self.path, HEADER_BYTES, offset))
            except PeerError as second:
                raise self._damaged(offset, second) from second
            offset += header.frame_bytes
        return table

    def _scan(self, known: Known, limit: int | None) -> None:
        """Take up the frames appended since the last scan."""
        if self._damage and self._damage[-1].disk is None:
            return  # what lies behind a header that is not true cannot be found
        size = self._files.size(self.path)
        size = size if limit is None else min(size, limit)
        offsets = array("Q", self._offsets)
        found: dict[bytes, tuple[list[Columns], list[int]]] = {}
        damage = list(self._damage)
        for header, body in self._frames(size, known, damage):
            if body is not None and header.kind == FrameKind.MARK:
                self._note_mark(header, self._end)
            elif body is not None and header.record_count:
                columns, ordinals = found.setdefault(header.disk, ([], []))
                columns.append(frames.parse_columns(header, body))
                ordinals.append(len(offsets))
            offsets.append(self._end)
            self._end += header.frame_bytes
            self._frames_seen += 1
            self.watermarks[header.source] = header.watermark
        runs = dict(self._runs)
        for disk, (columns, ordinals) in found.items():
            run = from_frames(columns, ordinals, self.place)
            if len(run):
                runs[disk] = _with_newest(runs.get(disk, ()), MemoryRun(run))
        self._offsets = offsets
        self._runs = runs
        self._damage = tuple(damage)

    def _note_mark(self, header: FrameHeader, offset: int) -> None:
        body = self._files.read(self.path, header.body_bytes, offset + HEADER_BYTES)
        try:
            mark = decode_mark(frames.decode_payload(header, body))
        except PeerError as error:
            log.error("%s", self._damaged(offset, error))
        else:
            self.marks.append((header.source, header.number, mark))

    def _frames(
        self, size: int, known: Known, damage: list[Damage]
    ) -> Iterator[tuple[FrameHeader, memoryview | None]]:
        """Whole frames from ``_end`` on; a body is its columns and table, None when damaged."""
        window = _Window(self.path, self._files, size)
        while self._end + HEADER_BYTES <= size:
            offset = self._end
            is_known = offset < known.scanned_bytes or self._frames_seen < known.frames
            try:
                header = frames.decode_header(window.read(offset, HEADER_BYTES))
                if offset + header.frame_bytes > size:
                    raise PeerError("frame is cut short")
            except PeerError as error:
                if is_known:
                    damage.append(Damage(None, self._oldest(known), self._damaged(offset, error)))
                return
            body = window.read(offset + HEADER_BYTES, header.blocks_offset)
            try:
                if is_known:
                    frames.check_table(header, body)
                else:
                    frames.check_body(header, window.read(offset + HEADER_BYTES, header.body_bytes))
            except PeerError as error:
                if not is_known:
                    return
                damage.append(Damage(header.disk, header.first_stamp, self._damaged(offset, error)))
                yield header, None
            else:
                yield header, body

    def _oldest(self, known: Known) -> int:
        """The oldest stamp that a record behind the frames seen may have."""
        if self._watermarks_before is None:
            return known.first_stamp
        before = self._watermarks_before(self.watermarks.keys())
        watermarks = [*before.values(), *self.watermarks.values()]
        return max(known.first_stamp, min((each + 1 for each in watermarks), default=0))

    def _damaged(self, offset: int, why: PeerError | str) -> DamageError:
        return damaged(self.path, offset, why)


class _Window:
    """Reads of a file in order, few of them: small frames come many to a read."""

    def __init__(self, path: Path, files: ReadFiles, size: int) -> None:
        self._path = path
        self._files = files
        self._size = size
        self._data = memoryview(b"")
        self._start = 0

    def read(self, offset: int, count: int) -> memoryview:
        place = offset - self._start
        if place < 0 or place + count > len(self._data):
            wanted = min(max(count, SCAN_READ_BYTES), self._size - offset)
            self._data = memoryview(self._files.read(self._path, wanted, offset))
            self._start, place = offset, 0
        return self._data[place : place + count]


def _with_newest(runs: tuple[RunSource, ...], newest: MemoryRun) -> tuple[RunSource, ...]:
    """Add a run; join small ones, so that a lookup meets a logarithmic number of them."""
    kept = list(runs)
    while kept and isinstance(last := kept[-1], MemoryRun) and len(last) <= 2 * len(newest):
        newest = MemoryRun(concatenate([last.entries, newest.entries]))
        kept.pop()
    return (*kept, newest)
