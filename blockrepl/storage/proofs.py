"""What the scrub has proven of a replica, and what it found to differ; in the catalog.

A proof is a stamp per region of a disk: at that instant the replica's region equalled the source's.
0: never proven. The stamps of CHUNK_REGIONS regions are one row: a blob, and sums over it, so that
summing up a disk of any size reads no blob but those that the sums cannot answer for.

Proofs are written late: they stand in memory, chunk by chunk, until ``write`` is called (every few
seconds, and when the replica is closed), or CHUNKS_MAX of them are waiting. A crash loses the last
ones, which only means that they are proven again. Mismatches are written at once.

The proof of a region that differs is taken back; the mismatch keeps it. A mismatch is healed when
every region of its range is proven at a later instant than it was found at, in whatever order. No
consistent mark does it, nor does a resync, a growth or a fold: they may be of other bytes, and say
nothing of these. From the last proof (from the floor, when there was none) to the heal, that range
of the disk is not to be trusted. Those instants stay reachable: all else in them is what it was,
and it may be all that is left of them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from blockrepl.formats.frame import U64
from blockrepl.limits import REGION_BYTES
from blockrepl.storage.catalog import Catalog

CHUNK_REGIONS = 4096  # 4 GiB of a disk: 32 KiB in a row
CHUNKS_MAX = 64  # that wait to be written: 2 MiB
MISMATCHES_MAX = 10_000  # rows; the oldest healed ones make room
_VERSION = 2  # of the catalog that has these tables


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Bytes [start, start + length) of a disk differed at ``at_ns``, and not at ``proven_ns``.

    ``healed_ns``: the first instant at which all of them are known to be right again.
    """

    disk: bytes
    start: int
    length: int
    at_ns: int
    healed_ns: int | None = None
    proven_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Proven:
    """``oldest_ns``: of the regions that are proven; None when there are none."""

    covered_bytes: int
    oldest_ns: int | None
    is_whole: bool  # every region is proven
    mismatches: int  # not healed


class Proofs:
    """The proofs of one catalog. May be used by several threads.

    Who takes ``lock`` and the catalog's (a transaction) takes ``lock`` first.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.lock = threading.RLock()
        self._waiting: dict[tuple[bytes, int], U64] = {}  # chunks not yet written

    # Written by comparisons

    def prove(self, disk: bytes, size_bytes: int, offset: int, length: int, stamp: int) -> None:
        """A range equalled the source's at ``stamp``. Regions it covers in part stay as they are.

        Heals the mismatches of which all is proven by now. StorageError.
        """
        first, last = whole_regions(size_bytes, offset, length)
        if first >= last:
            return
        with self.lock:
            for chunk, places in _chunks(first, last):
                stamps = self._chunk(disk, chunk)
                stamps[places] = np.maximum(stamps[places], np.uint64(stamp))
            self._heal(disk, first * REGION_BYTES, last * REGION_BYTES)
            if len(self._waiting) >= CHUNKS_MAX:
                self.write()

    def differ(
        self, disk: bytes, start: int, length: int, at_ns: int, proven_ns: int | None = None
    ) -> None:
        """A range did not, which was proven last at ``proven_ns``. StorageError."""
        with self.lock:
            for chunk, places in _chunks(
                start // REGION_BYTES, -(-(start + length) // REGION_BYTES)
            ):
                self._chunk(disk, chunk)[places] = 0
            with self._catalog.transaction():
                if not self._is_known(disk, start, length):
                    self._make_room()
                    self._catalog.change(
                        "INSERT OR REPLACE INTO mismatches VALUES (?, ?, ?, ?, NULL, ?)",
                        disk.hex(),
                        start,
                        length,
                        at_ns,
                        proven_ns,
                    )
                self._write_chunks()
            self._waiting.clear()

    def grown(self, disk: bytes, before_bytes: int) -> None:
        """A disk had so many bytes: its last region, if it was short, is another one now.

        StorageError.
        """
        if before_bytes % REGION_BYTES == 0:
            return
        with self.lock, self._catalog.transaction():
            chunk, place = divmod(before_bytes // REGION_BYTES, CHUNK_REGIONS)
            self._chunk(disk, chunk)[place] = 0
            self._write_chunks()

    def _heal(self, disk: bytes, start: int, end: int) -> None:
        """Close the mismatches that touch a range and are proven since."""
        query = (
            "SELECT start, length, at_ns FROM mismatches WHERE disk = ? AND healed_ns IS NULL "
            "AND start < ? AND start + length > ?"
        )
        healed = []
        for first, length, at_ns in self._rows(query, disk.hex(), end, start):
            oldest, newest = self._span(disk, first, length)
            if oldest > at_ns:
                healed.append((newest, disk.hex(), first, length, at_ns))
        if not healed:
            return
        with self._catalog.transaction():
            for row in healed:
                self._catalog.change(
                    "UPDATE mismatches SET healed_ns = ? "
                    "WHERE disk = ? AND start = ? AND length = ? AND at_ns = ?",
                    *row,
                )

    def _is_known(self, disk: bytes, start: int, length: int) -> bool:
        """Whether a mismatch that is not healed has all of the range."""
        query = (
            "SELECT 1 FROM mismatches WHERE disk = ? AND healed_ns IS NULL "
            "AND start <= ? AND start + length >= ? LIMIT 1"
        )
        return bool(self._catalog.rows(query, disk.hex(), start, start + length))

    def _make_room(self) -> None:
        ((count,),) = self._catalog.rows("SELECT count(*) FROM mismatches")
        if count >= MISMATCHES_MAX:
            self._catalog.change(
                "DELETE FROM mismatches WHERE rowid IN (SELECT rowid FROM mismatches "
                "ORDER BY healed_ns IS NULL, at_ns LIMIT ?)",
                count - MISMATCHES_MAX + 1,
            )

    def write(self) -> None:
        """Make all proofs durable. StorageError: they stay in memory, unless they are too many."""
        with self.lock:
            if not self._waiting:
                return
            try:
                with self._catalog.transaction():
                    self._write_chunks()
                self._waiting.clear()
            finally:
                if len(self._waiting) >= CHUNKS_MAX:
                    self._waiting.clear()

    def _write_chunks(self) -> None:
        for (disk, chunk), stamps in self._waiting.items():
            proven, oldest, newest = _sums(stamps)
            self._catalog.change(  # nothing of a disk that was forgotten meanwhile
                "INSERT OR REPLACE INTO proofs SELECT id, ?2, ?3, ?4, ?5, ?6 "
                "FROM disks WHERE id = ?1",
                disk.hex(),
                chunk,
                proven,
                oldest,
                newest,
                stamps.tobytes(),
            )

    def _chunk(self, disk: bytes, chunk: int) -> U64:
        """A chunk's stamps, to be changed in place."""
        stamps = self._waiting.get((disk, chunk))
        if stamps is None:
            stamps = self._waiting[disk, chunk] = self._read(disk, chunk)
        return stamps

    def _read(self, disk: bytes, chunk: int) -> U64:
        query = "SELECT stamps FROM proofs WHERE disk = ? AND chunk = ?"
        rows = self._rows(query, disk.hex(), chunk)
        if rows and len(rows[0][0]) == CHUNK_REGIONS * 8:
            return np.frombuffer(rows[0][0], np.uint64).copy()
        return np.zeros(CHUNK_REGIONS, np.uint64)

    def _rows(self, query: str, *values: object) -> list[Any]:
        if self._catalog.version < _VERSION:
            return []
        return self._catalog.rows(query, *values)

    # Read by anybody

    def proven(self, disk: bytes, size_bytes: int) -> Proven:
        """What is proven of a disk. StorageError."""
        regions = _count(size_bytes)
        with self.lock:
            sums = self._all_sums(disk)
            count = sum(proven for proven, _, _ in sums.values())
            covered = count * REGION_BYTES
            if self._stamp(disk, regions - 1, sums):
                covered -= regions * REGION_BYTES - size_bytes  # the last one may be short
            oldest = min((oldest for proven, oldest, _ in sums.values() if proven), default=None)
            return Proven(covered, oldest, count == regions, len(self.mismatches(disk)))

    def proven_since(self, disk: bytes, size_bytes: int, after_ns: int) -> int:
        """How many bytes of a disk are proven at instants later than ``after_ns``. StorageError."""
        regions = _count(size_bytes)
        total = 0
        with self.lock:
            sums = self._all_sums(disk)
            for chunk, (proven, oldest, newest) in sums.items():
                if newest <= after_ns:
                    continue
                if oldest > after_ns:
                    total += proven
                else:
                    stamps = self._peek(disk, chunk)
                    total += int((stamps > np.uint64(after_ns)).sum())
            covered = total * REGION_BYTES
            if self._stamp(disk, regions - 1, sums) > after_ns:
                covered -= regions * REGION_BYTES - size_bytes
            return covered

    def proven_at(self, disk: bytes, start: int, length: int) -> int | None:
        """When all of a range was proven last; None when some of it never was. StorageError."""
        with self.lock:
            return self._span(disk, start, length)[0] or None

    def mismatches(
        self, disk: bytes, *, after_ns: int = -1, healed_too: bool = False
    ) -> list[Mismatch]:
        """Those found at instants later than ``after_ns``, by place."""
        rows = self._rows(
            "SELECT disk, start, length, at_ns, healed_ns, proven_ns FROM mismatches "
            "WHERE disk = ? AND at_ns > ? AND (healed_ns IS NULL OR ?) ORDER BY start, at_ns",
            disk.hex(),
            after_ns,
            healed_too,
        )
        return [Mismatch(disk, *rest) for _, *rest in rows]

    def _span(self, disk: bytes, start: int, length: int) -> tuple[int, int]:
        """The oldest and the newest stamp of the regions that a range touches."""
        pieces = _chunks(start // REGION_BYTES, -(-(start + length) // REGION_BYTES))
        stamps = [self._peek(disk, chunk)[places] for chunk, places in pieces]
        return min(int(part.min()) for part in stamps), max(int(part.max()) for part in stamps)

    def _all_sums(self, disk: bytes) -> dict[int, tuple[int, int, int]]:
        """By chunk: regions proven, oldest stamp, newest stamp."""
        query = "SELECT chunk, proven, oldest_ns, newest_ns FROM proofs WHERE disk = ?"
        sums = {chunk: (n, old, new) for chunk, n, old, new in self._rows(query, disk.hex())}
        for (other, chunk), stamps in self._waiting.items():
            if other == disk:
                sums[chunk] = _sums(stamps)
        return sums

    def _stamp(self, disk: bytes, region: int, sums: dict[int, tuple[int, int, int]]) -> int:
        chunk, place = divmod(region, CHUNK_REGIONS)
        return int(self._peek(disk, chunk)[place]) if sums.get(chunk, (0,))[0] else 0

    def _peek(self, disk: bytes, chunk: int) -> U64:
        stamps = self._waiting.get((disk, chunk))
        return self._read(disk, chunk) if stamps is None else stamps


def whole_regions(size_bytes: int, offset: int, length: int) -> tuple[int, int]:
    """The first region that a range of a disk covers whole, and the one after the last."""
    end = offset + length
    last = _count(size_bytes) if end == size_bytes else end // REGION_BYTES
    return -(-offset // REGION_BYTES), last


def _count(size_bytes: int) -> int:
    return -(-size_bytes // REGION_BYTES)


def _chunks(first: int, last: int) -> list[tuple[int, slice]]:
    """Regions [first, last) as chunks and places in them."""
    pieces = []
    while first < last:
        chunk, place = divmod(first, CHUNK_REGIONS)
        end = min(last, (chunk + 1) * CHUNK_REGIONS)
        pieces.append((chunk, slice(place, place + end - first)))
        first = end
    return pieces


def _sums(stamps: U64) -> tuple[int, int, int]:
    proven = stamps[stamps > 0]
    if not len(proven):
        return 0, 0, 0
    return len(proven), int(proven.min()), int(proven.max())
