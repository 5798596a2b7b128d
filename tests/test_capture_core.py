"""What capture leaves in the ring and the hot map is the truth, whatever goes wrong.

The rule that all of these come back to: a disk is its records put one after the other, but for
the regions marked stale.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from oracle import nbd_client, stamps
from oracle.checker import check
from oracle.history import View
from oracle.nbd_client import Client
from oracle.writers import Pace, load, run_while
from serving import Disk, Replay, as_root, place, stale_regions, tool, wait_for

from blockrepl import limits
from blockrepl.formats.frame import FUA, KIND_MASK, RecordKind
from blockrepl.storage.clock import open_clock
from blockrepl.units import KIB, MIB
from scripts.guest.pair import COMMAND, Pair

__all__ = ["place"]

REGION = limits.REGION_BYTES


def replay_of(disk: Disk, before: bytes | None = None) -> Replay:
    return Replay(disk.reader(), bytes(disk.size_bytes) if before is None else before)


def test_records_replayed_are_the_image_and_every_prefix_is_legal(place: Pair) -> None:
    """Three connections write, zero and trim over each other while a reader drains the ring."""
    disk = Disk(place, size_bytes=16 * MIB, ring_bytes=128 * MIB)
    disk.start()
    replay = replay_of(disk)
    views: list[View] = []
    choose = random.Random(5)
    with load(disk.socket, disk.size_bytes, seed=1, pace=Pace(0.02)) as running:

        def look() -> bool:
            # as the agent takes a watermark: the clock, then what was stamped before it
            now = clock.now()
            assert replay.reader.quiesce(10.0)
            replay.drain(until_ns=now)
            if choose.random() < 0.4:
                views.append(View(now, stamps.decode(bytes(replay.content))))
            return len(views) < 20

        clock = open_clock(disk.disks.home.source_directory)
        run_while(running, look)
    replay.drain()
    assert replay.reader.dropped() == 0
    assert replay.reader.gap_from() == 0
    times = [record.stamp for record in replay.records]
    assert all(a < b for a, b in itertools.pairwise(times))
    kinds = {record.kind & KIND_MASK for record in replay.records}
    assert kinds == set(RecordKind)
    history = running.history(clock.offset_ns)
    assert len(history) > 100
    assert check(history, views) == []
    assert bytes(replay.content) == disk.content()


def test_writes_that_meet_are_recorded_in_the_order_they_reached_the_disk(place: Pair) -> None:
    """Eight connections write, zero and trim the same range at once, again and again."""
    disk = Disk(place, size_bytes=MIB, ring_bytes=64 * MIB)
    disk.start()
    replay = replay_of(disk)
    clients = [Client(disk.socket) for _ in range(8)]
    for number in range(400):
        for sequence, client in enumerate(clients):
            data = bytes([1 + (number * 8 + sequence) % 255]) * (128 * KIB)
            if sequence % 4 == 3:
                kind = nbd_client.TRIM if sequence == 3 else nbd_client.WRITE_ZEROES
                client.send(kind, 4096 * sequence, len(data))
            else:
                client.send(nbd_client.WRITE, 4096 * sequence, data=data)
        for client in clients:
            assert client.receive()[1] == 0
        replay.drain()
        assert replay.differing_regions(disk.content()) == [], f"after round {number}"
    for client in clients:
        client.close()


def test_a_record_holds_its_own_copy_of_what_was_written(place: Pair) -> None:
    """The buffer handed to the plugin is nbdkit's, and the next request reuses it."""
    disk = Disk(place)
    disk.start()
    with Client(disk.socket) as client:
        for number in range(64):
            client.write(number * 4096, stamps.encode(1, number, number * 8, 8))
    replay = replay_of(disk)
    replay.drain()
    found = stamps.decode(bytes(replay.content))[: 64 * 8]
    assert found.tolist() == [stamps.identity(1, n) for n in range(64) for _ in range(8)]


def test_a_large_request_becomes_records_that_fit_a_frame(place: Pair) -> None:
    disk = Disk(place, size_bytes=64 * MIB, ring_bytes=64 * MIB)
    disk.start()
    data = random.Random(3).randbytes(32 * MIB)
    with Client(disk.socket) as client:
        client.write(777, data)
        assert client.read(777, 32 * MIB) == data
    replay = replay_of(disk)
    records = replay.drain()
    assert {record.length for record in records} == {limits.REQUEST_BYTES_MAX}
    assert bytes(replay.content) == disk.content()


def test_kinds_and_flags_of_records(place: Pair) -> None:
    disk = Disk(place)
    disk.start()
    with Client(disk.socket) as client:
        client.write(10, b"a" * 3)
        client.write(20, b"b", flags=nbd_client.FUA)
        client.zero(512, 1024, flags=nbd_client.NO_HOLE | nbd_client.FUA)
        client.trim(4096, 4096)
        client.flush()
    found = [(r.kind, r.offset, r.length) for r in replay_of(disk).drain()]
    assert found == [
        (RecordKind.WRITE, 10, 3),
        (RecordKind.WRITE | FUA, 20, 1),
        (RecordKind.ZERO | FUA, 512, 1024),
        (RecordKind.TRIM, 4096, 4096),
        (RecordKind.FLUSH, 0, 0),
    ]


def test_a_full_ring_lets_the_guest_go_on_and_says_what_is_missing(place: Pair) -> None:
    disk = Disk(place, size_bytes=32 * MIB)
    disk.make_cold()
    disk.start()
    data = random.Random(1).randbytes(REGION)
    with Client(disk.socket) as client:
        for region in range(32):
            client.write(region * REGION, data)
        replay = replay_of(disk)
        reader = replay.reader
        kept = replay.drain(release=False)
        assert [record.offset // REGION for record in kept] == list(range(len(kept)))
        assert 8 < len(kept) < 32
        assert reader.dropped() == 32 - len(kept)
        assert stale_regions(reader) == list(range(len(kept), 32))
        assert kept[-1].stamp < reader.gap_from() < reader.last_stamp()
        assert client.read(31 * REGION, REGION) == data

        gap_from = reader.gap_from()
        reader.release(replay.next)
        client.write(0, b"kept again")
        [record] = replay.drain()
        assert (record.offset, record.length) == (0, 10)
        assert record.stamp > gap_from == reader.gap_from()
    assert replay.differing_regions(disk.content()) == stale_regions(reader)
    assert disk.hot_regions() == list(range(32))


def test_a_ring_full_of_small_records_drops_too(place: Pair) -> None:
    """Slots and payload run out together with 512-byte records; zeros use slots alone."""
    disk = Disk(place)
    disk.make_cold()
    disk.start()
    slots = disk.reader().geometry.slot_count
    with Client(disk.socket) as client:
        for start in range(0, slots + 8, 64):
            for number in range(start, start + 64):
                client.send(nbd_client.TRIM, number * 4096 % disk.size_bytes, 4096)
            for _ in range(64):
                assert client.receive()[1] == 0
    reader = disk.reader()
    assert reader.head() - reader.tail() == slots
    assert reader.dropped() > 0
    assert reader.gap_from()


# --- the hot map


@contextmanager
def traced(
    disk: Disk, log: Path, calls: str = "trace=pwrite64,fdatasync,fallocate"
) -> Iterator[None]:
    """Note a disk's server's calls, with the files they are for: its writes and flushes."""
    command = ["strace", "-f", "-y", "-e", calls, "-o", str(log), "-p", str(disk.process())]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        if "attached" not in line:
            pytest.skip(f"cannot trace here: {line.strip()}")
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=20)


def steps(log: Path, disk: Disk) -> list[str]:
    """The traced calls as words: ``map write``, ``map flush``, ``image write`` ..."""
    names = {"pwrite64": "write", "fdatasync": "flush", "fallocate": "punch"}
    found = []
    for line in log.read_text().splitlines():
        match = re.search(r"(pwrite64|fdatasync|fallocate)\(\d+<([^>]*)>", line)
        if match:
            file = "map" if match[2] == str(disk.hot_map) else "image"
            found.append(f"{file} {names[match[1]]}")
    # The map is made durable as it is read: before the trace begins, or as its first step.
    return found[1:] if found[:1] == ["map flush"] else found


def test_the_hot_bit_is_durable_before_a_cold_region_is_written(place: Pair) -> None:
    disk = Disk(place)
    disk.make_cold()
    disk.start()
    log = place.directory / "trace"
    with traced(disk, log), Client(disk.socket) as client:
        client.write(0, b"cold")
        client.write(4096, b"hot already")
        client.trim(2 * REGION, 4096)
        client.write(3 * REGION - 1, b"the edge of two")
    hot = ["map write", "map flush"]
    assert steps(log, disk) == [
        *hot,
        "image write",
        "image write",
        *hot,
        "image punch",
        *hot,
        "image write",
    ]
    assert disk.hot_regions() == [0, 2, 3]


def test_fua_is_durable_before_it_is_acknowledged(place: Pair) -> None:
    disk = Disk(place)  # hot from the start
    disk.start()
    log = place.directory / "trace"
    with traced(disk, log), Client(disk.socket) as client:
        client.write(0, b"now", flags=nbd_client.FUA)
        client.write(0, b"later")
        client.flush()
    found = [step for step in steps(log, disk) if step.startswith("image")]  # the map was read
    assert found == ["image write", "image flush", "image write", "image flush"]


def test_a_range_trimmed_as_its_extent_is_looked_up_has_a_length(place: Pair) -> None:
    # Guards ``end > offset`` in device_extent: an extent of no length is an error to the guest.
    # Every second seek, SEEK_HOLE, finds a hole right where SEEK_DATA has found data.
    disk = Disk(place)
    disk.start()
    tool("qemu-io", "-f", "raw", "-c", f"write -P 1 0 {disk.size_bytes}", disk.uri)
    log = place.directory / "lseek.log"
    with traced(disk, log, "inject=lseek:retval=0:when=2+2"):
        found = json.loads(tool("nbdinfo", "--map", "--json", disk.uri))
    assert "SEEK_HOLE) = 0 (INJECTED)" in log.read_text()
    assert [(row["offset"], row["length"], row["type"]) for row in found] == [
        (0, disk.size_bytes, 0)
    ]


def test_no_local_write_where_the_hot_map_cannot_be_written(place: Pair) -> None:
    """A map that fails to become durable refuses the guest's write: better that than a lie."""
    disk = Disk(place)
    disk.make_cold()
    disk.start()
    limit = tool("prlimit", "--pid", str(disk.process()), "--fsize=4096:4096")
    assert limit == ""
    with Client(disk.socket) as client:
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            client.write(0, b"never there")
        assert client.read(0, 11) == bytes(11)
    assert replay_of(disk).drain() == []


# --- servers that are killed, disks that fail


def write_until_lost(socket: Path, start: int, count: int) -> None:
    """Write count MiB from start on, over and over, until the server goes away."""
    data = random.Random(start).randbytes(MIB)
    with contextlib.suppress(ConnectionError), Client(socket) as client:
        for number in itertools.count():
            client.write(start + number % count * MIB + number % 7 * 512, data)


def test_what_a_killed_server_had_in_flight_is_sent_again(place: Pair) -> None:
    disk = Disk(place, size_bytes=64 * MIB, ring_bytes=256 * MIB)
    disk.make_cold()
    disk.start()
    reader, replay = disk.reader(), replay_of(disk)
    for _ in range(20):
        begun = reader.head()
        writers = [
            threading.Thread(target=write_until_lost, args=(disk.socket, n * 16 * MIB, 15))
            for n in range(4)
        ]
        for writer in writers:
            writer.start()
        wait_for(lambda: reader.head() > begun + 8, "writes")  # noqa: B023
        disk.kill()
        for writer in writers:
            writer.join()
        in_flight = reader.writes_in_flight()
        assert stale_regions(reader) == []
        disk.start()
        Client(disk.socket).close()  # it answers once it has looked at the ring
        replay.drain()
        assert reader.writes_in_flight() == frozenset()
        if in_flight:
            break
        assert replay.differing_regions(disk.content()) == []
    else:
        pytest.fail("no kill found a write in flight")
    assert stale_regions(reader)
    assert reader.gap_from() > 0
    differing = set(replay.differing_regions(disk.content()))
    assert differing <= set(stale_regions(reader))
    assert differing <= set(disk.hot_regions())


def test_the_agent_recovers_what_was_in_flight_as_a_restart_would(place: Pair) -> None:
    disk = Disk(place, size_bytes=64 * MIB, ring_bytes=128 * MIB)
    disk.start()
    clock = open_clock(disk.disks.home.source_directory)
    disk.stop()
    reader = disk.reader()
    reader.stale[:] = 0
    # a write to [3 MiB - 1, 5 MiB + 1) that never ended
    inflight = reader._inflight
    inflight["start"][7], inflight["end"][7] = 3 * MIB - 1, 5 * MIB + 1
    inflight["generation"][7] = 11
    assert reader.writes_in_flight() == {(7, 11)}
    reader.recover_in_flight(clock.now())
    assert reader.writes_in_flight() == frozenset()
    assert stale_regions(reader) == [2, 3, 4, 5]
    assert reader.gap_from() > reader.last_stamp()


def test_records_survive_the_server(place: Pair) -> None:
    disk = Disk(place)
    disk.start()
    replay = replay_of(disk)
    for number in range(4):
        with Client(disk.socket) as client:
            client.write(number * 4096, bytes([number + 1]) * 5000)
        disk.kill() if number % 2 else disk.stop()
        if number < 3:
            disk.start()
    records = replay.drain()
    assert [record.offset for record in records] == [0, 4096, 8192, 12288]
    assert bytes(replay.content) == disk.content()
    assert replay.reader.gap_from() == 0


@pytest.fixture
def small_filesystem(place: Pair) -> Iterator[Path]:
    directory = place.directory / "small"
    directory.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory)
    yield directory
    tool("umount", "--lazy", directory)


@as_root
def test_a_write_that_the_local_disk_refuses_is_not_a_record(
    place: Pair, small_filesystem: Path
) -> None:
    image = small_filesystem / "d1.img"
    image.touch()
    os.truncate(image, 8 * MIB)
    disk = Disk(place, image=image)
    disk.make_cold()
    disk.start()
    replay = replay_of(disk)
    with Client(disk.socket) as client:
        client.write(0, b"x" * MIB)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            client.write(3 * MIB + 512, b"y" * (3 * MIB))
        client.write(4096, b"goes on")
    # Guards _failed_request in the plugin: a traceback for each, and none named the disk.
    log = place.services["disk-d1"].log.read_text()
    assert "Traceback" not in log
    (line,) = (line for line in log.splitlines() if "pwrite" in line)
    assert f"disk d1: No space left on device (image {image})" in line
    assert [record.offset for record in replay.drain()] == [0, 4096]
    assert stale_regions(replay.reader) == [3, 4, 5, 6]
    assert replay.reader.gap_from() > 0
    assert set(replay.differing_regions(disk.content())) <= {3, 4, 5, 6}
    assert disk.hot_regions() == [0, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("kind", "flags", "call", "stale"),
    [
        (nbd_client.WRITE_ZEROES, nbd_client.FAST_ZERO, "fallocate", []),
        (nbd_client.WRITE_ZEROES, nbd_client.FAST_ZERO | nbd_client.FUA, "fdatasync", [2]),
        (nbd_client.WRITE, nbd_client.FUA, "fdatasync", [2]),
        (nbd_client.WRITE, 0, "pwrite64", [2]),
    ],
)
def test_only_a_fast_zero_is_refused_without_a_trace(
    place: Pair, kind: int, flags: int, call: str, stale: list[int]
) -> None:
    # Guards is_refusal in change (device.c): "not supported" passed for a refusal that has changed
    # nothing, whichever call had said so.
    disk = Disk(place)
    disk.make_cold()
    disk.start()
    data = bytes(4096) if kind == nbd_client.WRITE else b""
    log = place.directory / "refusals.log"
    with Client(disk.socket) as client:
        client.write(2 * REGION, b"hot")
        with traced(disk, log, f"inject={call}:error=EOPNOTSUPP"):
            client.send(kind, 2 * REGION, 4096, data, flags)
            assert client.receive()[1] != 0
    assert "(INJECTED)" in log.read_text()
    reader = disk.reader()
    assert reader.head() == 1  # of "hot"
    assert stale_regions(reader) == stale
    assert bool(reader.gap_from()) == bool(stale)


def test_a_server_outlives_the_shell_that_started_it(place: Pair) -> None:
    """nbdkit 1.32 by itself ends with its parent, and on SIGHUP."""
    disk = Disk(place)
    log = place.directory / "shell.log"
    words = [str(COMMAND), "--home", str(place.source_home), "disk", "serve", disk.name]
    shell = f"{shlex.join(words)} > {shlex.quote(str(log))} 2>&1 & echo $!"
    started = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    server = int(started.stdout)
    try:
        wait_for(lambda: "ready" in log.read_text(), "the server is ready")
        tool("nbdinfo", disk.uri)
        os.kill(server, signal.SIGHUP)
        tool("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", disk.uri)
        assert disk.disks.is_serving(disk.entry)
    finally:
        os.kill(server, signal.SIGTERM)
        wait_for(lambda: not disk.disks.is_serving(disk.entry), "the server has ended")
