"""Views: opening any point of a long journal, and reading one through FUSE and NBD.

Two histories are read, each against a plain raw file with the same bytes behind the peer's same
door:

=========  =========================================================================================
settled    a first sync of the whole disk, then random 4 KiB writes to a tenth of it: a day
scattered  random 4 KiB writes twice as many as the disk has blocks and no base image: the worst for
           any view, since what lies together on the disk lies anywhere in the journal
=========  =========================================================================================

All is read from a cold page cache, each block at most once per turn.

Points are opened in this process: from nothing but the replica's directory to the first byte, a new
point and place each time.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from blockrepl.storage.history import ReplicaHistory
from blockrepl.units import MIB
from blockrepl.views.view import View
from scripts.benchmark.bench import Bench
from scripts.benchmark.journals import LongJournal, long_journal, merging, mounted, served
from scripts.benchmark.load import MEGABYTE, read_once
from scripts.benchmark.memory import resident_bytes
from scripts.benchmark.peers import qemu_nbd, qsd_fuse
from scripts.benchmark.processes import MeasurementError
from scripts.benchmark.report import Goal, Row, summarise
from scripts.benchmark.rounds import Contestant, clear_page_cache, interleave
from scripts.make_journal import DISK, GROUP, Journal, make

FUSE_PEER = "qemu-storage-daemon, FUSE export"
NBD_PEER = "qemu-nbd"


@dataclass(frozen=True)
class _History:
    """A shape of history; of its records as a share of the disk's blocks."""

    name: str
    share: float
    base: bool

    def journal(self, disk_bytes: int) -> Journal:
        records = int(self.share * disk_bytes) // BLOCK_BYTES
        return Journal(records, disk_bytes, payload="random", base=self.base)


SETTLED = _History("view", 0.1, base=True)
SCATTERED = _History("view_scattered", 2.0, base=False)
PATTERNS = (
    ("sequential", "MB/s", Goal(">=", 1.0), "read", 1 << 20),
    ("random", "IOPS", Goal(">=", 0.7), "randread", 4096),
)
POINTS = 100
BLOCK_BYTES = 4096
INGEST_RECORDS = 1_000_000


def _read(bench: Bench, source: Path | str, pattern: str, block_bytes: int) -> float:
    """MB/s of a sequential read, IOPS of a random one."""
    load = read_once(
        bench.scratch, source, pattern=pattern, block_bytes=block_bytes, seconds=bench.seconds
    )
    return load.megabytes_per_second if pattern == "read" else load.iops


def _doors(history: _History) -> tuple[str, str]:
    """What the rows of the FUSE and of the NBD door begin with."""
    return history.name, f"{history.name}_nbd"


def view_names(history: _History) -> tuple[str, ...]:
    """The rows that `views` yields."""
    return tuple(f"{door}_{pattern[0]}" for door in _doors(history) for pattern in PATTERNS)


def views(history: _History, bench: Bench) -> list[Row]:
    journal = history.journal(bench.image_bytes)
    sources: list[list[tuple[str, Path | str]]] = [[], []]  # of each door, named
    with ExitStack() as stack:
        raw = bench.scratch.directory / "raw.img"
        if bench.peers_only:
            raw = bench.image("ours")
        else:
            bench.progress(f"making a journal of {journal.records:,} records")
            home = bench.scratch.directory / "view-home"
            stack.callback(shutil.rmtree, home)
            made = long_journal(home, journal)
            stack.callback(raw.unlink, missing_ok=True)
            _write_raw(made, raw)
            sources[0].append(("ours", stack.enter_context(mounted(bench.scratch, made))[0]))
            sources[1].append(("ours", stack.enter_context(served(bench.scratch, made))))
        sources[0].append((FUSE_PEER, stack.enter_context(qsd_fuse(bench.scratch, raw))))
        export = stack.enter_context(qemu_nbd(bench.scratch, raw, read_only=True))
        sources[1].append((NBD_PEER, export))
        note = f"{journal.records:,} random 4 KiB records" + ", and a base image" * history.base
        return [
            _read_row(bench, door, pattern, named, note)
            for door, named in zip(_doors(history), sources, strict=True)
            for pattern in PATTERNS
        ]


def _read_row(
    bench: Bench,
    door: str,
    pattern: tuple[str, str, Goal, str, int],
    sources: Sequence[tuple[str, Path | str]],
    note: str,
) -> Row:
    """Let the sources, named, the peer's last, be read in turn."""
    name, unit, goal, order, block_bytes = pattern
    name, peer = f"{door}_{name}", sources[-1][0]
    bench.progress(name)
    contestants = [
        Contestant(owner, partial(_read, bench, source, order, block_bytes))
        for owner, source in sources
    ]
    figures = interleave(contestants, bench.rounds, progress=bench.progress)
    ours = figures.get("ours", [])
    return summarise(name, unit, goal, ours, peer=peer, theirs=figures[peer], notes=[note])


def _write_raw(made: LongJournal, raw: Path) -> None:
    """The view's bytes as a plain file, each block compared with what a linear replay finds."""
    journal = made.journal
    at_ns = journal.stamp(journal.records)
    shown = journal.newest(at_ns)
    with ReplicaHistory.open(made.home, GROUP) as replica, raw.open("wb") as file:
        view = View(replica, at_ns, replica.state())
        for at in range(0, journal.disk_bytes, MIB):
            data = view.read(DISK, at, MIB)
            file.write(data)
            for place in range(at // BLOCK_BYTES, (at + len(data)) // BLOCK_BYTES):
                offset = place * BLOCK_BYTES - at
                if int.from_bytes(data[offset : offset + 8], "little") != int(shown[place]):
                    raise MeasurementError(f"the view is wrong at {place * BLOCK_BYTES}")


def open_point(bench: Bench) -> list[Row]:
    """Opening points of journals of all and of a tenth of the records; the memory of a view."""
    seconds: dict[int, list[float]] = {}
    held: list[float] = []
    notes = []
    tenth_records = _tenth(Journal(bench.records, bench.image_bytes))
    if not bench.peers_only:
        for records in (tenth_records, bench.records):
            bench.progress(f"making a journal of {records:,} records")
            home = bench.scratch.directory / f"open-{records}"
            made = long_journal(home, Journal(records, bench.image_bytes))
            clear_page_cache()
            seconds[records] = _open_points(made)
            bench.progress(f"{records:,} records: {median(seconds[records]):.4f} s")
            if records == bench.records:
                begin = time.perf_counter()
                made.journal.newest(made.journal.stamp(records))
                replay = time.perf_counter() - begin
                worst = max(seconds[records])
                notes.append(
                    f"{records:,} records, {POINTS} random points, worst {worst:.3f} s; "
                    f"a linear replay of its columns alone {replay:.1f} s"
                )
                held.append(_memory_of_view(bench, made) / MEGABYTE)
            shutil.rmtree(home)
    ours, tenth = seconds.get(bench.records, []), seconds.get(tenth_records, [])
    return [
        summarise("open_point", "s", Goal("<=", 0.5), ours, notes=notes),
        summarise(
            "point_growth",
            "s",
            Goal("<=", 2.0),
            ours,
            peer=f"a journal of {tenth_records:,} records",
            theirs=tenth,
        ),
        summarise("memory_view", "MB", Goal("<=", 400), held, notes=notes[:1]),
    ]


def _tenth(journal: Journal) -> int:
    """A tenth of a journal's records, but with as much in the open segment: its frames are scanned,
    and would be all the difference between two journals that differ in how full it is.
    """
    tenth, segment = journal.records // 10, journal.segment_records()
    return tenth + (journal.records - tenth) % segment if tenth > segment else tenth


def _open_points(made: LongJournal) -> list[float]:
    """Seconds from the replica's directory to the first byte, per point."""
    journal = made.journal
    rng = random.Random(journal.seed)
    taken = []
    for _ in range(POINTS):
        record, place = rng.randrange(journal.records), rng.randrange(journal.blocks)
        begin = time.perf_counter()
        with ReplicaHistory.open(made.home, GROUP) as replica:
            view = View(replica, journal.stamp(record), replica.state())
            view.read(DISK, place * BLOCK_BYTES, BLOCK_BYTES)
        taken.append(time.perf_counter() - begin)
    return taken


def _memory_of_view(bench: Bench, made: LongJournal) -> int:
    """The most a mount's process held while its image was read in both ways, in bytes."""
    most = 0
    with mounted(bench.scratch, made) as (path, service):
        for pattern, block_bytes in (("read", 1 << 20), ("randread", BLOCK_BYTES)):
            _read(bench, path, pattern, block_bytes)
            most = max(most, sum(map(resident_bytes, service.process_ids())))
    return most


def merge_ingest(bench: Bench) -> list[Row]:
    """How many records a second a store takes in, with its index merged beside, and without."""
    name, peer = "merge_ingest", "the same without merging"
    if bench.peers_only:
        return [summarise(name, "records/s", Goal(">=", 0.9), [], peer=peer)]
    contestants = [
        Contestant("ours", partial(_ingest, bench, True)),
        Contestant(peer, partial(_ingest, bench, False)),
    ]
    figures = interleave(contestants, bench.rounds, progress=bench.progress)
    ours, theirs = figures["ours"], figures[peer]
    return [summarise(name, "records/s", Goal(">=", 0.9), ours, peer=peer, theirs=theirs)]


def _ingest(bench: Bench, merges: bool) -> float:
    home = bench.scratch.directory / "ingest"
    journal = Journal(INGEST_RECORDS, bench.image_bytes)
    begin = time.perf_counter()
    with merging(home) if merges else nullcontext():
        make(home, journal)
        seconds = time.perf_counter() - begin
    shutil.rmtree(home)
    return INGEST_RECORDS / seconds
