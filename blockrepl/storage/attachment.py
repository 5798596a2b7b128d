"""What disks a source has in a group: made known, kept, retired.

=======================================  =====================================================
the source names                         then
=======================================  =====================================================
a disk that is not known                 its base image is made, or there is a seed of its size
                                         already (seed.py); then its row (StateError when the
                                         name is taken)
a known one, same name, same size or     goes on; a mark will say when it grew
larger
one of its sizes of before it grew       goes on: its source waits for the acknowledgement of that
                                         mark, or has a spool from before
a known one under another name, of any   StateError, nothing is changed
other size, or of another source
one that was retired and forgotten,      StateError: they would show above its new content
while the journal may have records of it
a retired one                            taken back; the time between is a gap
(a known one is not named)               retired right after the source's watermark: its history
                                         stays. Never by our own clock, which may differ
=======================================  =====================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blockrepl.errors import StateError
from blockrepl.formats.messages import AttachDisk
from blockrepl.storage import retained
from blockrepl.storage.base import create_image, image_path
from blockrepl.storage.catalog import Catalog, DiskRow, SourceRow
from blockrepl.storage.files import failures


def attach_disks(
    directory: Path, catalog: Catalog, source: bytes, disks: Sequence[AttachDisk], after_ns: int
) -> None:
    """Apply the table in one transaction. StateError, StorageError."""
    with catalog.transaction():
        if all(row.id != source for row in catalog.sources()):
            catalog.put_source(SourceRow(source, 0, 0))
        known = {row.id: row for row in catalog.disks(removed=True)}
        for disk in disks:
            row = known.get(disk.id.bytes)
            if row is None:
                _add(directory, catalog, source, disk)
                continue
            _check_same(catalog, row, source, disk)
            if row.removed_ns is not None:
                catalog.set_removed(row.id, None)
        named = {disk.id.bytes for disk in disks}
        for row in known.values():
            if row.source == source and row.id not in named and row.removed_ns is None:
                catalog.set_removed(row.id, after_ns)


def _add(directory: Path, catalog: Catalog, source: bytes, disk: AttachDisk) -> None:
    if any(row.name == disk.name for row in catalog.disks(removed=True)):
        raise StateError(
            f"group {catalog.group_name} already has another disk named {disk.name}, whose history "
            "is kept",
            hint=f"at the source: blockrepl disk remove {disk.name}, then add it by another name",
            code="disk-name-taken",
        )
    if retained.has_forgotten_records(catalog, disk.id.bytes):
        raise StateError(
            f"disk {disk.name} was removed from group {catalog.group_name} and its history let go; "
            "the journal still has some of its records",
            hint=f"at the source, to protect it as a new disk: blockrepl disk remove {disk.name}, "
            "then add it",
            code="disk-forgotten",
        )
    retained.remove_images(catalog, directory)  # of another that had the name: it is no seed
    image = image_path(directory, disk.name)
    with failures(f"cannot look at {image}"):
        seeded = image.stat().st_size if image.exists() else 0  # 0: making one broke off
    if seeded not in (0, disk.size_bytes):
        raise StateError(
            f"disk {disk.name} of group {catalog.group_name} was seeded with an image of {seeded} "
            f"bytes, it has {disk.size_bytes}",
            hint=f"at the receiver: blockrepl receiver seed {catalog.group_name} {disk.name} IMAGE "
            "with the right one",
            code="seed-size",
        )
    with failures(f"cannot make {image}"):
        create_image(image, disk.size_bytes)
    catalog.add_disk(DiskRow(disk.id.bytes, disk.name, disk.size_bytes, source))


def _check_same(catalog: Catalog, row: DiskRow, source: bytes, disk: AttachDisk) -> None:
    group = catalog.group_name
    if (row.source, row.name) != (source, disk.name):
        raise StateError(
            f"the id of disk {disk.name} is that of another disk of group {group}",
            hint="add the disk anew",
            code="disk-identity",
        )
    before = {growth.before_bytes for growth in catalog.growths() if growth.disk == row.id}
    if disk.size_bytes < row.size_bytes and disk.size_bytes not in before:
        raise StateError(
            f"disk {row.name} of group {group} has {row.size_bytes} bytes here, "
            f"the source says {disk.size_bytes}",
            hint="a protected disk cannot shrink; add it under another name",
            code="disk-size",
        )
