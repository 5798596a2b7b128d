"""The hot map of a served disk falls back under its bound, though the guest never flushes."""

from __future__ import annotations

import random

from oracle.nbd_client import Client
from serving import Disk, place, wait_for

from blockrepl import limits
from blockrepl.units import GIB, KIB
from scripts.guest.pair import Pair

__all__ = ["place"]


def test_hot_regions_fall_under_their_bound_without_a_flush(place: Pair) -> None:
    """Guards hot_map_start in _core.pyx: the thread is there. A trim heats what it touches."""
    place.receiver("receiver", "init")
    place.start_receiver()
    place.join()
    disk = Disk(place, size_bytes=64 * GIB)
    disk.start()
    place.start_agent()
    place.wait_replicating("g")
    choose = random.Random(7)
    reader = disk.reader()
    with Client(disk.socket) as client:
        most = 0
        for number in range(40):
            client.trim(number * GIB, GIB)
            most = max(most, reader.hot_regions())
        assert most > limits.HOT_REGIONS_MAX
        for _ in range(100):
            client.write(choose.randrange(64 * GIB // (4 * KIB)) * 4 * KIB, b"x" * 4096)
        wait_for(lambda: reader.hot_regions() <= limits.HOT_REGIONS_MAX, "a small map", 60)
        assert len(disk.hot_regions()) <= limits.HOT_REGIONS_MAX
