"""Files of a simulated machine: what was not synced can be lost, torn or kept by a power loss.

The files are real (in memory), and reads see what was written. For each write that no sync has
followed, the machine remembers what was there before. A power loss takes all of those back and then
lets each happen again whole, in part (any sectors of it), or not at all; sizes likewise.

Directories, renames and SQLite's files count as durable at once.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockrepl.formats.frame import Buffer
from blockrepl.storage.files import Files
from scripts.simulation.world import World

SECTOR_BYTES = 512


@dataclass(slots=True)
class _Change:
    offset: int
    before: bytes
    size_before: int
    data: bytes | None  # None: the file was cut at ``offset``


@dataclass(slots=True)
class _Unsynced:
    path: Path
    changes: list[_Change] = field(default_factory=list)


class Machine:
    """The disk of one machine. ``full``: writes find no room."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.full = False
        self._unsynced: dict[int, _Unsynced] = {}

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        data = b"".join(buffers)
        if self.full:
            data = data[: self.world.chance.randrange(len(data) + 1)] if data else data
            if not data or self.world.chance.random() < 0.5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stat = os.fstat(descriptor)
        before = os.pread(descriptor, len(data), offset)
        os.pwrite(descriptor, data, offset)
        self._note(descriptor, stat.st_ino).append(_Change(offset, before, stat.st_size, data))
        return len(data)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        stat = os.fstat(descriptor)
        before = os.pread(descriptor, max(0, stat.st_size - size_bytes), size_bytes)
        os.ftruncate(descriptor, size_bytes)
        self._note(descriptor, stat.st_ino).append(_Change(size_bytes, before, stat.st_size, None))

    def sync(self, descriptor: int) -> None:
        self._unsynced.pop(os.fstat(descriptor).st_ino, None)

    def fail_to_sync(self, descriptor: int) -> None:
        """The kernel drops what it could not write: reads see what is on the disk."""
        unsynced = self._unsynced.pop(os.fstat(descriptor).st_ino, None)
        if unsynced is not None:
            kept = _lose(descriptor, unsynced.changes, self.world.chance)
            self.world.trace("sync failed", unsynced.path.name, kept, "of", len(unsynced.changes))

    def _note(self, descriptor: int, inode: int) -> list[_Change]:
        found = self._unsynced.get(inode)
        if found is None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            found = self._unsynced[inode] = _Unsynced(path)
        return found.changes

    def lose_power(self) -> None:
        """Decide what of the unsynced content is left."""
        chance = self.world.chance
        for inode, unsynced in self._unsynced.items():
            try:
                descriptor = os.open(unsynced.path, os.O_RDWR)
            except FileNotFoundError:
                continue
            try:
                if os.fstat(descriptor).st_ino == inode:
                    kept = _lose(descriptor, unsynced.changes, chance)
                    self.world.trace(
                        "power", self.name, unsynced.path.name, kept, "of", len(unsynced.changes)
                    )
            finally:
                os.close(descriptor)
        self._unsynced.clear()


def _lose(descriptor: int, changes: list[_Change], chance: random.Random) -> int:
    """Take the changes back, then let some happen; how many did whole."""
    for change in reversed(changes):
        os.ftruncate(descriptor, change.size_before)
        os.pwrite(descriptor, change.before, change.offset)
    lost, torn = chance.choice(((1.0, 0.0), (0.0, 0.0), (0.5, 0.0), (0.3, 0.5), (0.0, 1.0)))
    whole = 0
    for change in changes:
        if chance.random() < lost:
            continue
        if change.data is None:
            os.ftruncate(descriptor, change.offset)
            whole += 1
        elif chance.random() < torn:
            _tear(descriptor, change.offset, change.data, chance)
        else:
            os.pwrite(descriptor, change.data, change.offset)
            whole += 1
    return whole


def _tear(descriptor: int, offset: int, data: bytes, chance: random.Random) -> None:
    """A part of a write reaches the disk: the first sectors, or any."""
    first = offset // SECTOR_BYTES
    count = -(-(offset + len(data)) // SECTOR_BYTES) - first
    if chance.random() < 0.5:
        sectors = list(range(chance.randrange(count + 1)))
    else:
        sectors = [sector for sector in range(count) if chance.random() < 0.5]
    for sector in sectors:
        start = max(offset, (first + sector) * SECTOR_BYTES)
        end = min(offset + len(data), (first + sector + 1) * SECTOR_BYTES)
        os.pwrite(descriptor, data[start - offset : end - offset], start)


class SimulatedFiles(Files):
    """The system calls of whatever process runs, on its machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        self._machine.world.operation("write")
        return self._machine.write(descriptor, buffers, offset)

    def sync(self, descriptor: int) -> None:
        self._machine.world.operation("sync")
        self._machine.sync(descriptor)

    def forget(self, descriptor: int, offset: int, size_bytes: int) -> None:
        pass

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        self._machine.world.operation("truncate")
        self._machine.truncate(descriptor, size_bytes)
