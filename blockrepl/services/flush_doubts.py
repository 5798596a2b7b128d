"""The agent's look at how the local disks flush: the flushes that killed servers took with them are
asked about (storage/flush_watch.py), and a disk that has failed to flush is told of, once.

An fsync takes as long as the disk likes: it has a task and a thread of its own, and nobody waits
for it but the group's end. A disk may be taken up anew meanwhile, with a descriptor that is younger
than the flush: it waits for the answer that is on its way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import trio

from blockrepl.errors import StorageError
from blockrepl.services.source_disk import SourceDisk
from blockrepl.storage.flush_watch import FlushWatch
from blockrepl.storage.source import DiskEntry

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


def failed_flush(entry: DiskEntry) -> StorageError:
    return StorageError(
        f"image {entry.image} failed to flush: what was written to it may not be on the disk, "
        "whatever is read until this machine is restarted. "
        "Its regions stay hot: they are compared with the replica after that",
        hint="check the disk below the image, then restart this machine; nothing else clears this",
        code="flush-failed",
    )


class FlushDoubts:
    """Of one group's disks."""

    def __init__(self) -> None:
        self._asked: set[int] = set()  # rings whose answer is on its way
        self._told: set[tuple[int, str]] = set()  # rings, and of what

    async def run(self, disks: Callable[[], Sequence[SourceDisk]]) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for disk in disks():
                    if (watch := disk.flushes) is not None:
                        self._look(disk.entry, watch, nursery)
                await trio.sleep(LOOK_SECONDS)

    def _look(self, entry: DiskEntry, watch: FlushWatch, nursery: trio.Nursery) -> None:
        ring_id = watch.ring.geometry.ring_id
        if ring_id in self._asked:
            return
        match watch.look():
            case "ask":
                self._asked.add(ring_id)
                nursery.start_soon(self._ask, watch, watch.descriptor())
            case "stays":
                self._tell(
                    entry,
                    ring_id,
                    "its server was killed while it flushed, and no agent was there that could ask "
                    "whether that had failed: its regions stay hot until this machine is "
                    "restarted, so that a power loss is followed by a longer comparison",
                )
        if watch.ring.flush_failed():
            error = failed_flush(entry)
            self._tell(entry, ring_id, f"{error}; {error.hint}")

    def _tell(self, entry: DiskEntry, ring_id: int, what: str) -> None:
        if (ring_id, what) not in self._told:
            self._told.add((ring_id, what))
            log.warning("disk %s: %s", entry.name, what)

    async def _ask(self, watch: FlushWatch, descriptor: int) -> None:
        try:
            await trio.to_thread.run_sync(watch.ask, descriptor)
        finally:
            os.close(descriptor)
            self._asked.discard(watch.ring.geometry.ring_id)
