"""Real services for tests: homes, disks and their servers, run by the console script.

`place` is a `scripts.guest.pair.Pair` in the test's directory: whatever a test starts there ends
with the test. `Disk` adds what tests want to know of a disk: its ring, its hot map, its server.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from blockrepl import limits
from blockrepl.formats import hot_map
from blockrepl.formats.frame import KIND_MASK, RecordKind
from blockrepl.storage.home import Home
from blockrepl.storage.ring import RingReader, ring_path
from blockrepl.storage.source import DiskEntry, SourceDisks
from blockrepl.units import MIB
from scripts.guest.pair import COMMAND, Pair, pair

POLL_SECONDS = 0.01
DEADLINE_SECONDS = 30.0
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Pair]:
    """Homes of a receiver and a source, empty, and a directory for what goes with them."""
    with pair(tmp_path, print) as made:
        try:
            yield made
        finally:
            made.tell_logs(print)  # shown when the test has failed


def blockrepl(home: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever its end is."""
    command = [str(COMMAND), "--home", str(home), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def tool(*words: str | Path, status: int = 0) -> str:
    """Run a program that was not written here; what it says. It must end with ``status``."""
    process = subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert process.returncode == status, f"{words[0]}: {process.stdout}"
    return process.stdout


def wait_for(true: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not so after {seconds:g} s"
        time.sleep(POLL_SECONDS)


class Disk:
    """A protected disk of a place's source."""

    def __init__(
        self,
        place: Pair,
        name: str = "d1",
        *,
        size_bytes: int = 8 * MIB,
        image: Path | None = None,
        ring_bytes: int = limits.RING_BYTES_MIN,
        group: str = "g",
    ) -> None:
        self.place, self.name = place, name
        path = image or place.directory / f"{name}.img"
        create = () if image is not None else ("--size", str(size_bytes))
        options = ("--group", group, "--ring", str(ring_bytes), *create)
        place.source("disk", "add", name, path, *options, quiet=True)
        self.disks = SourceDisks(Home.open(place.source_home))
        self.entry: DiskEntry = self.disks.load(name)
        self.image = self.entry.image
        self.size_bytes = self.entry.size_bytes
        self.socket = self.disks.socket_path(self.entry)
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.ring = ring_path(self.entry.id.bytes)
        self.hot_map = self.disks.hot_map_path(self.entry)

    def start(self) -> None:
        self.place.start_disk(self.name)

    def stop(self) -> None:
        self.place.stop(f"disk-{self.name}")

    def kill(self) -> None:
        """kill -9 the server."""
        self.place.kill(f"disk-{self.name}")

    def process(self) -> int:
        return self.place.services[f"disk-{self.name}"].process.pid

    def is_alive(self) -> bool:
        return self.place.services[f"disk-{self.name}"].process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process(), number)

    def reader(self) -> RingReader:
        return RingReader(self.ring, self.entry.id.bytes)

    def make_cold(self) -> None:
        """As after a clean end: nothing may differ from the replica. No server, no ring."""
        assert not self.ring.exists()
        data = hot_map.encode(self.entry.id.bytes, self.size_bytes, limits.REGION_BYTES, hot=False)
        self.hot_map.write_bytes(data)

    def hot_regions(self) -> list[int]:
        found: list[int] = np.flatnonzero(self.disks.hot_regions(self.entry)).tolist()
        return found

    def content(self) -> bytes:
        """What is in the image, for a block device too."""
        with self.image.open("rb") as file:
            return file.read(self.size_bytes)


@dataclass(frozen=True)
class Record:
    sequence: int
    stamp: int
    offset: int
    length: int
    kind: int  # with the FUA flag

    @property
    def after(self) -> int:
        return self.offset + self.length


class Replay:
    """A ring's records, put one after the other onto what the disk held before them."""

    def __init__(self, reader: RingReader, before: bytes) -> None:
        self.reader = reader
        self.content = bytearray(before)
        self.next = reader.tail()
        self.records: list[Record] = []

    def drain(
        self,
        until_ns: int | None = None,
        *,
        release: bool = True,
        each: Callable[[Record], None] = lambda record: None,
    ) -> list[Record]:
        """Apply what is in the ring, up to an instant, and give its room back."""
        head, before = self.reader.head(), len(self.records)
        while self.next < head:
            batch = self.reader.take(self.next, head, limits.FRAME_PAYLOAD_BYTES_MAX, 4096)
            columns, payload, at = batch.columns, memoryview(batch.payload), 0
            rows = (columns.stamps, columns.offsets, columns.lengths, columns.kinds)
            for stamp, offset, length, kind in zip(*(row.tolist() for row in rows), strict=True):
                if until_ns is not None and stamp > until_ns:
                    return self.records[before:]
                record = Record(self.next, stamp, offset, length, kind)
                if kind & KIND_MASK == RecordKind.WRITE:
                    self.content[record.offset : record.after] = payload[at : at + length]
                    at += length
                elif kind & KIND_MASK != RecordKind.FLUSH:
                    self.content[record.offset : record.after] = bytes(length)
                self.records.append(record)
                each(record)
                self.next += 1
            if release:
                self.reader.release(self.next)
        return self.records[before:]

    def differing_regions(self, now: bytes) -> list[int]:
        """Regions in which the disk is not what its records say."""
        size = limits.REGION_BYTES
        return [
            at // size
            for at in range(0, len(now), size)
            if now[at : at + size] != self.content[at : at + size]
        ]


def stale_regions(reader: RingReader) -> list[int]:
    found: list[int] = np.flatnonzero(reader.stale).tolist()
    return found
