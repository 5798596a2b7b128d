"""The base: per disk a sparse raw image, ``replicas/<group>/base/<disk>.img``.

It holds the disk's content at its floor: written by the first sync (frames of kind base), later by
the folding of old segments. Any tool can open it. Rules:

- Made with the disk's whole size, durably, before the disk is in the catalog. When the disk grows
  later, so does the image: at once before the first sync is done, else by the fold that goes past
  that instant, for the image is the disk as it was at the floor.
- A zero or trim record makes a hole, but only where there is data: a first sync of an empty disk
  allocates nothing and writes nothing. Where the file system has no holes, zeros are written, and
  only over what is none.
- ``write`` is not durable before ``sync``; both are idempotent, so a sync that broke off is simply
  done again.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from blockrepl.errors import PeerError, StorageError
from blockrepl.formats.frame import (
    KIND_MASK,
    FrameHeader,
    RecordKind,
    decode_payload,
    parse_columns,
)
from blockrepl.storage.files import Files, punch_hole, settle, write_all
from blockrepl.storage.home import make_directory, sync_directory
from blockrepl.units import MIB

CHUNK_BYTES = 1 * MIB  # zeros written at once


def image_path(directory: Path, disk_name: str) -> Path:
    """The base image of a disk in a replica's directory."""
    return directory / "base" / f"{disk_name}.img"


def create_image(path: Path, size_bytes: int) -> None:
    """Make the image of a disk where there is none; durable on return. OSError."""
    make_directory(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size < size_bytes:
            os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)  # also of one that is there: who made it may not have come so far
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def is_blank(path: Path) -> bool:
    """Whether an image is one hole: known to be all zeros, without reading it. StorageError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.lseek(descriptor, 0, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return True
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    return False


def clear(files: Files, descriptor: int, offset: int, end: int) -> None:
    """Punch holes over an image's data within a range, and only there. OSError."""
    while offset < end:
        try:
            data = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: no data up to the end of the file
            return
        if data >= end:
            return
        hole = min(end, os.lseek(descriptor, data, os.SEEK_HOLE))
        try:
            punch_hole(descriptor, data, hole - data)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            _write_zeros(files, descriptor, data, hole)
        offset = hole


def _write_zeros(files: Files, descriptor: int, offset: int, end: int) -> None:
    for at in range(offset, end, CHUNK_BYTES):
        size_bytes = min(CHUNK_BYTES, end - at)
        if os.pread(descriptor, size_bytes, at).strip(b"\0"):
            write_all(files, descriptor, [bytes(size_bytes)], at)


class BaseImage:
    """An open base image."""

    def __init__(self, path: Path, size_bytes: int, files: Files) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._files = files
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._unsynced = False

    def write(self, header: FrameHeader, body: memoryview) -> None:
        """Put a checked base frame's content in place. PeerError, OSError."""
        columns = parse_columns(header, body)
        payload = memoryview(decode_payload(header, body))
        position = 0
        # A first sync's records are whole regions: a loop over them is short.
        for offset, length, kind in zip(
            columns.offsets.tolist(), columns.lengths.tolist(), columns.kinds.tolist(), strict=True
        ):
            if offset + length > self.size_bytes:
                raise PeerError(f"base record beyond the end of {self.path.stem}")
            self._unsynced = True
            match kind & KIND_MASK:
                case RecordKind.WRITE:
                    piece = payload[position : position + length]
                    write_all(self._files, self._descriptor, [piece], offset)
                    position += length
                case RecordKind.ZERO | RecordKind.TRIM:
                    clear(self._files, self._descriptor, offset, offset + length)

    def grow(self, size_bytes: int) -> None:
        """Add a hole at the end; durable on return, in any case. OSError."""
        if self.size_bytes < size_bytes:
            self._files.truncate(self._descriptor, size_bytes)
            self.size_bytes = size_bytes
        self._files.sync(self._descriptor)

    def sync(self, *, always: bool = False) -> None:
        """Make what was written durable; with ``always``, by whomever. OSError."""
        if self._unsynced or always:
            self._files.sync(self._descriptor)
            self._unsynced = False

    def settle(self) -> None:
        """Forget what a failed sync has left in memory alone: a comparison must not see it."""
        settle(self._files, self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
