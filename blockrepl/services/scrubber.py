"""The scrub at the source: proves, region by region, that the replica equals the disk.

One region's way:

1. between two rounds of the pump: the instant. Its stamp is the watermark, or that of the disk's
   last record sent, whichever is later: every record of the disk up to it was sent, and everything
   that comes is newer. Its place in the ring is the first record that was not sent
2. beside the pump, in a worker thread: the region is read and digested
3. is it quiet (storage/ring.py): no write began or ended on it from 1 to the end of 2, and no
   record at or after that place touches it? Then what was read is exactly what the records up to
   the stamp made of it. Otherwise it is read again later
4. COMPARE with that stamp. It may stand behind younger records: the receiver compares with its view
   at exactly the stamp
5. the verdict: the same, a proof; or it differs

A disk without a ring has no server: nothing can write to it before a ring is made, so it is quiet
when there is still none after the reading, and none came and went.

Only disks that are ready are scrubbed, over a direct link, and only after this pump's first own
watermark: records that an earlier one sent may be younger than the watermark it left.

A region that differs is doubted (source_disk.py): a gap from now on, in which the region is
compared and what differs is sent, ended by a consistent mark. It is read again right afterwards, so
a pass ends with its proof, and nothing but that proof heals the mismatch in the receiver's catalog
(storage/proofs.py). The gap says that history has a new beginning, and no more: the instants before
it stay reachable as they are. That the region's bytes are not to be trusted from its last proof to
the heal is what the mismatch says. Finds that come together are sent together, in one gap.

Nothing here holds up replication. The pump waits only while an instant is taken; of the receiver's
places for comparisons (limits.COMPARISONS_MAX) an agent's scrubs together take UNDER_WAY_MAX, and
how fast they read is said in scrub_pace.py.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

import numpy as np
import trio

from blockrepl import limits
from blockrepl.errors import BlockreplError, PeerError
from blockrepl.formats.comparison import Compare, Purpose, Verdict, block_count, encode_compare
from blockrepl.formats.messages import ScrubPass
from blockrepl.model.scrub import RETRY_SECONDS, Pass, Read, ScrubPlan, Wait
from blockrepl.services.disk_sync import tokens
from blockrepl.services.group_pump import GroupPump
from blockrepl.services.scrub_pace import UNDER_WAY_MAX, Meter, ScrubPool
from blockrepl.services.source_disk import SourceDisk
from blockrepl.storage.clock import SourceClock
from blockrepl.storage.pieces import count_data, digest_range
from blockrepl.storage.ring import Position, RingReader, ring_path
from blockrepl.units import NANOSECONDS_PER_SECOND, format_instant

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1  # how often a disk that cannot be scrubbed now is looked at
HEAL_SECONDS = 0.4  # finds within it are healed in one gap
FOUND = "the scrub found a difference"
UNREADABLE_SECONDS = 5.0  # until a disk whose image gave an error is read again

assert UNDER_WAY_MAX < limits.COMPARISONS_MAX  # a resync has places left
assert RETRY_SECONDS[0] > HEAL_SECONDS  # what differs is read again when it is healed


@dataclass(frozen=True, slots=True)
class Instant:
    """A place between two records of a disk; what is read of it afterwards may be held to it."""

    disk: SourceDisk
    image: int  # a descriptor of our own
    stamp: int
    ring: RingReader | None
    position: Position | None
    rings_seen: int

    @classmethod
    def now(cls, disk: SourceDisk, watermark: int) -> Instant | None:
        """Between two rounds. None: what the replica lacks, it is known to lack."""
        if disk.state != "ready" or disk.gap_in_flight:
            return None
        ring, stamp = disk.ring, max(watermark, disk.sent_stamp)
        if ring is None:
            image = os.open(disk.entry.image, os.O_RDONLY | os.O_CLOEXEC)
            return cls(disk, image, stamp, None, None, disk.rings_seen)
        if ring.needs_sync() or ring.is_syncing() or ring.gap_from():
            return None
        assert disk.image is not None
        position = Position(disk.cursor, ring.dropped())
        return cls(disk, os.dup(disk.image), stamp, ring, position, disk.rings_seen)

    def is_quiet(self, start: int, end: int) -> bool:
        """Whether what was read of the image since is what it held at the instant."""
        if self.ring is None or self.position is None:
            is_there = ring_path(self.disk.id).exists()
            return not is_there and self.disk.rings_seen == self.rings_seen
        # Its file last: a ring made in its place is filled by a server that was started since.
        return self.ring.is_quiet(start, end, self.position) and self.ring.is_current()


@dataclass(eq=False)
class DiskScrub:
    """``found`` counts regions that differed in the pass under way."""

    plan: ScrubPlan
    under_way: dict[int, tuple[Read, int]] = field(default_factory=dict)  # by token; stamp
    doubted: set[int] = field(default_factory=set)  # regions to heal
    doubted_since: float = math.inf
    not_before: float = 0.0
    last_pass: Pass | None = None  # that `found` counts for
    found: int = 0


class GroupScrub:
    """The scrubs of a group's disks. They outlive pumps: a pass goes on with the next one."""

    def __init__(self, pool: ScrubPool, clock: SourceClock) -> None:
        self.disks: dict[bytes, DiskScrub] = {}
        self._pool = pool
        self._clock = clock
        self._pump: GroupPump | None = None
        self._first_watermark = 0
        self._meter: Meter
        self._changed = trio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_disks)
            nursery.start_soon(self._heal_disks)

    def follow(self, pump: GroupPump | None) -> None:
        """Work with this pump from now on."""
        self.interrupted()
        self._pump = pump
        if pump is None:
            return
        self._first_watermark = pump.outbox.due.watermark
        self._meter = Meter(pump.outbox.sent_bytes)
        ids = {disk.id for disk in pump.disks}
        for gone in self.disks.keys() - ids:
            self._pool.remove(self.disks.pop(gone).plan)
        for disk in pump.disks:
            size_bytes = disk.entry.size_bytes
            before = self.disks.get(disk.id)
            if before is not None and before.plan.size_bytes == size_bytes:
                continue
            plan = ScrubPlan(size_bytes, trio.current_time(), rate=self._pool.rate)
            self._pool.add(plan)
            scrub = self.disks[disk.id] = DiskScrub(plan)
            if before is not None:  # it has grown: begin anew; what is to be sent again still is
                self._pool.remove(before.plan)
                scrub.doubted, scrub.doubted_since = before.doubted, before.doubted_since

    def close(self) -> None:
        self.follow(None)
        for scrub in self.disks.values():
            self._pool.remove(scrub.plan)

    def begin_now(self) -> None:
        """Begin a pass of every disk, at the rate of one that is waited for."""
        for scrub in self.disks.values():
            scrub.plan.begin_now(trio.current_time())
            scrub.not_before = 0.0
        self._notify()

    def passes(self) -> dict[bytes, ScrubPass]:
        """The last pass of each disk that has begun one."""
        return {
            disk: self._told(disk, scrub)
            for disk, scrub in self.disks.items()
            if scrub.plan.current is not None
        }

    def _told(self, disk: bytes, scrub: DiskScrub) -> ScrubPass:
        current = scrub.plan.current
        assert current is not None
        return ScrubPass(
            disk=UUID(bytes=disk),
            started_ns=self._wall(current.started),
            ended_ns=None if current.ended is None else self._wall(current.ended),
            is_asked_for=current.is_asked_for,
            progress=current.progress,
            skipped_regions=current.skipped,
            differing_regions=scrub.found if scrub.last_pass is current else 0,
            bytes_per_second=0.0 if current.ended is not None else scrub.plan.rate_now,
        )

    def _wall(self, moment: float) -> int:
        ago = trio.current_time() - moment
        # To the millisecond: the same moment is told the same way each time.
        return round((self._clock.now() / NANOSECONDS_PER_SECOND - ago) * 1000) * 1_000_000

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # --- what the pump tells

    def interrupted(self) -> None:
        """Comparisons under way are lost."""
        for scrub in self.disks.values():
            for _ in range(len(scrub.under_way)):
                self._pool.places.release()
            scrub.under_way.clear()
            scrub.plan.interrupted(trio.current_time())
            scrub.not_before = 0.0

    def verdict(self, verdict: Verdict) -> bool:
        """Take an answer; False when it is to no question of ours. PeerError when it cannot be."""
        for disk, scrub in self.disks.items():
            if verdict.token in scrub.under_way:
                read, stamp = scrub.under_way.pop(verdict.token)
                self._pool.places.release()
                if verdict.block_count != block_count(read.length):
                    raise PeerError("the verdict is of another range than was asked for")
                self._judge(disk, scrub, read, stamp, verdict.differing)
                self._notify()
                return True
        return False

    def _judge(
        self, disk: bytes, scrub: DiskScrub, read: Read, stamp: int, differing: tuple[int, ...]
    ) -> None:
        now = trio.current_time()
        scrub.not_before = 0.0
        if not differing:
            scrub.plan.answered(read, now)
            return
        if scrub.last_pass is not scrub.plan.current:
            scrub.last_pass, scrub.found = scrub.plan.current, 0
        scrub.found += read.region not in scrub.doubted
        scrub.doubted.add(read.region)
        scrub.doubted_since = min(scrub.doubted_since, now)
        scrub.plan.disturbed(read, now)  # read again when it is healed
        first = read.offset + differing[0] * limits.COMPARE_BLOCK_BYTES
        last = read.offset + (differing[-1] + 1) * limits.COMPARE_BLOCK_BYTES
        log.error(
            "disk %s: the replica differs from it at %s, in %d blocks between bytes %d and %d; "
            "they are sent again",
            self._name(disk),
            format_instant(stamp),
            len(differing),
            first,
            min(last, read.offset + read.length) - 1,
        )

    def _name(self, disk: bytes) -> str:
        pumped = self._pump.disks if self._pump else []
        return next((one.entry.name for one in pumped if one.id == disk), disk.hex())

    # --- reading

    async def _read_disks(self) -> None:
        while True:
            changed, pump = self._changed, self._pump
            until = trio.current_time() + LOOK_SECONDS
            if pump is not None and pump.outbox.is_direct and not pump.held:
                steps = [await self._step(pump, disk) for disk in list(pump.disks)]
                until = min([until, *steps])
            with trio.move_on_at(until):
                await changed.wait()
            await trio.lowlevel.checkpoint()

    async def _step(self, pump: GroupPump, disk: SourceDisk) -> float:
        """Read one region of a disk, if it is time; when to look again."""
        scrub = self.disks.get(disk.id)
        if scrub is None:
            return math.inf
        if trio.current_time() < scrub.not_before:
            return scrub.not_before
        await self._pool.places.acquire()
        is_asked = False
        try:
            found = await self._take_instant(pump, disk, scrub)
            if isinstance(found, Wait):
                scrub.not_before = max(scrub.not_before, found.until)
                return scrub.not_before
            is_asked = await self._ask(pump, scrub, *found)
        finally:
            if not is_asked:
                self._pool.places.release()
        return 0.0

    async def _take_instant(
        self, pump: GroupPump, disk: SourceDisk, scrub: DiskScrub
    ) -> tuple[Instant, Read] | Wait:
        later = Wait(trio.current_time() + LOOK_SECONDS)
        async with pump.between_rounds:
            watermark = pump.outbox.due.watermark
            if pump is not self._pump or watermark <= self._first_watermark:
                return later
            try:
                instant = Instant.now(disk, watermark)
            except OSError as error:
                self._cannot_read(scrub, disk, error)
                return later
            if instant is None:
                return later
            replicated = math.inf if pump.is_behind() else self._meter.read(pump.outbox.sent_bytes)
            scrub.plan.rate = self._pool.share(scrub.plan, replicated)
            read = scrub.plan.next(trio.current_time())
            if isinstance(read, Wait):
                os.close(instant.image)
                return read
            return instant, read

    def _cannot_read(self, scrub: DiskScrub, disk: SourceDisk, error: OSError) -> None:
        scrub.not_before = trio.current_time() + UNREADABLE_SECONDS
        log.error("disk %s cannot be read: %s", disk.entry.name, error.strerror)

    async def _ask(self, pump: GroupPump, scrub: DiskScrub, instant: Instant, read: Read) -> bool:
        """Read at the instant, and compare. True when a verdict will come."""
        try:
            found = await trio.to_thread.run_sync(partial(_read, instant, read))
        except OSError as error:
            self._cannot_read(scrub, instant.disk, error)
            scrub.plan.disturbed(read, trio.current_time())
            return False
        finally:
            os.close(instant.image)
        digests, data_bytes, is_quiet = found
        scrub.plan.cost(read, data_bytes)
        if not is_quiet:
            scrub.plan.disturbed(read, trio.current_time())
            return False
        token = next(tokens)
        compare = Compare(
            pump.outbox.known.group_id.bytes,
            instant.disk.id,
            token,
            Purpose.SCRUB,
            instant.stamp,
            read.offset,
            read.length,
            digests,
        )
        scrub.under_way[token] = (read, instant.stamp)
        if pump is self._pump and pump.outbox.offer_comparison(encode_compare(compare)):
            return True
        del scrub.under_way[token]
        scrub.plan.interrupted(trio.current_time())
        return False

    # --- healing

    async def _heal_disks(self) -> None:
        while True:
            changed, pump = self._changed, self._pump
            for disk in list(pump.disks) if pump is not None else []:
                scrub = self.disks.get(disk.id)
                if pump is not None and scrub is not None:
                    await self._heal(pump, disk, scrub)
            has_doubts = any(scrub.doubted for scrub in self.disks.values())
            with trio.move_on_after(LOOK_SECONDS if has_doubts else math.inf):
                await changed.wait()

    async def _heal(self, pump: GroupPump, disk: SourceDisk, scrub: DiskScrub) -> None:
        if trio.current_time() < scrub.doubted_since + HEAL_SECONDS:
            return
        async with pump.retiring, pump.between_rounds:
            if pump is not self._pump:
                return
            regions = np.array(sorted(scrub.doubted), np.intp)
            from_ns = pump.outbox.due.watermark + 1
            try:
                await trio.to_thread.run_sync(disk.doubt, regions, from_ns, FOUND)
            except (BlockreplError, OSError) as error:
                log.error("disk %s: %s", disk.entry.name, error)
                scrub.doubted_since = trio.current_time() + UNREADABLE_SECONDS
                return
        scrub.doubted -= set(regions.tolist())
        scrub.doubted_since = trio.current_time() if scrub.doubted else math.inf


def _read(instant: Instant, read: Read) -> tuple[bytes, int, bool]:
    """Digests, how much of it is data, and whether it is what the disk held at the instant."""
    start, end = read.offset, read.offset + read.length
    data_bytes = count_data(instant.image, start, end)
    digests = digest_range(instant.image, start, end)
    return digests, data_bytes, instant.is_quiet(start, end)
