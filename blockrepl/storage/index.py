"""The index: what a range of a disk showed at an instant, from all segments, replaying none.

Algorithm of ``resolve``, for one window of a disk:

1. Take the runs that have a record of the disk up to the instant, newest first: merged runs, and
   the own runs of the segments that no merged run stands in for (storage/merged_runs.py).
2. Gather their entries that overlap the window. Every CHUNK_ENTRIES, keep only what still shows:
   an entry that is wholly covered by newer ones can never show again.
3. Stop as soon as nothing of the base shows and all that shows is newer than the runs left.

Entries of one instant are ordered by (stamp, segment, frame, position). A segment that retention
has written anew is another *place* (formats/segment.py) with the same number: what was resolved
before finds the old place or nothing, never the new one. The index never goes back: what one
thread has read of the catalog may reach ``refresh`` after what another has read later.

The cost of a window is bounded by what it shows plus a lookup per run, of which there are
logarithmically many; memory by CHUNK_ENTRIES plus what shows.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from blockrepl.errors import DamageError
from blockrepl.formats.frame import U8, U32, U64, RecordKind
from blockrepl.formats.merged_run import MergedName
from blockrepl.formats.run import Run, concatenate
from blockrepl.formats.segment import NUMBER_MASK, file_name, place
from blockrepl.model import extents
from blockrepl.model._sweep import places
from blockrepl.storage import merged_runs
from blockrepl.storage.journal import DIRECTORY_NAME as SEGMENTS_NAME
from blockrepl.storage.merged_runs import MergedFile, MergedRunError
from blockrepl.storage.reading import GoneError, ReadFiles
from blockrepl.storage.runs import directory_cache
from blockrepl.storage.segment_reader import Damage, Known, SegmentReader

log = logging.getLogger(__name__)

CHUNK_ENTRIES = 128 * 1024  # gathered before what no longer shows is dropped: about 10 MB
SHOWS_BASE = 255  # kind of an extent that no record covers
SHOWS_ZERO = int(RecordKind.ZERO)
SHOWS_DATA = int(RecordKind.WRITE)
assert (SHOWS_DATA, SHOWS_ZERO, SHOWS_BASE) == (0, 1, 255)  # as _sweep.places says
WALK_FRAMES_MAX = 64 * 1024  # headers read for a source's watermark: at most a second or so
STAMP_MAX = (1 << 64) - 1
Result = TypeVar("Result")
_SEGMENT_NAME = re.compile(r"(\d{12})\.seg")


class LookupRun(Protocol):
    """What a lookup asks of a run."""

    @property
    def first_stamp(self) -> int: ...

    @property
    def last_stamp(self) -> int: ...

    def estimate(self, first: int, last: int) -> int: ...

    def overlapping(self, first: int, last: int, at_ns: int) -> list[Run]: ...


@dataclass(frozen=True, slots=True)
class _Sources:
    """What lookups use: merged runs, and the segments that none of them stands in for, by number.

    Never changed, so that a lookup beside a `refresh` sees all of before it or all of after it.
    """

    merged: tuple[MergedFile, ...] = ()
    segments: Mapping[int, SegmentReader] = field(default_factory=dict)
    known: Mapping[int, Known] = field(default_factory=dict)
    lost: Mapping[int, Damage] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shown:
    """A window as flat, ascending extents without holes. ``kinds`` is one of SHOWS_*.

    Data of an extent begins at byte ``positions`` of the payload of frame ``frames`` (ordinal) of
    segment ``segments``.
    """

    starts: U64
    ends: U64
    kinds: U8
    segments: U32
    frames: U32
    positions: U32

    def __len__(self) -> int:
        return len(self.starts)


class JournalIndex:
    """All segments of a replica. ``refresh`` sees what is new; lookups run in any thread."""

    def __init__(
        self,
        directory: Path,
        group: bytes,
        files: ReadFiles,
        sources: Callable[[], Mapping[bytes, int]],
    ) -> None:
        """``directory``: the replica's. ``sources``: who has disks in views, and up to which
        instant in none.
        """
        self._directory = directory / SEGMENTS_NAME
        self._merged_directory = directory / merged_runs.DIRECTORY_NAME
        self._group = group
        self._files = files
        self._sources_shown = sources
        self._directories = directory_cache()
        self._lock = threading.RLock()
        self._segments: dict[int, SegmentReader] = {}  # by number
        self._taken_up: dict[int, SegmentReader] = {}  # the same, or as far as a refresh has come
        self._places: dict[int, SegmentReader] = {}
        self._known: dict[int, Known] = {}
        self._lost: dict[int, Damage] = {}
        self._leftovers: Set[str] = frozenset()
        self._reading = 0  # of the catalog, that ``_known`` and ``_leftovers`` are of
        self._position = (0, 0)  # number and bytes of the newest segment, durable as far as seen
        self._given_up: set[MergedName] = set()
        self._merged_files: dict[MergedName, MergedFile] = {}
        self._sources = _Sources()
        self._told: set[str] = set()

    def refresh(
        self,
        known: Mapping[int, Known],
        durable: tuple[int, int] | None = None,
        leftovers: Set[str] = frozenset(),
        reading: int | None = None,
    ) -> bool:
        """Take up new segments and new frames. StorageError.

        False: not all that is known is there, or it is older than what is in use; then the latter
        stays, and the catalog is to be read again.

        ``known`` is what the catalog says of each segment; ``durable`` the number and the durable
        bytes of the newest: nothing beyond it is looked at, but what is sealed is durable.
        ``leftovers`` are names of files that are no part of the history any more. ``reading``
        numbers the readings of the catalog, later ones higher; None: later than all before.
        """
        with self._lock:
            is_newest = reading is None or reading >= self._reading
            if not is_newest:
                known, leftovers = self._known, self._leftovers
            elif reading is not None:
                self._reading = reading
            if durable is not None:
                # Whichever was read later, both were written, and a journal only grows.
                durable = max(durable, self._position)
                self._position = durable
            self._taken_up = segments = {}
            present = self._files_present(known, leftovers)
            lost = {
                number: Damage(None, known[number].first_stamp, self._missing(number))
                for number in known.keys() - present.keys()
                if known[number].frames
            }
            is_whole = not lost
            for number, path in sorted(present.items()):
                said, limit = known.get(number, Known()), None
                known_bytes = said.bytes
                if durable is not None and not said.sealed:
                    if number > durable[0]:
                        continue
                    if number == durable[0]:
                        said, limit = Known(durable[1], 0, said.first_stamp), durable[1]
                segment = self._places.get(place(number, said.generation))
                if segment is None:
                    segment = self._reader(path, number, said.generation)
                try:
                    if not said.sealed and (limit or self._files.size(path)) > known_bytes:
                        said = replace(said, first_stamp=0)  # what came later may be older
                    segment.refresh(said, limit=limit)
                    segments[number] = segment
                except DamageError as error:
                    is_whole = is_whole and not isinstance(error, GoneError)
                    if number in known:
                        before = self._watermarks_before(number, frozenset()).values()
                        oldest = max(said.first_stamp, min((at + 1 for at in before), default=0))
                        lost[number] = Damage(None, oldest, error)
                    # else: a file that was just begun when the power went; recovery removes it
            self._segments = segments
            self._places = {segment.place: segment for segment in segments.values()}
            self._known = dict(known)
            self._leftovers = leftovers
            self._lost = lost
            if durable is None and segments:
                # All there is has been looked at: a record of before must not hide it again.
                newest = max(segments)
                self._position = max(self._position, (newest, segments[newest].end))
            self._tell(lost.values())
            self._choose()
            return is_whole and is_newest

    def __contains__(self, number: object) -> bool:
        """Whether a segment is one of those that lookups know, be it lost."""
        return number in self._segments or number in self._lost

    def _reader(self, path: Path, number: int, generation: int) -> SegmentReader:
        return SegmentReader(
            path,
            number,
            self._group,
            self._files,
            self._directories,
            generation,
            partial(self._watermarks_before, number),
        )

    def _watermarks_before(self, number: int, seen: Set[bytes]) -> dict[bytes, int]:
        """Up to where views lack nothing, before a segment, of each source but the ``seen``."""
        found = {source: at for source, at in self._sources_shown().items() if source not in seen}
        missing, left = set(found), WALK_FRAMES_MAX
        taken_up = self._taken_up  # another thread may begin anew
        for each in sorted(taken_up, reverse=True):
            segment = taken_up[each]
            if each >= number:
                continue
            with suppress(DamageError):
                for ordinal in range(segment.frame_count() - 1, -1, -1):
                    if not missing or not left:
                        return found
                    left -= 1
                    header = segment.header(ordinal)
                    if header.source in missing:
                        found[header.source] = max(header.watermark, found[header.source])
                        missing.discard(header.source)
        return found

    def _choose(self) -> None:
        """Decide which runs lookups use: merged ones, else the segments' own."""
        present = set(merged_runs.names_present(self._merged_directory)) - self._given_up
        names = merged_runs.chosen(present, self._known)
        self._merged_files = {
            name: self._merged_files.get(name)
            or MergedFile(self._merged_directory, name, self._group, self._files, self._directories)
            for name in names
        }
        covered = {
            number for name in names for number in self._known if name.first <= number <= name.last
        }
        self._sources = _Sources(
            tuple(self._merged_files.values()),
            {number: one for number, one in self._segments.items() if number not in covered},
            self._known,
            {number: one for number, one in self._lost.items() if number not in covered},
        )

    def _give_up(self, error: MergedRunError) -> None:
        log.warning("%s; smaller runs are read instead", error)
        with self._lock:
            self._given_up.add(error.name)
            self._choose()

    def _missing(self, number: int) -> DamageError:
        generation = self._known[number].generation if number in self._known else 0
        path = self._directory / file_name(number, generation)
        return DamageError(
            f"segment {path.name} is missing ({path})",
            hint="points before its records stay readable; restore it from a copy of the replica",
        )

    def _tell(self, damage: Iterable[Damage]) -> None:
        """Log each damage once."""
        for text in {str(each.error): None for each in damage}:
            if text not in self._told:
                self._told.add(text)
                log.error("%s", text)

    def _files_present(self, known: Mapping[int, Known], leftovers: Set[str]) -> dict[int, Path]:
        """The file of each segment: the one that is known, else the first generation's."""
        try:
            names = set(os.listdir(self._directory)) - leftovers
        except FileNotFoundError:
            return {}
        matches = (_SEGMENT_NAME.fullmatch(name) for name in names)
        present = {int(match[1]): match[0] for match in matches if match}
        for number, said in known.items():
            name = file_name(number, said.generation)
            if name in names:
                present[number] = name
            elif said.generation:
                present.pop(number, None)
        return {number: self._directory / name for number, name in present.items()}

    @property
    def directory_bytes(self) -> int:
        """What the directories of runs take that are kept."""
        return self._directories.held

    def segments(self) -> list[SegmentReader]:
        """By number."""
        return [segment for _number, segment in sorted(self._segments.items())]

    def segment(self, at: int) -> SegmentReader:
        """The segment at a place. GoneError when it is missing, or has been written anew."""
        try:
            return self._places[at]
        except KeyError:
            error = self._missing(at & NUMBER_MASK)
            raise GoneError(str(error), hint=error.hint) from None

    def spans(self, number: int) -> dict[bytes, tuple[int, int]]:
        """The oldest and the newest stamp of each disk's records in a segment. DamageError."""
        if number in self._lost:
            raise self._lost[number].error
        segment = self._segments[number]
        for damage in segment.damage:
            raise damage.error
        return segment.spans()

    def merged(self) -> list[MergedName]:
        """The merged runs in use, by the segments they stand in for."""
        return [file.name for file in self._sources.merged]

    def estimate(self, disk: bytes, first: int, last: int, at_ns: int) -> int:
        """About how many entries a window has."""
        return self._try(lambda: sum(run.estimate(first, last) for run in self._runs(disk, at_ns)))

    def bytes_until(self, at_ns: int) -> int:
        """At most how many bytes of journal a disk's records up to an instant take."""
        return sum(row.bytes for row in self._known.values() if row.first_stamp <= at_ns)

    def newest_stamp(self, disk: bytes) -> int:
        """Of a disk's records; 0 without any."""
        return self._try(
            lambda: max((run.last_stamp for run in self._runs(disk, STAMP_MAX)), default=0)
        )

    def resolve(self, disk: bytes, first: int, last: int, at_ns: int) -> Shown:
        """What [first, last) of a disk shows at an instant. DamageError, StorageError."""
        return self._try(lambda: self._resolve(disk, first, last, at_ns))

    def _try(self, lookup: Callable[[], Result]) -> Result:
        """Look up, again without a merged run that turns out to be of no use."""
        while True:
            try:
                return lookup()
            except MergedRunError as error:
                self._give_up(error)

    def _resolve(self, disk: bytes, first: int, last: int, at_ns: int) -> Shown:
        left = self._runs(disk, at_ns)
        parts: list[Run] = []
        gathered = 0
        while left:
            for found in left.pop().overlapping(first, last, at_ns):
                parts.append(found)
                gathered += len(found)
            if gathered >= CHUNK_ENTRIES and left:
                run, flat = _shown(parts, first, last)
                kept = run.take(np.unique(flat.winners[flat.winners != extents.BASE]))
                covered = not bool((flat.winners == extents.BASE).any())
                if covered and int(kept.stamps.min()) > left[-1].last_stamp:
                    left = []
                parts, gathered = [kept], 0
        return _flatten(*_shown(parts, first, last))

    def refuse_damage(self, disk: bytes, at_ns: int) -> None:
        """DamageError when records of a disk up to an instant cannot all be found."""
        _refuse(tuple(self._lost.values()), disk, at_ns)
        for number, segment in self._segments.items():
            known = self._known.get(number)
            if known is None or not known.sealed or _may_show(known, at_ns):
                _refuse(segment.damage, disk, at_ns)

    def _runs(self, disk: bytes, at_ns: int) -> list[LookupRun]:
        """The runs of a disk with records up to an instant; newest last. MergedRunError."""
        found: list[LookupRun] = []
        sources = self._sources
        for file in sources.merged:
            run = file.run(disk)
            if run is not None:
                found.append(run)
        _refuse(tuple(sources.lost.values()), disk, at_ns)
        for number, segment in sources.segments.items():
            known = sources.known.get(number)
            if known is not None and known.sealed and not _may_show(known, at_ns):
                continue
            try:
                damage = segment.damage
            except GoneError:
                raise  # most often retention has replaced it
            except DamageError as error:
                self._tell([Damage(None, 0, error)])
                raise
            if damage:
                self._tell(damage)
                _refuse(damage, disk, at_ns)
            found += segment.runs(disk)
        found = [run for run in found if run.first_stamp <= at_ns]
        found.sort(key=lambda run: run.last_stamp)
        return found


def _may_show(known: Known, at_ns: int) -> bool:
    """Whether a sealed segment has records up to an instant."""
    return known.last_stamp > 0 and known.first_stamp <= at_ns


def _refuse(damage: tuple[Damage, ...], disk: bytes, at_ns: int) -> None:
    """What cannot be found must not be passed over: an older record would show in its place."""
    for each in damage:
        if each.disk in (None, disk) and each.first_stamp <= at_ns:
            raise DamageError(str(each.error), hint=each.error.hint)


def _shown(parts: list[Run], first: int, last: int) -> tuple[Run, extents.Extents]:
    run = concatenate(parts)
    return run, extents.resolve(run.starts, run.ends, first, last, run.ages)


def _flatten(run: Run, flat: extents.Extents) -> Shown:
    """Entries' places instead of their numbers; neighbours that read as one become one."""
    columns = (run.starts, run.kinds, run.segments, run.frames, run.positions)
    return Shown(*places(flat.starts, flat.ends, flat.winners, *columns))
