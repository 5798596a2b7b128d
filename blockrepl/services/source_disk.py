"""One disk as the agent sees it during a session: its ring, its image, and how far both have come.

States of a disk at the receiver, as in messages.AttachedDisk:

=====  ==========================  =====================================================
state  meaning                     leaves it by
=====  ==========================  =====================================================
empty  first sync not done         consistent mark, when nothing is stale any more
ready  replica equals the source   gap mark, when a record was not kept
gap    history broken, resyncing   consistent mark
=====  ==========================  =====================================================

The consistent mark needs more than "nothing is stale": a region's content was read while writes
were in flight, and those must have ended (`settled`), for only then everything that was read has a
record or a stale mark of its own.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from uuid import UUID

import numpy as np
import numpy.typing as npt

from blockrepl.errors import StateError
from blockrepl.formats.messages import AttachedDisk
from blockrepl.session.sender import DiskState, RingState, resume
from blockrepl.storage.clock import SourceClock
from blockrepl.storage.flush_watch import FlushWatch
from blockrepl.storage.retiring import Retirement
from blockrepl.storage.ring import RingReader, read_geometry, ring_path
from blockrepl.storage.source import (
    DiskEntry,
    Growth,
    SourceDisks,
    check_written,
    is_written_elsewhere,
)


class SourceDisk:
    def __init__(self, disks: SourceDisks, entry: DiskEntry, clock: SourceClock) -> None:
        self._disks = disks
        self._clock = clock
        self.entry = entry
        self.id = entry.id.bytes
        self.ring: RingReader | None = None
        self.image: int | None = None
        self.flushes: FlushWatch | None = None  # of the two
        self.state: DiskState = "empty"
        self.epoch = 0
        self.cursor = 0
        self.sent_stamp = 0  # of the last record or gap sent
        self.gap_in_flight = 0
        self.rings_seen = 0  # opened since the disk was taken up
        self._was_blank = False  # the replica held nothing of the disk at its attachment
        self.durable = (0, 0)  # ring, and its records before which all are durable at the receiver
        self._gap_before_ring = 0  # a gap that no ring reports: history broken since this stamp
        self._gap_reason = ""  # why that one is, where no record is lost
        self._known_ring = 0
        self._unsettled: frozenset[tuple[int, int]] | None = None
        self.owes_note = False  # the end of a sync is durable: see `note_consistent`
        # Held while a note, and what it is about, change: a doubt until its marks are there, a
        # ring that is taken up, the end of a sync.
        self._noting = threading.Lock()

    # --- opening

    def attach(
        self, known: AttachedDisk, replica: UUID, watermark: int, *, has_lost: bool = False
    ) -> None:
        """Take up what the receiver knows of the disk. StateError when the image is not there.

        ``has_lost``: the receiver has lost frames that were durable there once.
        """
        same_replica = self.entry.replica == replica
        self.state = known.state
        self._was_blank = known.blank
        self.epoch = known.epoch
        self.gap_in_flight = 0
        self._gap_before_ring = 0
        self._unsettled = None
        self._known_ring = known.ring_id
        with self._disks.lock(self.entry):
            self._disks.check_served_ring(self.entry, self._clock)
            if (
                not same_replica
                or has_lost
                or known.state != "ready"
                or self.entry.stale_ring
                or ring_path(self.id).exists()  # of another clock, perhaps
                or self._disks.hot_regions(self.entry).any()
            ):
                self._disks.ensure_ring(self.entry, self._clock)
        self._open_ring()
        if self.ring is not None:
            self.ring.restart_syncs()
            self._resume(self.ring, known, watermark, same_replica=same_replica, has_lost=has_lost)
        if not same_replica:
            # Bound only now: stale marks come first, or a crash between would lose them.
            self.entry = self._disks.bind_replica(self.entry, replica)

    def _resume(
        self,
        ring: RingReader,
        known: AttachedDisk,
        watermark: int,
        *,
        same_replica: bool,
        has_lost: bool = False,
        is_durable: bool = True,
    ) -> None:
        """``is_durable``: what the position says; else it was put, no more."""
        ring_id = ring.geometry.ring_id
        stale_ring, base_ring = self.entry.stale_ring, self.entry.base_ring
        send_all = self.entry.send_all
        if self.entry.is_unmarked:  # an agent was killed amid a doubt, whose regions nobody knows
            ring.mark_all_stale()
        state = RingState(
            ring_id,
            ring.tail(),
            ring.head(),
            ring.needs_sync(),
            ring.durable(),
            is_first=base_ring == ring_id,
        )
        same_replica = same_replica and stale_ring in (0, ring_id)
        plan = resume(known, state, same_replica=same_replica, has_lost=has_lost)
        if plan.mark_all_stale:
            ring.mark_all_stale()
            stale_ring, base_ring = ring_id, 0
        elif known.state == "ready" and not ring.needs_sync():
            stale_ring, send_all = 0, False
        if known.ring_id == 0 and known.state == "empty":
            base_ring = ring_id
        is_doubted = known.state == "ready" and ring.needs_sync() and not ring.gap_from()
        if plan.gap or is_doubted:  # by `doubt`, whose gap the receiver was never told
            self._gap_before_ring = watermark + 1
            self._gap_reason = "" if plan.gap else "a resync that was begun is to be ended"
        # The group may have gone on without the disk: nothing can be added beneath its watermark.
        # What is skipped stays in the ring until a later position is durable at the receiver.
        cursor = ring.first_after(watermark, plan.cursor, state.head)
        if cursor > plan.cursor:
            ring.mark_records_stale(plan.cursor, cursor)
            if known.ring_id:
                base_ring = 0
            if known.state == "ready":
                self._gap_before_ring = ring.stamp(plan.cursor)
                self._gap_reason = ""
        # Noted after the marks and before a record is released: a crash between loses neither.
        self.entry = self._disks.note_rings(
            self.entry, stale_ring=stale_ring, base_ring=base_ring, send_all=send_all
        )
        self.cursor = cursor
        if is_durable:
            ring.release(plan.cursor)
        if plan.mark_all_stale:  # skipped for content, which no region cools without
            ring.set_durable(plan.cursor)

    def refresh(self, watermark: int) -> None:
        """Notice a ring that was made, or made anew, since the last look; and a server that was
        started on another file than the image that is open.

        A ring whose file is gone is kept until there is another: its server still writes to it.
        And so is the image, whatever its path leads to, while no server says which it writes.
        """
        if self._is_current():
            return
        if read_geometry(ring_path(self.id)) is not None:
            with self._noting:
                self._take_up_ring(watermark)

    def _is_current(self) -> bool:
        """Whether the ring is the one at its path, and the image the one that its server writes."""
        return self.ring is not None and self.ring.is_current() and not self.is_written_elsewhere()

    def is_written_elsewhere(self) -> bool:
        """Whether the disk's server writes to another file than the image that is open."""
        return self.image is not None and is_written_elsewhere(self.entry, self.image)

    def _take_up_ring(self, watermark: int) -> None:
        if self.ring is not None:
            self._known_ring = self.ring.geometry.ring_id
            self._unsettled = None
            self.close()
        self._open_ring()
        if self.ring is not None:
            known = AttachedDisk(
                id=self.entry.id,
                epoch=self.epoch,
                state=self.state,
                ring_id=self._known_ring,
                next_sequence=self.cursor,
            )
            has_grown = self.ring.geometry.ring_id == self._known_ring
            self._resume(self.ring, known, watermark, same_replica=True, is_durable=not has_grown)

    def _open_ring(self) -> None:
        path = ring_path(self.id)
        if read_geometry(path) is None:
            return
        if not self._disks.has_ring(self.entry, self._clock):
            raise StateError(
                f"the ring of disk {self.entry.name!r} is of another clock than the agent's",
                hint="restart the agent",
                code="ring-lost",
            )
        try:
            self.image = os.open(self.entry.image, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StateError(
                f"image {self.entry.image} of disk {self.entry.name!r} cannot be opened: "
                f"{error.strerror}",
                hint="bring it back, or remove the disk with `blockrepl disk remove`",
                code="no-image",
            ) from error
        check_written(self.entry, self.image)
        self.ring = RingReader(path, self.id)
        self.flushes = FlushWatch(self.ring, self.image)
        self.rings_seen += 1

    def close(self) -> None:
        if self.image is not None:
            os.close(self.image)
        self.image = None
        self.ring = None
        self.flushes = None

    def recover(self) -> None:
        """Clean up what a killed server left in the ring: the group would wait for it for ever.

        Between rounds, while no server runs: its gap begins now. Blocks on the disk.
        """
        ring = self.ring
        if ring is not None and (
            ring.writes_in_flight() or ring.flushes_under_way() or not ring.quiesce()
        ):
            self._disks.recover_ring(self.entry, ring, self._clock)

    def retirement(self) -> Retirement | None:
        """Of a ring that nothing is left in, for `retire`."""
        ring = self.ring
        if ring is None or not self._is_done_with(ring):
            return None
        return Retirement(self._disks, self.entry, ring)

    def retire(self, prepared: Retirement) -> None:
        """Give the ring back, unless something has come since. Between rounds. OSError."""
        ring = self.ring
        if ring is prepared.ring and self._is_done_with(ring) and prepared.finish():
            self.close()
            self._known_ring = ring.geometry.ring_id

    def _is_done_with(self, ring: RingReader) -> bool:
        has_note = self.entry.stale_ring or self.entry.send_all  # whose end is yet to be noted
        return self.state == "ready" and self.cursor == ring.head() and not has_note

    def growths_after(self, size_bytes: int | None) -> list[Growth]:
        """What a receiver that knows of so many bytes must hear of; None: it knows no growing."""
        if size_bytes is None or size_bytes >= self.entry.size_bytes:
            return []
        noted = [one for one in self.entry.growths if one.size_bytes > size_bytes]
        return noted or [Growth(at_ns=0, size_bytes=self.entry.size_bytes)]

    # --- gaps and their end

    def gap_to_report(self) -> int:
        """First stamp that is missing from history, if the receiver must hear of it; else 0."""
        if self.gap_in_flight or self.ring is None:
            return 0
        found = min(filter(None, (self._gap_before_ring, self.ring.gap_from())), default=0)
        if found and self.state != "ready":
            self.ring.clear_gap(self.ring.gap_from())  # the receiver knows of one already
            self._gap_before_ring = 0
            return 0
        return found

    def gap_reason(self) -> str:
        """Why there is a gap although no record is lost; empty where some are."""
        return "" if self.ring is None or self.ring.gap_from() else self._gap_reason

    def gap_reported(self, from_ns: int) -> None:
        self.gap_in_flight = from_ns
        self.sent_stamp = max(self.sent_stamp, from_ns)
        self.state = "gap"
        self.owes_note = False
        self.epoch += 1
        self._unsettled = None

    def gap_durable(self, from_ns: int) -> None:
        self.gap_in_flight = 0
        self._gap_before_ring = 0
        if self.ring is not None:
            self.ring.clear_gap(self.ring.gap_from())

    def kept(self, ring_id: int, sequence: int) -> None:
        """Records of that ring before ``sequence`` are held elsewhere: their room may be reused."""
        if self.ring is not None and sequence and self.ring.geometry.ring_id == ring_id:
            self.ring.release(sequence)

    def remember(self, next_number: int) -> None:
        """For an agent that is killed: the receiver has the group's frames before that one."""
        if self.ring is not None:
            self.ring.set_next_number(next_number)

    def note_durable(self, ring_id: int, sequence: int) -> None:
        """The source will remember that the receiver has these records: their regions may cool."""
        if self.ring is not None and self.ring.geometry.ring_id == ring_id:
            self.ring.set_durable(sequence)

    @property
    def must_compare(self) -> bool:
        """Whether the replica may hold content already: ask before sending."""
        return (not self._was_blank or self.state != "empty") and not self.entry.send_all

    def may_use_base(self) -> bool:
        """Whether content may go straight into the base image.

        Only while the journal can hold nothing that is older than the content and would hide it:
        first sync, no record of the disk ever lost, none from an earlier ring. Not the stale marks
        say so: a record that is lost in a region that waits to be sent makes none, though an older
        one of that region may be in the journal.
        """
        return (
            self.ring is not None
            and self.state == "empty"
            and self.ring.dropped() == 0
            and self.entry.base_ring == self.ring.geometry.ring_id
        )

    def settled(self) -> bool:
        """Whether the replica equals the source, once all that the ring holds now is sent."""
        ring = self.ring
        if self.state == "ready" or self.gap_in_flight:
            return False
        if ring is None or ring.needs_sync() or ring.is_syncing() or ring.gap_from():
            self._unsettled = None
            return False
        if self._unsettled is None:
            self._unsettled = ring.writes_in_flight()
        self._unsettled &= ring.writes_in_flight()
        return not self._unsettled

    def doubt(
        self,
        regions: npt.NDArray[np.intp] | slice,
        from_ns: int,
        reason: str,
        *,
        send_all: bool = False,
    ) -> None:
        """The replica may lack these regions' content, whatever the hot map says: sync them.

        ``from_ns``: a gap from there on, past the watermark, unless history is broken already;
        ``reason`` is for the log. ``send_all``: all that is owed is sent without asking what
        differs. Blocks on the disk. Between rounds. StateError, StorageError.
        """
        with self._noting:
            self._doubt(regions, from_ns, reason, send_all=send_all)

    def _doubt(
        self, regions: npt.NDArray[np.intp] | slice, from_ns: int, reason: str, *, send_all: bool
    ) -> None:
        with self._disks.lock(self.entry):
            self._disks.check_served_ring(self.entry, self._clock)
            self._disks.ensure_ring(self.entry, self._clock)
        if not self._is_current():
            self._take_up_ring(from_ns - 1)
        assert self.ring is not None
        # Before the marks: were the ring lost with them, nothing else would know of these regions.
        note = partial(
            self._disks.note_rings,
            stale_ring=self.ring.geometry.ring_id,
            base_ring=self.entry.base_ring,
            send_all=send_all or self.entry.send_all,
        )
        self.entry = note(self.entry, is_unmarked=True)
        self.ring.stale[regions] = 1
        if self.state == "ready":
            if not self._gap_before_ring:
                self._gap_reason = reason
            self._gap_before_ring = min(self._gap_before_ring or from_ns, from_ns)
        self._unsettled = None
        self.entry = note(self.entry)

    def became_consistent(self) -> None:
        self.state = "ready"
        self._unsettled = None

    def consistent_durable(self) -> None:
        """All that was ever marked stale in the ring is durable, or hot since."""
        if self.state == "ready":
            self.owes_note = True

    def note_consistent(self) -> None:
        """Note that, if it is still true. Blocks on the disk. StateError, OSError.

        An agent that is killed before it does so finds what it would have found before the
        acknowledgement: `_resume` notes the end then, or with the ring lost, begins anew.
        """
        if not self._noting.acquire(blocking=False):
            return  # doubted just now, or another ring is taken up: what is noted stays
        try:
            ring = self.ring
            if self.owes_note and self.state == "ready" and not (ring and ring.needs_sync()):
                self.entry = self._disks.note_rings(
                    self.entry, stale_ring=0, base_ring=self.entry.base_ring, send_all=False
                )
                self.owes_note = False
        finally:
            self._noting.release()
