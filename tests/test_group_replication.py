"""A group at the source, over sessions that come and go."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest
import trio
from pumping import SOURCE, Receiver, Source, attach, known, random_bytes, replay, shape, until

from blockrepl import limits
from blockrepl.errors import StorageError
from blockrepl.formats.messages import Attached
from blockrepl.services.group_replication import GroupReplication, Link
from blockrepl.services.outbox_ends import LostError
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
