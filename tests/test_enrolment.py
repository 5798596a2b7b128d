"""A token lets one source in; nothing else does, and a failed attempt leaves nothing behind."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_pair import Receiver, receiver
from trio.testing import MockClock, memory_stream_pair

from blockrepl.channel.certificates import (
    Authority,
    key_to_pem,
    make_key_and_request,
    read_identity,
)
from blockrepl.channel.enrolment import (
    CA,
    CERTIFICATE,
    JSON_MESSAGE,
    KEY,
    Application,
    Identity,
    Token,
    decode_token,
    encode_token,
    join,
    load_identity,
    serve_enrolment,
    split_address,
)
from blockrepl.channel.framing import MessageStream
from blockrepl.channel.handshake import (
    ENROL_SERVER_NAME,
    RECEIVER_SERVER_NAME,
    accept,
    connect,
    enrol_context,
)
from blockrepl.cli.main import run
from blockrepl.errors import BlockreplError, PeerError, StateError, StorageError, TrustError
from blockrepl.storage.trust import TrustStore

HOUR_NS = 3600 * 10**9


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Receiver:
    return receiver(tmp_path_factory.getbasetemp())


@pytest.fixture
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Receiver:
    return receiver(tmp_path_factory.getbasetemp(), 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TrustStore]:
    store = TrustStore(tmp_path / "trust.sqlite")
    yield store
    store.close()


@dataclass
class Running:
    """A receiver on loopback that enrols, and answers what came over the replication door."""

    server: Receiver
    store: TrustStore
    address: str
    offset_ns: int = 0
    wire: bytes = b""

    def clock(self) -> int:
        return time.time_ns() + self.offset_ns

    def token(self, *, fingerprint: str | None = None, secret: str | None = None) -> str:
        now = self.clock()
        return encode_token(
            Token(
                address=self.address,
                fingerprint=fingerprint or self.server.authority.fingerprint,
                secret=secret or self.store.create_invite(3600, [], now),
                expiry_ns=now + HOUR_NS,
            )
        )


@asynccontextmanager
async def running(server: Receiver, store: TrustStore) -> AsyncIterator[Running]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    place = Running(server, store, f"127.0.0.1:{listener.socket.getsockname()[1]}")

    async def serve(transport: trio.SocketStream) -> None:
        try:
            stream = await accept(transport, server.contexts)
            if stream.server_name == ENROL_SERVER_NAME:
                await serve_enrolment(stream, server.authority, store.redeem, place.clock)
                return
            certificate = stream.peer_certificate_der()
            assert certificate is not None
            identity = read_identity(certificate)
            async with MessageStream(stream, {1: 1000}) as messages:
                verdict = "revoked" if store.is_revoked(identity.serial) else identity.name
                await messages.send(1, verdict.encode())
        except (PeerError, TrustError):
            pass  # the client's side of the test says what went wrong

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield place
        nursery.cancel_scope.cancel()


async def hello_from(identity: Identity) -> str:
    """What the receiver calls this identity at the replication door."""
    host, port = split_address(identity.address)
    stream = await connect(
        await trio.open_tcp_stream(host, port), identity.context(), RECEIVER_SERVER_NAME
    )
    async with MessageStream(stream, {1: 1000}) as messages:
        received = await messages.receive()
    assert received is not None
    return bytes(received[1]).decode()


async def refused(token: str, name: str, directory: Path) -> BlockreplError:
    """Why joining fails; and that it leaves nothing behind."""
    before = sorted(directory.parent.iterdir())
    with pytest.raises(BlockreplError) as caught:
        await join(token, name, directory)
    assert sorted(directory.parent.iterdir()) == before
    return caught.value


async def test_a_token_makes_an_identity_that_the_receiver_knows(
    server: Receiver, store: TrustStore, tmp_path: Path
) -> None:
    directory = tmp_path / "source" / "identity"
    async with running(server, store) as place:
        identity = await join(place.token(), "web1", directory)
        assert identity.name == "web1"
        assert identity.address == place.address
        assert load_identity(directory) == identity
        (source,) = store.list_sources()
        assert (source.id, source.name, source.serial) == (
            identity.source_id,
            "web1",
            identity.serial,
        )
        assert await hello_from(identity) == "web1"
    assert sorted(path.name for path in directory.iterdir()) == [
        "ca.pem",
        "cert.pem",
        "key.pem",
        "receiver.json",
    ]
    assert (directory / "key.pem").stat().st_mode & 0o777 == 0o600


async def test_a_revoked_source_is_refused_at_once(
    server: Receiver, store: TrustStore, tmp_path: Path
) -> None:
    async with running(server, store) as place:
        identity = await join(place.token(), "web1", tmp_path / "identity")
        assert await hello_from(identity) == "web1"
        store.revoke("web1", place.clock())
        assert await hello_from(identity) == "revoked"
        again = await join(place.token(), "web1", tmp_path / "identity-2")
        assert await hello_from(again) == "web1"


async def test_used_expired_and_forged_tokens_are_refused(
    server: Receiver, store: TrustStore, tmp_path: Path
) -> None:
    async with running(server, store) as place:
        token = place.token()
        await join(token, "web1", tmp_path / "identity")
        used = await refused(token, "web2", tmp_path / "second")
        assert (used.code, bool(used.hint)) == ("used", True)
        forged = await refused(place.token(secret="guess"), "web2", tmp_path / "second")
        assert forged.code == "unknown"
        late = place.token()
        place.offset_ns = HOUR_NS
        expired = await refused(late, "web2", tmp_path / "second")
        assert expired.code == "expired"
    assert [source.name for source in store.list_sources()] == ["web1"]


async def test_a_taken_or_impossible_name_costs_no_token(
    server: Receiver, store: TrustStore, tmp_path: Path
) -> None:
    async with running(server, store) as place:
        await join(place.token(), "web1", tmp_path / "identity")
        token = place.token()
        taken = await refused(token, "web1", tmp_path / "second")
        assert taken.code == "name-taken"
        for name in ("", "../x", "Web", "a" * 64, "a\n"):
            assert (await refused(token, name, tmp_path / "second")).code == "name"
        await join(token, "web2", tmp_path / "second")


async def test_the_wrong_receiver_never_sees_the_secret(
    server: Receiver, stranger: Receiver, store: TrustStore, tmp_path: Path
) -> None:
    seen: list[str] = []
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    def note_secret(secret: str, now: int, *, name: str, source_id: str, serial: str) -> None:
        seen.append(secret)

    async def impostor(authority_of: Receiver) -> None:
        stream = await accept(await listener.accept(), stranger.contexts)
        with pytest.raises(PeerError):
            await serve_enrolment(stream, authority_of.authority, note_secret, time.time_ns)

    token = encode_token(
        Token(
            address=f"127.0.0.1:{listener.socket.getsockname()[1]}",
            fingerprint=server.authority.fingerprint,
            secret="precious",
            expiry_ns=time.time_ns() + HOUR_NS,
        )
    )
    # Its own CA has another fingerprint; the true CA did not issue the certificate it showed.
    for shown in (stranger, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(impostor, shown)
            error = await refused(token, "web1", tmp_path / "identity")
        assert (error.code, type(error)) == ("fingerprint", TrustError)
    await listener.aclose()
    assert seen == []


async def test_a_source_cannot_pass_for_the_receiver_when_others_join(
    server: Receiver, store: TrustStore, tmp_path: Path
) -> None:
    async with running(server, store) as place:
        mallory = await join(place.token(), "mallory", tmp_path / "mallory")
        token = decode_token(place.token())
    context = server.contexts[ENROL_SERVER_NAME]
    fake = type(context)(context.protocol)
    fake.load_cert_chain(mallory.directory / "cert.pem", mallory.directory / "key.pem")
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def impostor() -> None:
        stream = await accept(await listener.accept(), {ENROL_SERVER_NAME: fake})
        with pytest.raises(PeerError):
            await serve_enrolment(stream, server.authority, store.redeem, time.time_ns)

    address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(impostor)
        moved = encode_token(token.model_copy(update={"address": address}))
        assert (await refused(moved, "web1", tmp_path / "identity")).code == "fingerprint"


async def test_a_home_that_has_joined_is_not_overwritten(
    server: Receiver, store: TrustStore, tmp_path: Path
) -> None:
    async with running(server, store) as place:
        identity = await join(place.token(), "web1", tmp_path / "identity")
        token = place.token()
        error = await refused(token, "web2", tmp_path / "identity")
        assert (error.code, type(error)) == ("joined", StateError)
        assert load_identity(tmp_path / "identity") == identity
        await join(token, "web2", tmp_path / "second")


async def test_an_unreachable_receiver_is_said_so(tmp_path: Path) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
    await listener.aclose()
    token = encode_token(Token(address=address, fingerprint="0" * 64, secret="x", expiry_ns=1))
    error = await refused(token, "web1", tmp_path / "identity")
    assert error.code == "unreachable"
    assert str(error).endswith(": Connection refused")
    assert (await refused(token, "Web", tmp_path / "identity")).code == "name"
    assert (await refused(token[:-5], "web1", tmp_path / "identity")).code == "token"


@pytest.mark.parametrize(
    "address", ["vault", ":1", "vault:0", "vault:65536", "vault:" + "9" * 5000]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(PeerError, match="not an address"):
        split_address(address)


def test_a_bad_name_is_wrong_usage_before_anything_is_asked_or_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Guards check_name in agent join: it was the only bad name that ended with status 1.
    home = tmp_path / "home"
    assert run(["--home", str(home), "agent", "join", "br1.x", "--name", "Web 1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: 'Web 1' is no source's name. use up to 63 of a-z")
    assert not home.exists()


def test_a_home_that_has_not_joined_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="not joined"):
        load_identity(tmp_path)


@pytest.mark.parametrize("name", [KEY, CERTIFICATE, CA])
@pytest.mark.parametrize("content", [None, b"", b"damaged", b"\xff\xfe"])
async def test_an_identity_that_cannot_be_used_is_said_so(
    name: str, content: bytes | None, server: Receiver, store: TrustStore, tmp_path: Path
) -> None:
    # Guards the except in Identity.context: OpenSSL says "[SSL] PEM lib", and names no file.
    async with running(server, store) as place:
        identity = await join(place.token(), "web1", tmp_path / "identity")
    path = identity.directory / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError, match=str(identity.directory)) as caught:
        identity.context()
    assert ("damaged" in str(caught.value)) == (content is not None)
    assert "join again" in caught.value.hint


# What strangers may send through the enrolment door


@asynccontextmanager
async def enrolment_door(
    server: Receiver, expected: type[Exception]
) -> AsyncIterator[MessageStream]:
    """A stranger's messages to a receiver that must end with the expected error."""
    client_side, server_side = memory_stream_pair()

    def nobody(secret: str, now: int, *, name: str, source_id: str, serial: str) -> None:
        raise AssertionError("redeemed")

    async def serve() -> None:
        stream = await accept(server_side, server.contexts)
        with pytest.raises(expected):
            await serve_enrolment(stream, server.authority, nobody, time.time_ns)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        stream = await connect(client_side, enrol_context(), ENROL_SERVER_NAME)
        async with MessageStream(stream, {JSON_MESSAGE: 1 << 20}) as messages:
            assert await messages.receive() is not None
            yield messages


@pytest.mark.parametrize(
    ("message_type", "payload"),
    [
        (JSON_MESSAGE, b""),
        (JSON_MESSAGE, b"{}"),
        (JSON_MESSAGE, b"[" * 1000),
        (JSON_MESSAGE, b'{"secret": 1, "request_pem": "", "source_name": ""}'),
        (JSON_MESSAGE, b'{"secret": "\\ud800", "request_pem": "", "source_name": ""}'),
        (JSON_MESSAGE, bytes(100_000)),
        (2, b"frame"),
    ],
)
async def test_a_malformed_application_is_dropped(
    server: Receiver, message_type: int, payload: bytes
) -> None:
    async with enrolment_door(server, PeerError) as messages:
        await messages.send(message_type, payload)
        assert await messages.receive() is None


async def test_a_stranger_who_says_nothing_is_dropped(
    server: Receiver, autojump_clock: MockClock
) -> None:
    async with enrolment_door(server, PeerError) as messages:
        assert await messages.receive() is None


@pytest.mark.parametrize("request_pem", ["", "junk", "-----BEGIN CERTIFICATE REQUEST-----"])
async def test_a_bad_request_costs_no_token(
    server: Receiver, store: TrustStore, request_pem: str
) -> None:
    async with running(server, store) as place:
        token = decode_token(place.token())
        host, port = split_address(place.address)
        stream = await connect(
            await trio.open_tcp_stream(host, port), enrol_context(), ENROL_SERVER_NAME
        )
        async with MessageStream(stream, {JSON_MESSAGE: 1 << 16}) as messages:
            await messages.receive()
            application = Application(
                secret=token.secret, request_pem=request_pem, source_name="web1"
            )
            await messages.send(JSON_MESSAGE, application.model_dump_json().encode())
            answer = await messages.receive()
        assert answer is not None
        assert "does not parse" in json.loads(bytes(answer[1]))["error"]
    assert store.list_sources() == []
    store.redeem(token.secret, place.clock(), name="web1", source_id="i", serial="s")


def test_the_request_holds_no_private_key() -> None:
    key, request_pem = make_key_and_request()
    private = key.private_numbers().private_value.to_bytes(32, "big")
    body = base64.b64decode("".join(request_pem.splitlines()[1:-1]))
    assert private not in body
    der = serialization.load_pem_private_key(key_to_pem(key).encode(), None)
    assert der.public_key() == key.public_key()


# Tokens


TOKEN = Token(
    address="[2001:db8::1]:7500", fingerprint="ab" * 32, secret="s" * 43, expiry_ns=1_800_000_000
)


def test_a_token_is_one_word_that_says_all() -> None:
    text = encode_token(TOKEN)
    assert text.startswith("br1.")
    assert text.isascii()
    assert len(text.split()) == 1
    assert len(text) < 400
    assert decode_token(text) == TOKEN
    assert decode_token(f"  {text}\n") == TOKEN
    assert split_address(TOKEN.address) == ("2001:db8::1", 7500)


def test_a_token_cut_anywhere_is_refused() -> None:
    text = encode_token(TOKEN)
    for cut in range(len(text) - 1):
        with pytest.raises(TrustError, match="whole token") as caught:
            decode_token(text[:cut])
        assert caught.value.hint


def wrapped(document: object) -> str:
    body = base64.urlsafe_b64encode(json.dumps(document).encode()).decode()
    return "br1." + body.rstrip("=")


FIELDS = TOKEN.model_dump()


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        FIELDS | {"extra": 1},
        FIELDS | {"address": "receiver"},
        FIELDS | {"address": "receiver:0"},
        FIELDS | {"address": "receiver:99999"},
        FIELDS | {"address": ":1"},
        FIELDS | {"address": "\ud800:1"},
        FIELDS | {"fingerprint": "ab"},
        FIELDS | {"fingerprint": "ab" * 31 + "a\n"},
        FIELDS | {"secret": ""},
        FIELDS | {"expiry_ns": "1"},
        FIELDS | {"expiry_ns": -1},
        FIELDS | {"expiry_ns": 10**30},
        FIELDS | {"expiry_ns": True},
    ],
)
def test_a_token_with_wrong_fields_is_refused(document: object) -> None:
    with pytest.raises(TrustError):
        decode_token(wrapped(document))


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=200)
    | st.text(max_size=200).map("br1.".__add__)
    | st.binary(max_size=200).map(lambda body: "br1." + base64.urlsafe_b64encode(body).decode())
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(sorted(FIELDS)), inner),
    ).map(wrapped)
)
def test_no_text_makes_the_token_parser_fail_otherwise(text: str) -> None:
    try:
        token = decode_token(text)
    except TrustError:
        return
    assert decode_token(encode_token(token)) == token


def test_no_clock_ends_a_certificate(tmp_path: Path) -> None:
    # All sources would be cut off on one day; or at once, where the receiver was set up by a clock
    # that was ahead.
    authority = Authority.create(tmp_path / "authority")
    _, request = make_key_and_request()
    signed, _ = authority.sign(request, "web1", str(uuid4()))
    server = authority.server_certificate_path.read_text()
    for text in (authority.ca_pem, server, signed):
        certificate = x509.load_pem_x509_certificate(text.encode())
        assert certificate.not_valid_before_utc.year == 2020
        assert certificate.not_valid_after_utc.year == 9999
