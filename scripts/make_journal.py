"""Make a replica with a long journal: deterministic, through the store's own writers, in minutes.

Usage: ``scripts/make_journal.py HOME [--records N] [--disk-mib N] [--seed N] ...``.

Record i (from 0) writes RECORD_BYTES at a random aligned place. Its stamp is START_NS + i * STEP_NS
and its data begins with i + 1 as u64, little-endian; so what a block shows at any instant tells
which record it came from. All of it follows from the seed and the frame's number, so the columns of
any frame can be made again without the rest (``Journal.columns``), and a model of the disk needs
no payload: ``Journal.newest``.

==========  ======================================================================================
payload     the rest of a record's data
==========  ======================================================================================
zeros       zeros: LZ4 takes 4 KiB to about 20 bytes, so ten million records take 0.6 GB
random      does not compress: the journal is as large as its records
==========  ======================================================================================

With ``base`` there is content of a first sync beneath: blocks of the same kind, but for their first
8 bytes, which are zeros, since no record has written them.

With zeros, segments are sealed after as many records as random ones would fill them with, so that a
journal has as many segments either way.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np
import numpy.typing as npt

from blockrepl import limits
from blockrepl.errors import BlockreplError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Columns, FrameKind
from blockrepl.formats.marks import ConsistentMark, encode_mark
from blockrepl.formats.messages import AttachDisk
from blockrepl.storage.home import Home
from blockrepl.storage.replica import Replica, create_replica, open_replica
from blockrepl.units import MIB

GROUP = "long"
DISK = "disk"
DISK_ID = UUID(int=1)
SOURCE = b"make-journal-src"
START_NS = 1_800_000_000_000_000_000
STEP_NS = 50_000  # 20 000 records a second
COMMIT_FRAMES = 32
POOL_BYTES = 4 * MIB

Blocks = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Journal:
    """What a journal holds. Everything follows from these values."""

    records: int
    disk_bytes: int
    record_bytes: int = 4096
    seed: int = 1
    frame_records: int = 256
    payload: str = "zeros"
    base: bool = False

    @property
    def frame_count(self) -> int:
        return -(-self.records // self.frame_records)

    @property
    def blocks(self) -> int:
        """Places of the disk that a record can be at."""
        return self.disk_bytes // self.record_bytes

    def stamp(self, record: int) -> int:
        return START_NS + record * STEP_NS

    def places(self, frame: int) -> npt.NDArray[np.int64]:
        """Which place each record of a frame writes."""
        first = frame * self.frame_records
        count = min(self.frame_records, self.records - first)
        return np.random.default_rng((self.seed, frame)).integers(0, self.blocks, count)

    def columns(self, frame: int) -> Columns:
        places = self.places(frame)
        count, first = len(places), frame * self.frame_records
        return Columns(
            (START_NS + (first + np.arange(count)) * STEP_NS).astype(np.uint64),
            (places * self.record_bytes).astype(np.uint64),
            np.full(count, self.record_bytes, np.uint32),
            np.zeros(count, np.uint8),
        )

    def data(self, frame: int, pool: npt.NDArray[np.uint8]) -> Blocks:
        """A frame's payload, (records, record_bytes)."""
        first = frame * self.frame_records
        count = min(self.frame_records, self.records - first)
        return self._blocks(np.arange(first + 1, first + count + 1, dtype=np.uint64), frame, pool)

    def base_data(self, first: int, count: int, pool: npt.NDArray[np.uint8]) -> Blocks:
        """What a first sync finds at so many places, (count, record_bytes)."""
        return self._blocks(np.zeros(count, np.uint64), first, pool)

    def _blocks(
        self, numbers: npt.NDArray[np.uint64], salt: int, pool: npt.NDArray[np.uint8]
    ) -> Blocks:
        count = len(numbers)
        if self.payload == "random":
            size = count * self.record_bytes
            at = salt * 7919 % (len(pool) - size + 1)
            data = pool[at : at + size].reshape(count, self.record_bytes).copy()
        else:
            data = np.zeros((count, self.record_bytes), np.uint8)
        data[:, :8] = numbers.view(np.uint8).reshape(count, 8)
        return data

    def newest(self, at_ns: int) -> npt.NDArray[np.uint64]:
        """What a linear replay finds: per place, the number its first 8 bytes show; 0 for none."""
        shown = np.zeros(self.blocks, np.uint64)
        last = min(self.records, (at_ns - START_NS) // STEP_NS + 1)
        for frame in range(-(-last // self.frame_records)):
            first = frame * self.frame_records
            places = self.places(frame)[: last - first]
            # Assigned in order, so that of one place's records the newest stays.
            shown[places] = np.arange(first + 1, first + len(places) + 1, dtype=np.uint64)
        return shown

    def segment_records(self) -> int:
        """Records that fill a segment when they do not compress."""
        by_size = limits.SEGMENT_BYTES_TARGET // self.record_bytes
        return min(by_size, limits.SEGMENT_RECORDS_TARGET)


class _Writer:
    def __init__(self, replica: Replica, journal: Journal) -> None:
        self._replica = replica
        self._journal = journal
        self._number = 1
        pool = np.random.default_rng(journal.seed).integers(0, 256, POOL_BYTES, np.uint8)
        self._pool = pool
        disk = AttachDisk(id=DISK_ID, name=DISK, size_bytes=journal.disk_bytes)
        replica.attach(SOURCE, [disk])
        if journal.base:
            self._base()
        mark = encode_mark(ConsistentMark(disk=DISK_ID, at_ns=START_NS - 1))
        self._frame(kind=FrameKind.MARK, watermark=START_NS - 1, payload=mark)
        replica.commit()

    def _base(self) -> None:
        """A first sync, its content stamped with the instant before the first mark."""
        journal = self._journal
        size = journal.record_bytes
        for first in range(0, journal.blocks, journal.frame_records):
            count = min(journal.frame_records, journal.blocks - first)
            columns = Columns(
                np.full(1, START_NS - 2, np.uint64),
                np.full(1, first * size, np.uint64),
                np.full(1, count * size, np.uint32),
                np.zeros(1, np.uint8),
            )
            payload = journal.base_data(first, count, self._pool).tobytes()
            self._append(
                kind=FrameKind.BASE,
                number=0,
                disk=DISK_ID.bytes,
                epoch=1,
                watermark=0,
                columns=columns,
                payload=payload,
            )
            if first // journal.frame_records % COMMIT_FRAMES == COMMIT_FRAMES - 1:
                self._replica.commit()
        self._replica.commit()

    def run(self) -> None:
        for frame in range(self._journal.frame_count):
            columns = self._journal.columns(frame)
            self._frame(
                kind=FrameKind.RECORDS,
                disk=DISK_ID.bytes,
                epoch=1,
                watermark=int(columns.stamps[-1]),
                columns=columns,
                payload=self._journal.data(frame, self._pool).tobytes(),
            )
            if frame % COMMIT_FRAMES == COMMIT_FRAMES - 1:
                self._replica.commit()
        self._replica.commit()

    def _frame(self, **fields: object) -> None:
        self._append(number=self._number, **fields)
        self._number += 1

    def _append(self, **fields: object) -> None:
        encoded = frames.encode_frame(
            group=self._replica.group_id,
            source=SOURCE,
            **fields,  # type: ignore[arg-type]
        )
        self._replica.append(
            SOURCE, encoded.header, memoryview(b"".join(bytes(part) for part in encoded.buffers))
        )


def make(home: Path, journal: Journal) -> Path:
    """Write the journal into the group ``long`` of a home; the replica's directory."""
    directory = Home.create(home).replica_directory(GROUP)
    create_replica(directory, GROUP)
    before = limits.SEGMENT_RECORDS_TARGET
    limits.SEGMENT_RECORDS_TARGET = journal.segment_records()
    replica = open_replica(directory)
    try:
        _Writer(replica, journal).run()
    finally:
        replica.close()
        limits.SEGMENT_RECORDS_TARGET = before
    return directory


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("home", type=Path, help="a home that has no group 'long' yet")
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--disk-mib", type=int, default=4096)
    parser.add_argument("--record-bytes", type=int, default=4096)
    parser.add_argument("--frame-records", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--payload", choices=["zeros", "random"], default="zeros")
    parser.add_argument("--base", action="store_true", help="content of a first sync beneath")
    options = parser.parse_args()
    journal = Journal(
        options.records,
        options.disk_mib * MIB,
        options.record_bytes,
        options.seed,
        options.frame_records,
        options.payload,
        options.base,
    )
    begin = time.monotonic()
    try:
        directory = make(options.home, journal)
    except BlockreplError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - begin
    stored = sum(path.stat().st_size for path in (directory / "segments").iterdir())
    print(f"{options.records} records, {stored / 1e6:.0f} MB in {seconds:.0f} s: {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
