"""The spool: a group's frames on the source's disk, in order, while the link is down or slow.

``<home>/source/spool/<group>/``: ``state.json``, and files of frames back to back (the very bytes
of the wire), each named by the number of its first frame.

Rules:

1. ``state.json`` says what the receiver knew before the first frame of the first file, and which
   disks were attached then. Without it, the files mean nothing and are removed.
2. It is written after the first frames, and removed before the files: so where it is, the files
   hold every frame from its number on that was ever numbered, and the next number is free to use.
3. A file is removed when all its frames are durable at the receiver, after ``state.json`` has moved
   on, durably, to the file behind it.
4. No frame is synced before it counts: the ring, which the spool relieves, is memory itself, so a
   power cut may take either. Rule 2 holds within one boot only.
5. Recovery reads all headers, and after a reboot all bodies as well (a power cut may leave a file
   its size and not its content). It cuts at the first frame that is not whole and true, and forgets
   what lies behind: what was in it is missing from the ring's sequence, so it is found to be a gap.
   A killed agent leaves half a frame at the very end, which was never sent. Anything else is
   damage.
6. After damage, or a reboot, frames may have been sent that are not here any more, and their
   numbers must not be used again: ``is_certain`` is False. What is here is delivered, but nothing
   is numbered before the receiver has said how far it is.

One task uses a spool at a time; beside that, one syncs it, and who reads it may `advance` and
`sweep` it. What waits for the disk to sync, or to free what is large, needs no hold on the spool:
whoever appends would wait too. Methods block on the disk, but for `unsynced`, `synced` and
`give_back`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from blockrepl import limits
from blockrepl.errors import DamageError, PeerError, StorageError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Buffer, FrameHeader, FrameKind
from blockrepl.formats.marks import Mark, decode_mark
from blockrepl.formats.messages import AttachDisk, Attached
from blockrepl.storage.files import Files, failure, private, write_all
from blockrepl.storage.home import make_directory, sync_directory
from blockrepl.storage.spool_recovery import FileRecovery

log = logging.getLogger(__name__)

STATE = "state.json"
_SUFFIX = ".frames"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SpoolState(BaseModel):
    """What the receiver knew before the first frame of the spool."""

    model_config = ConfigDict(frozen=True)
    boot_id: str
    attached: Attached
    disks: list[AttachDisk]


@dataclass(frozen=True, slots=True)
class SpoolLimits:
    """``size_bytes`` None: SPOOL_BYTES_DEFAULT, or a fifth of what is free when that is less."""

    size_bytes: int | None = None
    reserve_bytes: int = limits.SPOOL_RESERVE_BYTES_DEFAULT


@dataclass(frozen=True, slots=True)
class SpooledFrame:
    header: FrameHeader
    frame: memoryview  # header included

    @property
    def body(self) -> memoryview:
        return self.frame[frames.HEADER_BYTES :]

    def mark(self) -> Mark | None:
        if self.header.kind != FrameKind.MARK:
            return None
        return decode_mark(frames.decode_payload(self.header, self.body))


@dataclass(slots=True)
class _File:
    path: Path
    first_number: int
    size_bytes: int = 0
    synced_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Unsynced:
    """What a power cut would take from a spool as it was. Syncing it needs no hold on the spool."""

    state: SpoolState | None  # None: it is synced
    sizes: list[tuple[_File, int]]


class Spool:
    """``next_number`` is that of the frame to be appended next; 0 while there is no spool."""

    def __init__(self, directory: Path, bounds: SpoolLimits, files: Files | None = None) -> None:
        self.directory = directory
        self.bounds = bounds
        self.state: SpoolState | None = None
        self.next_number = 0
        self.size_bytes = 0
        self._is_damaged = False
        self._state_synced = False
        self._boot_id = _BOOT_ID.read_text().strip()
        self._system = files or Files()
        self._files: list[_File] = []
        self.given_back: list[Path] = []
        self._writing: int | None = None
        self._reading: int | None = None
        self._read_file = 0  # place in _files
        self._read_at = 0
        self._read_number = 0

    # --- recovery

    @classmethod
    def open(cls, directory: Path, bounds: SpoolLimits, files: Files | None = None) -> Spool:
        """Recover what is there; an empty spool when there is nothing to go on with."""
        spool = cls(directory, bounds, files)
        try:
            spool.state = SpoolState.model_validate_json((directory / STATE).read_bytes())
        except FileNotFoundError:
            pass
        except ValidationError:
            log.warning("%s does not parse; the spool beside it is given up", directory / STATE)
        except OSError as error:
            if error.errno != errno.EIO:  # a want that passes costs no history
                raise
            log.warning("%s cannot be read; the spool beside it is given up", directory / STATE)
        if spool.state is None:
            spool.clear()
        else:
            spool._recover(spool.state)
        return spool

    @property
    def is_active(self) -> bool:
        return self.state is not None

    @property
    def is_certain(self) -> bool:
        """Whether ``next_number`` is free to use, whatever the receiver says (rule 6)."""
        return (
            self.state is not None and self.state.boot_id == self._boot_id and not self._is_damaged
        )

    def _recover(self, state: SpoolState) -> None:
        first = state.attached.next_number
        is_of_this_boot = state.boot_id == self._boot_id
        stems = (path.stem for path in self.directory.glob(f"*{_SUFFIX}"))
        numbers = sorted(int(stem) for stem in stems if re.fullmatch("[0-9]{20}", stem))
        self.next_number = first
        for number in numbers:
            path = self._path(number)
            if number != self.next_number:
                self._is_damaged |= number > first  # else delivered before a crash (rule 3)
                path.unlink()
                continue
            is_last = number == numbers[-1]
            bodies = is_last or not is_of_this_boot
            found = FileRecovery(state.attached.group_id.bytes, bodies, is_last).cut(path, number)
            self._files.append(_File(path, number, found.size_bytes))
            self._is_damaged |= found.is_damaged
            self.size_bytes += found.size_bytes
            self.next_number += found.frames
        self._is_damaged |= not self._files
        self.rewind(first)

    # --- writing

    def has_room(self, size_bytes: int) -> bool:
        """Whether frames of that many bytes may be added."""
        try:
            found = os.statvfs(self.directory if self.is_active else self._parent())
        except OSError:
            return False
        free_bytes = found.f_bavail * found.f_frsize
        return (
            self.size_bytes + size_bytes <= self.limit_bytes(free_bytes)
            and free_bytes - size_bytes >= self.bounds.reserve_bytes
        )

    def limit_bytes(self, free_bytes: int | None = None) -> int:
        """How large the spool may become."""
        if self.bounds.size_bytes is not None:
            return self.bounds.size_bytes
        if free_bytes is None:
            found = os.statvfs(self._parent())
            free_bytes = found.f_bavail * found.f_frsize
        share = int((free_bytes + self.size_bytes) * limits.SPOOL_FREE_SHARE)
        return min(limits.SPOOL_BYTES_DEFAULT, share)

    def _parent(self) -> Path:
        return next(path for path in self.directory.parents if path.exists())

    def begin(
        self, known: Attached, disks: list[AttachDisk], frames: Sequence[Sequence[Buffer]]
    ) -> None:
        """Start a spool with all frames from ``known.next_number`` on (rule 2). StorageError."""
        assert not self.is_active
        self.next_number = known.next_number
        try:
            make_directory(self.directory, durably=False)  # as the state is written
            for path in self.directory.glob(f"*{_SUFFIX}"):
                if path >= self._path(self.next_number):  # else it might be taken for a part
                    path.unlink()
            self._add_file()
            for buffers in frames:
                self.append(buffers)
            self._write_state(SpoolState(boot_id=self._boot_id, attached=known, disks=disks))
        except (StorageError, OSError) as error:
            self._forget()
            if isinstance(error, StorageError):
                raise
            raise failure(error, f"cannot make {self.directory}") from error
        self.rewind(known.next_number)

    def _write_state(self, state: SpoolState, *, durably: bool = False) -> None:
        """Not synced at first (rule 4): what stalls here would cost the ring its room."""
        path, new = self.directory / STATE, self.directory / f".{STATE}.new"
        try:
            with open(new, "wb", opener=private) as file:
                file.write(state.model_dump_json().encode())
            if durably:
                self._sync_path(new)
            new.rename(path)
            if durably:
                sync_directory(self.directory)
        except OSError as error:
            raise failure(error, f"cannot write {path}") from error
        # Its directory may be new: `sync` has to come by once in any case.
        self.state, self._state_synced = state, durably and self._state_synced

    def _sync_path(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._system.sync(descriptor)
        finally:
            os.close(descriptor)

    def append(self, buffers: Sequence[Buffer]) -> None:
        """Add the frame ``next_number``. StorageError: it was not added."""
        if not self._files or self._files[-1].size_bytes >= limits.SPOOL_FILE_BYTES:
            self._add_file()
        self._append(buffers)

    def _add_file(self) -> None:
        path = self._path(self.next_number)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise failure(error, f"cannot create {path}") from error
        self._close_writing()
        self._writing = descriptor
        self._files.append(_File(path, self.next_number))

    def _append(self, buffers: Sequence[Buffer]) -> None:
        file = self._files[-1]
        size_bytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        try:
            if self._writing is None:
                self._writing = os.open(file.path, os.O_RDWR | os.O_CLOEXEC)
            write_all(self._system, self._writing, buffers, file.size_bytes)
        except OSError as error:
            if self._writing is not None:
                with contextlib.suppress(OSError):
                    self._system.truncate(self._writing, file.size_bytes)
            raise failure(error, f"cannot write {file.path}") from error
        file.size_bytes += size_bytes
        self.size_bytes += size_bytes
        self.next_number += 1

    def unsynced(self) -> Unsynced:
        sizes = [(one, one.size_bytes) for one in self._files if one.synced_bytes < one.size_bytes]
        return Unsynced(None if self._state_synced else self.state, sizes)

    def sync(self, what: Unsynced) -> None:
        """Make it survive a power cut; the spool may be in use meanwhile. StorageError."""
        paths = [file.path for file, _ in what.sizes]
        if what.state is not None:
            paths.append(self.directory / STATE)
        try:
            if what.state is not None:
                make_directory(self.directory.parent)
                make_directory(self.directory)
            for path in paths:
                with contextlib.suppress(FileNotFoundError):  # given back meanwhile
                    self._sync_path(path)
            if paths:
                sync_directory(self.directory)
        except OSError as error:
            raise failure(error, f"cannot sync the spool in {self.directory}") from error

    def synced(self, what: Unsynced) -> None:
        """`sync` has succeeded."""
        for file, size_bytes in what.sizes:
            file.synced_bytes = size_bytes
        self._state_synced |= what.state is self.state

    # --- reading

    def has_unread(self) -> bool:
        return self.is_active and self._read_number < self.next_number

    def unread_bytes(self) -> int:
        """Bytes from the frame to be read next on."""
        if not self.has_unread():
            return 0
        return sum(file.size_bytes for file in self._files[self._read_file :]) - self._read_at

    def rewind(self, number: int) -> None:
        """Read ``number`` next; the spool holds it, or it is ``next_number``. DamageError."""
        places = [i for i, file in enumerate(self._files) if file.first_number <= number]
        self._close_reading()
        self._read_file, self._read_at, self._read_number = 0, 0, number
        if not places:
            if number < self.next_number:
                raise self._damage()
            return
        self._read_file = places[-1]
        self._read_number = self._files[self._read_file].first_number
        while self._read_number < number:
            self._read_at += self._read_header().frame_bytes
            self._read_number += 1

    def read(self) -> SpooledFrame:
        """The next frame, proven. DamageError when it is not what was written."""
        header = self._read_header()
        assert self._reading is not None
        data = memoryview(np.empty(header.frame_bytes, np.uint8).data)
        found = SpooledFrame(header, data)
        try:
            if os.preadv(self._reading, [data], self._read_at) != len(data):
                raise self._damage()
            frames.check_body(header, found.body)
        except (OSError, PeerError) as error:
            raise self._damage() from error
        self._read_at += header.frame_bytes
        self._read_number += 1
        return found

    def skip(self) -> tuple[FrameHeader, Mark | None]:
        """As `read`, without the content of frames that have one. DamageError."""
        header = self._read_header()
        if header.kind == FrameKind.MARK:
            return header, self.read().mark()
        self._read_at += header.frame_bytes
        self._read_number += 1
        return header, None

    def _read_header(self) -> FrameHeader:
        if self._read_at >= self._files[self._read_file].size_bytes:
            self._close_reading()
            self._read_file, self._read_at = self._read_file + 1, 0
        try:
            if self._reading is None:
                path = self._files[self._read_file].path
                self._reading = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            header = frames.decode_header(
                os.pread(self._reading, frames.HEADER_BYTES, self._read_at)
            )
        except (OSError, PeerError) as error:
            raise self._damage() from error
        if header.number != self._read_number:
            raise self._damage()
        return header

    def _damage(self) -> DamageError:
        return DamageError(
            f"frame {self._read_number} in the spool {self.directory} cannot be read",
            hint="check the source's disk; what is lost becomes a gap, the replica is synced again",
        )

    # --- giving back

    def begins_file(self, number: int) -> bool:
        """Whether files before that frame could be given back once it is due."""
        return any(file.first_number == number for file in self._files[1:])

    def advance(self, known: Attached) -> None:
        """Note, durably, that the receiver has all before a frame that begins a file. StorageError.

        Does nothing when it begins none any more: this may be another spool than it was. Frames may
        be appended meanwhile.
        """
        if self.state is not None and self.begins_file(known.next_number):
            self._write_state(self.state.model_copy(update={"attached": known}), durably=True)

    def give_back(self) -> None:
        """Do without the files before the frame that `advance` has come to; then `sweep`."""
        if self.state is None:
            return
        while self._files and self._files[0].first_number < self.state.attached.next_number:
            file = self._files.pop(0)
            self.given_back.append(file.path)
            self.size_bytes -= file.size_bytes
            self._read_file -= 1
        if self._read_file < 0:  # it stood at the end of the last of them
            self._close_reading()
            self._read_file = self._read_at = 0

    def sweep(self) -> None:
        """Remove what was given back: files before any number that is still to be used."""
        while self.given_back:
            path = self.given_back.pop()
            with contextlib.suppress(OSError):  # removed at the next start, then
                path.unlink()

    def end(self) -> None:
        """Give everything back; then `sweep`. `begin` may follow. StorageError: as it was."""
        try:
            (self.directory / STATE).unlink(missing_ok=True)
        except OSError as error:
            raise failure(error, f"cannot remove {self.directory / STATE}") from error
        # One without a frame has the next one's number: `begin` is to write it.
        self.given_back += [file.path for file in self._files if file.size_bytes]
        self._reset()

    def clear(self) -> None:
        """Remove everything; a spool of any numbers may follow. StorageError: it is all there."""
        self.end()
        self.given_back.clear()
        self._forget()

    def _forget(self) -> None:
        """Without a state, files mean nothing: `begin` removes those that stay."""
        self._reset()
        for path in self.directory.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _reset(self) -> None:
        self.close()
        self.state = None
        self._is_damaged = False
        self._files = []
        self.size_bytes = self.next_number = self._read_file = self._read_at = 0
        self._read_number = 0

    def close(self) -> None:
        self._close_writing()
        self._close_reading()

    def _close_writing(self) -> None:
        if self._writing is not None:
            os.close(self._writing)
            self._writing = None

    def _close_reading(self) -> None:
        if self._reading is not None:
            os.close(self._reading)
            self._reading = None

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:020d}{_SUFFIX}"
