"""The source's disks: ``<home>/source/disks/<name>.json`` and ``<name>.hot`` for each.

Rings live in shared memory (ring.py). Whoever needs a disk's ring first, server or agent, makes it,
under the disk's lock: every hot region is stale in a new ring, for a new ring covers nothing of
what was written before. A ring is retired (retiring.py) when all of it is durable at the receiver
and no server holds the image or the ring: then nothing is hot, and the shared memory is given back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Annotated
from uuid import UUID, uuid4

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blockrepl import limits
from blockrepl.errors import StateError, UsageError
from blockrepl.formats import hot_map
from blockrepl.formats.marks import NameField
from blockrepl.storage.clock import SourceClock
from blockrepl.storage.home import (
    ExclusiveLock,
    Home,
    exclusive_lock_wait,
    make_directory,
    sync_directory,
    write_atomically,
)
from blockrepl.storage.image import (
    check_size,
    image_size,
    is_locked,
    is_locked_by_another,
    lock_image,
)
from blockrepl.storage.retired_names import check_not_retired, note_retired
from blockrepl.storage.ring import (
    RingReader,
    create_ring,
    has_writer,
    read_geometry,
    ring_path,
)
from blockrepl.storage.ring_growth import make_grown

log = logging.getLogger(__name__)

_SOCKET_PATH_BYTES_MAX = 107  # sun_path, with its final zero


class Growth(BaseModel):
    """From ``at_ns`` on, by the source's clock, the disk has ``size_bytes``."""

    model_config = ConfigDict(frozen=True)
    at_ns: int
    size_bytes: Annotated[int, Field(gt=0, multiple_of=limits.SECTOR_BYTES)]


class DiskEntry(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: NameField
    id: UUID
    group: NameField
    image: Path
    size_bytes: Annotated[int, Field(gt=0, multiple_of=limits.SECTOR_BYTES)]
    ring_bytes: Annotated[int, Field(ge=limits.RING_BYTES_MIN, le=limits.RING_BYTES_MAX)]
    replica: UUID | None = None  # group id of the replica that the hot map speaks about
    # The ring whose stale map says what that replica lacks, where the hot map does not; 0: the hot
    # map says it all. With this ring lost, nothing is known: everything must be sent again.
    stale_ring: int = 0
    # The ring of all records that the replica's journal holds of the disk; 0: there are others.
    base_ring: int = 0
    # What the stale map says is sent as it is: what the replica has there is not asked for.
    send_all: bool = False
    # A doubt whose marks may not all be in the stale map: every region counts as doubted.
    is_unmarked: bool = False
    growths: tuple[Growth, ...] = ()  # all there were, the last one to size_bytes


class SourceDisks:
    """All disks of a source's home."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.directory = home.source_directory / "disks"
        self.unreadable: set[str] = set()  # whose entries `all` could not read when it last tried

    # --- entries

    def names(self) -> list[str]:
        """OSError when the directory cannot be read: `glob` would find none in it."""
        try:
            found = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))

    def load(self, name: str) -> DiskEntry:
        if re.fullmatch(limits.NAME_PATTERN, name):
            with contextlib.suppress(FileNotFoundError):
                return self._read(self.directory / f"{name}.json")
        raise StateError(
            f"there is no disk {name!r}",
            hint="`blockrepl disk list` shows those there are, `blockrepl disk add` adds one",
            code="unknown-disk",
        )

    def all(self) -> list[DiskEntry]:
        """Every disk whose entry can be read; one that cannot is logged, once.

        It must not stop the others.
        """
        entries, unreadable = [], set[str]()
        for name in self.names():
            try:
                entries.append(self._read(self.directory / f"{name}.json"))
            except FileNotFoundError:
                continue  # removed meanwhile
            except StateError as error:
                unreadable.add(name)
                if name not in self.unreadable:
                    log.error("disk %s: %s; %s", name, error, error.hint)
        self.unreadable = unreadable
        return entries

    def _read(self, path: Path) -> DiskEntry:
        try:
            return DiskEntry.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise StateError(
                f"{path} does not parse",
                hint="restore it from a backup, or remove it and add the disk again",
                code="damaged-entry",
            ) from error

    def write(self, entry: DiskEntry) -> None:
        """Durably. The caller holds the disk's lock, or makes the disk."""
        write_atomically(
            self.directory / f"{entry.name}.json", entry.model_dump_json(indent=2).encode()
        )

    def add(
        self, name: str, image: Path, group: str, *, create_bytes: int | None, ring_bytes: int
    ) -> DiskEntry:
        """Put a disk under protection; nothing is left behind when that fails."""
        for what, value in (("disk", name), ("group", group)):
            if not re.fullmatch(limits.NAME_PATTERN, value):
                raise UsageError(
                    f"{value!r} is not a {what} name",
                    hint="use a-z, 0-9, dot, underscore and hyphen, 63 at the most",
                )
        make_directory(self.directory)
        with exclusive_lock_wait(self.directory / ".lock"):
            if name in self.names():
                raise StateError(
                    f"disk {name!r} exists already",
                    hint="choose another name; `blockrepl disk list` shows those taken",
                    code="taken",
                )
            check_not_retired(self.home, group, name)
            created = create_bytes is not None and _create_image(image, create_bytes)
            try:
                return self._add(name, image.absolute(), group, ring_bytes)
            except BaseException:
                if created:
                    image.unlink(missing_ok=True)
                raise

    def _add(self, name: str, image: Path, group: str, ring_bytes: int) -> DiskEntry:
        size_bytes = image_size(image)
        for other in self.all():
            with contextlib.suppress(OSError):
                if os.path.samefile(other.image, image):
                    raise StateError(
                        f"image {image} is already protected as disk {other.name!r}",
                        hint="one image is one disk; `blockrepl disk show` tells more",
                        code="taken",
                    )
        os.close(lock_image(image))
        entry = DiskEntry(
            name=name,
            id=uuid4(),
            group=group,
            image=image,
            size_bytes=size_bytes,
            ring_bytes=ring_bytes,
        )
        self._check_socket(entry)
        data = hot_map.encode(entry.id.bytes, size_bytes, limits.REGION_BYTES, hot=True)
        write_atomically(self.hot_map_path(entry), data)
        try:
            self.write(entry)
        except BaseException:
            self.hot_map_path(entry).unlink(missing_ok=True)
            raise
        return entry

    def remove(self, entry: DiskEntry) -> None:
        """Take a disk out of protection. The image stays, and so does the replica's history."""
        with self.lock(entry):
            entry = self.load(entry.name)  # it may have been removed meanwhile
            descriptor = lock_image(entry.image) if entry.image.exists() else None
            try:
                check_unwritten(entry)
                if entry.replica is not None:  # else no history has the name
                    note_retired(self.home, entry.group, entry.name, entry.id)
                (self.directory / f"{entry.name}.json").unlink()
                self.hot_map_path(entry).unlink(missing_ok=True)
                ring_path(entry.id.bytes).unlink(missing_ok=True)
                self.socket_path(entry).unlink(missing_ok=True)
                sync_directory(self.directory)
            finally:
                if descriptor is not None:
                    os.close(descriptor)
            self._lock_path(entry.name).unlink(missing_ok=True)  # while it is held: see there

    def bind_replica(self, entry: DiskEntry, replica: UUID | None) -> DiskEntry:
        """Note which replica the hot map speaks about, durably; None: of no known one."""
        return self._update(entry, replica=replica)

    def note_rings(
        self,
        entry: DiskEntry,
        *,
        stale_ring: int,
        base_ring: int,
        send_all: bool | None = None,
        is_unmarked: bool = False,
    ) -> DiskEntry:
        """Note what depends on a ring, durably. Without ``send_all`` that stays as it is."""
        changes = {
            "stale_ring": stale_ring,
            "base_ring": base_ring,
            "send_all": entry.send_all if send_all is None else send_all,
            "is_unmarked": is_unmarked,
        }
        if all(getattr(entry, name) == value for name, value in changes.items()):
            return entry
        return self._update(entry, **changes)

    def _update(self, entry: DiskEntry, **changes: object) -> DiskEntry:
        with self.lock(entry):
            try:
                known = self._read(self.directory / f"{entry.name}.json")
            except FileNotFoundError:
                return entry.model_copy(update=changes)  # removed meanwhile
            except StateError:
                known = entry
            changed = known.model_copy(update=changes)  # it may have grown since
            self.write(changed)
        return changed

    # --- places

    def socket_path(self, entry: DiskEntry) -> Path:
        return self.home.run_directory / f"disk-{entry.name}.sock"

    def hot_map_path(self, entry: DiskEntry) -> Path:
        return self.directory / f"{entry.name}.hot"

    def _check_socket(self, entry: DiskEntry) -> None:
        path = self.socket_path(entry)
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX:
            raise StateError(
                f"the socket's path {path} is longer than {_SOCKET_PATH_BYTES_MAX} bytes",
                hint="use a home with a shorter path, or a shorter name",
                code="path-length",
            )

    def lock(self, entry: DiskEntry) -> ExclusiveLock:
        """Between processes that make or retire the disk's ring.

        Held for moments only, but for a retirement's sync of the image.
        """
        return exclusive_lock_wait(self._lock_path(entry.name))

    def _lock_path(self, name: str) -> Path:
        return self.directory / f".{name}.lock"

    # --- the ring's life

    def hot_regions(self, entry: DiskEntry) -> npt.NDArray[np.uint8]:
        """A byte per region, 1 = hot. A map that cannot be trusted makes everything hot."""
        path = self.hot_map_path(entry)
        data = path.read_bytes() if path.exists() else b""
        found = hot_map.decode(data, entry.id.bytes, entry.size_bytes, limits.REGION_BYTES)
        if found is None:
            data = hot_map.encode(entry.id.bytes, entry.size_bytes, limits.REGION_BYTES, hot=True)
            write_atomically(path, data)
            return np.ones(hot_map.region_count(entry.size_bytes, limits.REGION_BYTES), np.uint8)
        return found

    def has_ring(self, entry: DiskEntry, clock: SourceClock) -> bool:
        """Whether there is a ring, and it is of this disk and this clock."""
        geometry = read_geometry(ring_path(entry.id.bytes))
        return geometry is not None and (
            geometry.disk,
            geometry.size_bytes,
            geometry.clock_offset,
        ) == (entry.id.bytes, entry.size_bytes, clock.offset_ns)

    def is_outgrown(self, entry: DiskEntry, clock: SourceClock) -> bool:
        """Whether the ring is that of the disk before it grew: growing it broke off."""
        ring = read_geometry(ring_path(entry.id.bytes))
        return (
            ring is not None
            and (ring.disk, ring.clock_offset) == (entry.id.bytes, clock.offset_ns)
            and ring.size_bytes < entry.size_bytes
        )

    def check_served_ring(self, entry: DiskEntry, clock: SourceClock) -> None:
        """StateError when a server writes to a ring that nobody else can find any more.

        A ring made beside it would stay empty, whatever the guest writes. The caller holds the
        disk's lock.
        """
        is_served = is_locked(entry.image) or has_writer(ring_path(entry.id.bytes))
        if is_served and not self.has_ring(entry, clock):
            raise StateError(
                f"the server of disk {entry.name!r} writes to a ring that is lost: its file in "
                f"{ring_path(entry.id.bytes).parent} was removed, or the source's clock.json was",
                hint="restart the disk's server, and the agent",
                code="ring-lost",
            )

    def ensure_ring(self, entry: DiskEntry, clock: SourceClock) -> Path:
        """The disk's ring, made where there is none. The caller holds the disk's lock."""
        path = ring_path(entry.id.bytes)
        if self.has_ring(entry, clock):
            return path
        if self.is_outgrown(entry, clock):
            os.rename(make_grown(path, entry.size_bytes), path)
        else:
            create_ring(
                path,
                disk=entry.id.bytes,
                size_bytes=entry.size_bytes,
                region_bytes=limits.REGION_BYTES,
                ring_bytes=entry.ring_bytes,
                clock_offset=clock.offset_ns,
                stale=self.hot_regions(entry),
            )
        return path

    def recover_ring(self, entry: DiskEntry, ring: RingReader, clock: SourceClock) -> None:
        """Clean up what a killed server left in the ring. Does nothing while a server runs."""
        with self.lock(entry), contextlib.suppress(StateError):
            descriptor = lock_image(entry.image)
            try:
                check_unwritten(entry)
                ring.recover_in_flight(clock.now())
            finally:
                os.close(descriptor)

    def is_serving(self, entry: DiskEntry) -> bool:
        """Whether a server holds the image, or the ring alone: see `check_unwritten`."""
        return has_writer(ring_path(entry.id.bytes)) or (
            self.socket_path(entry).exists() and is_locked(entry.image)
        )


def check_unwritten(entry: DiskEntry) -> None:
    """StateError when a server writes to the disk's ring, though not to the image at its path.

    The caller holds that image's lock, which says nothing of a server when the path led to another
    file as it started.
    """
    if has_writer(ring_path(entry.id.bytes)):
        raise _written_elsewhere(entry, "and stop it")


def is_written_elsewhere(entry: DiskEntry, image: int) -> bool:
    """Whether a server writes to the disk's ring, and to another file than the open ``image``.

    A server that starts locks its image first. One that ends lets go of the two in any order, so
    the ring is looked at twice.
    """
    ring = ring_path(entry.id.bytes)
    return has_writer(ring) and not is_locked_by_another(image) and has_writer(ring)


def check_written(entry: DiskEntry, image: int) -> None:
    """StateError when the open ``image``, that at the disk's path, is not what its server writes.

    What is read of it is older than the ring says, and would take the replica back.
    """
    if is_written_elsewhere(entry, image):
        raise _written_elsewhere(entry, "or restart it")


def _written_elsewhere(entry: DiskEntry, remedy: str) -> StateError:
    ring = ring_path(entry.id.bytes)
    return StateError(
        f"disk {entry.name!r} is in use by a server that writes to another file than the one "
        f"which is at {entry.image} now",
        hint=f"bring its file back if that was moved, {remedy}: fuser -v {ring} names it",
        code="image-in-use",
    )


def _create_image(image: Path, size_bytes: int) -> bool:
    check_size(size_bytes, "--size", exists=False)
    try:
        descriptor = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise StateError(
            f"image {image} exists already",
            hint="leave --size out to protect it as it is",
            code="taken",
        ) from error
    except OSError as error:
        raise StateError(
            f"image {image} cannot be created: {error.strerror}", code="no-image"
        ) from error
    try:
        os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)
        sync_directory(image.absolute().parent)
    except OSError as error:
        image.unlink()
        raise StateError(
            f"image {image} of {size_bytes} bytes cannot be created: {error.strerror}",
            code="no-image",
        ) from error
    finally:
        os.close(descriptor)
    return True
