"""A receiver whose disk is full for a while: nothing of it reaches the guest, and nothing is lost.

With the services as processes, the receiver's home on a small file system of its own.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle.nbd_client import Client
from serving import Disk, as_root, blockrepl, place, wait_for

from blockrepl.units import KIB, MIB, format_instant
from scripts.guest.pair import Pair

__all__ = ["place"]

GROUP = "g"
WRITE_BYTES = 64 * KIB


@pytest.fixture
def small(place: Pair) -> Iterator[Path]:
    """The receiver's home, on a file system of 24 MiB."""
    home = place.receiver_home
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", home], check=True)
    try:
        yield home
    finally:
        for name in reversed(list(place.services)):
            place.stop(name)
        subprocess.run(["umount", "--lazy", home], check=True)


@as_root
@pytest.mark.slow
def test_a_full_disk_at_the_receiver_costs_no_point_and_not_the_guest(
    place: Pair, small: Path
) -> None:
    place.receiver("receiver", "init")
    place.start_receiver()
    place.join()
    disk = Disk(place, size_bytes=4 * MIB, group=GROUP)
    disk.start()
    place.start_agent()
    place.wait_replicating(GROUP)
    ballast = small / "ballast"
    free_bytes = os.statvfs(small).f_bavail * 4096
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes - MIB // 2)

    instants: list[tuple[int, bytes]] = []
    content = bytearray(disk.size_bytes)
    reader = disk.reader()
    with Client(disk.socket) as client:
        for number in range(48):  # six times what there is room for
            data = os.urandom(WRITE_BYTES)
            offset = number * WRITE_BYTES % disk.size_bytes
            client.write(offset, data)
            content[offset : offset + WRITE_BYTES] = data
            instants.append((reader.last_stamp(), bytes(content)))
    # In one look: a small frame that still fits ends the error until the next one does not.
    wait_for(lambda: "no room left" in place.receiver("status", GROUP), "the receiver is full")
    durable_ns = int(place.group(GROUP)["latest_ns"])
    assert durable_ns < instants[-1][0], "acknowledged what there is no room for"

    ballast.unlink()  # room again, and nobody is restarted
    place.wait_durable(GROUP, instants[-1][0])
    assert place.group(GROUP)["gaps"] == []
    with place.mounted(GROUP) as root:
        for at_ns, wanted in instants[::3]:
            path = root / "at" / format_instant(at_ns) / f"{disk.name}.img"
            assert path.read_bytes() == wanted
    assert disk.is_alive()


@as_root
@pytest.mark.slow
def test_who_waits_for_a_group_without_room_is_told_at_once(place: Pair, small: Path) -> None:
    # Guards the look at the group's error in agent_api and waiting.check_working: checkpoint waited
    # for 30 s, verify for a minute, resync for ever, and none of them said why.
    place.receiver("receiver", "init")
    place.start_receiver()
    place.join()
    disk = Disk(place, size_bytes=4 * MIB, group=GROUP)
    disk.start()
    place.start_agent()
    place.wait_replicating(GROUP)
    free_bytes = os.statvfs(small).f_bavail * 4096
    with (small / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes - MIB // 2)
    with Client(disk.socket) as client:
        for number in range(48):
            client.write(number * WRITE_BYTES % disk.size_bytes, os.urandom(WRITE_BYTES))
    wait_for(lambda: "no room left" in place.receiver("status", GROUP), "the receiver is full")
    for home, words in [
        (place.source_home, ("checkpoint", "create", GROUP, "now")),
        (place.source_home, ("verify", GROUP, "--now")),
        (place.receiver_home, ("verify", GROUP, "--now")),
        (place.source_home, ("disk", "resync", disk.name, "--wait")),
    ]:
        began = time.monotonic()
        done = blockrepl(home, *words)
        assert done.returncode == 1, words
        assert "no room left" in done.stderr, words
        assert time.monotonic() < began + 20, words
