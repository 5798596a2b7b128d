"""The catalog: what is true of a group beside its frames.

SQLite, ``replicas/<group>/catalog.sqlite``.

===========  =====================================================================================
table        a row is
===========  =====================================================================================
meta         group_name, group_id (hex), created_ns
sources      a source that has attached: its last catalogued frame and watermark
disks        a disk: ``ready_ns`` is its floor (null before the first sync is done), ``ring_id`` and
             ``next_sequence`` say up to where its ring is journaled, ``removed_ns`` retires it,
             ``size_bytes`` is its newest size
growths      up to ``at_ns`` a disk had ``before_bytes``, later more: the next larger
             ``before_bytes`` among its rows, else its newest size
gaps         an interval of a disk's history that cannot be reconstructed; open: ``to_ns`` null
checkpoints  a named instant
segments     a journal file. Sealed: closed for ever, its index is in the file, all its marks are
             here. Not sealed: ``bytes`` and ``frames`` count what was durable when the next
             segment was begun; of the newest, what was durable when the row was last written
===========  =====================================================================================

Rules:

1. Written by the receiver only, after the frames that say so are durable. Hence a mark whose frame
   number is at most its source's ``last_number`` has been applied: replaying is idempotent, and a
   removed checkpoint stays removed.
2. What the catalog does not say (frames after ``last_number``) is in the unsealed segments.
3. WAL mode and synchronous=FULL: a returned transaction is durable, and other processes read while
   the receiver writes. ``user_version`` is the format's version (storage/catalog_file.py).
4. Integers of foreign origin are unsigned 64-bit; SQLite's are signed: ring ids are folded.

One connection may be used by several threads: a lock serialises them.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockrepl.errors import StateError
from blockrepl.storage import catalog_file
from blockrepl.storage.catalog_file import translated

FILE_NAME = "catalog.sqlite"


@dataclass(frozen=True, slots=True)
class SourceRow:
    id: bytes
    last_number: int
    watermark: int


@dataclass(frozen=True, slots=True)
class DiskRow:
    id: bytes
    name: str
    size_bytes: int
    source: bytes
    ready_ns: int | None = None
    epoch: int = 1
    ring_id: int = 0
    next_sequence: int = 0
    removed_ns: int | None = None


@dataclass(frozen=True, slots=True)
class GapRow:
    disk: bytes
    from_ns: int
    to_ns: int | None


@dataclass(frozen=True, slots=True)
class GrowthRow:
    """The disk had ``before_bytes`` at all instants before ``at_ns``, unless it had less."""

    disk: bytes
    before_bytes: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    name: str
    at_ns: int
    kind: str
    kept: bool


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """``first_stamp`` and ``last_stamp`` bound the records' stamps; both 0 without records."""

    number: int
    created_ns: int
    first_stamp: int
    last_stamp: int
    sealed: bool
    bytes: int  # of the frames and the segment's header; of the whole file when sealed
    frames: int
    generation: int = 0  # how often it was written anew (storage/thinning.py)
    step_ns: int = 0  # the distance of the points it was thinned for; 0: it is whole


class Catalog:
    """An open catalog. ``group_name`` and ``group_id`` never change."""

    def __init__(self, connection: sqlite3.Connection, path: Path, version: int) -> None:
        self._connection = connection
        self._lock = threading.RLock()
        self.path = path
        self.version = version  # what is not in it yet is empty
        meta = dict(self.rows("SELECT key, value FROM meta"))
        self.group_name = str(meta["group_name"])
        self.group_id = bytes.fromhex(meta["group_id"])
        self.created_ns = int(meta["created_ns"])

    @classmethod
    def create(cls, path: Path, group_name: str, group_id: bytes, created_ns: int) -> Catalog:
        """Make a catalog where there is none yet."""
        connection = catalog_file.connect(path, "rwc")
        meta = {
            "group_name": group_name,
            "group_id": group_id.hex(),
            "created_ns": str(created_ns),
        }
        try:
            catalog_file.create(connection, path, meta)
            return cls(connection, path, catalog_file.VERSION)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def open(cls, path: Path) -> Catalog:
        """Open for writing (the receiver only). An older version is upgraded."""
        connection = catalog_file.connect(path, "rw")
        try:
            catalog_file.open_to_write(connection, path)
            return cls(connection, path, catalog_file.VERSION)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def open_readonly(cls, path: Path) -> Catalog:
        """Open beside a receiver that may be writing. StateError when there is no catalog."""
        connection = catalog_file.connect(path, "ro")
        try:
            return cls(connection, path, catalog_file.read_version(connection, path))
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes made inside become durable together, or none. May be nested."""
        with self._lock, translated(self.path):
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk may have made SQLite roll back on its own.
                with suppress(sqlite3.OperationalError):
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All reads made inside see one state of the catalog."""
        with self._lock, translated(self.path):
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("ROLLBACK")

    def rows(self, query: str, *values: object) -> list[Any]:
        """What a query finds. StorageError."""
        with self._lock, translated(self.path):
            return self._connection.execute(query, values).fetchall()

    def change(self, query: str, *values: object) -> int:
        """Run a statement; the number of rows it changed."""
        with self.transaction():
            return self._connection.execute(query, values).rowcount

    # Sources and disks

    def sources(self) -> list[SourceRow]:
        rows = self.rows("SELECT id, last_number, watermark FROM sources ORDER BY id")
        return [SourceRow(bytes.fromhex(i), number, watermark) for i, number, watermark in rows]

    def put_source(self, row: SourceRow) -> None:
        self.change(
            "INSERT INTO sources VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
            "last_number = excluded.last_number, watermark = excluded.watermark",
            row.id.hex(),
            row.last_number,
            row.watermark,
        )

    def disks(self, *, removed: bool = False) -> list[DiskRow]:
        """The disks by name; with ``removed``, the retired ones too."""
        rows = self.rows("SELECT * FROM disks WHERE removed_ns IS NULL OR ? ORDER BY name", removed)
        return [
            DiskRow(
                bytes.fromhex(i),
                name,
                size,
                bytes.fromhex(source),
                ready,
                epoch,
                _unfold(ring),
                *rest,
            )
            for i, name, size, source, ready, epoch, ring, *rest in rows
        ]

    def add_disk(self, row: DiskRow) -> None:
        self.change(
            "INSERT INTO disks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row.id.hex(),
            row.name,
            row.size_bytes,
            row.source.hex(),
            row.ready_ns,
            row.epoch,
            _fold(row.ring_id),
            row.next_sequence,
            row.removed_ns,
        )

    def set_position(self, disk: bytes, ring_id: int, next_sequence: int) -> None:
        """Records of ``ring_id`` before ``next_sequence`` are journaled."""
        self.change(
            "UPDATE disks SET ring_id = ?, next_sequence = ? WHERE id = ?",
            _fold(ring_id),
            next_sequence,
            disk.hex(),
        )

    def set_removed(self, disk: bytes, at_ns: int | None) -> None:
        """Retire a disk, or take it back: then what happened meanwhile is a gap."""
        with self.transaction():
            if at_ns is None:
                for row in self.disks(removed=True):
                    if row.id == disk and row.removed_ns is not None:
                        self.begin_gap(disk, row.removed_ns)
            self.change("UPDATE disks SET removed_ns = ? WHERE id = ?", at_ns, disk.hex())

    def growths(self) -> list[GrowthRow]:
        """All, by disk and size, which is by instant, too."""
        if self.version < 4:
            return []
        rows = self.rows(
            "SELECT disk, before_bytes, at_ns FROM growths ORDER BY disk, before_bytes"
        )
        return [GrowthRow(bytes.fromhex(disk), before, at_ns) for disk, before, at_ns in rows]

    def grow(self, disk: bytes, size_bytes: int, at_ns: int) -> int | None:
        """A disk has that size from ``at_ns`` on. What it had; None, and no change, if it shrank.

        Never before an earlier growth: then both are of the later one's instant.
        """
        with self.transaction():
            for row in self.disks(removed=True):
                if row.id == disk and row.size_bytes < size_bytes:
                    self.change(
                        "INSERT INTO growths SELECT ?1, ?2, "
                        "max(?3, coalesce(max(at_ns), 0)) FROM growths WHERE disk = ?1",
                        disk.hex(),
                        row.size_bytes,
                        at_ns,
                    )
                    self.change(
                        "UPDATE disks SET size_bytes = ? WHERE id = ?", size_bytes, disk.hex()
                    )
                    return row.size_bytes
            return None

    # History

    def gaps(self) -> list[GapRow]:
        rows = self.rows("SELECT disk, from_ns, to_ns FROM gaps ORDER BY from_ns, disk")
        return [GapRow(bytes.fromhex(disk), begin, end) for disk, begin, end in rows]

    def begin_gap(self, disk: bytes, from_ns: int) -> bool:
        """Open a gap and an epoch, unless one is open or there is no history to interrupt.

        Never at the disk's floor or before it: there it has no history.
        """
        with self.transaction():
            changed = self.change(
                "UPDATE disks SET epoch = epoch + 1 WHERE id = ?1 AND ready_ns IS NOT NULL "
                "AND NOT EXISTS (SELECT 1 FROM gaps WHERE disk = ?1 AND to_ns IS NULL)",
                disk.hex(),
            )
            if changed:
                # The same instant twice is one gap that has not ended after all.
                self.change(
                    "INSERT INTO gaps SELECT id, max(?2, ready_ns + 1), NULL FROM disks "
                    "WHERE id = ?1 ON CONFLICT (disk, from_ns) DO UPDATE SET to_ns = NULL",
                    disk.hex(),
                    from_ns,
                )
            return changed > 0

    def set_consistent(self, disk: bytes, at_ns: int) -> None:
        """From ``at_ns`` on the replica equals the disk: its floor, or the end of its gap."""
        with self.transaction():
            if self.change(
                "UPDATE disks SET ready_ns = ? WHERE id = ? AND ready_ns IS NULL", at_ns, disk.hex()
            ):
                return
            self.change(
                "UPDATE gaps SET to_ns = max(from_ns, ?) WHERE disk = ? AND to_ns IS NULL",
                at_ns,
                disk.hex(),
            )

    def checkpoints(self) -> list[CheckpointRow]:
        """All, by instant."""
        return self._checkpoints("ORDER BY at_ns, name")

    def checkpoint(self, name: str) -> CheckpointRow | None:
        return next(iter(self._checkpoints("WHERE name = ?", name)), None)

    def _checkpoints(self, which: str, *values: object) -> list[CheckpointRow]:
        rows = self.rows(f"SELECT name, at_ns, kind, kept FROM checkpoints {which}", *values)
        return [CheckpointRow(name, at_ns, kind, bool(kept)) for name, at_ns, kind, kept in rows]

    def add_checkpoint(self, row: CheckpointRow) -> bool:
        """False, and no change, when the name is taken."""
        return (
            self.change(
                "INSERT INTO checkpoints VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                row.name,
                row.at_ns,
                row.kind,
                int(row.kept),
            )
            > 0
        )

    def remove_checkpoint(self, name: str) -> bool:
        """False when there is none of that name."""
        return self.change("DELETE FROM checkpoints WHERE name = ?", name) > 0

    def keep_checkpoint(self, name: str, kept: bool) -> CheckpointRow | None:
        """The checkpoint, kept from now on or not; None when there is none of that name."""
        self.change("UPDATE checkpoints SET kept = ? WHERE name = ?", int(kept), name)
        return self.checkpoint(name)

    # The journal

    def segments(self) -> list[SegmentRow]:
        columns = "generation, step_ns" if self.version >= 3 else "0, 0"
        rows = self.rows(
            "SELECT number, created_ns, first_stamp, last_stamp, sealed, bytes, frames, "
            f"{columns} FROM segments ORDER BY number"
        )
        return [
            SegmentRow(number, created, first, last, bool(sealed), *rest)
            for number, created, first, last, sealed, *rest in rows
        ]

    def sealed_state(self) -> tuple[int, int]:
        """Another value whenever the sealed segments are others: their count and bytes."""
        rows = self.rows("SELECT count(*), coalesce(sum(bytes), 0) FROM segments WHERE sealed")
        return int(rows[0][0]), int(rows[0][1])

    def put_segment(self, row: SegmentRow) -> None:
        self.change(
            "INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row.number,
            row.created_ns,
            row.first_stamp,
            row.last_stamp,
            int(row.sealed),
            row.bytes,
            row.frames,
            row.generation,
            row.step_ns,
        )

    def remove_segment(self, number: int) -> None:
        self.change("DELETE FROM segments WHERE number = ?", number)


def no_checkpoint(group: str, name: str) -> StateError:
    return StateError(
        f"group {group} has no checkpoint {name!r}",
        hint=f"see: blockrepl checkpoint list {group}",
        code="no-checkpoint",
    )


def sized_at(disk: DiskRow, at_ns: int, growths: Iterable[GrowthRow]) -> DiskRow:
    """The disk with the size it had at an instant. ``growths``: as `Catalog.growths` has them."""
    for growth in growths:
        if growth.disk == disk.id and growth.at_ns > at_ns:
            return replace(disk, size_bytes=growth.before_bytes)
    return disk


def _fold(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _unfold(value: int) -> int:
    return value + (1 << 64) if value < 0 else value
