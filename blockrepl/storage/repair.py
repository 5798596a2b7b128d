"""Makes again what a check found damaged and can be made from the rest. Primary data stays.

=====================================  ========================================================
found                                  done
=====================================  ========================================================
merged-run, stale-index, unfinished    removed: what they say is in the segments
.run
segment-header, seal, frame-table,     the segment is written anew as retention does
index, index-differs, file-digest      (retained.py): its frames, byte by byte, under the next
                                       generation's name, examined whole, then catalogued
torn-tail, unfinished, durable-record  the replica is opened and closed: what the receiver does
                                       when it starts
forks and pins that a crash has left   as any command does that meets them
=====================================  ========================================================

A segment is not written anew when frames of it are lost (what reads it goes by its frames), when it
is the newest, or not sealed. No receiver may have the replica open.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from blockrepl.errors import BlockreplError, DamageError, StateError
from blockrepl.formats import frame as frames
from blockrepl.formats import segment as segments
from blockrepl.storage import catalog as catalogs
from blockrepl.storage import forks, merged_runs, pins, retained
from blockrepl.storage.catalog import Catalog, SegmentRow
from blockrepl.storage.check_files import true_runs
from blockrepl.storage.check_findings import Finding
from blockrepl.storage.check_segment import SegmentCheck
from blockrepl.storage.files import Files
from blockrepl.storage.journal import DIRECTORY_NAME
from blockrepl.storage.replica import open_replica
from blockrepl.storage.segment_writer import SegmentWriter, create_segment, seal

REWRITTEN = {"segment-header", "seal", "frame-table", "index", "index-differs", "file-digest"}
REMOVED = {"merged-run", "stale-index"}
REOPENED = {"torn-tail", "unfinished", "durable-record"}


def repair(directory: Path, findings: Sequence[Finding]) -> None:
    """Repair what can be, and mark it so; ``what`` says why something was not. StorageError."""
    if any(finding.file == catalogs.FILE_NAME for finding in findings):
        return  # without a true catalog nobody knows what is derived
    with (
        retained.lock(directory),
        closing(Catalog.open(directory / catalogs.FILE_NAME)) as catalog,
    ):
        _rewrite_segments(directory, catalog, findings)
        true = true_runs(directory, catalog.segments())
        for finding in findings:
            is_run = finding.file.startswith(f"{merged_runs.DIRECTORY_NAME}/")
            if finding.code in REMOVED or (finding.code == "unfinished" and is_run):
                (directory / finding.file).unlink(missing_ok=True)
                finding.repaired = True
        for name in merged_runs.names_present(directory / merged_runs.DIRECTORY_NAME):
            if str(name) not in true:
                (directory / merged_runs.DIRECTORY_NAME / str(name)).unlink(missing_ok=True)
        retained.remove_leftovers(catalog, directory / DIRECTORY_NAME)
    with pins.lock(directory):
        pins.held(directory)
        pins.remove_unfinished(directory)
    forks.sweep(directory)
    _reopen(directory, findings)


def _reopen(directory: Path, findings: Sequence[Finding]) -> None:
    """What the receiver does when it starts; then look what is gone."""
    waiting = [each for each in findings if each.code in REOPENED and not each.repaired]
    of_journal = [each for each in waiting if not each.file.startswith(forks.DIRECTORY_NAME)]
    if of_journal and not any(each.severity == "lost" for each in findings):
        try:
            open_replica(directory).close()
        except BlockreplError as error:
            for each in of_journal:
                each.what += f"; not repaired: {error}"
            return
        for each in of_journal:
            each.repaired = True
    for each in findings:
        if each.code in {"unfinished", "void-pin"} and not (directory / each.file).exists():
            each.repaired = True


def _rewrite_segments(directory: Path, catalog: Catalog, findings: Sequence[Finding]) -> None:
    lossy = {each.segment for each in findings if each.severity == "lost"}
    rows = {row.number: row for row in catalog.segments()}
    for number in sorted({each.segment or 0 for each in findings if each.code in REWRITTEN}):
        mine = [each for each in findings if each.segment == number and each.code in REWRITTEN]
        row = rows.get(number)
        if row is None or not row.sealed or number == max(rows) or number in lossy:
            why = "frames of it are lost" if number in lossy else "it is the newest segment"
            for each in mine:
                each.what += f"; not repaired, for {why}: it is read by its frames"
            continue
        try:
            new = _write_anew(directory / DIRECTORY_NAME, catalog, row)
            retained.replace(catalog, [row], [new], None)
        except BlockreplError as error:
            for each in mine:
                each.what += f"; not repaired: {error}"
            continue
        finally:
            retained.remove_leftovers(catalog, directory / DIRECTORY_NAME)
        for each in mine:
            each.repaired = True


def _write_anew(directory: Path, catalog: Catalog, row: SegmentRow) -> SegmentRow:
    """A segment of the next generation with the same frames, durable and proven. StorageError."""
    # Another time of making: merged runs of the old segment are not those of the new one.
    new = replace(row, generation=row.generation + 1, created_ns=row.created_ns + 1)
    if new.generation > segments.GENERATION_MAX:
        raise StateError(f"segment {row.number} was written anew as often as can be")
    path = directory / segments.file_name(new.number, new.generation)
    path.unlink(missing_ok=True)  # of an attempt that failed
    files = Files()
    segment = create_segment(
        directory, catalog.group_id, new.number, new.created_ns, files, new.generation
    )
    writer = SegmentWriter(segment, files)
    source = os.open(directory / segments.file_name(row.number, row.generation), os.O_RDONLY)
    try:
        at = segments.HEADER_BYTES
        for _ in range(row.frames):
            encoded = os.pread(source, frames.HEADER_BYTES, at)
            header = frames.decode_header(encoded)
            body = os.pread(source, header.body_bytes, at + frames.HEADER_BYTES)
            writer.append([(header, encoded + body)])
            at += header.frame_bytes
        new = replace(new, bytes=seal(segment, files))
    finally:
        os.close(source)
        segment.close()
    report = SegmentCheck(path, new, catalog.group_name, catalog.group_id, 0, {}).run(
        lambda _size: None, lambda _header: None
    )
    if report.findings:
        raise DamageError(
            f"{path} is damaged as soon as it is written: {report.findings[0].what}",
            hint="look at the disk that holds the replica, and at the machine's memory",
        )
    return new
