"""A group at the source, over sessions that come and go."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
from pumping import (
    REPLICA,
    SOURCE,
    Receiver,
    Source,
    StalledWrite,
    attach,
    known,
    random_bytes,
    replay,
    shape,
    until,
)

from blockrepl import limits
from blockrepl.errors import DamageError, StorageError
from blockrepl.formats.frame import FrameKind
from blockrepl.formats.marks import ConsistentMark, GapMark
from blockrepl.formats.messages import Attached
from blockrepl.services import flush_doubts, group_replication
from blockrepl.services.group_pump import GroupPump, WantedCheckpoint
from blockrepl.services.group_replication import GroupReplication, Link
from blockrepl.services.outbox import Outbox
from blockrepl.services.outbox_ends import LostError
from blockrepl.storage import flush_watch
from blockrepl.storage import retiring as retiring_module
from blockrepl.storage import source as source_module
from blockrepl.storage.group_notes import GroupNote, read_note, write_note
from blockrepl.storage.image import is_locked
from blockrepl.storage.ring import RingReader, read_next_number, ring_path
from blockrepl.storage.spool import SpoolLimits
from blockrepl.units import MIB

SIZE = 8 * MIB
BOUNDS = SpoolLimits(1 << 30, 0)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    found = Source(tmp_path)
    yield found
    found.close()


@asynccontextmanager
async def replicating(source: Source) -> AsyncIterator[GroupReplication]:
    group = GroupReplication("web", source.disks, SOURCE, source.clock, BOUNDS)
    group.entries = source.disks.all()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(group.run)
        await group.attach_disks()
        yield group
        nursery.cancel_scope.cancel()


async def serve(group: GroupReplication, receiver: Receiver, answer: Attached) -> None:
    """A link to a receiver that answers ATTACH like this."""
    link = Link(receiver.send, shape, limits.WINDOW_FRAMES, limits.WINDOW_BYTES)
    await group.serve(answer, link)


async def link_once(group: GroupReplication, receiver: Receiver, answer: Attached) -> None:
    """A link that comes and goes: from then on the group spools."""
    async with trio.open_nursery() as link:
        link.start_soon(serve, group, receiver, answer)
        await until(lambda: group.is_linked)
        link.cancel_scope.cancel()


async def test_a_full_disk_at_the_source_ends_a_round_and_the_group_begins_anew(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Guards the ``except`` in GroupReplication._run_pump: the agent would end.
    entry = source.add("root", SIZE)
    guest = source.guest(entry)
    receiver = Receiver(at_once=False)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "clock.json")

    async with replicating(source) as group:
        source.end_lease()
        monkeypatch.setattr(source.clock, "renew", full)
        with pytest.raises(StorageError, match="No space left"), trio.fail_after(10):
            await serve(group, receiver, attach(source, known(entry)))
        assert "No space left" in caplog.text
        assert group.pump is None
        monkeypatch.undo()
        guest.write(0, b"x" * 512)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, group, receiver, attach(source, known(entry)))
            await until(lambda: receiver.records(entry.id.bytes))
            nursery.cancel_scope.cancel()


async def test_a_disk_that_is_added_costs_the_others_no_history(source: Source) -> None:
    # Guards `_stops` in GroupReplication._replicate: a link that did not get on kept the rings from
    # being read, until they overflowed with the spool beside them.
    entry = source.add("root", SIZE)
    guest = source.guest(entry)
    receiver = Receiver(at_once=False)
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, receiver, attach(source, known(entry)))
        await until(lambda: group.is_linked and group.pump is not None)
        pump = receiver.pump = group.pump
        assert pump is not None
        guest.write(0, random_bytes(MIB))
        await until(lambda: receiver.records(entry.id.bytes))
        source.add("data", SIZE)
        group.entries = source.disks.all()
        await until(lambda: pump.is_stopped)
        ring = group.disks[0].ring
        assert ring is not None
        for turn in range(3 * limits.RING_BYTES_MIN // MIB):
            guest.write(turn % 8 * MIB, random_bytes(MIB))
            await until(lambda: ring.fill() < 0.9)  # else nobody reads it
            await trio.sleep(0.03)
        receiver.at_once = True
        receiver.acknowledge()
        await until(lambda: pump.is_stopped and pump.outbox.is_drained)
        await until(lambda: group.pump is not pump)


async def test_a_spool_that_cannot_be_begun_with_is_given_up(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards _start_from in the ``try`` of GroupReplication.serve: every attach would fail alike.
    monkeypatch.setattr(limits, "SPOOL_FILE_BYTES", 1)
    entry = source.add("root", SIZE)
    guest = source.guest(entry)
    answer = attach(source, known(entry))
    async with replicating(source) as group:
        await link_once(group, Receiver(at_once=False), answer)
        assert group.pump is not None
        group.pump.want_checkpoint(WantedCheckpoint("before-the-fault", kept=False))
        await until(lambda: any(b"before-the-fault" in data for data in spooled(group)))
        count = len(spooled(group))
        guest.write(0, b"x" * 512)
        await until(lambda: len(spooled(group)) > count)  # the mark is not in the last file
    for path in group.spool.directory.glob("*.frames"):
        path.write_bytes(path.read_bytes().replace(b"before-the-fault", b"after-the-fault!"))
    receiver = Receiver()
    async with replicating(source) as group:
        with pytest.raises(DamageError):
            await serve(group, receiver, answer)
        assert not group.spool.is_active
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, group, receiver, answer)
            await until(lambda: group.pump is not None)
            receiver.pump = group.pump
            await until(lambda: any(isinstance(mark, GapMark) for mark in receiver.marks()))
            nursery.cancel_scope.cancel()


def is_spooled(group: GroupReplication, block: bytes) -> bool:
    return any(block in data for data in spooled(group))


def spooled(group: GroupReplication) -> list[bytes]:
    return [path.read_bytes() for path in sorted(group.spool.directory.glob("*.frames"))]


async def test_the_disks_that_a_group_has_are_noted(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards "disks" in GroupReplication._keep_note: an agent that begins could not know whether a
    # disk whose entry it cannot read is the group's. And max() in _note: a spool's beginning may
    # lie behind what is remembered.
    monkeypatch.setattr(group_replication, "NOTE_SECONDS", 0.01)
    home = source.disks.home
    answer = attach(source, *(known(source.add(name, SIZE)) for name in ("data", "root")))
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, Receiver(at_once=False), answer)
        note = GroupNote(replica=REPLICA, next_number=1, disks=("data", "root"))
        await until(lambda: read_note(home, "web") == note)
        nursery.cancel_scope.cancel()
    for number, disks in ((9, ("root",)), (5, ("data", "root"))):
        group._note(GroupNote(replica=REPLICA, next_number=number, disks=disks))
    assert read_note(home, "web") == GroupNote(
        replica=REPLICA, next_number=9, disks=("data", "root")
    )


async def test_what_is_lost_where_a_spool_cannot_be_read_is_a_gap(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards OSError in FileRecovery._true_header: the group was never attached again.
    monkeypatch.setattr(limits, "SPOOL_FILE_BYTES", 1)
    entry = source.add("root", SIZE)
    guest = source.guest(entry)
    answer = attach(source, known(entry))
    receiver = Receiver(at_once=False)
    async with replicating(source) as group:
        await link_once(group, receiver, answer)
        blocks = [random_bytes(512, seed) for seed in range(3)]  # kept, lost, and behind it
        stamps = []
        for number, block in enumerate(blocks):
            stamps.append(guest.write(512 * number, block))
            await until(partial(is_spooled, group, block))
    paths = group.spool.directory.glob("*.frames")
    [damaged] = [path for path in paths if blocks[1] in path.read_bytes()]
    pread = os.pread

    def bad_sector(descriptor: int, size_bytes: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(damaged):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size_bytes, offset)

    monkeypatch.setattr(os, "pread", bad_sector)
    receiver = Receiver(at_once=False)
    with trio.fail_after(10):
        async with replicating(source) as group, trio.open_nursery() as nursery:
            monkeypatch.setattr(os, "pread", pread)  # the file has been emptied
            nursery.start_soon(serve, group, receiver, answer)
            await until(lambda: group.is_linked)
            receiver.pump, receiver.at_once = group.pump, True
            receiver.acknowledge()
            await until(lambda: any(isinstance(mark, ConsistentMark) for mark in receiver.marks()))
            nursery.cancel_scope.cancel()
    [gap] = [mark for mark in receiver.marks() if isinstance(mark, GapMark)]
    assert stamps[0] < gap.from_ns <= stamps[1]
    [record] = [one for one in receiver.records(entry.id.bytes) if one[0] <= stamps[2]]
    assert record[0] == stamps[0]
    [consistent] = [mark for mark in receiver.marks() if isinstance(mark, ConsistentMark)]
    assert consistent.at_ns > stamps[2]
    assert replay(receiver.frames, entry.id.bytes, SIZE) == entry.image.read_bytes()


async def test_another_replica_is_begun_with_and_not_mistaken_for_the_one_before(
    source: Source,
) -> None:
    # Guards the comparison of ``group_id`` in Outbox.connect: the numbers of another replica set
    # free what this one never had.
    entry = source.add("root", SIZE, hot=True, content=random_bytes(SIZE))
    guest = source.guest(entry)
    first, second = Receiver(at_once=False), Receiver()
    async with replicating(source) as group:
        async with trio.open_nursery() as nursery:
            answer = attach(source, known(entry))
            nursery.start_soon(serve, group, first, answer)
            guest.write(0, b"x" * 512)
            await until(lambda: first.records(entry.id.bytes))
            nursery.cancel_scope.cancel()
        outbox = group.pump.outbox if group.pump else None
        assert outbox is not None
        other = attach(source, known(entry, "empty", ring_id=0), next_number=1000)
        other = other.model_copy(update={"group_id": UUID(int=7)})
        with pytest.raises(LostError, match="another replica"), trio.fail_after(10):
            await serve(group, second, other)
        assert outbox.known.next_number == 1
        await group.attach_disks()
        fresh = other.model_copy(update={"next_number": 1, "watermark": 0})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, group, second, fresh)
            await until(lambda: group.pump)
            second.pump = group.pump
            await until(second.marks)
            nursery.cancel_scope.cancel()
    assert replay(second.frames, entry.id.bytes, SIZE) == entry.image.read_bytes()


@pytest.mark.parametrize("content", ["under way", "done"])
async def test_base_content_that_an_older_copy_of_the_store_lacks_is_sent_again(
    source: Source, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    # Guards the hold in Outbox._acknowledge. The receiver's store was copied before the content
    # came, and restored after: it has no number that would say so.
    monkeypatch.setattr("blockrepl.limits.WATERMARK_SECONDS", 1e6)
    entry = source.add("root", SIZE, hot=True, content=random_bytes(SIZE))
    empty = attach(source, known(entry, "empty", ring_id=0))
    first, second = Receiver(at_once=False), Receiver(at_once=False)
    async with replicating(source) as group, trio.open_nursery() as nursery:
        async with trio.open_nursery() as link:
            link.start_soon(serve, group, first, empty)
            await until(lambda: group.pump)
            first.pump = group.pump
            await until(lambda: first.of(FrameKind.RECORDS))
            first.acknowledge(len(first.frames) - (content == "under way"))
            link.cancel_scope.cancel()
        if content == "done":
            with pytest.raises(LostError, match="is due there"):
                await serve(group, second, empty)
        nursery.start_soon(serve, group, second, empty)
        await until(lambda: group.is_linked)
        second.pump, second.at_once = group.pump, True
        second.acknowledge()
        await until(second.marks)
        nursery.cancel_scope.cancel()
    assert replay(second.frames, entry.id.bytes, SIZE) == entry.image.read_bytes()


async def test_an_agent_that_was_killed_knows_to_the_frame_what_the_receiver_had(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Guards the next number in the rings: an agent that was killed before its first note took an
    # older copy of the receiver's store for all there had ever been, its content for sent.
    monkeypatch.setattr(group_replication, "NOTE_SECONDS", 1e6)
    entry = source.add("root", SIZE, hot=True, content=random_bytes(SIZE))
    empty = attach(source, known(entry, "empty", ring_id=0))
    first, second = Receiver(at_once=False), Receiver(at_once=False)
    for receiver, restored in ((first, False), (second, True)):
        async with replicating(source) as group, trio.open_nursery() as nursery:
            nursery.start_soon(serve, group, receiver, empty)
            await until(lambda: group.is_linked)
            receiver.pump, receiver.at_once = group.pump, True
            receiver.acknowledge()
            await until(receiver.marks)
            nursery.cancel_scope.cancel()
        assert ("lost frames that were durable" in caplog.text) == restored
    assert replay(second.frames, entry.id.bytes, SIZE) == entry.image.read_bytes()


async def test_a_disk_that_is_away_when_frames_were_lost_is_doubted_all_the_same(
    source: Source,
) -> None:
    # Guards the unbinding in _start_from: the note was lowered, and nothing knew of the loss.
    entry = source.add("root", SIZE)
    write_note(source.disks.home, "web", GroupNote(replica=REPLICA, next_number=9))
    away = entry.image.rename(entry.image.with_suffix(".away"))
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, Receiver(at_once=False), attach(source, known(entry)))
        await until(lambda: group.is_linked)
        assert group.errors["root"].code == "no-image"
        nursery.cancel_scope.cancel()
    assert source.disks.load("root").replica is None
    away.rename(entry.image)
    receiver = Receiver(at_once=False)
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, receiver, attach(source, known(entry)))
        await until(lambda: group.is_linked)
        await until(lambda: any(isinstance(mark, GapMark) for mark in receiver.marks()))
        nursery.cancel_scope.cancel()


async def test_an_image_that_could_not_be_attached_is_closed(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards _open_disk's close: tried every few seconds, it took all descriptors there are.
    entry = source.add("root", SIZE)

    def full(*_arguments: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(source.disks, "note_rings", full)
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, Receiver(at_once=False), attach(source, known(entry)))
        await until(lambda: group.is_linked)
        assert "No space left" in str(group.errors["root"])
        opened = [os.path.realpath(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")]
        assert str(entry.image) not in opened
        nursery.cancel_scope.cancel()


async def test_a_disk_whose_ring_is_new_or_gone_says_nothing_of_the_receiver(
    source: Source,
) -> None:
    entry = source.add("root", SIZE)
    assert read_next_number(ring_path(entry.id.bytes)) == 0
    RingReader(ring_path(entry.id.bytes), entry.id.bytes).set_next_number(7)
    assert read_next_number(ring_path(entry.id.bytes)) == 7
    ring_path(entry.id.bytes).unlink()
    assert read_next_number(ring_path(entry.id.bytes)) == 0


async def test_frames_that_were_never_sent_begin_the_group_anew(source: Source) -> None:
    # Guards the break in Outbox._catch_up and the message of Known.differs: the session ended, and
    # the next one too, for ever.
    entry = source.add("root", SIZE)
    source.guest(entry)
    receiver = Receiver()
    async with replicating(source) as group:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, group, receiver, attach(source, known(entry)))
            await until(lambda: group.pump and group.is_linked)
            nursery.cancel_scope.cancel()
        with pytest.raises(LostError, match="never sent"), trio.fail_after(10):
            await serve(group, receiver, attach(source, known(entry), next_number=500))
        assert group.pump is None
        assert not group.spool.is_active


class StalledImage:
    """In the place of `os`: an image whose sync stalls until told."""

    close = staticmethod(os.close)
    dup = staticmethod(os.dup)

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.goes_on = threading.Event()
        self.fails = False

    def fsync(self, descriptor: int) -> None:
        self.begun.set()
        assert self.goes_on.wait(20)
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fsync(descriptor)


@asynccontextmanager
async def retiring(
    source: Source, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[GroupReplication, StalledImage]]:
    """A group whose first disk nobody serves any more; its image stalls."""
    monkeypatch.setattr(group_replication, "RETIRE_SECONDS", 0.01)
    monkeypatch.setattr(retiring_module, "os", image := StalledImage())
    entries = [source.add(name, SIZE) for name in ("idle", "used")]
    monkeypatch.setattr(source.disks, "is_serving", lambda entry: entry.name == "used")
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, receiver, attach(source, *map(known, entries)))
        await until(lambda: group.pump)
        receiver.pump = group.pump
        await until(image.begun.is_set)
        yield group, image
        image.goes_on.set()
        nursery.cancel_scope.cancel()


async def test_an_image_that_stalls_while_its_ring_is_given_back_holds_up_no_round(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards Retirement.prepare before between_rounds in GroupReplication._retire.
    receiver = Receiver()
    async with retiring(source, receiver, monkeypatch) as (group, image):
        idle, used = group.disks
        source.guest(used.entry).write(0, b"x" * 512)
        with trio.move_on_after(10) as scope:
            await until(lambda: receiver.records(used.id))
        image.goes_on.set()
        assert not scope.cancelled_caught
        await until(lambda: idle.ring is None)
    assert not source.disks.hot_regions(idle.entry).any()
    assert not ring_path(idle.id).exists()


async def test_a_home_that_stalls_while_a_ring_is_given_back_holds_up_no_round(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the hot map in Retirement.prepare: two fsyncs each time a guest was shut down.
    receiver = Receiver()
    async with retiring(source, receiver, monkeypatch) as (group, image):
        idle, used = group.disks
        monkeypatch.setattr(retiring_module, "write_atomically", stalled := StalledWrite())
        image.goes_on.set()
        await until(stalled.begun.is_set)
        source.guest(used.entry).write(0, b"x" * 512)
        with trio.move_on_after(5) as scope:
            await until(lambda: receiver.records(used.id))
        stalled.goes_on.set()
        assert not scope.cancelled_caught
        await until(lambda: idle.ring is None)


async def test_a_round_that_does_not_end_keeps_no_server_from_starting(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the patience in GroupReplication._retire: who serves the disk waits for its lock.
    monkeypatch.setattr(group_replication, "RETIRE_PATIENCE_SECONDS", 0.01)
    async with retiring(source, Receiver(), monkeypatch) as (group, image):
        idle = group.disks[0]
        assert group.pump is not None
        async with group.pump.between_rounds:
            image.goes_on.set()
            await until(lambda: not is_locked(idle.entry.image))
        assert idle.ring is not None
        await until(lambda: idle.ring is None)


async def test_a_group_stops_although_its_round_never_ends_and_a_retirement_waits_for_that(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the order in _stop_running: a full spool without a link is such a round. Found by the
    # simulation (seed 3000565).
    monkeypatch.setattr(group_replication, "RETIRE_SECONDS", 0.01)
    monkeypatch.setattr(group_replication, "RETIRE_PATIENCE_SECONDS", 60)
    monkeypatch.setattr(GroupPump, "_round", lambda pump: trio.sleep_forever())
    entry = source.add("idle", SIZE)
    monkeypatch.setattr(source.disks, "is_serving", lambda entry: False)
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, Receiver(), attach(source, known(entry)))
        await until(lambda: group.pump)
        pump = group.pump
        assert pump is not None
        await until(pump.retiring.locked)
        await trio.sleep(0.05)
        assert pump.retiring.locked()
        with trio.fail_after(5):
            await group._stop_running()
        nursery.cancel_scope.cancel()


async def test_a_link_that_comes_while_a_pump_is_given_up_is_not_left_with_it(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the order in GroupReplication._give_up: the refusal was that of the link before, and
    # nobody read the rings until this one broke by itself.
    monkeypatch.setattr(group_replication, "RETIRE_SECONDS", 0.01)
    monkeypatch.setattr(retiring_module, "os", image := StalledImage())
    entries = [source.add(name, SIZE) for name in ("idle", "used")]
    monkeypatch.setattr(source.disks, "is_serving", lambda entry: entry.name == "used")
    receiver = Receiver(at_once=False)
    answer = attach(source, *map(known, entries))

    async with replicating(source) as group:
        async with trio.open_nursery() as link:
            link.start_soon(serve, group, receiver, answer)
            await until(image.begun.is_set)
            link.cancel_scope.cancel()
        pump = group.pump
        assert pump is not None
        with monkeypatch.context() as patch:
            patch.setattr(source.clock, "renew", cannot_renew)
            source.end_lease()
            await until(lambda: pump.retiring.statistics().tasks_waiting)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lend_until_refused, group, receiver, answer)
            await until(lambda: group.is_linked and group.pump is pump)
            image.goes_on.set()
        assert group.pump is None
        source.guest(entries[1]).write(0, b"x" * 512)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, group, receiver, answer)
            await until(lambda: receiver.records(entries[1].id.bytes))
            nursery.cancel_scope.cancel()


async def test_a_round_that_fails_in_an_outage_costs_no_history(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards _start_without_link in GroupReplication._start_again: until the link was back nobody
    # read the rings, with room in the spool. And the error's end there: it was shown until then.
    monkeypatch.setattr(group_replication, "RETRY_SECONDS", 0.05)
    entry = source.add("root", SIZE)
    guest = source.guest(entry)
    answer = attach(source, known(entry))
    receiver = Receiver(at_once=False)
    async with replicating(source) as group:
        await link_once(group, receiver, answer)
        blocks = [random_bytes(512, seed) for seed in range(2)]
        guest.write(0, blocks[0])
        await until(partial(is_spooled, group, blocks[0]))
        with monkeypatch.context() as patch:
            patch.setattr(source.clock, "renew", cannot_renew)
            source.end_lease()
            guest.write(512, blocks[1])
            await until(lambda: group.pump is None)
            assert group.error is not None
        await until(partial(is_spooled, group, blocks[1]))
        await until(lambda: group.error is None)
        async with trio.open_nursery() as link:
            link.start_soon(serve, group, receiver, answer)
            await until(lambda: group.is_linked)
            receiver.pump, receiver.at_once = group.pump, True
            receiver.acknowledge()
            await until(lambda: len(receiver.records(entry.id.bytes)) == 2)
            link.cancel_scope.cancel()
    assert not receiver.marks()
    assert replay(receiver.frames, entry.id.bytes, SIZE) == entry.image.read_bytes()


@pytest.mark.parametrize("ends", [True, False])
async def test_a_disk_that_comes_back_in_an_outage_is_read_again(
    source: Source, monkeypatch: pytest.MonkeyPatch, *, ends: bool
) -> None:
    # Guards "self.errors" in GroupReplication._start_without_link: it was looked for over a link.
    # And that no round is waited for there: one may wait for the link, which waited for this.
    monkeypatch.setattr(group_replication, "RETRY_SECONDS", 0.05)
    entries = [source.add(name, SIZE) for name in ("away", "root")]
    guests = [source.guest(entry) for entry in entries]
    answer = attach(source, *map(known, entries))
    blocks = [random_bytes(512, seed) for seed in range(2)]
    async with replicating(source) as group:
        await link_once(group, Receiver(at_once=False), answer)
        guests[1].write(0, blocks[1])
        await until(partial(is_spooled, group, blocks[1]))
        moved = entries[0].image.rename(entries[0].image.with_suffix(".moved"))
        with monkeypatch.context() as patch:
            patch.setattr(source.clock, "renew", cannot_renew)
            source.end_lease()
            await until(lambda: group.pump is None)
        await until(lambda: group.errors)
        if not ends:
            monkeypatch.setattr(GroupPump, "_round", never_ends)
        guests[0].write(0, blocks[0])
        moved.rename(entries[0].image)
        await until(lambda: not group.errors)
        await until(lambda: not ends or is_spooled(group, blocks[0]))


async def never_ends(_pump: GroupPump) -> bool:
    await trio.sleep_forever()


async def test_a_spool_has_one_user_while_a_link_begins_with_it(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards _starting around Outbox.connect: a round that failed meanwhile had the group begin with
    # the spool that the link was reading.
    monkeypatch.setattr(group_replication, "RETRY_SECONDS", 0.05)
    entry = source.add("root", SIZE)
    guest = source.guest(entry)
    answer = attach(source, known(entry))
    receiver, connecting = Receiver(at_once=False), trio.Event()
    connect = Outbox.connect

    async def connect_slowly(outbox: Outbox, *words: Any) -> None:
        await connect(outbox, *words)
        await connecting.wait()

    async with replicating(source) as group:
        await link_once(group, receiver, answer)
        guest.write(0, block := random_bytes(512))
        await until(partial(is_spooled, group, block))
        monkeypatch.setattr(Outbox, "connect", connect_slowly)
        async with trio.open_nursery() as link:
            link.start_soon(lend_until_refused, group, receiver, answer)
            await until(group._starting.locked)
            with monkeypatch.context() as patch:
                patch.setattr(source.clock, "renew", cannot_renew)
                source.end_lease()
                await until(lambda: group.pump is None)
            await trio.sleep(0.2)
            assert group.pump is None
            connecting.set()
        await until(lambda: group.pump is not None)


def cannot_renew() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "clock.json")


async def lend_until_refused(group: GroupReplication, receiver: Receiver, answer: Attached) -> None:
    with pytest.raises(StorageError, match=r"clock\.json"), trio.fail_after(5):
        await serve(group, receiver, answer)


async def test_a_home_that_stalls_while_a_syncs_end_is_noted_holds_up_nothing(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Guards GroupReplication._note_consistent: two fsyncs in the loop of all groups.
    monkeypatch.setattr(group_replication, "RETIRE_SECONDS", 0.01)
    entry = source.add("root", SIZE)
    guest = source.guest(entry)
    source.disks.note_rings(entry, stale_ring=known(entry).ring_id, base_ring=0, send_all=True)
    monkeypatch.setattr(source.disks, "is_serving", lambda entry: True)
    receiver = Receiver(at_once=False)
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, receiver, attach(source, known(entry, "gap")))
        await until(lambda: group.pump and group.is_linked)
        receiver.pump = group.pump
        await until(receiver.marks)
        monkeypatch.setattr(source_module, "write_atomically", full := FullWrite())
        receiver.at_once = True
        receiver.acknowledge()
        await until(lambda: full.count > 1)  # tried again
        monkeypatch.setattr(source_module, "write_atomically", stalled := StalledWrite())
        await until(stalled.begun.is_set)
        guest.write(0, b"x" * 512)
        await until(lambda: receiver.records(entry.id.bytes))
        assert source.disks.load("root").stale_ring == known(entry).ring_id
        stalled.goes_on.set()
        await until(lambda: source.disks.load("root").stale_ring == 0)
        assert not source.disks.load("root").send_all
        nursery.cancel_scope.cancel()
    assert "disk root: the end of its sync is not noted: [Errno 28]" in caplog.text


async def test_the_end_of_a_sync_is_not_noted_of_a_disk_that_was_taken_up_anew(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the look at the pump in GroupReplication._note_consistent: the doubts of a receiver
    # that has lost frames are noted by then, and would not be any more.
    monkeypatch.setattr(group_replication, "RETIRE_SECONDS", 0.01)
    entry = source.add("root", SIZE)
    source.disks.note_rings(entry, stale_ring=known(entry).ring_id, base_ring=0)
    monkeypatch.setattr(source.disks, "is_serving", lambda entry: True)
    receiver = Receiver(at_once=False)
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, receiver, attach(source, known(entry, "gap")))
        await until(receiver.marks)
        receiver.pump = pump = group.pump
        assert pump is not None
        async with pump.retiring:
            receiver.acknowledge()
            assert pump.disks[0].owes_note
            await until(lambda: pump.retiring.statistics().tasks_waiting)
            monkeypatch.setattr(group, "pump", None)  # as _stop_running does, with this lock
        await trio.sleep(0.05)
        assert source.disks.load("root").stale_ring == known(entry).ring_id
        nursery.cancel_scope.cancel()


class FullWrite:
    """In the place of `write_atomically`: a home without any room."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, path: Path, data: bytes, mode: int = 0o600) -> None:
        self.count += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@asynccontextmanager
async def asking(
    source: Source, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[GroupReplication, StalledImage]]:
    """A group whose disk's server was killed inside a flush, and is there again; the disk stalls
    when it is asked what became of it."""
    monkeypatch.setattr(flush_doubts, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(flush_watch, "os", image := StalledImage())
    entry = source.add("root", SIZE)
    monkeypatch.setattr(source.disks, "is_serving", lambda entry: True)
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, receiver, attach(source, known(entry)))
        await until(lambda: group.pump)
        receiver.pump = group.pump
        kill_in_flush(source, group)
        await until(image.begun.is_set)
        yield group, image
        image.goes_on.set()
        nursery.cancel_scope.cancel()


async def some_looks(group: GroupReplication, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, look = [], group._flush_doubts._look

    def count(*what: Any) -> None:
        look(*what)
        looks.append(what)

    with monkeypatch.context() as patch:
        patch.setattr(group._flush_doubts, "_look", count)
        await until(lambda: len(looks) > 2)


def kill_in_flush(source: Source, group: GroupReplication) -> None:
    entry = group.disks[0].entry
    ring = RingReader(ring_path(entry.id.bytes), entry.id.bytes)
    source.guest(entry).writer.begin_flush(0)
    ring.recover_in_flight(source.clock.now())


async def test_a_disk_that_stalls_when_it_is_asked_about_a_flush_holds_up_nothing(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the thread and the task in FlushDoubts._look.
    receiver = Receiver()
    async with asking(source, receiver, monkeypatch) as (group, image):
        [disk] = group.disks
        source.guest(disk.entry).write(0, b"x" * 512)
        with trio.fail_after(10):
            await until(lambda: receiver.records(disk.id))
            assert disk.ring is not None
            assert not disk.ring.trusts_flushes()
            image.goes_on.set()
            await until(disk.ring.trusts_flushes)
        assert not disk.ring.flush_failed()


async def test_a_disk_that_is_taken_up_anew_waits_for_the_answer_that_is_on_its_way(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``_asked`` in FlushDoubts: the descriptor of now is younger than the flush.
    async with asking(source, Receiver(), monkeypatch) as (group, image):
        [before] = group.disks
        answer = attach(source, known(before.entry))
        await group._stop_running()
        await group._start_from(answer)
        [disk] = group.disks
        assert disk is not before
        await some_looks(group, monkeypatch)
        assert disk.ring is not None
        assert not disk.ring.flush_failed()
        image.goes_on.set()
        with trio.fail_after(10):
            await until(disk.ring.trusts_flushes)


async def test_a_disk_that_fails_to_flush_is_told_of_once(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Guards the warning and ``_told`` in FlushDoubts.
    async with asking(source, Receiver(), monkeypatch) as (group, image):
        ring = group.disks[0].ring
        assert ring is not None
        image.fails = True
        image.goes_on.set()
        with trio.fail_after(10):
            await until(lambda: "failed to flush" in caplog.text)
        assert ring.flush_failed()
        kill_in_flush(source, group)
        answer = attach(source, known(group.disks[0].entry))
        await group._stop_running()
        await group._start_from(answer)
        await some_looks(group, monkeypatch)
    assert caplog.text.count("failed to flush") == 1
    assert "disk root: " in caplog.text


async def test_an_agent_that_came_after_the_kill_cannot_know(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Guards the "stays" in FlushDoubts._look, and that it is no alarm: the disk may be whole.
    monkeypatch.setattr(flush_doubts, "LOOK_SECONDS", 0.01)
    entry = source.add("root", SIZE)
    source.guest(entry).writer.begin_flush(0)
    ring = RingReader(ring_path(entry.id.bytes), entry.id.bytes)
    ring.recover_in_flight(source.clock.now())
    monkeypatch.setattr(source.disks, "is_serving", lambda entry: True)
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, Receiver(), attach(source, known(entry)))
        with trio.fail_after(10):
            await until(lambda: "killed while it flushed" in caplog.text)
            await some_looks(group, monkeypatch)
        assert not ring.flush_failed()
        assert not ring.trusts_flushes()
        nursery.cancel_scope.cancel()


async def test_an_agent_finds_a_server_that_was_killed_in_a_flush_and_in_nothing_else(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the flushes in SourceDisk.recover: the ring would never be given back.
    monkeypatch.setattr(group_replication, "RETIRE_SECONDS", 0.01)
    monkeypatch.setattr(flush_doubts, "LOOK_SECONDS", 0.01)
    entry = source.add("root", SIZE)
    ring = RingReader(ring_path(entry.id.bytes), entry.id.bytes)
    is_away = False
    monkeypatch.setattr(source.disks, "is_serving", lambda entry: not is_away)
    async with replicating(source) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, Receiver(), attach(source, known(entry)))
        await until(lambda: group.pump)
        source.guest(entry).writer.begin_flush(0)
        is_away = True
        with trio.fail_after(10):
            await until(lambda: group.disks[0].ring is None)
        nursery.cancel_scope.cancel()
    assert (ring.unknown_flushes(), ring.known_flushes(), ring.flush_failed()) == (1, 1, False)
