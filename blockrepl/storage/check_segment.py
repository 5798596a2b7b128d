"""Examines one segment file: every byte against its digest, its index against its frames.

What is damaged is told once, where it is; what only follows from that is not. Frames are walked
through the frame table where that is true, else from one to the next, so that a damaged header
hides what lies behind it.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from blockrepl import limits
from blockrepl.errors import DamageError, PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats import segment as segments
from blockrepl.formats.frame import HEADER_BYTES, Columns, FrameHeader
from blockrepl.formats.run import COLUMNS, Run, concatenate, from_frames
from blockrepl.formats.segment import HEADER_BYTES as SEGMENT_HEADER_BYTES
from blockrepl.formats.segment import TRAILER_BYTES, Contents, Trailer
from blockrepl.storage.catalog import SegmentRow
from blockrepl.storage.check_findings import ALL_FRAMES, Finding, Lost, Pieces
from blockrepl.storage.merging import Account
from blockrepl.storage.reading import ReadFiles
from blockrepl.storage.runs import FileRun, directory_cache
from blockrepl.units import MIB

READ_BYTES = 4 * MIB
Tell = Callable[[int], None]  # called with the bytes examined since the last call
Note = Callable[[FrameHeader | None], None]  # each frame in order; None: some may be missing here


@dataclass(slots=True)
class SegmentReport:
    findings: list[Finding] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)  # of the lost ones among them
    accounts: dict[bytes, Account] = field(default_factory=dict)  # of each disk's entries
    is_whole: bool = True  # every frame is there, so the accounts are complete


class SegmentCheck:
    """``known_bytes``: what must be there of a segment that is not sealed. ``watermarks``: up to
    where views lack nothing of each source, before it; brought up to date.
    """

    def __init__(
        self,
        path: Path,
        row: SegmentRow,
        group: str,
        group_id: bytes,
        known_bytes: int,
        watermarks: dict[bytes, int],
    ) -> None:
        self._path = path
        self._row = row
        self._group = group
        self._group_id = group_id
        self._known_bytes = known_bytes
        self._watermarks = watermarks
        self.place = segments.place(row.number, row.generation)
        self._file = f"{path.parent.name}/{path.name}"
        self._report = SegmentReport()
        self._columns: dict[bytes, tuple[list[Columns], list[int]]] = {}
        self._damaged: list[Lost] = []  # whole frames, whose entries only an index may know
        self._digest = xxhash.xxh3_64()
        self._contents: Contents | None = None
        self._trailer: Trailer | None = None
        self._end = 0  # of what belongs to the segment

    def run(self, tell: Tell, note: Note) -> SegmentReport:
        """StorageError, OSError when the file cannot be read."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size_bytes = os.fstat(descriptor).st_size
            if self._check_header(descriptor):
                self._find_contents(descriptor, size_bytes)
                self._walk(descriptor, size_bytes, tell, note)
                self._check_index()
                self._check_file_digest(descriptor)
            else:
                note(None)
                tell(size_bytes)
        finally:
            os.close(descriptor)
        return self._report

    # What is found

    def _found(self, code: str, what: str, offset: int) -> Finding:
        finding = Finding(
            code, self._group, self._file, what, offset=offset, segment=self._row.number
        )
        self._report.findings.append(finding)
        return finding

    def _lose(
        self,
        code: str,
        what: str,
        offset: int,
        disk: bytes | None,
        first_stamp: int,
        ordinals: tuple[int, int],
        pieces: dict[bytes, Pieces] | None = None,
    ) -> None:
        finding = self._found(code, what, offset)
        lost = Lost(finding, disk, first_stamp, pieces, self.place, ordinals)
        self._report.lost.append(lost)

    # The file's own parts

    def _check_header(self, descriptor: int) -> bool:
        """Whether the file is the segment, as far as can be told."""
        data = os.pread(descriptor, SEGMENT_HEADER_BYTES, 0)
        self._digest.update(data)
        try:
            header = segments.decode_header(data)
        except PeerError as error:
            if self._row.sealed:
                self._found(
                    "segment-header", f"{error}; views refuse the segment until it is repaired", 0
                )
                return True
            self._report.is_whole = False
            self._lose("segment", str(error), 0, None, self._row.first_stamp, ALL_FRAMES)
            return False
        is_ours = (header.group, header.number) == (self._group_id, self._row.number)
        if is_ours and (not self._row.sealed or header.created == self._row.created_ns):
            return True
        self._report.is_whole = False
        what = "it is another segment than the catalog knows"
        self._lose("segment", what, 0, None, self._row.first_stamp, ALL_FRAMES)
        return False

    def _find_contents(self, descriptor: int, size_bytes: int) -> None:
        sealed, row_bytes = self._row.sealed, self._row.bytes
        self._end = min(size_bytes, row_bytes) if sealed else size_bytes
        at = self._end - TRAILER_BYTES
        trailer = None
        if at >= SEGMENT_HEADER_BYTES:
            trailer = segments.decode_trailer(os.pread(descriptor, TRAILER_BYTES, at))
        if trailer is not None:
            data = os.pread(descriptor, trailer.contents_bytes, trailer.contents_offset)
            try:
                self._contents = segments.decode_contents(trailer, data)
                self._trailer = trailer
            except PeerError as error:
                if sealed:
                    self._found("seal", str(error), trailer.contents_offset)
        elif sealed and size_bytes >= row_bytes:
            self._found("seal", "the trailer does not match its digest", at)
        if sealed and size_bytes != row_bytes:
            what = f"the file has {size_bytes} bytes, the catalog says {row_bytes}"
            self._found("seal", what, min(size_bytes, row_bytes))

    def _table(self, descriptor: int) -> array[int] | None:
        """Where each frame begins, as the frame table says."""
        contents = self._contents
        if contents is None:
            return None
        data = os.pread(descriptor, contents.frame_count * 8, contents.frame_table_offset)
        if xxhash.xxh3_64_intdigest(data) != contents.frame_table_digest:
            self._found(
                "frame-table",
                "frame table does not match its digest",
                contents.frame_table_offset,
            )
            return None
        return array("Q", data)

    # Frames

    def _walk(self, descriptor: int, size_bytes: int, tell: Tell, note: Note) -> None:
        table = self._table(descriptor)
        contents, row = self._contents, self._row
        if contents is not None:
            end, count = contents.frames_end, contents.frame_count
        elif row.sealed:
            end, count = self._end, row.frames
        else:
            end, count = self._end, 1 << 32
        at, ordinal = SEGMENT_HEADER_BYTES, 0
        tell(at)
        while at < end and ordinal < count:
            must_be = row.sealed or contents is not None or at < self._known_bytes
            header, why = self._header(descriptor, at, end)
            if header is None and not must_be:
                self._found("torn-tail", f"{end - at} bytes that were never acknowledged", at)
                tell(size_bytes - at)
                return
            if header is None:
                note(None)
                self._report.is_whole = False
                oldest = self._oldest(size_bytes)
                if table is None:
                    what = f"{why}; the frames from here on cannot be found"
                    # A reader of a sealed file wants its whole frame table.
                    behind = ALL_FRAMES if contents is not None else (ordinal, ALL_FRAMES[1])
                    self._lose("frames", what, at, None, oldest, behind)
                    tell(size_bytes - at)
                    return
                self._lose("frame", why, at, None, oldest, (ordinal, ordinal + 1))
                following = table[ordinal + 1] if ordinal + 1 < len(table) else end
            else:
                body = os.pread(descriptor, header.body_bytes, at + HEADER_BYTES)
                self._digest.update(os.pread(descriptor, HEADER_BYTES, at))
                self._digest.update(body)
                if not must_be and not _is_true(header, body):
                    self._found("torn-tail", f"{end - at} bytes that were never acknowledged", at)
                    tell(size_bytes - at)
                    return
                note(header)
                self._frame(header, body, at, ordinal)
                if header.source != frames.NO_ID:  # thinned: it has no watermark
                    least = self._watermarks.get(header.source, 0)
                    self._watermarks[header.source] = max(header.watermark, least)
                following = at + header.frame_bytes
            tell(following - at)
            at, ordinal = following, ordinal + 1
        needed = row.frames if row.sealed else 0
        if ordinal < needed or (not row.sealed and contents is None and at < self._known_bytes):
            note(None)
            self._report.is_whole = False
            what = f"the file ends here; frames from number {ordinal} of it on are missing"
            oldest = self._oldest(size_bytes)
            self._lose("frames", what, at, None, oldest, (ordinal, ALL_FRAMES[1]))
        tell(max(0, size_bytes - at))

    def _oldest(self, size_bytes: int) -> int:
        """The oldest stamp that a record behind the frames so far may have, of any source."""
        row = self._row
        # What came into an open segment after its row was written may be older.
        first_stamp = row.first_stamp if row.sealed or size_bytes <= row.bytes else 0
        oldest = min((each + 1 for each in self._watermarks.values()), default=0)
        return max(first_stamp, oldest)

    def _header(self, descriptor: int, at: int, end: int) -> tuple[FrameHeader | None, str]:
        try:
            header = frames.decode_header(os.pread(descriptor, HEADER_BYTES, at))
        except PeerError as error:
            return None, str(error)
        if header.group != self._group_id:
            return None, "frame of another group"
        if at + header.frame_bytes > end:
            return None, "frame is cut short"
        return header, ""

    def _frame(self, header: FrameHeader, body: bytes, at: int, ordinal: int) -> None:
        this = (ordinal, ordinal + 1)
        try:
            frames.check_table(header, body)
            blocks = frames.parse_blocks(header, body)
        except PeerError as error:
            self._report.is_whole = False
            pieces: dict[bytes, Pieces] | None = None if header.record_count else {}
            disk, first = header.disk, header.first_stamp
            self._lose("frame", str(error), at, disk, first, this, pieces)
            return
        whole = frames.parse_columns(header, body)
        # Copies: the body with its payload shall not stay in memory.
        columns = Columns(
            whole.stamps.copy(), whole.offsets.copy(), whole.lengths.copy(), whole.kinds.copy()
        )
        if header.record_count:
            mine, ordinals = self._columns.setdefault(header.disk, ([], []))
            mine.append(columns)
            ordinals.append(ordinal)
        bounds, is_damaged = blocks.offsets.tolist(), False
        for block, digest in enumerate(blocks.digests.tolist()):
            stored = memoryview(body)[bounds[block] : bounds[block + 1]]
            if xxhash.xxh3_64_intdigest(stored) != digest:
                is_damaged = True
                pieces = {header.disk: _in_block(columns, block)} if header.record_count else {}
                what = "frame block does not match its digest"
                offset = at + HEADER_BYTES + bounds[block]
                self._lose("block", what, offset, header.disk, header.first_stamp, this, pieces)
        if not is_damaged:
            try:
                frames.check_body(header, body)
            except PeerError as error:  # written wrong: its digests are right
                ends = columns.offsets + columns.lengths
                pieces = {header.disk: Pieces(columns.offsets, ends, columns.stamps)}
                disk, first = header.disk, header.first_stamp
                self._lose("frame", str(error), at, disk, first, this, pieces)

    # The index

    def _check_index(self) -> None:
        for disk, (columns, ordinals) in self._columns.items():
            run = from_frames(columns, ordinals, self.place)
            account = Account()
            account.add(run)
            if len(run):
                self._report.accounts[disk] = account
        contents = self._contents
        if contents is None:
            return
        files, directories = ReadFiles(), directory_cache()
        stored: dict[bytes, Run] = {}
        differing: int | None = None
        damaged = False
        try:
            for entry in contents.runs:
                kept = FileRun(self._path, entry, files, directories)
                try:
                    parts = [*kept.stream(is_long=False), *kept.stream(is_long=True)]
                except DamageError as error:
                    damaged = True
                    what = str(error).partition(": ")[2].rpartition(" (")[0]
                    self._found("index", what, error.offset or 0)
                    continue
                stored[entry.disk.bytes] = concatenate(parts)
                if not self._agrees(entry.disk.bytes, stored[entry.disk.bytes]):
                    differing = entry.directory_offset
        finally:
            files.close()
        for lost in self._report.lost:
            if lost.pieces is None:
                lost.pieces = self._from_index(stored, lost)
        if not damaged and self._report.accounts.keys() - stored.keys():
            differing = contents.frames_end
        if differing is not None:
            self._found("index-differs", "the index is not that of the frames", differing)

    def _agrees(self, disk: bytes, stored: Run) -> bool:
        """Whether entries are those of the frames, as far as these can be read."""
        columns, ordinals = self._columns.get(disk, ([], []))
        readable = np.array(ordinals, np.uint32)
        if not self._report.is_whole:
            stored = stored.take(np.isin(stored.frames, readable))
        rebuilt = _in_order(from_frames(columns, ordinals, self.place))
        stored = _in_order(stored)
        return all(
            np.array_equal(getattr(rebuilt, name), getattr(stored, name)) for name in COLUMNS
        )

    def _from_index(self, stored: dict[bytes, Run], lost: Lost) -> dict[bytes, Pieces] | None:
        """The records of frames that cannot be read, as the index has them."""
        assert self._contents is not None
        if {entry.disk.bytes for entry in self._contents.runs} != stored.keys():
            return None
        first, last = lost.ordinals
        found = {}
        for disk, run in stored.items():
            mine = run.take((run.frames >= first) & (run.frames < last))
            if len(mine):
                found[disk] = Pieces.of(mine)
        return found

    def _check_file_digest(self, descriptor: int) -> None:
        """Bytes that no other digest covers. Only asked when all else is well."""
        if self._trailer is None or self._contents is None or self._report.findings:
            return
        at, end = self._contents.frames_end, self._end - TRAILER_BYTES
        while at < end:
            data = os.pread(descriptor, min(READ_BYTES, end - at), at)
            self._digest.update(data)
            at += len(data)
        if self._digest.intdigest() != self._trailer.file_digest:
            self._found("file-digest", "the file does not match its digest", end)


def _is_true(header: FrameHeader, body: bytes) -> bool:
    try:
        frames.check_body(header, body)
    except PeerError:
        return False
    return True


def _in_block(columns: Columns, block: int) -> Pieces:
    """What of a frame's writes has its data in a block of the payload."""
    lengths = columns.payload_lengths()
    ends = np.cumsum(lengths)
    begins = ends - lengths
    low, high = np.uint64(block * limits.BLOCK_BYTES), np.uint64((block + 1) * limits.BLOCK_BYTES)
    which = (lengths > 0) & (begins < high) & (ends > low)
    begins, ends, offsets = begins[which], ends[which], columns.offsets[which]
    first, last = np.maximum(begins, low), np.minimum(ends, high)
    return Pieces(offsets + (first - begins), offsets + (last - begins), columns.stamps[which])


def _in_order(run: Run) -> Run:
    return run.take(np.lexsort((run.positions, run.frames, run.stamps, run.starts)))
