"""The index: what a range of a disk showed at an instant, from all segments, replaying none.

Algorithm of ``resolve``, for one window of a disk:

1. Take the runs of all segments that have a record of the disk up to the instant, newest first.
2. Gather their entries that overlap the window. Every CHUNK_ENTRIES, keep only what still shows:
   an entry that is wholly covered by newer ones can never show again.
3. Stop as soon as nothing of the base shows and all that shows is newer than the runs left.

Entries of one instant are ordered by (stamp, segment, frame, position). The cost of a window is
bounded by what it shows plus a binary search per run, whatever the journal's length; memory by
CHUNK_ENTRIES plus what shows.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blockrepl.errors import DamageError
from blockrepl.formats.frame import U8, U32, U64, RecordKind
from blockrepl.formats.run import Run, concatenate
from blockrepl.formats.segment import file_name
from blockrepl.model import extents
from blockrepl.storage.reading import ReadFiles
from blockrepl.storage.runs import RunSource
from blockrepl.storage.segment_reader import Damage, Known, SegmentReader

log = logging.getLogger(__name__)

CHUNK_ENTRIES = 128 * 1024  # gathered before what no longer shows is dropped: about 10 MB
SHOWS_BASE = 255  # kind of an extent that no record covers
SHOWS_ZERO = int(RecordKind.ZERO)
SHOWS_DATA = int(RecordKind.WRITE)
_SEGMENT_NAME = re.compile(r"(\d{12})\.seg")


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


@dataclass(frozen=True, slots=True)
class _Entries:
    """Entries of several segments."""

    run: Run
    segments: U32

    def oldest_first(self) -> _Entries:
        run = self.run
        order = np.argsort(run.stamps)
        stamps = run.stamps[order]
        if bool((stamps[1:] == stamps[:-1]).any()):
            # Only a resync's records share a stamp; four keys take four times as long.
            order = np.lexsort((run.positions, run.frames, self.segments, run.stamps))
        return _Entries(run.take(order), self.segments[order])


class JournalIndex:
    """All segments of a replica. ``refresh`` sees what is new; lookups run in any thread."""

    def __init__(self, directory: Path, group: bytes, files: ReadFiles) -> None:
        self._directory = directory
        self._group = group
        self._files = files
        self._lock = threading.Lock()
        self._segments: dict[int, SegmentReader] = {}
        self._lost: tuple[Damage, ...] = ()
        self._told: set[str] = set()

    def refresh(self, known: Mapping[int, Known], durable: tuple[int, int] | None = None) -> None:
        """Take up new segments and new frames. StorageError.

        ``known`` is what the catalog says of each segment; ``durable`` the number and the durable
        bytes of the newest: nothing beyond it is looked at.
        """
        with self._lock:
            segments = dict(self._segments)
            present = self._files_present()
            lost = [
                Damage(None, known[number].first_stamp, self._missing(number))
                for number in known.keys() - present.keys()
                if known[number].frames
            ]
            for number, path in sorted(present.items()):
                if durable is not None and number > durable[0]:
                    continue
                said, limit = known.get(number, Known()), None
                if durable is not None and number == durable[0]:
                    said, limit = Known(durable[1], 0, said.first_stamp), durable[1]
                segment = segments.get(number)
                if segment is None:
                    segment = SegmentReader(path, number, self._group, self._files)
                try:
                    segment.refresh(said, limit=limit)
                    segments[number] = segment
                except DamageError as error:
                    if number in known:
                        lost.append(Damage(None, said.first_stamp, error))
                    # else: a file that was just begun when the power went; recovery removes it
            self._segments = segments
            self._tell([*lost, *(d for segment in segments.values() for d in segment.damage)])
            self._lost = tuple(lost)

    def _missing(self, number: int) -> DamageError:
        path = self._directory / file_name(number)
        return DamageError(
            f"segment {path.name} is missing ({path})",
            hint="points before its records stay readable; restore it from a copy of the replica",
        )

    def _tell(self, damage: list[Damage]) -> None:
        """Log each damage once."""
        for text in {str(each.error): None for each in damage}:
            if text not in self._told:
                self._told.add(text)
                log.error("%s", text)

    def _files_present(self) -> dict[int, Path]:
        try:
            paths = list(self._directory.iterdir())
        except FileNotFoundError:
            return {}
        matches = ((_SEGMENT_NAME.fullmatch(path.name), path) for path in paths)
        return {int(match[1]): path for match, path in matches if match}

    def segments(self) -> list[SegmentReader]:
        """By number."""
        return [segment for _number, segment in sorted(self._segments.items())]

    def segment(self, number: int) -> SegmentReader:
        return self._segments[number]

    def estimate(self, disk: bytes, first: int, last: int, at_ns: int) -> int:
        """About how many entries a window has."""
        return sum(run.estimate(first, last) for _, run in self._runs(disk, at_ns))

    def bytes_of(self, disk: bytes, at_ns: int) -> int:
        """At most how many bytes of journal hold records of a disk, for an estimate of its use."""
        numbers = {number for number, _ in self._runs(disk, at_ns)}
        return sum(self._segments[number].end for number in numbers)

    def newest_stamp(self, disk: bytes) -> int:
        """Of a disk's records; 0 without any."""
        runs = (run for segment in self._segments.values() for run in segment.runs(disk))
        return max((run.last_stamp for run in runs), default=0)

    def resolve(self, disk: bytes, first: int, last: int, at_ns: int) -> Shown:
        """What [first, last) of a disk shows at an instant. DamageError, StorageError."""
        left = self._runs(disk, at_ns)
        parts: list[_Entries] = []
        gathered = 0
        while left:
            number, run = left.pop()
            for found in run.overlapping(first, last, at_ns):
                parts.append(_Entries(found, np.full(len(found), number, np.uint32)))
                gathered += len(found)
            if gathered >= CHUNK_ENTRIES and left:
                entries, flat = _shown(parts, first, last)
                showing = np.unique(flat.winners[flat.winners != extents.BASE])
                kept = _Entries(entries.run.take(showing), entries.segments[showing])
                covered = not bool((flat.winners == extents.BASE).any())
                if covered and int(kept.run.stamps.min()) > left[-1][1].last_stamp:
                    left = []
                parts, gathered = [kept], 0
        return _flatten(*_shown(parts, first, last))

    def refuse_damage(self, disk: bytes, at_ns: int) -> None:
        """DamageError when records of a disk up to an instant cannot all be found."""
        _refuse(self._lost, disk, at_ns)
        for segment in self._segments.values():
            _refuse(segment.damage, disk, at_ns)

    def _runs(self, disk: bytes, at_ns: int) -> list[tuple[int, RunSource]]:
        """The runs of a disk with records up to an instant, and their segments; newest last."""
        found: list[tuple[int, RunSource]] = []
        _refuse(self._lost, disk, at_ns)
        for number, segment in self._segments.items():
            _refuse(segment.damage, disk, at_ns)
            found += [(number, run) for run in segment.runs(disk) if run.first_stamp <= at_ns]
        found.sort(key=lambda pair: (pair[1].last_stamp, pair[0]))
        return found


def _refuse(damage: tuple[Damage, ...], disk: bytes, at_ns: int) -> None:
    """What cannot be found must not be passed over: an older record would show in its place."""
    for each in damage:
        if each.disk in (None, disk) and each.first_stamp <= at_ns:
            raise DamageError(str(each.error), hint=each.error.hint)


def _shown(parts: list[_Entries], first: int, last: int) -> tuple[_Entries, extents.Extents]:
    entries = _Entries(
        concatenate([part.run for part in parts]),
        np.concatenate([part.segments for part in parts] or [np.zeros(0, np.uint32)]),
    ).oldest_first()
    run = entries.run
    return entries, extents.resolve(run.starts, run.starts + run.lengths, first, last)


def _flatten(entries: _Entries, flat: extents.Extents) -> Shown:
    """Entries' places instead of their numbers; neighbours that read as one become one."""
    run = entries.run
    count = len(flat)
    kinds = np.full(count, SHOWS_BASE, np.uint8)
    segments, frames, positions = (np.zeros(count, np.uint32) for _ in range(3))
    recorded = flat.winners != extents.BASE
    winners = flat.winners[recorded]
    kinds[recorded] = np.where(run.kinds[winners] == SHOWS_DATA, SHOWS_DATA, SHOWS_ZERO)
    data = kinds == SHOWS_DATA
    winners = flat.winners[data]
    segments[data] = entries.segments[winners]
    frames[data] = run.frames[winners]
    into = flat.starts[data] - run.starts[winners]
    positions[data] = run.positions[winners] + into.astype(np.uint32)
    heads = _heads(flat, kinds, segments, frames, positions)
    tails = np.append(heads[1:], count) - 1
    return Shown(
        flat.starts[heads],
        flat.ends[tails],
        kinds[heads],
        segments[heads],
        frames[heads],
        positions[heads],
    )


def _heads(
    flat: extents.Extents, kinds: U8, segments: U32, frames: U32, positions: U32
) -> npt.NDArray[np.intp]:
    """The extents that do not merely go on where the one before them ends."""
    sizes = (flat.ends - flat.starts).astype(np.uint32)
    goes_on = kinds[1:] == kinds[:-1]
    data = kinds[1:] == SHOWS_DATA
    contiguous = (
        (segments[1:] == segments[:-1])
        & (frames[1:] == frames[:-1])
        & (positions[1:] == positions[:-1] + sizes[:-1])
    )
    goes_on &= ~data | contiguous
    return np.flatnonzero(np.concatenate(([True], ~goes_on)))
