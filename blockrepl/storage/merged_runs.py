"""Merged runs as a lookup sees them: which files of ``index/`` stand in for which segments.

A file is used when its name is the one that the segments it claims, as the catalog has them, give
(formats/merged_run.py): so all of them are sealed, and none was rewritten, dropped or added since.
Of files that overlap, the one of the most segments is used, for it was made of the others.

What cannot be read or proven is given up for good in this process, with one warning, and the lookup
begins again with what is left: smaller merged runs, or the segments' own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from blockrepl.errors import DamageError, PeerError, StorageError
from blockrepl.formats import merged_run
from blockrepl.formats.merged_run import MergedContents, MergedName, SegmentIdentity
from blockrepl.formats.run import Run
from blockrepl.formats.segment import RunEntry
from blockrepl.storage.reading import ReadFiles, damaged
from blockrepl.storage.runs import DirectoryCache, FileRun
from blockrepl.storage.segment_reader import Known

DIRECTORY_NAME = "index"


class MergedRunError(Exception):
    """A merged run cannot be used; ``name`` says which. Never leaves the index."""

    def __init__(self, name: MergedName, error: Exception) -> None:
        super().__init__(str(error))
        self.name = name
        self.offset = error.offset if isinstance(error, DamageError) else None


@dataclass(frozen=True, slots=True)
class _DiskRun:
    """One disk's run in a merged file; any failure is a MergedRunError."""

    name: MergedName
    run: FileRun
    first_stamp: int
    last_stamp: int

    def estimate(self, first: int, last: int) -> int:
        try:
            return self.run.estimate(first, last)
        except (DamageError, StorageError) as error:
            raise MergedRunError(self.name, error) from error

    def overlapping(self, first: int, last: int, at_ns: int) -> list[Run]:
        try:
            return self.run.overlapping(first, last, at_ns)
        except (DamageError, StorageError) as error:
            raise MergedRunError(self.name, error) from error

    def stream(self, *, is_long: bool) -> Iterator[Run]:
        try:
            yield from self.run.stream(is_long=is_long)
        except (DamageError, StorageError) as error:
            raise MergedRunError(self.name, error) from error


class MergedFile:
    """A merged run's file. Its contents are read when first asked for."""

    def __init__(
        self,
        directory: Path,
        name: MergedName,
        group: bytes,
        files: ReadFiles,
        directories: DirectoryCache,
    ) -> None:
        self.name = name
        self.path = directory / str(name)
        self._group = group
        self._files = files
        self._directories = directories
        self._lock = threading.Lock()
        self._entries: dict[bytes, RunEntry] | None = None

    def run(self, disk: bytes) -> _DiskRun | None:
        """A disk's run; None when it has no records in these segments. MergedRunError."""
        entry = self.entries().get(disk)
        if entry is None:
            return None
        run = FileRun(self.path, entry, self._files, self._directories)
        return _DiskRun(self.name, run, entry.first_stamp, entry.last_stamp)

    def entries(self) -> dict[bytes, RunEntry]:
        """What there is of each disk. MergedRunError."""
        with self._lock:
            if self._entries is None:
                try:
                    contents = self._contents()
                except (DamageError, StorageError) as error:
                    raise MergedRunError(self.name, error) from error
                self._entries = {entry.disk.bytes: entry for entry in contents.runs}
            return self._entries

    def _contents(self) -> MergedContents:
        tail = max(0, self._files.size(self.path) - merged_run.TRAILER_BYTES)
        try:
            header = self._files.read(self.path, merged_run.HEADER_BYTES, 0)
            if merged_run.decode_header(header) != self._group:
                self._damaged(0, "it belongs to another group")
            trailer = self._files.read(self.path, merged_run.TRAILER_BYTES, tail)
            offset, size, digest = merged_run.decode_trailer(trailer)
            if offset + size != tail:
                self._damaged(tail, "its contents are not where its trailer says")
            contents = merged_run.decode_contents(self._files.read(self.path, size, offset), digest)
        except PeerError as error:
            raise damaged(self.path, tail, error) from error
        if contents.name != str(self.name):
            self._damaged(tail, f"it was written as {contents.name}")
        return contents

    def _damaged(self, offset: int, why: str) -> NoReturn:
        raise damaged(self.path, offset, why)


def names_present(directory: Path) -> list[MergedName]:
    """The merged runs in a directory, by their names."""
    try:
        found = [MergedName.parse(path.name) for path in directory.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(name for name in found if name is not None)


def identities(known: Mapping[int, Known]) -> dict[int, SegmentIdentity]:
    """Of the sealed segments, by number, ascending."""
    return {
        number: SegmentIdentity(number, row.created_ns, row.bytes, row.frames)
        for number, row in sorted(known.items())
        if row.sealed
    }


def is_true(name: MergedName, known: Mapping[int, Known], sealed: list[SegmentIdentity]) -> bool:
    """Whether a file of that name is the index of exactly the segments there are in its range."""
    numbers = [number for number in known if name.first <= number <= name.last]
    covered = [each for each in sealed if name.first <= each.number <= name.last]
    return bool(covered) and len(covered) == len(numbers) and MergedName.of(covered) == name


def chosen(names: Iterable[MergedName], known: Mapping[int, Known]) -> list[MergedName]:
    """The files to use: true ones, the longest first, none that overlaps with another."""
    sealed = list(identities(known).values())
    used: list[MergedName] = []
    for name in sorted(names, key=lambda name: name.first - name.last):
        overlaps = any(name.first <= other.last and other.first <= name.last for other in used)
        if not overlaps and is_true(name, known, sealed):
            used.append(name)
    return sorted(used)
