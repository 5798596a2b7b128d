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

What is in the base image alone, sent or found there to be the same, is done when a numbered frame
behind it is acknowledged too (session/release.py).

A write that finds no room in the ring makes its region stale again, in whatever state it is. Then
the region is begun anew, in another turn, and what comes back of the earlier one ends nothing.
When the link is lost, all that is not done is stale again.

Why the second reading: what is sent must be newer than everything sent before it and older than
everything sent after (its stamp says so), and the verdict takes a while. Why a block that is the
same may be left out: the replica had it at the instant of the comparison, and what changed it since
has a record of its own, or made it stale.

Why records are sent between the marking and the reading: a write that found no room before the
region was marked is in its content and nowhere else. Records of before that write must not come
after the content, or they would hide it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import count

import trio

from blockrepl import limits
from blockrepl.errors import PeerError, StorageError
from blockrepl.formats.comparison import Compare, Purpose, Verdict, encode_compare
from blockrepl.formats.frame import Columns, FrameKind, encode_frame
from blockrepl.model.unreadable import Unreadable
from blockrepl.services.outbox import Outbox
from blockrepl.services.source_disk import SourceDisk
from blockrepl.session.release import Release
from blockrepl.storage.pieces import (
    DATA_REGIONS_MAX,
    HOLE_REGIONS_MAX,
    choose_regions,
    digest_range,
    read_piece,
    read_ranges,
)

log = logging.getLogger(__name__)

COMPARISONS_MAX = 4  # under way per disk: hides the round trip
AHEAD_BYTES = limits.WINDOW_BYTES // 2  # of frames that wait: content must not hold up records
COMPARE_REGIONS_MAX = limits.COMPARE_BYTES_MAX // limits.REGION_BYTES
BLOCKS_PER_REGION = limits.REGION_BYTES // limits.COMPARE_BLOCK_BYTES
tokens = count(1)  # of all comparisons of this process


class DiskSync:
    """The content that one disk still owes. ``differing_bytes`` counts what verdicts found.

    ``problem``: why some of it cannot be sent now.
    """

    def __init__(
        self,
        disk: SourceDisk,
        outbox: Outbox,
        source: bytes,
        catch_up: Callable[[SourceDisk], Awaitable[bool]],
    ) -> None:
        self.disk = disk
        self.differing_bytes = 0
        self.problem: StorageError | None = None
        self._outbox = outbox
        self._source = source
        self._first_watermark = outbox.due.watermark  # as an earlier pump left it
        self._catch_up = catch_up  # put all records of the disk there are; False: not now
        self._epoch = 1
        self._turn = 0  # counts what was begun, and what is sent of it
        self._turns: dict[int, int] = {}  # region -> the turn that ends it
        # token -> regions, their turn, where the last one ended: the disk may grow meanwhile
        self._comparing: dict[int, tuple[range, int, int]] = {}
        self._differing: deque[tuple[int, int, list[int]]] = deque()  # region, turn, its blocks
        self._unreadable = Unreadable()
        self._reading: Sequence[int] = ()  # the regions whose content is being looked at

    def interrupted(self) -> None:
        """What was under way is lost."""
        self._epoch += 1
        self._turns.clear()
        self._comparing.clear()
        self._differing.clear()
        if self.disk.ring is not None:
            self.disk.ring.restart_syncs()

    def durable(self, regions: tuple[int, ...], turn: int) -> None:
        """Their content, sent in that turn, is durable."""
        for region in regions:
            self._end(region, turn)

    def _end(self, region: int, turn: int) -> None:
        """Unless it was marked stale, and begun, again since that turn."""
        if self._turns.get(region) == turn and self.disk.ring is not None:
            del self._turns[region]
            self.disk.ring.end_sync(region)

    def wants(self) -> bool:
        """Whether there is something to read now."""
        ring = self.disk.ring
        if ring is None or self._outbox.waiting_bytes >= AHEAD_BYTES:
            return False
        if self._differing:
            return True
        if len(self._comparing) >= COMPARISONS_MAX or not ring.needs_sync():
            return False
        return bool(self._unreadable.choice(ring.stale, trio.current_time()).any())

    def is_under_way(self) -> bool:
        """Whether there is something to read, now or later, or to be told by the receiver."""
        ring = self.disk.ring
        return bool(self._comparing or self._differing or (ring is not None and ring.needs_sync()))

    def has_piece(self, watermark: int) -> bool:
        """Whether `step` may be called now."""
        disk = self.disk
        # ready: lost since the gaps were looked at; the next round reports it
        is_due = not disk.gap_in_flight and disk.state != "ready" and self.wants()
        return is_due and not self.waits_for_watermark(watermark)

    def waits_for_watermark(self, watermark: int) -> bool:
        """Whether a comparison needs a newer watermark: what lies above the one of before may have
        been sent, and is on top of what would be compared. ``watermark`` would be the next: with a
        clock that has gone back it is no newer, and there is none to wait for.
        """
        is_new = self._outbox.due.watermark <= self._first_watermark < watermark
        return is_new and self.disk.must_compare and self.wants()

    async def step(self, watermark: int) -> bool:
        """Read and send one piece. ``watermark``: of the frames sent so far. True when it did."""
        disk = self.disk
        try:
            if self._differing:
                await self._send_differing(watermark)
            elif disk.must_compare:
                await self._compare()
            else:
                await self._send_regions(watermark)
        except OSError as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: OSError) -> None:
        """The regions that are being looked at cannot be read: put them back, and go on."""
        disk, ring = self.disk, self.disk.ring
        for region in self._reading:
            self._turns.pop(region, None)
            if ring is not None:
                ring.cancel_sync(region)
        self._unreadable.failed(self._reading, trio.current_time())
        if regions := self._unreadable.regions():
            is_news = self.problem is None
            places = ", ".join(str(region * limits.REGION_BYTES) for region in regions[:3])
            more = f" and {len(regions) - 3} more" if len(regions) > 3 else ""
            self.problem = StorageError(
                f"disk {disk.entry.name} cannot be read at byte {places}{more}: {error.strerror}",
                hint=f"look at {disk.entry.image} and its device; the rest of it is replicated",
                code="unreadable",
            )
            if is_news:
                log.error("%s", self.problem)

    def _were_read(self) -> None:
        self._unreadable.were_read(self._reading)
        if self.problem is not None and not self._unreadable.regions():
            self.problem = None

    def _may_send(self, epoch: int) -> bool:
        """Whether what was read since that epoch is to be sent.

        The link may have been lost, or a server started on another file than was read: behind the
        round's look at it, and before records that are sent by now.
        """
        if self.disk.is_written_elsewhere():
            self.interrupted()
        return epoch == self._epoch

    async def _begin(self, hole_regions_max: int) -> range:
        """The regions to read next; none when the link was lost meanwhile."""
        ring, image, epoch = self.disk.ring, self.disk.image, self._epoch
        assert ring is not None
        assert image is not None
        stale = self._unreadable.choice(ring.stale.copy(), trio.current_time())
        self._reading = (int(stale.argmax()),)
        regions = await trio.to_thread.run_sync(
            choose_regions,
            image,
            stale,
            self.disk.entry.size_bytes,
            hole_regions_max,
        )
        if epoch != self._epoch:
            return range(0)  # what begins now would never be restarted
        self._turn += 1
        for region in regions:
            ring.begin_sync(region)
            self._turns[region] = self._turn
        self._reading = regions
        if not await self._catch_up(self.disk):
            for region in regions:
                ring.cancel_sync(region)
            return range(0)
        return regions if epoch == self._epoch else range(0)

    # --- without asking

    async def _send_regions(self, watermark: int) -> None:
        disk, epoch = self.disk, self._epoch
        ring, image = disk.ring, disk.image
        assert ring is not None
        assert image is not None
        may_use_base = disk.may_use_base()
        regions = await self._begin(HOLE_REGIONS_MAX)
        if not regions:
            return
        turn = self._turns[regions[0]]
        stamp = max(watermark, disk.sent_stamp)
        piece = await trio.to_thread.run_sync(
            read_piece, image, regions, disk.entry.size_bytes, stamp
        )
        self._were_read()
        if not self._may_send(epoch):
            return
        for region in regions[len(piece.regions) :]:
            ring.cancel_sync(region)
        await self._put(piece.columns, piece.payload, watermark, may_use_base, turn)

    # --- after asking

    async def _compare(self) -> None:
        disk, epoch = self.disk, self._epoch
        assert disk.image is not None
        regions = await self._begin(COMPARE_REGIONS_MAX)
        if not regions:
            return
        turn = self._turns[regions[0]]
        stamp = max(self._outbox.due.watermark, disk.sent_stamp)
        start = regions.start * limits.REGION_BYTES
        end = min(regions.stop * limits.REGION_BYTES, disk.entry.size_bytes)
        digests = await trio.to_thread.run_sync(digest_range, disk.image, start, end)
        self._were_read()
        if not self._may_send(epoch):
            return
        token = next(tokens)
        self._comparing[token] = (regions, turn, end)
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
        if verdict.token not in self._comparing:
            return False
        regions, turn, end = self._comparing.pop(verdict.token)
        if verdict.block_count != -(
            -(end - regions.start * limits.REGION_BYTES) // limits.COMPARE_BLOCK_BYTES
        ):
            raise PeerError("the verdict is of another range than was asked for")
        found: dict[int, list[int]] = {}
        for block in verdict.differing:
            at = regions.start * BLOCKS_PER_REGION + block
            found.setdefault(at // BLOCKS_PER_REGION, []).append(at)
        self._differing += [(region, turn, found[region]) for region in regions if region in found]
        self._same(tuple(region for region in regions if region not in found), turn)
        return True

    def _same(self, regions: tuple[int, ...], turn: int) -> None:
        disk = self.disk
        if disk.state != "empty":
            self.durable(regions, turn)
        elif disk.ring is not None:
            ring_id = disk.ring.geometry.ring_id
            self._outbox.found_in_base(Release(disk.id, ring_id, regions=regions, sync_epoch=turn))

    async def _send_differing(self, watermark: int) -> None:
        disk, epoch = self.disk, self._epoch
        assert disk.image is not None
        may_use_base = disk.may_use_base()
        stamp = max(watermark, disk.sent_stamp)
        count_of_regions = min(len(self._differing), DATA_REGIONS_MAX)
        taken = [self._differing.popleft() for _ in range(count_of_regions)]
        self._reading = [region for region, _, _ in taken]
        self._turn += 1
        turn = self._turn
        for region, begun, _ in taken:
            if self._turns.get(region) == begun:
                self._turns[region] = turn
        blocks = [block for _, _, found in taken for block in found]
        ranges = _ranges(blocks, disk.entry.size_bytes)
        columns, payload = await trio.to_thread.run_sync(read_ranges, disk.image, ranges, stamp)
        self._were_read()
        if not self._may_send(epoch):
            return
        self.differing_bytes += sum(end - start for start, end in ranges)
        await self._put(columns, payload, watermark, may_use_base, turn)

    async def _put(
        self, columns: Columns, payload: bytes, watermark: int, may_use_base: bool, turn: int
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
        await outbox.put(frame, columns=columns, sync_epoch=turn)


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
