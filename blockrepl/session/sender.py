"""The sender's half of a session: what may be sent next, and what an acknowledgement sets free.

Rules
-----
- One window, in messages and bytes, over all DATA of a group: when it is full, nothing is sent.
- An acknowledgement names how many DATA messages of this session are durable. Nothing is freed
  before. It never goes back and never passes what was sent: a peer that says otherwise lies.
- A session that ends takes its window with it. Frames that were not acknowledged are kept (by the
  outbox), and the next session goes on where the receiver says.

Where to go on with a disk, `resume`, is this table:

====================  ==================  ===============================================
the receiver knows    this ring           then
====================  ==================  ===============================================
another replica       any                 everything is stale, and what the ring holds is in that
                                          content: go on at its head. Its records may be older than
                                          the group's watermark there
fewer frames than     any                 the receiver has lost durable frames: everything is
were durable                              stale, gap; go on at the head, as above
this ring             at or past tail     go on at the receiver's next record
this ring             before tail         as with fewer frames
another ring or none  records let go      as with fewer frames: the ring let go of records that were
                      that are not noted  told to be durable, or in a spool, and they are not there.
                      to be durable       (Skipped ones, that are in a first sync's content, are
                                          noted at once)
none                  stale regions, and  go on at the tail: what became stale since the first sync,
                      the first sync's    the ring says itself
another ring or none  stale regions       go on at the tail; a gap since the last watermark,
                                          unless the first sync is not done yet
another ring or none  nothing stale       the old ring was retired in order: go on at the tail
====================  ==================  ===============================================
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from blockrepl.errors import PeerError
from blockrepl.formats.messages import AttachedDisk

DiskState = Literal["empty", "ready", "gap"]


class InFlight(Protocol):
    """A message that has been sent. Base frames carry number 0."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def number(self) -> int: ...


Item = TypeVar("Item", bound=InFlight)


@dataclass(slots=True)
class SendWindow(Generic[Item]):
    """What one session has sent of one group and not yet seen acknowledged."""

    window_messages: int
    window_bytes: int
    items: deque[Item] = field(default_factory=deque)
    size_bytes: int = 0
    _acknowledged: int = 0
    _last_number: int = 0

    def has_room(self, size_bytes: int) -> bool:
        """Whether a message of this size may be sent now."""
        return (
            len(self.items) < self.window_messages
            and self.size_bytes + size_bytes <= self.window_bytes
        )

    def sent(self, item: Item) -> None:
        self.items.append(item)
        self.size_bytes += item.size_bytes
        self._last_number = max(self._last_number, item.number)

    def acknowledged(self, messages: int, number: int) -> list[Item]:
        """Take an acknowledgement; what it sets free, in order. PeerError when it cannot be.

        ``number`` is the last durable frame, of this session or of one before.
        """
        count = messages - self._acknowledged
        if not 0 <= count <= len(self.items):
            raise PeerError("the receiver acknowledges what was never sent")
        if self._last_number and number > self._last_number:
            raise PeerError("the receiver acknowledges what was never sent")
        freed = [self.items.popleft() for _ in range(count)]
        self._acknowledged = messages
        self.size_bytes -= sum(item.size_bytes for item in freed)
        return freed


@dataclass(frozen=True, slots=True)
class RingState:
    """What the sender needs to know of a ring to go on with it."""

    ring_id: int
    tail: int
    head: int
    has_stale: bool
    durable: int  # records before it are noted to be durable at the receiver
    is_first: bool = False  # the first sync read the disk beside it, and beside no other since


@dataclass(frozen=True, slots=True)
class Resume:
    cursor: int  # first record to send
    mark_all_stale: bool
    gap: bool  # history is broken since the last durable watermark


def resume(
    known: AttachedDisk, ring: RingState, *, same_replica: bool, has_lost: bool = False
) -> Resume:
    """Where to go on with a disk; the table above. PeerError when the receiver is ahead of it."""
    is_ready = known.state == "ready"
    if not same_replica or has_lost:
        return Resume(ring.head, mark_all_stale=True, gap=is_ready)
    if known.ring_id == ring.ring_id:
        if known.next_sequence > ring.head:
            raise PeerError("the receiver claims records that were never written")
        if known.next_sequence < ring.tail:
            return Resume(ring.tail, mark_all_stale=True, gap=is_ready)
        return Resume(known.next_sequence, mark_all_stale=False, gap=False)
    if ring.tail > ring.durable:
        return Resume(ring.tail, mark_all_stale=True, gap=is_ready)
    says_itself = known.ring_id == 0 and ring.is_first
    gap = is_ready and ring.has_stale and not says_itself
    return Resume(ring.tail, mark_all_stale=False, gap=gap)
