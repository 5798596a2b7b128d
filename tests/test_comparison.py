"""Comparisons at the receiver: of a real replica, and over real connections."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
from journal_model import SOURCE, START, Journal, Record, small_segments
from replica_workload import DISK, DISK_BYTES, Agent, Frame
from test_receiver_service import Peer, Vault, running, until
from test_view import find, flip

from blockrepl import limits
from blockrepl.errors import DamageError, PeerError, StorageError
from blockrepl.formats.comparison import Compare, Purpose, Verdict, decode_verdict, encode_compare
from blockrepl.formats.frame import RecordKind
from blockrepl.formats.messages import MessageType
from blockrepl.limits import COMPARE_BLOCK_BYTES, REGION_BYTES
from blockrepl.services.comparison import GroupComparison
from blockrepl.storage.content import ContentReader, Window
from blockrepl.storage.digests import digest_blocks, zero_digests
from blockrepl.storage.files import Files
from blockrepl.storage.proofs import Mismatch, Proven
from blockrepl.storage.reading import LOOKS_MAX, GoneError
from blockrepl.units import KIB, MIB

# The second disk ends in a short block of a short region.
SIZES = {"root": 320 * KIB, "data": REGION_BYTES + 160 * KIB + 512}


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    small_segments(monkeypatch)
    made = Journal(tmp_path / "home", SIZES)
    yield made
    made.close()


@pytest.fixture
def comparison(journal: Journal) -> Iterator[GroupComparison]:
    made = GroupComparison(journal.replica)
    yield made
    made.close()


def of(
    journal: Journal,
    disk: str,
    at_ns: int,
    content: bytes | bytearray,
    *,
    purpose: Purpose = Purpose.RESYNC,
    offset: int = 0,
    length: int | None = None,
) -> Compare:
    """The comparison of a range of ``content``, the whole disk's."""
    length = SIZES[disk] - offset if length is None else length
    return Compare(
        journal.replica.group_id, journal.ids[disk].bytes, 1, purpose, at_ns, offset, length,
        digest_blocks(bytes(content[offset : offset + length])),
    )  # fmt: skip


def differing(comparison: GroupComparison, compare: Compare) -> list[int]:
    verdict = comparison.compare(SOURCE, compare, lambda: None)
    assert verdict == Verdict(compare.group, 1, compare.block_count, verdict.differing)
    return list(verdict.differing)


def test_a_replica_equals_the_source_at_every_instant_and_a_changed_block_differs(
    journal: Journal, comparison: GroupComparison
) -> None:
    # Guards "compare.stamp" in GroupComparison.compare: the latest content would differ.
    journal.run(60)
    journal.gap_and_resync("root")
    journal.run(60)
    checked = 0
    for stamp, model in journal.model.states():
        for disk in SIZES:
            assert differing(comparison, of(journal, disk, stamp, model[disk])) == []
            changed = bytearray(model[disk])
            block = journal.random.randrange(-(-len(changed) // COMPARE_BLOCK_BYTES))
            changed[block * COMPARE_BLOCK_BYTES + 100] ^= 1
            assert differing(comparison, of(journal, disk, stamp, changed)) == [block]
            checked += 1
    assert checked > 200


def test_a_disk_whose_first_sync_is_not_done_is_compared_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_segments(monkeypatch)
    journal = Journal(tmp_path / "home", SIZES, sync=False)
    comparison = GroupComparison(journal.replica)
    journal.run(30)
    seed = Record(journal.stamp, "root", 0, 65536, RecordKind.WRITE, os.urandom(65536))
    from blockrepl.formats.frame import FrameKind

    journal._frame(FrameKind.BASE, "root", [seed], number=0)
    journal.replica.commit()
    journal.model.base["root"] = seed.data + bytes(SIZES["root"] - len(seed.data))
    content = journal.model.at(journal.stamp)
    for disk in SIZES:
        assert differing(comparison, of(journal, disk, journal.stamp, content[disk])) == []
    comparison.close()
    journal.close()


def test_holes_are_not_read(
    journal: Journal, comparison: GroupComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.put([Record(journal.tick(), disk, 0, SIZES[disk], RecordKind.TRIM) for disk in SIZES])
    for disk, size in SIZES.items():
        with (journal.directory / "base" / f"{disk}.img").open("r+b") as image:
            image.truncate(0)
            image.truncate(size)

    def read_into(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a hole is read")

    monkeypatch.setattr(ContentReader, "read_into", read_into)
    for disk, size in SIZES.items():
        assert differing(comparison, of(journal, disk, journal.stamp, bytes(size))) == []
        assert zero_digests(size) == digest_blocks(bytes(size))


def test_a_flipped_byte_of_the_base_or_of_the_journal_is_found_and_told_exactly(
    journal: Journal, comparison: GroupComparison, caplog: pytest.LogCaptureFixture
) -> None:
    place = 3 * COMPARE_BLOCK_BYTES
    journal.put([Record(journal.tick(), "data", place, 4096, RecordKind.WRITE, os.urandom(4096))])
    journal.put([Record(journal.tick(), "root", 0, SIZES["root"], RecordKind.TRIM)])
    disk = journal.ids["data"].bytes
    content = journal.model.at(journal.stamp)["data"]
    scrub = of(journal, "data", journal.stamp, content, purpose=Purpose.SCRUB)
    assert differing(comparison, scrub) == []
    proofs = journal.replica.proofs
    assert proofs.proven(disk, SIZES["data"]) == Proven(SIZES["data"], journal.stamp, True, 0)
    comparison.close()
    comparison = GroupComparison(journal.replica)  # with nothing in its caches

    needle = bytes(content[place : place + 64])
    (segment,) = (
        path for path in (journal.directory / "segments").iterdir() if needle in path.read_bytes()
    )
    flip(segment, find(segment, needle))
    base_block = next(
        block
        for block in range(6, len(content) // COMPARE_BLOCK_BYTES)
        if any(content[block * COMPARE_BLOCK_BYTES :][:COMPARE_BLOCK_BYTES])
    )
    at = base_block * COMPARE_BLOCK_BYTES
    flip(journal.directory / "base" / "data.img", at + 77)
    caplog.clear()
    assert differing(comparison, scrub) == [3, base_block]
    comparison.close()
    (damage,) = (line for line in caplog.messages if "is damaged at offset" in line and
                 "disk" not in line)  # fmt: skip
    assert segment.name in damage
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    for warning, block in zip(warnings, (3, base_block), strict=True):
        first = block * COMPARE_BLOCK_BYTES
        assert f"group web, disk data: bytes {first} to {first + 65535} differ" in warning
        assert "2027-01-15T" in warning
    assert proofs.mismatches(disk) == [
        Mismatch(disk, place, 65536, journal.stamp, None, journal.stamp),
        Mismatch(disk, at, 65536, journal.stamp, None, journal.stamp),
    ]
    # The region of both is the first; the other one's proof stays.
    assert proofs.proven(disk, SIZES["data"]) == Proven(
        SIZES["data"] - REGION_BYTES, journal.stamp, False, 2
    )


def test_a_resync_raises_no_alarm_and_proves_nothing(
    journal: Journal, comparison: GroupComparison, caplog: pytest.LogCaptureFixture
) -> None:
    zeros = bytes(SIZES["data"])
    assert differing(comparison, of(journal, "data", journal.stamp, zeros))
    content = journal.model.at(journal.stamp)["data"]
    assert not differing(comparison, of(journal, "data", journal.stamp, content))
    assert not caplog.messages
    proven = journal.replica.proofs.proven(journal.ids["data"].bytes, SIZES["data"])
    assert proven == Proven(0, None, False, 0)


def test_a_scrub_of_part_of_a_region_proves_nothing(
    journal: Journal, comparison: GroupComparison
) -> None:
    content = journal.model.at(journal.stamp)["data"]
    disk = journal.ids["data"].bytes
    for offset, length, covered in (
        (0, REGION_BYTES - COMPARE_BLOCK_BYTES, 0),
        (COMPARE_BLOCK_BYTES, REGION_BYTES, 0),
        (COMPARE_BLOCK_BYTES, SIZES["data"] - COMPARE_BLOCK_BYTES, SIZES["data"] - REGION_BYTES),
        (0, REGION_BYTES, SIZES["data"]),
    ):
        compare = of(journal, "data", journal.stamp, content, purpose=Purpose.SCRUB,
                     offset=offset, length=length)  # fmt: skip
        assert differing(comparison, compare) == []
        assert journal.replica.proofs.proven(disk, SIZES["data"]).covered_bytes == covered


def test_a_segment_that_is_lost_makes_all_differ_for_a_resync_and_nothing_for_a_scrub(
    journal: Journal, comparison: GroupComparison, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards what a scrub says of records that are hidden: it had them sent again for ever, which
    cannot help, and alarmed of bytes that did not differ.
    """
    journal.run(100)
    content = journal.model.at(journal.stamp)["root"]
    compare = of(journal, "root", journal.stamp, content)
    assert differing(comparison, compare) == []
    comparison.close()
    comparison = GroupComparison(journal.replica)
    lost = min((journal.directory / "segments").iterdir())
    lost.rename(journal.directory / "lost.seg")
    assert differing(comparison, compare) == list(range(compare.block_count))
    proofs, disk = journal.replica.proofs, journal.ids["root"].bytes
    proven, scrub = proofs.proven(disk, SIZES["root"]), replace(compare, purpose=Purpose.SCRUB)
    for _ in range(3):
        assert differing(comparison, scrub) == []
    assert (proofs.proven(disk, SIZES["root"]), proofs.mismatches(disk)) == (proven, [])
    assert (
        f"disk root cannot be compared with its source: segment {lost.name}"
        in (comparison.hidden.reasons()[disk])
    )
    assert sum("cannot be compared" in line for line in caplog.messages) == 1
    comparison.close()
    (journal.directory / "lost.seg").rename(lost)
    again = GroupComparison(journal.replica)
    again.hidden = comparison.hidden
    assert differing(again, scrub) == []
    assert (again.hidden.reasons(), proofs.proven(disk, SIZES["root"]).is_whole) == ({}, True)
    again.close()


def test_a_region_that_cannot_be_compared_is_told_until_that_very_region_is(
    journal: Journal, comparison: GroupComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards HiddenRegions: the next region hid that nothing was known of the first.
    content, disk = journal.model.at(journal.stamp)["data"], journal.ids["data"].bytes
    whole = of(journal, "data", journal.stamp, content, purpose=Purpose.SCRUB)
    first, second = (
        of(journal, "data", journal.stamp, content, purpose=Purpose.SCRUB, offset=at, length=length)
        for at, length in ((0, REGION_BYTES), (REGION_BYTES, SIZES["data"] - REGION_BYTES))
    )
    resolve = ContentReader.resolve

    def failing(self: ContentReader, disk: bytes, at: int, end: int, at_ns: int) -> Window:
        if at < REGION_BYTES:
            raise StorageError("input/output error")
        return resolve(self, disk, at, end, at_ns)

    with monkeypatch.context() as patched:
        patched.setattr(ContentReader, "resolve", failing)
        for compare in (first, second):
            assert differing(comparison, compare) == []
        assert "input/output error" in comparison.hidden.reasons()[disk]
        assert differing(comparison, second) == []
        assert differing(comparison, whole) == []  # of the second nothing is known either
    part = replace(first, length=COMPARE_BLOCK_BYTES, digests=first.digests[:16])
    for compare in (part, second, part):
        assert differing(comparison, compare) == []
        assert list(comparison.hidden.reasons()) == [disk]
    assert differing(comparison, first) == []
    assert comparison.hidden.reasons() == {}


@pytest.mark.parametrize("call", ["resolve", "add_extents", "read_into"])
@pytest.mark.parametrize("purpose", Purpose)
def test_what_retention_takes_away_again_and_again_is_no_difference(
    journal: Journal,
    comparison: GroupComparison,
    monkeypatch: pytest.MonkeyPatch,
    purpose: Purpose,
    call: str,
) -> None:
    # Guards `looking` in GroupComparison.compare: after two looks what was gone was a difference.
    content, disk = journal.model.at(journal.stamp)["data"], journal.ids["data"].bytes
    compare = of(journal, "data", journal.stamp, content, purpose=purpose, length=REGION_BYTES)
    done = getattr(ContentReader, call)
    gone = LOOKS_MAX - 1

    def replaced(self: ContentReader, *arguments: Any) -> Any:
        nonlocal gone
        if gone:
            gone -= 1
            raise GoneError("segment 1 is gone")
        return done(self, *arguments)

    monkeypatch.setattr(ContentReader, call, replaced)
    assert differing(comparison, compare) == []
    assert (gone, comparison.hidden.reasons()) == (0, {})
    gone = 1 << 30  # lost, rather
    found = differing(comparison, compare)
    proofs = journal.replica.proofs
    if purpose is Purpose.SCRUB and call == "resolve":  # which records there are is not known
        assert (found, proofs.mismatches(disk)) == ([], [])
        assert "segment 1 is gone" in comparison.hidden.reasons()[disk]
    else:
        assert found  # sent again, it can be read
        assert len(proofs.mismatches(disk)) == (purpose is Purpose.SCRUB)


def test_lies_are_the_peers_fault(journal: Journal, comparison: GroupComparison) -> None:
    content = journal.model.at(journal.stamp)["data"]
    good = of(journal, "data", journal.stamp, content)
    block = b"x" * 16
    for lie in (
        replace(good, disk=b"?" * 16),
        replace(good, stamp=journal.stamp + 1),
        replace(good, offset=COMPARE_BLOCK_BYTES),
        replace(good, offset=20 * MIB, length=512, digests=block),
        replace(good, length=512, digests=block),
    ):
        with pytest.raises(PeerError):
            comparison.compare(SOURCE, lie, lambda: None)
    with pytest.raises(PeerError):
        comparison.compare(b"other source....", good, lambda: None)


def test_a_record_or_a_gap_beyond_the_watermark_may_be_compared_at(
    journal: Journal, comparison: GroupComparison
) -> None:
    from blockrepl.formats.frame import FrameKind
    from blockrepl.formats.marks import GapMark

    record = Record(journal.stamp + 9, "root", 0, 512, RecordKind.WRITE, b"n" * 512)
    journal.model.records.append(record)
    journal._frame(FrameKind.RECORDS, "root", [record], watermark=journal.stamp)
    journal.replica.commit()
    content = journal.model.at(record.stamp)["root"]
    assert differing(comparison, of(journal, "root", record.stamp, content)) == []
    with pytest.raises(PeerError):
        comparison.compare(SOURCE, of(journal, "root", record.stamp + 1, content), lambda: None)
    journal.mark(GapMark(disk=journal.ids["root"], from_ns=record.stamp + 5))
    journal.replica.commit()
    assert differing(comparison, of(journal, "root", record.stamp + 5, content)) == []


def test_nothing_is_compared_after_a_failure_of_the_store(
    journal: Journal, comparison: GroupComparison
) -> None:
    compare = of(journal, "root", START, journal.model.base["root"])
    journal.replica.error = StorageError("sync failed", code="fail-stop")
    with pytest.raises(StorageError):
        comparison.compare(SOURCE, compare, lambda: None)
    journal.replica.error = None


# over connections


@pytest.fixture
async def vault(tmp_path: Path) -> AsyncIterator[Vault]:
    async with running(tmp_path) as vault:
        yield vault


async def ask(
    peer: Peer,
    agent: Agent,
    content: bytes,
    *,
    offset: int = 0,
    stamp: int | None = None,
    purpose: Purpose = Purpose.RESYNC,
    token: int = 1,
) -> None:
    compare = Compare(
        agent.group, agent.disk.bytes, token, purpose, agent.stamp if stamp is None else stamp,
        offset, len(content), digest_blocks(content),
    )  # fmt: skip
    await peer.stream.send(MessageType.COMPARE, encode_compare(compare))


async def verdict(peer: Peer) -> Verdict:
    """The next verdict, after any acknowledgements."""
    with trio.fail_after(20):
        while True:
            message = await peer.stream.receive()
            assert message is not None, "the receiver closed the connection"
            if message[0] == MessageType.VERDICT:
                return decode_verdict(message[1])
            assert message[0] in {MessageType.ACK, MessageType.PONG}, (
                message[0],
                bytes(message[1]),
            )


def write(agent: Agent, offset: int, data: bytes) -> Frame:
    agent.stamp += 1000
    return agent.records([(agent.stamp, offset, len(data), int(RecordKind.WRITE))], data)


async def test_a_comparison_sees_all_that_came_before_it_and_nothing_after(vault: Vault) -> None:
    async with vault.peer() as peer:
        agent = await peer.attach()
        one, two = os.urandom(2 * 65536), os.urandom(65536)
        await peer.stream.send(MessageType.DATA, agent.base(0, one)[1])
        await peer.stream.send(MessageType.DATA, write(agent, 65536, two)[1])
        before = agent.stamp
        await ask(peer, agent, one[:65536] + two, token=7)
        await peer.stream.send(MessageType.DATA, write(agent, 0, two)[1])
        await peer.stream.send(MessageType.DATA, agent.consistent()[1])
        assert await verdict(peer) == Verdict(agent.group, 7, 2, ())
        await ask(peer, agent, one[:65536] + two, token=8)
        assert (await verdict(peer)).differing == (0,)
        await ask(peer, agent, one[:65536] + two, token=9, stamp=before)
        assert (await verdict(peer)).differing == ()


async def test_a_comparison_waits_until_what_came_before_it_is_durable(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards "await committer.settled()" in Comparisons.compare.
    gate, waiting = threading.Event(), threading.Event()

    def sync(files: Files, descriptor: int) -> None:
        waiting.set()
        assert gate.wait(20)
        os.fdatasync(descriptor)

    async with vault.peer() as peer:
        agent = await peer.attach()
        monkeypatch.setattr(Files, "sync", sync)
        data = os.urandom(65536)
        try:
            await peer.stream.send(MessageType.DATA, write(agent, 0, data)[1])
            await until(waiting.is_set)
            await peer.stream.send(MessageType.DATA, write(agent, 65536, data)[1])
            await ask(peer, agent, data + data)
            await peer.stream.send(MessageType.PING)
            await peer.expect(MessageType.PONG)  # the comparison has been taken in
        finally:
            gate.set()
        assert (await verdict(peer)).differing == ()


async def test_comparisons_hold_up_neither_commits_nor_more_than_a_few_of_each_other(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    begun = 0
    real = GroupComparison.compare

    def compare(*arguments: object) -> Verdict:
        nonlocal begun
        begun += 1
        assert gate.wait(20)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(GroupComparison, "compare", compare)
    async with vault.peer("web1") as peer, vault.peer("web2") as other:
        agent = await peer.attach()
        second = await other.attach("mail", UUID(int=9))
        try:
            for token in range(limits.COMPARISONS_MAX):
                await ask(peer, agent, bytes(65536), token=token, stamp=0)
            await peer.send(agent.writes())
            await peer.acknowledged(1)
            await ask(peer, agent, bytes(65536), token=99, stamp=0)  # one too many: it waits
            await peer.send(agent.writes())
            await peer.acknowledged(2)
            await other.send(second.writes())
            await other.acknowledged(1)  # nobody else does
            group = await vault.group()
            assert group["sources"][0]["connected"]
            assert begun == 2  # threads
        finally:
            gate.set()
        tokens = {(await verdict(peer)).token for _ in range(limits.COMPARISONS_MAX + 1)}
        assert tokens == {*range(limits.COMPARISONS_MAX), 99}


async def test_a_comparison_behind_frames_that_find_no_room_is_no_lie(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the look at the generation in SourceSession._compare: the session was ended, with all
    # its groups, for a comparison at an instant that was not durable.
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with vault.peer() as peer:
        agent = await peer.attach()
        with monkeypatch.context() as patch:
            patch.setattr(Files, "write", no_room)
            await peer.send(agent.writes())
            await ask(peer, agent, bytes(65536))
            refusal = await peer.refusal()
            assert (refusal.code, refusal.group) == ("full", "web")
            await peer.stream.send(MessageType.PING)
            await peer.expect(MessageType.PONG)
        await peer.attach()
        await peer.stream.send(MessageType.PING)
        await peer.expect(MessageType.PONG)


async def test_a_source_with_too_many_comparisons_is_not_read_from(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards _asked in SourceSession: their digests would be kept without bound.
    gate = threading.Event()
    real = GroupComparison.compare

    def compare(*arguments: object) -> Verdict:
        assert gate.wait(20)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(GroupComparison, "compare", compare)
    monkeypatch.setattr(limits, "COMPARISONS_WAITING_MAX", 6)
    async with vault.peer() as peer:
        agent = await peer.attach()
        try:
            for token in range(7):
                await ask(peer, agent, bytes(65536), token=token, stamp=0)
            await peer.send(agent.writes())
            with trio.move_on_after(0.3):
                await peer.acknowledged(1)
                pytest.fail("it was read")
        finally:
            gate.set()
        for _ in range(7):
            await verdict(peer)


LIES = {
    "an unknown disk": {"disk": UUID(int=5)},
    "an unknown group": {"group": b"?" * 16},
    "an instant of tomorrow": {"stamp": 1 << 62},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_a_lying_comparison_ends_the_session(vault: Vault, lie: dict[str, object]) -> None:
    async with vault.peer() as peer:
        agent = await peer.attach()
        for key, value in lie.items():
            setattr(agent, key, value)
        await ask(peer, agent, bytes(65536))
        refusal = await peer.refusal()
        assert (refusal.code, refusal.group) == ("protocol", None)


async def test_the_disk_of_another_source_is_not_compared(vault: Vault) -> None:
    async with vault.peer("web1") as peer, vault.peer("web2") as other:
        await peer.attach()
        mine = await other.attach("mail", UUID(int=9))
        mine.disk = DISK
        await ask(other, mine, bytes(65536))
        assert (await other.refusal()).code == "protocol"


async def test_a_comparison_of_a_refused_group_is_dropped(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_arguments: object) -> Verdict:
        raise DamageError("the store is gone")

    async with vault.peer() as peer:
        agent = await peer.attach()
        with monkeypatch.context() as patch:
            patch.setattr(GroupComparison, "compare", compare)
            await ask(peer, agent, bytes(65536), stamp=0)
            refusal = await peer.refusal()
            assert (refusal.code, refusal.group) == ("damage", "web")
        await ask(peer, agent, bytes(65536), stamp=0)
        again = await peer.attach()
        await ask(peer, again, bytes(65536), stamp=0)
        assert (await verdict(peer)).differing == ()


async def test_a_scrub_over_the_wire_proves_and_its_next_proof_heals(
    vault: Vault, tmp_path: Path
) -> None:
    async with vault.peer() as peer:
        agent = await peer.attach()
        data = os.urandom(MIB)
        await peer.send(agent.base(0, data), write(agent, MIB, data[:65536]), agent.consistent())
        await peer.acknowledged(3)
        content = data + data[:65536]
        whole = content + bytes(DISK_BYTES - len(content))
        for offset in range(0, DISK_BYTES, 16 * MIB):
            await ask(peer, agent, whole[offset:][: 16 * MIB], offset=offset,
                      purpose=Purpose.SCRUB)  # fmt: skip
            assert (await verdict(peer)).differing == ()
        disk = (await vault.group())["disks"][0]
        assert (disk["verified_ns"], disk["mismatches"]) == (agent.stamp, 0)

        flip(vault.home.replica_directory("web") / "base" / "root.img", 70_000)
        await ask(peer, agent, data, purpose=Purpose.SCRUB)
        assert (await verdict(peer)).differing == (1,)
        disk = (await vault.group())["disks"][0]
        assert (disk["verified_ns"], disk["mismatches"]) == (None, 1)
        # A gap of other bytes: what differs was not sent again.
        await peer.send(agent.gap(), write(agent, MIB, data[:65536]), agent.consistent())
        await peer.acknowledged(6)
        assert (await vault.group())["disks"][0]["mismatches"] == 1
        await peer.send(write(agent, 65536, data[65536:131072]))  # by the guest, say
        await peer.acknowledged(7)
        await ask(peer, agent, data, purpose=Purpose.SCRUB)
        assert (await verdict(peer)).differing == ()
        assert (await vault.group())["disks"][0]["mismatches"] == 0


async def test_what_cannot_be_compared_is_told_by_status_and_verify(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_segments(monkeypatch)
    async with vault.peer() as peer:
        agent = await peer.attach()
        data = os.urandom(MIB)
        await peer.send(agent.base(0, data), agent.consistent())
        await peer.acknowledged(2)
        for number in range(3):
            await peer.send(write(agent, number * 65536, data[:65536]))
            await peer.acknowledged(3 + number)
        min((vault.home.replica_directory("web") / "segments").iterdir()).unlink()
        await ask(peer, agent, data, purpose=Purpose.SCRUB)
        assert (await verdict(peer)).differing == ()
        group = await vault.group()
        assert "disk root cannot be compared with its source: " in group["problem"]
        (proof,) = await vault.control("GET", "/verify/web")
        assert (proof["unreadable"], proof["mismatches"]) == (group["problem"], 0)
