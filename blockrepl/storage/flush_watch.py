"""What a killed server took with it: did the flush that it was killed in fail?

The kernel tells of a write that failed once to each open file, at its next fsync; a file that is
opened once somebody has been told hears nothing, and the pages count as clean. A server that is
killed inside fdatasync is told, and tells nobody. But the agent has the image open too, and its own
descriptor still has the error to come, if it is older than the flush:

========================================  =====================================================
the descriptor was opened                 the killed server's flush
========================================  =====================================================
before it began: all flushes that were    is asked about: an fsync of the descriptor fails, or
under way at the opening have been seen   says that there was no error to tell
to end, and no kill was in doubt then
later, or nobody can tell                 stays in doubt: nothing goes cold as long as this ring is
                                          there, which costs a longer comparison, some day
========================================  =====================================================

A flush whose slot is even has ended, unless a kill was counted meanwhile: who makes the slots of a
killed server even counts it first. So the slots are looked at first, and the count after them.
"""

from __future__ import annotations

import os
from typing import Literal

from blockrepl.storage.ring import RingReader

Doubt = Literal["none", "ask", "stays"]


class FlushWatch:
    """One ring and one open image. ``image`` was opened before."""

    def __init__(self, ring: RingReader, image: int) -> None:
        self.ring = ring
        self._image = image
        self._older = ring.flushes_under_way()  # perhaps; those that have not been seen to end
        self._unknown_at_opening = ring.unknown_flushes()

    def look(self) -> Doubt:
        """What to do about the flushes of killed servers. To be called now and then, always."""
        ring = self.ring
        if self._older:
            older = self._older & ring.flushes_under_way()
            if ring.unknown_flushes() == self._unknown_at_opening:
                self._older = older
        known = ring.known_flushes()
        if ring.flush_failed() or ring.unknown_flushes() == known:
            return "none"
        return "stays" if self._older or known < self._unknown_at_opening else "ask"

    def descriptor(self) -> int:
        """The image for `ask`, to be closed by the caller; the same open file as far as errors go.

        Whoever closes the watched one meanwhile does no harm.
        """
        return os.dup(self._image)

    def ask(self, descriptor: int) -> bool:
        """After "ask": whether all is well. Blocks for as long as the disk likes."""
        # First: a server that is killed from here on is another matter.
        count = self.ring.unknown_flushes()
        try:
            os.fsync(descriptor)
        except OSError:
            self.ring.flush_has_failed()
            return False
        self.ring.set_known_flushes(count)
        return True
