"""Giving back the ring of a disk that nobody serves: all of it is durable, and nothing is hot.

1. `prepare`, beside the ring's reader: takes the disk's lock and the image's; if no server writes
   to the ring, and it owes nothing, syncs the image, which takes as long as the disk likes. If it
   owes nothing still, makes the hot map cold
2. `finish`, while nobody reads the ring: removes it, if it owes nothing even then. It waits for no
   disk: nobody reads the rings of the group's other disks meanwhile, and they fill
3. `close`, in any case

The locks are held from 1 to 3. So no server writes behind the sync, and what goes cold is durable;
and none flushes behind a sync that has failed, before the ring says so: the system tells that once,
and calls the pages clean. A server that starts waits for the disk's lock: after 1 there is no time
to lose.

A ring that stays behind 1 leaves a map that is true: all there was is at the replica and on the
disk, and whoever changes that says so first, a server in the map, a doubt in the disk's entry.
"""

from __future__ import annotations

import os

from blockrepl import limits
from blockrepl.errors import StateError
from blockrepl.formats import hot_map
from blockrepl.storage.home import ExclusiveLock, write_atomically
from blockrepl.storage.image import lock_image
from blockrepl.storage.ring import RingReader
from blockrepl.storage.source import DiskEntry, SourceDisks, check_unwritten


class Retirement:
    """`prepare` blocks on the disk, nothing else does. OSError."""

    def __init__(self, disks: SourceDisks, entry: DiskEntry, ring: RingReader) -> None:
        self.ring = ring
        self._disks = disks
        self._entry = entry
        self._lock: ExclusiveLock | None = None
        self._image: int | None = None

    def prepare(self) -> bool:
        """False when it cannot be given back now."""
        self._lock = self._disks.lock(self._entry)
        try:
            self._image = lock_image(self._entry.image)
            check_unwritten(self._entry)
        except StateError:
            return False  # somebody serves it, or it is away
        if self._owes():
            return False
        try:
            os.fsync(self._image)
        except OSError:
            self.ring.flush_has_failed()
            raise
        if self._owes():
            return False
        entry = self._entry
        cold = hot_map.encode(entry.id.bytes, entry.size_bytes, limits.REGION_BYTES, hot=False)
        write_atomically(self._disks.hot_map_path(entry), cold)
        return True

    def finish(self) -> bool:
        """Behind `prepare`. True when the ring is gone."""
        assert self._image is not None
        if self._owes():
            return False
        self.ring.path.unlink(missing_ok=True)
        return True

    def _owes(self) -> bool:
        """Whether something in the ring is yet to be done, or another one is in its place."""
        ring = self.ring
        return bool(
            not ring.is_current()
            or ring.writes_in_flight()  # of a server that was killed, as half an append is
            or not ring.quiesce()
            or ring.needs_sync()
            or ring.is_syncing()
            or ring.gap_from()
            or ring.head() != ring.durable()
            or ring.flushes_under_way()
            or not ring.trusts_flushes()
        )

    def close(self) -> None:
        if self._image is not None:
            os.close(self._image)
            self._image = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
