"""Reading a view through FUSE, against the qemu-storage-daemon's FUSE export of the raw image.

Both sides have their data in the page cache of the host, so that the doors are compared and not
the disk; each file is read at most once per turn from a cold cache of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from scripts.benchmark.bench import Bench
from scripts.benchmark.load import read_file
from scripts.benchmark.ours import DISK, GROUP, Ours
from scripts.benchmark.peers import qsd_fuse
from scripts.benchmark.report import Goal, Row, summarise
from scripts.benchmark.rounds import Contestant, interleave

LATER = "The journal as a time machine"
PEER = "qemu-storage-daemon, FUSE export"
SEQUENTIAL = ("view_sequential", "MB/s", Goal(">=", 1.0), "read", 1 << 20)
RANDOM = ("view_random", "IOPS", Goal(">=", 0.7), "randread", 4096)


@contextmanager
def _view(product: Ours) -> Iterator[Path]:
    """The group mounted at its latest point; yields the disk's file."""
    point = product.scratch.directory / "view"
    point.mkdir(exist_ok=True)
    product.blockrepl(product.receiver_home, "mount", GROUP, point, "--at", "latest")
    try:
        yield point / f"{DISK}.img"
    finally:
        product.blockrepl(product.receiver_home, "umount", point)


def _read(bench: Bench, path: Path, pattern: str, block_bytes: int) -> float:
    """MB/s of a sequential read, IOPS of a random one."""
    load = read_file(
        bench.scratch, path, pattern=pattern, block_bytes=block_bytes, seconds=bench.seconds
    )
    return load.megabytes_per_second if pattern == "read" else load.iops


def views(bench: Bench) -> list[Row]:
    rows = []
    with ExitStack() as stack:
        files = []
        if not bench.peers_only:
            product = bench.product()
            product.settle()
            files.append(("ours", stack.enter_context(_view(product))))
        source = bench.image("ours")
        files.append((PEER, stack.enter_context(qsd_fuse(bench.scratch, source))))
        os.sync()
        for name, unit, goal, pattern, block_bytes in (SEQUENTIAL, RANDOM):
            contestants = [
                Contestant(owner, partial(_read, bench, path, pattern, block_bytes))
                for owner, path in files
            ]
            bench.progress(name)
            figures = interleave(contestants, bench.rounds, progress=bench.progress)
            rows.append(
                summarise(
                    name,
                    unit,
                    goal,
                    figures.get("ours", []),
                    peer=PEER,
                    theirs=figures[PEER],
                    needs=LATER,
                )
            )
    return rows


def open_point(bench: Bench) -> list[Row]:
    """Ten million records take a journal that only the later issue makes."""
    return [summarise("open_point", "s", Goal("<=", 0.5), [], needs=LATER)]
