"""The sender's half of a session: what may be sent next, and what an acknowledgement sets free.

Rules
-----
- Frames of a group are numbered without gaps, from the number the receiver asks for; frames of
  kind base carry number 0.
- One window, in messages and bytes, over all DATA of a group: when it is full, nothing is built.
- An acknowledgement names how many DATA messages of this session are durable. Nothing is freed
  before. It never goes back and never passes what was sent: a peer that says otherwise lies.
- A session that ends takes its state with it. The ring keeps what was not acknowledged, and the
  next session goes on where the receiver says.

Where to go on with a disk, `resume`, is this table:

====================  ==================  ===============================================
the receiver knows    this ring           then
====================  ==================  ===============================================
another replica       any                 everything is stale, and what the ring holds is in that
                                          content: go on at its head. Its records may be older than
                                          the group's watermark there
this ring             at or past tail     go on at the receiver's next record
this ring             before tail         the receiver has lost durable records: everything is
                                          stale, gap
another ring or none  stale regions       go on at the tail; a gap since the last watermark,
                                          unless the first sync is not done yet
another ring or none  nothing stale       the old ring was retired in order: go on at the tail
====================  ==================  ===============================================
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from blockrepl.errors import PeerError
from blockrepl.formats.messages import Attached, AttachedDisk

DiskState = Literal["empty", "ready", "gap"]


@dataclass(frozen=True, slots=True)
class Release:
    """What one DATA message stands for, handed back when it is durable."""

    disk: bytes = b""
    ring_id: int = 0  # the ring that next_sequence and regions speak of
    next_sequence: int = 0  # records of the disk's ring before it are durable; 0: none were sent
    regions: tuple[int, ...] = ()  # whose content is durable
    gap_from: int = 0  # the gap that the receiver now knows of
    consistent: bool = False  # the receiver knows that the replica equals the disk
    checkpoint: str = ""


@dataclass(frozen=True, slots=True)
class _InFlight:
    size_bytes: int
    watermark: int
    release: Release


@dataclass(slots=True)
class GroupSender:
    """Numbering, window and acknowledgements of one group in one session."""

    group: bytes
    next_number: int
    durable_watermark: int
    window_messages: int
    window_bytes: int
    _in_flight: deque[_InFlight] = field(default_factory=deque)
    _in_flight_bytes: int = 0
    _acknowledged: int = 0

    @classmethod
    def attached(cls, answer: Attached, window_messages: int, window_bytes: int) -> GroupSender:
        return cls(
            answer.group_id.bytes,
            answer.next_number,
            answer.watermark,
            window_messages,
            window_bytes,
        )

    @property
    def in_flight_bytes(self) -> int:
        return self._in_flight_bytes

    @property
    def in_flight_messages(self) -> int:
        return len(self._in_flight)

    def has_room(self, size_bytes: int) -> bool:
        """Whether a message of this size may be sent now."""
        return (
            len(self._in_flight) < self.window_messages
            and self._in_flight_bytes + size_bytes <= self.window_bytes
        )

    def take_number(self) -> int:
        number = self.next_number
        self.next_number += 1
        return number

    def sent(self, size_bytes: int, watermark: int, release: Release) -> None:
        self._in_flight.append(_InFlight(size_bytes, watermark, release))
        self._in_flight_bytes += size_bytes

    def acknowledged(self, messages: int, number: int) -> list[Release]:
        """Take an acknowledgement; what it sets free, in order. PeerError when it cannot be."""
        count = messages - self._acknowledged
        if not 0 <= count <= len(self._in_flight) or number >= self.next_number:
            raise PeerError("the receiver acknowledges what was never sent")
        freed = [self._in_flight.popleft() for _ in range(count)]
        self._acknowledged = messages
        for message in freed:
            self._in_flight_bytes -= message.size_bytes
            self.durable_watermark = max(self.durable_watermark, message.watermark)
        return [message.release for message in freed]


@dataclass(frozen=True, slots=True)
class RingState:
    """What the sender needs to know of a ring to go on with it."""

    ring_id: int
    tail: int
    head: int
    has_stale: bool


@dataclass(frozen=True, slots=True)
class Resume:
    cursor: int  # first record to send
    mark_all_stale: bool
    gap: bool  # history is broken since the last durable watermark


def resume(known: AttachedDisk, ring: RingState, *, same_replica: bool) -> Resume:
    """Where to go on with a disk; the table above. PeerError when the receiver is ahead of it."""
    is_ready = known.state == "ready"
    if not same_replica:
        return Resume(ring.head, mark_all_stale=True, gap=is_ready)
    if known.ring_id == ring.ring_id:
        if known.next_sequence > ring.head:
            raise PeerError("the receiver claims records that were never written")
        if known.next_sequence < ring.tail:
            return Resume(ring.tail, mark_all_stale=True, gap=is_ready)
        return Resume(known.next_sequence, mark_all_stale=False, gap=False)
    return Resume(ring.tail, mark_all_stale=False, gap=is_ready and ring.has_stale)
