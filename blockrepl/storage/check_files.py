"""Examines what lies beside the journal: base images, forks, pins, and files that nobody knows.

Of a base image there is no digest: that it has the right content is proven against the source, by
the scrub (`blockrepl verify`). Here its place, kind and size are looked at.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from blockrepl.errors import DamageError, PeerError
from blockrepl.formats import fork_map
from blockrepl.formats import segment as segments
from blockrepl.formats.fork_map import CHANGE_BYTES, HEADER_BYTES, RECORD, RECORD_BYTES
from blockrepl.formats.merged_run import MergedName
from blockrepl.limits import FORK_BLOCK_BYTES
from blockrepl.storage import catalog as catalogs
from blockrepl.storage import durable as durables
from blockrepl.storage import forks, merged_runs, pins, statistics
from blockrepl.storage.base import image_path
from blockrepl.storage.catalog import Catalog, DiskRow, SegmentRow, sized_at
from blockrepl.storage.check_findings import Finding
from blockrepl.storage.journal import DIRECTORY_NAME
from blockrepl.storage.merging import TEMPORARY
from blockrepl.storage.retained import LOCK_NAME, fold_due, leftovers
from blockrepl.storage.seed import SEEDS
from blockrepl.storage.segment_reader import Known

_KNOWN = {
    catalogs.FILE_NAME,
    f"{catalogs.FILE_NAME}-wal",
    f"{catalogs.FILE_NAME}-shm",
    durables.FILE_NAME,
    pins.LOCK_NAME,
    pins.DIRECTORY_NAME,
    LOCK_NAME,
    forks.DIRECTORY_NAME,
    merged_runs.DIRECTORY_NAME,
    statistics.DIRECTORY_NAME,
    DIRECTORY_NAME,
    SEEDS,
    "base",
    "bisect.json",  # views/bisect.py
    "bisect.lock",
}
_FIRST_GENERATION = re.compile(r"\d{12}\.seg")
_WRITTEN_ANEW = re.compile(r"\d{12}-\d+\.seg")


def check_files(directory: Path, catalog: Catalog) -> Iterator[Finding]:
    """All but the segments that are known and the merged runs' content. OSError."""
    group = catalog.group_name
    for name in sorted(os.listdir(directory)):
        if name not in _KNOWN:
            yield Finding("unknown", group, name, "none of the store's files; move it away")
    yield from _check_durable(directory, group)
    yield from _check_names(directory, catalog)
    growths, is_folding = catalog.growths(), fold_due(catalog) is not None
    for disk in catalog.disks(removed=True):
        at_floor = disk if disk.ready_ns is None else sized_at(disk, disk.ready_ns, growths)
        before = [row.before_bytes for row in growths if row.disk == disk.id]
        # The fold that goes past a growth enlarges the image.
        least = min(before, default=at_floor.size_bytes) if is_folding else at_floor.size_bytes
        yield from _check_base(directory, group, at_floor, min(least, at_floor.size_bytes))
    yield from _check_forks(directory, group)
    yield from _check_pins(directory, group)


def _check_durable(directory: Path, group: str) -> Iterator[Finding]:
    path = directory / durables.FILE_NAME
    if path.exists() and durables.read_durable(path) is None:
        what = "it does not match its digest; readers do without"
        yield Finding("durable-record", group, path.name, what)


def _check_names(directory: Path, catalog: Catalog) -> Iterator[Finding]:
    """Files among the segments and the merged runs that nobody knows."""
    group, rows = catalog.group_name, catalog.segments()
    known = {segments.file_name(row.number, row.generation) for row in rows}
    left = leftovers(catalog)
    newest = max((row.number for row in rows), default=0)
    for path in _listed(directory / DIRECTORY_NAME):
        name = f"{DIRECTORY_NAME}/{path.name}"
        if path.name in known:
            continue
        if path.name in left or _WRITTEN_ANEW.fullmatch(path.name):
            yield Finding("unfinished", group, name, "retention has left it behind")
        elif _is_begun(path, catalog.group_id, newest):
            what = "begun, and never acknowledged; the receiver takes it up when it starts"
            yield Finding("unfinished", group, name, what, offset=0)
        else:
            what = "the catalog does not know it; move it away: the receiver may refuse the group"
            yield Finding("unknown", group, name, what)
    true = true_runs(directory, rows)
    for path in _listed(directory / merged_runs.DIRECTORY_NAME):
        name = f"{merged_runs.DIRECTORY_NAME}/{path.name}"
        if path.suffix == TEMPORARY:
            yield Finding("unfinished", group, name, "a merged run that was not finished")
        elif MergedName.parse(path.name) is None:
            yield Finding("unknown", group, name, "none of the store's files; move it away")
        elif path.name not in true:
            yield Finding("stale-index", group, name, "of segments that are no more; never read")


def true_runs(directory: Path, rows: list[SegmentRow]) -> set[str]:
    """The merged runs that are the index of segments as the catalog has them."""
    known = {row.number: Known.of(row) for row in rows}
    sealed = list(merged_runs.identities(known).values())
    names = merged_runs.names_present(directory / merged_runs.DIRECTORY_NAME)
    return {str(name) for name in names if merged_runs.is_true(name, known, sealed)}


def _is_begun(path: Path, group_id: bytes, newest: int) -> bool:
    if not _FIRST_GENERATION.fullmatch(path.name) or int(path.stem) <= newest:
        return False
    try:
        with path.open("rb") as file:
            header = segments.decode_header(file.read(segments.HEADER_BYTES))
    except PeerError:
        return True  # not even its header was durable
    return (header.group, header.number) == (group_id, int(path.stem))


def _check_base(directory: Path, group: str, disk: DiskRow, least_bytes: int) -> Iterator[Finding]:
    path = image_path(directory, disk.name)
    lost, code = (0, disk.size_bytes), "base"
    try:
        found = path.stat()
    except FileNotFoundError:
        what = "the base image is missing"
    else:
        if not stat.S_ISREG(found.st_mode):
            what = "the base image is no regular file"
        elif found.st_size < least_bytes:
            what = f"the base image has {found.st_size} bytes, the disk {disk.size_bytes}"
            lost = (found.st_size, disk.size_bytes)
        elif found.st_size > disk.size_bytes:
            what, code = f"{found.st_size - disk.size_bytes} bytes beyond the disk's end", "unknown"
        else:
            return
    finding = Finding(code, group, f"base/{path.name}", what, offset=lost[0], disk=disk.name)
    if code == "base":
        finding.from_ns, finding.ranges = disk.ready_ns, [lost]
    else:
        finding.offset = disk.size_bytes
    yield finding


def _check_forks(directory: Path, group: str) -> Iterator[Finding]:
    for path in _listed(directory / forks.DIRECTORY_NAME):
        name = f"{forks.DIRECTORY_NAME}/{path.name}"
        if not path.is_dir():
            yield Finding("unknown", group, name, "none of the store's files; move it away")
            continue
        if forks.is_in_use(path):
            continue  # its process may be writing to it
        if path.name.startswith("."):
            yield Finding("unfinished", group, name, "what a crash has left of a fork")
            continue
        try:
            fork = forks.load(path)
        except (DamageError, FileNotFoundError) as error:
            what = str(error).partition(": ")[2] or "fork.json is missing"
            yield Finding("fork", group, f"{name}/{forks.FILE_NAME}", what)
            continue
        for disk in fork.disks:
            yield from _check_overlay(path, group, name, disk)


def _check_overlay(path: Path, group: str, name: str, disk: forks.ForkDisk) -> Iterator[Finding]:
    image, map_path = path / f"{disk.name}.img", path / f"{disk.name}.map"

    def lost(file: Path, what: str, offset: int) -> Finding:
        where = f"{name}/{file.name}"
        return Finding("fork", group, where, what, offset=offset, disk=disk.name)

    if not image.is_file() or image.stat().st_size != disk.size_bytes:
        yield lost(image, f"the overlay is missing or has not {disk.size_bytes} bytes", 0)
    try:
        data = map_path.read_bytes()
        if fork_map.decode_header(data) != (disk.size_bytes, FORK_BLOCK_BYTES):
            yield lost(map_path, "it is the map of another disk", 0)
            return
    except FileNotFoundError:
        yield lost(map_path, "the map is missing", 0)
        return
    except PeerError as error:
        yield lost(map_path, str(error), 0)
        return
    end = HEADER_BYTES
    for _changes, after in fork_map.decode_records(data, -(-disk.size_bytes // FORK_BLOCK_BYTES)):
        end = after
    if end == len(data):
        return
    rest = len(data) - end
    count = RECORD.unpack_from(data, end)[0] if rest >= RECORD_BYTES else 0
    if rest <= RECORD_BYTES + count * CHANGE_BYTES:
        what = f"{rest} bytes of a flush that was not finished; opening the fork cuts them off"
        where = f"{name}/{map_path.name}"
        yield Finding("torn-tail", group, where, what, offset=end, disk=disk.name)
    else:
        yield lost(map_path, "a record does not match its digest; what follows it is lost", end)


def _check_pins(directory: Path, group: str) -> Iterator[Finding]:
    for path in _listed(directory / pins.DIRECTORY_NAME):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
        name = f"{pins.DIRECTORY_NAME}/{path.name}"
        yield Finding("void-pin", group, name, "its process is no more")


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
