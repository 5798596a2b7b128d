"""The source's clock: stamps read as UTC nanoseconds and never go back.

A stamp is CLOCK_MONOTONIC plus an offset that is fixed once per boot, so a stepped wall clock
changes nothing. The file ``<source>/clock.json`` holds boot id, offset and a high-water mark: a
lease that is renewed ahead of time while the agent runs. After a reboot the offset is chosen so
that stamps begin beyond the mark, whatever the wall clock says.

So no stamp may leave the rings, which a reboot takes along, before a mark beyond it is durable
(`covers`). The agent renews the lease in a worker thread when a third of it is gone; only when it
has run out, for the disk has stalled or there was no agent, does a pump wait for it.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from blockrepl.storage.home import exclusive_lock_wait, sync_directory, write_atomically
from blockrepl.units import NANOSECONDS_PER_SECOND

LEASE_NS = 60 * NANOSECONDS_PER_SECOND
RENEW_NS = 20 * NANOSECONDS_PER_SECOND
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _ClockFile(BaseModel):
    model_config = ConfigDict(frozen=True)
    boot_id: str
    offset_ns: int
    high_water_ns: int


class SourceClock:
    """Reads the host's stamps. One offset for all disks and processes of a source."""

    def __init__(self, path: Path, content: _ClockFile) -> None:
        self._path = path
        self._content = content
        self._renewing = threading.Lock()

    @property
    def offset_ns(self) -> int:
        return self._content.offset_ns

    def now(self) -> int:
        return time.monotonic_ns() + self._content.offset_ns

    def covers(self, stamp: int) -> bool:
        """Whether no stamp of a later boot can be that stamp or one before it."""
        return stamp < self._content.high_water_ns

    def is_due(self) -> bool:
        """Whether the lease should be renewed."""
        return self._content.high_water_ns - self.now() < LEASE_NS - RENEW_NS

    def renew(self) -> None:
        """Move the high-water mark ahead of now when it comes near. OSError.

        Blocks on the disk, in any thread; of several at a time one writes, the others wait for it.
        """
        with self._renewing:
            if self.is_due():
                high_water_ns = self.now() + LEASE_NS
                content = self._content.model_copy(update={"high_water_ns": high_water_ns})
                write_atomically(self._path, content.model_dump_json().encode())
                self._content = content


def open_clock(source_directory: Path) -> SourceClock:
    """Open the clock of this boot; the first to do so fixes the offset."""
    path = source_directory / "clock.json"
    boot_id = _BOOT_ID.read_text().strip()
    with exclusive_lock_wait(source_directory / "clock.lock"):
        try:
            content: _ClockFile | None = _ClockFile.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            content = None
        if content is None or content.boot_id != boot_id:
            floor = content.high_water_ns if content else 0
            start = max(time.time_ns(), floor)
            content = _ClockFile(
                boot_id=boot_id,
                offset_ns=start - time.monotonic_ns(),
                high_water_ns=start + LEASE_NS,
            )
            write_atomically(path, content.model_dump_json().encode())
        else:  # who wrote it may have been killed before its name was durable
            sync_directory(source_directory)
    return SourceClock(path, content)
