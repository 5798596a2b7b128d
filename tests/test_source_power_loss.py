"""A power loss at the source: memory is gone, and of its disk what was not synced is too, or torn.

The services run as processes, the source's home and the disk's image on the lossy file system;
what is lost with the machine (the ring) is removed, and its files are made those of an earlier
boot. Then the source's disk is the truth: a region that differs from the replica is hot, so it is
compared, and the replica becomes what the disk is, byte by byte.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from lossy.disk import LossyDisk, When, lossy_disk
from lossy.nodes import Loss
from oracle.nbd_client import Client
from serving import Disk, as_root, place, wait_for

from blockrepl import limits
from blockrepl.formats import hot_map
from blockrepl.units import MIB
from scripts.guest.pair import Pair

__all__ = ["place"]

GROUP = "g"
DISK_BYTES = 6 * MIB
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
SYNCS_MAX = 24  # in the soak; those behind are more of the same, two a second


@pytest.fixture
def lossy(place: Pair) -> Iterator[LossyDisk]:
    with lossy_disk(place.source_home) as disk:
        try:
            yield disk
        finally:
            disk.restore(Loss.KEEP)
            for name in reversed(list(place.services)):
                place.kill(name)
            for entry in place.source_json("disk", "list"):
                place.source("disk", "remove", entry["name"], quiet=True)


def set_up(place: Pair) -> Disk:
    """A disk that is replicated, and cold. No scrub: it would heal what is to be seen."""
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    place.join()
    image = place.source_home / "d1.img"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
        os.fsync(file.fileno())
    disk = Disk(place, image=image, group=GROUP)
    os.sync()
    disk.start()
    place.start_agent("--scrub-rate", "0")
    place.wait_replicating(GROUP)
    cool(place, disk)
    return disk


def cool(place: Pair, disk: Disk) -> None:
    """Until no region is hot: the guest's server ends in order, and its ring is given back."""
    disk.stop()
    wait_for(lambda: not disk.ring.exists(), "the ring is given back")
    assert disk.hot_regions() == []
    disk.start()


def write_until_dark(place: Pair, disk: Disk, lossy: LossyDisk, choose: random.Random) -> None:
    """Guest writes, some flushed, some while the receiver is away, until the power goes."""
    with contextlib.suppress(OSError, AssertionError, EOFError), Client(disk.socket) as client:
        for number in range(60):
            offset = choose.randrange(DISK_BYTES // 2 // 512 - 16) * 512
            client.write(offset, choose.randbytes(512 * choose.randrange(1, 16)))
            if number % 7 == 3:
                client.flush()
            if number == 20:
                place.kill("receiver")
            if number == 40:
                place.start_receiver()
    if lossy.state()["on"]:
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not lossy.state()["on"], "a sync by the agent", 3.0)
    if lossy.state()["on"]:
        lossy.lose_power()


def reboot(place: Pair, disk: Disk, lossy: LossyDisk, loss: Loss, seed: int) -> None:
    for name in ("agent", "disk-d1"):
        with contextlib.suppress(KeyError):
            place.kill(name)
    disk.ring.unlink(missing_ok=True)
    lossy.restore(loss, seed)
    assert BOOT_ID in (place.source_home / "source" / "clock.json").read_text()
    for path in [*place.source_home.glob("source/clock.json"),
                 *place.source_home.glob("source/spool/*/state.json")]:  # fmt: skip
        path.write_text(path.read_text().replace(BOOT_ID, "00000000-0000-0000-0000-000000000000"))
    if "receiver" not in place.services:
        place.start_receiver()


def replica(place: Pair, disk: Disk) -> bytes:
    with place.mounted(GROUP, "latest") as root:
        return (root / f"{disk.name}.img").read_bytes()


def recovers(
    place: Pair, lossy: LossyDisk, disk: Disk, sync: int, when: When, loss: Loss, *, of: str = ""
) -> int:
    """The power is lost at that sync; how many regions differed from the replica then."""
    # Guards ``stale=self.hot_regions(entry)`` in SourceDisks.ensure_ring (storage/source.py).
    choose = random.Random(sync)
    lossy.lose_power_at(sync, when, of=of)
    write_until_dark(place, disk, lossy, choose)
    reboot(place, disk, lossy, loss, sync)
    truth, held, size = disk.content(), replica(place, disk), limits.REGION_BYTES
    differing = {
        at // size
        for at in range(0, DISK_BYTES, size)
        if truth[at : at + size] != held[at : at + size]
    }
    hot = disk.hot_regions()
    assert differing <= set(hot), "a region that differs is cold"
    assert len(hot) < DISK_BYTES // size, "all are hot, and the map says nothing"
    disk.start()
    place.start_agent("--scrub-rate", "0")
    with Client(disk.socket) as client:
        client.write(0, choose.randbytes(512))
    stamp = disk.reader().last_stamp()
    place.wait_durable(GROUP, stamp)
    place.wait_replicating(GROUP)
    assert replica(place, disk) == disk.content()
    return len(differing)


@as_root
@pytest.mark.slow
def test_after_a_power_loss_the_sources_disk_is_the_truth(place: Pair, lossy: LossyDisk) -> None:
    disk = set_up(place)
    assert recovers(place, lossy, disk, 2, "before", Loss.DROP, of=".img")


@as_root
def test_a_hot_bit_that_a_killed_server_had_not_synced_is_durable_before_a_write(
    place: Pair, lossy: LossyDisk
) -> None:
    # Guards the fdatasync in hot_map_load.
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    place.join()
    disk = Disk(place, size_bytes=DISK_BYTES, group=GROUP)
    disk.make_cold()
    with disk.hot_map.open("r+b") as file:
        os.fsync(file.fileno())
        file.seek(hot_map.HEADER_BYTES)
        file.write(b"\x04")  # region 2
    disk.start()
    with Client(disk.socket) as client:
        client.write(2 * MIB, b"x" * 512)
    lossy.lose_power()
    disk.kill()
    lossy.restore(Loss.DROP)
    disk.ring.unlink()
    assert 2 in disk.hot_regions()
    assert 1 not in disk.hot_regions()


@as_root
@pytest.mark.soak
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_power_loss_of_the_source(place: Pair, lossy: LossyDisk, when: When) -> None:
    disk = set_up(place)
    differed = 0
    for sync in range(1, SYNCS_MAX):
        loss, of = list(Loss)[sync % 3], ("", ".img")[sync % 2]
        differed += recovers(place, lossy, disk, sync, when, loss, of=of) > 0
        cool(place, disk)
    assert differed > 0
