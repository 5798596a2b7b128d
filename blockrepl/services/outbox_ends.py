"""The two ends of an outbox: whose frames it holds, and what sends them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from blockrepl.errors import StateError
from blockrepl.formats.frame import Buffer
from blockrepl.formats.messages import MessageType
from blockrepl.session.release import Release

# Gives a message's buffers, once, when the channel is free. Whoever takes them is done with them
# before it waits for anything: they may be the ring's memory.
Take = Callable[[], tuple[Buffer, ...]]
Send = Callable[[MessageType, int, Take], Awaitable[None]]
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


class LostError(StateError):
    """The receiver's answer and ours do not fit: one of the two has lost something."""

    code = "receiver-lost"
