"""The running receiver: sources over real connections, and peers that mean harm."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
import trio
import trio.testing
from replica_workload import DISK, DISK_BYTES, Agent, Frame

from blockrepl import limits
from blockrepl.channel import enrolment
from blockrepl.channel.certificates import PeerIdentity
from blockrepl.channel.enrolment import Identity
from blockrepl.channel.framing import HEADER, MessageStream
from blockrepl.channel.handshake import RECEIVER_SERVER_NAME, connect
from blockrepl.cli import main as cli
from blockrepl.errors import BlockreplError, PeerError, StateError, UsageError
from blockrepl.formats import messages
from blockrepl.formats.frame import RecordKind
from blockrepl.formats.messages import (
    Attach,
    AttachDisk,
    Attached,
    Hello,
    MessageType,
    Refusal,
    Request,
    Response,
    ScrubPass,
    Welcome,
)
from blockrepl.formats.segment import HEADER_BYTES, file_name
from blockrepl.model import presence
from blockrepl.services import receiver_home, receiver_status
from blockrepl.services.control_client import ControlClient
from blockrepl.services.group_committer import MemoryBudget
from blockrepl.services.receiver import TRUST_SECONDS, run_receiver
from blockrepl.services.receiver_groups import ReceiverGroups
from blockrepl.services.receiver_sessions import Admit, Groups, SourceSession
from blockrepl.session.receiver import AttachGroup, Send
from blockrepl.storage.files import Files
from blockrepl.storage.home import Home
from blockrepl.storage.trust import TrustStore
from blockrepl.units import MIB

WAIT_SECONDS = 20.0


class Peer:
    """An agent's connection, message by message."""

    def __init__(self, stream: MessageStream, source: bytes) -> None:
        self.stream = stream
        self.source = source

    async def expect(self, kind: MessageType) -> memoryview:
        with trio.fail_after(WAIT_SECONDS):
            message = await self.stream.receive()
            while message is not None and message[0] == MessageType.PONG != kind:
                message = await self.stream.receive()
        assert message is not None, "the receiver closed the connection"
        assert message[0] == kind, (MessageType(message[0]).name, bytes(message[1]))
        return message[1]

    async def greet(self, instance: int = 0) -> int:
        """Say hello as an agent process of this number, 0: a new one; its number."""
        hello = Hello(version=messages.PROTOCOL_VERSION, instance=instance)
        await self.stream.send(MessageType.HELLO, messages.encode(hello))
        return messages.decode(Welcome, await self.expect(MessageType.WELCOME)).instance

    async def attach(self, group: str = "web", disk: UUID = DISK, name: str = "root") -> Agent:
        await self.ask_to_attach(group, disk, name)
        attached = messages.decode(Attached, await self.expect(MessageType.ATTACHED))
        return Agent.after(attached, self.source)

    async def ask_to_attach(
        self, group: str = "web", disk: UUID = DISK, name: str = "root"
    ) -> None:
        attach = Attach(group=group, disks=[AttachDisk(id=disk, name=name, size_bytes=DISK_BYTES)])
        await self.stream.send(MessageType.ATTACH, messages.encode(attach))

    async def send(self, *frames: Frame) -> None:
        for _, frame in frames:
            await self.stream.send(MessageType.DATA, frame)

    async def acknowledged(self, count: int) -> int:
        """Wait until so many messages are durable; the last durable number."""
        while True:
            _, done, number = messages.decode_ack(await self.expect(MessageType.ACK))
            assert done <= count
            if done == count:
                return number

    async def ask(self, verb: str, name: str | None = None) -> Response:
        request = Request.model_validate({"id": 5, "verb": verb, "group": "web", "name": name})
        await self.stream.send(MessageType.REQUEST, messages.encode(request))
        return messages.decode(Response, await self.expect(MessageType.RESPONSE))

    async def refusal(self) -> Refusal:
        return messages.decode(Refusal, await self.expect(MessageType.ERROR))


class Vault:
    """A running receiver and the sources that have joined it."""

    def __init__(self, home: Home, address: str, directory: Path) -> None:
        self.home = home
        self.address = address
        self._directory = directory
        self._identities: dict[str, Identity] = {}

    async def join(self, name: str, *groups: str) -> Identity:
        """``groups``: that it shares with others."""
        if name not in self._identities:
            token = receiver_home.invite(
                self.home, expires_seconds=60, groups=[*groups], address=self.address
            )
            self._identities[name] = await enrolment.join(token, name, self._directory / name)
        return self._identities[name]

    @asynccontextmanager
    async def peer(self, name: str = "web1", *, greet: bool = True) -> AsyncIterator[Peer]:
        identity = await self.join(name)
        transport = await enrolment.open_transport(self.address)
        stream = await connect(transport, identity.context(), RECEIVER_SERVER_NAME)
        async with MessageStream(stream, messages.AGENT_ACCEPTS) as channel:
            peer = Peer(channel, UUID(identity.source_id).bytes)
            if greet:
                await peer.greet()
            yield peer

    async def control(self, method: str, path: str, content: object = None) -> Any:
        client = ControlClient(self.home.receiver_socket, "receiver")
        if method == "GET":
            return await trio.to_thread.run_sync(client.get, path)
        return await trio.to_thread.run_sync(client.post, path, content)

    async def group(self, name: str = "web") -> dict[str, Any]:
        status = await self.control("GET", "/status")
        (group,) = (one for one in status["groups"] if one["name"] == name)
        assert isinstance(group, dict)
        return group


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Vault]:
    home = Home.create(directory / "home")
    if not home.receiver_directory.exists():
        receiver_home.initialise(home, "vault")
    async with trio.open_nursery() as nursery:
        address = await nursery.start(_serve, home)
        yield Vault(home, address, directory)
        nursery.cancel_scope.cancel()


async def _serve(home: Home, *, task_status: trio.TaskStatus[str]) -> None:
    await run_receiver(home, "127.0.0.1", 0, ready=task_status.started)


@pytest.fixture
async def vault(tmp_path: Path) -> AsyncIterator[Vault]:
    async with running(tmp_path) as vault:
        yield vault


async def until(condition: Callable[[], Any]) -> None:
    with trio.fail_after(WAIT_SECONDS):
        while not condition():
            await trio.sleep(0.01)


async def test_the_status_of_a_group_that_cannot_be_used_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards facts_of_failed in Receiver.status: it said that there was no history, and no disk.
    monkeypatch.setattr(limits, "SEGMENT_BYTES_TARGET", 65536)
    async with running(tmp_path) as vault, vault.peer() as peer:
        agent = await peer.attach()
        await peer.send(agent.base(0, os.urandom(65536)), agent.consistent())
        for number in range(3):
            await peer.send(agent.writes(), agent.writes())
            await peer.acknowledged(4 + 2 * number)
        before = await vault.group()
    segments = sorted((Home(tmp_path / "home").replica_directory("web") / "segments").iterdir())
    assert len(segments) > 1
    segments[0].unlink()
    async with running(tmp_path) as vault:
        group = await vault.group()
    assert group["state"] == "error"
    assert f"{segments[0].name} is missing" in group["problem"]
    assert group["floor"] == before["floor"] is not None
    assert 0 < group["journal_bytes"] < before["journal_bytes"]
    assert [disk["name"] for disk in group["disks"]] == ["root"]


async def test_lag_is_not_what_it_takes_to_tell_it(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards GroupFacts.now: with many forks, telling took longer than replicating.
    told: list[float] = []

    def outlook(*_: object) -> None:
        told.append(time.time())
        time.sleep(2.0)

    async with vault.peer() as peer:
        agent = await peer.attach()
        agent.stamp = time.time_ns()
        await peer.send(agent.writes())
        await peer.acknowledged(1)
        asked = time.time()
        before = (await vault.group())["lag_seconds"]
        monkeypatch.setattr(receiver_status, "_outlook", outlook)
        began = time.time()
        lag_seconds = (await vault.group())["lag_seconds"]
        assert time.time() - began > 2.0
        assert before < lag_seconds < before + (told[0] - asked) + 0.001


async def test_what_is_acknowledged_is_in_the_journal_as_it_was_sent(
    vault: Vault, tmp_path: Path
) -> None:
    async with vault.peer() as peer:
        agent = await peer.attach()
        frames = [agent.writes(16) for _ in range(40)]
        await peer.send(*frames)
        assert await peer.acknowledged(40) == 40
        segment = vault.home.replica_directory("web") / "segments" / file_name(1)
        assert segment.read_bytes()[HEADER_BYTES:] == b"".join(bytes(data) for _, data in frames)
        await peer.stream.send(MessageType.PING)
        await peer.expect(MessageType.PONG)


async def test_a_source_goes_on_after_the_receiver_was_restarted(tmp_path: Path) -> None:
    async with running(tmp_path) as vault, vault.peer() as peer:
        agent = await peer.attach()
        await peer.send(agent.writes(), agent.writes())
        await peer.acknowledged(2)
        identities = vault._identities
    async with running(tmp_path) as vault:
        vault._identities = identities
        async with vault.peer() as peer:
            again = await peer.attach()
            assert (again.number, again.sequence) == (3, agent.sequence)
            await peer.send(again.writes())
            assert await peer.acknowledged(1) == 3


async def test_reading_goes_on_while_a_commit_is_being_synced(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, waiting = threading.Event(), threading.Event()
    synced = []

    def sync(files: Files, descriptor: int) -> None:
        waiting.set()
        assert gate.wait(WAIT_SECONDS)
        synced.append(descriptor)
        os.fdatasync(descriptor)

    async with vault.peer() as peer:
        agent = await peer.attach()
        monkeypatch.setattr(Files, "sync", sync)
        try:
            await peer.send(agent.writes())
            await until(waiting.is_set)
            frames = [agent.writes(256) for _ in range(25)]  # more than sockets hold
            with trio.fail_after(WAIT_SECONDS):
                await peer.send(*frames)
            await peer.stream.send(MessageType.PING)
            await peer.expect(MessageType.PONG)  # all of them have been read, none acknowledged
        finally:
            gate.set()
        await peer.acknowledged(26)
        assert len(synced) == 2  # the rest shared one


async def test_frames_that_wait_for_a_commit_are_bounded_over_all_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECEIVE_BYTES_MAX", 4 * MIB)
    gate = threading.Event()
    written = 0

    def sync(files: Files, descriptor: int) -> None:
        assert gate.wait(WAIT_SECONDS)

    async def push(peer: Peer, agent: Agent) -> None:
        nonlocal written
        for _ in range(20):
            await peer.send(agent.writes(256))  # 1 MiB
            written += 1
        await peer.acknowledged(20)

    async with running(tmp_path) as vault, vault.peer("web1") as one, vault.peer("web2") as two:
        first, second = await one.attach("web"), await two.attach("mail", UUID(int=9))
        monkeypatch.setattr(Files, "sync", sync)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(push, one, first)
                nursery.start_soon(push, two, second)
                before = -1
                while before != written:
                    before = written
                    await trio.sleep(0.3)  # the measure itself: that nothing moves any more
                assert written < 40  # the rest is held back at the senders
                gate.set()
        finally:
            gate.set()


async def test_a_trickle_of_frames_shares_commits(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "COMMIT_SECONDS", 0.2)
    syncs = 0

    def sync(files: Files, descriptor: int) -> None:
        nonlocal syncs
        syncs += 1
        os.fdatasync(descriptor)

    async with vault.peer() as peer:
        agent = await peer.attach()
        monkeypatch.setattr(Files, "sync", sync)
        begin = trio.current_time()
        for _ in range(30):
            await peer.send(agent.writes(1))
            await trio.sleep(0.01)
        await peer.acknowledged(30)
        assert syncs <= (trio.current_time() - begin) / 0.2 + 1


async def test_many_sources_at_once_and_a_bad_one_ends_alone(vault: Vault) -> None:
    async def good(number: int) -> None:
        async with vault.peer(f"good{number}") as peer:
            agent = await peer.attach(f"g{number}")
            for turn in range(20):
                await peer.send(agent.writes(), agent.writes())
                await peer.acknowledged(2 * turn + 2)

    async def bad() -> None:
        async with vault.peer("bad") as peer:
            agent = await peer.attach("evil")
            _, data = agent.writes()
            damaged = bytearray(data)
            damaged[-1] ^= 1
            await peer.stream.send(MessageType.DATA, damaged)
            refusal = await peer.refusal()
            assert (refusal.code, refusal.group) == ("protocol", None)
            assert await peer.stream.receive() is None

    for name in ("good0", "good1", "good2", "bad"):
        await vault.join(name)
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(good, number)
        nursery.start_soon(bad)


GARBAGE = {
    "nothing": b"",
    "plain text": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "noise": os.urandom(4096),
    "half a hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


async def test_strangers_are_dropped_without_harm(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stranger(data: bytes) -> None:
        transport = await trio.open_tcp_stream(*enrolment.split_address(vault.address))
        async with transport:
            try:
                await transport.send_all(data)
                with trio.fail_after(WAIT_SECONDS):
                    while await transport.receive_some():
                        pass
            except trio.BrokenResourceError:
                pass  # reset: dropped as well

    async with vault.peer() as peer:
        agent = await peer.attach()
        monkeypatch.setattr(limits, "HANDSHAKE_SECONDS", 0.3)  # for the strangers alone
        async with trio.open_nursery() as nursery:
            for data in GARBAGE.values():
                nursery.start_soon(stranger, data)
        await peer.send(agent.writes())
        await peer.acknowledged(1)


async def test_a_dropped_connection_is_logged_with_its_address(
    vault: Vault, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    transport = await enrolment.open_transport(vault.address)
    host, port = transport.socket.getsockname()
    async with transport:
        await transport.send_all(GARBAGE["plain text"])
        with trio.fail_after(WAIT_SECONDS):
            while not any("dropped" in line for line in caplog.messages):
                await trio.sleep(0.01)
    assert any(f"connection of {host}:{port} dropped: " in line for line in caplog.messages)


async def test_connections_that_never_say_who_they_are_cannot_lock_others_out(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKES_MAX", 3)
    monkeypatch.setattr(limits, "HANDSHAKE_SECONDS", 60.0)  # it is not this that drops them
    await vault.join("web1")
    silent = [await enrolment.open_transport(vault.address) for _ in range(6)]
    with trio.fail_after(WAIT_SECONDS):
        for transport in silent[3:]:  # over the limit: closed at once
            with suppress(trio.BrokenResourceError):  # a reset will do as well
                assert await transport.receive_some() == b""
    for transport in silent:
        await transport.aclose()
    async with vault.peer() as peer:
        await peer.attach()


async def test_a_revoked_source_is_dropped_at_once_and_not_let_in_again(vault: Vault) -> None:
    async with vault.peer("web1") as peer, vault.peer("web2") as other:
        await peer.attach()
        elsewhere = TrustStore(vault.home.receiver_directory / "trust.sqlite")
        elsewhere.revoke("web1", 5)
        elsewhere.close()
        with trio.fail_after(TRUST_SECONDS + 5.0):  # these are for a machine that stalls
            refusal = await peer.refusal()
        assert refusal.code == "revoked"
        agent = await other.attach("other")
        await other.send(agent.writes())
        await other.acknowledged(1)
    async with vault.peer("web1", greet=False) as peer:
        assert (await peer.refusal()).code == "revoked"


async def test_a_second_session_of_an_agent_replaces_the_first(vault: Vault) -> None:
    async with vault.peer(greet=False) as first:
        instance = await first.greet()
        agent = await first.attach()
        await first.send(agent.writes())
        async with vault.peer(greet=False) as second:
            assert await second.greet(instance) == instance
            assert (await _last_refusal(first)).code == "replaced"
            again = await second.attach()
            await second.send(again.writes())
            await second.acknowledged(1)


async def test_of_two_agents_with_one_identity_the_older_is_refused(
    vault: Vault, caplog: pytest.LogCaptureFixture
) -> None:
    # Guards the comparison with the newest number in TrustStore.admit, and that Receiver takes a
    # session for its source's only in _admit: before that, each try of the older agent would end
    # the newer one's session.
    async with vault.peer(greet=False) as first:
        old = await first.greet()
        await first.attach()
        async with vault.peer(greet=False) as second:
            new = await second.greet()
            assert new > old
            refusal = await _last_refusal(first)
            assert refusal.code == "fenced"
            assert "new token" in refusal.hint
            agent = await second.attach()
            for turn in range(3):
                async with vault.peer(greet=False) as again:
                    await again.stream.send(
                        MessageType.HELLO,
                        messages.encode(Hello(version=messages.PROTOCOL_VERSION, instance=old)),
                    )
                    assert (await again.refusal()).code == "fenced"
                await second.send(agent.writes())
                assert await second.acknowledged(turn + 1) == turn + 1
    assert "another agent with this source's identity" in caplog.text


async def test_the_older_agent_comes_back_when_the_newer_has_gone(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards Presence in Receiver: the true agent stayed out for good after its copy was stopped.
    async def comes_in(peer: Peer, instance: int) -> bool:
        hello = Hello(version=messages.PROTOCOL_VERSION, instance=instance)
        await peer.stream.send(MessageType.HELLO, messages.encode(hello))
        message = await peer.stream.receive()
        assert message is not None
        return message[0] == MessageType.WELCOME

    async with vault.peer(greet=False) as first:
        old = await first.greet()
    async with vault.peer(greet=False) as second:
        new = await second.greet()
    async with vault.peer(greet=False) as first:
        assert not await comes_in(first, old)
    monkeypatch.setattr(presence, "AWAY_SECONDS", 0.0)
    async with vault.peer(greet=False) as second:
        assert await second.greet(new) == new
        async with vault.peer(greet=False) as first:
            assert not await comes_in(first, old)  # while the newer has a session
    with trio.fail_after(WAIT_SECONDS):
        is_in = False
        while not is_in:  # until the receiver has seen the other go
            async with vault.peer(greet=False) as first:
                is_in = await comes_in(first, old)
    async with vault.peer(greet=False) as first:
        assert await first.greet(old) == old
        async with vault.peer(greet=False) as second:
            assert await second.greet(new) == new  # the newer may always come back
            assert (await _last_refusal(first)).code == "fenced"


async def test_a_restarted_agent_always_comes_in_also_after_the_receiver_was_restarted(
    tmp_path: Path,
) -> None:
    # Guards the table of instances: kept in memory, a receiver's restart would let the older in.
    async with running(tmp_path) as vault, vault.peer(greet=False) as peer:
        old = await peer.greet()
        async with vault.peer(greet=False) as other:
            new = await other.greet()
        identities = vault._identities
    async with running(tmp_path) as vault:
        vault._identities = identities
        async with vault.peer(greet=False) as peer:
            hello = Hello(version=messages.PROTOCOL_VERSION, instance=old)
            await peer.stream.send(MessageType.HELLO, messages.encode(hello))
            assert (await peer.refusal()).code == "fenced"
        async with vault.peer(greet=False) as peer:
            assert await peer.greet(new) == new
        async with vault.peer(greet=False) as peer:
            assert await peer.greet() > new


async def test_a_source_that_takes_long_over_a_frame_hears_that_the_receiver_is_there(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards _keep_alive in SourceSession: a ping waits behind the frame, and a link of 60 KB/s
    # never got one through: the agent gave up after 30 s, and began again with the same one.
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.3)
    async with vault.peer() as peer:
        agent = await peer.attach()
        _, frame = agent.writes()
        data = bytes(frame)
        await peer.stream.stream.send_all(HEADER.pack(1 + len(data), MessageType.DATA) + data[:999])
        for _ in range(3):
            await peer.expect(MessageType.PONG)
        await peer.stream.stream.send_all(data[999:])
        await peer.acknowledged(1)


async def test_a_peer_that_does_not_say_hello_is_dropped_at_the_deadline(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the deadline in SourceSession._read; a session with its hello said goes on.
    await vault.join("web2")
    async with vault.peer() as other:
        agent = await other.attach()
        async with vault.peer("web2", greet=False) as peer, vault.peer("web2", greet=False):
            assert (await _last_refusal(peer)).code == "replaced"  # one at a time
        short = SimpleNamespace(**{**vars(limits), "HANDSHAKE_SECONDS": 0.2})  # of the hello alone
        monkeypatch.setattr("blockrepl.services.receiver_sessions.limits", short)
        async with vault.peer("web2", greet=False) as silent:
            assert (await silent.refusal()).code == "silent"
        await other.send(agent.writes())
        await other.acknowledged(1)


async def _last_refusal(peer: Peer) -> Refusal:
    """The refusal that ends a session, after acknowledgements still under way."""
    while True:
        message = await peer.stream.receive()
        assert message is not None
        if message[0] == MessageType.ERROR:
            return messages.decode(Refusal, message[1])


async def test_a_group_that_is_refused_to_its_source_is_shown_as_an_error(vault: Vault) -> None:
    async with vault.peer() as peer:
        agent = await peer.attach()
        await peer.send(agent.base(0, bytes(65536)), agent.consistent())
        await peer.acknowledged(2)
        assert (await vault.group())["state"] == "replicating"
        await peer.ask_to_attach(disk=uuid4())  # another disk under a name that is taken
        assert (await peer.refusal()).code == "disk-name-taken"
        group = await vault.group()
        assert (group["state"], group["disks"][0]["state"]) == ("error", "error")
        assert "source web1 is refused" in group["problem"]
        assert "another disk named root" in group["problem"]
        assert group["sources"] == [{"name": "web1", "connected": True}]
        await peer.attach()
        group = await vault.group()
        assert group["state"] == "replicating"
        assert "refused" not in (group["problem"] or "")
        await peer.ask_to_attach(disk=uuid4())
        await peer.refusal()
    with trio.fail_after(WAIT_SECONDS):
        while (await vault.group())["state"] != "disconnected":
            await trio.sleep(0.01)


async def test_a_group_of_another_source_is_refused_and_the_session_goes_on(vault: Vault) -> None:
    async with vault.peer("web1") as owner, vault.peer("web2") as other:
        await owner.attach("web")
        await other.ask_to_attach("web", UUID(int=9), "data")
        refusal = await other.refusal()
        assert (refusal.code, refusal.group) == ("not-owner", "web")
        assert (await vault.group())["state"] == "initial-sync"  # no fault of the group's
        assert (await other.ask("group-status")).refusal is not None
        agent = await other.attach("mine")
        await other.send(agent.writes())
        await other.acknowledged(1)


async def test_a_full_disk_refuses_the_group_until_there_is_room(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with vault.peer() as peer:
        agent = await peer.attach()
        kept, lost = agent.writes(), agent.writes()
        await peer.send(kept)
        await peer.acknowledged(1)
        with monkeypatch.context() as patch:
            patch.setattr(Files, "write", no_room)
            await peer.send(lost)
            refusal = await peer.refusal()
            assert (refusal.code, refusal.group) == ("full", "web")
            assert (await vault.group())["state"] == "error"
            assert "no room left" in (await vault.group())["problem"]
            await peer.send(agent.writes())  # under way when the refusal came
        again = await peer.attach()
        assert again.number == 2
        await peer.send(lost)
        assert await peer.acknowledged(1) == 2
        assert (await vault.group())["state"] != "error"


async def test_a_failed_sync_stops_the_group_and_no_other(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with vault.peer() as peer:
        web, mail = await peer.attach("web"), await peer.attach("mail", UUID(int=9), "data")
        with monkeypatch.context() as patch:
            patch.setattr(Files, "sync", fail)
            await peer.send(web.writes())
            assert (await peer.refusal()).code == "fail-stop"
        await peer.ask_to_attach("web")
        assert (await peer.refusal()).code == "fail-stop"
        await peer.send(mail.writes())
        await peer.acknowledged(1)


async def test_checkpoints_are_listed_made_and_removed_on_both_sides(vault: Vault) -> None:
    async with vault.peer() as peer:
        agent = await peer.attach()
        marks = [agent.consistent(), agent.checkpoint("a"), agent.checkpoint("b", kept=True)]
        await peer.send(*marks)
        await peer.acknowledged(3)
        made = await vault.control("POST", "/checkpoints/web", {"name": "c", "keep": True})
        assert made["at_ns"] == agent.stamp
        listed = (await peer.ask("checkpoint-list")).data
        assert listed == await vault.control("GET", "/checkpoints/web")
        assert [(one["name"], one["kept"]) for one in listed] == [
            ("a", False),
            ("b", True),
            ("c", True),
        ]
        assert (await peer.ask("checkpoint-remove", "a")).data["name"] == "a"
        for name, code in (("b", "kept"), ("a", "no-checkpoint")):
            refused = (await peer.ask("checkpoint-remove", name)).refusal
            assert refused is not None
            assert refused.code == code
        for verb, kept in (("release", False), ("keep", True)):
            assert (await vault.control("POST", f"/checkpoints/web/b/{verb}"))["kept"] is kept
            listed = await vault.control("GET", "/checkpoints/web")
            assert [one["kept"] for one in listed if one["name"] == "b"] == [kept]
        with pytest.raises(BlockreplError, match="no checkpoint 'a'"):
            await vault.control("POST", "/checkpoints/web/a/keep")
        await vault.control("POST", "/checkpoints/web/b/remove")
        for path, content, code in (
            ("/checkpoints/web", {"name": "c"}, "taken"),
            ("/checkpoints/web", {"name": "d", "at_ns": agent.stamp - 10}, "point"),
            ("/checkpoints/web", {"name": "../d"}, "usage"),
            ("/checkpoints/none", {"name": "d"}, "no-group"),
        ):
            with pytest.raises(BlockreplError) as error:
                await vault.control("POST", path, content)
            assert error.value.code == code


async def test_however_much_history_there_is_an_answer_about_it_fits_a_message(
    tmp_path: Path,
) -> None:
    # Guards the newest of messages.CHECKPOINTS_TOLD_MAX and GAPS_TOLD_MAX in Receiver.answer: with
    # 8400 checkpoints the agent dropped its session each time that one was to be taken.
    many = 12_000
    async with running(tmp_path) as vault, vault.peer() as peer:
        agent = await peer.attach(name="d" * 63)
        await peer.send(agent.consistent(), agent.writes())
        await peer.acknowledged(2)
        identities = vault._identities
    path = vault.home.replica_directory("web") / "catalog.sqlite"
    with closing(sqlite3.connect(path)) as database, database:
        first_ns = agent.stamp - many
        checkpoints = [(f"{'c' * 57}-{n:05}", first_ns + n) for n in range(many)]
        database.executemany("INSERT INTO checkpoints VALUES (?, ?, 'crash', 0)", checkpoints)
        gaps = [(DISK.hex, first_ns + n, first_ns + n) for n in range(1, many)]
        database.executemany("INSERT INTO gaps VALUES (?, ?, ?)", gaps)
        database.execute("INSERT INTO gaps VALUES (?, ?, NULL)", (DISK.hex, first_ns))
    async with running(tmp_path) as vault:
        vault._identities = identities
        async with vault.peer() as peer:
            await peer.attach(name="d" * 63)
            listed = (await peer.ask("checkpoint-list")).data
            told = checkpoints[-messages.CHECKPOINTS_TOLD_MAX :]
            assert [(one["name"], one["at_ns"]) for one in listed] == told
            for name, found in ((checkpoints[0][0], 1), ("absent", 0)):
                assert len((await peer.ask("checkpoint-list", name)).data) == found
            told_gaps = (await peer.ask("group-status")).data["gaps"]
            assert len(told_gaps) == messages.GAPS_TOLD_MAX
            assert told_gaps[0]["to_ns"] is None  # the one that is open is told, however old
            assert told_gaps[-1]["from_ns"] == gaps[-1][1]
        assert len((await vault.group())["gaps"]) == many  # nothing limits it here
        assert len(await vault.control("GET", "/checkpoints/web")) == many


async def test_a_source_tells_of_its_own_disks_passes_only(vault: Vault, tmp_path: Path) -> None:
    # Guards the source in Receiver.answer: in a shared group one could say another's disk is done.
    token = receiver_home.invite(
        vault.home, expires_seconds=60, groups=["web"], address=vault.address
    )
    vault._identities["web2"] = await enrolment.join(token, "web2", tmp_path / "web2")
    mine = UUID(int=9)
    passes = [
        ScrubPass(
            disk=disk,
            started_ns=1,
            ended_ns=2,
            is_asked_for=True,
            progress=1.0,
            skipped_regions=0,
            differing_regions=0,
            bytes_per_second=1.0,
        )
        for disk in (DISK, mine)
    ]
    request = Request(id=5, verb="verify", group="web", passes=passes)
    async with vault.peer("web1") as owner, vault.peer("web2") as other:
        await owner.attach("web")
        await other.attach("web", mine, "data")
        await other.stream.send(MessageType.REQUEST, messages.encode(request))
        told = messages.decode(Response, await other.expect(MessageType.RESPONSE)).data
    assert {one["disk"]: one["scrub"] is not None for one in told} == {"root": False, "data": True}


async def test_an_answer_that_takes_its_time_holds_up_no_frame(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the task in SourceSession._take: what a scrub tells every half second waited for a
    # disk, and the frames of all of the source's groups behind it. And REQUESTS_MAX.
    may_answer = trio.Event()
    under_way = 0
    answer = ReceiverGroups.answer

    async def answer_late(*arguments: Any) -> Any:
        nonlocal under_way
        under_way += 1
        await may_answer.wait()
        return await answer(*arguments)

    monkeypatch.setattr(ReceiverGroups, "answer", answer_late)
    request = messages.encode(Request(id=5, verb="verify", group="web"))
    async with vault.peer() as peer:
        agent = await peer.attach()
        for _ in range(limits.REQUESTS_MAX):
            await peer.stream.send(MessageType.REQUEST, request)
        await peer.send(agent.writes())
        await peer.acknowledged(1)
        for _ in range(3):
            await peer.stream.send(MessageType.REQUEST, request)
        await trio.sleep(0.1)
        assert under_way == limits.REQUESTS_MAX
        may_answer.set()
        answers = 0
        while answers < limits.REQUESTS_MAX + 3:
            message = await peer.stream.receive()
            assert message is not None
            answers += message[0] == MessageType.RESPONSE


async def test_a_group_that_is_open_waits_for_no_other_to_be_recovered(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the look without the lock in ReceiverGroups._open: a source that came back waited for
    # the journal of a group that is nothing to it.
    is_opening, may_open = threading.Event(), threading.Event()
    open_replica = ReceiverGroups._open_replica

    def open_late(self: ReceiverGroups, name: str) -> Any:
        if name == "slow":
            is_opening.set()
            assert may_open.wait(WAIT_SECONDS)
        return open_replica(self, name)

    monkeypatch.setattr(ReceiverGroups, "_open_replica", open_late)
    async with vault.peer("web1") as peer:
        await peer.attach("web")
    try:
        async with vault.peer("web2") as other, vault.peer("web1") as peer:
            await other.ask_to_attach("slow", uuid4())
            await until(is_opening.is_set)
            await peer.attach("web")
            may_open.set()
            await other.expect(MessageType.ATTACHED)
    finally:
        may_open.set()


async def test_status_says_what_is_there(vault: Vault) -> None:
    async with vault.peer() as peer:
        agent = await peer.attach()
        agent.stamp = time.time_ns()
        assert (await vault.group())["state"] == "initial-sync"
        await peer.send(agent.base(0, os.urandom(4096)), agent.consistent(), agent.writes())
        await peer.acknowledged(3)
        group = await vault.group()
        asked = (await peer.ask("group-status")).data
        assert {**asked, "lag_seconds": 0} == {
            **group,
            "lag_seconds": 0,
            "received_bytes_per_second": asked["received_bytes_per_second"],
            "retention": asked["retention"],  # the room that is free is everybody's
        }
    assert group["state"] == "replicating"
    assert group["latest_ns"] == agent.stamp
    assert group["floor_ns"] is not None
    assert group["floor"].endswith("Z")
    assert group["received_bytes_per_second"] > 0
    assert group["journal_bytes"] > 4 * 4096
    assert group["sources"] == [{"name": "web1", "connected": True}]
    (disk,) = group["disks"]
    assert (disk["name"], disk["size_bytes"], disk["state"]) == ("root", DISK_BYTES, "replicating")
    assert disk["synced_bytes"] == 4096
    with trio.fail_after(WAIT_SECONDS):
        while (await vault.group())["state"] != "disconnected":
            await trio.sleep(0.01)


async def test_a_replica_that_cannot_be_opened_does_not_stop_the_others(tmp_path: Path) -> None:
    async with running(tmp_path) as vault, vault.peer() as peer:
        for name, disk in (("web", DISK), ("mail", UUID(int=9))):
            agent = await peer.attach(name, disk)
            await peer.send(agent.writes())
            await peer.acknowledged(1)
        identities = vault._identities
    (tmp_path / "home" / "replicas" / "web" / "catalog.sqlite").unlink()
    async with running(tmp_path) as vault:
        vault._identities = identities
        assert (await vault.group("web"))["state"] == "error"
        assert "catalog" in (await vault.group("web"))["problem"]
        async with vault.peer() as peer:
            await peer.ask_to_attach("web")
            assert (await peer.refusal()).code == "damage"
            await peer.attach("mail", UUID(int=9))


async def test_a_home_and_a_port_serve_one_receiver(vault: Vault, tmp_path: Path) -> None:
    with pytest.raises(StateError) as in_use:
        await run_receiver(vault.home, "127.0.0.1", 0, ready=print)
    assert in_use.value.code == "in-use"
    other = Home.create(tmp_path / "other")
    with pytest.raises(StateError, match="no receiver"):
        await run_receiver(other, "127.0.0.1", 0, ready=print)
    receiver_home.initialise(other, None)
    with pytest.raises(StateError, match="the port is in use") as taken:
        await run_receiver(other, "127.0.0.1", int(vault.address.split(":")[1]), ready=print)
    assert taken.value.hint
    with pytest.raises(StateError) as twice:
        receiver_home.initialise(other, None)
    assert twice.value.code == "initialised"


async def test_a_source_that_sends_garbage_inside_its_session_is_dropped(vault: Vault) -> None:
    async with vault.peer() as peer:
        await peer.stream.send(MessageType.DATA, b"not a frame")
        assert (await peer.refusal()).code == "protocol"
    async with vault.peer() as peer:
        await peer.stream.stream.send_all(b"\xff\xff\xff\xff\x02")  # 4 GiB are announced
        assert (await peer.refusal()).code == "protocol"
        assert await peer.stream.receive() is None


# The command


async def test_status_of_a_receiver_at_rest_is_read_from_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = str(tmp_path / "home")
    async with running(tmp_path) as vault, vault.peer() as peer:
        agent = await peer.attach()
        await peer.send(agent.consistent(), agent.writes())
        await peer.acknowledged(2)
        live = await vault.group()
    assert cli.run(["--home", home, "status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["role"], status["running"]) == ("receiver", False)
    (group,) = status["groups"]
    assert group["state"] == "disconnected"
    for key in ("floor_ns", "latest_ns", "journal_bytes", "gaps", "floor", "latest"):
        assert group[key] == live[key]
    assert cli.run(["--home", home, "status", "web"]) == 0
    shown = capsys.readouterr().out
    for part in ("not running", "web", "disconnected", "root", "64 MiB", group["latest"]):
        assert part in shown
    assert cli.run(["--home", home, "status", "other", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "no-group"


async def test_a_record_from_the_future_is_shown_of_a_receiver_at_rest(tmp_path: Path) -> None:
    # Guards newest_stamp in receiver_status._facts_at_rest.
    async with running(tmp_path) as vault, vault.peer() as peer:
        agent = await peer.attach()
        agent.stamp = time.time_ns()
        rows = [(agent.stamp + 86400 * 10**9, 0, 512, int(RecordKind.ZERO))]
        await peer.send(agent.consistent(), agent.records(rows, b""))
        await peer.acknowledged(2)
    (group,) = receiver_status.status_at_rest(vault.home).groups
    assert group.ahead_seconds == pytest.approx(86400, abs=60)
    assert group.latest_ns == agent.stamp


@pytest.mark.parametrize(
    "address",
    [
        "foo",
        ":7420",
        "vault:0",
        "vault:x",
        "vault:" + "9" * 5000,
        "v" * 300 + ":7420",
        "v\udcff:7420",
        "v\n:7420",
    ],
)
def test_an_invitation_needs_an_address_that_can_be_reached(tmp_path: Path, address: str) -> None:
    home = Home.create(tmp_path / "home")
    receiver_home.initialise(home, None)
    with pytest.raises(UsageError, match="not an address to reach") as caught:
        receiver_home.invite(home, expires_seconds=60, groups=[], address=address)
    assert caught.value.hint == "write HOST:PORT"
    with pytest.raises(UsageError, match="not an address to listen on"):
        receiver_home.split_listen("foo")
    with closing(sqlite3.connect(home.receiver_directory / "trust.sqlite")) as trust:
        assert trust.execute("SELECT count(*) FROM invites").fetchone() == (0,)


@pytest.mark.parametrize(
    "words",
    [
        ["invite", "--expires", "99999d"],
        ["invite", "--expires", "999999999w"],
        ["invite", "--address", "v" * 300 + ":7420"],
        ["run", "--listen", "a..b:7420"],
        ["run", "--listen", "a" * 64 + ":7420"],
        ["run", "--listen", "vault:" + "9" * 5000],
    ],
)
def test_what_no_receiver_can_do_is_wrong_usage(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Guards _SECONDS_MAX in sizes.Duration, _split in receiver_home, and UnicodeError in _listen.
    home = Home.create(tmp_path / "home")
    receiver_home.initialise(home, "vault")
    assert cli.run(["--home", str(home.path), "receiver", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err) < 300


def start_command(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "blockrepl.cli.main", "--home", str(home), "receiver", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=WAIT_SECONDS)
    return process.returncode, out, err


def test_the_command_tells_when_it_is_ready_and_ends_cleanly(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert finish(start_command(home, "init", "--name", "vault"))[0] == 0
    notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    os.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
    notifications.bind(os.environ["NOTIFY_SOCKET"])
    try:
        process = start_command(home, "run", "--listen", "127.0.0.1:0")
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("receiver ready on 127.0.0.1:")
        assert line.endswith(f"(home {home})\n")
        notifications.settimeout(WAIT_SECONDS)
        assert notifications.recv(100) == b"READY=1"
    finally:
        del os.environ["NOTIFY_SOCKET"]
        notifications.close()
    status, out, _ = finish(
        subprocess.Popen(
            [sys.executable, "-m", "blockrepl.cli.main", "--home", str(home), "status", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    assert (status, json.loads(out)["running"]) == (0, True)
    status, out, _ = finish(start_command(home, "invite"))
    address = line.split()[3]
    assert enrolment.decode_token(out.strip()).address == address
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0
    assert not (home / "run" / "receiver.sock").exists()


@pytest.mark.parametrize("host", ["", "localhost", "127.0.0.1"])
def test_where_to_listen_is_remembered_as_it_was_told(tmp_path: Path, host: str) -> None:
    # Guards remember_listen in the command: of all addresses and both families it kept the first.
    home = Home.create(tmp_path / "home")
    receiver_home.initialise(home, "vault")
    for listen in (["--listen", f"{host}:0"], []):
        process = start_command(home.path, "run", *listen)
        assert process.stdout is not None
        try:
            port = process.stdout.readline().split()[3].rpartition(":")[2]
        finally:
            process.terminate()
            assert finish(process)[0] == 0
        assert receiver_home.read_configuration(home).listen == f"{host}:{port}"


async def test_a_killed_receiver_loses_nothing_acknowledged(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home")
    receiver_home.initialise(home, "vault")
    acknowledged = sent = 0
    vault = Vault(home, "", tmp_path)
    for _ in range(3):
        process = start_command(home.path, "run", "--listen", "127.0.0.1:0")
        assert process.stdout is not None
        vault.address = (await trio.to_thread.run_sync(process.stdout.readline)).split()[3]
        try:
            async with vault.peer() as peer:
                agent = await peer.attach()
                assert acknowledged < agent.number <= sent + 1
                first = agent.number
                frames = [agent.writes(64) for _ in range(30)]
                sent = agent.number - 1
                await peer.send(*frames)
                _, count, acknowledged = messages.decode_ack(await peer.expect(MessageType.ACK))
                assert acknowledged == first + count - 1
                process.kill()
        finally:
            process.kill()
            await trio.to_thread.run_sync(finish, process)


class _Slow:
    """A channel to a peer that does not read until it is told to."""

    def __init__(self) -> None:
        self.reads = trio.Event()
        self.sent: list[tuple[int, bytes]] = []
        self._lock = trio.StrictFIFOLock()

    async def send(self, kind: int, payload: bytes) -> None:
        async with self._lock:
            await self.reads.wait()
            self.sent.append((kind, payload))


class _Groups:
    """Lets everybody in, at once."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached

    async def attach(self, _identity: object, _group: str) -> Any:
        return self

    async def perform(self, _call: object) -> Attached:
        await trio.testing.wait_all_tasks_blocked()
        return self.attached


def lone_session(channel: _Slow, attached: Attached) -> SourceSession:
    """A session without a receiver, its hello said."""
    session = SourceSession(
        cast(MessageStream, channel),
        cast(PeerIdentity, None),
        b"s" * 16,
        receiver="vault",
        groups=cast(Groups, _Groups(attached)),
        budget=MemoryBudget(1),
        admit=cast(Admit, None),
    )
    hello = messages.encode(Hello(version=messages.PROTOCOL_VERSION))
    session._machine.received(MessageType.HELLO, memoryview(hello))
    return session


async def test_after_a_group_attached_anew_no_older_acknowledgement_is_sent() -> None:
    attached = Attached(group="web", group_id=UUID(int=3), next_number=9, watermark=0, disks=[])
    channel = _Slow()
    session = lone_session(channel, attached)
    session._acks = {
        name: Send(MessageType.ACK, messages.encode_ack(group, 8, 8))
        for name, group in (("db", b"d" * 16), ("web", attached.group_id.bytes))
    }
    session._to_send.set()
    attach = messages.encode(Attach(group="web", disks=[]))
    effect = session._machine.received(MessageType.ATTACH, memoryview(attach))
    assert isinstance(effect, AttachGroup)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session._write)
        nursery.start_soon(session._attach, effect)
        await trio.testing.wait_all_tasks_blocked(0.01)
        channel.reads.set()
        await until(lambda: MessageType.ATTACHED in [kind for kind, _ in channel.sent])
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [kind for kind, _ in channel.sent][-1] == MessageType.ATTACHED


@pytest.mark.parametrize(("code", "is_looked_at"), [("protocol", False), ("disconnected", True)])
def test_what_a_source_had_sent_behind_a_lie_is_not_committed(
    code: str, is_looked_at: bool
) -> None:
    # Guards the look at the reason in SourceSession.is_current: frames of the next commit came in.
    session = lone_session(_Slow(), Attached(group="web", group_id=UUID(int=3), next_number=1,
                                             watermark=0, disks=[]))  # fmt: skip
    attach = messages.encode(Attach(group="web", disks=[]))
    effect = session._machine.received(MessageType.ATTACH, memoryview(attach))
    assert isinstance(effect, AttachGroup)
    assert session.is_current("web", effect.generation)
    session.end(PeerError("frame 8 came where 6 was due", code=code))
    assert session.is_current("web", effect.generation) is is_looked_at
