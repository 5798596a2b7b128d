"""Examines a catalog: SQLite's own checks, and rows that contradict themselves or the frames.

==================  ============================================================================
table               what must hold
==================  ============================================================================
all                 SQLite's integrity_check and foreign_key_check
segments            numbers and generations in bounds, stamps in order
sources             ``last_number`` and ``watermark`` at least those of the frames (`Numbers`)
disks               sizes of whole sectors
gaps                they end after they begin
thinned             ascending, disjoint, with a step; kept instants lie inside
checkpoints         of an instant that can be reached
folds               not beyond the newest watermark
proofs              of the size a chunk has
meta                the retention policy parses
==================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from blockrepl.errors import DamageError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import FrameHeader
from blockrepl.formats.segment import GENERATION_MAX, NUMBER_MASK
from blockrepl.limits import SECTOR_BYTES
from blockrepl.storage import catalog as catalogs
from blockrepl.storage.catalog import Catalog, SourceRow
from blockrepl.storage.check_findings import Finding, Lost
from blockrepl.storage.proofs import CHUNK_REGIONS
from blockrepl.storage.retained import read_kept, read_policy

INTEGRITY_LINES_MAX = 20


def check_catalog(catalog: Catalog) -> list[Finding]:
    """What is wrong with it by itself. StorageError."""

    def found(what: str) -> Finding:
        return Finding("catalog", catalog.group_name, catalogs.FILE_NAME, what)

    texts = [
        str(text)
        for (text,) in catalog.rows(f"PRAGMA integrity_check({INTEGRITY_LINES_MAX})")
        if text != "ok"
    ]
    texts += [
        f"row {row} of table {table} names a row of {parent} that is not there"
        for table, row, parent, _ in catalog.rows("PRAGMA foreign_key_check")
    ]
    if not texts:
        texts = list(_contradictions(catalog))
    return [found(" ".join(text.split())) for text in texts]


def _contradictions(catalog: Catalog) -> Iterator[str]:
    for row in catalog.segments():
        in_bounds = 0 < row.number <= NUMBER_MASK and 0 <= row.generation <= GENERATION_MAX
        if not in_bounds or row.first_stamp > row.last_stamp or row.bytes <= 0 or row.frames < 0:
            yield f"the row of segment {row.number} contradicts itself"
    for disk in catalog.disks(removed=True):
        if disk.size_bytes <= 0 or disk.size_bytes % SECTOR_BYTES:
            yield f"disk {disk.name} has a size of {disk.size_bytes} bytes"
        reached_ns = 0
        for growth in catalog.growths():
            if growth.disk != disk.id:
                continue
            if growth.before_bytes >= disk.size_bytes or growth.at_ns < reached_ns:
                yield f"disk {disk.name} cannot have grown from {growth.before_bytes} bytes"
            reached_ns = growth.at_ns
    for gap in catalog.gaps():
        if gap.to_ns is not None and gap.to_ns < gap.from_ns:
            yield f"a gap from {gap.from_ns} ends before it begins"
    yield from _retention(catalog)
    if catalog.version >= 2:
        query = "SELECT disk, chunk FROM proofs WHERE length(stamps) != ?"
        for disk, chunk in catalog.rows(query, CHUNK_REGIONS * 8):
            yield f"the proofs of disk {disk}, chunk {chunk}, have the wrong size"


def _retention(catalog: Catalog) -> Iterator[str]:
    try:
        read_policy(catalog)
    except DamageError as error:
        yield str(error)
    kept = read_kept(catalog)
    reached, is_sane = 0, True
    for one in kept.stretches:
        if one.step_ns <= 0 or one.from_ns >= one.to_ns or one.from_ns < reached:
            is_sane = False
            yield f"the thinned stretch from {one.from_ns} contradicts itself or the one before"
        reached = one.to_ns
    for at_ns in kept.instants:
        if not any(one.from_ns < at_ns <= one.to_ns for one in kept.stretches):
            is_sane = False
            yield f"the kept instant {at_ns} is in no thinned stretch"
    floors = [row.ready_ns for row in catalog.disks(removed=True) if row.ready_ns is not None]
    for point in catalog.checkpoints() if is_sane else ():
        if kept.before(point.at_ns) != point.at_ns or point.at_ns < min(floors, default=0):
            yield f"checkpoint {point.name} is of an instant that cannot be reached"
    newest = max((row.watermark for row in catalog.sources()), default=0)
    if catalog.version >= 3:
        for (floor_ns,) in catalog.rows("SELECT floor_ns FROM folds WHERE floor_ns > ?", newest):
            yield f"a fold up to {floor_ns} is due, which is in the future"


class Numbers:
    """Follows the frames' numbers: without gaps per source, but where some may be missing."""

    def __init__(self, group: str, report: Callable[[Lost], None]) -> None:
        self.file = ""
        self._group = group
        self._report = report
        self._newest: dict[bytes, FrameHeader] = {}

    def note(self, header: FrameHeader | None) -> None:
        """The next frame; None where some may be missing, which is told by others."""
        if header is None or header.source == frames.NO_ID:  # thinned: it has lost its number
            self._newest.clear()
            return
        before = self._newest.get(header.source)
        if before is not None and header.number != before.number + 1:
            self._lose(before, f"frame {header.number} follows on frame {before.number}")
        self._newest[header.source] = header

    def end(self, sources: list[SourceRow]) -> Iterator[Finding]:
        """Hold the catalog's word on each source against its newest frame."""
        for row in sources:
            newest = self._newest.get(row.id)
            if newest is None:
                continue
            if newest.number < row.last_number:
                what = f"frames {newest.number + 1} to {row.last_number} are missing"
                self._lose(newest, what)
            elif newest.number == row.last_number and newest.watermark > row.watermark:
                what = f"the watermark of source {row.id.hex()} is older than its last frame's"
                yield Finding("catalog", self._group, catalogs.FILE_NAME, what)

    def _lose(self, before: FrameHeader, what: str) -> None:
        finding = Finding("numbers", self._group, self.file, f"{what} ({before.source.hex()})")
        self._report(Lost(finding, None, before.watermark + 1, source=before.source))
