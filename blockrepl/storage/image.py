"""The local image of a disk: its size, and the locks that keep a second writer away.

Two locks are held while a server or the agent's clean-up works on an image, both belonging to the
open file description, so they pass to nbdkit over exec and go with the last process that holds it:

- flock, exclusive: between blockrepl's own processes, whatever home they use;
- QEMU's byte-range locks (block/file-posix.c: 100 + n "I use permission n", 200 + n "nobody else
  may"), permissions write (1) and resize (3): a QEMU that opens the image behind blockrepl's back
  is refused, and so are we while one has it open for writing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from blockrepl.errors import StateError, UsageError
from blockrepl.limits import DISK_BYTES_MAX, SECTOR_BYTES
from blockrepl.storage.byte_locks import is_held_by_another, lock_byte

_USED = (100, 101)  # consistent read, write
_UNSHARED = (201, 203)  # nobody else writes or resizes


def image_size(path: Path) -> int:
    """Bytes of a raw file or block device. StateError when it cannot be a disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = "check the path, or create the image with --size"
        raise StateError(
            f"image {path} cannot be opened: {error.strerror}", hint=hint, code="no-image"
        ) from error
    try:
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise StateError(
                f"image {path} is neither a file nor a block device",
                hint="give the path of a raw image file or a block device",
                code="no-image",
            )
        with contextlib.suppress(OSError):
            if os.pread(descriptor, 4, 0) == b"QFI\xfb":
                raise StateError(
                    f"image {path} is a qcow2 file, not a raw one",
                    hint=f"convert it first: qemu-img convert -O raw {path} {path}.raw",
                    code="image-format",
                )
        size = os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
    check_size(size, f"image {path}")
    return size


def check_size(size: int, what: str, *, exists: bool = True) -> None:
    if size <= 0 or size % SECTOR_BYTES:
        raise UsageError(
            f"{what} has {size} bytes, which is no positive multiple of {SECTOR_BYTES}",
            hint=f"use a size that is one: truncate --size=%{SECTOR_BYTES} rounds a file up"
            if exists
            else f"use a multiple of {SECTOR_BYTES}",
            code="image-size",
        )
    if size > DISK_BYTES_MAX:
        raise UsageError(
            f"{what} has {size} bytes, more than the {DISK_BYTES_MAX} a disk may have",
            hint="split it into several disks",
            code="image-size",
        )


def lock_image(path: Path) -> int:
    """Open an image for writing and lock it; the descriptor is the lock. StateError when in use."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StateError(
            f"image {path} cannot be opened for writing: {error.strerror}",
            hint="check that it exists and that you may write it",
            code="no-image",
        ) from error
    try:
        _lock(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, path: Path) -> None:
    in_use = StateError(
        f"image {path} is in use by another server or by QEMU",
        hint=f"stop it first: fuser -v {path} names the process",
        code="image-in-use",
    )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise in_use from None
    try:
        for byte in (*_USED, *_UNSHARED):
            lock_byte(descriptor, byte, shared=True)
        # Others must not use what we unshare, nor unshare what we use.
        if any(is_held_by_another(descriptor, byte) for byte in (101, 103, 201)):
            raise in_use
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise in_use from error
        raise


def is_locked(path: Path) -> bool:
    """Whether somebody holds the image as `lock_image` does. Takes no lock itself."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return is_locked_by_another(descriptor)
    finally:
        os.close(descriptor)


def is_locked_by_another(image: int) -> bool:
    """`is_locked`, of one that is open: whatever its path leads to now."""
    return is_held_by_another(image, _UNSHARED[0])
