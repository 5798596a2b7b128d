"""Merging: the index of many sealed segments into one run, in the background.

Order of things, and what a crash after each leaves:

====  ================================  =======================================================
step  done                              a crash after it leaves
====  ================================  =======================================================
1     the run is written to NAME.tmp    a file that nobody reads; removed by the next step
2     it is synced                      the same
3     it is renamed to NAME, synced     the run, and the ones it was made of: the longest is used
4     the ones it was made of are gone  what was wanted
====  ================================  =======================================================

Step 3 is the commit point: a file of that name is the whole index of the segments it names
(formats/merged_run.py). The segments keep their own runs, so nothing is lost by any of this, and
``index/`` may be deleted at any time.

Before step 3 the result is checked against what went in: as many entries, the same sum of a hash
of each, starts that ascend. A run that would hide a record is never named. Each run that another
process made is read whole once; one that is damaged goes, and is made again.

Memory is bounded by STREAM_ENTRIES per input. After each piece ``pause`` is called with the
seconds it took: it may sleep, and raises to stop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol
from uuid import UUID

import numpy as np
import xxhash

from blockrepl.errors import DamageError
from blockrepl.formats import merged_run
from blockrepl.formats.merged_run import MergedContents, MergedName
from blockrepl.formats.run import COLUMNS, Run, RunEncoder, concatenate
from blockrepl.formats.segment import RunEntry, file_name
from blockrepl.model import levels
from blockrepl.model.levels import Merge
from blockrepl.storage import merged_runs
from blockrepl.storage.files import failure, private
from blockrepl.storage.home import make_directory, sync_directory
from blockrepl.storage.journal import DIRECTORY_NAME as SEGMENTS_NAME
from blockrepl.storage.merged_runs import MergedFile, MergedRunError
from blockrepl.storage.reading import ReadFiles
from blockrepl.storage.runs import directory_cache
from blockrepl.storage.segment_reader import Known, SegmentReader
from blockrepl.units import MIB

log = logging.getLogger(__name__)

FREE_BYTES_MIN = 256 * MIB  # left for the journal: an index is never worth its room
TEMPORARY = ".tmp"
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
Pause = Callable[[float], None]


class Streamed(Protocol):
    """A run that hands out its entries in order."""

    def stream(self, *, is_long: bool) -> Iterator[Run]: ...


class Merger:
    """Makes and drops the merged runs of one replica. Used by one thread at a time."""

    def __init__(self, directory: Path, group: bytes) -> None:
        """``directory``: the replica's."""
        self._directory = directory / merged_runs.DIRECTORY_NAME
        self._segments = directory / SEGMENTS_NAME
        self._group = group
        self._failed: set[MergedName] = set()
        self._proven: set[MergedName] = set()  # read whole, or made, by this process

    def step(self, known: Mapping[int, Known], pause: Pause) -> bool:
        """Do one merge, prove one run, or drop what is not needed. False when all is done.

        ``known`` are all segments, as the catalog has them. StorageError.
        """
        self._remove(path for path in self._directory.glob(f"*{TEMPORARY}"))
        sealed = list(merged_runs.identities(known).values())
        names = merged_runs.names_present(self._directory)
        true = {name for name in names if merged_runs.is_true(name, known, sealed)}
        unsealed = [number for number, row in known.items() if not row.sealed]
        end = min(unsealed, default=max(known, default=0) + 1)
        plan = levels.plan(
            [each.number for each in sealed if each.number < end],
            end,
            {(name.first, name.last) for name in true},
        )
        for merge in plan.merges:
            first, last = merge.result
            name = MergedName.of(each for each in sealed if first <= each.number <= last)
            if name in self._failed or not self._has_room(merge, known):
                continue
            by_range = {(one.first, one.last): one for one in true}
            self._merge(name, merge, by_range, known, pause)
            return True
        for name in sorted(true):
            if (name.first, name.last) in plan.keep and name not in self._proven:
                self._prove(name, pause)
                return True
        unneeded = [n for n in names if n not in true or (n.first, n.last) not in plan.keep]
        self._remove(self._directory / str(name) for name in unneeded)
        return False

    def _remove(self, paths: Iterator[Path]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()

    def _has_room(self, merge: Merge, known: Mapping[int, Known]) -> bool:
        first, last = merge.result
        # A segment's own runs are never more than a part of it.
        most = sum(row.bytes for number, row in known.items() if first <= number <= last)
        place = os.statvfs(self._segments)
        return place.f_bavail * place.f_frsize >= FREE_BYTES_MIN + most // 16

    def _merge(
        self,
        name: MergedName,
        merge: Merge,
        present: Mapping[tuple[int, int], MergedName],
        known: Mapping[int, Known],
        pause: Pause,
    ) -> None:
        path = self._directory / str(name)
        temporary = path.with_suffix(TEMPORARY)
        files = ReadFiles()
        try:
            make_directory(self._directory)
            inputs = [self._input(one, present, known, files) for one in merge.inputs]
            write_merged(temporary, name, self._group, inputs, pause)
            os.replace(temporary, path)
            sync_directory(self._directory)
            self._proven.add(name)
        except MergedRunError as error:
            log.warning("%s; it is made again", error)
            self._remove(iter([self._directory / str(error.name)]))
        except DamageError as error:
            log.warning("segments %d to %d keep their own index: %s", name.first, name.last, error)
            self._failed.add(name)
        except OSError as error:
            raise failure(error, f"cannot write {path}") from error
        finally:
            files.close()
            self._remove(iter([temporary]))

    def _prove(self, name: MergedName, pause: Pause) -> None:
        """Read a run whole; one that is damaged goes, to be made again."""
        files = ReadFiles()
        try:
            file = MergedFile(self._directory, name, self._group, files, directory_cache())
            for disk in file.entries():
                run = file.run(disk)
                for is_long in (False, True):
                    begin = time.monotonic()
                    for _piece in run.stream(is_long=is_long) if run is not None else ():
                        pause(time.monotonic() - begin)
                        begin = time.monotonic()
            self._proven.add(name)
        except MergedRunError as error:
            log.warning("%s; it is made again", error)
            self._remove(iter([self._directory / str(name)]))
        finally:
            files.close()

    def _input(
        self,
        numbers: levels.Range,
        present: Mapping[levels.Range, MergedName],
        known: Mapping[int, Known],
        files: ReadFiles,
    ) -> Mapping[bytes, Sequence[Streamed]]:
        """The runs of an input, by disk. DamageError, StorageError, MergedRunError."""
        first, last = numbers
        directories = directory_cache()
        if first == last:
            generation = known[first].generation
            path = self._segments / file_name(first, generation)
            segment = SegmentReader(path, first, self._group, files, directories, generation)
            segment.refresh(known[first])
            for damage in segment.damage:
                raise damage.error
            return {disk: list(segment.runs(disk)) for disk in segment.disks()}
        file = MergedFile(self._directory, present[numbers], self._group, files, directories)
        runs = {disk: file.run(disk) for disk in file.entries()}
        return {disk: [run] for disk, run in runs.items() if run is not None}


@dataclass(slots=True)
class Account:
    """How many entries, and a sum over them that tells one set from another, in any order."""

    count: int = 0
    sum: int = 0

    def add(self, run: Run) -> None:
        self.count += len(run)
        mixed = np.zeros(len(run), np.uint64)
        for column in COLUMNS:
            mixed ^= getattr(run, column)
            mixed *= _MULTIPLIER
            mixed ^= mixed >> np.uint64(29)
        # Modulo 2 ** 64, as numpy adds and multiplies.
        self.sum = (self.sum + int(mixed.sum(dtype=np.uint64))) % (1 << 64)

    def join(self, other: Account) -> None:
        self.count += other.count
        self.sum = (self.sum + other.sum) % (1 << 64)


def write_merged(
    path: Path,
    name: MergedName,
    group: bytes,
    inputs: Sequence[Mapping[bytes, Sequence[Streamed]]],
    pause: Pause,
) -> None:
    """Write and sync a merged run of inputs (runs by disk; oldest first).

    OSError; DamageError when what comes out is not what went in.
    """
    with open(path, "xb", opener=private) as file:
        header = merged_run.encode_header(group)
        file.write(header)
        offset = len(header)
        entries = []
        for disk in sorted({disk for runs in inputs for disk in runs}):
            streams = [run for runs in inputs for run in runs.get(disk, ())]
            entry, offset = _write_disk(file, offset, disk, streams, pause)
            entries.append(entry)
        contents = MergedContents(
            name=str(name),
            first_stamp=min((entry.first_stamp for entry in entries), default=0),
            last_stamp=max((entry.last_stamp for entry in entries), default=0),
            runs=entries,
        )
        file.write(merged_run.encode_end(contents, offset))
        file.flush()
        os.fdatasync(file.fileno())


def _write_disk(
    file: BinaryIO, offset: int, disk: bytes, runs: Sequence[Streamed], pause: Pause
) -> tuple[RunEntry, int]:
    """One disk's chunks and directory; the offset behind them."""
    encoder = RunEncoder(offset)
    went_in, came_out = Account(), Account()
    for is_long in (False, True):
        begin = time.monotonic()
        newest_start = np.uint64(0)
        for piece in _in_order([run.stream(is_long=is_long) for run in runs], went_in):
            came_out.add(piece)
            starts = np.append(newest_start, piece.starts)
            if bool((starts[1:] < starts[:-1]).any()):
                raise DamageError("their entries do not come in order")
            newest_start = starts[-1]
            file.write(encoder.add(piece, is_long=is_long))
            pause(time.monotonic() - begin)
            begin = time.monotonic()
    file.write(encoder.flush())
    table = encoder.directory()
    if went_in != came_out or int(table["count"].sum()) != went_in.count:
        raise DamageError("their merged index would not be complete")
    directory = table.tobytes()
    file.write(directory)
    entry = RunEntry(
        disk=UUID(bytes=disk),
        directory_offset=encoder.end,
        chunks=len(table),
        long_chunks=encoder.long_chunks,
        count=went_in.count,
        first_stamp=int(table["first_stamp"].min()),
        last_stamp=int(table["last_stamp"].max()),
        digest=xxhash.xxh3_64_intdigest(directory),
    )
    return entry, encoder.end + len(directory)


def _in_order(streams: Sequence[Iterator[Run]], account: Account) -> Iterator[Run]:
    """Entries of streams that are each sorted by start, sorted by start.

    Of one start, in any order: a lookup orders what it finds by stamp.
    """
    heads: list[Run | None] = [None] * len(streams)

    def fill() -> None:
        for number, head in enumerate(heads):
            while head is None or not len(head):
                head = next(streams[number], None)
                if head is None:
                    break
                account.add(head)
            heads[number] = head

    fill()
    while live := [head for head in heads if head is not None]:
        # Up to here every stream has handed out all it has.
        bound = min(head.starts[-1] for head in live)
        parts = []
        for number, head in enumerate(heads):
            if head is not None:
                count = int(np.searchsorted(head.starts, bound, side="right"))
                parts.append(head.take(slice(0, count)))
                heads[number] = head.take(slice(count, None))
        yield concatenate(parts).by_start()
        fill()
