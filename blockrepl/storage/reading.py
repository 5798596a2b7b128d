"""Positional reads of many files through a bounded number of descriptors, and bounded caches.

A journal has more segments than a process may have files open, and a memory map of a file that
shrinks or fails kills its reader, so everything is read with pread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from blockrepl.errors import DamageError, StorageError

IMAGE_SUFFIX = ".img"  # of a base image: what lies together there is read together
OPEN_FILES_MAX = 128  # descriptors; segments beyond are closed, least recently used first
LOOKS_MAX = 10  # at a history that retention is writing anew; a segment is replaced in a minute


class GoneError(DamageError):
    """The file is no more: retention has put another in its place, or it is lost. Look again."""


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Result = TypeVar("Result")


def looking(look: Callable[[], Result], again: Callable[[], object] = lambda: None) -> Result:
    """What a look at a history finds; repeated where retention has replaced segments meanwhile.

    Either the look itself takes up the state of the history, or ``again`` does, between two looks.
    GoneError after LOOKS_MAX of them.
    """
    for _ in range(LOOKS_MAX - 1):
        with contextlib.suppress(GoneError):
            return look()
        with contextlib.suppress(GoneError):  # the next look tells
            again()
    return look()


class Cache(Generic[Key, Value]):
    """Least recently used out first; what it holds stays under ``limit`` in the caller's unit."""

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self._limit = limit
        self._size = size
        self._held = 0
        self._clearings = 0
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: Key, value: Value, clearings: int | None = None) -> None:
        """``clearings``: as they were when the value was begun; it is not kept if it was cleared
        since.
        """
        with self._lock:
            if clearings not in (None, self._clearings):
                return
            old = self._values.pop(key, None)
            if old is not None:
                self._held -= self._size(old)
            self._values[key] = value
            self._held += self._size(value)
            while self._held > self._limit and len(self._values) > 1:
                self._held -= self._size(self._values.popitem(last=False)[1])

    @property
    def held(self) -> int:
        """What it holds now, in the caller's unit."""
        return self._held

    @property
    def clearings(self) -> int:
        """How often it was cleared."""
        return self._clearings

    def clear(self) -> None:
        with self._lock:
            self._clearings += 1
            self._values.clear()
            self._held = 0


def damaged(path: Path, offset: int, why: object) -> DamageError:
    """The one way damage is told: file and offset."""
    error = DamageError(
        f"segment {path.name} is damaged at offset {offset}: {why} ({path})",
        hint="stop the receiver and run `blockrepl receiver check`: it says exactly what is lost "
        "and what is not, and --repair mends what can be made again",
    )
    error.offset = offset
    return error


class OpenFile:
    """Closed when the last reader lets go of it."""

    __slots__ = ("descriptor", "is_image")

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.is_image = path.suffix == IMAGE_SUFFIX
        if not self.is_image:
            # Only the index knows what is read next: reading on from here would be for nothing.
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    @property
    def is_gone(self) -> bool:
        """Whether it is an image that was removed: another disk may have its name by now."""
        return self.is_image and os.fstat(self.descriptor).st_nlink == 0

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ReadFiles:
    """Reads of files that never change where they are read. May be used by several threads."""

    def __init__(self, open_files_max: int = OPEN_FILES_MAX) -> None:
        self._open: Cache[Path, OpenFile] = Cache(open_files_max, lambda _file: 1)

    def close(self) -> None:
        self._open.clear()

    def size(self, path: Path) -> int:
        with _named(path, 0):
            return os.fstat(self.file(path).descriptor).st_size

    def allocated_bytes(self, path: Path) -> int:
        with _named(path, 0):
            return os.fstat(self.file(path).descriptor).st_blocks * 512

    def read(self, path: Path, size: int, offset: int) -> bytes:
        """``size`` bytes, fewer only at the end of the file. StorageError."""
        with _named(path, offset):
            return _read_whole(self.file(path).descriptor, size, offset)

    def data_ranges(self, path: Path, offset: int, end: int) -> list[tuple[int, int]]:
        """The parts of [offset, end) that are not holes."""
        ranges: list[tuple[int, int]] = []
        with _named(path, offset):
            descriptor = self.file(path).descriptor
            while offset < end:
                try:
                    data = os.lseek(descriptor, offset, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == errno.ENXIO:  # no data up to the end of the file
                        break
                    raise
                if data >= end:
                    break
                offset = min(end, os.lseek(descriptor, data, os.SEEK_HOLE))
                ranges.append((data, offset))
        return ranges

    def failure(self, path: Path, offset: int, code: int) -> Exception:
        """What an errno of a read means: BlockingIOError or StorageError."""
        try:
            with _named(path, offset):
                raise OSError(code, os.strerror(code))
        except (OSError, StorageError) as error:
            return error

    def open(self, path: Path) -> OpenFile:
        """Open as long as it is held. StorageError."""
        with _named(path, 0):
            return self.file(path)

    def file(self, path: Path) -> OpenFile:
        """Open as long as it is held. OSError."""
        file = self._open.get(path)
        if file is None or file.is_gone:
            file = OpenFile(path)
            self._open.put(path, file)
        return file


def _read_whole(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class _named:
    """An OSError as a StorageError that names file and offset."""

    __slots__ = ("offset", "path")

    def __init__(self, path: Path, offset: int) -> None:
        self.path = path
        self.offset = offset

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
            kind_of_error = GoneError if error.errno == errno.ENOENT else StorageError
            raise kind_of_error(
                f"cannot read {self.path} at {self.offset}: {error.strerror}"
            ) from error
