"""What retention does to a replica's files, in a process of its own: ``python -m`` this module.

An `Order` on standard input, an `Outcome` or a `Failure` on standard output. It reads the catalog
and never writes to it: what it has made counts when the receiver has catalogued it
(storage/retained.py, step 3). In a process of its own it takes no time from the receiver's tasks,
and it may be killed at any instant; it ends by itself when the receiver does. It is born with the
receiver's lock of the replica's retention, so none of the next receiver's works beside it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from blockrepl.errors import BlockreplError, DamageError, StorageError
from blockrepl.storage.catalog import SegmentRow
from blockrepl.storage.folding import fold_most, grow_images
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.thinning import fitting, thin

PARENT_POLL_SECONDS = 0.2  # how long a worker may outlive its receiver


class Order(BaseModel):
    """Thin the first of these segments, as many as fit; or fold up to ``floor_ns``."""

    directory: Path
    operation: Literal["thin", "fold"]
    numbers: list[int] = []
    step_ns: int = 0
    floor_ns: int = 0
    bytes_per_second: float = float("inf")
    parent: int = Field(default_factory=os.getpid)  # who ordered; without it, nobody wants it


class Failure(BaseModel):
    error: str
    hint: str
    code: str

    @classmethod
    def of(cls, error: BlockreplError) -> Failure:
        return cls(error=str(error), hint=error.hint, code=error.code)

    def as_error(self) -> StorageError:
        kind = DamageError if self.code == DamageError.code else StorageError
        return kind(self.error, hint=self.hint)


class Outcome(BaseModel):
    """Segments ``old`` may be replaced by rows ``new``. ``failure``: why they are not all."""

    old: list[int]
    new: list[dict[str, int | bool]]
    failure: Failure | None = None

    def rows(self) -> list[SegmentRow]:
        return [SegmentRow(**row) for row in self.new]  # type: ignore[arg-type]


class _Pace:
    """Keeps what is written under a rate."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._due = time.monotonic()

    def __call__(self, size_bytes: int) -> None:
        self._due = max(self._due, time.monotonic() - 0.1) + size_bytes / self._rate
        time.sleep(max(0.0, self._due - time.monotonic()))


def work(order: Order) -> Outcome:
    """Carry out an order. DamageError, StorageError."""
    pace = _Pace(order.bytes_per_second)
    with ReplicaHistory(order.directory) as history:
        state = history.state()
        if order.operation == "fold":
            grow_images(history, state, order.floor_ns)
            rows, error = fold_most(history, state, order.floor_ns, pace=pace)
            return Outcome(
                old=[row.number for row in rows],
                new=[],
                failure=Failure.of(error) if error is not None else None,
            )
        directory = order.directory / "segments"
        group = history.catalog.group_id
        rows = [state.segments[number] for number in order.numbers]
        rows = fitting(directory, group, rows)
        new = thin(directory, group, rows, state.kept, step_ns=order.step_ns, pace=pace)
        return Outcome(old=[row.number for row in rows], new=[asdict(row) for row in new])


def _end_with(parent: int) -> None:
    """End when the parent has: at any step, for a large disk's lookups take long between writes.

    Not by PR_SET_PDEATHSIG: it is sent when the parent's *thread* ends that started the process.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def main() -> int:
    os.nice(10)
    order = Order.model_validate_json(sys.stdin.read())
    if os.getppid() != order.parent:
        return 1
    threading.Thread(target=_end_with, args=(order.parent,), daemon=True).start()
    try:
        answer: BaseModel = work(order)
    except BlockreplError as error:
        answer = Failure.of(error)
    print(answer.model_dump_json())
    return 0 if isinstance(answer, Outcome) else 1


if __name__ == "__main__":
    sys.exit(main())
