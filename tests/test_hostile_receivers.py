"""A real agent whose receiver lies: it drops the session with one line in its log, goes on with the
next one, and the guest does not notice.
"""

from __future__ import annotations

import json
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import trio
from pumping import REPLICA, Guest, Source, known, random_bytes
from secure_pair import Receiver, receiver, secure_pair

from blockrepl import limits
from blockrepl.channel.certificates import key_to_pem, make_key_and_request
from blockrepl.channel.enrolment import CERTIFICATE, KEY, RECEIVER
from blockrepl.channel.framing import HEADER, MessageStream
from blockrepl.errors import PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats import messages
from blockrepl.formats.comparison import Verdict, encode_verdict
from blockrepl.formats.messages import AGENT_ACCEPTS, Attached, MessageType, Refusal, Welcome
from blockrepl.model import backoff
from blockrepl.services.agent import Agent
from blockrepl.storage.source import DiskEntry
from blockrepl.units import MIB

DROPPED = (PeerError, trio.BrokenResourceError, trio.ClosedResourceError)


@dataclass
class Liar:
    """Receivers one after the other: those of ``acts``, then one that is good."""

    server: Receiver
    client: ssl.SSLContext
    entry: DiskEntry
    watermark: int
    acts: list[Act]
    sessions: int = 0
    durable: int = 0  # frames that the good one has acknowledged
    waiting: list[MessageStream] = field(default_factory=list)

    async def connect(self, nursery: trio.Nursery) -> MessageStream:
        ours, theirs = await secure_pair(self.server, self.client)
        act = self.acts[self.sessions] if self.sessions < len(self.acts) else Liar.serve
        self.sessions += 1
        nursery.start_soon(self._play, act, MessageStream(theirs, messages.RECEIVER_ACCEPTS))
        return MessageStream(ours, {**AGENT_ACCEPTS, **messages.RECEIVER_ACCEPTS})

    async def _play(self, act: Act, stream: MessageStream) -> None:
        try:
            await act(self, stream)
            while await stream.receive() is not None:
                pass
        except DROPPED:
            pass
        finally:
            await trio.aclose_forcefully(stream.stream)

    async def expect(self, stream: MessageStream, wanted: MessageType) -> memoryview:
        while (message := await stream.receive()) is not None:
            if message[0] == wanted:
                return message[1]
        raise PeerError("the agent has left")

    async def welcome(self, stream: MessageStream) -> None:
        await self.expect(stream, MessageType.HELLO)
        welcome = Welcome(
            version=1,
            receiver="v",
            instance=1,
            window_frames=limits.WINDOW_FRAMES,
            window_bytes=limits.WINDOW_BYTES,
        )
        await stream.send(MessageType.WELCOME, messages.encode(welcome))

    async def attach(self, stream: MessageStream, **lies: object) -> None:
        await self.expect(stream, MessageType.ATTACH)
        told = Attached(
            group="web",
            group_id=REPLICA,
            next_number=self.durable + 1,
            watermark=self.watermark,
            disks=[known(self.entry)],
        )
        content = json.loads(messages.encode(told))
        for key, value in lies.items():
            (content["disks"][0] if key in content["disks"][0] else content)[key] = value
        await stream.send(MessageType.ATTACHED, json.dumps(content).encode())

    async def serve(self, stream: MessageStream) -> None:
        await self.welcome(stream)
        await self.attach(stream)
        await self.acknowledge(stream)

    async def acknowledge(self, stream: MessageStream) -> None:
        count = 0
        while True:
            header = frames.decode_header(await self.expect(stream, MessageType.DATA))
            count += 1
            self.watermark = max(self.watermark, header.watermark)
            ack = messages.encode_ack(REPLICA.bytes, count, header.number)
            self.durable = header.number
            await stream.send(MessageType.ACK, ack)


Act = Callable[[Liar, MessageStream], Awaitable[None]]


def before_welcome(payload: bytes, kind: int = MessageType.WELCOME) -> Act:
    async def act(liar: Liar, stream: MessageStream) -> None:
        await liar.expect(stream, MessageType.HELLO)
        await stream.send(kind, payload)

    return act


def after_welcome(data: bytes) -> Act:
    """Bytes inside TLS, whatever they are."""

    async def act(liar: Liar, stream: MessageStream) -> None:
        await liar.welcome(stream)
        await stream.stream.send_all(data)

    return act


def attached(**lies: object) -> Act:
    async def act(liar: Liar, stream: MessageStream) -> None:
        await liar.welcome(stream)
        await liar.attach(stream, **lies)

    return act


def once_attached(kind: MessageType, payload: bytes) -> Act:
    async def act(liar: Liar, stream: MessageStream) -> None:
        await liar.welcome(stream)
        await liar.attach(stream)
        await liar.expect(stream, MessageType.DATA)
        await stream.send(kind, payload)

    return act


def welcome(**lies: object) -> bytes:
    return json.dumps(
        {"version": 1, "receiver": "v", "window_frames": 9, "window_bytes": 1 << 25, **lies}
    ).encode()


def verdict(count: int, size: int) -> bytes:
    return REPLICA.bytes + (1).to_bytes(8, "little") + count.to_bytes(4, "little") + b"\xff" * size


OTHER_DISK = {"id": str(UUID(int=77)), "epoch": 1, "state": "ready", "ring_id": 1}
# In this order: the same problem twice in a row, without a welcome between, is told once.
LIES: dict[str, Act] = {
    "a welcome that does not parse": before_welcome(b"{"),
    "something else than a welcome": before_welcome(b"", MessageType.PONG),
    "a welcome with no window": before_welcome(welcome(window_frames=0)),
    "a message of 4 GiB": after_welcome(b"\xff\xff\xff\xff\x06"),
    "an acknowledgement of a megabyte": after_welcome(HEADER.pack(MIB, MessageType.ACK)),
    "a welcome with a window too small": before_welcome(welcome(window_bytes=1)),
    "an unknown message": after_welcome(HEADER.pack(1, 99)),
    "an agent's message": after_welcome(HEADER.pack(1, MessageType.HELLO)),
    "a deep message": after_welcome(HEADER.pack(900_001, MessageType.ATTACHED) + b"[" * 900_000),
    "records that were never written": attached(next_sequence=1 << 40),
    "numbers out of range": attached(next_number=1 << 64),
    "no disks": attached(disks=[]),
    "another disk": attached(disks=[{**OTHER_DISK, "next_sequence": 0}]),
    # From here on the agent has frames under way, and knows what it has sent.
    "more messages than were sent": once_attached(
        MessageType.ACK, messages.encode_ack(REPLICA.bytes, 1 << 40, 1)
    ),
    "a later number than was sent": once_attached(
        MessageType.ACK, messages.encode_ack(REPLICA.bytes, 1, 1 << 60)
    ),
    "a verdict over too many blocks": once_attached(MessageType.VERDICT, verdict(1 << 31, 32)),
    "a verdict of another size": once_attached(MessageType.VERDICT, verdict(256, 3)),
    "a verdict beyond its blocks": once_attached(MessageType.VERDICT, verdict(1, 1)),
}
HARMLESS: tuple[tuple[MessageType, bytes], ...] = (
    (MessageType.ACK, messages.encode_ack(bytes(16), 1 << 60, 1 << 60)),  # of no group
    (MessageType.VERDICT, encode_verdict(Verdict(REPLICA.bytes, 12345678, 4, (0, 3)))),
    (MessageType.RESPONSE, messages.encode(messages.Response(id=999, data=[1] * 1000))),
    (MessageType.ERROR, messages.encode(Refusal(code="x", error="y", group="none"))),
    (MessageType.VERIFY, messages.encode(messages.Verify(group="none"))),
)


async def serve_and_say_what_nobody_asked_for(liar: Liar, stream: MessageStream) -> None:
    await liar.welcome(stream)
    for kind, payload in HARMLESS:
        await stream.send(kind, payload)
    await liar.attach(stream)
    await liar.acknowledge(stream)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    found = Source(tmp_path)
    yield found
    found.close()


@dataclass
class Stage:
    liar: Liar
    guest: Guest
    agent: Agent


def set_up(source: Source, base: Path, acts: list[Act]) -> Stage:
    entry = source.add("root", 8 * MIB)
    server = receiver(base)
    identity = source.disks.home.source_directory / "identity"
    identity.mkdir()
    key, request = make_key_and_request()
    (identity / KEY).write_text(key_to_pem(key))
    signed, _ = server.authority.sign(request, "web1", str(uuid4()))
    (identity / CERTIFICATE).write_text(signed)
    (identity / RECEIVER).write_text(json.dumps({"address": "vault:7420"}))
    liar = Liar(server, server.source_context("web1"), entry, source.watermark, acts)
    agent = Agent(source.disks.home, clock=source.clock)
    # The guest here has no server: the agent would give its ring back when all of it is durable.
    agent.disks.is_serving = lambda entry: True  # type: ignore[method-assign]
    return Stage(liar, source.guest(entry), agent)


async def replicate(stage: Stage, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Until a good receiver has three frames; what the agent's log warns of."""
    caplog.set_level(logging.INFO, "blockrepl")
    liar, agent = stage.liar, stage.agent
    async with trio.open_nursery() as nursery:
        agent._connect = lambda: liar.connect(nursery)
        nursery.start_soon(agent.run)
        written = 0
        with trio.fail_after(60):
            while liar.durable < 3:
                stage.guest.write(written % 8 * MIB, random_bytes(512, written))
                written += 1
                await trio.sleep(0.02)
        ring = agent.groups["web"].disks[0].ring
        assert ring is not None
        assert ring.dropped() == 0
        nursery.cancel_scope.cancel()
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any(record.exc_info for record in warned)
    return [record.getMessage() for record in warned]


async def test_every_lie_costs_a_session_and_a_line_and_the_guest_nothing(
    source: Source,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Guards, one by one, what AgentSession, decode_verdict, resume and SendWindow refuse.
    monkeypatch.setattr(backoff, "LAST_SECONDS", 0.02)
    stage = set_up(source, tmp_path_factory.getbasetemp(), list(LIES.values()))
    warned = await replicate(stage, caplog)
    assert stage.liar.sessions == len(LIES) + 1
    assert len(warned) == len(LIES), list(zip(LIES, warned, strict=False))
    assert all(line.startswith("no session with vault:7420: ") for line in warned)


async def test_what_nobody_asked_for_is_passed_over(
    source: Source, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    acts: list[Act] = [serve_and_say_what_nobody_asked_for]
    stage = set_up(source, tmp_path_factory.getbasetemp(), acts)
    assert await replicate(stage, caplog) == []
    assert stage.liar.sessions == 1
