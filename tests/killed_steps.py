"""A phase of the store's work, in a process that kills itself; `run` in a child of the test, and
``killed_steps.py worker-PHASE HOME N`` in place of the retention worker.

Every call that changes a file or the catalog is counted: those of `os`, and of catalog transactions
the moment before their commit and the moment after. At the N-th the process sends itself SIGKILL;
a write is torn, half of it done. With N 0 it only counts, and prints how many there were.

=======  =======================================================================================
phase    what runs
=======  =======================================================================================
seal     records come in through the store's writer, segments are begun and sealed
merge    the indexes of sealed segments are merged, statistics made
pass     the receiver's part of a retention pass; its worker is not killed
fold     the same; the worker that folds is killed, and the receiver lives
thin     the same; the worker that thins is killed
rebuild  ``receiver check --repair``: damaged indexes are made anew
=======  =======================================================================================
"""

from __future__ import annotations

import builtins
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from journal_model import GROUP, Journal, Record, later

from blockrepl import limits
from blockrepl.cli.main import run as run_command
from blockrepl.formats.frame import RecordKind
from blockrepl.services import retention
from blockrepl.services.group_committer import GroupCommitter, MemoryBudget
from blockrepl.storage import files, retention_worker
from blockrepl.storage.catalog import Catalog
from blockrepl.storage.home import Home
from blockrepl.storage.merging import Merger
from blockrepl.storage.replica import open_replica
from blockrepl.storage.segment_reader import Known
from blockrepl.storage.statistics import StatisticsMaker
from blockrepl.units import KIB, MIB

CALLS = "rename replace unlink fsync fdatasync ftruncate posix_fallocate pwrite pwritev mkdir"
PHASES = ("seal", "merge", "pass", "fold", "thin", "rebuild")
SEGMENT_BYTES = 24 * KIB
PATCH = pytest.MonkeyPatch()


class Killer:
    """``left`` calls until the end; below 0: never."""

    def __init__(self, count: int) -> None:
        self.left = count if count else -1
        self.seen = 0

    def call(self, before: Callable[[], object] = lambda: None) -> None:
        self.seen += 1
        self.left -= self.left > 0
        if self.left == 0:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(self) -> None:
        for name in CALLS.split():
            PATCH.setattr(os, name, self._counting(getattr(os, name), name))
        punched = self._counting(files.punch_hole, "punch_hole")
        PATCH.setattr("blockrepl.storage.base.punch_hole", punched)
        PATCH.setattr(Catalog, "transaction", self._transaction(Catalog.transaction))
        PATCH.setattr(builtins, "open", self._counting(builtins.open, "open"))

    def _counting(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if name == "pwritev":
                descriptor, buffers, offset, *_ = arguments
                data = b"".join(bytes(one) for one in buffers)
                self.call(lambda: os.write(_at(descriptor, offset), data[: len(data) // 2]))
            elif name != "open" or "w" in str(arguments[1:2]):
                self.call()
            return real(*arguments, **named)

        return counted

    def _transaction(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def counted(catalog: Catalog) -> Iterator[None]:
            with real(catalog):
                yield
                self.call()
            self.call()

        return counted


def _at(descriptor: int, offset: int) -> int:
    os.lseek(descriptor, offset, os.SEEK_SET)
    return descriptor


def seal(home: Path) -> None:
    """Go on with a history that `test_killed_steps` has begun; nothing of it is sampled."""
    directory = Home(home).replica_directory(GROUP)
    journal = Journal.__new__(Journal)
    journal.__dict__.update(_facts(home))
    journal.directory = directory
    journal.open()
    attached = journal.replica.status()
    (source,) = attached.sources.values()
    journal._number, journal.stamp = source.last_number + 1, source.watermark
    for turn in range(40):
        data = journal.random.randbytes(3000)
        record = Record(journal.tick(), "root", turn * 4096, 3000, RecordKind.WRITE, data)
        journal.put([record], model=False)
    journal.close()


def _facts(home: Path) -> dict[str, Any]:
    import random
    from uuid import UUID

    from test_killed_steps import SIZES

    ids = {name: UUID(int=index + 1) for index, name in enumerate(SIZES)}
    return {"home": home, "ids": ids, "sizes": dict(SIZES), "random": random.Random(5)}


def merge(home: Path) -> None:
    directory = Home(home).replica_directory(GROUP)
    catalog = Catalog.open(directory / "catalog.sqlite")
    merger = Merger(directory, catalog.group_id)
    while merger.step({row.number: Known.of(row) for row in catalog.segments()}, lambda _: None):
        pass
    StatisticsMaker(directory, catalog.group_id).make(catalog.segments(), lambda _: None)
    catalog.close()


def run_pass(home: Path) -> None:
    directory = Home(home).replica_directory(GROUP)

    async def main() -> None:
        replica = open_replica(directory, clock=later)
        committer = GroupCommitter(replica, MemoryBudget(MIB))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            await retention.Retention().run_pass(committer)
            nursery.cancel_scope.cancel()
        replica.close()

    trio.run(main)


def run_pass_killing_workers(home: Path, operation: str, count: int) -> None:
    """The worker is started as ever, by another program that kills it."""
    script = home / "worker"
    here = Path(__file__)
    script.write_text(
        f"#!/bin/sh\nexec env PYTHONPATH={here.parent} {sys.executable} {here} "
        f"worker-{operation} {home} {count}\n"
    )
    script.chmod(0o755)
    PATCH.setattr(retention, "sys", type("sys", (), {"executable": str(script)}))
    run_pass(home)


def worker(operation: str, killer: Killer) -> int:
    order = sys.stdin.read()
    if retention_worker.Order.model_validate_json(order).operation == operation:
        killer.arm()
    sys.stdin = type("Order", (), {"read": staticmethod(lambda: order)})()
    return retention_worker.main()


def run(phase: str, home: Path, count: int) -> int:
    """In a process of its own: what it patches stays so. Its exit status."""
    PATCH.setattr(limits, "SEGMENT_BYTES_TARGET", SEGMENT_BYTES)
    killer, status = Killer(count), 0
    if phase in ("fold", "thin"):
        run_pass_killing_workers(home, phase, count)
        return 0
    killer.arm()
    match phase:
        case "seal":
            seal(home)
        case "merge":
            merge(home)
        case "pass":
            run_pass(home)
        case "rebuild":
            status = run_command(["--home", str(home), "receiver", "check", "--repair"])
    (home / f"{phase}.calls").write_text(str(killer.seen))
    return status


def run_worker(phase: str, home: Path, count: int) -> int:
    killer = Killer(count)
    status = worker(phase.removeprefix("worker-"), killer)
    told = home / f"{phase}.calls"  # of the longest of them
    most = int(told.read_text()) if told.exists() else 0
    told.write_text(str(max(most, killer.seen)))
    return status


if __name__ == "__main__":
    sys.exit(run_worker(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
