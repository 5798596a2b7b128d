"""The agent's work for one group in one session: rounds from ring to channel.

A round, in this order; the order is what makes watermarks and marks true:

1. note which disks have settled (source_disk.py), before the clock is read
2. read the clock: t; then look for new rings, for one that is made later holds later stamps only
3. wait until appends under way are published; the watermark of the round is t - 1
4. read each ring's gap; report new gaps first, so that no watermark passes one unreported
5. send all records up to the heads seen in 3; the last frame carries the watermark
6. send marks: disks that are consistent again, checkpoints asked for
7. send one piece of each disk that has stale regions, unless its gap is yet to be reported. Its
   stamp is the watermark, or that of the disk's last record or gap sent (4 and 5 may send some that
   are younger than 2): everything up to it has been sent before, everything newer comes after

A pump is held while a disk of its group cannot be opened: what that disk's ring holds is older than
any watermark of now. It sends the others' records, under the watermark of before, and nothing else.

Rounds follow each other at once while there is a backlog or something to sync, else every few
milliseconds, so that a frame is worth its header.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from uuid import UUID

import trio

from blockrepl import limits
from blockrepl.errors import StateError
from blockrepl.formats.frame import Buffer, EncodedFrame, FrameKind, encode_frame
from blockrepl.formats.marks import (
    CheckpointMark,
    ConsistentMark,
    GapMark,
    encode_mark,
)
from blockrepl.services.source_disk import SourceDisk
from blockrepl.session.sender import GroupSender, Release
from blockrepl.storage.clock import SourceClock
from blockrepl.storage.pieces import choose_regions, read_piece
from blockrepl.storage.ring import Batch

log = logging.getLogger(__name__)

POLL_SECONDS = 0.004
IDLE_POLL_SECONDS = 0.01
UNREADABLE_SECONDS = 5.0  # until a disk whose image gave an error is read again

SendFrame = Callable[[tuple[Buffer, ...]], Awaitable[None]]


@dataclass(eq=False)
class WantedCheckpoint:
    name: str
    kept: bool
    at_ns: int = 0
    durable: trio.Event = field(default_factory=trio.Event)


@dataclass(frozen=True, slots=True)
class _Chunk:
    disk: SourceDisk
    batch: Batch


class GroupPump:
    def __init__(
        self,
        disks: list[SourceDisk],
        sender: GroupSender,
        source: bytes,
        clock: SourceClock,
        send: SendFrame,
        *,
        held: bool = False,
    ) -> None:
        self.disks = disks
        self.held = held
        self.sender = sender
        self.sent_bytes = 0
        self._wanted: list[WantedCheckpoint] = []
        self._awaited: dict[str, WantedCheckpoint] = {}
        self._source = source
        self._clock = clock
        self._send = send
        self._acknowledged = trio.Event()
        self._watermark = sender.durable_watermark  # last one sent
        self._stopping = False
        self.between_rounds = trio.StrictFIFOLock()

    async def run(self) -> None:
        """Work until `stop`, or cancelled (then the channel is of no more use)."""
        while not self._stopping:
            started = trio.current_time()
            async with self.between_rounds:
                worked = await self._round()
            if self._backlog_bytes() < limits.FRAME_PAYLOAD_BYTES_TARGET and not self._wants_sync():
                pause = POLL_SECONDS if worked else IDLE_POLL_SECONDS
                await trio.sleep_until(started + pause)
            else:
                await trio.lowlevel.checkpoint()

    async def stop(self) -> None:
        """End after the round under way."""
        self._stopping = True
        async with self.between_rounds:
            pass

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

    def acknowledged(self, messages: int, number: int) -> None:
        """Free what an acknowledgement covers. Raises PeerError."""
        disks = {disk.id: disk for disk in self.disks}
        for release in self.sender.acknowledged(messages, number):
            self._release(disks.get(release.disk), release)
        self._acknowledged.set()
        self._acknowledged = trio.Event()

    def _release(self, disk: SourceDisk | None, release: Release) -> None:
        if release.checkpoint and (wanted := self._awaited.pop(release.checkpoint, None)):
            wanted.durable.set()
        if disk is None:
            return
        if release.gap_from:
            disk.gap_durable(release.gap_from)
        if disk.ring is None or disk.ring.geometry.ring_id != release.ring_id:
            return  # of a ring that is no more
        if release.next_sequence:
            disk.ring.release(release.next_sequence)
            disk.ring.set_durable(release.next_sequence)
        for region in release.regions:
            disk.ring.end_sync(region)
        if release.consistent:
            disk.consistent_durable()

    def _backlog_bytes(self) -> int:
        return sum(
            disk.ring.used_bytes(disk.ring.head()) - self.sender.in_flight_bytes
            for disk in self.disks
            if disk.ring is not None and disk.ring.head() != disk.cursor
        )

    def _wants_sync(self) -> bool:
        return not self.held and any(disk.may_sync() for disk in self.disks)

    # --- a round

    async def _round(self) -> bool:
        """True when something was sent."""
        settled = [disk for disk in self.disks if disk.settled()]
        now = self._clock.now()
        self._clock.renew()
        for disk in self.disks:
            disk.refresh(self._watermark)
        rings = [(disk, disk.ring) for disk in self.disks if disk.ring is not None]
        if not all(ring.quiesce() for _, ring in rings):
            return False  # a writer was stopped inside an append; the next round sees
        watermark = now - 1
        heads = [(disk, ring.head()) for disk, ring in rings]
        gaps = [(disk, disk.gap_to_report()) for disk in self.disks]
        for disk, from_ns in gaps:
            if from_ns:
                disk.gap_reported(from_ns)  # first: its acknowledgement may come while we send
                await self._send_mark(
                    GapMark(disk=UUID(bytes=disk.id), from_ns=from_ns),
                    disk,
                    self._watermark,
                    Release(disk.id, gap_from=from_ns),
                )
        if self.held:
            return await self._send_records(heads, self._watermark)
        worked = await self._send_records(heads, watermark)
        wanted, self._wanted = self._wanted, []
        for disk in settled:
            if disk.settled():
                await self._send_consistent(disk, watermark)
                worked = True
        for checkpoint in wanted:
            await self._send_checkpoint(checkpoint, watermark)
            worked = True
        if not worked and watermark - self._watermark > limits.WATERMARK_SECONDS * 1e9:
            await self._room(0)
            await self._send_frame(self._encode(None, FrameKind.RECORDS, watermark), Release())
        pieces = [await self._send_piece(disk, watermark) for disk, _ in rings]
        return worked or any(pieces)

    async def _send_records(self, heads: list[tuple[SourceDisk, int]], watermark: int) -> bool:
        chunks = _chunks(heads)
        chunk = next(chunks, None)
        if chunk is None:
            return False
        while chunk is not None:
            following = next(chunks, None)
            disk, batch = chunk.disk, chunk.batch
            ring_id = disk.ring.geometry.ring_id if disk.ring else 0
            await self._room(len(batch.payload))
            frame = encode_frame(
                kind=FrameKind.RECORDS,
                group=self.sender.group,
                source=self._source,
                disk=disk.id,
                number=self.sender.take_number(),
                epoch=disk.epoch,
                watermark=self._watermark if following else watermark,
                ring_id=ring_id,
                first_sequence=batch.first,
                columns=batch.columns,
                payload=batch.payload,
            )
            disk.cursor = batch.after
            disk.sent_stamp = max(disk.sent_stamp, int(batch.columns.stamps[-1]))
            await self._send_frame(frame, Release(disk.id, ring_id, next_sequence=batch.after))
            chunk = following
        return True

    async def _send_consistent(self, disk: SourceDisk, watermark: int) -> None:
        mark = ConsistentMark(disk=UUID(bytes=disk.id), at_ns=watermark)
        ring_id = disk.ring.geometry.ring_id if disk.ring else 0
        await self._send_mark(mark, disk, watermark, Release(disk.id, ring_id, consistent=True))
        disk.became_consistent()

    async def _send_checkpoint(self, wanted: WantedCheckpoint, watermark: int) -> None:
        wanted.at_ns = watermark
        self._awaited[wanted.name] = wanted
        mark = CheckpointMark(name=wanted.name, at_ns=watermark, kept=wanted.kept)
        await self._send_mark(mark, None, watermark, Release(checkpoint=wanted.name))

    async def _send_piece(self, disk: SourceDisk, watermark: int) -> bool:
        ring, image = disk.ring, disk.image
        if ring is None or image is None or disk.gap_in_flight or not disk.may_sync():
            return False
        if disk.state == "ready":
            return False  # lost since step 4: the next round reports the gap
        stamp = max(watermark, disk.sent_stamp)
        size_bytes = disk.entry.size_bytes
        base = disk.may_use_base()
        regions = range(0)
        try:
            regions = await trio.to_thread.run_sync(
                choose_regions, image, ring.stale.copy(), size_bytes
            )
            for region in regions:
                ring.begin_sync(region)
            piece = await trio.to_thread.run_sync(read_piece, image, regions, size_bytes, stamp)
        except OSError as error:
            for region in regions:
                ring.cancel_sync(region)
            disk.sync_after = trio.current_time() + UNREADABLE_SECONDS
            log.error("disk %s cannot be read: %s", disk.entry.name, error.strerror)
            return False
        for region in regions[len(piece.regions) :]:
            ring.cancel_sync(region)
        base = base and disk.may_use_base()
        await self._room(len(piece.payload))
        frame = encode_frame(
            kind=FrameKind.BASE if base else FrameKind.SYNC,
            group=self.sender.group,
            source=self._source,
            disk=disk.id,
            number=0 if base else self.sender.take_number(),
            epoch=disk.epoch,
            watermark=self._watermark if base else watermark,
            ring_id=ring.geometry.ring_id,
            first_sequence=disk.cursor,
            columns=piece.columns,
            payload=piece.payload,
        )
        release = Release(disk.id, ring.geometry.ring_id, regions=tuple(piece.regions))
        await self._send_frame(frame, release)
        return True

    # --- sending

    async def _send_mark(
        self,
        mark: GapMark | ConsistentMark | CheckpointMark,
        disk: SourceDisk | None,
        watermark: int,
        release: Release,
    ) -> None:
        await self._room(limits.MARK_BYTES_MAX)
        await self._send_frame(
            self._encode(disk, FrameKind.MARK, watermark, encode_mark(mark)), release
        )

    def _encode(
        self,
        disk: SourceDisk | None,
        kind: FrameKind,
        watermark: int,
        payload: bytes = b"",
    ) -> EncodedFrame:
        return encode_frame(
            kind=kind,
            group=self.sender.group,
            source=self._source,
            disk=disk.id if disk else bytes(16),
            number=self.sender.take_number(),
            epoch=disk.epoch if disk else 0,
            watermark=watermark,
            payload=payload,
        )

    async def _room(self, payload_bytes: int) -> None:
        """Wait until the window has room for a frame with that payload."""
        while not self.sender.has_room(payload_bytes + limits.FRAME_OVERHEAD_BYTES_MAX):
            await self._acknowledged.wait()

    async def _send_frame(self, frame: EncodedFrame, release: Release) -> None:
        size_bytes = frame.header.frame_bytes
        self._watermark = max(self._watermark, frame.header.watermark)
        self.sent_bytes += size_bytes
        self.sender.sent(size_bytes, frame.header.watermark, release)
        await self._send(tuple(frame.buffers))


def _chunks(heads: list[tuple[SourceDisk, int]]) -> Iterator[_Chunk]:
    """All records up to the heads, in frames' worth, the disks taking turns."""
    waiting = [(disk, disk.cursor, head) for disk, head in heads]
    while waiting:
        further = []
        for disk, first, head in waiting:
            if disk.ring is None or first >= head:
                continue
            batch = disk.ring.take(
                first, head, limits.FRAME_PAYLOAD_BYTES_TARGET, limits.FRAME_RECORDS_MAX
            )
            yield _Chunk(disk, batch)
            further.append((disk, batch.after, head))
        waiting = further
