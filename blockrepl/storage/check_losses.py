"""From damaged places to what they cost: the interval of instants and the ranges, per disk.

A record's bytes show from its stamp until later records have covered all of them. So a loss ends
when the last of its bytes has been covered, by whatever was written there first after it; one that
is never covered wholly lasts until now.

Which records a frame had that cannot be read is known from the segment's index, else from a merged
run; without either, the whole disk is lost from the oldest stamp on that they may have, for views
refuse it (storage/index.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from blockrepl.errors import DamageError
from blockrepl.formats.frame import KIND_MASK, U64, RecordKind
from blockrepl.formats.run import Run, concatenate
from blockrepl.formats.segment import NUMBER_MASK, file_name
from blockrepl.model import extents, ranges
from blockrepl.storage import merged_runs
from blockrepl.storage.catalog import DiskRow, SegmentRow
from blockrepl.storage.check_findings import Finding, Lost, Pieces
from blockrepl.storage.journal import DIRECTORY_NAME
from blockrepl.storage.merged_runs import MergedFile, MergedRunError
from blockrepl.storage.reading import ReadFiles
from blockrepl.storage.runs import directory_cache
from blockrepl.storage.segment_reader import Known, SegmentReader

_Part = tuple[bytes, Pieces | None]  # a disk and what of it is lost; None: all


class Losses:
    """Tells the losses of one replica."""

    def __init__(
        self,
        directory: Path,
        group_id: bytes,
        rows: Sequence[SegmentRow],
        disks: Sequence[DiskRow],
    ) -> None:
        self._directory = directory
        self._group_id = group_id
        self._rows = rows
        self._disks = {disk.id: disk for disk in disks}
        self._files = ReadFiles()

    def tell(self, losses: Sequence[Lost]) -> dict[int, list[Finding]]:
        """By the id of each loss's finding: findings with interval and ranges, one per disk."""
        try:
            single = [(loss, disk, pieces) for loss in losses for disk, pieces in self._of(loss)]
            cover = self._covering([(disk, pieces) for _, disk, pieces in single])
            told: dict[int, list[Finding]] = {}
            for loss, disk, pieces in single:
                told.setdefault(id(loss.finding), []).append(self._told(loss, disk, pieces, cover))
            return told
        finally:
            self._files.close()

    # Which records

    def _of(self, loss: Lost) -> list[_Part]:
        pieces = self._from_merged(loss) if loss.pieces is None else loss.pieces
        if pieces is not None:
            return list(pieces.items())
        return [
            (disk.id, None)
            for disk in self._disks.values()
            if (disk.removed_ns is None or disk.removed_ns > loss.first_stamp)
            and loss.disk in (None, disk.id)
            and loss.source in (None, disk.source)
        ]

    def _from_merged(self, loss: Lost) -> dict[bytes, Pieces] | None:
        number = loss.place & NUMBER_MASK
        known = {row.number: Known.of(row) for row in self._rows}
        directory = self._directory / merged_runs.DIRECTORY_NAME
        first, last = loss.ordinals
        for name in merged_runs.chosen(merged_runs.names_present(directory), known):
            if not name.first <= number <= name.last:
                continue
            file = MergedFile(directory, name, self._group_id, self._files, directory_cache())
            found: dict[bytes, Pieces] = {}
            try:
                for disk in file.entries():
                    run = file.run(disk)
                    parts: list[Run] = []
                    for is_long in (False, True):
                        for part in run.stream(is_long=is_long) if run is not None else ():
                            which = part.segments == np.uint32(loss.place)
                            which &= (part.frames >= first) & (part.frames < last)
                            parts.append(part.take(which))
                    mine = concatenate(parts)
                    if len(mine):
                        found[disk] = Pieces.of(mine)
            except MergedRunError:
                continue
            return found
        return None

    # Until when

    def _covering(self, parts: Sequence[_Part]) -> dict[bytes, tuple[U64, U64, U64]]:
        """Per disk, in order of stamp, starts, ends and stamps of what may cover a loss."""
        wanted: dict[bytes, list[Pieces]] = {}
        for disk, pieces in parts:
            if pieces is not None and len(pieces):
                wanted.setdefault(disk, []).append(pieces)
        # What is lost covers what was there before, too.
        found = {
            disk: [(each.starts, each.ends, each.stamps) for each in pieces]
            for disk, pieces in wanted.items()
        }
        spans = {
            disk: (
                *ranges.union(
                    np.concatenate([each.starts for each in pieces]),
                    np.concatenate([each.ends for each in pieces]),
                ),
                min(int(each.stamps.min()) for each in pieces),
            )
            for disk, pieces in wanted.items()
        }
        for row in self._rows if spans else ():
            with suppress(DamageError):
                self._gather(row, spans, found)
        result = {}
        for disk, columns in found.items():
            starts, ends, stamps = (np.concatenate(column) for column in zip(*columns, strict=True))
            order = np.argsort(stamps, kind="stable")
            result[disk] = starts[order], ends[order], stamps[order]
        return result

    def _gather(
        self,
        row: SegmentRow,
        spans: Mapping[bytes, tuple[U64, U64, int]],
        found: dict[bytes, list[tuple[U64, U64, U64]]],
    ) -> None:
        if row.sealed and row.last_stamp < min(least for _, _, least in spans.values()):
            return
        path = self._directory / DIRECTORY_NAME / file_name(row.number, row.generation)
        reader = SegmentReader(
            path, row.number, self._group_id, self._files, directory_cache(), row.generation
        )
        reader.refresh(Known.of(row))
        for ordinal in range(reader.frame_count()):
            with suppress(DamageError):
                header = reader.header(ordinal)
                span = spans.get(header.disk)
                if span is None or not header.record_count or header.last_stamp <= span[2]:
                    continue
                columns = reader.columns(ordinal)
                starts, ends = columns.offsets, columns.offsets + columns.lengths
                place = np.searchsorted(span[1], starts, side="right")
                bounds = np.append(span[0], np.uint64((1 << 64) - 1))
                which = bounds[place] < ends
                which &= (columns.kinds & np.uint8(KIND_MASK)) != RecordKind.FLUSH
                found[header.disk].append((starts[which], ends[which], columns.stamps[which]))

    def _told(
        self,
        loss: Lost,
        disk_id: bytes,
        pieces: Pieces | None,
        cover: Mapping[bytes, tuple[U64, U64, U64]],
    ) -> Finding:
        finding = replace(loss.finding)
        disk = self._disks.get(disk_id)
        if disk is None:
            return finding  # retention has forgotten it
        finding.disk = disk.name
        floor = disk.ready_ns or 0
        if pieces is None:
            finding.from_ns = max(loss.first_stamp, floor)
            finding.ranges = [(0, disk.size_bytes)]
            return finding
        which = pieces.ends > pieces.starts
        if not which.any():
            return finding
        to_ns = _covered_at(pieces, *cover[disk.id])
        if to_ns is not None and to_ns <= floor:
            return finding  # no instant that can be reached shows it
        finding.from_ns, finding.to_ns = max(int(pieces.stamps[which].min()), floor), to_ns
        starts, ends = ranges.union(pieces.starts, pieces.ends)
        finding.ranges = list(zip(starts.tolist(), ends.tolist(), strict=True))
        return finding


def _covered_at(pieces: Pieces, starts: U64, ends: U64, stamps: U64) -> int | None:
    """When the last byte of the pieces was covered by something newer; None: not yet."""
    latest = 0
    for first, last, stamp in zip(
        pieces.starts.tolist(), pieces.ends.tolist(), pieces.stamps.tolist(), strict=True
    ):
        if first == last:
            continue
        later = int(np.searchsorted(stamps, np.uint64(stamp), side="right"))
        which = later + np.flatnonzero(
            (starts[later:] < np.uint64(last)) & (ends[later:] > np.uint64(first))
        )
        # The newest first: so the oldest of those that cover a byte wins it.
        which = which[::-1]
        shown = extents.resolve(starts[which], ends[which], first, last)
        if bool((shown.winners == extents.BASE).any()):
            return None
        latest = max(latest, int(stamps[which[shown.winners]].max()))
    return latest
