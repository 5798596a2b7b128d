"""Comparisons at the receiver: is a range of a replica what the source says it is?

An answer, in this order:

1. every frame that came before the comparison is durable (it stands in the stream)
2. the index sees them; nothing is read that is not durable
3. in a worker thread, region by region: the range's content at exactly the comparison's stamp, and
   its digests. Whatever is appended meanwhile is younger, and does not show
4. of a scrub: what does not differ is a proof, and heals what differed there before; what differs
   is an alarm (storage/proofs.py)

Comparisons hold up no commit: they have THREADS_MAX threads of their own, and wait for a commit
without asking for one.

==============================  ====================================================================
of the replica cannot be read   then
==============================  ====================================================================
a block                         it differs: sent again, it can be read from that instant on
which records there are: a      sending does not help, for they may be newer. Of a resync all
damaged index, a lost segment   differs, once; a scrub proves nothing, sends nothing, and says why,
                                until that very region is compared (hidden_regions.py)
a file that is gone             looked for LOOKS_MAX times: retention may have replaced it. If it
                                is lost: its blocks differ; if it tells of records, as above
==============================  ====================================================================

A base image may be written to meanwhile, by frames of a first sync. That does no harm: a source
sends a range after the verdict on it, so they are of other ranges. A receiver that is told
otherwise takes a torn read for a difference at worst.

Memory: the index of the group's open segments, caches of CACHE_BYTES, and a block per thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import trio

from blockrepl.errors import PeerError, StorageError, explain
from blockrepl.formats.comparison import DIGEST_BYTES, Compare, Purpose, Verdict
from blockrepl.limits import COMPARE_BLOCK_BYTES, REGION_BYTES
from blockrepl.services.group_committer import GroupCommitter
from blockrepl.services.hidden_regions import HiddenRegions
from blockrepl.storage.base import image_path
from blockrepl.storage.catalog import DiskRow
from blockrepl.storage.content import ContentReader, Extent
from blockrepl.storage.digests import digest_blocks, zero_digests
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.reading import GoneError, looking
from blockrepl.storage.replica import Replica
from blockrepl.units import format_instant

logger = logging.getLogger(__name__)

THREADS_MAX = 2  # of all groups: one reads while the other digests
CACHE_BYTES = 4 * 1024 * 1024  # decompressed blocks, per group: neighbours in a region share them
PROOF_SECONDS = 5.0  # proofs are written at most so often


class Comparisons:
    """All groups' comparisons."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(THREADS_MAX)
        self._groups: dict[str, GroupComparison] = {}

    async def compare(self, committer: GroupCommitter, source: bytes, compare: Compare) -> Verdict:
        """Raises PeerError, and StorageError when the replica cannot be used."""
        name = committer.replica.name
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = GroupComparison(committer.replica)
        await committer.settled()
        return await trio.to_thread.run_sync(
            lambda: group.compare(source, compare, trio.from_thread.check_cancelled),
            limiter=self._limiter,
        )

    def newest_stamp(self, group: str, disk: bytes) -> int:
        """Of the comparisons of a disk that have begun; 0 without any."""
        known = self._groups.get(group)
        return known.newest_stamps.get(disk, 0) if known is not None else 0

    def unreadable(self, group: str) -> dict[bytes, str]:
        """Why some of a disk could not be compared when it was tried last, by the disk's id."""
        known = self._groups.get(group)
        return known.hidden.reasons() if known is not None else {}

    def close(self) -> None:
        for group in self._groups.values():
            group.close()


class _HiddenError(Exception):
    """Which records of a range there are cannot be told, or a file of theirs is gone."""


class GroupComparison:
    """Comparisons of one group. Blocks; may be used by several threads."""

    def __init__(self, replica: Replica) -> None:
        self.newest_stamps: dict[bytes, int] = {}
        self.hidden = HiddenRegions()
        self._replica = replica
        self._lock = threading.Lock()
        self._history: ReplicaHistory | None = None

    def close(self) -> None:
        if self._history is not None:
            self._history.close()

    def compare(self, source: bytes, compare: Compare, check: Callable[[], None]) -> Verdict:
        """``check`` is called now and then, and may raise. PeerError, StorageError."""
        try:
            return looking(
                lambda: self._compare(source, compare, check, is_last=False), self._look_again
            )
        except GoneError:  # lost, rather than replaced by retention
            self._look_again()
            return self._compare(source, compare, check, is_last=True)

    def _look_again(self) -> None:
        with self._lock:
            if self._history is not None:
                self._history.look_again()

    def _compare(
        self, source: bytes, compare: Compare, check: Callable[[], None], *, is_last: bool
    ) -> Verdict:
        disk = self._disk(source, compare)
        reader = self._reader()
        self._check_stamp(disk, compare)
        newest = self.newest_stamps.get(disk.id, 0)
        self.newest_stamps[disk.id] = max(newest, compare.stamp)
        differing: list[int] = []
        for first in range(0, compare.length, REGION_BYTES):
            check()
            length = min(REGION_BYTES, compare.length - first)
            at = compare.offset + first
            try:
                mine = self._digests(reader, disk, compare, at, length, is_last)
            except _HiddenError as error:
                is_scrub = compare.purpose is Purpose.SCRUB
                self._hide(disk, at, compare.length - first if is_scrub else length, error)
                if is_scrub:
                    return Verdict(compare.group, compare.token, compare.block_count, ())
                mine = [b""] * -(-length // COMPARE_BLOCK_BYTES)
            else:
                self.hidden.compared(disk.id, disk.size_bytes, at, length)
            block = first // COMPARE_BLOCK_BYTES
            for place, digest in enumerate(mine):
                at = (block + place) * DIGEST_BYTES
                if digest != compare.digests[at : at + DIGEST_BYTES]:
                    differing.append(block + place)
        if compare.purpose is Purpose.SCRUB:
            self._note(disk, compare, differing)
        return Verdict(compare.group, compare.token, compare.block_count, tuple(differing))

    def _disk(self, source: bytes, compare: Compare) -> DiskRow:
        status = self._replica.status()
        if status.error is not None and status.error.code == "fail-stop":
            raise status.error
        disk = next((row for row in status.disks if row.id == compare.disk), None)
        if disk is None or disk.source != source:
            raise PeerError("comparison of a disk that its source has not attached")
        end = compare.offset + compare.length
        if end > disk.size_bytes:
            raise PeerError(f"comparison beyond the end of disk {disk.name}")
        # It may have been sent before the disk grew.
        ends = [row.before_bytes for row in status.growths if row.disk == disk.id]
        if compare.length % COMPARE_BLOCK_BYTES and end not in (*ends, disk.size_bytes):
            raise PeerError("comparison ends inside a block that is not the disk's last")
        return disk

    def _reader(self) -> ContentReader:
        """A reader that sees all that is durable now."""
        with self._lock:
            if self._history is None:
                self._history = ReplicaHistory(
                    self._replica.directory, block_cache_bytes=CACHE_BYTES
                )
            self._history.refresh_beside_receiver()
            return ContentReader(self._history.index, self._history.payload, self._history.files)

    def _check_stamp(self, disk: DiskRow, compare: Compare) -> None:
        """All up to the stamp must have come: a watermark, a record or a gap says so."""
        assert self._history is not None
        status = self._replica.status()
        if compare.stamp <= status.sources[disk.source].watermark:
            return
        if compare.stamp <= self._history.index.newest_stamp(disk.id):
            return
        gaps = (gap.from_ns for gap in status.gaps if gap.disk == disk.id)
        if compare.stamp > max(gaps, default=0):
            raise PeerError(f"comparison of disk {disk.name} at an instant that is not durable yet")

    def _digests(
        self,
        reader: ContentReader,
        disk: DiskRow,
        compare: Compare,
        offset: int,
        length: int,
        is_last: bool,
    ) -> list[bytes]:
        """A region's digests, block by block; empty for what cannot be read.

        GoneError, unless it is the last look; _HiddenError.
        """
        count = -(-length // COMPARE_BLOCK_BYTES)
        end = offset + length
        image = image_path(self._replica.directory, disk.name)
        extents: list[Extent] = []
        try:
            window = reader.resolve(disk.id, offset, end, compare.stamp)
        except StorageError as error:
            if isinstance(error, GoneError) and not is_last:
                raise
            raise _HiddenError(explain(error)) from error
        try:
            reader.add_extents(extents, image, window, offset, end)
        except StorageError as error:
            self._unreadable(disk, error, is_last)
            return [b""] * count
        digests: list[bytes] = []
        has_data = _blocks_with_data(extents, offset, count)
        for block in range(count):
            at = offset + block * COMPARE_BLOCK_BYTES
            size = min(COMPARE_BLOCK_BYTES, end - at)
            if not has_data[block]:
                digests.append(zero_digests(size))
                continue
            data = bytearray(size)
            try:
                reader.read_into(image, window, at, memoryview(data))
            except StorageError as error:
                self._unreadable(disk, error, is_last)
                digests.append(b"")
            else:
                digests.append(digest_blocks(data))
        return digests

    def _hide(self, disk: DiskRow, offset: int, length: int, error: _HiddenError) -> None:
        """Note, and say once, that a range of a disk cannot be compared."""
        why = f"disk {disk.name} cannot be compared with its source: {error}"
        if self.hidden.hide(disk.id, offset, length, why):
            logger.error("group %s: %s", self._replica.name, why)

    def _unreadable(self, disk: DiskRow, error: StorageError, is_last: bool) -> None:
        """What cannot be read, or is lost, differs: sent again it can be. GoneError."""
        if isinstance(error, GoneError) and not is_last:
            raise error
        logger.error("group %s: disk %s: %s", self._replica.name, disk.name, error)

    def _note(self, disk: DiskRow, compare: Compare, differing: list[int]) -> None:
        """Catalogue what a scrub has found."""
        proofs = self._replica.proofs
        end = compare.offset + compare.length
        at = compare.offset
        found = [
            (first, last, proofs.proven_at(disk.id, first, last - first))
            for first, last in _ranges(compare, differing, end)
        ]  # all of it before the first of them takes a proof back
        for first, last, proven in found:
            logger.warning(
                "group %s, disk %s: bytes %d to %d differ from the source's at %s; proven last: %s",
                self._replica.name,
                disk.name,
                first,
                last - 1,
                format_instant(compare.stamp),
                "never" if proven is None else format_instant(proven),
            )
            proofs.differ(disk.id, first, last - first, compare.stamp, proven)
            proofs.prove(disk.id, disk.size_bytes, at, first - at, compare.stamp)
            at = -(-last // REGION_BYTES) * REGION_BYTES
        if at < end:
            proofs.prove(disk.id, disk.size_bytes, at, end - at, compare.stamp)


def _blocks_with_data(extents: list[Extent], offset: int, count: int) -> list[bool]:
    has_data = [False] * count
    for extent in extents:
        if extent.is_data:
            first = (extent.offset - offset) // COMPARE_BLOCK_BYTES
            last = -(-(extent.offset + extent.length - offset) // COMPARE_BLOCK_BYTES)
            has_data[first:last] = [True] * (last - first)
    return has_data


def _ranges(compare: Compare, differing: list[int], end: int) -> list[tuple[int, int]]:
    """Blocks that differ, as contiguous byte ranges of the disk."""
    ranges: list[tuple[int, int]] = []
    for block in differing:
        first = compare.offset + block * COMPARE_BLOCK_BYTES
        last = min(first + COMPARE_BLOCK_BYTES, end)
        if ranges and ranges[-1][1] == first:
            ranges[-1] = (ranges[-1][0], last)
        else:
            ranges.append((first, last))
    return ranges
