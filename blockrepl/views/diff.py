"""What differs between two instants of a group, and a patch that makes the one of the other.

What was written in between counts as changed, also where it was the same bytes again: that is what
the index knows. ``compare`` reads both and keeps what really differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from blockrepl.formats import qcow2
from blockrepl.formats.frame import U64
from blockrepl.formats.qcow2 import CLUSTER_BYTES, L2_ENTRIES, READS_AS_ZEROS
from blockrepl.limits import SECTOR_BYTES
from blockrepl.model import ranges
from blockrepl.storage.changes import changed_ranges
from blockrepl.storage.history import ReplicaHistory, State
from blockrepl.storage.home import naming
from blockrepl.units import MIB
from blockrepl.views.export import replacing
from blockrepl.views.view import View

READ_BYTES = 4 * MIB
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class DiskDiff:
    """``only_at``: "first" or "second" when the disk is there at one of the instants only.

    ``size_bytes`` is that of the second instant, ``before_bytes`` that of the first: when it has
    grown in between, what is new and was not written to reads as zeros, and is not listed.
    """

    name: str
    size_bytes: int
    records: int
    starts: U64
    ends: U64
    only_at: str | None = None
    before_bytes: int | None = None

    @property
    def changed_bytes(self) -> int:
        return int((self.ends - self.starts).sum())


def diff(history: ReplicaHistory, state: State, first_ns: int, second_ns: int) -> list[DiskDiff]:
    """The disks of either instant, by name. DamageError."""
    first = {row.id: row for row in state.disks_at(first_ns)}
    second = {row.id: row for row in state.disks_at(second_ns)}
    both = first.keys() & second.keys()
    after, upto = sorted((first_ns, second_ns))
    found = changed_ranges(history, both, after, upto)
    result = []
    for identity, row in (first | second).items():
        if identity in both:
            union, records = found[identity]
            starts, ends = union.result()
            inside = starts < np.uint64(row.size_bytes)  # it may have grown since
            starts, ends = starts[inside], np.minimum(ends[inside], np.uint64(row.size_bytes))
            before_bytes = first[identity].size_bytes
            result.append(
                DiskDiff(row.name, row.size_bytes, records, starts, ends, before_bytes=before_bytes)
            )
        else:
            only_at = "first" if identity in first else "second"
            whole = np.array([0], np.uint64), np.array([row.size_bytes], np.uint64)
            result.append(DiskDiff(row.name, row.size_bytes, 0, *whole, only_at))
    return sorted(result, key=lambda each: each.name)


def compare(first: View, second: View, found: DiskDiff) -> DiskDiff:
    """Of what was written, the sectors that differ."""
    if found.only_at is not None:
        return found
    differing = ranges.Union()
    for start, end in _pieces(found.starts, found.ends, READ_BYTES):
        # To whole sectors: half of one is as good as all of it to a disk.
        start, end = start // SECTOR_BYTES * SECTOR_BYTES, -(-end // SECTOR_BYTES) * SECTOR_BYTES
        data = [view.read(found.name, start, end - start) for view in (first, second)]
        # The smaller one may end before: what is beyond it counts as zeros.
        pair = [np.frombuffer(each + bytes(end - start - len(each)), np.uint64) for each in data]
        rows = (pair[0] != pair[1]).reshape(-1, SECTOR_BYTES // 8).any(axis=1)
        starts = np.flatnonzero(rows).astype(np.uint64) * np.uint64(SECTOR_BYTES) + np.uint64(start)
        differing.add(starts, starts + np.uint64(SECTOR_BYTES))
    starts, ends = differing.result()
    return replace(found, starts=starts, ends=ends)


def write_patch(view: View, found: DiskDiff, target: Path, progress: Progress) -> None:
    """Write the clusters of a view that have changed, as a qcow2 image. DamageError, OSError.

    All of such a cluster is there, changed or not: it needs nothing of the other instant's.
    """
    l1 = np.zeros(qcow2.l1_entries(found.size_bytes), np.uint64)
    firsts, lasts = ranges.clusters(found.starts, found.ends, CLUSTER_BYTES)
    with replacing(target) as temporary, naming(target), temporary.open("r+b") as file:
        file.seek(CLUSTER_BYTES)
        cluster, done = 1, 0
        table, area = np.zeros(L2_ENTRIES, np.uint64), -1

        def end_area() -> None:
            nonlocal cluster
            if area >= 0:
                file.write(qcow2.encode_table(table))
                l1[area] = qcow2.entry(cluster)
                cluster += 1

        for first, last in _pieces(firsts, lasts, READ_BYTES // CLUSTER_BYTES):
            data = view.read(found.name, first * CLUSTER_BYTES, (last - first) * CLUSTER_BYTES)
            data += bytes((last - first) * CLUSTER_BYTES - len(data))
            for place in range(first, last):
                if place // L2_ENTRIES != area:
                    end_area()
                    table, area = np.zeros(L2_ENTRIES, np.uint64), place // L2_ENTRIES
                start = (place - first) * CLUSTER_BYTES
                content = memoryview(data)[start : start + CLUSTER_BYTES]
                if np.frombuffer(content, np.uint64).any():
                    file.write(content)
                    table[place % L2_ENTRIES] = qcow2.entry(cluster)
                    cluster += 1
                else:
                    table[place % L2_ENTRIES] = READS_AS_ZEROS
            done += last - first
            progress(done * CLUSTER_BYTES)
        end_area()
        end, header = qcow2.encode_end(found.size_bytes, l1, cluster)
        file.write(end)
        file.seek(0)
        file.write(header)


def patch_bytes(found: DiskDiff) -> int:
    """What `write_patch` reads, in whole clusters."""
    firsts, lasts = ranges.clusters(found.starts, found.ends, CLUSTER_BYTES)
    return int((lasts - firsts).sum()) * CLUSTER_BYTES


def _pieces(starts: U64, ends: U64, size: int) -> Iterator[tuple[int, int]]:
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        for at in range(start, end, size):
            yield at, min(at + size, end)
