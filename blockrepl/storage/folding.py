"""Folding: the oldest segments go into the base images, and then away.

What is folded is the longest row of oldest segments, all sealed, whose every record is at most as
young as the floor, and of each disk as old as all its records in the segments behind (`foldable`).
A disk's records stand in the journal in order of stamp, so the second holds by itself; it is looked
at all the same, for if it did not, an old record would show over the base. A segment with records
of a disk that is not synced by the floor waits: its base is being written by others.

`fold` writes what each disk shows at the floor, where a record shows, and makes it durable. Until
the folded segments are gone, views find these records in the journal still, so it does not matter
to them what the base holds there. A fold that broke off is done again, from the beginning.

Where a segment cannot be read, `fold_most` folds those before it: it writes what each disk shows at
its newest record in them. What is younger up to the floor stays in the journal, over the base.

`grow_images` comes first, whether there is something to fold or not: the images get the size that
their disks have at the floor. Views do not care: what lies beyond an image's end reads as zeros.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from blockrepl.errors import DamageError, StorageError
from blockrepl.storage.base import clear
from blockrepl.storage.catalog import SegmentRow
from blockrepl.storage.content import ContentReader, Window
from blockrepl.storage.files import Files, failure, write_all
from blockrepl.storage.history import ReplicaHistory, State
from blockrepl.storage.index import SHOWS_BASE, SHOWS_DATA, STAMP_MAX
from blockrepl.units import MIB

WINDOW_BYTES = 64 * MIB  # of a disk, resolved at once
PIECE_BYTES = 4 * MIB  # copied at once
Pace = Callable[[int], None]  # called with the bytes written; may wait


def foldable(history: ReplicaHistory, state: State, floor_ns: int) -> list[SegmentRow]:
    """The segments that a fold up to the floor makes needless, oldest first."""
    return _foldable(history, state, floor_ns)[0]


def _foldable(
    history: ReplicaHistory, state: State, floor_ns: int
) -> tuple[list[SegmentRow], StorageError | None]:
    """With what is wrong with the oldest segment of up to the floor that cannot be read."""
    history.refresh(state)
    rows = [state.segments[number] for number in sorted(state.segments)]
    synced = {disk.id for disk in state.disks_at(floor_ns)}
    waiting = {disk.id for disk in state.disks if disk.id not in synced}
    oldest_behind: dict[bytes, int] = {}
    oldest_unknown = STAMP_MAX  # of segments behind that cannot be read: of any disk
    damage: StorageError | None = None
    fits = []
    for row in reversed(rows):
        if row.number not in history.index:  # begun after the durable record was read
            oldest_unknown = min(oldest_unknown, row.first_stamp)
            fits.append(False)
            continue
        try:
            spans = history.index.spans(row.number)
        except DamageError as error:
            oldest_unknown = min(oldest_unknown, row.first_stamp)
            damage = error if row.first_stamp <= floor_ns else damage
            fits.append(False)
            continue
        fits.append(
            row.sealed
            and row.last_stamp <= floor_ns
            and not waiting & spans.keys()
            and all(
                last <= oldest_behind.get(disk, last) and last < oldest_unknown
                for disk, (_, last) in spans.items()
            )
        )
        for disk, (first, _) in spans.items():
            oldest_behind[disk] = min(first, oldest_behind.get(disk, first))
    fits.reverse()
    count = fits.index(False) if False in fits else len(fits)
    return rows[:count], damage


def grow_images(
    history: ReplicaHistory, state: State, floor_ns: int, *, files: Files | None = None
) -> None:
    """Give the base images the size of the floor. StorageError."""
    for disk in state.disks_at(floor_ns):
        path = history.image_path(disk)
        try:
            if path.stat().st_size >= disk.size_bytes:
                continue
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                (files or Files()).truncate(descriptor, disk.size_bytes)
                (files or Files()).sync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise failure(error, f"cannot enlarge {path}") from error


def fold(
    history: ReplicaHistory,
    state: State,
    floor_ns: int,
    rows: Sequence[SegmentRow] | None = None,
    *,
    files: Files | None = None,
    pace: Pace = lambda _size_bytes: None,
) -> None:
    """Bring the base images up to the floor, or no further than ``rows``, the oldest segments.

    DamageError, StorageError.
    """
    history.refresh(state)
    content = ContentReader(history.index, history.payload, history.files)
    disks = [(disk, floor_ns) for disk in state.disks_at(floor_ns)]
    if rows is not None:
        newest = _newest(history, rows)
        disks = [(disk, newest[disk.id]) for disk, _ in disks if disk.id in newest]
    for disk, at_ns in disks:
        path = history.image_path(disk)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise failure(error, f"cannot open {path}") from error
        try:
            for first in range(0, disk.size_bytes, WINDOW_BYTES):
                last = min(first + WINDOW_BYTES, disk.size_bytes)
                window = content.resolve(disk.id, first, last, at_ns)
                _fold_window(descriptor, content, path, window, files or Files(), pace)
            (files or Files()).sync(descriptor)
        except OSError as error:
            raise failure(error, f"cannot write {path}") from error
        finally:
            os.close(descriptor)


def _newest(history: ReplicaHistory, rows: Sequence[SegmentRow]) -> dict[bytes, int]:
    """The newest stamp of each disk's records in some segments."""
    newest: dict[bytes, int] = {}
    for row in rows:
        for disk, (_, last) in history.index.spans(row.number).items():
            newest[disk] = max(last, newest.get(disk, last))
    return newest


def fold_most(
    history: ReplicaHistory,
    state: State,
    floor_ns: int,
    *,
    files: Files | None = None,
    pace: Pace = lambda _size_bytes: None,
) -> tuple[list[SegmentRow], StorageError | None]:
    """Fold up to the floor, or as far as the journal can be read.

    The segments that are needless now, and what keeps it from the floor. StorageError.
    """
    rows, damage = _foldable(history, state, floor_ns)
    is_cut = damage is not None
    while rows:
        try:
            fold(history, state, floor_ns, rows if is_cut else None, files=files, pace=pace)
            break
        except StorageError as error:
            if error.segment is None and not isinstance(error, DamageError):
                raise
            damage = damage or error
            rows = _before(rows, error, is_cut=is_cut)
            is_cut = True
    return rows, damage


def _before(rows: list[SegmentRow], error: StorageError, *, is_cut: bool) -> list[SegmentRow]:
    """The segments that may be folded without what cannot be read; fewer if they were cut before.

    It may lie behind them all: of the instant of their newest record, or, uncut, up to the floor.
    """
    for place, row in enumerate(rows):
        if row.number == error.segment:
            return rows[:place]
    return rows[:-1] if is_cut else rows


def _fold_window(
    descriptor: int,
    content: ContentReader,
    path: Path,
    window: Window,
    files: Files,
    pace: Pace,
) -> None:
    """Write what records show in a window; what the base shows stays as it is."""
    extent, count = 0, len(window.kinds)
    while extent < count:
        kind, first = window.kinds[extent], window.bounds[extent]
        while extent < count and window.kinds[extent] == kind:
            extent += 1
        last = window.bounds[extent]
        if kind == SHOWS_DATA:
            for at in range(first, last, PIECE_BYTES):
                data = bytearray(min(PIECE_BYTES, last - at))
                content.read_into(path, window, at, memoryview(data))
                write_all(files, descriptor, [data], at)
                pace(len(data))
        elif kind != SHOWS_BASE:
            clear(files, descriptor, first, last)
