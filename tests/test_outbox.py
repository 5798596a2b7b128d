"""The outbox against a model: whatever happens, in whatever order, every frame arrives once.

A source with one ring puts records (and content, marks, base frames, comparisons) into an outbox.
The link comes and goes, acknowledgements come late, a ring fills up, the spool's disk is full or
slow, the receiver loses what it had not made durable, the agent is killed. `World` holds that:

- frames reach the receiver in order of their numbers, from the one that it said it was due
- no number is ever used for two different frames
- records are delivered in the ring's order, each once
- a frame is told to be kept only when it is in the spool, durable only when it is, each once
- memory and the window stay within their bounds
- content that was not interrupted is told to be durable in the stretch in which it was read, and
  base content not before a numbered frame behind it
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from outgoing import (
    DISK,
    DISKS,
    REGIONS,
    attached,
    content,
    marked,
    records,
)
from pumping import until

from blockrepl.errors import StorageError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Buffer, EncodedFrame, FrameHeader, FrameKind
from blockrepl.formats.marks import decode_mark
from blockrepl.formats.messages import Attached, MessageType
from blockrepl.services import outbox as outboxes
from blockrepl.services.group_replication import _fold
from blockrepl.services.outbox import Outbox
from blockrepl.services.outbox_ends import Take
from blockrepl.services.outbox_item import frame_item
from blockrepl.session.known import Known
from blockrepl.session.release import Release
from blockrepl.storage.files import Files
from blockrepl.storage.spool import Spool, SpoolLimits

MEMORY_BYTES, MEMORY_FRAMES = 4000, 6
WINDOW_BYTES, WINDOW_FRAMES = 3000, 4
BOUNDS, FULL = SpoolLimits(1 << 30, 0), SpoolLimits(0, 0)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outboxes, "MEMORY_BYTES", MEMORY_BYTES)
    monkeypatch.setattr(outboxes, "MEMORY_FRAMES", MEMORY_FRAMES)
    monkeypatch.setattr(outboxes, "PRESSURE_SECONDS", 0.001)
    monkeypatch.setattr(outboxes, "FULL_SECONDS", 0.002)
    monkeypatch.setattr(outboxes, "YIELD_SECONDS", 0.002)
    monkeypatch.setattr("blockrepl.limits.SPOOL_FILE_BYTES", 2500)


class SlowFiles(Files):
    """A disk that can be stopped, and that can run full in the middle of a frame."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.may_go.set()
        self.is_full = False
        self.part_bytes = 0

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        assert self.may_go.wait(20)
        if self.is_full:
            data = b"".join(bytes(buffer) for buffer in buffers)[: self.part_bytes]
            self.part_bytes = 0
            if data:
                return super().write(descriptor, [data], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(descriptor, buffers, offset)


class World:
    """The source before the outbox, and the receiver behind it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = SlowFiles()
        self.bounds = BOUNDS
        # the source
        self.written = 0  # records in the ring ever
        self.to_put: deque[str] = deque()
        self.has_work = trio.Event()
        self.pressed = self.crowded = False
        self.epoch = 1
        self.reading: dict[int, int] = {}  # region -> stretch in which it was put
        self.behind: dict[int, int] = {}  # region -> number without which its content is not known
        self.told_kept: set[int] = set()
        self.told_durable: set[int] = set()
        # the receiver
        self.arrived: dict[int, bytes] = {}  # by number, all that ever came
        self.due = 1
        self.durable_number = 0
        self.position = 0  # of the ring, durable
        self.unanswered: deque[tuple[int, int]] = deque()  # DATA of this session: number, bytes
        self.acknowledged = 0
        self.may_send = trio.Event()
        self.may_send.set()
        # in between
        self.start(attached())
        self.link: trio.CancelScope | None = None
        self.link_ended = trio.Event()

    def start(self, answer: Attached | None) -> None:
        """Run, as an agent does: from the spool if that is certain, else from the answer."""
        spool = Spool.open(self.directory / "spool", self.bounds, self.files)
        if spool.is_certain:
            assert spool.state is not None
            known = Known.of(spool.state.attached)
            due = _fold(spool, spool.state.attached)
        else:
            assert answer is not None
            spool.clear()
            known = Known.of(answer)
            due = known.copy()
        self.told_kept, self.told_durable = set(), set()
        self.kept_from = due.next_number
        self.interrupted()
        self.outbox = Outbox(known, due, DISKS, spool, self)
        self.put_position = due.disks[DISK.bytes].next_sequence
        self.producer = trio.CancelScope()

    # --- the outbox's owner

    def is_pressed(self) -> bool:
        return self.pressed

    def is_crowded(self) -> bool:
        return self.crowded

    def check_kept(self) -> None:
        """All that is in the spool has let go of its ring."""
        spool = self.outbox.spool
        if spool.is_active and not self.outbox._spool_lock.locked():
            numbers = set(range(self.kept_from, spool.next_number))
            assert numbers & set(self.numbers.values()) <= self.told_kept | self.told_durable

    def kept(self, release: Release) -> None:
        assert self.outbox.spool.is_active
        if not (number := self._number_of(release)):
            return
        assert number < self.outbox.spool.next_number, "not in the spool"
        assert number not in self.told_kept, "kept twice"
        self.told_kept.add(number)

    def durable(self, release: Release) -> None:
        number = self._number_of(release)
        assert not self.outbox._moving, "let go while it is written"
        if number:
            assert number <= self.durable_number, "let go before it is durable"
            assert number not in self.told_durable, "let go twice"
            self.told_durable.add(number)
        for region in release.regions:
            if self.reading.get(region) == release.sync_epoch == self.epoch:
                assert self.behind[region] <= self.durable_number, "an older copy may lack it"
                del self.reading[region]

    def interrupted(self) -> None:
        self.epoch += 1

    def _number_of(self, release: Release) -> int:
        """0 for content."""
        if release.regions:
            return 0
        return self.numbers.get(release.checkpoint or release.next_sequence, 0)

    # --- the producer

    numbers: dict[object, int]

    async def produce(self) -> None:
        with self.producer:
            while True:
                while not self.to_put:
                    self.has_work = trio.Event()
                    await self.has_work.wait()
                await self._put(self.to_put[0])
                self.to_put.popleft()
                assert self.outbox.waiting_bytes <= MEMORY_BYTES + 2000

    async def _put(self, kind: str) -> None:
        outbox, number = self.outbox, self.outbox.due.next_number
        if kind == "records":
            while self.put_position < self.written:
                batch: list[EncodedFrame] = []
                for first in range(self.put_position, min(self.put_position + 3, self.written)):
                    number = outbox.due.next_number + len(batch)
                    self.put_position += 1
                    self.numbers[self.put_position] = number
                    batch.append(records(number, first, 300 + 97 * (number % 9)))
                await outbox.put_records(batch)
        elif kind == "mark":
            frame, mark = marked(number)
            self.numbers[f"c{number}"] = number
            await outbox.put(frame, mark=mark)
        elif outbox.is_direct:
            region = number % REGIONS
            if kind == "compare":
                await outbox.put_comparison(b"compare")
                return
            if region in self.reading and self.reading[region] == self.epoch:
                return
            self.reading[region] = self.epoch
            self.behind[region] = number
            base = kind == "base"
            frame, found = content(0 if base else number, self.put_position, region)
            await outbox.put(frame, columns=found, sync_epoch=self.epoch)

    def enqueue(self, kind: str) -> None:
        self.to_put.append(kind)
        self.has_work.set()

    # --- the receiver

    def answer(self) -> Attached:
        return attached(self.due, self.position_at(self.due))

    def position_at(self, due: int) -> int:
        position = 0
        for number in range(1, due):
            header = frames.decode_header(self.arrived[number][: frames.HEADER_BYTES])
            if header.record_count:
                taken = header.record_count if header.kind == FrameKind.RECORDS else 0
                position = header.first_sequence + taken
        return position

    async def send(self, message: MessageType, size_bytes: int, take: Take) -> None:
        await self.may_send.wait()
        data = b"".join(bytes(buffer) for buffer in take())
        assert data
        if message is MessageType.COMPARE:
            return
        header = frames.decode_header(data)
        frames.check_body(header, data[frames.HEADER_BYTES :])
        if header.number:
            self._take(header, data)
        self.unanswered.append((header.number, len(data)))
        assert len(self.unanswered) <= WINDOW_FRAMES
        assert sum(size for _, size in self.unanswered) <= WINDOW_BYTES
        await trio.lowlevel.checkpoint()

    def _take(self, header: FrameHeader, data: bytes) -> None:
        assert header.number == self.due, f"frame {header.number} came, {self.due} was due"
        if header.kind == FrameKind.RECORDS:
            assert header.first_sequence == self.position_at(self.due), "a record is lost"
        assert self.arrived.get(header.number, data) == data or header.number > self.ever_durable
        self.arrived[header.number] = data
        self.due += 1

    ever_durable = 0

    def commit(self, count: int, *, tell: bool = True) -> None:
        """Make the first messages durable."""
        count = min(count, len(self.unanswered))
        for _ in range(count):
            number, _ = self.unanswered.popleft()
            self.durable_number = max(self.durable_number, number)
            self.acknowledged += 1
        self.ever_durable = max(self.ever_durable, self.durable_number)
        if tell and count:
            self.outbox.acknowledged(self.acknowledged, self.durable_number)

    async def up(self, nursery: trio.Nursery) -> None:
        if self.link is not None:
            return
        self.link, self.link_ended = trio.CancelScope(), trio.Event()
        self.due = self.durable_number + 1
        self.unanswered.clear()
        self.acknowledged = 0
        await nursery.start(self._serve)

    async def _serve(self, task_status: trio.TaskStatus[None]) -> None:
        assert self.link is not None
        outbox = self.outbox
        try:
            with self.link:
                with trio.CancelScope(shield=True):
                    self.files.may_go.set()
                    await outbox.connect(self.answer(), WINDOW_FRAMES, WINDOW_BYTES)
                task_status.started()
                await outbox.serve(self.send, self.shape)
        finally:
            outbox.disconnect()
            self.link = None
            self.link_ended.set()

    async def shape(self, size_bytes: int) -> None:
        await self.may_send.wait()

    async def down(self) -> None:
        self.check_kept()
        if self.link is not None:
            self.link.cancel()
            self.files.may_go.set()
            await self.link_ended.wait()

    async def crash(self, nursery: trio.Nursery) -> None:
        """The agent is killed; its memory is gone. What is in the ring is put again."""
        await self.down()
        self.producer.cancel()
        self.files.may_go.set()
        async with self.outbox._spool_lock:
            pass  # a thread may be at work
        await trio.sleep(0.002)
        self.outbox.spool.close()
        self.unanswered.clear()  # an answer comes when all that came before it is settled
        self.due = self.durable_number + 1
        self.to_put.clear()
        self.numbers = {}
        self.start(self.answer())
        self._number_spooled()
        nursery.start_soon(self.produce)

    def _number_spooled(self) -> None:
        spool = self.outbox.spool
        while spool.has_unread():
            found = spool.read()
            if (mark := found.mark()) is not None:
                self.numbers[f"c{found.header.number}"] = found.header.number
                assert mark == decode_mark(frames.decode_payload(found.header, found.body))
            elif found.header.kind == FrameKind.RECORDS:
                self.numbers[found.header.first_sequence + 1] = found.header.number

    # --- the run

    async def run(self, steps: list[tuple[str, int]]) -> None:
        self.numbers = {}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.produce)
            try:
                for what, count in steps:
                    await self.step(nursery, what, count)
                await self.finish(nursery)
            finally:
                self.files.may_go.set()
            nursery.cancel_scope.cancel()
        self.outbox.spool.close()

    async def step(self, nursery: trio.Nursery, what: str, count: int) -> None:
        match what:
            case "write":
                self.written += count
                self.enqueue("records")
            case "mark" | "sync" | "base" | "compare":
                self.enqueue(what)
            case "commit":
                self.commit(count)
            case "commit unheard":
                self.commit(count, tell=False)
                await self.down()
            case "up":
                await self.up(nursery)
            case "down":
                await self.down()
            case "press":
                self.pressed = not self.pressed
            case "crowd":
                self.crowded = not self.crowded
            case "spool full":
                self.bounds = FULL if self.bounds is BOUNDS else BOUNDS
                self.outbox.spool.bounds = self.bounds
            case "disk full":
                self.files.is_full = not self.files.is_full
                self.files.part_bytes = 150 * count
            case "disk stops":
                self.files.may_go.clear()
            case "disk goes on":
                self.files.may_go.set()
            case "link stops":
                if self.may_send.is_set():
                    self.may_send = trio.Event()
            case "link goes on":
                self.may_send.set()
            case "crash":
                await self.crash(nursery)
            case "settle":
                await self.settle()
            case "wait":
                for _ in range(count):
                    await trio.sleep(0.002)
        await trio.lowlevel.checkpoint()

    async def drain(self) -> None:
        """Commit what arrives, one by one, until nothing waits."""
        while not self.outbox.is_drained:
            await until(lambda: self.unanswered or self.outbox.is_drained)
            self.commit(1)

    async def settle(self) -> None:
        """Until nothing happens any more."""
        before, quiet = None, 0
        while quiet < 5:
            await trio.sleep(0.003)
            outbox, spool = self.outbox, self.outbox.spool
            is_busy = outbox._spool_lock.locked() and self.files.may_go.is_set()
            now = (outbox.due.next_number, len(self.unanswered), spool.unread_bytes(), is_busy)
            quiet = quiet + 1 if now == before and not is_busy else 0
            before = now

    async def finish(self, nursery: trio.Nursery) -> None:
        """Everything works again: then all that was written arrives."""
        self.bounds = self.outbox.spool.bounds = BOUNDS
        self.files.is_full = False
        self.files.may_go.set()
        self.may_send.set()
        self.pressed = self.crowded = False
        await self.up(nursery)
        self.enqueue("records")

        def done() -> bool:
            self.commit(99)
            if self.outbox.needs_number and not self.to_put:
                self.enqueue("mark")
            waiting = self.to_put or self.unanswered or self.outbox.waiting_bytes
            return not waiting and self.outbox.is_drained

        await until(done)
        assert self.position_at(self.due) == self.written, "records are missing"
        assert self.durable_number == self.outbox.due.next_number - 1
        assert self.told_durable >= self.told_kept
        left = [region for region, epoch in self.reading.items() if epoch == self.epoch]
        assert not left, f"content of regions {left} is never known to be durable"


COUNTS = st.integers(1, 6)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("write",) * 6, "mark", *("sync",) * 3, "base", "compare", *("commit",) * 4,
                "commit unheard", *("up",) * 3, "down", *("press",) * 2, "spool full", "disk full",
                "disk stops", "disk goes on", "link stops", "link goes on", "crash", "crowd",
                *("wait",) * 4,
            ]
        ),
        COUNTS,
    ),
    max_size=40,
)  # fmt: skip


SETTLE = ("settle", 1)
UP = [("up", 1), SETTLE]
TO_SPOOL = [("press", 1), ("write", 8), SETTLE]  # from a link that does not acknowledge
EXAMPLES = {
    # Guards ``elif is_new`` in _move_to_spool: frames between were never sent.
    "reconnected while it drains": [
        *UP, *TO_SPOOL, *[("commit", 2), SETTLE] * 3, ("press", 1), ("write", 2), SETTLE,
        ("down", 1), ("link stops", 1), *UP, ("write", 2), SETTLE, ("link goes on", 1),
    ],
    # Guards the rewind itself: what was sent before came again.
    "to the spool with frames sent": [*UP, *TO_SPOOL],
    # Guards ``buffers`` in serve: an empty message was sent.
    "moved while the link is slow": [*UP, ("link stops", 1), *TO_SPOOL],
    # Guards the last line of _move_to_spool: frames were added twice.
    "full in the middle of a move": [
        *UP, *TO_SPOOL, ("commit", 4), SETTLE, ("commit", 2), SETTLE, ("write", 3),
        SETTLE, ("disk full", 5), ("write", 4), SETTLE, ("disk full", 5),
    ],
    # Guards ``if self._moving`` in _acknowledge and in _next.
    "acknowledged while it moves": [
        *UP, ("write", 4), SETTLE, ("disk stops", 1), ("press", 1), ("write", 6), SETTLE,
        ("commit", 2), SETTLE, ("disk goes on", 1), SETTLE,
    ],
    # Guards ``any(item.is_spooled ...)`` in _read_spool: an agent that is killed then uses numbers
    # again.
    "killed before the last acknowledgement": [
        *UP, *TO_SPOOL, ("commit", 4), SETTLE, ("commit", 4), SETTLE, ("crash", 1),
    ],
    # Guards ``_owner.interrupted()`` in _move_to_spool: base content was forgotten.
    "content without a number cannot move": [
        *UP, ("link stops", 1), ("mark", 1), ("base", 1), *TO_SPOOL, ("link goes on", 1),
    ],
    # Guards the hold in _acknowledge: an older copy of the store lacked it, and nobody knew.
    "base content and no number": [*UP, ("base", 1), SETTLE, ("commit", 1), SETTLE],
    # Guards ``_is_kept``: the epoch of content that is in the spool.
    "content moves": [
        *UP, ("link stops", 1), ("mark", 1), ("sync", 1), *TO_SPOOL, ("link goes on", 1),
    ],
}  # fmt: skip


def run(steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:

        async def main() -> None:
            with trio.fail_after(10):
                await World(Path(directory)).run(steps)

        trio.run(main)


async def test_what_was_about_to_move_when_the_pump_ended_stays_in_the_ring(
    tmp_path: Path,
) -> None:
    # Guards the last line of _move_to_spool: the ring let go of records that were nowhere else.
    world = World(tmp_path)
    world.numbers = {1: 1, 2: 2}
    await world.outbox.put(records(1, 0, 300))
    assert world.told_kept == {1}
    world.outbox._hold(frame_item(records(2, 1, 300), None, 0, None))
    with trio.CancelScope() as scope:
        scope.cancel()
        await world.outbox._move_to_spool()
    assert scope.cancelled_caught
    assert world.told_kept == {1}
    assert world.outbox.waiting_bytes > 0
    world.outbox.spool.close()


async def test_nothing_is_sent_from_the_spool_while_it_takes_in_what_fills_a_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``_gives_way`` in Outbox._next: a guest that wrote at the speed of memory lost records,
    # for the pump had half of a core. And YIELD_SECONDS in it: a full spool was never sent.
    monkeypatch.setattr(outboxes, "YIELD_SECONDS", 100)
    monkeypatch.setattr(outboxes, "YIELD_SECONDS_MAX", 100)
    world = World(tmp_path)
    outbox = world.outbox
    world.numbers = {number: number for number in range(1, 10)}
    world.pressed = True
    async with trio.open_nursery() as nursery:
        for number in (1, 2):
            await outbox.put(records(number, number - 1, 300))
        await world.up(nursery)
        last = trio.current_time()
        for number in range(3, 9):
            await outbox.put(records(number, number - 1, 300))
            last = trio.current_time()
            await trio.sleep(0.01)
            assert not world.unanswered
        monkeypatch.setattr(outboxes, "YIELD_SECONDS", 0.2)
        await until(lambda: world.unanswered)  # nothing was put in for a while
        assert trio.current_time() >= last + 0.2
        await outbox.put(records(9, 8, 300))
        world.pressed = False
        await world.drain()
        await world.down()
    assert world.told_durable == set(range(1, 10))


class StalledDisk(Files):
    """A disk that stalls in its syncs until told. As that of files that are removed: in these."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.goes_on = threading.Event()

    def sync(self, descriptor: int) -> None:
        self._stall()
        super().sync(descriptor)

    def removing(self, unlink: Callable[..., None]) -> Callable[..., None]:
        def unlink_slowly(path: Path, missing_ok: bool = False) -> None:
            if path.suffix == ".frames":
                self._stall()
            unlink(path, missing_ok)

        return unlink_slowly

    def _stall(self) -> None:
        self.begun.set()
        assert self.goes_on.wait(20)


@pytest.mark.parametrize("stalls", ["sync", "removal"])
async def test_a_disk_that_stalls_while_files_are_given_back_holds_up_no_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stalls: str
) -> None:
    # Guards what is done without the lock in Outbox._give_back and _next: the ring ran full
    # meanwhile.
    monkeypatch.setattr(outboxes, "READ_BYTES", 1)
    world = World(tmp_path)
    outbox, spool = world.outbox, world.outbox.spool
    world.numbers = {number: number for number in range(1, 31)}
    for number in range(1, 30):
        await outbox.put(records(number, number - 1, 300))
    disk = StalledDisk()
    if stalls == "sync":
        spool._system = disk
    else:
        monkeypatch.setattr(Path, "unlink", disk.removing(Path.unlink))
    async with trio.open_nursery() as nursery:
        await world.up(nursery)
        while not disk.begun.is_set():
            await until(lambda: world.unanswered or disk.begun.is_set())
            world.commit(1)
        assert spool.has_unread()
        with trio.move_on_after(10) as scope:
            await outbox.put(records(30, 29, 300))
        files = len(list(spool.directory.glob("*.frames")))
        disk.goes_on.set()
        assert not scope.cancelled_caught
        await until(lambda: len(list(spool.directory.glob("*.frames"))) < files)
        await world.drain()
        await world.down()
    assert world.told_durable == set(range(1, 31))


async def test_a_ring_that_stays_full_does_not_keep_a_spool_from_being_drained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards YIELD_SECONDS_MAX in Outbox._gives_way: of two disks, the one that is written may come
    # to the spool for ever, and the other's ring wait for the link that is direct then.
    monkeypatch.setattr(outboxes, "YIELD_SECONDS", 100)
    monkeypatch.setattr(outboxes, "YIELD_SECONDS_MAX", 0.05)
    monkeypatch.setattr(outboxes, "READ_BYTES", 1)
    world = World(tmp_path)
    world.numbers = {number: number for number in range(1, 10)}
    world.pressed = True
    for number in range(1, 10):
        await world.outbox.put(records(number, number - 1, 300))
    async with trio.open_nursery() as nursery:
        await world.up(nursery)
        for _ in range(1, 10):
            await until(lambda: world.unanswered)
            world.commit(1)
        await until(lambda: world.outbox.is_drained)
        await world.down()


async def test_what_comes_while_an_ended_spool_is_removed_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the place of `sweep` in Outbox._next: what came was told while nobody looked, and
    # nothing was sent any more.
    world = World(tmp_path)
    outbox, disk = world.outbox, StalledDisk()
    monkeypatch.setattr(Path, "unlink", disk.removing(Path.unlink))
    world.numbers = {number: number for number in range(1, 20)}
    await outbox.put(records(1, 0, 300))
    async with trio.open_nursery() as nursery:
        await world.up(nursery)
        await until(lambda: world.unanswered)
        world.commit(1)
        await until(disk.begun.is_set)
        world.pressed = True
        for number in range(2, 20):
            await outbox.put(records(number, number - 1, 300))
        assert outbox.spool.is_active
        disk.goes_on.set()
        world.pressed = False
        await world.drain()
        await world.down()
    assert world.told_durable == set(range(1, 20))


async def test_a_spool_that_takes_nothing_in_is_drained_although_a_ring_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``if items`` in Outbox._spool_items: what failed to go in put off what was to go out.
    monkeypatch.setattr(outboxes, "YIELD_SECONDS", 0.5)
    monkeypatch.setattr(outboxes, "YIELD_SECONDS_MAX", 100)
    world = World(tmp_path)
    outbox = world.outbox
    world.numbers = {number: number for number in range(1, 4)}
    world.pressed = True
    for number in (1, 2):
        await outbox.put(records(number, number - 1, 300))
    world.files.is_full = True
    async with trio.open_nursery() as nursery:
        await world.up(nursery)
        nursery.start_soon(outbox.put, records(3, 2, 300))  # tries again and again
        await until(lambda: world.unanswered)
        world.files.is_full = False
        world.pressed = False
        await world.drain()
        await world.down()
    assert world.told_durable == {1, 2, 3}


async def test_a_spool_that_could_not_be_ended_is_ended_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``or self.spool.is_active`` in Outbox._next: nothing wakes who waits for this spool,
    # and trying without a pause takes a core.
    monkeypatch.setattr(outboxes, "FULL_SECONDS", 0.03)
    world = World(tmp_path)
    tried: list[float] = []

    def end_late(spool: Spool) -> None:
        tried.append(trio.from_thread.run_sync(trio.current_time))
        if len(tried) < 4:
            raise StorageError("the disk is away")
        end(spool)

    end = Spool.end
    monkeypatch.setattr(Spool, "end", end_late)
    world.numbers = {1: 1}
    await world.outbox.put(records(1, 0, 300))
    async with trio.open_nursery() as nursery:
        await world.up(nursery)
        await until(lambda: world.unanswered)
        world.commit(1)
        await until(lambda: world.outbox.is_drained)
        await world.down()
    assert len(tried) == 4
    assert min(after - before for before, after in pairwise(tried)) >= 0.03


@pytest.mark.parametrize("steps", EXAMPLES.values(), ids=EXAMPLES)
def test_what_went_wrong_once(steps: list[tuple[str, int]]) -> None:
    run(steps)


@settings(
    max_examples=int(os.environ.get("BLOCKREPL_EXAMPLES", "120")),
    deadline=None,
    phases=(Phase.reuse, Phase.generate),  # what does not end takes too long to shrink
)
@given(STEPS)
def test_whatever_happens_every_frame_arrives_once_and_in_order(
    steps: list[tuple[str, int]],
) -> None:
    run(steps)
