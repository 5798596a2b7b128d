"""Sends the content of a disk's stale regions: for a first sync, and to make good what was lost.

One region's way:

=========  ==============================  ==================================================
state      flags in the ring               leaves it by
=========  ==============================  ==================================================
stale      stale                           it is read (`must_compare`: digested, and COMPARE is
                                           sent; else its content is sent)
compared   syncing                         the verdict: the same -> done; else differing
differing  syncing                         the blocks that differ are read again, and sent
sent       syncing                         acknowledged -> done
=========  ==============================  ==================================================

A write that finds no room in the ring makes its region stale again, in whatever state it is.
When the link is lost, all that is not done is stale again.

Why the second reading: what is sent must be newer than everything sent before it and older than
everything sent after (its stamp says so), and the verdict takes a while. Why a block that is the
same may be left out: the replica had it at the instant of the comparison, and what changed it since
has a record of its own, or made it stale.
"""

from __future__ import annotations

import logging
from collections import deque
from itertools import count

import trio

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats.comparison import Compare, Purpose, Verdict, encode_compare
from blockrepl.formats.frame import Columns, FrameKind, encode_frame
from blockrepl.services.outbox import Outbox
from blockrepl.services.source_disk import SourceDisk
from blockrepl.storage.pieces import (
    DATA_REGIONS_MAX,
    HOLE_REGIONS_MAX,
    choose_regions,
    digest_range,
    read_piece,
    read_ranges,
)

log = logging.getLogger(__name__)

UNREADABLE_SECONDS = 5.0  # until a disk whose image gave an error is read again
COMPARISONS_MAX = 4  # under way per disk: hides the round trip
AHEAD_BYTES = limits.WINDOW_BYTES // 2  # of frames that wait: content must not hold up records
COMPARE_REGIONS_MAX = limits.COMPARE_BYTES_MAX // limits.REGION_BYTES
BLOCKS_PER_REGION = limits.REGION_BYTES // limits.COMPARE_BLOCK_BYTES
_tokens = count(1)


class DiskSync:
    """The content that one disk still owes. ``differing_bytes`` counts what verdicts found."""

    def __init__(self, disk: SourceDisk, outbox: Outbox, source: bytes) -> None:
        self.disk = disk
        self.differing_bytes = 0
        self._outbox = outbox
        self._source = source
        self._epoch = 1
        self._comparing: dict[int, range] = {}  # token -> regions
        self._differing: deque[tuple[int, list[int]]] = deque()  # region, its blocks

    def interrupted(self) -> None:
        """What was under way is lost."""
        self._epoch += 1
        self._comparing.clear()
        self._differing.clear()
        if self.disk.ring is not None:
            self.disk.ring.restart_syncs()

    def durable(self, regions: tuple[int, ...], epoch: int) -> None:
        """Their content, sent in that epoch, is durable."""
        if epoch == self._epoch and self.disk.ring is not None:
            for region in regions:
                self.disk.ring.end_sync(region)

    def wants(self) -> bool:
        """Whether there is something to read now."""
        disk = self.disk
        if disk.ring is None or trio.current_time() < disk.sync_after:
            return False
        if self._outbox.waiting_bytes >= AHEAD_BYTES:
            return False
        if self._differing:
            return True
        return disk.ring.needs_sync() and len(self._comparing) < COMPARISONS_MAX

    async def step(self, watermark: int) -> bool:
        """Read and send one piece. ``watermark``: of the frames sent so far. True when it did."""
        disk = self.disk
        if disk.gap_in_flight or disk.state == "ready" or not self.wants():
            return False  # ready: lost since the gaps were looked at; the next round reports it
        try:
            if self._differing:
                await self._send_differing(watermark)
            elif disk.must_compare:
                await self._compare()
            else:
                await self._send_regions(watermark)
        except OSError as error:
            self.interrupted()
            disk.sync_after = trio.current_time() + UNREADABLE_SECONDS
            log.error("disk %s cannot be read: %s", disk.entry.name, error.strerror)
            return False
        return True

    async def _begin(self, hole_regions_max: int) -> range:
        """The regions to read next; none when the link was lost meanwhile."""
        ring, image, epoch = self.disk.ring, self.disk.image, self._epoch
        assert ring is not None
        assert image is not None
        regions = await trio.to_thread.run_sync(
            choose_regions,
            image,
            ring.stale.copy(),
            self.disk.entry.size_bytes,
            hole_regions_max,
        )
        if epoch != self._epoch:
            return range(0)  # what begins now would never be restarted
        for region in regions:
            ring.begin_sync(region)
        return regions

    # --- without asking

    async def _send_regions(self, watermark: int) -> None:
        disk, epoch = self.disk, self._epoch
        ring, image = disk.ring, disk.image
        assert ring is not None
        assert image is not None
        may_use_base = disk.may_use_base()
        stamp = max(watermark, disk.sent_stamp)
        regions = await self._begin(HOLE_REGIONS_MAX)
        if not regions:
            return
        piece = await trio.to_thread.run_sync(
            read_piece, image, regions, disk.entry.size_bytes, stamp
        )
        if epoch != self._epoch:
            return
        for region in regions[len(piece.regions) :]:
            ring.cancel_sync(region)
        await self._put(piece.columns, piece.payload, watermark, may_use_base)

    # --- after asking

    async def _compare(self) -> None:
        disk, epoch = self.disk, self._epoch
        assert disk.image is not None
        regions = await self._begin(COMPARE_REGIONS_MAX)
        if not regions:
            return
        stamp = self._outbox.due.watermark
        start = regions.start * limits.REGION_BYTES
        end = min(regions.stop * limits.REGION_BYTES, disk.entry.size_bytes)
        digests = await trio.to_thread.run_sync(digest_range, disk.image, start, end)
        if epoch != self._epoch:
            return
        token = next(_tokens)
        self._comparing[token] = regions
        compare = Compare(
            self._outbox.known.group_id.bytes,
            disk.id,
            token,
            Purpose.RESYNC,
            stamp,
            start,
            end - start,
            digests,
        )
        await self._outbox.put_comparison(encode_compare(compare))

    def verdict(self, verdict: Verdict) -> bool:
        """Take an answer; False when it is to no question of ours. PeerError when it cannot be."""
        regions = self._comparing.pop(verdict.token, None)
        if regions is None:
            return False
        ring = self.disk.ring
        size_bytes = self.disk.entry.size_bytes
        end = min(regions.stop * limits.REGION_BYTES, size_bytes)
        if verdict.block_count != -(
            -(end - regions.start * limits.REGION_BYTES) // limits.COMPARE_BLOCK_BYTES
        ):
            raise PeerError("the verdict is of another range than was asked for")
        found: dict[int, list[int]] = {}
        for block in verdict.differing:
            at = regions.start * BLOCKS_PER_REGION + block
            found.setdefault(at // BLOCKS_PER_REGION, []).append(at)
        for region in regions:
            if region in found:
                self._differing.append((region, found[region]))
            elif ring is not None:
                ring.end_sync(region)
        return True

    async def _send_differing(self, watermark: int) -> None:
        disk, epoch = self.disk, self._epoch
        assert disk.image is not None
        may_use_base = disk.may_use_base()
        stamp = max(watermark, disk.sent_stamp)
        count_of_regions = min(len(self._differing), DATA_REGIONS_MAX)
        taken = [self._differing.popleft() for _ in range(count_of_regions)]
        ranges = _ranges([block for _, blocks in taken for block in blocks], disk.entry.size_bytes)
        columns, payload = await trio.to_thread.run_sync(read_ranges, disk.image, ranges, stamp)
        if epoch != self._epoch:
            return
        self.differing_bytes += sum(end - start for start, end in ranges)
        await self._put(columns, payload, watermark, may_use_base)

    async def _put(
        self, columns: Columns, payload: bytes, watermark: int, may_use_base: bool
    ) -> None:
        disk, outbox = self.disk, self._outbox
        assert disk.ring is not None
        base = may_use_base and disk.may_use_base()  # a record may have been lost while we read
        frame = encode_frame(
            kind=FrameKind.BASE if base else FrameKind.SYNC,
            group=outbox.known.group_id.bytes,
            source=self._source,
            disk=disk.id,
            number=0 if base else outbox.due.next_number,
            epoch=disk.epoch,
            watermark=outbox.due.watermark if base else max(watermark, outbox.due.watermark),
            ring_id=disk.ring.geometry.ring_id,
            first_sequence=disk.cursor,
            columns=columns,
            payload=payload,
        )
        await outbox.put(frame, columns=columns, sync_epoch=self._epoch)


def _ranges(blocks: list[int], size_bytes: int) -> list[tuple[int, int]]:
    """Blocks, ascending, as ranges of bytes."""
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        start = block * limits.COMPARE_BLOCK_BYTES
        end = min(start + limits.COMPARE_BLOCK_BYTES, size_bytes)
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return ranges
