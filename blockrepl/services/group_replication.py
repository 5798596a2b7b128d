"""One group at the source, for as long as the agent runs: its pump and outbox outlive sessions.

=========  =========================================  ========================================
state      the pump                                   leaves it by
=========  =========================================  ========================================
waiting    is not there: nothing says what the        the receiver's answer to ATTACH
           receiver has. Records stay in the rings
running    works, with a link or (spooling) without   the disks have changed, or one could not be
                                                      opened: the outbox drains over a direct
                                                      link, then waiting. Also when the receiver's
                                                      answer does not fit
=========  =========================================  ========================================

With a spool that is certain a group need not wait, when its agent starts or after a round that
failed: the spool says what the receiver will know. One from before a reboot, or a damaged one,
waits for the receiver (storage/spool.py, rule 6).
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from uuid import UUID

import trio

from blockrepl.errors import BlockreplError, DamageError, PeerError, StateError
from blockrepl.formats.comparison import Verdict
from blockrepl.formats.messages import AttachDisk, Attached
from blockrepl.services.error_groups import ours_of
from blockrepl.services.flush_doubts import FlushDoubts
from blockrepl.services.group_pump import GroupPump
from blockrepl.services.image_watch import ImageWatch
from blockrepl.services.outbox_ends import LostError, Send, Shape
from blockrepl.services.scrub_pace import ScrubPool
from blockrepl.services.scrubber import GroupScrub
from blockrepl.services.source_disk import SourceDisk
from blockrepl.session.known import Known
from blockrepl.storage.clock import SourceClock
from blockrepl.storage.group_notes import GroupNote, forget_note, read_note, write_note
from blockrepl.storage.growing import grow_disk
from blockrepl.storage.ring import read_next_number, ring_path
from blockrepl.storage.source import DiskEntry, SourceDisks
from blockrepl.storage.spool import Spool, SpoolLimits

log = logging.getLogger(__name__)

RETIRE_SECONDS = 1.0
RETIRE_PATIENCE_SECONDS = 0.5  # for a round to end, while a server that starts waits for us
NOTE_SECONDS = 2.0
RETRY_SECONDS = 5.0  # a group that was refused, or a disk whose image was missing
DRAIN_SAMPLES = 10  # one a second
LOOK_SECONDS = 0.2  # how often a link looks whether the disks have changed
PRESSURE_SECONDS = 0.02  # how often one that has stopped reading the rings looks at them


@dataclass(frozen=True, slots=True)
class Link:
    """What a session lends to a group."""

    send: Send
    shape: Shape
    window_messages: int
    window_bytes: int


@dataclass(slots=True)
class _Refusal:
    happened: trio.Event = field(default_factory=trio.Event)
    error: BlockreplError | None = None


class GroupReplication:
    """``entries`` are the disks wanted; ``disks`` those of the pump; ``errors`` per disk name."""

    def __init__(
        self,
        name: str,
        disks: SourceDisks,
        source: bytes,
        clock: SourceClock,
        spool_limits: SpoolLimits,
        scrubs: ScrubPool | None = None,
    ) -> None:
        self.name = name
        self.entries: list[DiskEntry] = []
        self.disks: list[SourceDisk] = []
        self.errors: dict[str, BlockreplError] = {}
        self.error: BlockreplError | None = None
        self.pump: GroupPump | None = None
        self.spool = Spool(disks.home.source_directory / "spool" / name, spool_limits)
        self.scrub = GroupScrub(scrubs or ScrubPool(rate=0), clock)
        self._flush_doubts = FlushDoubts()
        self.is_linked = False
        self.finished = False
        self._source_disks = disks
        self._source = source
        self._clock = clock
        self._attached_entries: list[DiskEntry] = []
        self._retry_at = 0.0
        self._has_lost = False
        self._failed = False
        self._noted: GroupNote | None = None
        self._refusal = _Refusal()
        self._changed = trio.Event()
        self._reported: BlockreplError | None = None  # by itself, not of a link
        self._starting = trio.Lock()  # a link may come while the spool is begun with
        self._ready = trio.Event()
        self._scope = trio.CancelScope()
        self._drain_per_second = 0.0

    # --- the group's own work

    async def run(self) -> None:
        """Until `end`, or cancelled."""
        try:
            with self._scope:
                await self._open_spool()
                self._ready.set()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._run_pump)
                    nursery.start_soon(self._start_again)
                    nursery.start_soon(self._retire_rings)
                    nursery.start_soon(self._flush_doubts.run, lambda: self.disks)
                    nursery.start_soon(ImageWatch().run, lambda: self.disks)
                    nursery.start_soon(self._keep_note)
                    nursery.start_soon(self._watch_spool)
                    nursery.start_soon(self.scrub.run)
        finally:
            self.scrub.close()
            self._close_disks()
            self.spool.close()

    async def _open_spool(self) -> None:
        while True:
            try:
                self.spool = await trio.to_thread.run_sync(
                    Spool.open, self.spool.directory, self.spool.bounds
                )
                break
            except (BlockreplError, OSError) as error:
                self._report(error)
                await trio.sleep(RETRY_SECONDS)
        await self._start_without_link()

    async def _run_pump(self) -> None:
        while True:
            pump = self.pump
            if pump is None or pump.is_stopped:
                await self._changed.wait()
                continue
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pump.outbox.sync_spool)
                    await pump.run()
                    nursery.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                await self._give_up(pump, ours_of(group))

    async def _give_up(self, pump: GroupPump, error: BlockreplError) -> None:
        """A round failed: begin anew, from what the rings and the spool hold."""
        self._report(error)
        self._failed = True
        await pump.stop()
        if not self.is_linked:
            await self._stop_running()
        self.refuse(error)  # last: a link that came meanwhile has been lent this pump

    def _report(self, error: Exception) -> None:
        """Show an error of the group, and log it unless that was the last one."""
        if str(error) != str(self.error):
            log.error("group %s: %s", self.name, error)
        self.error = error if isinstance(error, BlockreplError) else StateError(str(error))
        self._reported = self.error

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _retire_rings(self) -> None:
        """Note what syncs have ended; give back the rings of disks that nobody serves any more."""
        while True:
            await trio.sleep(RETIRE_SECONDS)
            pump = self.pump
            for disk in self.disks:
                if pump and disk.owes_note:
                    await self._note_consistent(disk, pump)
                if pump and disk.ring and not self._source_disks.is_serving(disk.entry):
                    try:
                        async with pump.retiring:
                            await self._retire(disk, pump)
                    except (BlockreplError, OSError) as error:
                        log.error("disk %s: %s", disk.entry.name, error)

    async def _note_consistent(self, disk: SourceDisk, pump: GroupPump) -> None:
        async with pump.retiring:  # nobody doubts or grows the disk meanwhile
            if self.pump is not pump:
                return  # it may have been taken up anew, with doubts of its own
            try:
                await trio.to_thread.run_sync(disk.note_consistent)
            except (BlockreplError, OSError) as error:
                log.error("disk %s: the end of its sync is not noted: %s", disk.entry.name, error)

    async def _retire(self, disk: SourceDisk, pump: GroupPump) -> None:
        async with pump.between_rounds:
            await trio.to_thread.run_sync(disk.recover)
        if (retirement := disk.retirement()) is None:
            return
        with closing(retirement):
            if not await trio.to_thread.run_sync(retirement.prepare):  # no round waits for this
                return
            with trio.move_on_after(RETIRE_PATIENCE_SECONDS):
                async with pump.between_rounds:
                    await trio.to_thread.run_sync(disk.retire, retirement)

    async def _keep_note(self) -> None:
        """Remember how far the receiver is; only then may regions cool on the strength of it."""
        while True:
            await trio.sleep(NOTE_SECONDS)
            if self.pump is None:
                continue
            note = _note_of(self.pump.outbox.known, self.pump.outbox.disks)
            positions = [(disk, disk.durable) for disk in self.disks]
            try:
                await trio.to_thread.run_sync(self._note, note)
            except BlockreplError as error:
                log.error("group %s: %s", self.name, error)
                continue
            for disk, (ring_id, sequence) in positions:
                disk.note_durable(ring_id, sequence)

    def _note(self, note: GroupNote) -> None:
        """Remember what is new; a spool's beginning may lie behind what is remembered."""
        home = self._source_disks.home
        if self._noted is None:
            self._noted = read_note(home, self.name)
        old = self._noted
        if old is not None and old.replica == note.replica:
            number = max(old.next_number, note.next_number)
            note = note.model_copy(update={"next_number": number})
        if note != old:
            write_note(home, self.name, note)
            self._noted = note

    # --- starting and stopping to run

    async def _start_again(self) -> None:
        """After a round that failed, or for a disk that could not be opened, without a link."""
        while True:
            before = self.pump
            await trio.sleep(RETRY_SECONDS)
            if self.pump is not None and self.pump is before and self.error is self._reported:
                self.error = None  # it works
            await self._start_without_link()

    async def _start_without_link(self) -> None:
        """Run, if the spool alone says with what; a link may be a long time coming."""
        async with self._starting:
            if self.is_linked or self._has_lost or not self.spool.is_certain:
                return
            if self.pump is not None:
                if not self.errors:
                    return
                await self._stop_running()
            try:
                await self._start_from_spool()
            except BlockreplError as error:
                self._report(error)
                await self._stop_running()

    async def _start_from_spool(self) -> None:
        state = self.spool.state
        assert state is not None
        due = await trio.to_thread.run_sync(_fold, self.spool, state.attached)
        attached = {disk.id for disk in state.disks}
        entries = [entry for entry in self.entries if entry.id in attached]
        self._start(Known.of(state.attached), due, entries, state.disks)

    async def _start_from(self, attached: Attached) -> None:
        """Run, from what the receiver says; a spool from before a reboot comes first."""
        remembered = await trio.to_thread.run_sync(self._remembered, attached.group_id)
        lost = attached.next_number < remembered
        if lost:
            log.error("group %s: the receiver has lost frames that were durable there", self.name)
        self._has_lost = self._has_lost or lost
        if self.spool.is_active and not self._has_lost:
            state = self.spool.state
            assert state is not None
            if (
                state.attached.group_id == attached.group_id
                and state.attached.next_number <= attached.next_number <= self.spool.next_number
            ):
                await self._start_from_spool()
                return
        await trio.to_thread.run_sync(self.spool.clear)  # also of what is yet to be swept
        known = Known.of(attached)
        self._start(known, known.copy(), self.entries, _attach_disks(self.entries))
        if self._has_lost:  # the doubts are in the rings now, durably noted
            for entry in [one for one in self.entries if one.name in self.errors]:  # but of these
                await trio.to_thread.run_sync(self._source_disks.bind_replica, entry, None)
            self._has_lost = False
            self._noted = _note_of(known, _attach_disks(self.entries))
            await trio.to_thread.run_sync(
                write_note, self._source_disks.home, self.name, self._noted
            )

    def _remembered(self, replica: UUID) -> int:
        """Which frame was due at this replica, as far as anything here knows; 0: nothing does."""
        note = read_note(self._source_disks.home, self.name)
        found = [note.next_number] if note is not None and note.replica == replica else [0]
        rings = [ring_path(entry.id.bytes) for entry in self.entries if entry.replica == replica]
        return max(found + [read_next_number(path) for path in rings])

    def _start(
        self, known: Known, due: Known, entries: list[DiskEntry], attached: list[AttachDisk]
    ) -> None:
        self._close_disks()
        self._attached_entries = entries
        self._retry_at = trio.current_time() + RETRY_SECONDS
        for entry in entries:
            self._open_disk(entry, known, due)
        self.pump = GroupPump(
            self.disks,
            known,
            due,
            attached,
            self.spool,
            self._source,
            self._clock,
            held=bool(self.errors),
        )
        self.pump.comparers.append(self.scrub)
        self.scrub.follow(self.pump)
        self._notify()

    def _open_disk(self, entry: DiskEntry, known: Known, due: Known) -> None:
        if entry.id.bytes not in due.disks:
            raise PeerError(f"the receiver leaves out disk {entry.name}")
        disk = SourceDisk(self._source_disks, entry, self._clock)
        try:
            _check_size(entry, due.disks[entry.id.bytes].size_bytes)
            disk.attach(
                due.disks[entry.id.bytes], due.group_id, due.watermark, has_lost=self._has_lost
            )
        except (BlockreplError, OSError) as error:
            disk.close()
            if isinstance(error, PeerError):
                raise
            log.error("disk %s: %s", entry.name, error)
            self.errors[entry.name] = (
                error if isinstance(error, BlockreplError) else StateError(str(error))
            )
            return
        disk.remember(known.next_number)  # doubts are in the ring now
        if entry.id.bytes in known.disks:
            there = known.disks[entry.id.bytes]
            disk.durable = (there.ring_id, there.next_sequence)
        self.disks.append(disk)

    async def _stop_running(self) -> None:
        pump = self.pump
        if pump is not None:
            await pump.abandon()  # first: who retires a ring may wait for a round that has no end
        async with pump.retiring if pump is not None else trio.Lock():
            if self.pump is not pump:
                return  # another task was faster
            self.pump = None
            self.scrub.follow(None)
            self._failed = False
            self._close_disks()
        self._notify()

    def _close_disks(self) -> None:
        for disk in self.disks:
            disk.close()
        self.disks = []
        self.errors = {}

    async def _watch_spool(self) -> None:
        """Measure how fast the spool gets less."""
        samples: deque[tuple[float, int]] = deque(maxlen=DRAIN_SAMPLES)
        while True:
            samples.append((trio.current_time(), self.spool.unread_bytes()))
            (first, before), (last, after) = samples[0], samples[-1]
            self._drain_per_second = (before - after) / (last - first) if last > first else 0.0
            await trio.sleep(1.0)

    def drain_seconds(self) -> float | None:
        """Until the spool is drained, at the rate of late; None: it does not get less."""
        if self._drain_per_second <= 0:
            return None
        return self.spool.unread_bytes() / self._drain_per_second

    # --- what a session does with the group

    async def attach_disks(self) -> list[AttachDisk]:
        """What to name in ATTACH: the disks of the frames that wait, else those wanted."""
        await self._ready.wait()
        if self.pump is not None:
            return self.pump.outbox.disks
        if self.spool.state is not None:
            return self.spool.state.disks
        return _attach_disks(self.entries)

    async def serve(self, attached: Attached, link: Link) -> None:
        """Replicate over a link until the disks change; then attach again.

        Raises what the receiver refuses the group with; LostError or DamageError when it has to
        begin anew, by attaching again; PeerError ends the session.
        """
        if not self.entries and self.pump is None and not self.spool.is_active:
            self.finished = True  # the receiver has been told
            return
        self._refusal = _Refusal()
        pump: GroupPump | None = None
        is_outdated = False
        try:
            async with self._starting:
                if self.pump is None:
                    await self._start_from(attached)
                pump = self.pump
                assert pump is not None
                self.error = None
                await pump.outbox.connect(attached, link.window_messages, link.window_bytes)
                self.is_linked = True
            await self._replicate(pump, link)
            is_outdated = True
        except (LostError, DamageError):
            self._has_lost = is_outdated = True
            raise
        finally:
            self.is_linked = False
            if pump is not None:
                pump.outbox.disconnect()
            if is_outdated or self._failed:
                with trio.CancelScope(shield=True):
                    await self._stop_running()
                    if self._has_lost:
                        await trio.to_thread.run_sync(self.spool.clear)
            elif pump is not None and pump.is_stopped:
                pump.resume()
                self._notify()

    async def _replicate(self, pump: GroupPump, link: Link) -> None:
        """Until the disks have changed and nothing waits any more."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump.outbox.serve, link.send, link.shape)
                nursery.start_soon(self._watch_refusal)
                while not (self._is_outdated(pump) and await self._stops(pump)):
                    await trio.sleep(LOOK_SECONDS)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise ours_of(group) from group

    async def _stops(self, pump: GroupPump) -> bool:
        """Stop a pump when nothing waits; False when a ring would fill up until then: nobody reads
        any meanwhile, and the spool is what has room.
        """
        if not pump.outbox.is_direct:
            return False
        await pump.stop()
        while not pump.outbox.is_drained:
            if pump.is_pressed():
                pump.resume()
                self._notify()
                return False
            with trio.move_on_after(PRESSURE_SECONDS):
                await pump.outbox.drained()
        return True

    def refuse(self, error: BlockreplError) -> None:
        """The receiver has refused the group during this link."""
        self._refusal.error = error
        self._refusal.happened.set()

    async def _watch_refusal(self) -> None:
        await self._refusal.happened.wait()
        assert self._refusal.error is not None
        raise self._refusal.error

    def _is_outdated(self, pump: GroupPump) -> bool:
        if pump.outbox.disks != _attach_disks(self.entries):
            return True
        images = {entry.id: entry.image for entry in self.entries}
        if any(images[entry.id] != entry.image for entry in self._attached_entries):
            return True
        return bool(self.errors) and trio.current_time() > self._retry_at

    def acknowledged(self, group: bytes, messages: int, number: int) -> None:
        """PeerError when it cannot be."""
        if self.pump is not None and self.pump.outbox.known.group_id.bytes == group:
            self.pump.outbox.acknowledged(messages, number)

    def verdict(self, verdict: Verdict) -> None:
        if self.pump is not None and self.pump.outbox.known.group_id.bytes == verdict.group:
            self.pump.verdict(verdict)

    async def grow(self, entry: DiskEntry, size_bytes: int) -> DiskEntry:
        """Give a disk its new size (storage/growing.py). StateError, StorageError.

        Blocks for as long as it takes to copy a ring: no task may touch it meanwhile.
        """
        pump = self.pump
        async with (
            pump.retiring if pump is not None else trio.Lock(),
            pump.between_rounds if pump is not None else trio.Lock(),
        ):
            grown = grow_disk(self._source_disks, entry.name, size_bytes, self._clock)
            self.entries = [grown if one.id == grown.id else one for one in self.entries]
            for disk in self.disks:
                if disk.entry.id == grown.id:
                    disk.entry = grown
        return grown

    def end(self) -> None:
        """The group is no more at this source."""
        self._scope.cancel()
        forget_note(self._source_disks.home, self.name)


def _attach_disks(entries: list[DiskEntry]) -> list[AttachDisk]:
    return [
        AttachDisk(id=entry.id, name=entry.name, size_bytes=entry.size_bytes) for entry in entries
    ]


def _note_of(known: Known, disks: list[AttachDisk]) -> GroupNote:
    return GroupNote(
        replica=known.group_id,
        next_number=known.next_number,
        disks=tuple(disk.name for disk in disks),
    )


def _check_size(entry: DiskEntry, known_bytes: int | None) -> None:
    if known_bytes is not None and known_bytes > entry.size_bytes:
        raise StateError(
            f"disk {entry.name!r} has {known_bytes} bytes at the receiver, {entry.size_bytes} here",
            hint="a disk cannot shrink: give its image that size with `blockrepl disk resize`, or "
            "add it under another name",
            code="disk-size",
        )


def _fold(spool: Spool, attached: Attached) -> Known:
    """What the receiver will know when it has all of the spool. Blocks. DamageError."""
    due = Known.of(attached)
    spool.rewind(due.next_number)
    while spool.has_unread():
        due.apply(*spool.skip())
    spool.rewind(attached.next_number)
    return due
