"""The statistics of segments, and what they say of a stretch of a group's history.

``statistics/<segment>.stats`` in a replica's directory (formats/statistics.py): made from the
headers and columns of a sealed segment's frames, in the background of the receiver or else when
they are first asked for, and then kept, so that ten thousand segments are looked through in
seconds. They may be deleted at any time; those of segments that are no more go with the next look.
What cannot be kept is made again.

No payload is read. Of a frame that lies in several intervals the columns are, too: there is about
one per disk and edge. Damage is told beside the sums, and what it does not concern is counted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockrepl.errors import DamageError, PeerError
from blockrepl.formats import statistics as forms
from blockrepl.formats.frame import U64, Columns, parse_columns
from blockrepl.formats.segment import file_name
from blockrepl.formats.statistics import Statistics
from blockrepl.model.timeline import Bins, edges, summarise
from blockrepl.storage.catalog import SegmentRow
from blockrepl.storage.files import failure, private
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.journal import DIRECTORY_NAME as SEGMENTS_NAME
from blockrepl.storage.reading import GoneError, ReadFiles, looking
from blockrepl.storage.runs import directory_cache
from blockrepl.storage.segment_reader import Known, SegmentReader

DIRECTORY_NAME = "statistics"
SUFFIX = ".stats"
TEMPORARY_SECONDS = 3600.0  # a file that was not put in its place by then never will be
Pace = Callable[[int], None]  # called with the bytes of the segments whose frames were read


@dataclass(frozen=True, slots=True)
class Damaged:
    """Records of the stretch cannot all be counted."""

    from_ns: int
    to_ns: int
    why: str


@dataclass(slots=True)
class Activity:
    bins: Bins
    damaged: list[Damaged] = field(default_factory=list)


def activity(
    history: ReplicaHistory,
    disks: list[bytes],
    after_ns: int,
    upto_ns: int,
    count: int,
    pace: Pace = lambda _size_bytes: None,
) -> Activity:
    """What happened to the disks in each of ``count`` intervals. StorageError."""
    # All of it again: else some would be missed of segments written anew, others counted twice.
    return looking(lambda: _activity(history, disks, edges(after_ns, upto_ns, count), pace))


def _activity(history: ReplicaHistory, disks: list[bytes], at: U64, pace: Pace) -> Activity:
    state = history.state()
    history.refresh(state)
    found = Activity(Bins(at, disks))
    after_ns, upto_ns = int(at[0]), int(at[-1])
    there = {segment.number: segment for segment in history.index.segments()}
    for number in sorted(there.keys() | state.segments.keys()):
        row = state.segments.get(number)
        is_sealed = row is not None and row.sealed
        if row is not None and is_sealed and not _overlaps(row, after_ns, upto_ns):
            continue
        first, last = (row.first_stamp, row.last_stamp) if row and is_sealed else (0, upto_ns)
        begin, end = max(first, after_ns), min(last, upto_ns)
        segment = there.get(number)
        if segment is None:
            if row is not None and row.frames:
                why = f"segment {file_name(number, row.generation)} is missing or cannot be read"
                found.damaged.append(Damaged(begin, end, why))
            continue
        try:
            for damage in segment.damage:
                found.damaged.append(
                    Damaged(max(damage.first_stamp, begin), end, str(damage.error))
                )
            statistics, errors = _statistics(history, segment, row if is_sealed else None, pace)
            found.damaged += [Damaged(begin, end, str(error)) for error in errors]
            for place in found.bins.add(statistics):
                _add_records(found, segment, statistics, place)
        except GoneError:
            raise
        except DamageError as error:
            found.damaged.append(Damaged(begin, end, str(error)))
    _drop_others(history.directory / DIRECTORY_NAME, state.segments.values())
    return found


def _overlaps(row: SegmentRow, after_ns: int, upto_ns: int) -> bool:
    return row.last_stamp > after_ns and row.first_stamp <= upto_ns


def _add_records(found: Activity, segment: SegmentReader, of: Statistics, place: int) -> None:
    row = of.frames[place]
    columns = segment.columns(int(row["ordinal"]))
    disk = of.disks[int(row["disk"])]
    found.bins.add_records(int(row["kind"]), disk, columns, int(row["stored_bytes"]))


def _statistics(
    history: ReplicaHistory, segment: SegmentReader, sealed: SegmentRow | None, pace: Pace
) -> tuple[Statistics, list[DamageError]]:
    """A segment's statistics, the kept ones or new ones; and what of it is damaged."""
    if sealed is None:
        return _made(segment)
    directory = history.directory / DIRECTORY_NAME
    path = directory / (file_name(sealed.number, sealed.generation) + SUFFIX)
    with contextlib.suppress(OSError, PeerError):
        return forms.decode(path.read_bytes(), sealed.created_ns, sealed.bytes), []
    made, errors = _made(segment)
    if not errors and not segment.damage:
        with contextlib.suppress(OSError):  # no room, or not ours to write: made again
            _keep(path, forms.encode(made, sealed.created_ns, sealed.bytes))
    pace(sealed.bytes)
    return made, errors


class StatisticsMaker:
    """Makes what is missing of one replica's, before it is asked for. Used by one thread."""

    def __init__(self, directory: Path, group: bytes) -> None:
        """``directory``: the replica's."""
        self._directory = directory
        self._group = group
        self._damaged: set[str] = set()

    def make(self, rows: Sequence[SegmentRow], pause: Callable[[float], None]) -> None:
        """``rows``: all segments. After each one ``pause`` is called with the seconds it took.

        StorageError when they cannot be kept.
        """
        _drop_others(self._directory / DIRECTORY_NAME, rows)
        for row in rows:
            name = file_name(row.number, row.generation)
            path = self._directory / DIRECTORY_NAME / (name + SUFFIX)
            if row.sealed and name not in self._damaged and not path.exists():
                began = time.monotonic()
                self._make(row, name, path)
                pause(time.monotonic() - began)

    def _make(self, row: SegmentRow, name: str, path: Path) -> None:
        files = ReadFiles()
        place = self._directory / SEGMENTS_NAME / name
        cache = directory_cache()
        segment = SegmentReader(place, row.number, self._group, files, cache, row.generation)
        try:
            segment.refresh(Known.of(row))
            made, errors = _made(segment)
            if errors or segment.damage:
                self._damaged.add(name)
                return
            _keep(path, forms.encode(made, row.created_ns, row.bytes))
        except GoneError:
            pass  # retention has put another in its place
        except DamageError:
            self._damaged.add(name)
        except OSError as error:
            raise failure(error, f"cannot write {path}") from error
        finally:
            files.close()


def _made(segment: SegmentReader) -> tuple[Statistics, list[DamageError]]:
    errors: list[DamageError] = []
    ordinals: list[int] = []
    kinds: list[int] = []
    disks: list[bytes] = []
    stored: list[int] = []
    parts: list[Columns] = []
    for ordinal in range(segment.frame_count()):
        try:
            header, _start, body = segment.body_start(ordinal)
        except GoneError:
            raise
        except DamageError as error:
            errors.append(error)
            continue
        if header.record_count:
            ordinals.append(ordinal)
            kinds.append(header.kind)
            disks.append(header.disk)
            stored.append(header.body_bytes - header.blocks_offset)
            parts.append(parse_columns(header, body))
    return summarise(ordinals, kinds, disks, stored, parts), errors


def _keep(path: Path, data: bytes) -> None:
    """Put the file in its place whole. Not synced: its digest says whether it is true."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb", opener=private) as file:
            file.write(data)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _drop_others(directory: Path, rows: Iterable[SegmentRow]) -> None:
    """Remove the statistics of segments that are no more, and what a crash has left."""
    wanted = {file_name(row.number, row.generation) + SUFFIX for row in rows}
    with contextlib.suppress(OSError):
        for name in set(os.listdir(directory)) - wanted:
            path = directory / name
            is_old = time.time() - path.stat().st_mtime > TEMPORARY_SECONDS
            if path.suffix == SUFFIX or is_old:
                path.unlink()
