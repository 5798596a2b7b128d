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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import trio

from blockrepl import limits
from blockrepl.errors import StateError, StorageError
from blockrepl.formats.frame import (
    Buffer,
    Columns,
    EncodedFrame,
    FrameHeader,
    FrameKind,
    parse_columns,
)
from blockrepl.formats.marks import Mark
from blockrepl.formats.messages import AttachDisk, Attached, MessageType
from blockrepl.session.known import Known
from blockrepl.session.release import HeldReleases, Release, release_of
from blockrepl.session.sender import SendWindow
from blockrepl.storage.spool import Spool, SpooledFrame

log = logging.getLogger(__name__)

MEMORY_BYTES = limits.WINDOW_BYTES
MEMORY_FRAMES = limits.WINDOW_FRAMES
PRESSURE_SECONDS = 0.01  # how often a full memory looks whether a ring fills up
FULL_SECONDS = 0.25  # how often a full spool is tried again
SYNC_SECONDS = 1.0  # of history that a power cut may take from the spool

Send = Callable[[MessageType, tuple[Buffer, ...]], Awaitable[None]]
Shape = Callable[[int], Awaitable[None]]


class Owner(Protocol):
    """What an outbox tells, and asks, the one whose frames it holds."""

    def is_pressed(self) -> bool:
        """Whether a ring is so full that frames must leave a memory that is full."""
        ...

    def is_crowded(self) -> bool:
        """Whether a ring is so full of what is in memory that frames must leave it in any case."""
        ...

    def kept(self, release: Release) -> None:
        """The frame is in the spool: the ring may let go of its records."""
        ...

    def durable(self, release: Release) -> None:
        """The frame is durable at the receiver."""
        ...

    def interrupted(self) -> None:
        """Content and comparisons under way are lost."""
        ...


@dataclass(slots=True, eq=False)
class Item:
    message: MessageType
    buffers: tuple[Buffer, ...]
    size_bytes: int
    release: Release = field(default_factory=Release)
    header: FrameHeader | None = None
    mark: Mark | None = None
    is_spooled: bool = False

    @property
    def number(self) -> int:
        return self.header.number if self.header else 0

    @property
    def is_data(self) -> bool:
        """Whether it waits for a bandwidth limit; marks and mere watermarks do not."""
        return self.header is None or self.header.record_count > 0


class LostError(StateError):
    """The receiver's answer and ours do not fit: one of the two has lost something."""

    code = "receiver-lost"


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
        self._memory: deque[Item] = deque()  # sent and not acknowledged, then not yet sent
        self._memory_bytes = 0
        self._sent_count = 0  # of those in memory
        self._read: Item | None = None  # read from the spool, not yet sent
        self._spool_lock = trio.StrictFIFOLock()
        self._moving = False
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
        return self.known.next_number == self.due.next_number and not self.spool.is_active

    @property
    def waiting_bytes(self) -> int:
        """Of frames that are not acknowledged, without those in the spool."""
        return self._memory_bytes

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
        header, buffers = frame.header, tuple(frame.buffers)
        release = replace(release_of(header, columns, mark), sync_epoch=sync_epoch)
        if header.number:
            self.due.apply(header, mark)
        self.needs_number = not header.number
        await self._put(Item(MessageType.DATA, buffers, header.frame_bytes, release, header, mark))

    async def put_comparison(self, payload: bytes) -> None:
        """Take in a COMPARE; it stands in the stream behind the frames before it."""
        await self._put(Item(MessageType.COMPARE, (payload,), len(payload)))

    def offer_comparison(self, payload: bytes) -> bool:
        """Take in a COMPARE without waiting, from any task; False without a direct link.

        Whoever offers bounds how many there are.
        """
        if not self.is_direct:
            return False
        self._hold(Item(MessageType.COMPARE, (payload,), len(payload)))
        return True

    async def _put(self, item: Item) -> None:
        while not await self._place(item):
            pass

    async def _place(self, item: Item) -> bool:
        if self._must_spool():
            async with self._spool_lock:
                if not self._must_spool():
                    return False
                placed = await self._spool_item(item)
            if not placed:
                await self._wait(FULL_SECONDS)
            return placed
        has_memory = self._has_memory(item.size_bytes)
        if has_memory and not self._is_crowded():
            self._hold(item)
            return True
        if not has_memory and not self._owner.is_pressed():
            await self._wait(PRESSURE_SECONDS)
            return False
        async with self._spool_lock:
            moved = await self._move_to_spool()
        if not moved:
            self._crowded_after = trio.current_time() + FULL_SECONDS
            if not has_memory:
                await self._wait(FULL_SECONDS)
        return False

    def _is_crowded(self) -> bool:
        """Whether what is in memory must leave it."""
        if not self._memory:  # the frame to come fills the ring by itself: there is nothing to move
            return False
        return self._owner.is_crowded() and trio.current_time() >= self._crowded_after

    def _hold(self, item: Item) -> None:
        self._memory.append(item)
        self._memory_bytes += item.size_bytes
        self._notify()

    def _must_spool(self) -> bool:
        return self.window is None or self.spool.has_unread()

    def _has_memory(self, size_bytes: int) -> bool:
        return not self._memory or (
            len(self._memory) < MEMORY_FRAMES and self._memory_bytes + size_bytes <= MEMORY_BYTES
        )

    async def _spool_item(self, item: Item) -> bool:
        if not item.number:
            self._owner.interrupted()
            return True
        if (self._memory or not self.spool.is_active) and not await self._move_to_spool():
            return False
        if not self.spool.has_room(item.size_bytes):
            return False
        try:
            await trio.to_thread.run_sync(self.spool.append, item.buffers)
        except StorageError as error:
            log.warning("%s", error)
            return False
        self._is_kept(item)
        self._notify()
        return True

    def _is_kept(self, item: Item) -> None:
        """It is in the spool."""
        item.is_spooled, item.buffers = True, ()
        self._owner.kept(item.release)
        if item.release.regions:  # a frame does not say in which stretch its content was read
            self._sync_epochs[item.number] = item.release.sync_epoch

    async def _move_to_spool(self) -> bool:
        """All that is in memory, and with it the mode. The caller holds the lock."""
        if any(not item.number for item in self._memory):
            self._owner.interrupted()
            self._forget_unnumbered()
        moved = [item for item in self._memory if item.number]
        unsent = list(self._memory)[self._sent_count :]
        if not self.spool.has_room(sum(item.size_bytes for item in moved)):
            return False
        is_new = not self.spool.is_active
        self._moving = True
        try:
            await trio.to_thread.run_sync(
                self._write_moved, self.known.attached(), [item.buffers for item in moved]
            )
        except StorageError as error:
            log.warning("%s", error)
            moved = [item for item in moved if item.number < self.spool.next_number]
            return False
        finally:
            self._moving = False
            if (
                is_new and self.spool.is_active
            ):  # else all of it was sent, and what comes behind is to be sent next
                self.spool.rewind(unsent[0].number if unsent else self.spool.next_number)
            self._moved(moved if self.spool.is_active else [])
        return True

    def _moved(self, moved: list[Item]) -> None:
        """They are in the spool now; those acknowledged meanwhile are out of memory already."""
        freed, self._freed_while_moving = self._freed_while_moving, []
        for release in freed:
            self._owner.durable(release)
        for item in moved:
            self._is_kept(item)
        gone = set(moved)
        self._sent_count -= sum(item in gone for item in list(self._memory)[: self._sent_count])
        self._memory = deque(item for item in self._memory if item not in gone)
        self._memory_bytes = sum(item.size_bytes for item in self._memory)
        self._notify()

    def _write_moved(self, known: Attached, buffers: list[tuple[Buffer, ...]]) -> None:
        if not self.spool.is_active:
            self.spool.begin(known, self.disks, buffers)
            return
        for one in buffers:
            self.spool.append(one)

    def _forget_unnumbered(self) -> None:
        """Base frames that were sent stay in the window: their acknowledgements still come."""
        sent = [item for item in list(self._memory)[: self._sent_count] if item.number]
        unsent = [item for item in list(self._memory)[self._sent_count :] if item.number]
        self._memory = deque([*sent, *unsent])
        self._memory_bytes = sum(item.size_bytes for item in self._memory)
        self._sent_count = len(sent)

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
        self._notify()

    async def _catch_up(self, attached: Attached) -> None:
        """Acknowledge what the receiver has; read the spool from there on."""
        if self.spool.is_active:
            await trio.to_thread.run_sync(self.spool.rewind, self.known.next_number)
        while self.known.next_number < attached.next_number:
            if self.spool.has_unread():
                found = await trio.to_thread.run_sync(self.spool.read)
                self._acknowledge(_spooled(found))
            elif self._memory:
                self._acknowledge(self._memory[0])
            else:
                break  # it has frames that were never sent; `differs` says so

    def disconnect(self) -> None:
        """The link is gone; what it had under way is kept."""
        self.window = None
        self._read = None
        self._sync_epochs.clear()
        self._held.clear()
        self.needs_number = False
        self._sent_count = 0
        self._memory = deque(item for item in self._memory if item.number)
        self._memory_bytes = sum(item.size_bytes for item in self._memory)
        self._owner.interrupted()
        self._notify()

    async def serve(self, send: Send, shape: Shape) -> None:
        """Send what is here and what comes, until cancelled. DamageError, PeerError."""
        assert self.window is not None
        while True:
            item = await self._next(self.window)
            buffers = item.buffers if item.is_spooled else _own(item.buffers)
            if item.is_data:
                await shape(item.size_bytes)
            if item.message is MessageType.DATA:
                self.window.sent(item)  # first: its acknowledgement may come while it is sent
                self.sent_bytes += item.size_bytes
            await send(item.message, buffers)
            if item.is_spooled:
                item.buffers = ()

    async def _next(self, window: SendWindow[Item]) -> Item:
        while True:
            if self._moving:
                await self._wait()
            elif self.spool.is_active:
                item = self._read or await self._read_spool(window)
                if item is not None and window.has_room(item.size_bytes):
                    self._read = None
                    return item
                self._read = item
                if item is not None or self.spool.is_active:
                    await self._wait()
            elif self._sent_count == len(self._memory):
                await self._wait()
            else:
                item = self._memory[self._sent_count]
                if item.message is not MessageType.DATA:
                    del self._memory[self._sent_count]
                    self._memory_bytes -= item.size_bytes
                    return item
                if window.has_room(item.size_bytes):
                    self._sent_count += 1
                    return item
                await self._wait()

    async def _read_spool(self, window: SendWindow[Item]) -> Item | None:
        """The spool's next frame; gives back what is durable, in the end the whole spool."""
        async with self._spool_lock:
            if (base := self._to_give_back) is not None:
                self._to_give_back = None
                try:
                    await trio.to_thread.run_sync(self.spool.give_back, base)
                except StorageError as error:
                    log.warning("%s", error)
            if self.spool.has_unread():
                found = await trio.to_thread.run_sync(self.spool.read)
                return _spooled(found, self._sync_epochs.get(found.header.number, 0))
            if not any(item.is_spooled for item in window.items):
                try:
                    await trio.to_thread.run_sync(self.spool.clear)
                except StorageError as error:
                    log.warning("%s", error)
                    return None
                self._sync_epochs.clear()
                self._notify()
        return None

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
        if not item.is_spooled and self._memory and self._memory[0] is item:
            self._memory.popleft()
            self._memory_bytes -= item.size_bytes
            self._sent_count = max(0, self._sent_count - 1)
        if self._moving:  # its buffers are being written
            self._freed_while_moving += releases
            return
        for release in releases:
            self._owner.durable(release)

    async def sync_spool(self) -> None:
        """Sync the spool now and then, until cancelled."""
        while True:
            await trio.sleep(SYNC_SECONDS)
            if self.spool.is_active:
                async with self._spool_lock:
                    try:
                        await trio.to_thread.run_sync(self.spool.sync)
                    except StorageError as error:
                        log.warning("%s", error)


def _own(buffers: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
    """Copies of what may be the ring's memory.

    Sending may take long, and meanwhile the frame may be moved to the spool and its records be
    overwritten in the ring.
    """
    return tuple(bytes(one) if isinstance(one, memoryview) else one for one in buffers)


def _spooled(found: SpooledFrame, sync_epoch: int = 0) -> Item:
    header, mark = found.header, found.mark()
    columns = parse_columns(header, found.body) if header.kind == FrameKind.SYNC else None
    release = replace(release_of(header, columns, mark), sync_epoch=sync_epoch)
    buffers = (found.frame,)
    return Item(MessageType.DATA, buffers, header.frame_bytes, release, header, mark, True)
