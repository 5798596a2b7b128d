"""What an outbox holds in memory: sent and not acknowledged, then not yet sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import chain

from blockrepl.formats.messages import MessageType
from blockrepl.services.outbox_item import Item, total_bytes


class OutboxMemory:
    """``size_bytes`` of both queues. Its bounds are the outbox's."""

    def __init__(self) -> None:
        self.sent: deque[Item] = deque()
        self.unsent: deque[Item] = deque()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self.sent) + len(self.unsent)

    def items(self) -> list[Item]:
        return [*self.sent, *self.unsent]

    def add(self, item: Item) -> None:
        self.unsent.append(item)
        self.size_bytes += item.size_bytes

    def send_next(self) -> Item:
        """The next to be sent. Only DATA is acknowledged, and stays until then."""
        item = self.unsent.popleft()
        if item.message is MessageType.DATA:
            self.sent.append(item)
        else:
            self.size_bytes -= item.size_bytes
        return item

    def acknowledged(self, item: Item) -> None:
        """Let go of an item, if it is the first."""
        queue = self.sent or self.unsent  # the receiver may know of frames that this link never saw
        if queue and queue[0] is item:
            queue.popleft()
            self.size_bytes -= item.size_bytes

    def restart(self) -> None:
        """The link is gone: nothing is sent, and what has no number never will be."""
        self.unsent = deque(chain(self.sent, self.unsent))
        self.sent.clear()
        self.keep(lambda item: item.number > 0)

    def keep(self, is_kept: Callable[[Item], bool]) -> None:
        """Let go of the others."""
        self.sent = deque(filter(is_kept, self.sent))
        self.unsent = deque(filter(is_kept, self.unsent))
        self.size_bytes = total_bytes(self.items())
