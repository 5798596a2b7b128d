"""The overlay of one disk of a fork: the blocks that were written, at the offsets they have there.

========  ==============================================================================
file      content
========  ==============================================================================
DISK.img  sparse, of the disk's size: a block of state DATA is where it is on the disk
DISK.map  the state of each block that is not BELOW (formats/fork_map.py)
========  ==============================================================================

Rules:

1. A block that is not DATA is written whole: what of it is not given is read from below first. So
   what a crash left of it in DISK.img can never show.
2. A flush makes the data durable, then the map that says so. A change that no flush has followed
   may be there after a crash or not, as on any disk.
3. Blocks become ZEROS in the map; the hole in DISK.img only saves room.
4. After a failed sync nothing is known of what is durable: the overlay fails from then on.
5. What a killed process has left in the page cache is made durable before it is shown, as whoever
   reads it may flush it.
6. The overlay of a fork that is thrown away is never synced: no crash leaves anything of it, and
   the device's time is the journal's.

Nothing here writes to anything but these two files. May be used by several threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from blockrepl.errors import DamageError, PeerError, StorageError
from blockrepl.formats import fork_map
from blockrepl.formats.fork_map import BELOW, DATA, HEADER_BYTES, ZEROS, Change
from blockrepl.formats.frame import Buffer
from blockrepl.limits import FORK_BLOCK_BYTES, FORK_ROOM_STEP_BYTES
from blockrepl.model.block_states import BlockStates, Run
from blockrepl.storage.files import Files, is_full, punch_hole, settle, write_all
from blockrepl.storage.home import write_atomically
from blockrepl.units import MIB

BLOCK = FORK_BLOCK_BYTES
CHANGES_MAX = 1 << 20  # of a record: a flush that has more writes several
COMPACT_BYTES = 1 * MIB  # a map beyond it that is half stale is written anew
Below = Callable[[int, int], Buffer]  # (offset, length): what the view shows there


class Room:
    """What a fork's overlays may take together, and what they must leave to the file system."""

    def __init__(
        self, name: str, directory: Path, limit_bytes: int | None, reserve_bytes: int
    ) -> None:
        self.used_bytes = 0
        self._name = name
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._reserve_bytes = reserve_bytes
        self._granted_bytes = 0  # may be taken before the file system is asked again
        self._lock = threading.Lock()

    def take(self, count_bytes: int) -> None:
        """StorageError (code "full"), and nothing taken, when there is no room."""
        with self._lock:
            after = self.used_bytes + count_bytes
            if count_bytes and self._limit_bytes is not None and after > self._limit_bytes:
                raise StorageError(
                    f"fork {self._name} has reached its limit of {self._limit_bytes} bytes",
                    hint="make one with a larger --size-limit",
                    code="full",
                )
            if count_bytes > self._granted_bytes:
                self._ask(count_bytes)
            self._granted_bytes -= count_bytes
            self.used_bytes = after

    def _ask(self, count_bytes: int) -> None:
        found = os.statvfs(self._directory)
        left = found.f_bavail * found.f_frsize - self._reserve_bytes
        if left < count_bytes:
            raise StorageError(
                f"fork {self._name}: no room left that the receiver's journal can spare",
                hint=f"free some room on the file system of {self._directory}",
                code="full",
            )
        self._granted_bytes = min(left, max(count_bytes, FORK_ROOM_STEP_BYTES))

    def give(self, count_bytes: int) -> None:
        with self._lock:
            self.used_bytes -= count_bytes


def create_overlay(directory: Path, disk: str, size_bytes: int, *, is_durable: bool = True) -> None:
    """Make the two files of a disk that nothing was written to; durable on return. OSError."""
    for path, data in (
        (directory / f"{disk}.img", b""),
        (directory / f"{disk}.map", fork_map.encode_header(size_bytes, BLOCK)),
    ):
        with path.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            if not data:
                os.ftruncate(file.fileno(), size_bytes)
            if is_durable:
                os.fsync(file.fileno())


class Overlay:
    """An open overlay; its fork is locked by whoever opened it.

    Opening it: DamageError, StorageError when what is found cannot be made durable, OSError.
    """

    def __init__(
        self,
        directory: Path,
        disk: str,
        size_bytes: int,
        room: Room,
        files: Files | None = None,
        *,
        is_durable: bool = True,
    ) -> None:
        self.size_bytes = size_bytes
        self._is_durable = is_durable
        self._files = files or Files()
        self._room = room
        self._map_path = directory / f"{disk}.map"
        self._states = BlockStates()
        self._pending: list[Change] = []  # since the last flush, in their order
        self._is_dirty = False
        self._failed: StorageError | None = None
        self._lock = threading.Lock()
        self._flush_lock = threading.Lock()
        if is_durable:
            self._settle(directory / f"{disk}.img")
            self._settle(self._map_path)
        self._map_end = self._load()
        self._data = os.open(directory / f"{disk}.img", os.O_RDWR | os.O_CLOEXEC)
        self._map = os.open(self._map_path, os.O_RDWR | os.O_CLOEXEC)
        room.used_bytes += self.data_bytes

    def _settle(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            settle(self._files, descriptor)
        except OSError as error:
            raise self._failure(error, "make durable") from error
        finally:
            os.close(descriptor)

    def _load(self) -> int:
        """Read the map; where it ends. What a crash left behind that is cut off."""
        data = self._map_path.read_bytes()
        try:
            size_bytes, block_bytes = fork_map.decode_header(data)
        except PeerError as error:
            raise DamageError(
                f"{self._map_path} is damaged: {error}", hint="remove the fork, make it anew"
            ) from error
        if (size_bytes, block_bytes) != (self.size_bytes, BLOCK):
            raise DamageError(f"{self._map_path} is the map of another disk")
        end = HEADER_BYTES
        for changes, after in fork_map.decode_records(data, self._blocks(self.size_bytes)):
            end = after
            for change in changes:
                self._states.set(change.first, change.first + change.count, change.state)
        compact = list(self._states.changes())
        if len(data) > COMPACT_BYTES and len(data) > 2 * len(compact) * fork_map.CHANGE_BYTES:
            whole = fork_map.encode_header(size_bytes, BLOCK)
            whole += fork_map.encode_record(HEADER_BYTES, compact)
            write_atomically(self._map_path, whole, 0o600)
            return len(whole)
        if end < len(data):
            os.truncate(self._map_path, end)
        return end

    @staticmethod
    def _blocks(size_bytes: int) -> int:
        return -(-size_bytes // BLOCK)

    @property
    def data_bytes(self) -> int:
        """What the overlay holds, in whole blocks."""
        return self._states.data_blocks * BLOCK

    def pieces(self, offset: int, end: int) -> list[Run]:
        """[offset, end) as (first byte, byte behind the last, state)."""
        runs = self._states.runs(offset // BLOCK, self._blocks(end))
        return [
            (max(offset, first * BLOCK), min(end, last * BLOCK), state)
            for first, last, state in runs
        ]

    def read_into(self, buffer: memoryview, offset: int, *, wait: bool = True) -> None:
        """Fill ``buffer`` from DATA blocks. StorageError; without ``wait`` BlockingIOError."""
        flags = 0 if wait else os.RWF_NOWAIT
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._data, [buffer[done:]], offset + done, flags)
                if count == 0:
                    raise StorageError(f"{self._map_path.stem}.img of a fork is cut short")
                done += count
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and not wait:
                raise BlockingIOError(errno.EAGAIN, "cannot tell") from error
            raise self._failure(error, "read") from error

    def write(self, offset: int, data: Buffer, below: Below, *, wait: bool = True) -> None:
        """Write; all of it or, with StorageError, perhaps a part. Code "full": nothing.

        Without ``wait``: BlockingIOError, and nothing written, when it would take a device's time.
        """
        if not self._lock.acquire(blocking=wait):
            raise BlockingIOError(errno.EAGAIN, "another write is under way")
        try:
            self._write(offset, data, below)
        finally:
            self._lock.release()

    def _write(self, offset: int, data: Buffer, below: Below) -> None:
        self._check()
        end = offset + len(data)
        if offset >= end:
            return
        first, last = offset // BLOCK, self._blocks(end)
        new_bytes = (last - first - self._states.count(first, last, DATA)) * BLOCK
        head = self._rest(first, first * BLOCK, offset, below)
        tail = self._rest(last - 1, end, min(last * BLOCK, self.size_bytes), below)
        self._room.take(new_bytes)
        self._is_dirty = True
        try:
            write_all(self._files, self._data, [head, data, tail], offset - len(head))
        except OSError as error:
            self._room.give(new_bytes)
            raise self._failure(error, "write") from error
        self._note(self._states.set(first, last, DATA))

    def _rest(self, block: int, start: int, end: int, below: Below) -> Buffer:
        """What [start, end) of a block shows that is about to become DATA."""
        state = self._states.state(block)
        if start >= end or state == DATA:
            return b""
        return bytes(end - start) if state == ZEROS else below(start, end - start)

    def zero(self, offset: int, length: int, below: Below) -> None:
        """Make a range read as zeros. StorageError."""
        end = offset + length
        with self._lock:
            self._check()
            first = self._blocks(offset)
            last = self._blocks(end) if end == self.size_bytes else end // BLOCK
            if first >= last:
                self._write(offset, bytes(length), below)
                return
            self._write(offset, bytes(first * BLOCK - offset), below)
            self._write(last * BLOCK, bytes(max(0, end - last * BLOCK)), below)
            written = [run for run in self._states.runs(first, last) if run[2] == DATA]
            self._is_dirty = True
            self._note(self._states.set(first, last, ZEROS))
            for start, stop, _ in written:
                self._room.give((stop - start) * BLOCK)
                with contextlib.suppress(OSError):  # a file system without holes
                    punch_hole(self._data, start * BLOCK, (stop - start) * BLOCK)

    def _note(self, changes: Sequence[Change]) -> None:
        """Keep changes for the next flush; one that goes on where the last one ends joins it."""
        if not self._is_durable:
            return
        for change in changes:
            before = self._pending[-1] if self._pending else Change(0, 0, BELOW)
            goes_on = before.first + before.count == change.first and before.state == change.state
            if goes_on and before.count + change.count < 1 << 32:
                self._pending[-1] = Change(before.first, before.count + change.count, before.state)
            else:
                self._pending.append(change)

    def flush(self) -> None:
        """Make all that was written before durable, as far as the fork is. StorageError."""
        if not self._is_durable:
            return
        with self._flush_lock:
            with self._lock:
                self._check()
                pending, self._pending = self._pending, []
                is_dirty, self._is_dirty = self._is_dirty, False
            if not is_dirty:
                return
            try:
                self._files.sync(self._data)
                for first in range(0, len(pending), CHANGES_MAX):
                    record = fork_map.encode_record(
                        self._map_end, pending[first : first + CHANGES_MAX]
                    )
                    self._map_end = write_all(self._files, self._map, [record], self._map_end)
                if pending:
                    self._files.sync(self._map)
            except OSError as error:
                self._failed = self._failure(error, "make durable")
                raise self._failed from error

    def _check(self) -> None:
        if self._failed is not None:
            raise StorageError(str(self._failed), hint=self._failed.hint)

    def _failure(self, error: OSError, what: str) -> StorageError:
        return StorageError(
            f"cannot {what} the fork's {self._map_path.stem}.img: {error.strerror}",
            hint="look at the disk that holds the fork, then open it again",
            code="full" if is_full(error) else None,
        )

    def close(self) -> None:
        """Close the files; what was not flushed may be lost."""
        os.close(self._data)
        os.close(self._map)
