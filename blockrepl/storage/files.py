"""The few system calls that the journal's durability hangs on, so that tests can make them fail."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Sequence

from blockrepl.errors import StorageError
from blockrepl.formats.frame import Buffer

VECTOR_BUFFERS_MAX = 1024  # IOV_MAX of Linux
FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Files:
    """The system's own."""

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        return os.pwritev(descriptor, buffers, offset)

    def sync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def forget(self, descriptor: int, offset: int, size_bytes: int) -> None:
        """Drop synced bytes (size 0: to the end) from the page cache."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, size_bytes, os.POSIX_FADV_DONTNEED)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        os.ftruncate(descriptor, size_bytes)


def private(path: str, flags: int) -> int:
    """An ``opener`` for files that only their owner may read, from their first moment on."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def write_all(files: Files, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
    """Write buffers back to back, however short each write falls; the offset after them."""
    for first in range(0, len(buffers), VECTOR_BUFFERS_MAX):
        rest = [memoryview(b) for b in buffers[first : first + VECTOR_BUFFERS_MAX] if len(b)]
        while rest:
            written = files.write(descriptor, rest, offset)
            offset += written
            while rest and written >= len(rest[0]):
                written -= len(rest.pop(0))
            if written:
                rest[0] = rest[0][written:]
    return offset


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Make a range of a file read as zeros and take no room. OSError."""
    if _libc.fallocate(descriptor, KEEP_SIZE_PUNCH_HOLE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def settle(files: Files, descriptor: int, offset: int = 0) -> None:
    """Make what is read from ``offset`` on be what is on the disk. OSError.

    A process that was killed may leave pages that nobody has synced, and a failed sync leaves pages
    that look clean and are not on the disk: whoever recovers must take neither for durable.
    """
    files.sync(descriptor)
    files.forget(descriptor, offset - offset % mmap.PAGESIZE, 0)


def is_full(error: OSError) -> bool:
    return error.errno in FULL_ERRORS


def failure(error: OSError, what: str) -> StorageError:
    """An operating system's error as ours; code "full" when room would help."""
    if is_full(error):
        return StorageError(
            f"{what}: no room left ({error.strerror})",
            hint="free some room on the receiver's file system; replication goes on by itself",
            code="full",
        )
    return fail_stop(error, what)


def fail_stop(error: OSError, what: str) -> StorageError:
    """One that only a restart helps: of a failed fdatasync, whatever its reason."""
    return StorageError(
        f"{what}: {error.strerror}",
        hint="check the receiver's disk, then restart the receiver: it recovers what is durable",
        code="fail-stop",
    )


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """The operating system's errors inside as `failure`."""
    try:
        yield
    except OSError as error:
        raise failure(error, what) from error
