"""The scrub at the source: what it calls the same is the same at that very stamp, what differs is
found exactly, and healed, and nothing that is healthy is ever said to differ.

The receiver here replays what it was sent up to the stamp of each comparison: its answers are the
truth about the stream. What a test flips in the image behind the product's back must be found.
"""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from pumping import (
    Guest,
    Receiver,
    Source,
    a_round,
    attach,
    check_stream,
    known,
    linked,
    make_pump,
    pumping,
    random_bytes,
    replay,
    until,
)

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats.comparison import Compare, Purpose, Verdict
from blockrepl.formats.frame import FrameKind
from blockrepl.formats.marks import ConsistentMark, GapMark
from blockrepl.formats.messages import AttachedDisk
from blockrepl.model.scrub import ScrubPlan
from blockrepl.services import scrubber
from blockrepl.services.group_pump import GroupPump
from blockrepl.services.scrub_pace import (
    METER_SECONDS,
    PASS_SECONDS,
    UNDER_WAY_MAX,
    Meter,
    ScrubPool,
)
from blockrepl.services.scrubber import GroupScrub, Instant
from blockrepl.services.source_disk import SourceDisk
from blockrepl.storage.pieces import digest_range
from blockrepl.storage.ring import ring_path
from blockrepl.storage.source import DiskEntry
from blockrepl.units import MIB

SIZE = 6 * MIB
BLOCK = limits.COMPARE_BLOCK_BYTES


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    found = Source(tmp_path)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle pumps send watermarks often: the scrub waits for the first."""
    monkeypatch.setattr(limits, "WATERMARK_SECONDS", 0.05)


def scrubs(receiver: Receiver) -> list[Compare]:
    return [one for one in receiver.compared if one.purpose is Purpose.SCRUB]


@asynccontextmanager
async def scrubbing(
    source: Source,
    receiver: Receiver,
    disk: DiskEntry | AttachedDisk,
    *,
    rate: float = 1e9,
    ring_id: int | None = None,
) -> AsyncIterator[tuple[GroupPump, GroupScrub]]:
    """A session that pumps and scrubs."""
    answer = known(disk, ring_id=ring_id) if isinstance(disk, DiskEntry) else disk
    async with pumping(source, receiver, answer) as pump:
        scrub = GroupScrub(ScrubPool(rate), source.clock)
        pump.comparers.append(scrub)
        scrub.follow(pump)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrub.run)
            yield pump, scrub
            nursery.cancel_scope.cancel()
        scrub.close()


def is_done(scrub: GroupScrub, entry: DiskEntry) -> bool:
    told = scrub.passes().get(entry.id.bytes)
    return told is not None and told.ended_ns is not None


def flip(path: Path, offset: int, count: int = 1) -> None:
    """Change bytes behind the product's back."""
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(count)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in data))


async def test_a_quiet_disk_is_proven_region_by_region(source: Source) -> None:
    content = random_bytes(SIZE)
    entry = source.add("root", SIZE, content=content)
    receiver = Receiver(before={entry.id.bytes: content})
    async with scrubbing(source, receiver, entry) as (pump, scrub):
        await until(lambda: is_done(scrub, entry))
        assert pump.disks[0].state == "ready"
    asked = scrubs(receiver)
    assert sorted(one.offset for one in asked) == list(range(0, SIZE, MIB))
    assert {one.length for one in asked} == {MIB}
    (told,) = scrub.passes().values()
    assert (told.progress, told.skipped_regions, told.differing_regions) == (1.0, 0, 0)
    assert receiver.marks() == []


async def test_what_differs_is_found_exactly_and_healed_in_one_gap(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    content = random_bytes(SIZE)
    entry = source.add("root", SIZE, content=content)
    receiver = Receiver(before={entry.id.bytes: content})
    flip(entry.image, 2 * MIB + 3 * BLOCK)
    flip(entry.image, 4 * MIB + 5 * BLOCK - 1)
    async with scrubbing(source, receiver, entry) as (_, scrub):
        await until(lambda: is_done(scrub, entry))
        (told,) = scrub.passes().values()
    assert told.differing_regions == 2
    # each region is read again once it is healed: the pass ends with its proof
    again = [one.offset // MIB for one in scrubs(receiver)]
    assert sorted(again) == [0, 1, 2, 2, 3, 4, 4, 5]
    gap, consistent = receiver.marks()
    assert isinstance(gap, GapMark)
    assert isinstance(consistent, ConsistentMark)
    sent = [record[1:3] for frame in receiver.of(FrameKind.SYNC) for record in frame.records]
    assert sorted(sent) == [(2 * MIB + 3 * BLOCK, BLOCK), (4 * MIB + 4 * BLOCK, BLOCK)]
    now = replay(receiver.frames, entry.id.bytes, SIZE, before=content)
    assert now == entry.image.read_bytes()
    check_stream(receiver.frames, source.watermark)
    (line,) = (one for one in caplog.records if "history has a gap" in one.message)
    assert line.levelno == logging.INFO
    assert "disk root: the scrub found a difference: history" in line.message


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_gap_that_was_asked_for_says_so_unless_something_is_lost(
    source: Source, caplog: pytest.LogCaptureFixture, is_lost: bool
) -> None:
    # Guards GroupPump._put_gap: "some records are lost" was said of every resync.
    caplog.set_level(logging.INFO)
    entry = source.add("root", SIZE, content=random_bytes(SIZE))
    guest = source.guest(entry)
    async with pumping(source, Receiver(), known(entry)) as pump:
        async with pump.between_rounds:
            if is_lost:
                guest.write(0, b"x" * 512, kept=False)
            pump.disks[0].doubt(slice(None), source.watermark + 1, "a resync was asked for")
        await until(lambda: "history has a gap" in caplog.text)
    (told,) = (one for one in caplog.records if "history has a gap" in one.message)
    assert told.levelno == (logging.WARNING if is_lost else logging.INFO)
    assert ("a resync was asked for" in told.message) == (not is_lost)
    assert ("1 records were not kept" in told.message) == is_lost


class Load:
    """A thread that writes as a server does, now here, now there, half a write at a time."""

    def __init__(self, guest: Guest, size_bytes: int) -> None:
        self._guest = guest
        self._choose = random.Random(size_bytes)
        self._size_bytes = size_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        choose, writer, image = self._choose, self._guest.writer, self._guest.image
        while not self._stop.wait(choose.choice((0, 0.001, 0.002))):
            length = choose.choice((512, 4096, 16384))
            room = self._size_bytes if choose.random() < 0.1 else MIB
            offset, half = choose.randrange(0, room - length, 512), length // 2
            data = choose.randbytes(16) * (length // 16)
            writer.take_range(slot := choose.randrange(128), offset, offset + length)
            os.pwrite(image, data[:half], offset)
            self._stop.wait(choose.choice((0, 0.001)))
            os.pwrite(image, data[half:], offset + half)
            writer.write(offset, data)
            writer.release_range(slot)


LOADED = 3 * MIB
ENOUGH = 25  # comparisons, and as many reads disturbed: a plant is found within a few


async def scrub_under_load(source: Source, monkeypatch: pytest.MonkeyPatch) -> Receiver:
    """Pass after pass while a guest writes, until something differs or it has been enough."""
    disturbed = 0

    def is_quiet(instant: Instant, start: int, end: int) -> bool:
        nonlocal disturbed
        answer = look(instant, start, end)
        disturbed += not answer
        return answer

    look = Instant.is_quiet
    monkeypatch.setattr(Instant, "is_quiet", is_quiet)
    monkeypatch.setattr("blockrepl.model.scrub.RETRY_SECONDS", (0.0,) * 5)
    content = random_bytes(LOADED)
    entry = source.add("root", LOADED, content=content)
    receiver = Receiver(before={entry.id.bytes: content})

    def is_enough() -> bool:
        if is_done(scrub, entry):
            scrub.begin_now()
        found = len(scrubs(receiver))
        return bool(receiver.marks()) or (found > ENOUGH and disturbed > ENOUGH)

    with Load(source.guest(entry), LOADED):
        async with scrubbing(source, receiver, entry, rate=1e12) as (_, scrub):
            await until(is_enough)
    return receiver


async def test_under_writes_nothing_is_said_to_differ(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = await scrub_under_load(source, monkeypatch)
    assert receiver.marks() == []  # no gap: nothing was doubted


async def test_a_scrubber_that_ignores_writes_finds_what_is_not_there(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The test above would see it: Instant.is_quiet is what keeps it green.
    monkeypatch.setattr(Instant, "is_quiet", lambda *_: True)
    receiver = await scrub_under_load(source, monkeypatch)
    assert receiver.marks()


async def test_records_sent_that_are_younger_than_the_watermark_are_not_missed(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the stamp of an instant in Instant.now: the watermark alone would leave them out.
    entry = source.add("root", MIB)
    guest, receiver = source.guest(entry), Receiver()
    read_clock = source.clock.now

    def now() -> int:
        clock = read_clock()
        if len(receiver.records(entry.id.bytes)) < 100:
            guest.write(random.randrange(0, MIB, 512), os.urandom(512))
        return clock

    monkeypatch.setattr(source.clock, "now", now)
    async with scrubbing(source, receiver, entry) as (_, scrub):
        await until(lambda: is_done(scrub, entry))
    assert receiver.marks() == []


async def test_records_younger_than_the_watermark_an_earlier_pump_left_are_not_missed(
    source: Source,
) -> None:
    # Guards ``watermark <= self._first_watermark`` in GroupScrub._take_instant.
    entry = source.add("root", MIB)
    guest, receiver = source.guest(entry), Receiver()
    async with pumping(source, receiver, known(entry)):
        guest.write(0, b"x" * 512)
        await until(lambda: receiver.records(entry.id.bytes))
    (record,) = receiver.records(entry.id.bytes)
    answer = attach(
        source, known(entry, next_sequence=1), next_number=len(receiver.frames) + 1,
        watermark=record[0] - 1,
    )  # fmt: skip
    pump = make_pump(source, answer)
    scrub = GroupScrub(ScrubPool(1e9), source.clock)
    pump.comparers.append(scrub)
    scrub.follow(pump)
    try:
        async with linked(pump, receiver, answer), trio.open_nursery() as nursery:
            nursery.start_soon(scrub.run)
            async with pump.between_rounds:  # the scrub looks first
                await trio.sleep(3 * scrubber.LOOK_SECONDS)
            nursery.start_soon(pump.run)
            await until(lambda: is_done(scrub, entry))
            nursery.cancel_scope.cancel()
    finally:
        scrub.close()
        for disk in pump.disks:
            disk.close()
        pump.outbox.spool.close()
    assert receiver.marks() == []
    assert min(one.stamp for one in scrubs(receiver)) > record[0]


async def test_a_disk_without_a_ring_is_proven_too(source: Source) -> None:
    content = random_bytes(SIZE)
    entry = source.add("root", SIZE, content=content)
    receiver = Receiver(before={entry.id.bytes: content})
    ring_path(entry.id.bytes).unlink()
    async with scrubbing(source, receiver, entry, ring_id=7) as (pump, scrub):
        await until(lambda: is_done(scrub, entry))
        assert pump.disks[0].ring is None
        flip(entry.image, 3 * MIB)
        scrub.begin_now()
        await until(lambda: is_done(scrub, entry))
    assert [record[1:3] for frame in receiver.of(FrameKind.SYNC) for record in frame.records] == [
        (3 * MIB, BLOCK)
    ]
    assert replay(receiver.frames, entry.id.bytes, SIZE, before=content) == entry.image.read_bytes()


async def test_a_ring_that_is_made_while_a_disk_without_one_is_read_disturbs(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the first lines of Instant.is_quiet.
    content = random_bytes(MIB)
    entry = source.add("root", MIB, content=content)
    receiver = Receiver(before={entry.id.bytes: content})
    ring_path(entry.id.bytes).unlink()
    made: list[int] = []

    def digest(image: int, start: int, end: int) -> bytes:
        if not made:
            made.append(source.make_ring(entry))
            source.guest(entry).write(0, b"x" * 512)
        return digest_range(image, start, end)

    monkeypatch.setattr(scrubber, "digest_range", digest)
    async with scrubbing(source, receiver, entry, ring_id=7) as (_, scrub):
        await until(lambda: is_done(scrub, entry))
    assert made
    assert receiver.marks() == []


async def test_a_busy_region_is_skipped_at_last_and_counted(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockrepl.model.scrub.RETRY_SECONDS", (0.01, 0.01))
    entry = source.add("root", SIZE)
    guest, receiver = source.guest(entry), Receiver()
    guest.writer.take_range(0, MIB, MIB + 512)
    async with scrubbing(source, receiver, entry) as (_, scrub):
        await until(lambda: is_done(scrub, entry))
    (told,) = scrub.passes().values()
    assert (told.progress, told.skipped_regions) == (1.0, 1)
    assert MIB not in [one.offset for one in scrubs(receiver)]


async def test_a_lost_link_loses_no_region_and_no_place(source: Source) -> None:
    # Guards the releases in GroupScrub.interrupted: after two lost links nothing would be read.
    entry = source.add("root", SIZE)
    receiver = Receiver()
    answer = attach(source, known(entry))
    pump = make_pump(source, answer)
    pool = ScrubPool(1e9)
    scrub = GroupScrub(pool, source.clock)
    pump.comparers.append(scrub)
    scrub.follow(pump)
    held: list[Compare] = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            nursery.start_soon(scrub.run)
            for _ in range(3):
                answered, receiver.answer = receiver.answer, held.append
                link = attach(source, known(entry), next_number=pump.outbox.known.next_number)
                async with linked(pump, receiver, link):
                    await until(lambda: pool.places.value == 0 and held)
                receiver.answer = answered
                held.clear()
            link = attach(source, known(entry), next_number=pump.outbox.known.next_number)
            async with linked(pump, receiver, link):
                await until(lambda: is_done(scrub, entry))
            nursery.cancel_scope.cancel()
    finally:
        scrub.close()
        for disk in pump.disks:
            disk.close()
        pump.outbox.spool.close()
    assert {one.offset for one in scrubs(receiver)} == set(range(0, SIZE, MIB))
    assert pool.places.value == UNDER_WAY_MAX


async def test_no_disk_is_scrubbed_before_its_first_sync_is_done(source: Source) -> None:
    entry = source.add("root", SIZE, hot=True)
    guest, receiver = source.guest(entry), Receiver()
    guest.writer.take_range(0, 0, 512)  # holds up the consistent mark
    answer = known(entry, "empty", ring_id=0)
    async with scrubbing(source, receiver, answer) as (pump, scrub):
        await until(lambda: receiver.of(FrameKind.BASE))
        await a_round(pump)
        assert not scrub.passes()
        guest.writer.release_range(0)
        await until(lambda: is_done(scrub, entry))
    assert scrubs(receiver)


async def test_a_verdict_of_another_range_is_the_receivers_fault(source: Source) -> None:
    entry = source.add("root", MIB)
    receiver = Receiver()
    held: list[Compare] = []
    receiver.answer = held.append
    async with scrubbing(source, receiver, entry) as (pump, _):
        await until(lambda: held)
        (asked,) = held
        with pytest.raises(PeerError, match="another range"):
            pump.verdict(Verdict(asked.group, asked.token, 1, ()))


async def test_what_differs_is_sent_again_though_the_disk_grows_meanwhile(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``doubted`` in GroupScrub.follow: a new scrub of the grown disk knew nothing of it.
    heal_seconds = scrubber.HEAL_SECONDS
    monkeypatch.setattr(scrubber, "HEAL_SECONDS", math.inf)
    content = random_bytes(SIZE)
    entry = source.add("root", SIZE, content=content)
    receiver = Receiver(before={entry.id.bytes: content})
    flip(entry.image, 2 * MIB)
    # No rate: no pass of the grown disk finds it once more.
    async with scrubbing(source, receiver, entry, rate=0.0) as (pump, scrub):
        scrub.begin_now()
        await until(lambda: scrub.disks[entry.id.bytes].doubted)
        before = scrub.disks[entry.id.bytes]
        before.plan.size_bytes -= MIB  # as if it had been of less
        scrub.follow(pump)
        assert scrub.disks[entry.id.bytes].plan is not before.plan
        monkeypatch.setattr(scrubber, "HEAL_SECONDS", heal_seconds)
        await until(lambda: len(receiver.marks()) == 2)
    assert replay(receiver.frames, entry.id.bytes, SIZE, before=content) == entry.image.read_bytes()


async def test_a_doubt_that_was_never_told_is_made_good_by_the_next_agent(source: Source) -> None:
    # Guards ``is_doubted`` in SourceDisk._resume: a ready disk with stale regions and no gap would
    # never be synced, and its pump never rest.
    content = random_bytes(SIZE)
    entry = source.add("root", SIZE, content=content)
    receiver = Receiver(before={entry.id.bytes: content})
    flip(entry.image, MIB)
    disk = make_pump(source, attach(source, known(entry))).disks[0]
    disk.doubt(np.array([1]), source.watermark + 1, "it was asked for")
    disk.close()
    async with pumping(source, receiver, known(entry)) as pump:
        await until(lambda: len(receiver.marks()) == 2)
        await until(lambda: pump.disks[0].owes_note)
        pump.disks[0].note_consistent()
        assert source.disks.load("root").stale_ring == 0
        assert pump.disks[0].state == "ready"
    assert replay(receiver.frames, entry.id.bytes, SIZE, before=content) == entry.image.read_bytes()


async def test_a_doubt_that_was_noted_and_not_marked_is_carried_out_by_the_next_agent(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``is_unmarked``: the note stayed, half of it, and a resync in full was forgotten.
    content = random_bytes(SIZE)
    entry = source.add("root", SIZE, content=content)
    receiver = Receiver(before={entry.id.bytes: content})
    flip(entry.image, MIB)
    disk = make_pump(source, attach(source, known(entry))).disks[0]

    class KilledError(Exception):
        pass

    def killed_behind_it(*arguments: Any, **changes: Any) -> DiskEntry:
        note_rings(*arguments, **changes)
        raise KilledError

    note_rings = source.disks.note_rings
    monkeypatch.setattr(source.disks, "note_rings", killed_behind_it)
    with pytest.raises(KilledError):
        disk.doubt(slice(None), source.watermark + 1, "it was asked for", send_all=True)
    monkeypatch.undo()
    disk.close()
    async with pumping(source, receiver, known(entry)) as pump:
        await until(lambda: len(receiver.marks()) == 2)
        await until(lambda: pump.disks[0].owes_note)
        pump.disks[0].note_consistent()
        assert source.disks.load("root").stale_ring == 0
        assert pump.disks[0].retirement() is not None
    assert receiver.compared == []  # all of it was sent, as was asked
    assert replay(receiver.frames, entry.id.bytes, SIZE) == entry.image.read_bytes()


def test_a_doubt_that_is_made_good_is_over_though_nobody_noted_it(source: Source) -> None:
    # Guards the end of ``send_all`` in SourceDisk._resume: an agent killed before it noted the end
    # left a ring that could never be given back.
    entry = source.add("root", SIZE)
    ring_id = known(entry).ring_id
    source.disks.note_rings(entry, stale_ring=ring_id, base_ring=0, send_all=True)
    disk = a_disk(source, source.disks.load("root"))
    entry = source.disks.load("root")
    assert (entry.stale_ring, entry.send_all) == (0, False)
    assert disk.retirement() is not None
    disk.close()


def test_a_doubt_whose_marks_are_there_is_marked_no_further(source: Source) -> None:
    # Guards the second note in SourceDisk._doubt: one region would become all of them.
    entry = source.add("root", SIZE)
    disk = a_disk(source, entry)
    disk.doubt(np.array([1]), source.watermark + 1, "it was asked for")
    disk.close()
    again = a_disk(source, source.disks.load("root"))
    assert again.ring is not None
    assert np.flatnonzero(again.ring.stale).tolist() == [1]
    again.close()


async def test_the_rate_is_shared_by_the_disks_with_a_pass_under_way() -> None:
    pool = ScrubPool(12e6)
    plans = [ScrubPlan(SIZE, 0.0) for _ in range(3)]
    for plan in plans:
        pool.add(plan)
    assert pool.share(plans[0], 0.0) == 12e6
    plans[1].begin_now(0.0)
    plans[2].begin_now(0.0)
    assert pool.share(plans[0], 0.0) == 4e6
    pool.remove(plans[2])
    assert pool.share(plans[0], 0.0) == 6e6


async def test_a_scrub_takes_what_replication_leaves_of_its_rate() -> None:
    pool = ScrubPool(12e6)
    plan = ScrubPlan(SIZE, 0.0)
    pool.add(plan)
    assert pool.share(plan, 6e6) == 6e6
    assert pool.share(plan, 11.9e6) == pool.share(plan, math.inf) == 12e6 / 20
    assert ScrubPool(math.inf).share(plan, 1e12) == math.inf
    assert ScrubPool(0.0).share(plan, 1e6) == 0.0  # only when asked for


async def test_a_pass_ends_in_a_week_beside_the_busiest_guest() -> None:
    pool = ScrubPool(12e6)
    plans = [ScrubPlan(round(5e11), 0.0) for _ in range(2)]
    for plan in plans:
        pool.add(plan)
    assert pool.share(plans[0], math.inf) == pytest.approx(5e11 / PASS_SECONDS)
    plans[1].begin_now(0.0)
    assert pool.share(plans[0], math.inf) == pytest.approx(5e11 / PASS_SECONDS)
    # But it takes a quarter of the rate at most.
    assert pool.share(ScrubPlan(limits.DISK_BYTES_MAX, 0.0), math.inf) == 12e6 / 4 / 2


async def test_a_pass_that_somebody_waits_for_takes_the_quarter() -> None:
    pool, plan = ScrubPool(12e6), ScrubPlan(SIZE, 0.0)
    pool.add(plan)
    plan.begin_now(0.0)
    assert pool.share(plan, math.inf) == 12e6 / 4


async def test_the_speed_of_replication_is_measured(autojump_clock: object) -> None:
    meter = Meter(100)
    await trio.sleep(METER_SECONDS / 2)
    assert meter.read(10_000) == 0.0
    await trio.sleep(METER_SECONDS * 1.5)
    assert meter.read(2100) == 2000 / (METER_SECONDS * 2)
    await trio.sleep(METER_SECONDS / 2)
    assert meter.read(1 << 40) == 2000 / (METER_SECONDS * 2)
    await trio.sleep(METER_SECONDS)
    assert meter.read(2100) == 0.0


async def test_a_scrub_gives_way_while_records_wait(source: Source) -> None:
    content = random_bytes(SIZE)
    entry = source.add("root", SIZE, content=content)
    receiver = Receiver(before={entry.id.bytes: content}, at_once=False)
    guest = source.guest(entry)
    async with scrubbing(source, receiver, entry, rate=1e6) as (pump, scrub):
        plan = scrub.disks[entry.id.bytes].plan
        for at in range(0, SIZE, MIB):
            guest.write(at, random_bytes(MIB, at))
        await until(lambda: pump.outbox.waiting_bytes >= 5 * MIB)
        scrub.begin_now()
        await until(lambda: plan.rate == 1e6 / 4)
        receiver.at_once = True
        receiver.acknowledge()
        await until(lambda: pump.outbox.waiting_bytes < MIB)

        def has_full_rate() -> bool:
            scrub.begin_now()  # else it need not look again for a minute
            return plan.rate == 1e6

        await until(has_full_rate)


def a_disk(source: Source, entry: DiskEntry, ring_id: int | None = None) -> SourceDisk:
    return make_pump(source, attach(source, known(entry, ring_id=ring_id))).disks[0]


def test_an_instant_of_a_ring_that_was_replaced_tells_nothing(source: Source) -> None:
    # Guards ``is_current`` in Instant.is_quiet: the new ring's server writes unseen.
    entry = source.add("root", MIB)
    disk = a_disk(source, entry)
    instant = Instant.now(disk, source.watermark)
    assert instant is not None
    assert instant.is_quiet(0, MIB)
    ring_path(entry.id.bytes).unlink()
    source.make_ring(entry)
    assert not instant.is_quiet(0, MIB)
    os.close(instant.image)
    disk.close()


def test_a_ring_that_came_and_went_is_noticed(source: Source) -> None:
    # Guards ``rings_seen`` in Instant.is_quiet.
    entry = source.add("root", MIB)
    ring_path(entry.id.bytes).unlink()
    disk = a_disk(source, entry, ring_id=7)
    instant = Instant.now(disk, source.watermark)
    assert instant is not None
    assert instant.is_quiet(0, MIB)
    source.make_ring(entry)
    disk.refresh(source.watermark)
    disk.close()
    ring_path(entry.id.bytes).unlink()
    assert not instant.is_quiet(0, MIB)
    os.close(instant.image)


def test_what_was_only_put_stays_in_a_ring_that_has_grown(source: Source) -> None:
    # Guards ``is_durable`` in SourceDisk.refresh: killed before the acknowledgement, it was a gap.
    entry = source.add("root", MIB)
    guest, disk = source.guest(entry), a_disk(source, entry)
    guest.write(4096, b"x" * 512)
    assert disk.ring is not None
    disk.cursor = disk.ring.head()
    path = ring_path(entry.id.bytes)
    os.rename(shutil.copy(path, path.with_suffix(".copy")), path)  # as `make_grown` has it
    before = disk.ring
    disk.refresh(source.watermark)
    assert disk.ring is not before
    assert (disk.cursor, disk.ring.tail()) == (1, 0)
    disk.close()


def test_a_record_that_was_not_sent_yet_is_too_young(source: Source) -> None:
    # Guards the place of an instant in Instant.now: the ring's head would be behind that record.
    entry = source.add("root", MIB)
    guest, disk = source.guest(entry), a_disk(source, entry)
    guest.write(4096, b"x" * 512)
    instant = Instant.now(disk, source.watermark)
    assert instant is not None
    assert not instant.is_quiet(0, MIB)
    assert instant.is_quiet(0, 4096)
    os.close(instant.image)
    disk.close()


def test_what_is_known_to_be_owed_is_not_scrubbed(source: Source) -> None:
    entry = source.add("root", MIB)
    guest, disk = source.guest(entry), a_disk(source, entry)
    guest.write(0, b"x" * 512, kept=False)
    assert Instant.now(disk, source.watermark) is None
    disk.close()


def test_a_doubt_outlives_the_acknowledgement_of_an_older_mark(source: Source) -> None:
    # Guards ``needs_sync`` in SourceDisk.note_consistent: a lost ring would take it along.
    entry = source.add("root", MIB)
    disk = a_disk(source, entry)
    disk.doubt(slice(None), source.watermark + 1, "it was asked for")
    disk.consistent_durable()
    disk.note_consistent()
    assert source.disks.load("root").stale_ring == known(entry).ring_id
    disk.close()


def test_a_mark_acknowledged_amid_a_doubt_leaves_its_note(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the look at ``_noting`` in SourceDisk.note_consistent: the note was overwritten before
    # the marks were there, and a power cut took the marks.
    entry = source.add("root", MIB)
    disk = a_disk(source, entry)
    note_rings = source.disks.note_rings

    def acknowledged_behind_it(*arguments: Any, **changes: Any) -> DiskEntry:
        disk.entry = note_rings(*arguments, **changes)
        monkeypatch.undo()
        disk.consistent_durable()
        disk.note_consistent()
        return disk.entry

    monkeypatch.setattr(source.disks, "note_rings", acknowledged_behind_it)
    disk.doubt(slice(None), source.watermark + 1, "it was asked for")
    assert source.disks.load("root").stale_ring == known(entry).ring_id
    disk.close()


def test_a_doubt_amid_the_acknowledgement_of_a_mark_is_noted(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``_noting`` in SourceDisk.doubt: it found its ring noted, just before it was not.
    entry = source.add("root", MIB)
    disk = a_disk(source, entry)
    disk.entry = source.disks.note_rings(entry, stale_ring=known(entry).ring_id, base_ring=0)
    doubt = threading.Thread(target=disk.doubt, args=(slice(None), source.watermark + 1, "asked"))
    note_rings = source.disks.note_rings

    def doubted_behind_it(*arguments: Any, **changes: Any) -> DiskEntry:
        noted = note_rings(*arguments, **changes)
        monkeypatch.undo()
        doubt.start()
        doubt.join(0.2)  # it has to wait for us
        return noted

    monkeypatch.setattr(source.disks, "note_rings", doubted_behind_it)
    disk.consistent_durable()
    disk.note_consistent()
    doubt.join()
    assert source.disks.load("root") == disk.entry
    assert disk.entry.stale_ring == known(entry).ring_id
    disk.close()


def test_a_ring_that_is_taken_up_amid_the_note_of_a_syncs_end_keeps_its_own(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``_noting`` in SourceDisk.refresh: of a ring that was lost the note was overwritten,
    # and a second loss took its marks, of all regions, along.
    entry = source.add("root", MIB)
    disk = a_disk(source, entry)
    disk.entry = source.disks.note_rings(entry, stale_ring=known(entry).ring_id, base_ring=0)
    ring_path(entry.id.bytes).unlink()
    ring_id = source.make_ring(entry)
    refresh = threading.Thread(target=disk.refresh, args=(source.watermark,))
    note_rings = source.disks.note_rings

    def lost_before_it(*arguments: Any, **changes: Any) -> DiskEntry:
        monkeypatch.undo()
        refresh.start()
        refresh.join(0.2)  # it has to wait for us
        return note_rings(*arguments, **changes)

    monkeypatch.setattr(source.disks, "note_rings", lost_before_it)
    disk.consistent_durable()
    disk.note_consistent()
    refresh.join()
    assert disk.ring is not None
    assert not disk.ring.needs_sync() or source.disks.load("root").stale_ring == ring_id
    disk.close()


def test_the_end_of_a_sync_is_not_noted_once_history_is_broken_again(source: Source) -> None:
    # Guards SourceDisk.gap_reported: the mark that says so again may be lost with its frames.
    entry = source.add("root", MIB)
    disk = a_disk(source, entry)
    disk.entry = source.disks.note_rings(entry, stale_ring=known(entry).ring_id, base_ring=0)
    disk.consistent_durable()
    disk.gap_reported(source.watermark + 1)
    disk.gap_durable(source.watermark + 1)
    disk.became_consistent()
    disk.note_consistent()
    assert source.disks.load("root").stale_ring == known(entry).ring_id
    disk.close()
