"""The disk's NBD server against programs that were not written here."""

from __future__ import annotations

import json
import os
import random
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle import nbd_client
from oracle.nbd_client import Client
from serving import Disk, Replay, as_root, place, tool, wait_for

from blockrepl.units import KIB, MIB
from scripts.guest.pair import Pair, pair

__all__ = ["place"]

SIZE = 32 * MIB


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """One served disk for the tests that only read and write it."""
    with pair(tmp_path_factory.mktemp("served"), print) as made:
        disk = Disk(made, size_bytes=SIZE, ring_bytes=16 * MIB)
        disk.start()
        yield disk


def qemu_io(disk: Disk, *commands: str) -> str:
    """Run qemu-io's commands on the export; a pattern that does not match is a failure."""
    options = [word for command in commands for word in ("-c", command)]
    printed = tool("qemu-io", "-f", "raw", disk.uri, *options)
    assert "failed" not in printed
    assert "Pattern verification" not in printed
    return printed


def test_nbdinfo_tells_what_the_disk_can_do(served: Disk) -> None:
    [export] = json.loads(tool("nbdinfo", "--json", served.uri))["exports"]
    assert export["export-size"] == SIZE
    assert export["is_read_only"] is False
    for ability in ("flush", "fua", "trim", "zero", "fast_zero", "multi_conn"):
        assert export[f"can_{ability}"] is True, ability
    assert export["contexts"] == ["base:allocation"]
    blocks = (export["block_size_minimum"], export["block_size_preferred"])
    assert (*blocks, export["block_size_maximum"]) == (1, 4096, 4 * MIB)


def test_only_the_user_may_open_the_socket(served: Disk) -> None:
    assert stat.S_IMODE(served.socket.stat().st_mode) == 0o600


def test_nbdcopy_both_ways_is_byte_identical(served: Disk, tmp_path: Path) -> None:
    before, after = tmp_path / "before.img", tmp_path / "after.img"
    before.write_bytes(random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 2))
    tool("nbdcopy", "--flush", before, served.uri)
    tool("nbdcopy", served.uri, after)
    assert after.read_bytes() == before.read_bytes() == served.content()


def test_qemu_img_converts_compares_and_checks(served: Disk, tmp_path: Path) -> None:
    raw, back = tmp_path / "disk.raw", tmp_path / "back.qcow2"
    raw.write_bytes(random.Random(2).randbytes(SIZE))
    tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, served.uri)
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, back)
    tool("qemu-img", "check", "-f", "qcow2", back)
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, served.uri)
    tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", back, served.uri)
    qemu_io(served, f"write -P 0x5a {SIZE - 512} 512")
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, served.uri, status=1)


def test_a_qcow2_image_lives_on_the_export(served: Disk) -> None:
    """QEMU's own metadata writes, and its check of them."""
    tool("qemu-img", "create", "-f", "qcow2", served.uri, "16M")
    commands = (
        "write -P 0x11 0 1M",
        "discard 512k 64k",
        "write -P 0x22 15M 1M",
        "read -P 0x11 0 4k",
    )
    options = [word for command in commands for word in ("-c", command)]
    tool("qemu-io", "-f", "qcow2", served.uri, *options)
    tool("qemu-img", "check", "-f", "qcow2", served.uri)


UNALIGNED = [
    (0, 1),
    (1, 511),
    (511, 513),
    (4095, 2),
    (MIB - 1, 1),
    (MIB - 1, 2),
    (MIB - 511, 1023),
    (2 * MIB - 1, MIB + 2),
    (3 * MIB + 7, 2 * MIB + 5),
    (SIZE - 1, 1),
    (SIZE - 513, 513),
]


def test_unaligned_writes_zeros_and_trims_touch_their_bytes_only(served: Disk) -> None:
    """At every boundary of sector, page and region, against a plain byte array."""
    expected = bytearray(b"\xee") * SIZE
    qemu_io(served, f"write -P 0xee 0 {SIZE}")
    patterns = (
        "write -P 0x{0:x} {1} {2}",
        "write -z {1} {2}",
        "write -z -u {1} {2}",
        "write -f -P 0x{0:x} {1} {2}",
    )
    commands = []
    for number, (offset, length) in enumerate(UNALIGNED * len(patterns)):
        pattern, byte = patterns[number % len(patterns)], number % 254 + 1
        commands.append(pattern.format(byte, offset, length))
        zero = "-z" in pattern
        expected[offset : offset + length] = bytes([0 if zero else byte]) * length
    qemu_io(served, *commands)
    assert served.content() == expected
    reads = [f"read -P 0x{expected[o]:x} {o} 1" for o, _ in UNALIGNED]
    qemu_io(served, *reads)
    with Client(served.socket) as client:
        for offset, length in UNALIGNED:
            assert client.read(offset, length) == expected[offset : offset + length]
            client.trim(offset, length)
            expected[offset : offset + length] = bytes(length)
    assert served.content() == expected


def test_discarded_and_zeroed_ranges_read_as_zeros_and_are_holes(served: Disk) -> None:
    qemu_io(
        served,
        f"write -P 0x77 0 {SIZE}",
        "discard 1M 2M",
        "write -z -u 8M 1M",
        "write -z 16M 1M",
        "flush",
        "read -P 0 1M 2M",
        "read -P 0 8M 1M",
        "read -P 0 16M 1M",
        "read -P 0x77 3M 5M",
    )
    found = json.loads(tool("nbdinfo", "--map", "--json", served.uri))
    holes = [(row["offset"] // MIB, row["length"] // MIB) for row in found if row["type"] == 3]
    assert (1, 2) in holes
    assert (8, 1) in holes
    ends = [row["offset"] + row["length"] for row in found]
    assert [0, *ends] == [*(row["offset"] for row in found), SIZE]


def test_a_fast_zero_is_quick_or_refused(served: Disk) -> None:
    """qemu-io's -n asks for a zero that is faster than writing zeros."""
    qemu_io(served, "write -P 0x66 0 1M", "write -z -n 0 1M", "read -P 0 0 1M")


@pytest.mark.parametrize("size_bytes", [32 * MIB - 1, 32 * MIB])
def test_requests_of_32_mib(served: Disk, size_bytes: int) -> None:
    data = random.Random(size_bytes).randbytes(size_bytes)
    with Client(served.socket) as client:
        client.write(0, data)
        assert client.read(0, size_bytes) == data
    assert served.content()[:size_bytes] == data


def test_requests_beyond_the_end_are_refused(served: Disk) -> None:
    with Client(served.socket) as client:
        for request in (
            lambda: client.write(SIZE - 1, b"xy"),
            lambda: client.zero(SIZE, 512),
            lambda: client.trim(SIZE - 512, 1024),
            lambda: client.read(SIZE - 1, 2),
        ):
            with pytest.raises(OSError, match=r"No space left|Invalid argument"):
                request()
        client.write(SIZE - 1, b"z")
        assert client.read(SIZE - 1, 1) == b"z"


@pytest.mark.parametrize("pattern", ["randwrite", "randrw", "randtrimwrite"])
def test_fio_verifies_what_it_wrote(served: Disk, pattern: str, tmp_path: Path) -> None:
    sizes = "512-64k" if pattern != "randtrimwrite" else "4k-4k"
    verify = ["--verify=crc32c", "--verify_fatal=1"] if pattern != "randtrimwrite" else []
    printed = tool(
        "fio",
        f"--directory={tmp_path}",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={served.uri}",
        f"--rw={pattern}",
        f"--bsrange={sizes}",
        "--blockalign=512" if verify else "--blockalign=4k",
        "--iodepth=16",
        f"--size={SIZE}",
        "--io_size=8m",
        "--randseed=7",
        "--verify_state_save=0",  # else fio leaves a file where it was started
        *verify,
    )
    assert "err= 0" in printed


# --- clients that do not behave


def vanish(disk: Disk, number: int) -> None:
    """Send many requests, of all kinds, and go away without reading a reply."""
    choose = random.Random(number)
    client = Client(disk.socket)
    try:
        client.socket.setblocking(False)
        for _ in range(24):
            offset = choose.randrange(8 * MIB, SIZE - 64 * KIB)
            kind = choose.choice((nbd_client.READ, nbd_client.WRITE, nbd_client.TRIM))
            data = choose.randbytes(32 * KIB) if kind == nbd_client.WRITE else b""
            client.send(kind, offset, 32 * KIB, data)
    except BlockingIOError:
        pass  # the last request was cut short: so much the better
    finally:
        client.vanish()


def test_200_clients_that_vanish_harm_nobody(place: Pair) -> None:
    disk = Disk(place, size_bytes=SIZE, ring_bytes=16 * MIB)
    disk.start()
    server, wrong, done = disk.process(), [], threading.Event()
    rounds = [0]

    def behave() -> None:
        choose = random.Random(0)
        with Client(disk.socket) as client:
            while not done.is_set() or rounds[0] < 50:
                offset = choose.randrange(8 * MIB - 64 * KIB)
                data = choose.randbytes(choose.randint(1, 64 * KIB))
                client.write(offset, data)
                if client.read(offset, len(data)) != data:
                    wrong.append(offset)
                rounds[0] += 1

    behaved = threading.Thread(target=behave)
    behaved.start()
    try:
        for number in range(200):
            vanish(disk, number)
    finally:
        done.set()
        behaved.join()
    assert wrong == []
    assert rounds[0] >= 50
    assert disk.is_alive()
    assert disk.process() == server
    wait_for(lambda: not disk.reader().writes_in_flight(), "no range is held any more")
    qemu_io(disk, f"write -P 0x12 0 {SIZE}", f"read -P 0x12 0 {SIZE}")


def test_a_connection_leaves_nothing_behind(served: Disk) -> None:
    # Red without `close` in _core.pyx: Python's states of the threads stay, 4 KiB each.
    def memory_after(connections: int) -> int:
        for _ in range(connections):
            with Client(served.socket) as client:
                client.write(0, b"x")
        status = Path(f"/proc/{served.process()}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * KIB

    before = memory_after(100)
    assert memory_after(300) < before + 512 * KIB


def test_garbage_instead_of_requests_harms_nobody(served: Disk) -> None:
    for number in range(20):
        client = Client(served.socket)
        client.socket.sendall(random.Random(number).randbytes(100))
        client.vanish()
    lying = Client(served.socket)  # a write that says 4 GiB
    lying.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 0xFFFFFFFF))
    lying.vanish()
    qemu_io(served, "write -P 0x13 0 64k", "read -P 0x13 0 64k")


# --- block devices


@pytest.fixture
def loop_device(place: Pair) -> Iterator[Path]:
    backing = place.directory / "backing.img"
    backing.touch()
    os.truncate(backing, 16 * MIB)
    device = Path(tool("losetup", "--find", "--show", backing).strip())
    yield device
    tool("losetup", "--detach", device)


@as_root
def test_a_block_device_is_a_disk(place: Pair, loop_device: Path) -> None:
    disk = Disk(place, image=loop_device)
    assert disk.size_bytes == 16 * MIB
    disk.start()
    replay = Replay(disk.reader(), bytes(disk.size_bytes))
    qemu_io(
        disk,
        "write -P 0x31 0 2M",
        "write -P 0x32 1048575 3",
        "discard 512k 4k",
        "write -z -u 777 5555",
        "write -z 65536 513",
        "flush",
        "read -P 0 512k 4k",
        "read -P 0 777 5555",
        "read -P 0x32 1048575 3",
    )
    with Client(disk.socket) as client:
        client.trim(100_001, 3)
        client.write(16 * MIB - 1, b"e", flags=nbd_client.FUA)
    replay.drain()
    assert replay.reader.dropped() == 0
    tool("nbdinfo", "--map", disk.uri)
    disk.stop()
    assert bytes(replay.content) == disk.content()
