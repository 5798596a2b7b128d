"""A running receiver under attack: its memory stays flat, its other sources do not notice, and the
history it has stays what it was.

The receiver is a process of its own with short deadlines. Beside each attack a good source sends a
frame after the other and waits for each to be durable.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import lz4.block
import numpy as np
import pytest
import trio
import xxhash
from replica_workload import DISK, DISK_BYTES, Agent, Frame
from test_receiver_service import Peer, Vault

from blockrepl import limits
from blockrepl.channel import enrolment
from blockrepl.channel.framing import HEADER, MessageStream
from blockrepl.channel.handshake import ENROL_SERVER_NAME, connect, enrol_context
from blockrepl.errors import BlockreplError, PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats import messages
from blockrepl.formats.frame import FrameKind, RecordKind
from blockrepl.formats.messages import MessageType, Refusal
from blockrepl.services import receiver_home
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import Home
from blockrepl.units import MIB
from blockrepl.views.view import View

GROWTH_BYTES_MAX = 48 * MIB  # of the receiver's memory at its height, under any attack
LAG_SECONDS_MAX = 5.0  # of the good source: coarse, for a busy machine
WAIT_SECONDS = 30.0
GROUPS_MAX = 20
BOUNDS = {
    "HANDSHAKE_SECONDS": 4.0,
    "MESSAGE_SECONDS": 1.5,
    "IDLE_SECONDS": 4.0,
    "GROUPS_PER_SOURCE_MAX": GROUPS_MAX,
}
START_RECEIVER = f"""
from blockrepl import limits
{"; ".join(f"limits.{name} = {value}" for name, value in BOUNDS.items())}
from blockrepl.cli.main import main
main()
"""
DROPPED = (BlockreplError, trio.BrokenResourceError, trio.ClosedResourceError)


@dataclass
class Siege:
    """``worst_seconds``: the longest that a frame of the good source took to be durable."""

    vault: Vault
    process: int
    log: Path
    frames: int = 0
    worst_seconds: float = 0.0
    history: dict[int, str] = field(default_factory=dict)

    async def serve_good(self, peer: Peer, agent: Agent, sent: int) -> None:
        while True:
            begun = trio.current_time()
            await peer.send(agent.writes())
            sent += 1
            await peer.acknowledged(sent)
            self.worst_seconds = max(self.worst_seconds, trio.current_time() - begun)
            self.frames += 1
            await trio.sleep(0.01)

    def digest(self, at_ns: int, group: str = "good") -> str:
        """Of the disk at an instant, as a view shows it."""
        with ReplicaHistory(self.vault.home.replica_directory(group)) as history:
            view = View(history, at_ns, history.state())
            found = hashlib.sha256()
            for offset in range(0, DISK_BYTES, 8 * MIB):
                found.update(view.read("root", offset, 8 * MIB))
        return found.hexdigest()

    def memory_bytes(self) -> int:
        """At its height since the last `forget_memory`."""
        status = Path(f"/proc/{self.process}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def forget_memory(self) -> None:
        Path(f"/proc/{self.process}/clear_refs").write_text("5")

    @asynccontextmanager
    async def attacked(self) -> AsyncIterator[None]:
        """Holds what the module says of the attack inside."""
        self.forget_memory()
        before, frames = self.memory_bytes(), self.frames
        self.worst_seconds = 0.0
        yield
        with trio.fail_after(WAIT_SECONDS):
            while self.frames < frames + 5:
                await trio.sleep(0.01)
        assert self.memory_bytes() - before < GROWTH_BYTES_MAX
        assert self.worst_seconds < LAG_SECONDS_MAX
        for at_ns, digest in self.history.items():
            assert self.digest(at_ns) == digest
        log = self.log.read_text()
        assert "Traceback" not in log
        assert "defect of ours" not in log

    async def refused(self, act: Callable[[Peer], Awaitable[object]], name: str = "bad") -> Refusal:
        """What the receiver says when it drops a source that does this."""
        async with self.vault.peer(name) as peer:
            with suppress(*DROPPED):
                await act(peer)
            with trio.fail_after(WAIT_SECONDS):
                while True:
                    message = await peer.stream.receive()
                    assert message is not None, "dropped without a word"
                    if message[0] == MessageType.ERROR:
                        return messages.decode(Refusal, message[1])


@asynccontextmanager
async def siege(directory: Path) -> AsyncIterator[Siege]:
    home = Home.create(directory / "home")
    receiver_home.initialise(home, "vault")
    log = directory / "receiver.log"
    arguments = ["--home", str(home.path), "receiver", "run", "--listen", "127.0.0.1:0"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", START_RECEIVER, *arguments], stdout=subprocess.PIPE, stderr=file
        )
    assert process.stdout is not None
    try:
        line = await trio.to_thread.run_sync(process.stdout.readline)
        made = Siege(Vault(home, line.decode().split()[3], directory), process.pid, log)
        async with made.vault.peer("good") as peer, trio.open_nursery() as nursery:
            agent = await peer.attach("good")
            agent.stamp = time.time_ns() - 10**9
            base = [agent.base(n * MIB, os.urandom(MIB)) for n in range(4)]
            await peer.send(*base, agent.consistent(), agent.writes(), agent.writes())
            await peer.acknowledged(7)
            for at_ns in (agent.stamp - 4000, agent.stamp):
                made.history[at_ns] = made.digest(at_ns)
            nursery.start_soon(made.serve_good, peer, agent, 7)
            yield made
            nursery.cancel_scope.cancel()
    finally:
        process.terminate()
        await trio.to_thread.run_sync(process.wait)
        process.stdout.close()


@pytest.fixture
async def besieged(tmp_path: Path) -> AsyncIterator[Siege]:
    async with siege(tmp_path) as made:
        yield made


# --- names


NAMES = ("../../../etc", "a/b", "..", ".", "", "A", "a\0b", "x" * 64, "-rf", "ä", "a\n", 7, None)


async def test_names_that_could_be_paths_reach_no_file(besieged: Siege, tmp_path: Path) -> None:
    # Guards NameField in messages.Attach, AttachDisk and Request, and in marks.CheckpointMark.
    def attach(group: object, name: object) -> Callable[[Peer], Awaitable[object]]:
        disk = {"id": str(DISK), "name": name, "size_bytes": DISK_BYTES}
        payload = json.dumps({"group": group, "disks": [disk]}).encode()
        return lambda peer: peer.stream.send(MessageType.ATTACH, payload)

    def ask(group: object, name: object = None) -> Callable[[Peer], Awaitable[object]]:
        request = {"id": 1, "verb": "checkpoint-remove", "group": group, "name": name}
        payload = json.dumps(request).encode()
        return lambda peer: peer.stream.send(MessageType.REQUEST, payload)

    def mark(name: object) -> Callable[[Peer], Awaitable[object]]:
        async def act(peer: Peer) -> None:
            agent = await peer.attach("mine")
            payload = json.dumps({"mark": "checkpoint", "name": name, "at_ns": agent.stamp})
            await peer.send(agent._mark(payload.encode()))

        return act

    await besieged.vault.join("bad")
    async with besieged.vault.peer("bad") as peer:
        await peer.attach("mine")
    before = files_below(tmp_path)
    async with besieged.attacked():
        for name in NAMES:
            acts = [attach(name, "root"), attach("mine", name), ask(name), mark(name)]
            if name is not None:  # a request may go without
                acts.append(ask("mine", name))
            for act in acts:
                assert (await besieged.refused(act)).code == "protocol"
    assert files_below(tmp_path) - before == set()


def files_below(directory: Path) -> set[str]:
    return {str(path) for path in directory.rglob("*") if "/segments/" not in str(path)}


# --- lengths, bombs


async def test_lengths_that_lie_take_no_memory(besieged: Siege) -> None:
    # Guards the two checks in MessageStream._receive_rest (framing.py), before memory is taken,
    # and numpy.empty there: of what is announced, only what comes costs memory.
    async with besieged.attacked():
        for kind in (*range(16), 32, 255):
            bound = messages.RECEIVER_ACCEPTS.get(kind, 0)
            for length in (0, bound + 2, 1 << 31, (1 << 32) - 1):
                header = HEADER.pack(length, kind)
                assert (await besieged.refused(bytes_of(header))).code == "protocol"
        longest = bytes_of(HEADER.pack(limits.MESSAGE_BYTES_MAX + 1, MessageType.DATA) + b"x")

        async def announce(name: str) -> None:
            assert (await besieged.refused(longest, name)).code == "silent"

        async with trio.open_nursery() as nursery:
            for number in range(2 * GROWTH_BYTES_MAX // limits.MESSAGE_BYTES_MAX):
                nursery.start_soon(announce, f"bad{number}")


def bytes_of(data: bytes) -> Callable[[Peer], Awaitable[object]]:
    return lambda peer: peer.stream.stream.send_all(data)


def sealed(agent: Agent, stored: list[bytes], payload_bytes: int, kind: FrameKind) -> bytes:
    """A frame of such blocks, its digests right whatever they hold."""
    match kind:
        case FrameKind.MARK:
            _, sample = replace(agent).checkpoint("x")
        case FrameKind.BASE:
            _, sample = agent.base(0, bytes(payload_bytes))
        case _:
            _, sample = agent.writes(1)
    header = frames.decode_header(sample)
    columns = bytes(sample[frames.HEADER_BYTES :][: header.record_count * frames.RECORD_BYTES])
    digests = b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(block)) for block in stored)
    table = columns + digests + np.array([len(block) for block in stored], np.uint32).tobytes()
    header = replace(
        header,
        payload_bytes=payload_bytes,
        block_count=len(stored),
        body_bytes=len(table) + sum(map(len, stored)),
        digest=xxhash.xxh3_64_intdigest(table),
    )
    return frames.encode_header(header) + table + b"".join(stored)


async def test_bombs_take_no_more_than_they_declare(besieged: Siege) -> None:
    # Guards uncompressed_size in frame.decode_block, MARK_BYTES_MAX in frame._check_limits, and
    # ValidationError in messages.decode.
    block = lz4.block.compress(bytes(limits.BLOCK_BYTES), store_size=False)
    huge = lz4.block.compress(bytes(128 * MIB), store_size=False)  # half a megabyte

    def mark(stored: list[bytes], payload_bytes: int) -> Callable[[Peer], Awaitable[object]]:
        async def act(peer: Peer) -> None:
            agent = await peer.attach("bombs")
            data = sealed(agent, stored, payload_bytes, FrameKind.MARK)
            await peer.stream.send(MessageType.DATA, data)

        return act

    async with besieged.attacked():
        async with besieged.vault.peer("bad") as peer:
            agent = await peer.attach("bombs")
            payload = bytes(limits.FRAME_PAYLOAD_BYTES_MAX)
            for _ in range(20):
                rows = [(agent.stamp + 1, 0, len(payload), int(RecordKind.WRITE))]
                agent.stamp += 1
                await peer.send(agent.records(rows, payload))
            await peer.acknowledged(20)
        for stored, payload_bytes, error in (
            ([huge], limits.MARK_BYTES_MAX, "frame block does not decompress"),
            ([block], 100, "frame block does not decompress"),
            ([block, block], limits.MARK_BYTES_MAX + 1, "mark frame is malformed"),
        ):
            refusal = await besieged.refused(mark(stored, payload_bytes))
            assert (refusal.code, refusal.error) == ("protocol", error)
        for text in (b"[" * 900_000, b'{"a":' * 150_000, b"9" * 1_000_000, b'"\\ud800' * 100_000):
            act = messages_of(MessageType.ATTACH, text)
            assert (await besieged.refused(act)).code == "protocol"


def messages_of(kind: MessageType, payload: bytes) -> Callable[[Peer], Awaitable[object]]:
    return lambda peer: peer.stream.send(kind, payload)


# --- frames that are not true


async def test_replayed_and_reordered_frames_and_those_of_others_change_nothing(
    besieged: Siege,
) -> None:
    # Guards both comparisons with the number due in Replica.append, that of the source in
    # admission.check_header, and of the group in ReceiverSession._attached_group.
    vault = besieged.vault
    async with besieged.attacked():
        async with vault.peer("bad") as peer:
            agent = await peer.attach("mine")
            sent = [agent.writes() for _ in range(5)]
            await peer.send(*sent)
            await peer.acknowledged(5)
            at_ns = agent.stamp
            await peer.send(*sent, *sent[::-1])  # duplicates: nothing of them is kept
            assert await peer.acknowledged(15) == 5
            later = [agent.writes() for _ in range(3)]
        segments = vault.home.replica_directory("mine") / "segments"
        journal = b"".join(path.read_bytes() for path in sorted(segments.iterdir()))
        assert all(journal.count(bytes(data)) == 1 for _, data in sent)

        def send(*batch: Frame) -> Callable[[Peer], Awaitable[object]]:
            async def act(peer: Peer) -> None:
                await peer.attach("mine")
                await peer.send(*batch)

            return act

        for batch in (later[::-1], later[1:]):
            refusal = await besieged.refused(send(*batch))
            assert refusal.error.endswith(f"came where {later[0][0].number} was due")
        due = replace(agent, number=6, stamp=at_ns)
        for forged, error in (
            (replace(due, source=b"\7" * 16), "frame is of another group or source"),
            (replace(due, group=b"\7" * 16), "data for a group that is not attached"),
        ):
            refusal = await besieged.refused(send(forged.writes()))
            assert (refusal.code, refusal.error) == ("protocol", error)
    async with vault.peer("bad") as peer:
        assert (await peer.attach("mine")).number == 6


@pytest.mark.parametrize(
    "record",
    [
        (DISK_BYTES, 512),
        (DISK_BYTES - 512, 1024),
        ((1 << 64) - 512, 512),
        (0, (1 << 32) - 1),
        ((1 << 63), 1),
    ],
)
async def test_records_beyond_the_disk_are_refused(
    besieged: Siege, record: tuple[int, int]
) -> None:
    # Guards check_content in admission.py.
    async def zero(peer: Peer) -> None:
        agent = await peer.attach("mine")
        rows = [(agent.stamp + 1, *record, int(RecordKind.ZERO))]
        await peer.send(agent.records(rows, b""))

    async with besieged.attacked():
        refusal = await besieged.refused(zero)
        assert "beyond the end of disk root" in refusal.error


async def test_content_that_does_not_decompress_ends_its_senders_session_alone(
    besieged: Siege,
) -> None:
    # Guards check_payload in admission.check_content: the liar came back, and each of its frames
    # took along what the others of its group had sent for the same commit.
    async def send_noise(peer: Peer) -> None:
        agent = await peer.attach("shared")
        noise = sealed(agent, [b"\xff" * 300], limits.BLOCK_BYTES, FrameKind.BASE)
        await peer.stream.send(MessageType.DATA, noise)

    for name in ("fair", "bad"):
        await besieged.vault.join(name, "shared")
    async with besieged.attacked(), besieged.vault.peer("fair") as peer:
        fair = await peer.attach("shared", UUID(int=8), "data")
        for turn in range(5):
            await peer.send(fair.writes())
            refusal = await besieged.refused(send_noise)
            assert (refusal.code, refusal.group) == ("protocol", None)
            assert refusal.error == "frame block does not decompress"
            assert await peer.acknowledged(turn + 1) == turn + 1
    assert "nothing was acknowledged" not in besieged.log.read_text()


async def test_stamps_from_the_future_are_shown_and_move_nobody_else(besieged: Siege) -> None:
    # Guards CLOCK_AHEAD_SECONDS in receiver_status.describe_group.
    year_ns = 365 * 86400 * 10**9
    async with besieged.attacked(), besieged.vault.peer("bad") as peer:
        agent = await peer.attach("mine")
        agent.stamp = time.time_ns()
        await peer.send(agent.consistent(), agent.writes())
        agent.stamp = time.time_ns() + 10 * year_ns
        await peer.send(agent.writes(), agent.checkpoint("later"))
        await peer.acknowledged(4)
        mine = await besieged.vault.group("mine")
        assert mine["ahead_seconds"] == pytest.approx(10 * 365 * 86400, abs=60)
        assert mine["lag_seconds"] is None
        assert "clock" in mine["problem"]
        good = await besieged.vault.group("good")
        assert (good["problem"], good["ahead_seconds"]) == (None, None)


async def test_a_record_from_the_future_is_shown_although_no_watermark_is(
    besieged: Siege,
) -> None:
    # Guards newest_stamp in receiver_status.facts_of: no fold gets past that record's segment.
    day_ns = 86400 * 10**9
    async with besieged.attacked(), besieged.vault.peer("bad") as peer:
        agent = await peer.attach("mine")
        agent.stamp = time.time_ns()
        await peer.send(agent.consistent(), agent.writes())
        await peer.acknowledged(2)
        assert (await besieged.vault.group("mine"))["problem"] is None
        rows = [(time.time_ns() + 10 * day_ns, 0, 512, int(RecordKind.ZERO))]
        await peer.send(agent.records(rows, b""), agent.checkpoint("after"))
        await peer.acknowledged(4)
        mine = await besieged.vault.group("mine")
        assert mine["ahead_seconds"] == pytest.approx(10 * 86400, abs=60)
        assert "not let go before that time" in mine["problem"]
        assert mine["latest_ns"] == agent.stamp
        good = await besieged.vault.group("good")
        assert (good["problem"], good["ahead_seconds"]) == (None, None)


# --- slow ones, and many


async def raw(vault: Vault) -> trio.SocketStream:
    return await enrolment.open_transport(vault.address)


async def trickle(vault: Vault, data: bytes) -> float:
    """Send a byte now and then until the receiver has had enough; how long that took."""
    begun = trio.current_time()
    transport = await raw(vault)
    async with transport, trio.open_nursery() as nursery:

        async def send() -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                for byte in data:
                    await transport.send_all(bytes([byte]))
                    await trio.sleep(0.2)

        nursery.start_soon(send)
        with suppress(trio.BrokenResourceError), trio.fail_after(WAIT_SECONDS):
            while await transport.receive_some():
                pass
        nursery.cancel_scope.cancel()
    return trio.current_time() - begun


async def test_slow_strangers_are_given_up(besieged: Siege) -> None:
    # Guards the deadline in handshake._guarded, and those of _messages in enrolment.py.
    hello = bytes.fromhex("1603010200010001fc0303") + os.urandom(400)
    took: list[float] = []

    async def one() -> None:
        took.append(await trickle(besieged.vault, hello))

    async def enrolling(begun: bytes) -> None:
        stream = await connect(await raw(besieged.vault), enrol_context(), ENROL_SERVER_NAME)
        async with MessageStream(stream, {enrolment.JSON_MESSAGE: MIB}) as door:
            await door.receive()
            with suppress(*DROPPED):
                await door.stream.send_all(begun)
                with trio.fail_after(WAIT_SECONDS / 2):
                    assert await door.receive() is None

    async with besieged.attacked(), trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
        for _ in range(3):
            nursery.start_soon(enrolling, b"")
            nursery.start_soon(enrolling, HEADER.pack(1000, enrolment.JSON_MESSAGE) + b"{")
    assert max(took) < BOUNDS["HANDSHAKE_SECONDS"] + LAG_SECONDS_MAX


async def test_a_source_that_trickles_or_does_not_read_is_given_up(besieged: Siege) -> None:
    # Guards message_seconds in MessageStream, for receiving and for sending.
    async def trickle_frame(peer: Peer) -> None:
        agent = await peer.attach("mine")
        _, data = agent.writes()
        await peer.stream.stream.send_all(HEADER.pack(1 + len(data), MessageType.DATA))
        for at in range(len(data)):
            await peer.stream.stream.send_all(data[at : at + 1])
            await trio.sleep(0.1)

    async def never_read(peer: Peer) -> None:
        ask = messages.Request(id=1, verb="group-status", group="mine")
        await peer.attach("mine")
        with trio.fail_after(WAIT_SECONDS):
            while True:
                await peer.stream.send(MessageType.REQUEST, messages.encode(ask))

    async with besieged.attacked():
        async with trio.open_nursery() as nursery:
            refusal: list[Refusal] = []

            async def slow() -> None:
                with trio.fail_after(WAIT_SECONDS):
                    refusal.append(await besieged.refused(trickle_frame))

            nursery.start_soon(slow)
        assert refusal[0].code == "silent"
        async with besieged.vault.peer("bad") as peer:
            with pytest.raises(PeerError) as caught:
                await never_read(peer)
            assert caught.value.code in ("disconnected", "silent")


async def test_a_thousand_strangers_lock_nobody_out(besieged: Siege) -> None:
    # Guards HANDSHAKES_MAX in Receiver.serve.
    identity = await besieged.vault.join("late")
    async with besieged.attacked(), AsyncExitStack() as stack:
        for number in range(1000):
            transport = await raw(besieged.vault)
            stack.push_async_callback(trio.aclose_forcefully, transport)
            if number % 3 == 0:
                with suppress(trio.BrokenResourceError):
                    await transport.send_all(os.urandom(200))
            elif number % 3 == 1:
                with suppress(trio.BrokenResourceError):
                    await transport.send_all(b"\x16\x03\x01\x02\x00\x01")
        with trio.fail_after(WAIT_SECONDS):
            while True:
                with suppress(*DROPPED):
                    async with besieged.vault.peer("late") as peer:
                        await peer.attach("late")
                        break
                await trio.sleep(0.1)
        assert descriptors(besieged.process) < limits.HANDSHAKES_MAX + 200
    assert identity.name == "late"


def descriptors(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


async def test_groups_without_end_are_refused(besieged: Siege) -> None:
    # Guards GROUPS_PER_SOURCE_MAX in TrustStore.claim_group: each has files, and a task.
    refusals: list[Any] = []
    async with besieged.attacked():
        for turn in range(2):
            async with besieged.vault.peer("bad") as peer:
                for number in range(GROUPS_MAX // 2 + 5):
                    await peer.ask_to_attach(f"g{turn}-{number}", UUID(int=number + 1))
                    with trio.fail_after(WAIT_SECONDS):
                        message = await peer.stream.receive()
                    assert message is not None
                    if message[0] == MessageType.ERROR:
                        refusals.append(messages.decode(Refusal, message[1]))
    assert len(refusals) == 10
    assert {refusal.code for refusal in refusals} == {"too-many-groups"}
