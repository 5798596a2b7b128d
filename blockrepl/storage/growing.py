"""Growing a disk at the source, in this order:

====  ==================================================  ======================================
step  does                                                what a crash after it leaves
====  ==================================================  ======================================
1     the image has the new size, durably; what is new    an image that is larger than its entry
      is zeros                                            says: no server starts, and the error
                                                          names `disk resize`, which goes on
2     the hot map has the new size; what is new is cold,  a map of which the first part counts
      for the replica shows zeros there, too
3     the ring is copied (ring_growth.py), beside it      a file that the next copy replaces
4     the entry has the new size, and the instant         the old ring beside the new entry: who
                                                          opens the disk next does 5
5     the copy takes the ring's place
====  ==================================================  ======================================

No server may run meanwhile: NBD fixes an export's size when a client connects, and the regions of a
served ring cannot become more. Steps 2 to 5 are the agent's while it runs, between two rounds: it
writes to the ring, too. The stream tells the receiver of it before any record in the new part.

On a block device step 1 overwrites what is new with zeros: a logical volume grows by what another
one has left there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator

from blockrepl import limits
from blockrepl.errors import StateError, StorageError, UsageError
from blockrepl.formats import hot_map
from blockrepl.storage.clock import SourceClock
from blockrepl.storage.files import Files, punch_hole, write_all
from blockrepl.storage.home import write_atomically
from blockrepl.storage.image import check_size, lock_image
from blockrepl.storage.ring import RingReader, ring_path, unfinished_path
from blockrepl.storage.ring_growth import make_grown
from blockrepl.storage.source import DiskEntry, Growth, SourceDisks, check_unwritten
from blockrepl.units import MIB

CHUNK_BYTES = 4 * MIB  # of zeros, written at once
Progress = Callable[[int], None]  # called with the size that is reached


def grow_image(
    disks: SourceDisks, entry: DiskEntry, size_bytes: int | None, progress: Progress
) -> int:
    """Step 1; the image's size. None: it has the new size already. Harmless when done before.

    UsageError, StateError, StorageError: nothing has been changed, but zeros written behind the
    disk's end.
    """
    with contextlib.ExitStack() as held:
        with disks.lock(entry):  # an agent that gives the ring back has the image for a moment
            descriptor = held.enter_context(_unserved(entry))
        is_block = stat.S_ISBLK(os.fstat(descriptor).st_mode)
        found = os.lseek(descriptor, 0, os.SEEK_END)
        wanted = found if size_bytes is None else size_bytes
        _check(entry, wanted, found, is_block=is_block, is_asked=size_bytes is not None)
        if wanted == entry.size_bytes:
            return wanted
        try:
            if is_block:
                _write_zeros(descriptor, entry.size_bytes, wanted, progress)
            else:
                _check_blank(entry, descriptor, min(found, wanted))
                os.ftruncate(descriptor, wanted)
            _sync(entry, descriptor)
        except OSError as error:
            raise StorageError(
                f"image {entry.image} cannot be enlarged to {wanted} bytes: {error.strerror}",
                hint="free some room, and do it again",
                code="image-size",
            ) from error
        return wanted


def _sync(entry: DiskEntry, descriptor: int) -> None:
    """The image durable. What the guest wrote may be lost in it, which the system tells once."""
    try:
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(StateError):  # without a ring, all was durable when it went
            RingReader(ring_path(entry.id.bytes), entry.id.bytes).flush_has_failed()
        raise


def grow_disk(disks: SourceDisks, name: str, size_bytes: int, clock: SourceClock) -> DiskEntry:
    """Steps 2 to 5; the disk's entry. StateError, StorageError."""
    known = disks.load(name)
    with disks.lock(known), _unserved(known) as descriptor:
        entry = disks.load(name)
        if os.lseek(descriptor, 0, os.SEEK_END) != size_bytes or size_bytes < entry.size_bytes:
            raise StateError(
                f"image {entry.image} has not the {size_bytes} bytes that disk {name!r} is to have",
                hint="see `blockrepl disk resize --help`",
                code="image-size",
            )
        path = ring_path(entry.id.bytes)
        if size_bytes == entry.size_bytes:
            if disks.is_outgrown(entry, clock):
                disks.ensure_ring(entry, clock)
            return entry
        hot = disks.hot_regions(entry)
        write_atomically(
            disks.hot_map_path(entry),
            hot_map.encode_regions(entry.id.bytes, size_bytes, limits.REGION_BYTES, hot),
        )
        at_ns, has_ring = clock.now(), disks.has_ring(entry, clock)
        if has_ring:
            at_ns = max(at_ns, RingReader(path, entry.id.bytes).last_stamp() + 1)
            make_grown(path, size_bytes)
        growths = (*entry.growths, Growth(at_ns=at_ns, size_bytes=size_bytes))
        entry = entry.model_copy(update={"size_bytes": size_bytes, "growths": growths})
        try:
            disks.write(entry)
        except BaseException:
            unfinished_path(path).unlink(missing_ok=True)
            raise
        if has_ring:
            os.rename(unfinished_path(path), path)
        return entry


@contextlib.contextmanager
def _unserved(entry: DiskEntry) -> Iterator[int]:
    """The image, open, while nobody serves it."""
    try:
        descriptor = lock_image(entry.image)
    except StateError as error:
        if error.code == "image-in-use":
            error.hint = (
                f"end `blockrepl disk serve {entry.name}` (the guest's requests wait), resize, "
                "and serve it again"
            )
        raise
    try:
        check_unwritten(entry)
        yield descriptor
    finally:
        os.close(descriptor)


def _check(entry: DiskEntry, wanted: int, found: int, *, is_block: bool, is_asked: bool) -> None:
    check_size(wanted, "SIZE" if is_asked else f"image {entry.image}", exists=not is_asked)
    if wanted < entry.size_bytes:
        raise UsageError(
            f"disk {entry.name!r} has {entry.size_bytes} bytes and cannot shrink to {wanted}: its "
            "history has what would be cut off",
            hint="a smaller disk is another disk: add it under another name",
            code="image-size",
        )
    if is_block and found != wanted:
        raise StateError(
            f"block device {entry.image} has {found} bytes, not {wanted}",
            hint="resize the device first (lvextend, for instance), and leave SIZE out",
            code="image-size",
        )
    if found > wanted:
        raise StateError(
            f"image {entry.image} has {found} bytes already, more than {wanted}",
            hint="leave SIZE out to take the size it has",
            code="image-size",
        )
    if found < entry.size_bytes:
        raise StateError(
            f"image {entry.image} has {found} bytes, disk {entry.name!r} has {entry.size_bytes}",
            hint="restore its size",
            code="image-size",
        )
    if len(entry.growths) >= limits.DISK_GROWTHS_MAX and wanted > entry.size_bytes:
        raise StateError(
            f"disk {entry.name!r} has grown {len(entry.growths)} times, which is all a disk may",
            hint="add it under another name",
            code="image-size",
        )


def _check_blank(entry: DiskEntry, descriptor: int, end: int) -> None:
    """A file that somebody else has enlarged: what is new must be zeros, as the replica shows."""
    at = entry.size_bytes
    while at < end:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        piece = os.pread(descriptor, min(CHUNK_BYTES, max(0, end - at)), at)
        if piece.strip(b"\0"):
            raise StateError(
                f"image {entry.image} has data behind the {entry.size_bytes} bytes of disk "
                f"{entry.name!r}, which is in no history",
                hint=f"truncate --size={entry.size_bytes} {entry.image} lets go of it",
                code="image-size",
            )
        at += len(piece) or 1


def _write_zeros(descriptor: int, start: int, end: int, progress: Progress) -> None:
    """On a block device, by its own means where it has some."""
    for at in range(start, end, CHUNK_BYTES):
        length = min(CHUNK_BYTES, end - at)
        try:
            punch_hole(descriptor, at, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
                raise
            write_all(Files(), descriptor, [bytes(length)], at)
        progress(at + length)
