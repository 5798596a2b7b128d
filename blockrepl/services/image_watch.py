"""The agent's look at the sizes of its images: one that was cut short is told of, once.

Nobody else says so: its server reads and writes on, and what is gone reads as zeros.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from blockrepl.errors import StorageError
from blockrepl.services.source_disk import SourceDisk

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


def cut_short(disk: SourceDisk) -> StorageError | None:
    """The error of a disk whose image is shorter than the disk; None when it is not, or is away.

    A longer one is no error: it is so for a while whenever a disk is resized.
    """
    entry = disk.entry
    try:
        size_bytes = _size(entry.image) if disk.image is None else _size_of_open(disk.image)
    except OSError:
        return None  # whoever needs the image says so
    if size_bytes is None or size_bytes >= entry.size_bytes:
        return None
    return StorageError(
        f"image {entry.image} has {size_bytes} bytes, not {entry.size_bytes}: it was cut short",
        hint="stop its server and give the image its size back; what was cut off is in the history "
        "at the receiver",
        code="image-size",
    )


def _size_of_open(image: int) -> int:
    return os.lseek(image, 0, os.SEEK_END)  # of a block device too


def _size(image: Path) -> int | None:
    found = image.stat()
    return found.st_size if stat.S_ISREG(found.st_mode) else None


class ImageWatch:
    """Of one group's disks."""

    def __init__(self) -> None:
        self._told: dict[bytes, str] = {}  # by disk, while it is so

    async def run(self, disks: Callable[[], Sequence[SourceDisk]]) -> None:
        """Until cancelled."""
        while True:
            for disk in disks():
                self._look(disk)
            await trio.sleep(LOOK_SECONDS)

    def _look(self, disk: SourceDisk) -> None:
        error = cut_short(disk)
        if error is None:
            self._told.pop(disk.id, None)
        elif self._told.get(disk.id) != str(error):
            self._told[disk.id] = str(error)
            log.error("disk %s: %s; %s", disk.entry.name, error, error.hint)
