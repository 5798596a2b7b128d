"""A seed: a copy of a disk's image that came to the receiver by other means than the network.

It becomes the disk's base image before the receiver knows the disk. The first sync then finds that
the base is not blank, compares, and sends only what differs (services/disk_sync.py): a seed may be
as old as it likes. Rules:

1. Only before the disk's source has named it: from then on regions may have been synced, and what
   the source takes for done must not be replaced.
2. The copy is made on the replica's file system (in SEEDS, beside the replicas; in the replica
   itself when that is a link to another place), and is durable before it is put in place by a
   rename. What is left of a broken-off copy is overwritten by the next one.
3. Whoever puts it in place holds the receiver's lock, or is the receiver between two commits.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from blockrepl.errors import StateError
from blockrepl.storage import retained
from blockrepl.storage.base import image_path
from blockrepl.storage.catalog import Catalog
from blockrepl.storage.files import failure
from blockrepl.storage.home import Home, make_directory, sync_directory
from blockrepl.storage.image import image_size, is_locked
from blockrepl.units import MIB

SEEDS = ".seeds"  # no group has this name
COPY_BYTES = MIB  # at a time; what is all zeros becomes a hole
Progress = Callable[[int], None]


def seed_path(home: Home, group: str, disk: str) -> Path:
    replica = home.replica_directory(group)
    place = replica if replica.is_symlink() else home.replicas
    return place / SEEDS / f"{group}.{disk}.img"


def check_seed(image: Path) -> int:
    """The size of an image that may become a seed. StateError, UsageError."""
    size = image_size(image)
    if is_locked(image):
        raise StateError(
            f"image {image} is in use by another server or by QEMU",
            hint=f"stop it first: fuser -v {image} names the process",
            code="image-in-use",
        )
    return size


def copy_seed(image: Path, target: Path, size_bytes: int, progress: Progress) -> None:
    """Copy an image, holes as holes; durable on return. StorageError."""
    make_directory(target.parent)
    try:
        with image.open("rb") as source, target.open("wb") as copy:
            os.chmod(copy.fileno(), 0o600)
            os.ftruncate(copy.fileno(), size_bytes)
            _copy(source.fileno(), copy.fileno(), size_bytes, progress)
            os.fsync(copy.fileno())
    except OSError as error:
        target.unlink(missing_ok=True)
        raise failure(error, f"cannot copy {image} to {target}") from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _copy(source: int, target: int, size_bytes: int, progress: Progress) -> None:
    at = 0
    while at < size_bytes:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
            end = os.lseek(source, at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                break
            end = size_bytes  # a block device knows no holes
        while at < end:
            data = os.pread(source, min(COPY_BYTES, end - at), at)
            if data != bytes(len(data)):
                written = 0
                while written < len(data):
                    written += os.pwrite(target, data[written:], at + written)
            at += len(data)
            progress(at)
    progress(size_bytes)


def move_seed(image: Path, target: Path) -> None:
    """Take over an image as it is. StateError when it is on another file system; OSError."""
    make_directory(target.parent)
    try:
        os.rename(image, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise StateError(
            f"image {image} is on another file system than the replicas in {target.parent.parent}",
            hint="leave --move out: it is copied then",
            code="other-file-system",
        ) from error
    os.chmod(target, 0o600)
    descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free(catalog: Catalog, disk: str) -> None:
    """StateError when the disk is known already (rule 1)."""
    if any(row.name == disk for row in catalog.disks(removed=True)):
        raise StateError(
            f"disk {disk} of group {catalog.group_name} is known here: its first sync has begun",
            hint="a seed comes first; the disk can be added anew, under another name",
            code="disk-known",
        )


def place_seed(directory: Path, catalog: Catalog, seed: Path, disk: str) -> None:
    """Make a durable copy the base image of a disk to come; durable on return. StateError."""
    check_free(catalog, disk)
    retained.remove_images(catalog, directory)  # later, it would be taken for one of these
    image = image_path(directory, disk)
    try:
        make_directory(image.parent)
        os.rename(seed, image)
        sync_directory(image.parent)
    except OSError as error:
        raise failure(error, f"cannot put the seed at {image}") from error
