"""Every bound of limits.py is used; those that no other test passes are passed here."""

from __future__ import annotations

import base64
import inspect
import json
import re
import ssl
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import pytest
import trio
from pumping import Source, until
from replica_workload import put, start
from secure_pair import receiver
from test_hostile_peers import DROPPED
from test_hostile_receivers import set_up, source
from test_receiver_service import Vault, vault
from trio.testing import memory_stream_pair

from blockrepl import limits
from blockrepl.channel import certificates, enrolment
from blockrepl.channel.framing import HEADER, MessageStream
from blockrepl.channel.handshake import (
    ENROL_SERVER_NAME,
    RECEIVER_SERVER_NAME,
    accept,
    connect,
    enrol_context,
)
from blockrepl.errors import PeerError, TrustError, UsageError
from blockrepl.formats import messages
from blockrepl.formats.messages import Attach, AttachDisk
from blockrepl.storage.spool import Spool, SpoolLimits
from blockrepl.storage.trust import TrustStore
from blockrepl.units import GIB, KIB, MIB

__all__ = ["source", "vault"]  # fixtures
NAMES = re.findall(r"^([A-Z][A-Z_]+) =", inspect.getsource(limits), re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_every_limit_is_used(name: str) -> None:
    package = Path(limits.__file__).parent
    users = [
        path
        for path in (*package.rglob("*.py"), *package.rglob("*.c"))
        if path != Path(limits.__file__) and re.search(rf"\b{name}\b", path.read_text())
    ]
    assert users


# --- at the receiver's door


async def test_more_strangers_than_there_may_be_are_closed_at_once(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards HANDSHAKES_MAX in Receiver.serve.
    monkeypatch.setattr(limits, "HANDSHAKE_SECONDS", 60.0)
    await vault.join("web1")
    monkeypatch.setattr(limits, "HANDSHAKES_MAX", 2)
    strangers = [await enrolment.open_transport(vault.address) for _ in range(3)]
    closed: list[trio.SocketStream] = []
    async with trio.open_nursery() as nursery:

        async def listen(stranger: trio.SocketStream) -> None:
            assert await stranger.receive_some(1) == b""
            closed.append(stranger)

        for stranger in strangers:
            nursery.start_soon(listen, stranger)
        await until(lambda: closed)
        nursery.cancel_scope.cancel()
    assert len(closed) == 1
    for stranger in strangers:
        await stranger.aclose()
    with trio.fail_after(20):
        while True:
            with suppress(PeerError):  # the strangers may not be gone yet
                async with vault.peer("web1") as peer:
                    await peer.attach()
                    break


async def test_more_sessions_than_there_may_be_are_refused_and_known_sources_come_back(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards SESSIONS_MAX in Receiver._serve_source.
    monkeypatch.setattr(limits, "SESSIONS_MAX", 2)
    async with vault.peer("web1") as one, vault.peer("web2"):
        await one.attach()
        async with vault.peer("web3", greet=False) as third:
            assert (await third.refusal()).code == "busy"
        async with vault.peer("web1") as again:
            await again.attach()
    with trio.fail_after(20):
        while True:
            async with vault.peer("web3", greet=False) as third:
                try:
                    await third.greet()
                    break
                except (AssertionError, *DROPPED):
                    await trio.sleep(0.05)


async def test_a_source_has_a_bounded_number_of_groups(tmp_path: Path) -> None:
    # Guards GROUPS_PER_SOURCE_MAX in TrustStore.claim_group.
    store = TrustStore(tmp_path / "trust.sqlite")
    secret = store.create_invite(60, [], 0)
    source = store.redeem(secret, 1, name="web", source_id="id", serial="s")
    for number in range(limits.GROUPS_PER_SOURCE_MAX):
        store.claim_group(source.id, f"g{number}")
    store.claim_group(source.id, "g0")
    with pytest.raises(TrustError) as caught:
        store.claim_group(source.id, "one-more")
    assert caught.value.code == "too-many-groups"
    store.close()


async def test_an_enrolment_message_over_its_limit_is_refused(vault: Vault) -> None:
    # Guards ENROLMENT_MESSAGE_BYTES_MAX in enrolment._messages: before its bytes have come.
    transport = await enrolment.open_transport(vault.address)
    stream = await connect(transport, enrol_context(), ENROL_SERVER_NAME)
    async with MessageStream(stream, {enrolment.JSON_MESSAGE: MIB}) as door:
        await door.receive()
        announced = limits.ENROLMENT_MESSAGE_BYTES_MAX + 2
        await stream.send_all(HEADER.pack(announced, enrolment.JSON_MESSAGE))
        with trio.fail_after(limits.HANDSHAKE_SECONDS / 2):
            with suppress(PeerError):  # a reset will do as well
                assert await door.receive() is None


async def test_a_handshake_over_its_limit_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    # Guards HANDSHAKE_BYTES_MAX in handshake._drive, with a chain of certificates.
    server = receiver(tmp_path_factory.getbasetemp())
    key, request = certificates.make_key_and_request()
    certificate, _ = server.authority.sign(request, "long", str(UUID(int=1)))
    (tmp_path / "key").write_text(certificates.key_to_pem(key))
    (tmp_path / "chain").write_text(certificate + server.authority.ca_pem * 150)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=server.authority.ca_pem)
    context.load_cert_chain(tmp_path / "chain", tmp_path / "key")
    ours, theirs = memory_stream_pair()

    async def knock() -> None:
        with pytest.raises((PeerError, TrustError)):
            await connect(ours, context, RECEIVER_SERVER_NAME)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(knock)
        with pytest.raises(PeerError, match="a handshake of more than"):
            await accept(theirs, server.contexts)


def test_a_token_over_its_limit_is_not_decoded() -> None:
    # Guards TOKEN_CHARACTERS_MAX in enrolment.decode_token.
    token = enrolment.Token(address="vault:1", fingerprint="0" * 64, secret="s", expiry_ns=1)
    text = json.dumps(token.model_dump())
    for padding, is_taken in ((0, True), (limits.TOKEN_CHARACTERS_MAX, False)):
        packed = base64.urlsafe_b64encode((text + " " * padding).encode()).decode().rstrip("=")
        if is_taken:
            assert enrolment.decode_token(f"br1.{packed}") == token
        else:
            with pytest.raises(TrustError):
                enrolment.decode_token(f"br1.{packed}")


def test_a_source_has_a_bounded_number_of_disks_of_bounded_size() -> None:
    # Guards DISKS_PER_SOURCE_MAX and DISK_BYTES_MAX in messages.
    def attach(count: int, size_bytes: int) -> bytes:
        disk = {"name": "d", "size_bytes": size_bytes}
        disks = [{"id": str(UUID(int=number)), **disk} for number in range(count)]
        return json.dumps({"group": "g", "disks": disks}).encode()

    most, largest = limits.DISKS_PER_SOURCE_MAX, limits.DISK_BYTES_MAX
    assert len(messages.decode(Attach, attach(most, largest)).disks) == most
    assert len(attach(most, largest)) < limits.CONTROL_MESSAGE_BYTES_MAX
    for payload in (attach(most + 1, 512), attach(1, largest + 512), attach(1, 100)):
        with pytest.raises(PeerError):
            messages.decode(Attach, payload)
    assert AttachDisk(id=UUID(int=1), name="d", size_bytes=512)


# --- at the source


async def test_a_session_is_renewed_before_its_keys_are_used_up(
    source: Source, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards SESSION_BYTES_MAX in AgentSession._keep_alive.
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.3)
    stage = set_up(source, tmp_path_factory.getbasetemp(), [])
    async with trio.open_nursery() as nursery:
        stage.agent._connect = lambda: stage.liar.connect(nursery)
        nursery.start_soon(stage.agent.run)
        await until(lambda: stage.liar.durable >= 1)
        await trio.sleep(0.3)
        assert stage.liar.sessions == 1
        monkeypatch.setattr(limits, "SESSION_BYTES_MAX", 1000)
        await until(lambda: stage.liar.sessions > 1)
        monkeypatch.undo()
        durable = stage.liar.durable
        await until(lambda: stage.liar.durable > durable)
        nursery.cancel_scope.cancel()


def test_a_spool_is_bounded_by_size_by_share_and_by_what_it_leaves_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards Spool.limit_bytes and Spool.has_room.
    spool = Spool.open(tmp_path / "spool", SpoolLimits())
    assert spool.limit_bytes(1 << 50) == limits.SPOOL_BYTES_DEFAULT
    assert spool.limit_bytes(GIB) == int(GIB * limits.SPOOL_FREE_SHARE)
    small = Spool.open(tmp_path / "spool", SpoolLimits(MIB, 0))
    assert small.limit_bytes(1 << 50) == MIB
    assert small.has_room(MIB)
    assert not small.has_room(MIB + 1)
    greedy = Spool.open(tmp_path / "spool", SpoolLimits(1 << 60, 1 << 60))
    assert not greedy.has_room(1)
    assert SpoolLimits().reserve_bytes == limits.SPOOL_RESERVE_BYTES_DEFAULT


def test_a_ring_is_not_larger_than_it_may_be(source: Source) -> None:
    # Guards RING_BYTES_MAX in the disk's entry.
    with pytest.raises((ValueError, UsageError)):
        source.disks.add(
            "huge",
            source.directory / "huge.img",
            "web",
            create_bytes=MIB,
            ring_bytes=limits.RING_BYTES_MAX + MIB,
        )


# --- in the store


@pytest.mark.parametrize(
    ("name", "value"), [("SEGMENT_FRAMES_MAX", 5), ("SEGMENT_RECORDS_TARGET", 20)]
)
def test_a_segment_of_many_frames_or_records_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    # Guards both in SegmentWriter.is_full: recovery scans and sorting would take without end.
    monkeypatch.setattr(limits, name, value)
    replica, agent = start(tmp_path / "web")
    for _ in range(20):
        put(replica, agent.writes(4, length=4 * KIB))
    assert len(replica.catalog.segments()) >= 4
    replica.close()
