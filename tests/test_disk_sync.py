"""Content on its way: what interrupts it, and what it must not hold up."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from pumping import Receiver, Source, a_round, known, pumping, random_bytes, replay, until

from blockrepl.formats.frame import EncodedFrame, FrameKind
from blockrepl.formats.messages import MessageType
from blockrepl.services import disk_sync
from blockrepl.services.disk_sync import AHEAD_BYTES
from blockrepl.services.outbox_ends import Take
from blockrepl.storage.pieces import DATA_BYTES_MAX, Piece, choose_regions, read_piece
from blockrepl.units import MIB

SIZE = 48 * MIB


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    found = Source(tmp_path)
    yield found
    found.close()


async def test_content_never_holds_up_records_for_long(source: Source) -> None:
    # Guards AHEAD_BYTES in DiskSync.wants: all of the outbox's memory was filled with content, and
    # no record had room in it.
    assert SIZE > AHEAD_BYTES + 2 * DATA_BYTES_MAX
    entry = source.add("root", SIZE, hot=True, content=random_bytes(SIZE))
    guest = source.guest(entry)
    gate = trio.Event()

    class Slow(Receiver):
        async def send(self, message: MessageType, size_bytes: int, take: Take) -> None:
            await gate.wait()
            await super().send(message, size_bytes, take)

    receiver = Slow()
    async with pumping(source, receiver, known(entry, "empty", ring_id=0)) as pump:
        await until(lambda: pump.outbox.waiting_bytes >= AHEAD_BYTES)
        for _ in range(5):
            guest.write(0, b"x" * 512)
            head = guest.writer.head
            await until(lambda: pump.disks[0].cursor == head)  # noqa: B023
            await a_round(pump)
        assert pump.outbox.waiting_bytes < AHEAD_BYTES + DATA_BYTES_MAX + MIB
        gate.set()
        await until(receiver.marks)
    assert replay(receiver.frames, entry.id.bytes, SIZE) == entry.image.read_bytes()


async def test_a_round_goes_out_between_two_pieces(source: Source) -> None:
    # Guards the one step in GroupPump._send_piece.
    entry = source.add("root", SIZE, hot=True, content=random_bytes(SIZE))
    guest = source.guest(entry)
    receiver = Receiver()
    async with pumping(source, receiver, known(entry, "empty", ring_id=0)) as pump:
        put = pump.outbox.put

        async def then_write(frame: EncodedFrame, **words: object) -> None:
            await put(frame, **words)  # type: ignore[arg-type]
            if frame.header.kind == FrameKind.BASE:
                guest.write(0, b"x" * 512)

        pump.outbox.put = then_write  # type: ignore[method-assign]
        await until(receiver.marks)
    kinds = [frame.header.kind for frame in receiver.frames if frame.records]
    assert kinds.count(FrameKind.BASE) > 5
    pairs = list(itertools.pairwise(kinds))
    assert (FrameKind.BASE, FrameKind.BASE) not in pairs[1:]


async def test_a_round_reads_one_piece_however_many_disks_owe_some(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the turns in GroupPump._send_piece: ten disks' pieces held up a round for a second.
    size = 2 * DATA_BYTES_MAX
    owing = [source.add(name, size, hot=True, content=random_bytes(size)) for name in "ac"]
    told = [known(entry, "empty", ring_id=0) for entry in owing]
    told.insert(1, known(source.add("b", size)))  # owes nothing, and has no turn
    assert 2 * size <= AHEAD_BYTES
    rounds: list[list[bytes]] = []  # the disks that were read in each
    receiver = Receiver()
    async with pumping(source, receiver, *told) as pump:
        a_whole_round = pump._round

        async def a_round_of_its_own() -> bool:
            rounds.append([])
            return await a_whole_round()

        def read(image: int, *arguments: Any) -> Piece:
            rounds[-1] += [disk.id for disk in pump.disks if disk.image == image]
            return read_piece(image, *arguments)

        monkeypatch.setattr(pump, "_round", a_round_of_its_own)
        monkeypatch.setattr(disk_sync, "read_piece", read)
        await until(lambda: len(receiver.marks()) == 2)
    reading = rounds[: max(at for at, disks in enumerate(rounds) if disks) + 1]
    assert reading == [[entry.id.bytes] for entry in owing] * 2
    for entry in owing:
        assert replay(receiver.frames, entry.id.bytes, size) == entry.image.read_bytes()


async def test_a_disk_that_cannot_be_read_costs_a_turn_and_holds_up_no_other(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the end of the round behind a failed reading: it takes the longest of all.
    entries = [source.add(name, MIB, hot=True, content=random_bytes(MIB)) for name in "ab"]
    rounds: list[list[bytes]] = []
    receiver = Receiver()
    async with pumping(source, receiver, *(known(one, "empty", ring_id=0) for one in entries)) as (
        pump
    ):
        a_whole_round = pump._round

        async def a_round_of_its_own() -> bool:
            rounds.append([])
            return await a_whole_round()

        def read(image: int, *arguments: Any) -> Piece:
            [disk] = [disk for disk in pump.disks if disk.image == image]
            rounds[-1].append(disk.id)
            if disk.entry.name == "a":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read_piece(image, *arguments)

        monkeypatch.setattr(pump, "_round", a_round_of_its_own)
        monkeypatch.setattr(disk_sync, "read_piece", read)
        await until(receiver.marks)
    assert [disks for disks in rounds if disks][:2] == [[entry.id.bytes] for entry in entries]


@pytest.mark.parametrize("state", ["empty", "gap"])
async def test_a_link_lost_while_regions_are_chosen_leaves_none_in_between(
    source: Source, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``epoch != self._epoch`` in DiskSync._begin: the regions began to be read after the
    # loss had started all others again, and were never sent.
    entry = source.add("root", 4 * MIB, hot=True, content=random_bytes(4 * MIB))
    source.guest(entry)
    receiver = Receiver()
    lost = 0

    def choose(image: int, stale: object, size_bytes: int, hole_regions_max: int) -> range:
        nonlocal lost
        if lost < 3:
            lost += 1
            trio.from_thread.run_sync(receiver.pump.interrupted)  # type: ignore[union-attr]
        return choose_regions(image, stale, size_bytes, hole_regions_max)  # type: ignore[arg-type]

    monkeypatch.setattr(disk_sync, "choose_regions", choose)
    told = known(entry, "empty", ring_id=0) if state == "empty" else known(entry, "gap")
    async with pumping(source, receiver, told):
        await until(receiver.marks)
    assert lost == 3
    assert replay(receiver.frames, entry.id.bytes, 4 * MIB) == entry.image.read_bytes()


async def test_what_was_blank_once_is_compared_ever_after(source: Source) -> None:
    # Guards the state in SourceDisk.must_compare: a resync of a disk whose first sync this agent
    # had done sent all that might differ.
    entry = source.add("root", 4 * MIB, hot=True, content=random_bytes(4 * MIB))
    guest = source.guest(entry)
    receiver = Receiver()
    async with pumping(source, receiver, known(entry, "empty", ring_id=0)):
        await until(receiver.marks)
        assert not receiver.compared
        guest.write(MIB, b"y" * 512, kept=False)
        await until(lambda: len(receiver.marks()) == 3)
    assert receiver.compared
    [sync] = receiver.of(FrameKind.SYNC)
    assert sync.header.payload_bytes == 65536
    assert replay(receiver.frames, entry.id.bytes, 4 * MIB) == entry.image.read_bytes()
