"""Messages arrive whole or not at all, and a peer can neither exhaust nor stall the reader."""

from __future__ import annotations

import os
import ssl
import struct
from pathlib import Path

import numpy
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_pair import Receiver, receiver, secure_pair, shake_hands
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from blockrepl import limits
from blockrepl.channel import framing
from blockrepl.channel.framing import HEADER, MessageStream
from blockrepl.channel.secure_stream import SecureStream
from blockrepl.errors import PeerError
from blockrepl.formats.messages import MessageType
from blockrepl.units import MIB

CONTROL, DATA = int(MessageType.HELLO), int(MessageType.DATA)
BOUNDS = {CONTROL: 100, DATA: limits.MESSAGE_BYTES_MAX}


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Receiver:
    return receiver(tmp_path_factory.getbasetemp())


@pytest.fixture
def client(server: Receiver) -> ssl.SSLContext:
    return server.source_context("web1")


@pytest.fixture
async def raw(server: Receiver, client: ssl.SSLContext) -> tuple[SecureStream, MessageStream]:
    """A peer that may send any bytes, and the reader under test."""
    ours, theirs = await secure_pair(server, client)
    return ours, MessageStream(theirs, BOUNDS)


Raw = tuple[SecureStream, MessageStream]


def message(message_type: int, payload: bytes) -> bytes:
    return HEADER.pack(1 + len(payload), message_type) + payload


async def receive(reader: MessageStream) -> tuple[int, bytes] | None:
    received = await reader.receive()
    return None if received is None else (received[0], bytes(received[1]))


def test_the_header_is_as_the_table_says() -> None:
    assert framing.__doc__ is not None
    rows = [line.split() for line in framing.__doc__.splitlines() if line[:1].isdigit()]
    assert [(row[0], row[1]) for row in rows] == [("0", "4"), ("4", "1"), ("5", "*")]
    assert message(7, b"ab") == b"\x03\x00\x00\x00\x07ab"
    assert HEADER.size == 5


async def test_messages_arrive_in_order_and_end_cleanly(raw: Raw) -> None:
    peer, reader = raw
    writer = MessageStream(peer, BOUNDS)
    frame = os.urandom(3 * MIB)
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            await writer.send(CONTROL)
            await writer.send(DATA, frame[:1000], memoryview(frame)[1000:])
            await writer.send(CONTROL, b"bye", numpy.arange(2, dtype="<u2").data)
            await writer.aclose()

        nursery.start_soon(write)
        assert await receive(reader) == (CONTROL, b"")
        assert await receive(reader) == (DATA, frame)
        assert await receive(reader) == (CONTROL, b"bye\x00\x00\x01\x00")
        assert await reader.receive() is None
        assert await reader.receive() is None
    await reader.aclose()


async def test_a_received_payload_is_the_callers_to_keep(raw: Raw) -> None:
    peer, reader = raw
    await peer.send_all(message(DATA, b"a" * 1000) + message(DATA, b"b" * 1000))
    received = [await reader.receive(), await reader.receive()]
    assert [one[1].tobytes() for one in received if one] == [b"a" * 1000, b"b" * 1000]
    await peer.aclose()
    await reader.aclose()


async def test_reassembly_at_every_split(raw: Raw) -> None:
    peer, reader = raw
    wire = message(CONTROL, b"") + message(DATA, b"payload") + message(CONTROL, b"x")
    expected = [(CONTROL, b""), (DATA, b"payload"), (CONTROL, b"x")]
    for split in range(len(wire) + 1):
        for part in (wire[:split], wire[split:]):
            await peer.send_all(part)
        assert [await receive(reader) for _ in expected] == expected
    async with trio.open_nursery() as nursery:

        async def one_byte_at_a_time() -> None:
            for byte in wire:
                await peer.send_all(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()

        nursery.start_soon(one_byte_at_a_time)
        assert [await receive(reader) for _ in expected] == expected
    await peer.aclose()
    assert await reader.receive() is None
    await reader.aclose()


async def test_an_end_inside_a_message_is_the_peers_fault(
    server: Receiver, client: ssl.SSLContext
) -> None:
    wire = message(DATA, b"payload")
    for cut in range(1, len(wire)):
        peer, theirs = await secure_pair(server, client)
        reader = MessageStream(theirs, BOUNDS)
        await peer.send_all(wire[:cut])
        await peer.aclose()
        with pytest.raises(PeerError, match="early"):
            await reader.receive()
        await reader.aclose()


async def test_a_lost_connection_is_the_peers_fault(raw: Raw) -> None:
    peer, reader = raw
    await peer.transport.aclose()
    with pytest.raises(PeerError) as caught:
        await reader.receive()
    assert caught.value.code == "disconnected"
    with pytest.raises(PeerError) as caught:
        await reader.send(CONTROL, b"x")
    assert caught.value.code == "disconnected"
    await reader.aclose()


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(102, CONTROL),
        HEADER.pack(limits.MESSAGE_BYTES_MAX + 2, DATA),
        HEADER.pack(0xFFFFFFFF, DATA),
        HEADER.pack(0, DATA),
        HEADER.pack(1, 99),
        b"GET /",
    ],
)
async def test_a_bad_header_is_refused_before_memory_is_taken(
    raw: Raw, header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, reader = raw

    def no_memory(*arguments: object, **options: object) -> None:
        raise AssertionError("memory taken")

    monkeypatch.setattr(numpy, "empty", no_memory)
    await peer.send_all(header)
    with pytest.raises(PeerError):
        await reader.receive()
    await peer.aclose()
    await reader.aclose()


async def test_the_largest_message_is_accepted(raw: Raw) -> None:
    peer, reader = raw
    writer = MessageStream(peer, BOUNDS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.send, DATA, bytes(limits.MESSAGE_BYTES_MAX))
        received = await reader.receive()
    assert received is not None
    assert len(received[1]) == limits.MESSAGE_BYTES_MAX
    with pytest.raises(ValueError, match="too many"):
        await writer.send(DATA, bytes(limits.MESSAGE_BYTES_MAX + 1))
    await peer.aclose()
    await reader.aclose()


async def test_many_senders_do_not_mix_their_messages(raw: Raw) -> None:
    peer, reader = raw
    writer = MessageStream(peer, BOUNDS)
    payloads = [bytes([number]) * 100_000 for number in range(20)]
    async with trio.open_nursery() as nursery:
        for payload in payloads:
            nursery.start_soon(writer.send, DATA, payload[:1], payload[1:])
        received = [await receive(reader) for _ in payloads]
    assert sorted(one[1] for one in received if one is not None) == payloads
    await peer.aclose()
    await reader.aclose()


async def test_a_silent_peer_is_given_up(raw: Raw, autojump_clock: MockClock) -> None:
    peer, reader = raw
    with pytest.raises(PeerError, match="silent peer") as caught:
        await reader.receive()
    assert caught.value.code == "silent"
    assert trio.current_time() == pytest.approx(limits.IDLE_SECONDS)
    await peer.aclose()
    await reader.aclose()


async def test_a_peer_that_trickles_a_message_is_given_up(
    raw: Raw, autojump_clock: MockClock
) -> None:
    peer, reader = raw

    async def trickle() -> None:
        for byte in message(DATA, bytes(1000)):
            await peer.send_all(bytes([byte]))
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        with pytest.raises(PeerError, match="slow peer"):
            await reader.receive()
        nursery.cancel_scope.cancel()
    assert trio.current_time() == pytest.approx(limits.MESSAGE_SECONDS)
    with pytest.raises(trio.BrokenResourceError):
        await reader.receive()
    await trio.aclose_forcefully(peer)
    await reader.aclose()


SLOW = int(limits.MESSAGE_PIECE_BYTES / limits.MESSAGE_SECONDS * 1.1)  # bytes a second


async def test_a_large_message_may_take_as_long_as_the_slowest_link_needs(
    raw: Raw, autojump_clock: MockClock
) -> None:
    peer, reader = raw
    wire = message(DATA, os.urandom(4 * MIB))

    async def send() -> None:
        for at in range(0, len(wire), SLOW):
            await trio.sleep(1)
            await peer.send_all(wire[at : at + SLOW])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert await receive(reader) == (DATA, wire[HEADER.size :])
    assert trio.current_time() > 1.5 * limits.MESSAGE_SECONDS
    await peer.aclose()
    await reader.aclose()


async def test_a_large_message_may_be_taken_as_slowly(
    server: Receiver, client: ssl.SSLContext, autojump_clock: MockClock
) -> None:
    ours, theirs = await shake_hands(*lockstep_stream_pair(), server, client)
    writer = MessageStream(ours, BOUNDS)
    wire = message(DATA, bytes(4 * MIB))

    async def read() -> None:
        taken = 0
        while taken < len(wire):
            await trio.sleep(1)
            part = memoryview(bytearray(min(SLOW, len(wire) - taken)))
            await theirs.receive_into(part)
            taken += len(part)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await writer.send(DATA, wire[HEADER.size :])
    assert trio.current_time() > 1.5 * limits.MESSAGE_SECONDS


async def test_a_peer_that_does_not_read_is_given_up(
    server: Receiver, client: ssl.SSLContext, autojump_clock: MockClock
) -> None:
    ours, theirs = await shake_hands(*lockstep_stream_pair(), server, client)
    writer = MessageStream(ours, BOUNDS)
    with pytest.raises(PeerError, match="silent peer"):
        await writer.send(DATA, b"x")
    with pytest.raises(PeerError) as caught:
        await writer.send(DATA, b"x")
    assert caught.value.code == "disconnected"
    await ours.aclose()
    await trio.aclose_forcefully(theirs)


async def test_a_receive_cancelled_between_messages_loses_nothing(raw: Raw) -> None:
    peer, reader = raw
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.receive)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    await peer.send_all(message(CONTROL, b"here"))
    assert await receive(reader) == (CONTROL, b"here")
    await peer.aclose()
    await reader.aclose()


# Hypothesis wants its function to return before the next example: one Trio run for each.


@settings(max_examples=150, deadline=None)
@given(
    wire=st.binary(max_size=300)
    | st.builds(
        lambda length, kind, rest: struct.pack("<IB", length, kind) + rest,
        st.integers(0, 400),
        st.integers(0, 4),
        st.binary(max_size=300),
    ),
    splits=st.lists(st.integers(1, 50), max_size=10),
)
def test_any_bytes_give_messages_or_a_peer_error(
    wire: bytes, splits: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    trio.run(read_all, wire, splits, tmp_path_factory.getbasetemp())


async def read_all(wire: bytes, splits: list[int], base: Path) -> None:
    server = receiver(base)
    peer, theirs = await secure_pair(server, FUZZING_CLIENT.get(server))
    reader = MessageStream(theirs, BOUNDS)
    rest = memoryview(wire)
    for split in splits:
        await peer.send_all(rest[:split])
        rest = rest[split:]
    await peer.send_all(rest)
    await peer.aclose()
    seen = bytearray()
    try:
        while (received := await reader.receive()) is not None:
            seen += message(received[0], bytes(received[1]))
    except PeerError:
        assert len(seen) < len(wire)
    else:
        assert seen == wire
    assert wire.startswith(seen)
    await reader.aclose()


class _FuzzingClient:
    """One certificate for all examples: making one costs more than the example."""

    def __init__(self) -> None:
        self._context: ssl.SSLContext | None = None

    def get(self, server: Receiver) -> ssl.SSLContext:
        if self._context is None:
            self._context = server.source_context("fuzz")
        return self._context


FUZZING_CLIENT = _FuzzingClient()


async def test_a_message_is_taken_when_it_is_its_turn_and_encrypted_at_once(
    server: Receiver, client: ssl.SSLContext
) -> None:
    # What an agent sends is in the ring's memory, which may be the guest's again soon after.
    ours, theirs = await shake_hands(*lockstep_stream_pair(), server, client)
    writer, reader = MessageStream(ours, BOUNDS), MessageStream(theirs, BOUNDS)
    first, second = bytearray(b"a" * 3 * MIB), bytearray(b"a" * 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.send_taken, DATA, len(first), lambda: [first])
        await wait_all_tasks_blocked()
        nursery.start_soon(writer.send_taken, DATA, len(second), lambda: [second])
        await wait_all_tasks_blocked()
        first[:], second[:] = b"b" * len(first), b"b" * len(second)
        assert await receive(reader) == (DATA, b"a" * len(first))
        assert await receive(reader) == (DATA, b"b" * len(second))
