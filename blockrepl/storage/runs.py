"""Lookup in one index run: which entries overlap a window and are not newer than an instant.

Theory: the entries of a chunk lie between its first start and its last end, and between its first
and last stamp; what a directory's numbers rule out is not read. Entries of up to LONG_BYTES are
sorted by start, so few chunks are left of them; the long ones have chunks of their own, or every
chunk would reach far. So a lookup reads what it finds, and a chunk more at either side.

A run in a file is proven piece by piece: its directory when it is first used, a chunk when it is
read. Directories are kept in a cache bounded in bytes (56 for 1024 entries).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from blockrepl.errors import DamageError, PeerError
from blockrepl.formats import run as run_format
from blockrepl.formats.frame import U32, U64
from blockrepl.formats.run import DIRECTORY, LONG_BYTES, Run
from blockrepl.formats.segment import RunEntry
from blockrepl.storage.read_memory import read_memory
from blockrepl.storage.reading import Cache, ReadFiles, damaged
from blockrepl.units import MIB

READ_BYTES_MAX = 1 * MIB  # chunks that lie together are read at once
STREAM_ENTRIES = 16 * 1024  # handed on at a time


def overlapping(run: Run, first: int, last: int, at_ns: int) -> Run:
    """Of any entries, those that overlap [first, last) with a stamp up to ``at_ns``."""
    which = run.starts < np.uint64(last)
    which &= run.ends > np.uint64(first)
    which &= run.stamps <= np.uint64(at_ns)
    return run.take(which)


class MemoryRun:
    """A run in memory, of entries in any order."""

    def __init__(self, entries: Run) -> None:
        entries = entries.by_start()
        self.entries = entries
        self._long = entries.take(entries.is_long)
        self.first_stamp = int(entries.stamps.min()) if len(entries) else 0
        self.last_stamp = int(entries.stamps.max()) if len(entries) else 0

    def __len__(self) -> int:
        return len(self.entries)

    def _bounds(self, first: int, last: int) -> tuple[int, int]:
        bounds = np.array([max(0, first - LONG_BYTES), last], np.uint64)
        low, high = np.searchsorted(self.entries.starts, bounds)
        return int(low), int(high)

    def estimate(self, first: int, last: int) -> int:
        """About how many entries a lookup of the window would look at."""
        low, high = self._bounds(first, last)
        return high - low

    def overlapping(self, first: int, last: int, at_ns: int) -> list[Run]:
        run = self.entries.take(slice(*self._bounds(first, last)))
        short = run.take(~run.is_long)
        return [overlapping(part, first, last, at_ns) for part in (short, self._long) if len(part)]

    def stream(self, *, is_long: bool) -> Iterator[Run]:
        """All entries that are long or are not, by start, piece by piece."""
        entries = self._long if is_long else self.entries.take(~self.entries.is_long)
        for at in range(0, len(entries), STREAM_ENTRIES):
            yield entries.take(slice(at, at + STREAM_ENTRIES))


@dataclass(frozen=True, slots=True)
class Directory:
    """A run's directory, a column each."""

    offsets: U64
    sizes: U32
    counts: U32
    first_starts: U64
    last_ends: U64
    first_stamps: U64
    digests: U64

    def cost(self) -> int:
        return 256 + DIRECTORY.itemsize * len(self.offsets)

    def which(self, first: int, last: int, at_ns: int | None = None) -> npt.NDArray[np.intp]:
        """The chunks that may have entries which overlap, with a stamp up to an instant."""
        which = self.first_starts < np.uint64(last)
        which &= self.last_ends > np.uint64(first)
        if at_ns is not None:
            which &= self.first_stamps <= np.uint64(at_ns)
        return np.flatnonzero(which)


DirectoryCache = Cache[tuple[Path, bytes], Directory]


def directory_cache() -> DirectoryCache:
    return Cache(read_memory().directories, Directory.cost)


class FileRun:
    """A run in a file that never changes. DamageError, StorageError from all that reads."""

    def __init__(
        self, path: Path, entry: RunEntry, files: ReadFiles, directories: DirectoryCache
    ) -> None:
        self.first_stamp = entry.first_stamp
        self.last_stamp = entry.last_stamp
        self._path = path
        self._entry = entry
        self._files = files
        self._directories = directories

    def __len__(self) -> int:
        return self._entry.count

    def estimate(self, first: int, last: int) -> int:
        """About how many entries a lookup of the window would look at."""
        directory = self._directory()
        return int(directory.counts[directory.which(first, last)].sum())

    def overlapping(self, first: int, last: int, at_ns: int) -> list[Run]:
        directory = self._directory()
        chunks = directory.which(first, last, at_ns)
        return [overlapping(self._read(directory, chunks), first, last, at_ns)]

    def stream(self, *, is_long: bool) -> Iterator[Run]:
        """All entries that are long or are not, by start, piece by piece."""
        directory = self._directory()
        short = len(directory.offsets) - self._entry.long_chunks
        first, last = (short, len(directory.offsets)) if is_long else (0, short)
        step = STREAM_ENTRIES // run_format.CHUNK_ENTRIES
        for at in range(first, last, step):
            yield self._read(directory, np.arange(at, min(at + step, last)))

    def _directory(self) -> Directory:
        key = (self._path, self._entry.disk.bytes)
        directory = self._directories.get(key)
        if directory is None:
            directory = self._read_directory()
            self._directories.put(key, directory)
        return directory

    def _read_directory(self) -> Directory:
        offset = self._entry.directory_offset
        data = self._files.read(self._path, self._entry.chunks * DIRECTORY.itemsize, offset)
        try:
            if xxhash.xxh3_64_intdigest(data) != self._entry.digest:
                raise PeerError("directory of an index run does not match its digest")
            table = run_format.decode_directory(data)
        except PeerError as error:
            raise damaged(self._path, offset, error) from error
        return Directory(
            *(
                np.ascontiguousarray(table[name])
                for name in (
                    "offset", "bytes", "count", "first_start", "last_end", "first_stamp", "digest"
                )
            )
        )  # fmt: skip

    def _read(self, directory: Directory, chunks: npt.NDArray[np.intp]) -> Run:
        """All entries of chunks."""
        counts = directory.counts[chunks].tolist()
        offsets = directory.offsets[chunks].tolist()
        sizes = directory.sizes[chunks].tolist()
        digests = directory.digests[chunks].tolist()
        run = run_format.empty(sum(counts))
        done, place = 0, 0
        while done < len(counts):
            # Chunks that follow one another in the file are read with one call.
            start = end = offsets[done]
            stop = done
            while stop < len(counts) and offsets[stop] == end and end - start < READ_BYTES_MAX:
                end += sizes[stop]
                stop += 1
            data = memoryview(self._files.read(self._path, end - start, start))
            for number in range(done, stop):
                at = offsets[number] - start
                chunk = data[at : at + sizes[number]]
                try:
                    if xxhash.xxh3_64_intdigest(chunk) != digests[number]:
                        raise PeerError("index run does not match its digest")
                    run_format.decode_chunk(chunk, counts[number], run, place)
                except PeerError as error:
                    raise damaged(self._path, offsets[number], error) from error
                place += counts[number]
            done = stop
        return run


class MendedRun:
    """A run in a file; where that is damaged, its entries made again, from then on in memory."""

    def __init__(self, run: FileRun, rebuild: Callable[[DamageError], Run]) -> None:
        self.first_stamp = run.first_stamp
        self.last_stamp = run.last_stamp
        self._run: MemoryRun | FileRun = run
        self._rebuild = rebuild
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._run)

    def _mend(self, error: DamageError) -> MemoryRun:
        with self._lock:
            if isinstance(self._run, FileRun):
                self._run = MemoryRun(self._rebuild(error))
            return self._run

    def estimate(self, first: int, last: int) -> int:
        try:
            return self._run.estimate(first, last)
        except DamageError as error:
            return self._mend(error).estimate(first, last)

    def overlapping(self, first: int, last: int, at_ns: int) -> list[Run]:
        try:
            return self._run.overlapping(first, last, at_ns)
        except DamageError as error:
            return self._mend(error).overlapping(first, last, at_ns)

    def stream(self, *, is_long: bool) -> Iterator[Run]:
        """As the others' ``stream``. After a DamageError, the next stream is whole."""
        try:
            yield from self._run.stream(is_long=is_long)
        except DamageError as error:
            self._mend(error)
            raise


RunSource = MemoryRun | FileRun | MendedRun
