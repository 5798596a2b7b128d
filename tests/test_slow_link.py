"""What a slow or limited link does to the frames of a group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from pumping import (
    Receiver,
    Source,
    attach,
    check_stream,
    known,
    make_pump,
    random_bytes,
    until,
)

from blockrepl import limits
from blockrepl.formats.frame import FrameKind
from blockrepl.formats.messages import MessageType
from blockrepl.services import outbox
from blockrepl.services.outbox_ends import Take
from blockrepl.units import MIB


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    found = Source(tmp_path)
    yield found
    found.close()


async def test_a_frame_that_is_being_sent_keeps_its_bytes_when_the_ring_is_written_over(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards own() in Outbox._is_kept: the frame holds views of the ring, and while its sending is
    # held up it is moved to the spool, which lets the ring go on: its digests would not match.
    monkeypatch.setattr(outbox, "MEMORY_BYTES", 4 * MIB)
    entry = source.add("root", 64 * MIB)
    guest = source.guest(entry)
    receiver, blocked, goes_on = Receiver(), trio.Event(), trio.Event()

    async def send(message: MessageType, size_bytes: int, take: Take) -> None:
        blocked.set()
        await goes_on.wait()
        await receiver.send(message, size_bytes, take)

    answer = attach(source, known(entry))
    pump = make_pump(source, answer)
    receiver.pump = pump
    await pump.outbox.connect(answer, limits.WINDOW_FRAMES, limits.WINDOW_BYTES)
    written = 0

    def write(count: int) -> None:
        nonlocal written
        for _ in range(count):
            written += 1
            guest.write(written * MIB, random_bytes(MIB, seed=written))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump.run)
        nursery.start_soon(pump.outbox.serve, send, _no_limit)
        write(1)
        with trio.fail_after(20):
            await blocked.wait()
        write(11)
        await until(lambda: pump.outbox.spool.next_number > 8)
        ring = pump.disks[0].ring
        assert ring is not None
        for _ in range(12):  # once around
            await until(lambda: ring.used_bytes(ring.head()) < 12 * MIB)
            write(1)
        goes_on.set()
        await until(lambda: len(receiver.records(entry.id.bytes)) == written)
        nursery.cancel_scope.cancel()
    check_stream(receiver.frames, source.watermark)
    pump.disks[0].close()
    pump.outbox.spool.close()


async def _no_limit(size_bytes: int) -> None:
    """No limit."""


async def test_a_limit_holds_back_data_and_neither_marks_nor_watermarks(source: Source) -> None:
    # Guards Item.is_data: an idle group's lag would grow with what its neighbours send.
    entry = source.add("root", MIB)
    held, data_sent = trio.Event(), trio.Event()
    receiver = Receiver()

    async def shape(size_bytes: int) -> None:
        held.set()
        await data_sent.wait()

    answer = attach(source, known(entry))
    pump = make_pump(source, answer)
    receiver.pump = pump
    await pump.outbox.connect(answer, limits.WINDOW_FRAMES, limits.WINDOW_BYTES)
    guest = source.guest(entry)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump.run)
        nursery.start_soon(pump.outbox.serve, receiver.send, shape)
        await until(lambda: receiver.watermark() > source.watermark)  # idle: not held back
        assert not held.is_set()
        stamp = guest.write(0, b"x" * 512)
        with trio.fail_after(20):
            await held.wait()
        assert not receiver.of(FrameKind.SYNC)
        assert receiver.watermark() < stamp
        data_sent.set()
        await until(lambda: receiver.watermark() >= stamp)
        nursery.cancel_scope.cancel()
    assert len(receiver.records(entry.id.bytes)) == 1
    check_stream(receiver.frames, source.watermark)
    pump.disks[0].close()
    pump.outbox.spool.close()
