"""An agent's session against what its own machine may do to it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import trio
from pumping import SOURCE, Source

from blockrepl.channel.framing import MessageStream
from blockrepl.errors import StorageError
from blockrepl.formats import messages
from blockrepl.formats.messages import MessageType, Welcome
from blockrepl.services.agent_session import AgentSession


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    found = Source(tmp_path)
    yield found
    found.close()


class _Welcoming:
    """The channel to a receiver that says welcome and nothing more."""

    def __init__(self) -> None:
        self._welcomed = False

    async def send(self, _kind: int, *_payload: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> tuple[int, memoryview]:
        if self._welcomed:
            await trio.sleep_forever()
        self._welcomed = True
        welcome = Welcome(version=1, receiver="vault", window_frames=1, window_bytes=1 << 24)
        return MessageType.WELCOME, memoryview(messages.encode(welcome))


async def test_an_error_of_the_operating_system_ends_the_session_and_not_the_agent(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "clock.json")

    monkeypatch.setattr(source.disks, "all", full)
    stream = cast(MessageStream, _Welcoming())
    session = AgentSession(stream, SOURCE, source.disks, source.clock)
    with pytest.raises(StorageError, match="No space left"), trio.fail_after(10):
        await session.run()
