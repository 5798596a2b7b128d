"""The agent's work for one group: rounds from the rings to the outbox, link or no link.

A round, in this order; the order is what makes watermarks and marks true:

1. note which disks have settled (source_disk.py), before the clock is read
2. read the clock: t, and wait if its lease has run out (storage/clock.py); then look for new rings,
   for one that is made later holds later stamps only
3. say which disks have grown: a ring of the new size has been opened in 2 at the earliest. Then
   wait until appends under way are published; the watermark of the round is t - 1
4. read each ring's gap, then its head; put what was before a new gap, and report it, so that no
   watermark passes one unreported. A receiver that knows of a gap has all records before it:
   whatever is lost later, the gap begins where it says
5. put all records up to the heads seen in 4; the last frame carries the watermark. Without any, a
   frame that carries nothing else, once a second or when base content waits for its number
6. put marks: disks that are consistent again, checkpoints asked for
7. on a direct link: one piece of content (disk_sync.py). The disks take turns, those that owe none
   or whose gap is yet to be reported left out: a piece of each would be 4 MiB of reads times as
   many, and the rings fill meanwhile. Its stamp is the watermark, or that of the disk's last record
   or gap sent (4 and 5 may send some that are younger than 2): everything up to it has been sent
   before, everything newer comes after. The scrub takes its instants between rounds (scrubber.py)

A pump is held while a disk of its group cannot be opened: what that disk's ring holds is older than
any watermark of now. It puts the others' records, under the watermark of before, and nothing else.

Rounds follow each other at once while there is a backlog or something to sync and they get on with
it, else every few milliseconds, so that a frame is worth its header; and while one is under way,
the next one grows. So the busier the receiver, the larger its frames, and the fewer. While nothing
is written they come ever more seldom: an agent has a pump for each group, most of them idle.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

import trio

from blockrepl import limits
from blockrepl.channel.prompt_lock import PromptLock
from blockrepl.errors import StateError
from blockrepl.formats.comparison import Verdict
from blockrepl.formats.frame import EncodedFrame, FrameKind, encode_frame
from blockrepl.formats.marks import (
    CheckpointMark,
    ConsistentMark,
    GapMark,
    GrowMark,
    Mark,
    encode_mark,
)
from blockrepl.formats.messages import AttachDisk
from blockrepl.services.disk_sync import DiskSync
from blockrepl.services.outbox import Outbox
from blockrepl.services.source_disk import SourceDisk
from blockrepl.session.known import Known
from blockrepl.session.release import Release
from blockrepl.storage.clock import SourceClock
from blockrepl.storage.ring import Batch, RingReader
from blockrepl.storage.spool import Spool
from blockrepl.units import MIB, format_bytes, format_instant

log = logging.getLogger(__name__)

POLL_SECONDS = 0.004
IDLE_POLL_SECONDS = 0.05  # at most: what is written after a while of nothing waits so long
IDLE_GROWTH = 1.2  # of the pause, by a round in which nothing was written
GROW_SECONDS = 0.02  # at most, for the sake of a frame that is yet to be acknowledged
SPOOL_POLL_SECONDS = 0.02  # fewer, larger frames while nobody waits for them
SPOOL_FRAMES = 4  # appended at once, and until then a part of the ring: a thread costs half a frame
PRESSURE = 0.5  # of a ring, at which frames leave memory for the spool; of a large ring at more:
HEADROOM_BYTES = 192 * MIB  # left then: what a guest writes in 0.4 s of a stalled disk, and more
LAST_FACTOR = 1.5  # a round's last frame may be so much larger: rather than a small one behind it
BEHIND_BYTES = 2 * limits.FRAME_PAYLOAD_BYTES_TARGET  # under way: a commit's worth, or two
CROWD = 0.25  # of a ring: less than this in memory is not what fills it


@dataclass(eq=False)
class WantedCheckpoint:
    name: str
    kept: bool
    at_ns: int = 0
    durable: trio.Event = field(default_factory=trio.Event)


class Comparer(Protocol):
    """Who sends comparisons through the outbox."""

    def interrupted(self) -> None:
        """What was under way is lost."""
        ...

    def verdict(self, verdict: Verdict) -> bool:
        """Take an answer; False when it is to no question of its own. PeerError."""
        ...


@dataclass(frozen=True, slots=True)
class _Chunk:
    disk: SourceDisk
    batch: Batch


class GroupPump:
    def __init__(
        self,
        disks: list[SourceDisk],
        known: Known,
        due: Known,
        attached: list[AttachDisk],
        spool: Spool,
        source: bytes,
        clock: SourceClock,
        *,
        held: bool = False,
    ) -> None:
        self.disks = disks
        self.held = held
        self.outbox = Outbox(known, due, attached, spool, self)
        self.syncs = {
            disk.id: DiskSync(disk, self.outbox, source, self._catch_up) for disk in disks
        }
        self.comparers: list[Comparer] = list(self.syncs.values())
        self._in_turn = list(self.syncs.values())  # the one that sent a piece last is at the end
        self.between_rounds = PromptLock()
        # Whoever wants the lock of a disk takes this one first: a retirement holds both, for long.
        self.retiring = trio.Lock()
        self._by_id = {disk.id: disk for disk in disks}
        self._wanted: list[WantedCheckpoint] = []
        self._awaited: dict[str, WantedCheckpoint] = {}
        self._source = source
        self._clock = clock
        self.is_stopped = False
        self._pause = POLL_SECONDS
        self._scope = trio.CancelScope()
        self._ended: trio.Event | None = None

    async def run(self) -> None:
        """Work until `stop` or `abandon`, or cancelled."""
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        try:
            with self._scope:
                while not self.is_stopped:
                    await self._round_and_pause()
        finally:
            self._ended.set()

    async def _round_and_pause(self) -> None:
        started = trio.current_time()
        async with self.between_rounds:
            worked = await self._round()
        self._pause = POLL_SECONDS if worked else min(self._pause * IDLE_GROWTH, IDLE_POLL_SECONDS)
        if not (worked and (self._has_backlog() or self._wants_sync())):
            least = POLL_SECONDS if self.outbox.is_direct else SPOOL_POLL_SECONDS
            await trio.sleep_until(started + max(self._pause, least))
            while worked and self._may_grow() and trio.current_time() < started + GROW_SECONDS:
                await trio.sleep(POLL_SECONDS)
        else:
            await trio.lowlevel.checkpoint()

    def _may_grow(self) -> bool:
        """Whether the next frame would wait at the receiver for the one before, and is the better
        the larger: a frame costs the two of them as much as a hundred records.
        """
        return self.outbox.is_direct and self.outbox.is_awaiting and not self._has_backlog()

    async def stop(self) -> None:
        """End after the round under way."""
        self.is_stopped = True
        async with self.between_rounds:
            pass

    def resume(self) -> None:
        """`run` may be called again."""
        self.is_stopped = False

    async def abandon(self) -> None:
        """End for good, wherever it is; nothing of it runs any more afterwards."""
        self.is_stopped = True
        self._scope.cancel()
        if self._ended is not None:
            await self._ended.wait()

    def want_checkpoint(self, wanted: WantedCheckpoint) -> None:
        """Take a checkpoint in the next round. StateError when one of that name is on its way."""
        on_its_way = self._awaited.keys() | {other.name for other in self._wanted}
        if wanted.name in on_its_way:
            raise StateError(
                f"checkpoint {wanted.name!r} is being taken already",
                hint="choose another name",
                code="taken",
            )
        self._wanted.append(wanted)

    # --- the outbox's owner

    def is_pressed(self) -> bool:
        return any(disk.ring is not None and _is_pressed(disk.ring) for disk in self.disks)

    def is_crowded(self) -> bool:
        return any(
            disk.ring is not None and _is_pressed(disk.ring) and disk.ring.fill(disk.cursor) > CROWD
            for disk in self.disks
        )

    def kept(self, release: Release) -> None:
        disk = self._by_id.get(release.disk)
        if disk is not None:
            disk.kept(release.ring_id, release.next_sequence)

    def durable(self, release: Release) -> None:
        for one in self.disks:  # first: what is let go of is known by this number alone
            one.remember(self.outbox.known.next_number)
        if release.checkpoint and (wanted := self._awaited.pop(release.checkpoint, None)):
            wanted.durable.set()
        disk = self._by_id.get(release.disk)
        if disk is None:
            return
        if release.gap_from:
            disk.gap_durable(release.gap_from)
        if release.consistent:
            disk.consistent_durable()
        if disk.ring is None or disk.ring.geometry.ring_id != release.ring_id:
            return  # of a ring that is no more
        if release.next_sequence:
            disk.kept(release.ring_id, release.next_sequence)
            disk.durable = (release.ring_id, release.next_sequence)
        self.syncs[disk.id].durable(release.regions, release.sync_epoch)

    def interrupted(self) -> None:
        for comparer in self.comparers:
            comparer.interrupted()

    def verdict(self, verdict: Verdict) -> None:
        """Take the receiver's answer to a comparison. PeerError when it cannot be."""
        for comparer in self.comparers:
            if comparer.verdict(verdict):
                return

    def is_behind(self) -> bool:
        """Whether records wait for more than it takes to send some."""
        return self._has_backlog() or self.outbox.waiting_bytes >= BEHIND_BYTES

    def _has_backlog(self) -> bool:
        backlog_bytes = sum(
            disk.ring.payload_bytes(disk.cursor, disk.ring.head())
            for disk in self.disks
            if disk.ring is not None
        )
        return backlog_bytes >= limits.FRAME_PAYLOAD_BYTES_TARGET

    def _wants_sync(self) -> bool:
        return (
            not self.held
            and self.outbox.is_direct
            and any(sync.wants() for sync in self.syncs.values())
        )

    def _owes_number(self) -> bool:
        """Whether all content is sent, and waits for a numbered frame behind it."""
        return self.outbox.needs_number and not any(
            sync.is_under_way() for sync in self.syncs.values()
        )

    def _owes_watermark(self, watermark: int) -> bool:
        return any(sync.waits_for_watermark(watermark) for sync in self.syncs.values())

    # --- a round

    async def _round(self) -> bool:
        """True when something was sent."""
        settled = [disk for disk in self.disks if disk.settled()]
        now = self._clock.now()
        await self._lease()
        for disk in self.disks:
            disk.refresh(self.outbox.due.watermark)
        for disk in self.disks:
            await self._put_growths(disk)
        rings = [(disk, disk.ring) for disk in self.disks if disk.ring is not None]
        if not all(ring.quiesce() for _, ring in rings):
            return False  # a writer was stopped inside an append; the next round sees
        watermark = now - 1
        gaps = {disk.id: disk.gap_to_report() for disk in self.disks}
        heads = [(disk, ring.head()) for disk, ring in rings]
        for disk, head in heads:
            if from_ns := gaps[disk.id]:
                await self._put_gap(disk, from_ns, head)
        if self.held:
            return await self._put_records(heads, self.outbox.due.watermark)
        worked = await self._put_records(heads, watermark)
        wanted, self._wanted = self._wanted, []
        for disk in settled:
            if disk.settled():
                consistent = ConsistentMark(disk=UUID(bytes=disk.id), at_ns=watermark)
                disk.became_consistent()
                await self._put_mark(consistent, disk, watermark)
                worked = True
        for checkpoint in wanted:
            await self._put_checkpoint(checkpoint, watermark)
            worked = True
        is_late = watermark - self.outbox.due.watermark > limits.WATERMARK_SECONDS * 1e9
        if not worked and (is_late or self._owes_number() or self._owes_watermark(watermark)):
            await self.outbox.put(self._encode(None, FrameKind.RECORDS, watermark))
        if not self.outbox.is_direct:
            return worked
        return await self._send_piece(watermark) or worked

    async def _send_piece(self, watermark: int) -> bool:
        """One piece of content, of the disk whose turn it is. True when it was sent."""
        due = next((sync for sync in self._in_turn if sync.has_piece(watermark)), None)
        if due is None:
            return False
        self._in_turn.remove(due)
        self._in_turn.append(due)
        return await due.step(watermark)

    async def _catch_up(self, disk: SourceDisk) -> bool:
        """Put the records of a disk that came since; False while one is being appended."""
        if disk.ring is None or not disk.ring.quiesce():
            return False
        await self._put_records([(disk, disk.ring.head())], self.outbox.due.watermark)
        return True

    async def _lease(self) -> None:
        """Wait until no stamp taken before the call can be taken again after a reboot. OSError."""
        if not self._clock.covers(self._clock.now()):
            await trio.to_thread.run_sync(self._clock.renew)

    async def _put_growths(self, disk: SourceDisk) -> None:
        """Say how the disk has grown, before any record in what is new."""
        due = self.outbox.due
        for growth in disk.growths_after(due.disks[disk.id].size_bytes):
            at_ns = max(growth.at_ns, due.watermark + 1)
            mark = GrowMark(disk=UUID(bytes=disk.id), at_ns=at_ns, size_bytes=growth.size_bytes)
            await self._put_mark(mark, disk, due.watermark)

    async def _put_gap(self, disk: SourceDisk, from_ns: int, head: int) -> None:
        """Report a gap, behind the records of before it."""
        assert disk.ring is not None
        first_after = disk.ring.first_after(from_ns, disk.cursor, head)
        watermark = self.outbox.due.watermark
        await self._put_records([(disk, first_after)], watermark)
        reason = disk.gap_reason()
        why = reason or "some records are lost"
        if not reason and (dropped := disk.ring.dropped()):
            size = format_bytes(disk.entry.ring_bytes)
            why = (
                f"{dropped} records were not kept, for its ring of {size} was full (see `disk add "
                "--ring`), the local disk failed, or its server was killed"
            )
        log.log(
            logging.INFO if reason else logging.WARNING,
            "disk %s: %s: history has a gap from %s on, until what differs has been sent again",
            disk.entry.name,
            why,
            format_instant(from_ns),
        )
        disk.gap_reported(from_ns)  # first: its acknowledgement may come while we send
        mark = GapMark(disk=UUID(bytes=disk.id), from_ns=from_ns)
        await self._put_mark(mark, disk, watermark)

    async def _put_records(self, heads: list[tuple[SourceDisk, int]], watermark: int) -> bool:
        """The heads have been read before: the lease is looked at behind them."""
        await self._lease()
        chunks = _chunks(heads)
        chunk = next(chunks, None)
        if chunk is None:
            return False
        built: list[EncodedFrame] = []
        while chunk is not None:
            following = next(chunks, None)
            disk, batch = chunk.disk, chunk.batch
            frame = encode_frame(
                kind=FrameKind.RECORDS,
                group=self.outbox.known.group_id.bytes,
                source=self._source,
                disk=disk.id,
                number=self.outbox.due.next_number + len(built),
                epoch=disk.epoch,
                watermark=self.outbox.due.watermark if following else watermark,
                ring_id=disk.ring.geometry.ring_id if disk.ring else 0,
                first_sequence=batch.first,
                columns=batch.columns,
                payload=batch.payload,
            )
            disk.cursor = batch.after
            disk.sent_stamp = max(disk.sent_stamp, int(batch.columns.stamps[-1]))
            built.append(frame)
            if self.outbox.is_direct or not following or len(built) == SPOOL_FRAMES:
                await self.outbox.put_records(built)
                built = []
            chunk = following
        return True

    async def _put_checkpoint(self, wanted: WantedCheckpoint, watermark: int) -> None:
        wanted.at_ns = watermark
        self._awaited[wanted.name] = wanted
        mark = CheckpointMark(name=wanted.name, at_ns=watermark, kept=wanted.kept)
        await self._put_mark(mark, None, watermark)

    async def _put_mark(self, mark: Mark, disk: SourceDisk | None, watermark: int) -> None:
        # Only the end of a sync: before it, content that stands for skipped records is yet to come.
        ring = disk.ring if disk and isinstance(mark, ConsistentMark) else None
        frame = self._encode(disk, FrameKind.MARK, watermark, encode_mark(mark), ring=ring)
        await self.outbox.put(frame, mark=mark)

    def _encode(
        self,
        disk: SourceDisk | None,
        kind: FrameKind,
        watermark: int,
        payload: bytes = b"",
        ring: RingReader | None = None,
    ) -> EncodedFrame:
        return encode_frame(
            kind=kind,
            group=self.outbox.known.group_id.bytes,
            source=self._source,
            disk=disk.id if disk else bytes(16),
            number=self.outbox.due.next_number,
            epoch=disk.epoch if disk else 0,
            watermark=watermark,
            ring_id=ring.geometry.ring_id if ring else 0,
            first_sequence=disk.cursor if disk and ring else 0,
            payload=payload,
        )


def _is_pressed(ring: RingReader) -> bool:
    """The spool costs as much as sending does: what the ring can hold is not to go there."""
    return ring.fill() > max(PRESSURE, 1 - HEADROOM_BYTES / ring.geometry.payload_bytes)


def _chunks(heads: list[tuple[SourceDisk, int]]) -> Iterator[_Chunk]:
    """All records up to the heads, in frames' worth and what is left, the disks taking turns."""
    waiting = [(disk, disk.cursor, head) for disk, head in heads]
    while waiting:
        further = []
        for disk, first, head in waiting:
            if disk.ring is None or first >= head:
                continue
            size_bytes = limits.FRAME_PAYLOAD_BYTES_TARGET
            left_bytes = disk.ring.payload_bytes(first, head)
            if left_bytes <= LAST_FACTOR * size_bytes:
                size_bytes = left_bytes
            batch = disk.ring.take(first, head, size_bytes, limits.FRAME_RECORDS_MAX)
            yield _Chunk(disk, batch)
            further.append((disk, batch.after, head))
        waiting = further
