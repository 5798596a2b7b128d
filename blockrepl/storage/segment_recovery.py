"""Recovery of a journal: from what a crash left behind to segments that can be used again.

*Known* is what the catalog's rows and the durable record say was acknowledged: bytes of a segment
that must be there, whatever happened. Beyond them nothing was promised to anyone.

====  ==============================================  =============================================
rule  what is found                                   what is done
====  ==============================================  =============================================
R1    a file without a whole, true header, not known  removed: no frame in it was acknowledged
R2    the newest file, whole frames to its end        opened to go on
R3    beyond what is known: half a header, half a     cut off, synced; then R2 or R5
      body, or a digest that does not match
R4    within what is known: a body that does not      kept and stepped over: reading it is EIO, its
      match its digest                                marks are in the catalog already
R5    an older file that is not sealed (sealing is    opened to be sealed by the caller
      done in the background, so there may be many)
R6    a file with a true trailer, not catalogued,     catalogued as sealed. (A trailer in a frame is
      exactly behind its frames                       what a source sent, not a seal)
R7    a half-written seal                             as R3: its bytes are no frame
R8    within what is known: a header that does not    DamageError: frames behind it cannot be found,
      match, missing bytes, a missing file            and cutting them would lose promised history
R9    a file of another group or number               DamageError
====  ==============================================  =============================================

Every frame of a file that the catalog does not call sealed is replayed to the caller, in order.
What is found is on the disk: the file is synced and read anew beyond what is known, for a frame in
the page cache alone would be called durable, and be lost with the power.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from blockrepl.errors import DamageError, PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats import segment as segments
from blockrepl.storage.catalog import SegmentRow
from blockrepl.storage.durable import Durable
from blockrepl.storage.files import Files, failure, settle
from blockrepl.storage.home import sync_directory
from blockrepl.storage.segment_writer import OpenSegment

HINT = "copy the replica away, then look at the disk; what is readable can still be mounted"
# The body is None where it is damaged (R4).
Replay = Callable[[frames.FrameHeader, memoryview | None], None]


@dataclass(slots=True)
class Recovered:
    newest: OpenSegment | None = None  # to go on in
    unsealed: list[OpenSegment] = field(default_factory=list)  # to be sealed, oldest first
    sealed: list[SegmentRow] = field(default_factory=list)  # to be catalogued
    next_number: int = 1  # of a segment begun now
    cut_bytes: int = 0
    damaged_frames: int = 0


def recover(
    directory: Path,
    group: bytes,
    *,
    rows: Mapping[int, SegmentRow],
    durable: Durable | None,
    replay: Replay,
    files: Files,
) -> Recovered:
    """Apply the rules to all files of a directory. Raises DamageError (R8, R9), StorageError."""
    known = {number: row.bytes for number, row in rows.items()}
    if durable is not None:
        least = known.get(durable.segment_number, 0)
        known[durable.segment_number] = max(least, durable.segment_bytes)
    for number in sorted(known):
        generation = rows[number].generation if number in rows else 0
        path = directory / segments.file_name(number, generation)
        if not path.exists():
            raise DamageError(f"segment {path} is missing", hint=HINT)
    present = _numbers(directory)
    recovery = _Recovery(directory, group, known, replay, files)
    for number in present:
        if number in rows and rows[number].sealed:
            recovery.result.next_number = number + 1
            continue
        path = directory / segments.file_name(number)
        try:
            recovery.take(path, number)
        except BaseException as error:
            for segment in recovery.result.unsealed:
                segment.close()
            if isinstance(error, OSError):
                raise failure(error, f"cannot recover {path}") from error
            raise
    result = recovery.result
    if result.unsealed and result.unsealed[-1].number == result.next_number - 1:
        result.newest = result.unsealed.pop()
    return result


def _numbers(directory: Path) -> list[int]:
    stems = [path.stem for path in directory.glob("*.seg")]
    return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())


@dataclass(slots=True)
class _Recovery:
    directory: Path
    group: bytes
    known: Mapping[int, int]  # bytes of each segment that were acknowledged
    replay: Replay
    files: Files
    result: Recovered = field(default_factory=Recovered)

    def take(self, path: Path, number: int) -> None:
        """Apply the rules to one file that is not catalogued as sealed."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        kept = False
        try:
            segment = self._open(path, number, descriptor)
            if segment is not None:
                self.result.next_number = number + 1
                kept = self._take_frames(segment)
        finally:
            if not kept:
                os.close(descriptor)

    def _open(self, path: Path, number: int, descriptor: int) -> OpenSegment | None:
        encoded = os.pread(descriptor, segments.HEADER_BYTES, 0)
        try:
            header = segments.decode_header(encoded)
        except PeerError as error:
            if self.known.get(number, 0):  # R8
                raise DamageError(f"segment {path} is damaged at offset 0", hint=HINT) from error
            path.unlink()  # R1
            sync_directory(path.parent)
            return None
        if (header.group, header.number) != (self.group, number):  # R9
            raise DamageError(f"segment {path} belongs to another replica or place", hint=HINT)
        return OpenSegment(
            number, header.created, path, descriptor, xxhash.xxh3_64(encoded), len(encoded)
        )

    def _take_frames(self, segment: OpenSegment) -> bool:
        """Whether the segment goes on being used, with its descriptor."""
        known_bytes = self.known.get(segment.number, 0)
        settle(self.files, segment.descriptor, known_bytes)
        file_bytes = os.fstat(segment.descriptor).st_size
        contents = _contents(segment.descriptor, file_bytes)
        self.result.damaged_frames += _scan(segment, known_bytes, self.replay, contents)
        if contents is not None and segment.size_bytes != contents.frames_end:
            contents = None  # its end lies within a frame
            self.result.damaged_frames += _scan(segment, known_bytes, self.replay, None)
        # A killed receiver may have left all of it in the page cache alone. From here on the source
        # is told that it is durable.
        if segment.size_bytes < file_bytes and contents is None:  # R3, R7
            self.files.truncate(segment.descriptor, segment.size_bytes)
            self.result.cut_bytes += file_bytes - segment.size_bytes
        self.files.sync(segment.descriptor)
        if contents is not None:  # R6
            self.result.sealed.append(_sealed_row(segment, file_bytes))
            return False
        self.result.unsealed.append(segment)
        return True


def _sealed_row(segment: OpenSegment, file_bytes: int) -> SegmentRow:
    return SegmentRow(
        segment.number,
        segment.created_ns,
        segment.first_stamp,
        segment.last_stamp,
        True,
        file_bytes,
        len(segment.offsets),
    )


def _contents(descriptor: int, file_bytes: int) -> segments.Contents | None:
    """The contents of a sealed file, None when it is not sealed."""
    at = file_bytes - segments.TRAILER_BYTES
    if at < segments.HEADER_BYTES:
        return None
    trailer = segments.decode_trailer(os.pread(descriptor, segments.TRAILER_BYTES, at))
    if trailer is None or trailer.contents_offset + trailer.contents_bytes != at:
        return None
    try:
        contents = segments.decode_contents(
            trailer, os.pread(descriptor, trailer.contents_bytes, trailer.contents_offset)
        )
    except PeerError:
        return None
    if not segments.HEADER_BYTES <= contents.frames_end <= trailer.contents_offset:
        return None
    try:
        frames.decode_header(os.pread(descriptor, frames.HEADER_BYTES, contents.frames_end))
    except PeerError:
        return contents
    return None  # the frames go on: these are bytes that a source sent


def _scan(
    segment: OpenSegment,
    known_bytes: int,
    replay: Replay,
    contents: segments.Contents | None,
) -> int:
    """Take in every whole frame of the file; the number of damaged ones stepped over (R4)."""
    end = os.fstat(segment.descriptor).st_size if contents is None else contents.frames_end
    known_end = known_bytes if contents is None else contents.frames_end
    damaged = 0
    while segment.size_bytes < end:
        at = segment.size_bytes
        encoded = os.pread(segment.descriptor, frames.HEADER_BYTES, at)
        try:
            header = frames.decode_header(encoded)
        except PeerError as error:
            if at < known_end:
                raise _damage(segment, at) from error
            return damaged
        body = memoryview(os.pread(segment.descriptor, header.body_bytes, at + frames.HEADER_BYTES))
        try:
            frames.check_body(header, body)
        except PeerError as error:
            if at >= known_end:
                return damaged
            if len(body) < header.body_bytes:
                raise _damage(segment, at) from error
            damaged += 1
            replay(header, None)
        else:
            replay(header, body)
        segment.digest.update(encoded)
        segment.digest.update(body)
        segment.note(header)
    if segment.size_bytes < known_end:
        raise _damage(segment, segment.size_bytes)
    return damaged


def _damage(segment: OpenSegment, offset: int) -> DamageError:
    return DamageError(
        f"segment {segment.path} is damaged at offset {offset}, within acknowledged history",
        hint=HINT,
    )
