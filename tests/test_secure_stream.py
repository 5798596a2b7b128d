"""The secure stream keeps trio's contract, and lets in only who may come in."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest
import trio
from secure_pair import Receiver, receiver, secure_pair, shake_hands
from trio.testing import (
    MockClock,
    check_two_way_stream,
    lockstep_stream_pair,
    memory_stream_pair,
)

from blockrepl import limits
from blockrepl.channel.certificates import Authority, read_identity
from blockrepl.channel.handshake import (
    ENROL_SERVER_NAME,
    RECEIVER_SERVER_NAME,
    _ServerNamePeek,
    accept,
    client_context,
    connect,
    enrol_context,
)
from blockrepl.channel.secure_stream import SecureStream
from blockrepl.errors import PeerError, StateError, StorageError, TrustError
from blockrepl.units import MIB

Ends = tuple[SecureStream, SecureStream]


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Receiver:
    return receiver(tmp_path_factory.getbasetemp())


@pytest.fixture
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Receiver:
    return receiver(tmp_path_factory.getbasetemp(), 1)


@pytest.fixture
def client(server: Receiver) -> ssl.SSLContext:
    return server.source_context("web1")


# The contract of a stream


async def test_keeps_the_contract_of_a_two_way_stream(
    server: Receiver, client: ssl.SSLContext, autojump_clock: MockClock
) -> None:
    async def over_lockstep() -> Ends:
        return await shake_hands(*lockstep_stream_pair(), server, client)

    async def over_memory() -> Ends:
        return await secure_pair(server, client)

    await check_two_way_stream(over_memory, over_lockstep)
    await check_two_way_stream(over_lockstep, over_lockstep)


async def test_keeps_the_contract_over_sockets(server: Receiver, client: ssl.SSLContext) -> None:
    async def over_sockets() -> Ends:
        ours, theirs = trio.socket.socketpair()
        return await shake_hands(trio.SocketStream(ours), trio.SocketStream(theirs), server, client)

    await check_two_way_stream(over_sockets, None)


async def test_many_buffers_of_all_sizes_arrive_in_order(
    server: Receiver, client: ssl.SSLContext
) -> None:
    sizes = [0, 1, 5, 16 * 1024, 16 * 1024 + 1, 3 * MIB + 7, 0, 2]
    buffers = [os.urandom(size) for size in sizes]
    ours, theirs = await secure_pair(server, client)
    received = memoryview(bytearray(sum(sizes)))
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_many, buffers)
        nursery.start_soon(theirs.receive_into, received)
    assert bytes(received) == b"".join(buffers)


async def test_buffers_of_other_than_bytes_are_sent_as_their_memory(
    server: Receiver, client: ssl.SSLContext
) -> None:
    ours, theirs = await secure_pair(server, client)
    received = bytearray(8)
    async with ours, theirs, trio.open_nursery() as nursery:
        words = memoryview(b"abcdefgh").cast("I")
        nursery.start_soon(ours.send_many, [words[:0], words])
        nursery.start_soon(theirs.receive_into, memoryview(received))
    assert received == b"abcdefgh"


async def test_an_end_without_close_notify_is_no_clean_end(
    server: Receiver, client: ssl.SSLContext
) -> None:
    ours, theirs = await secure_pair(server, client)
    await ours.transport.aclose()
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError):
            await theirs.receive_some(1)
    await theirs.aclose()


async def test_a_changed_byte_breaks_the_stream(server: Receiver, client: ssl.SSLContext) -> None:
    client_side, server_side = memory_stream_pair()
    ours, theirs = await shake_hands(client_side, server_side, server, client)

    await ours.send_all(b"payload")
    wire = bytearray(await server_side.receive_some(1000))
    wire[-1] ^= 1
    await client_side.send_all(bytes(wire))
    with pytest.raises(trio.BrokenResourceError):
        await theirs.receive_some(100)
    await ours.aclose()
    await theirs.aclose()


async def test_end_inside_a_wanted_block_is_the_peers_fault(
    server: Receiver, client: ssl.SSLContext
) -> None:
    ours, theirs = await secure_pair(server, client)
    await ours.send_all(b"abc")
    await ours.aclose()
    with pytest.raises(PeerError, match="2 bytes early"):
        await theirs.receive_into(memoryview(bytearray(5)))
    await theirs.aclose()


async def test_a_send_cut_short_breaks_only_the_sending_direction(
    server: Receiver, client: ssl.SSLContext
) -> None:
    ours, theirs = await shake_hands(*lockstep_stream_pair(), server, client)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.send_all, b"x" * 100)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    with pytest.raises(trio.BrokenResourceError):
        await ours.send_all(b"y")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.send_all, b"still here")
        assert await ours.receive_some(100) == b"still here"
    await ours.aclose()
    await theirs.aclose()


async def test_a_cancelled_receive_loses_nothing(server: Receiver, client: ssl.SSLContext) -> None:
    ours, theirs = await secure_pair(server, client)
    with trio.move_on_after(0):
        await theirs.receive_some(10)
    await ours.send_all(b"whole")
    assert await theirs.receive_some(10) == b"whole"
    await ours.aclose()
    await theirs.aclose()


async def test_closing_does_not_wait_for_a_peer_that_does_not_read(
    server: Receiver, client: ssl.SSLContext, autojump_clock: MockClock
) -> None:
    ours, theirs = await shake_hands(*lockstep_stream_pair(), server, client)
    started = trio.current_time()
    await ours.aclose()
    assert trio.current_time() - started == pytest.approx(limits.CLOSE_SECONDS)
    await trio.aclose_forcefully(theirs)


async def test_no_payload_in_the_clear(server: Receiver, client: ssl.SSLContext) -> None:
    client_side, server_side = memory_stream_pair()
    ours, theirs = await shake_hands(client_side, server_side, server, client)
    await ours.send_all(b"attack at dawn" * 1000)
    assert b"attack" not in await server_side.receive_some(MIB)
    await trio.aclose_forcefully(ours)
    await trio.aclose_forcefully(theirs)


# Who is let in


async def test_both_ends_know_each_other(server: Receiver, client: ssl.SSLContext) -> None:
    ours, theirs = await secure_pair(server, client)
    certificate = theirs.peer_certificate_der()
    assert certificate is not None
    assert read_identity(certificate).name == "web1"
    assert theirs.server_name == RECEIVER_SERVER_NAME
    await ours.aclose()
    await theirs.aclose()


async def failed_handshake(
    server: Receiver, client: ssl.SSLContext, server_name: str
) -> tuple[BaseException, BaseException]:
    """What the client and the server are told. Both transports are closed afterwards."""
    client_side, server_side = memory_stream_pair()
    told: dict[str, BaseException] = {}

    async def on_server() -> None:
        with pytest.raises((PeerError, TrustError)) as caught:
            await accept(server_side, server.contexts)
        told["server"] = caught.value

    async with trio.open_nursery() as nursery:
        nursery.start_soon(on_server)
        with pytest.raises((PeerError, TrustError)) as caught:
            await connect(client_side, client, server_name)
    for side in (client_side, server_side):
        with pytest.raises(trio.ClosedResourceError):
            await side.send_all(b"x")
    return caught.value, told["server"]


async def test_a_source_of_another_authority_is_refused_and_told(
    server: Receiver, stranger: Receiver
) -> None:
    intruder = stranger.source_context("web1", ca_pem=server.authority.ca_pem)
    told_client, told_server = await failed_handshake(server, intruder, RECEIVER_SERVER_NAME)
    assert isinstance(told_client, TrustError)
    assert told_client.code == "rejected"
    assert "unknown ca" in str(told_client)
    assert "agent join" in told_client.hint
    assert isinstance(told_server, TrustError)


async def test_a_source_without_a_certificate_is_refused_and_told(server: Receiver) -> None:
    told_client, told_server = await failed_handshake(server, enrol_context(), RECEIVER_SERVER_NAME)
    assert isinstance(told_client, TrustError)
    assert "certificate required" in str(told_client)
    assert isinstance(told_server, TrustError)


async def test_a_receiver_of_another_authority_is_refused(
    server: Receiver, stranger: Receiver, client: ssl.SSLContext
) -> None:
    told_client, told_server = await failed_handshake(stranger, client, RECEIVER_SERVER_NAME)
    assert isinstance(told_client, TrustError)
    assert told_client.code == "certificate"
    assert isinstance(told_server, TrustError)
    assert "the source does not accept this receiver's certificate (unknown ca)" in str(told_server)


async def test_a_source_cannot_pass_for_the_receiver(
    server: Receiver, client: ssl.SSLContext
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.source_context("mallory")
    serial = max(server.directory.glob("*.key"), key=lambda path: path.stat().st_mtime_ns)
    context.load_cert_chain(serial.with_suffix(""), serial)
    fake = Receiver(server.directory, server.authority, {RECEIVER_SERVER_NAME: context})
    told_client, _ = await failed_handshake(fake, client, RECEIVER_SERVER_NAME)
    assert isinstance(told_client, TrustError)


async def test_the_receivers_own_certificate_is_no_source(server: Receiver) -> None:
    authority = server.authority
    context = client_context(
        authority.ca_pem, authority.server_certificate_path, authority.server_key_path
    )
    told_client, _ = await failed_handshake(server, context, RECEIVER_SERVER_NAME)
    assert isinstance(told_client, TrustError)
    with pytest.raises(TrustError, match="not that of a source"):
        read_identity(authority.server_certificate_path.read_text())


async def test_the_enrolment_door_asks_for_no_certificate(server: Receiver) -> None:
    client_side, server_side = memory_stream_pair()
    ours, theirs = await shake_hands(
        client_side, server_side, server, enrol_context(), ENROL_SERVER_NAME
    )
    assert theirs.server_name == ENROL_SERVER_NAME
    assert theirs.peer_certificate_der() is None
    await ours.aclose()
    await theirs.aclose()


async def test_another_server_name_is_dropped(server: Receiver, client: ssl.SSLContext) -> None:
    client.check_hostname = False
    _, told_server = await failed_handshake(server, client, "example.org")
    assert isinstance(told_server, PeerError)
    assert "example.org" in str(told_server)


async def test_older_tls_is_dropped(server: Receiver) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    told_client, told_server = await failed_handshake(server, old, ENROL_SERVER_NAME)
    assert isinstance(told_client, PeerError)
    assert isinstance(told_server, PeerError)


# Garbage, silence and strangers


GARBAGE = {
    "plain text": b"GET / HTTP/1.1\r\nHost: receiver.blockrepl\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    "zeros": bytes(100),
    "ones": b"\xff" * 100,
    "alert": b"\x15\x03\x03\x00\x02\x02\x28",
    "no hello": b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00",
    "oversized": b"\x16\x03\x01\x40\x00\x01\x00\xff\xff" + bytes(limits.CLIENT_HELLO_BYTES_MAX),
}


@pytest.mark.parametrize("sent", GARBAGE.values(), ids=GARBAGE.keys())
async def test_garbage_is_dropped_at_once(
    server: Receiver, sent: bytes, autojump_clock: MockClock
) -> None:
    client_side, server_side = memory_stream_pair()
    await client_side.send_all(sent)
    with pytest.raises(PeerError):
        await accept(server_side, server.contexts)
    assert trio.current_time() < limits.HANDSHAKE_SECONDS
    with pytest.raises(trio.ClosedResourceError):
        await server_side.receive_some(1)


@pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
async def test_a_silent_peer_is_dropped_at_the_deadline(
    server: Receiver, sent: bytes, autojump_clock: MockClock
) -> None:
    client_side, server_side = memory_stream_pair()
    if sent:
        await client_side.send_all(sent)
    with pytest.raises(PeerError, match="silent") as caught:
        await accept(server_side, server.contexts)
    assert caught.value.code == "silent"
    assert trio.current_time() == pytest.approx(limits.HANDSHAKE_SECONDS)
    with pytest.raises(trio.BrokenResourceError):
        await client_side.send_all(b"x")


async def test_a_trickling_peer_is_dropped_at_the_deadline(
    server: Receiver, autojump_clock: MockClock
) -> None:
    client_side, server_side = memory_stream_pair()

    async def trickle() -> None:
        for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(400):
            await trio.sleep(0.7)  # the deadline falls between two bytes
            await client_side.send_all(bytes([byte]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        with pytest.raises(PeerError, match="silent"):
            await accept(server_side, server.contexts)
        nursery.cancel_scope.cancel()
    assert trio.current_time() == pytest.approx(limits.HANDSHAKE_SECONDS)


async def test_a_server_that_says_nothing_is_given_up(
    client: ssl.SSLContext, autojump_clock: MockClock
) -> None:
    client_side, server_side = memory_stream_pair()
    with pytest.raises(PeerError, match="silent"):
        await connect(client_side, client, RECEIVER_SERVER_NAME)
    await server_side.aclose()


async def test_a_server_that_is_no_tls_server_is_named_as_such(client: ssl.SSLContext) -> None:
    client_side, server_side = memory_stream_pair()
    await server_side.send_all(b"220 mail.example.org ESMTP\r\n")
    with pytest.raises(PeerError, match=r"does not speak our TLS 1\.3") as caught:
        await connect(client_side, client, RECEIVER_SERVER_NAME)
    assert "address" in caught.value.hint


async def test_a_hello_in_single_bytes_is_understood(
    server: Receiver, client: ssl.SSLContext
) -> None:
    client_side, server_side = memory_stream_pair()
    inner_client, inner_server = memory_stream_pair()

    async def slice_up() -> None:
        while data := await server_side.receive_some(65536):
            for byte in data:
                await inner_client.send_all(bytes([byte]))

    async def pass_back() -> None:
        while data := await inner_client.receive_some(65536):
            await server_side.send_all(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(slice_up)
        nursery.start_soon(pass_back)
        ours, theirs = await shake_hands(client_side, inner_server, server, client)
        await ours.send_all(b"hello")
        assert await theirs.receive_some(10) == b"hello"
        nursery.cancel_scope.cancel()
    await trio.aclose_forcefully(ours)
    await trio.aclose_forcefully(theirs)


async def test_a_rejected_source_is_told_over_tcp_too(server: Receiver, stranger: Receiver) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    intruder = stranger.source_context("web1", ca_pem=server.authority.ca_pem)

    async def refuse_one() -> None:
        with pytest.raises(TrustError):
            await accept(await listener.accept(), server.contexts)

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(refuse_one)
        transport = await trio.open_tcp_stream("127.0.0.1", port)
        with pytest.raises(TrustError, match="does not accept"):
            await connect(transport, intruder, RECEIVER_SERVER_NAME)


# The authority's directory


def test_an_authority_is_made_once_and_loads_again(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "authority"
    made = Authority.create(directory)
    loaded = Authority.load(directory)
    assert loaded.fingerprint == made.fingerprint
    assert loaded.ca_pem == made.ca_pem
    assert (directory / "ca.key").stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    with pytest.raises(StateError, match="already"):
        Authority.create(directory)
    assert Authority.load(directory).fingerprint == made.fingerprint
    assert [path.name for path in directory.parent.iterdir()] == ["authority"]


def test_a_missing_or_damaged_authority_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no receiver"):
        Authority.load(tmp_path)
    Authority.create(tmp_path / "authority")
    (tmp_path / "authority" / "ca.key").write_text("junk")
    with pytest.raises(StorageError, match="unreadable"):
        Authority.load(tmp_path / "authority")


def test_strangers_who_say_hello_leave_no_memory_behind() -> None:
    # Guards _PEEK_CONTEXT: a context for each stranger, 60 KB, was never given back.
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def say_hello() -> None:
        with pytest.raises(PeerError):
            _ServerNamePeek().feed(b"GET / HTTP/1.1\r\n\r\n")

    say_hello()
    before = resident_bytes()
    for _ in range(1000):
        say_hello()
    assert resident_bytes() - before < 20 * MIB
