"""The segment writer: appends frames to the open segment, makes them durable, seals full segments.

Order of things, and what a crash between two of them leaves (recovery: segment_recovery.py):

1. A new segment's file gets its header, is synced, and its name too, before a frame is in it.
2. Frames are written as they came, by one vectored write for all that wait.
3. ``sync`` is one fdatasync. Only then may anything written so far be acknowledged.
4. A full segment is left as it is and the next one begun; sealing (runs, frame table, contents,
   trailer, fdatasync) happens later, in a thread of its own, and changes nothing that was there.

Failures: no room while appending -> the file is cut back to where it was, StorageError with code
"full", and the same call may be made again. Anything else, and any failed fdatasync, is fail-stop:
after a failed fdatasync the kernel may report later ones as good although the pages are lost, so
this writer never writes again.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import xxhash

from blockrepl import limits
from blockrepl.errors import DamageError, PeerError, StorageError
from blockrepl.formats import frame as frames
from blockrepl.formats import run as runs
from blockrepl.formats import segment as segments
from blockrepl.formats.frame import Buffer, FrameHeader
from blockrepl.storage.files import Files, fail_stop, failure, failures, is_full, write_all
from blockrepl.storage.home import sync_directory


@dataclass(slots=True)
class OpenSegment:
    """A segment that is not sealed: its file and what sealing needs to know of its frames."""

    number: int
    created_ns: int
    path: Path
    descriptor: int
    digest: xxhash.xxh3_64  # of the file's first size_bytes
    size_bytes: int
    offsets: array[int] = field(default_factory=lambda: array("Q"))  # of each frame
    records: int = 0
    first_stamp: int = 0
    last_stamp: int = 0
    generation: int = 0

    def note(self, header: FrameHeader) -> None:
        """Count a frame that begins at ``size_bytes``."""
        self.offsets.append(self.size_bytes)
        self.size_bytes += header.frame_bytes
        if header.record_count:
            if not self.records or header.first_stamp < self.first_stamp:
                self.first_stamp = header.first_stamp
            self.last_stamp = max(self.last_stamp, header.last_stamp)
            self.records += header.record_count

    @property
    def place(self) -> int:
        return segments.place(self.number, self.generation)

    @property
    def is_full(self) -> bool:
        return (
            self.size_bytes >= limits.SEGMENT_BYTES_TARGET
            or len(self.offsets) >= limits.SEGMENT_FRAMES_MAX
            or self.records >= limits.SEGMENT_RECORDS_TARGET
        )

    def close(self) -> None:
        os.close(self.descriptor)


def create_segment(
    directory: Path,
    group: bytes,
    number: int,
    created_ns: int,
    files: Files,
    generation: int = 0,
) -> OpenSegment:
    """Begin a segment, durably. StorageError; then no file is left, if that can be helped."""
    path = directory / segments.file_name(number, generation)
    header = segments.encode_header(segments.SegmentHeader(group, number, created_ns))
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        write_all(files, descriptor, [header], 0)
        files.sync(descriptor)
        sync_directory(directory)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
        raise failure(error, f"cannot begin segment {path}") from error
    digest = xxhash.xxh3_64(header)
    return OpenSegment(
        number, created_ns, path, descriptor, digest, len(header), generation=generation
    )


class SegmentWriter:
    """Appends to one open segment."""

    def __init__(self, segment: OpenSegment, files: Files) -> None:
        self.segment = segment
        self._files = files
        self._broken: StorageError | None = None
        self._synced_bytes = segment.size_bytes

    def append(self, batch: Sequence[tuple[FrameHeader, Buffer]]) -> None:
        """Write whole frames, all or none. StorageError with code "full" may be tried again."""
        self._check()
        segment = self.segment
        try:
            write_all(
                self._files, segment.descriptor, [data for _, data in batch], segment.size_bytes
            )
        except OSError as error:
            self._cut(error)
            raise self._broken or failure(error, f"cannot append to {segment.path}") from error
        for header, data in batch:
            segment.digest.update(data)
            segment.note(header)

    def sync(self) -> None:
        """Make everything appended durable. StorageError; nothing works after it.

        What is durable leaves the page cache: the next append gets its pages back instead of fresh
        ones, whose first touch costs a virtual machine more than all else that is done with the
        bytes (a receiver at 182 MB/s and 82 % of a core without this, at 250 MB/s and 73 % with).
        """
        self._check()
        segment = self.segment
        if segment.size_bytes == self._synced_bytes:
            return
        try:
            self._files.sync(segment.descriptor)
        except OSError as error:
            self._broken = self._fail_stop(error)
            raise self._broken from error
        grown_bytes = segment.size_bytes - self._synced_bytes
        self._files.forget(segment.descriptor, self._synced_bytes, grown_bytes)
        self._synced_bytes = segment.size_bytes

    def replace(self, segment: OpenSegment) -> OpenSegment:
        """Go on in a new segment; the old one, all of it durable, is the caller's."""
        self.sync()
        old, self.segment = self.segment, segment
        self._synced_bytes = segment.size_bytes
        return old

    def _check(self) -> None:
        if self._broken is not None:
            raise StorageError(str(self._broken), hint=self._broken.hint, code=self._broken.code)

    def _cut(self, error: OSError) -> None:
        """Undo a write that failed; fail-stop when that fails too, or room was not the reason."""
        try:
            self._files.truncate(self.segment.descriptor, self.segment.size_bytes)
        except OSError as second:
            self._broken = self._fail_stop(second)
        else:
            if not is_full(error):
                self._broken = self._fail_stop(error)

    def _fail_stop(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot write {self.segment.path}: {error.strerror}; nothing more is acknowledged",
            hint="check the receiver's disk, then restart the receiver",
            code="fail-stop",
        )


def seal(segment: OpenSegment, files: Files) -> int:
    """Append index, contents and trailer durably; the file's size.

    StorageError: with code "full" the file is as before. Reads the frames' columns, no payload.
    """
    end = segment.size_bytes
    digest = segment.digest.copy()
    try:
        parts, contents = _index(segment)
    except PeerError as error:
        raise DamageError(f"cannot seal {segment.path}, it is damaged: {error}") from error
    except OSError as error:
        raise DamageError(f"cannot seal {segment.path}: {error.strerror}") from error
    encoded = contents.model_dump_json().encode()
    for part in (*parts, encoded):
        digest.update(part)
    offset = end + sum(len(part) for part in parts)
    trailer = segments.Trailer(
        offset, len(encoded), xxhash.xxh3_64_intdigest(encoded), digest.intdigest()
    )
    what = f"cannot seal {segment.path}"
    try:
        size = write_all(
            files, segment.descriptor, [*parts, encoded, segments.encode_trailer(trailer)], end
        )
    except OSError as error:
        with failures(what):
            files.truncate(segment.descriptor, end)
        raise failure(error, what) from error
    try:
        files.sync(segment.descriptor)
    except OSError as error:
        raise fail_stop(error, what) from error
    return size


def _index(segment: OpenSegment) -> tuple[list[bytes], segments.Contents]:
    """The bytes between the last frame and the contents, and the contents that describe them."""
    parts: list[bytes] = []
    entries: list[segments.RunEntry] = []
    offset = segment.size_bytes

    def add(data: bytes) -> int:
        nonlocal offset
        parts.append(data)
        at, offset = offset, offset + len(data)
        return at

    for disk, run in _runs(segment).items():
        data, encoder = runs.encode_run(run, offset)
        add(data)
        directory = encoder.directory().tobytes()
        entries.append(
            segments.RunEntry(
                disk=UUID(bytes=disk),
                directory_offset=add(directory),
                chunks=len(encoder.directory()),
                long_chunks=encoder.long_chunks,
                count=len(run),
                first_stamp=int(run.stamps.min()),
                last_stamp=int(run.stamps.max()),
                digest=xxhash.xxh3_64_intdigest(directory),
            )
        )
    table = segment.offsets.tobytes()
    contents = segments.Contents(
        frames_end=segment.size_bytes,
        frame_table_offset=add(table),
        frame_count=len(segment.offsets),
        frame_table_digest=xxhash.xxh3_64_intdigest(table),
        runs=entries,
    )
    return parts, contents


def _runs(segment: OpenSegment) -> dict[bytes, runs.Run]:
    """Per disk, the entries of all its records. Disks without any are left out."""
    found: dict[bytes, tuple[list[frames.Columns], list[int]]] = {}
    for ordinal, offset in enumerate(segment.offsets):
        header = frames.decode_header(os.pread(segment.descriptor, frames.HEADER_BYTES, offset))
        if header.record_count:
            columns_bytes = header.record_count * frames.RECORD_BYTES
            body = os.pread(segment.descriptor, columns_bytes, offset + frames.HEADER_BYTES)
            columns, ordinals = found.setdefault(header.disk, ([], []))
            columns.append(frames.parse_columns(header, body))
            ordinals.append(ordinal)
    entries = {
        disk: runs.from_frames(columns, ordinals, segment.place)
        for disk, (columns, ordinals) in sorted(found.items())
    }
    return {disk: run for disk, run in entries.items() if len(run)}
