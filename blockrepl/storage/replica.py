"""The replica of one group: catalog, journal and base images, kept true by one order of writes.

Per commit, each step done before the next:

1. base frames into the base images, journal frames into the open segment; fdatasync of each. So
   is what a commit that found no room left in a base image: a comparison finds it in place, and
   its source lets go of it with the next numbered frame. Before the mark that ends its first sync
   an image is synced in any case: a seed came in no frame
2. the catalog, when marks came or a segment was begun or sealed: marks, sources, disks as of 1
3. the durable record (a hint, not synced)
4. the caller acknowledges

A crash after 1 leaves frames the catalog does not know: recovery replays them. So a source's
``last_number`` in the catalog is also the number up to which its marks have been applied. When 2
finds no room, the marks stay due and nothing is acknowledged until they are applied.

A source's frames come gapless: an older number is a duplicate and dropped, a hole is its fault. A
base frame for a disk whose first sync is done is a duplicate.

==========  ==============================================================================
error       meaning
==========  ==============================================================================
None        working
full        the last commit that held anything found no room; nothing of it was acknowledged;
            the next one is tried as usual
fail-stop   nothing works until the process has been restarted and has recovered
==========  ==============================================================================

After a failed commit all that was staged is forgotten: its sources must attach again. One thread
at a time may change a replica; ``status`` may be called by any, at any time, and does not wait.
`remove_leftovers` goes on beside.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from uuid import UUID, uuid4

from blockrepl.errors import DamageError, PeerError, StateError, StorageError
from blockrepl.formats.frame import FrameHeader, FrameKind
from blockrepl.formats.marks import CheckpointMark, ConsistentMark, GapMark, GrowMark, Mark
from blockrepl.formats.messages import AttachDisk, Attached, AttachedDisk
from blockrepl.model.retention_plan import Decision
from blockrepl.storage import catalog as catalogs
from blockrepl.storage import catalog_file, retained
from blockrepl.storage import durable as durables
from blockrepl.storage.admission import (
    bounded,
    check_content,
    check_growth,
    check_header,
    check_resync,
    read_mark,
)
from blockrepl.storage.attachment import attach_disks
from blockrepl.storage.base import BaseImage, image_path, is_blank
from blockrepl.storage.catalog import (
    Catalog,
    CheckpointRow,
    DiskRow,
    GapRow,
    GrowthRow,
    SegmentRow,
    SourceRow,
)
from blockrepl.storage.durable import Durable, DurableFile, read_durable
from blockrepl.storage.files import Files, fail_stop, failure, failures
from blockrepl.storage.home import make_directory
from blockrepl.storage.journal import DIRECTORY_NAME, Journal
from blockrepl.storage.proofs import Proofs
from blockrepl.storage.watermarks import newest_instant
from blockrepl.units import format_instant

logger = logging.getLogger(__name__)


class Admission(enum.Enum):
    STAGED = "staged"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class Commit:
    """What is durable: per source the last frame's number, and the group's watermark."""

    numbers: dict[bytes, int]
    watermark: int


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    name: str
    error: StorageError | None
    watermark: int
    journal_bytes: int
    disks: list[DiskRow]
    floor_ns: int | None  # of retired disks too: their history stays
    gaps: list[GapRow]
    growths: list[GrowthRow]
    base_bytes: dict[bytes, int]  # per disk, of the first sync, received by this process
    sources: dict[bytes, SourceRow]  # what of each source is durable


class Replica:
    """An open replica. Make one with `open_replica`."""

    def __init__(
        self, directory: Path, catalog: Catalog, files: Files, clock: Callable[[], int]
    ) -> None:
        self.directory = directory
        self.catalog = catalog
        self.name = catalog.group_name
        self.group_id = catalog.group_id
        self.proofs = Proofs(catalog)
        self.error: StorageError | None = None
        self._files = files
        self._clock = clock
        self._sources = {row.id: row for row in catalog.sources()}
        self._disks: dict[bytes, DiskRow] = {}
        self._images: dict[bytes, BaseImage] = {}
        self._base_bytes: dict[bytes, int] = {}
        self._marks_due: list[Mark] = []  # of durable frames, not yet in the catalog
        self._reload()
        self._forget_staged()
        self._images_removed = retained.remove_images(catalog, directory)
        self.remove_leftovers()
        durable = read_durable(directory / durables.FILE_NAME)
        self._boot = durables.this_boot()
        self._watermark = durable.watermark if durable else 0
        self._recall_watermark()  # what is replayed is bounded by it
        with ExitStack() as opened:
            self._journal = Journal(
                directory / DIRECTORY_NAME,
                self.group_id,
                rows=catalog.segments(),
                durable=durable,
                replay=self._replay,
                files=files,
                clock=clock,
            )
            opened.callback(self._journal.close)
            self._durable_file = DurableFile(directory / durables.FILE_NAME)
            opened.callback(self._durable_file.close)
            for disk in self._disks.values():
                if disk.ready_ns is None:
                    image = self._image(disk)
                    opened.callback(image.close)
                    image.settle()
            self._take_staged()
            self._write_catalog()
            self._recall_watermark()
            self._publish()
            opened.pop_all()
        recovered = self._journal.recovered
        if recovered.cut_bytes or recovered.damaged_frames:
            logger.warning(
                "group %s: recovered; %d bytes that were never acknowledged cut off, %d damaged "
                "frames kept",
                self.name,
                recovered.cut_bytes,
                recovered.damaged_frames,
            )

    def _replay(self, header: FrameHeader, body: memoryview | None) -> None:
        """Stage a frame that recovery found, as `append` did before the crash."""
        if header.source not in self._sources:
            raise DamageError(f"the journal of {self.name} has frames of an unknown source")
        if header.number <= self._sources[header.source].last_number:
            return
        if header.number != self._numbers[header.source] + 1:
            raise DamageError(f"the journal of {self.name} lacks frames before {header.number}")
        if header.kind == FrameKind.MARK and body is not None:
            try:
                self._marks.append(self._read_mark(header, body))
            except PeerError as error:
                logger.warning("group %s: a mark was not applied: %s", self.name, error)
        self._stage(header)

    # Sources and their frames

    def attach(self, source: bytes, disks: Sequence[AttachDisk]) -> Attached:
        """Take in which disks a source has in the group (attachment.py); where it goes on.

        Everything staged must have been committed. StateError, StorageError.
        """
        self._check_working()
        self._write_catalog()  # which alone knows from here on how far a retired disk has come
        row = self._sources.get(source, SourceRow(source, 0, 0))
        attach_disks(self.directory, self.catalog, source, disks, row.watermark + 1)
        self._sources[source] = row  # not of a source that is refused: the others go on
        self._reload()
        self._forget_staged()
        return Attached(
            group=self.name,
            group_id=UUID(bytes=self.group_id),
            next_number=row.last_number + 1,
            watermark=row.watermark,
            disks=[self._attached(self._disks[disk.id.bytes]) for disk in disks],
        )

    def _attached(self, disk: DiskRow) -> AttachedDisk:
        state: Literal["empty", "ready", "gap"] = "ready"
        if disk.ready_ns is None:
            state = "empty"
        elif any(gap.disk == disk.id and gap.to_ns is None for gap in self._gaps):
            state = "gap"
        return AttachedDisk(
            id=UUID(bytes=disk.id),
            epoch=disk.epoch,
            state=state,
            ring_id=disk.ring_id,
            next_sequence=disk.next_sequence,
            size_bytes=disk.size_bytes,
            blank=disk.ready_ns is None and is_blank(image_path(self.directory, disk.name)),
        )

    def append(self, source: bytes, header: FrameHeader, frame: memoryview) -> Admission:
        """Check a frame (admission.py) and stage it for the next commit. PeerError.

        ``frame`` is all of it, header included. It is kept until the commit, not copied.
        """
        if source not in self._sources:
            raise PeerError("frame of a source that has not attached")
        check_header(header, frame, group=self.group_id, source=source, disks=self._disks)
        disk = self._grown_disk(header.disk) if header.record_count else None
        if header.kind != FrameKind.BASE:
            due = self._numbers[source] + 1
            if header.number < due:
                return Admission.DUPLICATE
            if header.number > due:
                raise PeerError(f"frame {header.number} came where {due} was due")
            self._check_news(source, header)
        elif disk is None or disk.ready_ns is not None:
            return Admission.DUPLICATE
        body = frame[frame.nbytes - header.body_bytes :]
        check_content(header, body, disk)
        if header.kind == FrameKind.BASE:
            self._staged_base.append((header, body))
            return Admission.STAGED
        if header.kind == FrameKind.MARK:
            mark = self._read_mark(header, body)
            if isinstance(mark, GrowMark):
                self._check_growth(source, mark)
            self._marks.append(mark)
        self._staged.append((header, frame))
        self._stage(header)
        return Admission.STAGED

    def _read_mark(self, header: FrameHeader, body: memoryview) -> Mark:
        mark = read_mark(header, body, self._disks)
        return bounded(mark, header, self._watermarks[header.source], self._watermark)

    def _check_news(self, source: bytes, header: FrameHeader) -> None:
        """A point up to the watermark may be mounted already: nothing may be added to it, but the
        content of a resync to the gap that it ends.
        """
        watermark = self._watermarks[source]
        is_records = header.kind == FrameKind.RECORDS and header.record_count > 0
        if is_records and header.first_stamp <= watermark:
            raise PeerError(
                f"frame {header.number} has records older than the watermark {watermark}",
                hint="the source's clock went back; see its clock.json",
            )
        if header.kind == FrameKind.SYNC and header.record_count:
            check_resync(header, self._disks[header.disk], self._gap_begins(header.disk))

    def _gap_begins(self, disk: bytes) -> list[int]:
        """Where the gaps of a disk begin that are open, or will be when all staged is applied."""
        marks = (*self._marks_due, *self._marks)
        return [
            *(gap.from_ns for gap in self._gaps if gap.disk == disk and gap.to_ns is None),
            *(m.from_ns for m in marks if isinstance(m, GapMark) and m.disk.bytes == disk),
        ]

    def _check_growth(self, source: bytes, mark: GrowMark) -> None:
        disk = mark.disk.bytes
        count = sum(row.disk == disk for row in (*self._growths, *self._growths_staged()))
        check_growth(mark, self._grown_disk(disk), count, self._watermarks[source])

    def _growths_staged(self) -> list[GrowthRow]:
        """With the sizes that the disks will have."""
        return [
            GrowthRow(mark.disk.bytes, mark.size_bytes, mark.at_ns)
            for mark in self._marks
            if isinstance(mark, GrowMark)
        ]

    def _grown_disk(self, disk: bytes) -> DiskRow:
        """A disk as it will be when all that is staged is in the catalog."""
        row = self._disks[disk]
        sizes = (growth.before_bytes for growth in self._growths_staged() if growth.disk == disk)
        size_bytes = max(row.size_bytes, *sizes, 0)
        return row if size_bytes == row.size_bytes else replace(row, size_bytes=size_bytes)

    def _stage(self, header: FrameHeader) -> None:
        """Note what the frame moves forward once it is durable."""
        source = header.source
        self._numbers[source] = header.number
        self._watermarks[source] = max(header.watermark, self._watermarks[source])
        if header.ring_id:
            # A sync frame or a mark holds no records of the ring; it tells how far they have come.
            taken = header.record_count if header.kind == FrameKind.RECORDS else 0
            self._positions[header.disk] = (header.ring_id, header.first_sequence + taken)

    def _forget_staged(self) -> None:
        self._staged: list[tuple[FrameHeader, memoryview]] = []
        self._staged_base: list[tuple[FrameHeader, memoryview]] = []
        self._marks: list[Mark] = []
        self._numbers = {row.id: row.last_number for row in self._sources.values()}
        self._watermarks = {row.id: row.watermark for row in self._sources.values()}
        self._positions: dict[bytes, tuple[int, int]] = {}

    def now(self) -> int:
        """What time it is here, in ns since 1970."""
        return self._clock()

    def newest_ns(self) -> int:
        """From where the age of history is measured: the watermark, but never after our now. A
        source whose clock is ahead must not make everybody's history old.
        """
        return min(self._watermark, self.now())

    # Commit

    def commit(self) -> Commit:
        """Make everything staged durable. StorageError: nothing of it may be acknowledged."""
        self._check_working()
        has_staged = bool(self._staged or self._staged_base)
        try:
            self._write_base()
            self._journal.append(self._staged)
            self._take_staged()
            self._publish()
        except StorageError as error:
            if error.code != "full":
                error.code = "fail-stop"
            self.error = error
            raise
        finally:
            self._forget_staged()
        if has_staged:  # else nothing has shown that there is room again
            self.error = None
        return Commit(dict(self._numbers), self._watermark)

    def _write_base(self) -> None:
        for header, body in self._staged_base:
            row = self._grown_disk(header.disk)
            image = self._image(row)
            try:
                if image.size_bytes < row.size_bytes:
                    image.grow(row.size_bytes)
                image.write(header, body)
            except OSError as error:
                raise failure(error, f"cannot write {image.path}") from error
        ready = {m.disk.bytes for m in self._marks if isinstance(m, ConsistentMark)}
        seeded = {disk for disk in ready if self._disks[disk].ready_ns is None}
        for disk in seeded:
            self._image(self._disks[disk])
        for disk, image in self._images.items():
            try:
                image.sync(always=disk in seeded)
            except OSError as error:
                raise fail_stop(error, f"cannot sync {image.path}") from error
        for header, _ in self._staged_base:
            received = self._base_bytes.get(header.disk, 0)
            self._base_bytes[header.disk] = received + header.payload_bytes

    def _take_staged(self) -> None:
        """What was staged is durable now."""
        self._sources = {
            source: SourceRow(source, self._numbers[source], self._watermarks[source])
            for source in self._sources
        }
        for disk, (ring_id, sequence) in self._positions.items():
            if disk in self._disks:
                self._disks[disk] = replace(
                    self._disks[disk], ring_id=ring_id, next_sequence=sequence
                )
        self._marks_due += self._marks
        self._marks = []

    def _write_catalog(self) -> None:
        rows = self._journal.take_rows()
        with ExitStack() as held:
            if any(isinstance(mark, GrowMark) for mark in self._marks_due):
                held.enter_context(self.proofs.lock)  # always before the catalog's
            held.enter_context(self.catalog.transaction())
            for row in rows:
                self.catalog.put_segment(row)
            for source in self._sources.values():
                self.catalog.put_source(source)
            for disk in self._disks.values():
                self.catalog.set_position(disk.id, disk.ring_id, disk.next_sequence)
            for mark in self._marks_due:
                self._apply(mark)
        self._journal.rows_written()
        if self._marks_due:
            self._marks_due = []
            self._reload()

    def _apply(self, mark: Mark) -> None:
        if isinstance(mark, CheckpointMark):
            row = CheckpointRow(mark.name, mark.at_ns, mark.kind, mark.kept)
            if not self.catalog.add_checkpoint(row):
                logger.warning(
                    "group %s: checkpoint %s exists; the older one stays", self.name, mark.name
                )
        elif isinstance(mark, GapMark):
            if self.catalog.begin_gap(mark.disk.bytes, mark.from_ns):
                logger.warning(
                    "group %s: history has a gap from %s on; its source says why",
                    self.name,
                    format_instant(mark.from_ns),
                )
        elif isinstance(mark, GrowMark):
            self._grow(mark)
        else:
            self.catalog.set_consistent(mark.disk.bytes, mark.at_ns)

    def _grow(self, mark: GrowMark) -> None:
        disk = next(row for row in self.catalog.disks(removed=True) if row.id == mark.disk.bytes)
        if disk.ready_ns is None:
            image = self._image(disk)
            try:
                image.grow(mark.size_bytes)
            except OSError as error:
                raise failure(error, f"cannot enlarge {image.path}") from error
        before_bytes = self.catalog.grow(disk.id, mark.size_bytes, mark.at_ns)
        if before_bytes is not None:
            self.proofs.grown(disk.id, before_bytes)
            logger.info(
                "group %s: disk %s has grown from %d to %d bytes",
                self.name,
                disk.name,
                before_bytes,
                mark.size_bytes,
            )

    def _reload(self) -> None:
        rows = self.catalog.disks(removed=True)
        live = [row for row in rows if row.removed_ns is None]
        self._disks = {row.id: self._with_newest_position(row) for row in live}
        floors = (row.ready_ns for row in rows if row.ready_ns is not None)
        self._floor_ns = min(floors, default=None)
        self._gaps = self.catalog.gaps()
        self._growths = self.catalog.growths()

    def _with_newest_position(self, row: DiskRow) -> DiskRow:
        """The catalog hears how far a ring has come with the next mark or segment only."""
        known = self._disks.get(row.id, row)
        return replace(row, ring_id=known.ring_id, next_sequence=known.next_sequence)

    def _publish(self) -> None:
        """Let readers see what is durable. The marks first: a point past an unknown gap is none."""
        if self._journal.take_rows() or self._marks_due:
            self._write_catalog()
        live = {disk.source for disk in self._disks.values()}
        least = min((self._sources[source].watermark for source in live), default=0)
        # A source that has only just joined has no watermark yet: it takes back none of ours.
        self._watermark = max(self._watermark, least)
        record = Durable(
            self._journal.segment_number,
            self._journal.segment_bytes,
            self._watermark,
            self._journal.total_bytes,
            self._clock(),
            self._boot,
        )
        try:
            self._durable_file.write(record)
        except OSError as error:
            raise failure(error, f"cannot write the durable record of {self.name}") from error

    def _recall_watermark(self) -> None:
        """The durable record is never synced: a power cut or a move may have lost what it said."""
        watermarks = {row.id: row.watermark for row in self._sources.values()}
        newest_ns = newest_instant(self.catalog.disks(removed=True), watermarks)
        self._watermark = max(self._watermark, newest_ns)

    def _check_working(self) -> None:
        if self.error is not None and self.error.code == "fail-stop":
            raise StorageError(str(self.error), hint=self.error.hint, code="fail-stop")

    def _image(self, disk: DiskRow) -> BaseImage:
        if disk.id not in self._images:
            path = image_path(self.directory, disk.name)
            try:
                self._images[disk.id] = BaseImage(path, disk.size_bytes, self._files)
            except OSError as error:
                raise failure(error, f"cannot open {path}") from error
        return self._images[disk.id]

    # Retention (storage/retained.py)

    def shorten(self, decision: Decision) -> list[str]:
        """Say what can be reached from now on; the checkpoints that are gone. StorageError."""
        self._check_working()
        gone = []
        with self.catalog.transaction():
            if self._floor_ns is not None and decision.floor_ns > self._floor_ns:
                retained.raise_floor(self.catalog, decision.floor_ns)
            if decision.kept != retained.read_kept(self.catalog):
                gone = retained.thin_to(self.catalog, decision.kept)
            forgotten = retained.forget_retired(self.catalog, decision.floor_ns)
        for disk in forgotten:  # should it return, it gets another image
            self._base_bytes.pop(disk, None)
            if disk in self._images:
                self._images.pop(disk).close()
        self._reload()
        self._images_removed += retained.remove_images(self.catalog, self.directory)
        return gone

    def replace_segments(
        self, old: Sequence[int], new: Sequence[SegmentRow], folded_ns: int | None = None
    ) -> None:
        """Segments written anew, or folded away, take the place of old ones. StorageError."""
        self._check_working()
        rows = {row.number: row for row in self.catalog.segments()}
        leaving = [rows[number] for number in old]
        retained.replace(self.catalog, leaving, new, folded_ns)
        self._journal.resized(sum(row.bytes for row in new) - sum(row.bytes for row in leaving))
        self._reload()
        self._publish()

    def remove_leftovers(self) -> None:
        """Free the room of what `shorten` and `replace_segments` have left over. StorageError.

        Under the lock of retention, by any thread: it takes a disk long, and commits go on.
        """
        self._images_removed.clear()
        retained.remove_leftovers(self.catalog, self.directory / DIRECTORY_NAME)

    # What others see

    def status(self) -> ReplicaStatus:
        disks = sorted(self._disks.values(), key=lambda disk: disk.name)
        return ReplicaStatus(
            self.name,
            self.error,
            self._watermark,
            self._journal.total_bytes,
            disks,
            self._floor_ns,
            self._gaps,
            self._growths,
            dict(self._base_bytes),
            self._sources,
        )

    def segments(self) -> list[SegmentRow]:
        """The journal's, as they are now: in the catalog, one that is not sealed is still as it
        was when it began. Any thread may ask. StorageError.
        """
        live = {row.number: row for row in self._journal.open_rows()}
        rows = self.catalog.segments()
        return [row if row.sealed else live.get(row.number, row) for row in rows]

    def close(self) -> None:
        """Commit nothing more; leave the catalog up to date. Safe after a failure."""
        self._forget_staged()
        rows = self._journal.close()
        if self.error is None or self.error.code == "full":
            try:
                self.proofs.write()
                with self.catalog.transaction():
                    self._write_catalog()
                    for row in rows:
                        self.catalog.put_segment(row)
            except StorageError as error:
                logger.error("group %s: %s", self.name, error)
        for image in self._images.values():
            image.close()
        self._images_removed.clear()
        self._durable_file.close()
        self.catalog.close()


def create_replica(directory: Path, group: str, *, clock: Callable[[], int] = time.time_ns) -> None:
    """Make an empty replica, durably. Harmless when there is one. DamageError, StorageError."""
    path = directory / catalogs.FILE_NAME
    with failures(f"cannot make a replica in {directory}"):
        make_directory(directory)
        _check_catalog(directory)
        try:
            # To write: a power loss while it was made may have left SQLite something to roll back.
            Catalog.open(path).close()
        except StateError as error:
            if error.code != "no-catalog":
                raise
            Catalog.create(path, group, uuid4().bytes, clock()).close()


def open_replica(
    directory: Path, *, files: Files | None = None, clock: Callable[[], int] = time.time_ns
) -> Replica:
    """Open a replica, recovered from whatever a crash left behind. One process at a time.

    DamageError or StorageError when that cannot be done without losing acknowledged history.
    """
    with failures(f"cannot open the replica {directory}"):
        _check_catalog(directory)
        catalog_file.settle_files(directory / catalogs.FILE_NAME)
        catalog = Catalog.open(directory / catalogs.FILE_NAME)
        try:
            return Replica(directory, catalog, files or Files(), clock)
        except BaseException:
            catalog.close()
            raise


def _check_catalog(directory: Path) -> None:
    """A journal without its catalog has lost the names of its disks: never begin a new one."""
    path = directory / catalogs.FILE_NAME
    if not path.exists() and any((directory / DIRECTORY_NAME).glob("*.seg")):
        raise DamageError(
            f"the catalog {path} is missing, beside a journal that needs it",
            hint="restore catalog.sqlite from a copy of the replica",
        )
