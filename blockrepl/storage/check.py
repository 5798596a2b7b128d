"""Examines a store that no receiver has open: structure, digests, index, catalog; changes nothing.

======================  =====================================================================
looked at               by
======================  =====================================================================
the catalog             check_catalog.py. What SQLite itself calls damaged ends the check
names, sizes, forks     check_files.py
each known segment      check_segment.py: every byte of it
frames' numbers         check_catalog.Numbers, over all segments in order
each merged run         here: every chunk, and its entries against those of the segments
======================  =====================================================================

What is lost is told at the end (check_losses.py), for it takes later records to know until when.
Memory is that of one segment's columns: some 300 bytes a record, SEGMENT_RECORDS_TARGET of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from blockrepl.errors import DamageError, StateError
from blockrepl.formats.merged_run import MergedName
from blockrepl.formats.segment import file_name
from blockrepl.storage import catalog as catalogs
from blockrepl.storage import durable as durables
from blockrepl.storage import merged_runs
from blockrepl.storage.catalog import Catalog, SegmentRow
from blockrepl.storage.check_catalog import Numbers, check_catalog
from blockrepl.storage.check_files import check_files, true_runs
from blockrepl.storage.check_findings import Finding, Lost
from blockrepl.storage.check_losses import Losses
from blockrepl.storage.check_segment import SegmentCheck
from blockrepl.storage.journal import DIRECTORY_NAME
from blockrepl.storage.merged_runs import MergedFile, MergedRunError
from blockrepl.storage.merging import Account
from blockrepl.storage.reading import ReadFiles
from blockrepl.storage.runs import directory_cache
from blockrepl.storage.watermarks import sources_shown

Progress = Callable[[int], None]  # called with the bytes examined so far


def bytes_to_check(directory: Path) -> int:
    """What a check of a replica reads: segments and merged runs."""
    return sum(
        path.stat().st_size
        for name in (DIRECTORY_NAME, merged_runs.DIRECTORY_NAME)
        for path in (directory / name).glob("*")
    )


def check_replica(directory: Path, progress: Progress = lambda _done: None) -> list[Finding]:
    """All that is wrong with a replica. StorageError, OSError when it cannot be read."""
    name, path = directory.name, directory / catalogs.FILE_NAME
    try:
        catalog = Catalog.open_readonly(path)
    except StateError as error:
        if error.code != "no-catalog":
            raise
        if any((directory / DIRECTORY_NAME).glob("*.seg")):
            return [Finding("catalog", name, path.name, "it is missing; restore it from a copy")]
        what = "no replica was begun here; the receiver does so when it starts"
        return [Finding("unfinished", name, path.name, what)]
    except DamageError as error:
        return [Finding("catalog", name, path.name, f"{error}; nothing else was examined")]
    with closing(catalog):
        try:
            return _Check(directory, catalog, progress).run()
        except DamageError as error:
            return [Finding("catalog", name, path.name, f"{error}; not all else was examined")]


class _Check:
    def __init__(self, directory: Path, catalog: Catalog, progress: Progress) -> None:
        self._directory = directory
        self._catalog = catalog
        self._group = catalog.group_name
        self._progress = progress
        self._done_bytes = 0
        self._findings: list[Finding] = []
        self._lost: list[Lost] = []
        # Of each segment whose frames could all be read: what its index must come to.
        self._accounts: dict[int, dict[bytes, Account]] = {}

    def run(self) -> list[Finding]:
        found = check_catalog(self._catalog)
        if found:
            return found
        self._findings += check_files(self._directory, self._catalog)
        rows = self._catalog.segments()
        self._check_segments(rows)
        for name in sorted(true_runs(self._directory, rows)):
            self._check_merged(name)
        disks = self._catalog.disks(removed=True)
        losses = Losses(self._directory, self._catalog.group_id, rows, disks)
        told = losses.tell(self._lost)
        return [one for each in self._findings for one in told.get(id(each), [each])]

    def _tell(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        self._progress(self._done_bytes)

    def _lose(self, lost: Lost) -> None:
        self._findings.append(lost.finding)
        self._lost.append(lost)

    def _check_segments(self, rows: list[SegmentRow]) -> None:
        durable = durables.read_durable(self._directory / durables.FILE_NAME)
        numbers = Numbers(self._group, self._lose)
        before = 0
        watermarks = sources_shown(self._catalog.disks(removed=True))
        for row in rows:
            name = file_name(row.number, row.generation)
            path = self._directory / DIRECTORY_NAME / name
            numbers.file = f"{DIRECTORY_NAME}/{name}"
            if row.number != before + 1:
                numbers.note(None)  # what was between has been folded or thinned away
            before = row.number
            known_bytes = row.bytes
            if durable is not None and durable.segment_number == row.number:
                known_bytes = max(known_bytes, durable.segment_bytes)
            check = SegmentCheck(
                path, row, self._group, self._catalog.group_id, known_bytes, watermarks
            )
            try:
                report = check.run(self._tell, numbers.note)
            except FileNotFoundError:
                numbers.note(None)
                finding = Finding("segment-missing", self._group, numbers.file, "it is missing")
                finding.segment = row.number
                self._lose(Lost(finding, None, row.first_stamp, place=check.place))
                continue
            self._findings += report.findings
            self._lost += report.lost
            if report.is_whole:
                self._accounts[row.number] = report.accounts
        self._findings += numbers.end(self._catalog.sources())

    def _check_merged(self, name: str) -> None:
        parsed = MergedName.parse(name)
        assert parsed is not None
        directory = self._directory / merged_runs.DIRECTORY_NAME
        finding = Finding(
            "merged-run", self._group, f"{directory.name}/{name}", "", segment=parsed.last
        )
        try:
            found = dict(self._merged_accounts(parsed))
        except MergedRunError as error:
            finding.what = str(error).partition(": ")[2].rpartition(" (")[0]
            finding.offset = error.offset
            self._findings.append(finding)
            return
        finally:
            self._tell((directory / name).stat().st_size)
        expected: dict[bytes, Account] = {}
        numbers = [row.number for row in self._catalog.segments()]
        for number in numbers:
            if not parsed.first <= number <= parsed.last:
                continue
            if number not in self._accounts:
                return  # frames are lost: nothing to hold it against
            for disk, account in self._accounts[number].items():
                expected.setdefault(disk, Account()).join(account)
        if expected != found:
            finding.what = "it is not the index of its segments' frames"
            self._findings.append(finding)

    def _merged_accounts(self, name: MergedName) -> Iterator[tuple[bytes, Account]]:
        files = ReadFiles()
        try:
            file = MergedFile(
                self._directory / merged_runs.DIRECTORY_NAME,
                name,
                self._catalog.group_id,
                files,
                directory_cache(),
            )
            for disk in file.entries():
                run, account = file.run(disk), Account()
                for is_long in (False, True):
                    for piece in run.stream(is_long=is_long) if run is not None else ():
                        account.add(piece)
                yield disk, account
        finally:
            files.close()
