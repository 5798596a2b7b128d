"""The outbox of a group: every frame from the first that the receiver has not acknowledged.

It outlives sessions. The pump puts frames in, in order; while there is a link, `serve` sends them.

=========  ===========================  ==========================  ============================
mode       a new frame goes to          frames are sent from        left when
=========  ===========================  ==========================  ============================
direct     memory                       memory                      spooling: no link, or a ring
                                                                    fills up, and memory is full
                                                                    or holds much of that ring
spooling   the spool                    the spool                   draining: all of it was sent
draining   memory                       nowhere                     direct: all of the spool is
                                                                    acknowledged, and it is given
                                                                    back. Spooling: as above
=========  ===========================  ==========================  ============================

So the spool, where there is one, holds all numbers from the first unacknowledged one up to those in
memory, and an agent that is killed finds in it all it must know (storage/spool.py). Frames without
a number (base content) and comparisons are of their session: without a link they are dropped, and
`interrupted` tells the owner to send that content again. Base content is told to be durable with
the next numbered frame behind it (`HeldReleases`); ``needs_number``: none has been put in yet.

Memory is bounded by MEMORY_BYTES; a full spool makes `put` wait, and then the rings say what was
lost.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from functools import partial

import trio

from blockrepl import limits
from blockrepl.errors import StorageError
from blockrepl.formats.frame import Buffer, Columns, EncodedFrame
from blockrepl.formats.marks import Mark
from blockrepl.formats.messages import AttachDisk, Attached, MessageType
from blockrepl.services.outbox_ends import LostError, Owner, Send, Shape
from blockrepl.services.outbox_item import Item, frame_item, own, spooled_item, total_bytes
from blockrepl.services.outbox_memory import OutboxMemory
from blockrepl.session.known import Known
from blockrepl.session.release import HeldReleases, Release
from blockrepl.session.sender import SendWindow
from blockrepl.storage.spool import Spool, SpooledFrame
from blockrepl.units import MIB

log = logging.getLogger(__name__)

MEMORY_BYTES = limits.WINDOW_BYTES
MEMORY_FRAMES = limits.WINDOW_FRAMES
PRESSURE_SECONDS = 0.01  # how often a full memory looks whether a ring fills up
FULL_SECONDS = 0.25  # how often a full spool is tried again
YIELD_SECONDS = 0.1  # behind an append, while a ring fills up, nothing is sent from the spool
YIELD_SECONDS_MAX = 1.0  # in a row: what fills the ring may be waiting for the spool to be drained
READ_BYTES = 4 * MIB  # of the spool in one visit of a thread, which costs as much as 0.5 MiB
SYNC_SECONDS = 1.0  # of history that a power cut may take from the spool


class Outbox:
    """``known``: as of the last acknowledged frame. ``due``: as of the last frame put in."""

    def __init__(
        self, known: Known, due: Known, disks: list[AttachDisk], spool: Spool, owner: Owner
    ) -> None:
        self.known = known
        self.due = due
        self.disks = disks  # as the receiver was told at the last ATTACH
        self.spool = spool
        self.sent_bytes = 0
        self.window: SendWindow[Item] | None = None
        self.needs_number = False
        self._held = HeldReleases()
        self._owner = owner
        self._memory = OutboxMemory()
        self._read: deque[Item] = deque()  # read from the spool, not yet sent
        self._sending: Item | None = None  # its buffers may be taken any time
        self._spool_lock = trio.StrictFIFOLock()
        self._moving = False
        self._appended = float("-inf")  # when the spool took something in
        self._sent_on = float("-inf")  # when it last was its turn to be sent from
        self._crowded_after = 0.0  # a full spool was tried just now
        self._freed_while_moving: list[Release] = []
        self._to_give_back: Attached | None = None
        self._sync_epochs: dict[
            int, int
        ] = {}  # of content in the spool that was read during this link
        self._changed = trio.Event()

    # --- what others see

    @property
    def is_direct(self) -> bool:
        """Whether frames go straight from memory to the receiver."""
        return self.window is not None and not self.spool.is_active

    @property
    def is_drained(self) -> bool:
        return not self.is_awaiting and not self.spool.is_active

    @property
    def is_awaiting(self) -> bool:
        """Whether a numbered frame is not acknowledged."""
        return self.known.next_number != self.due.next_number

    @property
    def waiting_bytes(self) -> int:
        """Of frames that are not acknowledged, without those in the spool."""
        return self._memory.size_bytes

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _wait(self, seconds: float = float("inf")) -> None:
        with trio.move_on_after(seconds):
            await self._changed.wait()

    async def drained(self) -> None:
        """Return when nothing waits any more."""
        while not self.is_drained:
            await self._wait()

    # --- the producer's side: one task

    async def put(
        self,
        frame: EncodedFrame,
        *,
        columns: Columns | None = None,
        sync_epoch: int = 0,
        mark: Mark | None = None,
    ) -> None:
        """Take the next frame in; wait for room. ``columns`` and ``sync_epoch``: of content."""
        if frame.header.number:
            self.due.apply(frame.header, mark)
        self.needs_number = not frame.header.number
        await self._put([frame_item(frame, columns, sync_epoch, mark)])

    async def put_records(self, frames: Sequence[EncodedFrame]) -> None:
        """Take in the next frames, of records; the spool takes them in one visit of a thread."""
        for frame in frames:
            self.due.apply(frame.header, None)
        self.needs_number = False
        await self._put([frame_item(frame, None, 0, None) for frame in frames])

    async def put_comparison(self, payload: bytes) -> None:
        """Take in a COMPARE; it stands in the stream behind the frames before it."""
        await self._put([Item(MessageType.COMPARE, (payload,), len(payload))])

    def offer_comparison(self, payload: bytes) -> bool:
        """Take in a COMPARE without waiting, from any task; False without a direct link.

        Whoever offers bounds how many there are.
        """
        if not self.is_direct:
            return False
        self._hold(Item(MessageType.COMPARE, (payload,), len(payload)))
        return True

    async def _put(self, items: list[Item]) -> None:
        while items:
            items = items[await self._place(items) :]

    async def _place(self, items: list[Item]) -> int:
        """Find room for the first of them; for how many it did. Several are all numbered."""
        if self._must_spool():
            async with self._spool_lock:
                if not self._must_spool():
                    return 0
                placed = await self._spool_items(items)
            if not placed:
                await self._wait(FULL_SECONDS)
            return placed
        item = items[0]
        has_memory = self._has_memory(item.size_bytes)
        if has_memory and not self._is_crowded():
            self._hold(item)
            return 1
        if not has_memory and not self._owner.is_pressed():
            await self._wait(PRESSURE_SECONDS)
            return 0
        async with self._spool_lock:
            moved = await self._move_to_spool()
        if not moved:
            self._crowded_after = trio.current_time() + FULL_SECONDS
            if not has_memory:
                await self._wait(FULL_SECONDS)
        return 0

    def _is_crowded(self) -> bool:
        """Whether what is in memory must leave it."""
        if not self._memory:  # the frame to come fills the ring by itself: there is nothing to move
            return False
        return self._owner.is_crowded() and trio.current_time() >= self._crowded_after

    def _hold(self, item: Item) -> None:
        self._memory.add(item)
        self._notify()

    def _must_spool(self) -> bool:
        return self.window is None or self.spool.has_unread()

    def _has_memory(self, size_bytes: int) -> bool:
        return not self._memory or (
            len(self._memory) < MEMORY_FRAMES
            and self._memory.size_bytes + size_bytes <= MEMORY_BYTES
        )

    async def _spool_items(self, items: list[Item]) -> int:
        if not items[0].number:
            self._owner.interrupted()
            return 1
        if (self._memory or not self.spool.is_active) and not await self._move_to_spool():
            return 0
        if not self.spool.has_room(total_bytes(items)):
            items = items[:1]
            if not self.spool.has_room(total_bytes(items)):
                return 0
        try:
            await trio.to_thread.run_sync(self._append, [item.buffers for item in items])
        except StorageError as error:
            log.warning("%s", error)
            items = [item for item in items if item.number < self.spool.next_number]
        for item in items:
            self._is_kept(item)
        if items:
            self._appended = trio.current_time()
        self._notify()
        return len(items)

    def _append(self, frames: list[tuple[Buffer, ...]]) -> None:
        for buffers in frames:
            self.spool.append(buffers)

    def _is_kept(self, item: Item) -> None:
        """It is in the spool, and the ring's memory is the guest's again."""
        item.is_spooled = True
        item.buffers = own(item.buffers) if item is self._sending else ()
        self._owner.kept(item.release)
        if item.release.regions:  # a frame does not say in which stretch its content was read
            self._sync_epochs[item.number] = item.release.sync_epoch

    async def _move_to_spool(self) -> bool:
        """All that is in memory, and with it the mode. The caller holds the lock."""
        if any(not item.number for item in self._memory.items()):
            self._owner.interrupted()
            # Of those that were sent, the window still knows: their acknowledgements come.
            self._memory.keep(lambda item: item.number > 0)
        moved, unsent = self._memory.items(), self._memory.unsent.copy()
        if not self.spool.has_room(total_bytes(moved)):
            return False
        is_new = not self.spool.is_active
        self._moving = True
        try:
            await trio.to_thread.run_sync(
                self._write_moved, self.known.attached(), [item.buffers for item in moved]
            )
        except StorageError as error:
            log.warning("%s", error)
            return False
        finally:
            self._moving = False
            if is_new and self.spool.is_active:
                self._sent_on = trio.current_time()
                # Else all of it was sent, and what comes behind is to be sent next.
                self.spool.rewind(unsent[0].number if unsent else self.spool.next_number)
            # Not all, when it failed; none, when it was cancelled before it began.
            self._moved([item for item in moved if item.number < self.spool.next_number])
        return True

    def _moved(self, moved: list[Item]) -> None:
        """They are in the spool now; those acknowledged meanwhile are out of memory already."""
        freed, self._freed_while_moving = self._freed_while_moving, []
        for release in freed:
            self._owner.durable(release)
        for item in moved:
            self._is_kept(item)
        gone = set(moved)
        self._memory.keep(lambda item: item not in gone)
        self._notify()

    def _write_moved(self, known: Attached, buffers: list[tuple[Buffer, ...]]) -> None:
        if not self.spool.is_active:
            self.spool.begin(known, self.disks, buffers)
        else:
            self._append(buffers)

    # --- the link

    async def connect(self, attached: Attached, window_messages: int, window_bytes: int) -> None:
        """Go on where the receiver says. LostError when that does not fit. DamageError."""
        async with self._spool_lock:
            if attached.group_id == self.known.group_id:  # else its numbers are not ours
                await self._catch_up(attached)
            if problem := self.known.differs(attached):
                raise LostError(
                    f"the receiver is not where it was: {problem}",
                    hint="nothing to do: the group is synced again",
                )
            self.window = SendWindow(window_messages, window_bytes)
            self._sent_on = trio.current_time()
        self._notify()

    async def _catch_up(self, attached: Attached) -> None:
        """Acknowledge what the receiver has; read the spool from there on."""
        if self.spool.is_active:
            await trio.to_thread.run_sync(self.spool.rewind, self.known.next_number)
        while self.known.next_number < attached.next_number:
            if self.spool.has_unread():
                found = await trio.to_thread.run_sync(self.spool.read)
                self._acknowledge(spooled_item(found))
            elif self._memory:
                self._acknowledge(self._memory.items()[0])
            else:
                break  # it has frames that were never sent; `differs` says so

    def disconnect(self) -> None:
        """The link is gone; what it had under way is kept."""
        self.window = self._sending = None
        self._read.clear()
        self._sync_epochs.clear()
        self._held.clear()
        self.needs_number = False
        self._memory.restart()
        self._owner.interrupted()
        self._notify()

    async def serve(self, send: Send, shape: Shape) -> None:
        """Send what is here and what comes, until cancelled. DamageError, PeerError."""
        assert self.window is not None
        while True:
            item = self._sending = await self._next(self.window)
            if item.is_data:
                await shape(item.size_bytes)
            await send(item.message, item.size_bytes, partial(self._take, item, self.window))
            self._sending = None
            if item.is_spooled:
                item.buffers = ()

    def _take(self, item: Item, window: SendWindow[Item]) -> tuple[Buffer, ...]:
        if item.message is MessageType.DATA:
            window.sent(item)  # now: its acknowledgement may come while it is sent, and not before
            self.sent_bytes += item.size_bytes
        return item.buffers

    async def _next(self, window: SendWindow[Item]) -> Item:
        while True:
            if self._moving:
                await self._wait()
            elif self.spool.given_back:
                await trio.to_thread.run_sync(self.spool.sweep)  # no lock: it takes a disk long
            elif self._gives_way():
                await self._wait(PRESSURE_SECONDS)
            elif self.spool.is_active:
                if not self._read:
                    await self._read_spool(window)
                if self._read and window.has_room(self._read[0].size_bytes):
                    return self._read.popleft()
                if self._read or self.spool.is_active:  # and a spool that could not be ended
                    await self._wait(FULL_SECONDS)
            elif self._memory.unsent and self._may_send(self._memory.unsent[0], window):
                return self._memory.send_next()
            else:
                await self._wait()

    def _gives_way(self) -> bool:
        """Whether the pump needs the processor that sending from the spool would take: what a full
        ring drops is a gap, all else is late. Not when it gets no further: the spool may be full.
        """
        until = min(self._appended + YIELD_SECONDS, self._sent_on + YIELD_SECONDS_MAX)
        is_due = self.spool.is_active and trio.current_time() < until
        return is_due and self._owner.is_pressed()

    def _may_send(self, item: Item, window: SendWindow[Item]) -> bool:
        return item.message is not MessageType.DATA or window.has_room(item.size_bytes)

    async def _read_spool(self, window: SendWindow[Item]) -> None:
        """The spool's next frames; gives back what is durable, in the end the whole spool."""
        await self._give_back()
        async with self._spool_lock:
            if self.spool.has_unread():
                self._sent_on = trio.current_time()
                for found in await trio.to_thread.run_sync(self._read_ahead):
                    epoch = self._sync_epochs.get(found.header.number, 0)
                    self._read.append(spooled_item(found, epoch))
            elif not any(item.is_spooled for item in window.items):
                try:
                    await trio.to_thread.run_sync(self.spool.end)
                except StorageError as error:
                    log.warning("%s", error)
                    return
                self._sync_epochs.clear()
                self._notify()

    async def _give_back(self) -> None:
        """Without the lock while the disk syncs: the pump's frames need it, and the ring its room.

        The spool stays this one meanwhile: only who reads it ends it.
        """
        if (base := self._to_give_back) is None:
            return
        self._to_give_back = None
        try:
            await trio.to_thread.run_sync(self.spool.advance, base)
        except StorageError as error:
            log.warning("%s", error)
            return
        async with self._spool_lock:
            self.spool.give_back()

    def _read_ahead(self) -> list[SpooledFrame]:
        """One frame, and more as long as that is cheap."""
        found = [self.spool.read()]
        while self.spool.has_unread() and sum(len(one.frame) for one in found) < READ_BYTES:
            found.append(self.spool.read())
        return found

    def acknowledged(self, messages: int, number: int) -> None:
        """Take an acknowledgement of this session. PeerError when it cannot be."""
        if self.window is None:
            return
        for item in self.window.acknowledged(messages, number):
            self._acknowledge(item)
        self._notify()

    def found_in_base(self, release: Release) -> None:
        """The receiver has this content in its base image already: as if it had been sent."""
        self._held.hold(self.due.next_number, release)
        self.needs_number = True

    def _acknowledge(self, item: Item) -> None:
        releases: list[Release] = []
        if item.header is None or not item.number:
            self._held.hold(self.known.next_number, item.release)
        else:
            self.known.apply(item.header, item.mark)
            releases = [*self._held.take(self.known.next_number), item.release]
            if self.spool.begins_file(self.known.next_number):
                self._to_give_back = self.known.attached()
        self._memory.acknowledged(item)
        if self._moving:  # its buffers are being written
            self._freed_while_moving += releases
            return
        for release in releases:
            self._owner.durable(release)

    async def sync_spool(self) -> None:
        """Sync the spool now and then, until cancelled. A disk that stalls holds up nothing."""
        while True:
            await trio.sleep(SYNC_SECONDS)
            if self.spool.is_active:
                unsynced = self.spool.unsynced()
                try:
                    await trio.to_thread.run_sync(self.spool.sync, unsynced)
                except StorageError as error:
                    log.warning("%s", error)
                else:
                    self.spool.synced(unsynced)
