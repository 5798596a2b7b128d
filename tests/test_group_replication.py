"""A group at the source, over sessions that come and go."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from pumping import SOURCE, Receiver, Source, attach, known, shape, until

from blockrepl import limits
from blockrepl.errors import StorageError
from blockrepl.formats.messages import Attached
from blockrepl.services.group_replication import GroupReplication, Link
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
