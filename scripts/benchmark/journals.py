"""Long journals for the rows about views: made by scripts/make_journal.py, merged, then mounted or
served.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blockrepl.services.index_merging import MERGE_SHARE
from blockrepl.storage.catalog import Catalog
from blockrepl.storage.merging import Merger
from blockrepl.storage.segment_reader import Known
from scripts.benchmark.ours import COMMAND
from scripts.benchmark.peers import socket_uri
from scripts.benchmark.processes import Scratch, Service
from scripts.make_journal import DISK, GROUP, Journal, make


@dataclass(frozen=True)
class LongJournal:
    """A journal on disk, its index merged as a receiver would have it by now."""

    home: Path
    directory: Path
    journal: Journal


def long_journal(place: Path, journal: Journal) -> LongJournal:
    directory = make(place, journal)
    merge(directory, lambda _seconds: None)
    return LongJournal(place, directory, journal)


def merge(directory: Path, pause: Callable[[float], None]) -> None:
    """Do all merges there are to do."""
    catalog = Catalog.open_readonly(directory / "catalog.sqlite")
    try:
        merger = Merger(directory, catalog.group_id)
        while merger.step({row.number: Known.of(row) for row in catalog.segments()}, pause):
            pass
    finally:
        catalog.close()


@contextmanager
def merging(home: Path) -> Iterator[None]:
    """Merge in a thread, at the receiver's share of the time, while the block writes a journal."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(0.1):
            for path in home.glob(f"replicas/{GROUP}/catalog.sqlite"):
                merge(path.parent, lambda worked: time.sleep(worked * (1 / MERGE_SHARE - 1)))

    thread = threading.Thread(target=loop, name="merger")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def mounted(scratch: Scratch, made: LongJournal) -> Iterator[tuple[Path, Service]]:
    """Its latest point, mounted: the disk's file, and the process that serves it."""
    point = scratch.directory / "view"
    point.mkdir(exist_ok=True)
    command: list[str | Path] = [COMMAND, "--home", made.home, "mount", GROUP, point]
    image = point / f"{DISK}.img"
    with scratch.running("view", [*command, "--at", "latest", "--foreground"]) as service:
        service.wait_ready(image.exists)
        yield image, service


@contextmanager
def served(scratch: Scratch, made: LongJournal) -> Iterator[str]:
    """Its latest point over NBD; yields the URI."""
    path = scratch.directory / "view.sock"
    command: list[str | Path] = [COMMAND, "--home", made.home, "serve", GROUP, "--at", "latest"]
    with scratch.running("serve", [*command, "--socket", path], path) as service:
        service.wait_ready(path.is_socket)
        yield socket_uri(path, DISK)
