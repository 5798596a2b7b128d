"""A history that a source sends to a replica's store, step by step, and what must be true of the
store whatever stopped it: for tests that stop it everywhere.

The story has everything the store writes for: first syncs into base images, commits, segments that
fill up and are sealed, checkpoints, a gap with its resync, a second disk, proofs, a restart, and
retention: a floor that is raised, a fold, segments that are written anew. It is the same each time,
so a stop can be named by a number. A source that was stopped goes on as an agent would: it
attaches, and sends what the store does not say it has.
"""

from __future__ import annotations

import json
import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from journal_model import Model, Record

from blockrepl.errors import BlockreplError, PointError, StorageError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Columns, FrameHeader, FrameKind, RecordKind
from blockrepl.formats.marks import CheckpointMark, ConsistentMark, GapMark, encode_mark
from blockrepl.formats.messages import AttachDisk, Attached
from blockrepl.model.points import Instant, Point
from blockrepl.model.retention import Kept, Stretch
from blockrepl.model.retention_plan import Decision
from blockrepl.storage.files import Files
from blockrepl.storage.history import ReplicaHistory, State
from blockrepl.storage.replica import Replica, create_replica, open_replica
from blockrepl.storage.retained import fold_due
from blockrepl.storage.retention_worker import Order, work
from blockrepl.units import KIB
from blockrepl.views.view import View

SOURCE = b"s" * 16
SIZES = {"root": 256 * KIB, "data": 64 * KIB}
IDS = {name: UUID(int=place + 1) for place, name in enumerate(SIZES)}
START = 1_800_000_000_000_000_000
SEGMENT_BYTES = 40 * KIB  # for limits.SEGMENT_BYTES_TARGET: several segments in a story
TICK_NS = 1000  # every stamp is a multiple: thinned to it, a stretch keeps every point
Mark = CheckpointMark | GapMark | ConsistentMark


@dataclass(frozen=True)
class Spec:
    """A frame, but for what only the store can tell: the group's id."""

    kind: FrameKind
    number: int
    watermark: int
    disk: str = ""
    records: tuple[Record, ...] = ()
    mark: Mark | None = None

    def frame(self, group: bytes) -> tuple[FrameHeader, memoryview]:
        rows = self.records
        payload = b"".join(record.data for record in rows)
        columns = Columns(
            np.array([record.stamp for record in rows], np.uint64),
            np.array([record.offset for record in rows], np.uint64),
            np.array([record.length for record in rows], np.uint32),
            np.array([record.kind for record in rows], np.uint8),
        )
        encoded = frames.encode_frame(
            kind=self.kind,
            group=group,
            source=SOURCE,
            disk=IDS[self.disk].bytes if self.disk else frames.NO_ID,
            number=self.number,
            epoch=1,
            watermark=self.watermark,
            columns=columns if rows else None,
            payload=encode_mark(self.mark) if self.mark else payload,
        )
        return encoded.header, memoryview(b"".join(bytes(buffer) for buffer in encoded.buffers))


@dataclass
class Script:
    """The story's steps: frames to commit together, disks to attach, "restart" or "retain"."""

    steps: list[list[Spec] | tuple[str, ...] | str] = field(default_factory=list)
    model: Model = field(
        default_factory=lambda: Model({name: bytes(SIZES[name]) for name in SIZES})
    )
    checkpoints: dict[str, tuple[int, int]] = field(default_factory=dict)  # number, stamp
    ready: dict[str, tuple[int, int]] = field(default_factory=dict)
    gap_numbers: tuple[int, int] = (0, 0)
    numbers: dict[int, int] = field(default_factory=dict)  # the watermark each leads to
    random: random.Random = field(default_factory=lambda: random.Random(5))
    stamp: int = START
    floor_ns: int = 0  # to be raised by "retain"
    edge_ns: int = 0  # up to which it thins

    def tick(self) -> int:
        self.stamp += TICK_NS
        return self.stamp

    def spec(self, kind: FrameKind, disk: str = "", *records: Record, mark: Mark | None = None,
             ) -> Spec:  # fmt: skip
        number = 0
        if kind != FrameKind.BASE:
            number = len(self.numbers) + 1
            self.numbers[number] = self.stamp
            assert len(set(self.numbers.values())) == number, "a watermark tells the number"
        return Spec(kind, number, self.stamp, disk, records, mark)

    def first_sync(self, disk: str) -> None:
        size = SIZES[disk] // 4
        data = self.random.randbytes(size)
        self.model.base[disk] = data + bytes(SIZES[disk] - size)
        zero = Record(self.stamp, disk, size, size, RecordKind.ZERO)
        self.steps.append(
            [
                self.spec(
                    FrameKind.BASE, disk, Record(self.stamp, disk, 0, size, RecordKind.WRITE, data)
                )
            ]
        )
        self.steps.append([self.spec(FrameKind.BASE, disk, zero), self.writes(disk, 1)])
        mark = ConsistentMark(disk=IDS[disk], at_ns=self.tick())
        spec = self.spec(FrameKind.MARK, mark=mark)
        self.ready[disk] = (spec.number, self.stamp)
        self.steps.append([spec])

    def write(self, disk: str, length: int) -> Record:
        at = self.random.randrange((SIZES[disk] - length) // 512 + 1) * 512
        data = self.random.randbytes(length)
        return Record(self.tick(), disk, at, length, RecordKind.WRITE, data)

    def writes(self, disk: str, count: int, length: int = 4 * KIB) -> Spec:
        records = tuple(self.write(disk, length) for _ in range(count))
        self.model.records += records
        return self.spec(FrameKind.RECORDS, disk, *records)

    def checkpoint(self, name: str) -> Spec:
        spec = self.spec(FrameKind.MARK, mark=CheckpointMark(name=name, at_ns=self.tick()))
        self.checkpoints[name] = (spec.number, self.stamp)
        return spec

    def gap(self, disk: str) -> None:
        """Records are lost, and the disk is synced again."""
        begin = self.tick()
        self.tick()
        first = self.spec(FrameKind.MARK, mark=GapMark(disk=IDS[disk], from_ns=begin))
        self.steps.append([first])
        lost = self.write(disk, 5120)
        self.model.records.append(lost)
        synced_at = self.tick()
        self.steps.append([self.writes(disk, 2)])
        truth = bytes(self.model.at(lost.stamp)[disk][lost.offset : lost.offset + lost.length])
        piece = Record(synced_at, disk, lost.offset, lost.length, RecordKind.WRITE, truth)
        self.tick()
        self.steps.append([self.spec(FrameKind.SYNC, disk, piece)])
        end = self.tick()
        last = self.spec(FrameKind.MARK, mark=ConsistentMark(disk=IDS[disk], at_ns=end))
        self.steps.append([last])
        self.model.hidden.append((begin, end))
        self.gap_numbers = (first.number, last.number)


def make_script() -> Script:
    script = Script()
    steps = script.steps
    steps.append(("root",))
    script.first_sync("root")
    for round_number in range(3):
        steps.append([script.writes("root", 3), script.writes("root", 2, 512)])
        steps.append([script.writes("root", 2), script.checkpoint(f"c{round_number}")])
    steps.append(("root", "data"))
    script.first_sync("data")
    steps.append([script.writes("data", 2), script.writes("root", 2)])
    script.floor_ns = script.stamp
    script.gap("root")
    steps.append("restart")
    for round_number in range(3):
        steps.append([script.writes("data", 1), script.writes("root", 3)])
        steps.append([script.checkpoint(f"d{round_number}"), script.writes("root", 1)])
    script.edge_ns = script.stamp
    steps.append([script.writes("root", 1)])
    steps.append("retain")
    steps.append([script.writes("data", 1)])
    return script


@dataclass(frozen=True)
class Failure:
    """A BlockreplError that ended a run."""

    error: str
    hint: str
    code: str
    stays: bool
    retaining: bool  # the store goes on: what retention could not do is done by the next pass


class Source:
    """Sends the script's frames to the store in a directory, and notes what was acknowledged."""

    def __init__(self, directory: Path, script: Script, files: Callable[[], Files] = Files) -> None:
        self.directory, self.script = directory, script
        self.acknowledged = 0  # number of the last frame
        self.replica: Replica | None = None
        self._acknowledge: Callable[[int], None] = lambda number: None
        self._files = files
        self._disks: tuple[str, ...] = ("root",)
        self._next = 1
        self._group = b""
        self._is_retaining = False

    def run(self, *, tries: int = 1) -> None:
        """To the end of the script, from wherever the store is. BlockreplError when it cannot.

        ``tries``: what the store refuses for want of room is tried again so often.
        """
        self._open()
        for step in self.script.steps:
            if isinstance(step, tuple):
                if not set(step) <= set(self._disks):
                    self._disks = step
                    self._again(self._attach, tries)
            elif step == "restart":
                assert self.replica is not None
                if self._next > 1:
                    self.replica.proofs.prove(IDS["root"].bytes, SIZES["root"], 0, 4096, START)
                self.close()
                self._again(self._open, tries)
            elif step == "retain":
                self._again(self._retain, tries)
            elif isinstance(step, list):
                self._again(lambda: self._put(step), tries)  # noqa: B023  # called at once

    def _again(self, call: Callable[[], object], tries: int) -> None:
        for left in reversed(range(tries)):
            try:
                call()
                return
            except BlockreplError as error:
                if error.code != "full" or not left:
                    raise
                if self.replica is not None:
                    self._attach()  # as a refused agent would

    def _open(self) -> None:
        create_replica(self.directory, "web")
        self.replica = open_replica(self.directory, files=self._files())
        self._attach()

    def attach(self) -> None:
        """Open the store; ``told`` is the number up to which it says that frames are durable."""
        self._open()

    @property
    def told(self) -> int:
        return self._next - 1

    def _attach(self) -> Attached:
        assert self.replica is not None
        attached = self.replica.attach(
            SOURCE, [AttachDisk(id=IDS[d], name=d, size_bytes=SIZES[d]) for d in self._disks]
        )
        assert attached.next_number > self.acknowledged, "an acknowledged frame is lost"
        assert not self.acknowledged or attached.group_id.bytes == self._group
        self._next, self._group = attached.next_number, attached.group_id.bytes
        return attached

    def _put(self, step: list[Spec]) -> None:
        replica = self.replica
        assert replica is not None
        waiting = {row.name for row in replica.status().disks if row.ready_ns is None}
        due = [
            spec
            for spec in step
            if (spec.number >= self._next if spec.number else spec.disk in waiting)
        ]
        for spec in due:
            replica.append(SOURCE, *spec.frame(self._group))
        if due:
            commit = replica.commit()
            self.acknowledged = commit.numbers[SOURCE]
            self._acknowledge(self.acknowledged)
            self._next = self.acknowledged + 1

    def _retain(self) -> None:
        """As services/retention.py: history is cut at the floor, what is behind it written anew."""
        replica, script = self.replica, self.script
        assert replica is not None
        self._is_retaining = True
        kept = Kept((Stretch(script.floor_ns, script.edge_ns, TICK_NS),))
        replica.shorten(Decision(kept, script.floor_ns))
        due_ns = fold_due(replica.catalog)
        if due_ns is not None:
            done = work(Order(directory=self.directory, operation="fold", floor_ns=due_ns))
            if done.failure is not None:
                raise done.failure.as_error()
            replica.replace_segments(done.old, done.rows(), due_ns)
        replica.remove_leftovers()
        numbers = [
            row.number
            for row in replica.catalog.segments()
            if row.sealed and script.floor_ns < row.first_stamp <= row.last_stamp <= script.edge_ns
            if row.step_ns < TICK_NS
        ]
        if numbers:
            order = Order(
                directory=self.directory, operation="thin", numbers=numbers, step_ns=TICK_NS
            )
            done = work(order)
            replica.replace_segments(done.old, done.rows())
        replica.remove_leftovers()
        self._is_retaining = False

    def close(self) -> None:
        if self.replica is not None:
            replica, self.replica = self.replica, None
            replica.close()

    def run_and_be_killed(self, tries: int) -> Failure | None:
        """`run` in a process that kill -9 ends, whatever happens; what it was told.

        SQLite makes up its files when a connection is closed; a killed process closes none.
        """
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                self._report_to(writing, tries)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.close(writing)
        with open(reading) as file:
            lines = [json.loads(line) for line in file]
        os.waitpid(child, 0)
        assert lines, "the process ended by itself"
        *numbers, last = lines
        self.acknowledged = max((self.acknowledged, *numbers))
        self._disks = tuple(last["disks"])
        self._group = bytes.fromhex(last["group"])
        assert not last["defect"], last["defect"]
        return Failure(**last["failure"]) if last["failure"] else None

    def _report_to(self, descriptor: int, tries: int) -> None:
        def say(what: object) -> None:
            os.write(descriptor, json.dumps(what).encode() + b"\n")

        self._acknowledge = say
        failure: dict[str, object] | None = None
        defect = ""
        try:
            self.run(tries=tries)
        except BlockreplError as error:
            failure = {"error": str(error), "hint": error.hint, "code": error.code}
            failure |= {"stays": self._stays_failed(), "retaining": self._is_retaining}
        except BaseException:
            defect = traceback.format_exc()
        group = self._group.hex()
        say({"failure": failure, "defect": defect, "disks": self._disks, "group": group})

    def _stays_failed(self) -> bool:
        """Whether a store that has stopped commits nothing more."""
        if self.replica is None or self.replica.error is None:
            return True
        try:
            self.replica.commit()
        except BlockreplError:
            return True
        return False

    def kill(self) -> None:
        """As kill -9 would: nothing more is written."""
        if self.replica is not None:
            self.replica.error = StorageError("killed", code="fail-stop")
            self.close()

    # What must be true

    def check(self) -> int:
        """Of the store as it is on disk, without a receiver; the number of frames it has."""
        with ReplicaHistory(self.directory) as history:
            state = history.state()
            number = self._frames_at(state.latest_ns)
            assert number >= self.acknowledged, "an acknowledged frame is lost"
            script = self.script
            floor_ns = history.history(state).floor_ns or 0
            assert floor_ns in {0, script.floor_ns, *(at for _, at in script.ready.values())}
            self._check_marks(state, number, floor_ns)
            begun, _ = script.gap_numbers
            gap = script.model.hidden[0]
            for at_ns in self._points(number):
                if at_ns < floor_ns == script.floor_ns:
                    with pytest.raises(PointError):
                        history.resolve(Point("x", Instant(at_ns)), at_ns, state)
                    continue
                if begun <= number and gap[0] <= at_ns < gap[1]:
                    continue
                view = View(history, at_ns, state)
                model = script.model.at(at_ns)
                for name, disk in view.disks.items():
                    assert view.read(name, 0, disk.size_bytes) == model[name], f"{name} at {at_ns}"
        return number

    def _check_marks(self, state: State, number: int, floor_ns: int) -> None:
        """All up to the newest instant; of later ones those whose frames had become durable."""
        script = self.script
        floor_ns = floor_ns if floor_ns == script.floor_ns else 0
        names = {
            name for name, (n, at) in script.checkpoints.items() if n <= number and at >= floor_ns
        }
        assert names <= set(state.checkpoints) <= set(script.checkpoints)
        floors = {name: (n, max(at, floor_ns)) for name, (n, at) in script.ready.items()}
        ready = {name: at for name, (n, at) in floors.items() if n <= number}
        found = {row.name: row.ready_ns for row in state.disks if row.ready_ns is not None}
        assert ready.items() <= found.items()
        assert found.items() <= {name: at for name, (_, at) in floors.items()}.items()
        begun, ended = script.gap_numbers
        begin, end = script.model.hidden[0]
        gaps = [(row.from_ns, row.to_ns) for row in state.gaps]
        if ended <= number:
            assert gaps == [(begin, end)]
        elif begun <= number:
            assert gaps in ([(begin, end)], [(begin, None)])

    def _frames_at(self, latest_ns: int) -> int:
        """How many frames lead to a watermark: no instant between frames is ever offered."""
        numbers = {watermark: number for number, watermark in self.script.numbers.items()}
        return numbers[latest_ns] if latest_ns else 0

    def _points(self, number: int) -> Iterator[int]:
        """Instants to look at: the newest, the newest acknowledged, and some older ones."""
        numbers = {number, self.acknowledged, *range(number % 7, number, 7)} - {0}
        for one in sorted(numbers):
            yield self.script.numbers[one]


def open_files(below: Path) -> list[str]:
    """What this process has open below a directory."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            found.append(str(entry.readlink()))
    return [path for path in found if path.startswith(str(below))]
