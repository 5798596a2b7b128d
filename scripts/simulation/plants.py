"""Faults planted into the product, to see that the simulation finds them.

Each takes one protection out, as a replacement (place, name, value). ``simulate.py --plant NAME``
runs seeds until one is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from blockrepl.services import disk_sync, group_pump, group_replication, scrubber, source_disk
from blockrepl.session import known
from blockrepl.storage import replica, segment_recovery, segment_writer, source, spool
from blockrepl.storage.pieces import digest_range
from blockrepl.storage.ring import create_ring

Replacement = tuple[object, str, Any]


def _acknowledged_before_fdatasync() -> Replacement:
    return segment_writer.SegmentWriter, "sync", lambda _self: None


def _recovered_frames_not_synced() -> Replacement:
    def take(self: Any, *arguments: Any) -> Any:
        class Unsynced:
            def __getattr__(self, name: str) -> Any:
                return getattr(files, name)

            def sync(self, _descriptor: int) -> None: ...

        files, self.files = self.files, Unsynced()
        try:
            return original(self, *arguments)
        finally:
            self.files = files

    original = segment_recovery._Recovery._take_frames
    return segment_recovery._Recovery, "_take_frames", take


def _ring_released_before_durable() -> Replacement:
    async def put(self: Any, heads: Any, watermark: int) -> bool:
        worked = await original(self, heads, watermark)
        for disk, _ in heads:
            if disk.ring is not None:
                disk.ring.release(disk.cursor)
        return worked

    original = group_pump.GroupPump._put_records
    return group_pump.GroupPump, "_put_records", put


def _gap_not_sent() -> Replacement:
    async def put_gap(_self: Any, disk: Any, from_ns: int, _head: int) -> None:
        disk.gap_reported(from_ns)
        disk.gap_durable(from_ns)

    return group_pump.GroupPump, "_put_gap", put_gap


def _gap_told_before_its_records() -> Replacement:
    async def put_gap(self: Any, disk: Any, from_ns: int, _head: int) -> None:
        await original(self, disk, from_ns, disk.cursor)

    original = group_pump.GroupPump._put_gap
    return group_pump.GroupPump, "_put_gap", put_gap


def _content_beside_older_records() -> Replacement:
    async def catch_up(_self: Any, _disk: Any) -> bool:
        return True

    return group_pump.GroupPump, "_catch_up", catch_up


def _earlier_turn_ends_a_later() -> Replacement:
    def end(self: Any, region: int, _turn: int) -> None:
        if self.disk.ring is not None:
            self.disk.ring.end_sync(region)

    return disk_sync.DiskSync, "_end", end


def _base_in_spite_of_drops() -> Replacement:
    def may_use_base(self: Any) -> bool:
        return self.ring is not None and self.state == "empty"

    return source_disk.SourceDisk, "may_use_base", may_use_base


def _duplicates_not_dropped() -> Replacement:
    def differs(self: Any, attached: Any) -> str:
        self.next_number = attached.next_number
        return ""

    return known.Known, "differs", differs


def _syncs_not_restarted() -> Replacement:
    def interrupted(self: Any) -> None:
        self._epoch += 1
        self._comparing.clear()
        self._differing.clear()

    return disk_sync.DiskSync, "interrupted", interrupted


def _spool_recovered_one_frame_too_short() -> Replacement:
    def recover(self: Any, state: Any) -> None:
        original(self, state)
        self.next_number = max(self.next_number - 1, state.attached.next_number)

    original = spool.Spool._recover
    return spool.Spool, "_recover", recover


def _durable_record_ahead() -> Replacement:
    def publish(self: Any) -> None:
        self._watermark += 200_000_000
        original(self)

    original = replica.Replica._publish
    return replica.Replica, "_publish", publish


def _hot_regions_not_compared() -> Replacement:
    def create(path: Any, *, stale: Any, **options: Any) -> None:
        original(path, stale=stale * 0, **options)

    original = create_ring
    return source, "create_ring", create


def _scrubbed_at_another_place() -> Replacement:
    def digest(image: Any, start: int, end: int) -> Any:
        return digest_range(image, 0, end - start)

    return scrubber, "digest_range", digest


def _lost_frames_not_noticed() -> Replacement:
    return group_replication.GroupReplication, "_remembered", lambda *_arguments: 0


PLANTS: dict[str, Callable[[], Replacement]] = {
    name.removeprefix("_").replace("_", "-"): make
    for name, make in list(globals().items())
    if callable(make) and name.startswith("_") and not name.startswith("__")
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    place, attribute, value = PLANTS[name]()
    before = getattr(place, attribute)
    setattr(place, attribute, value)
    try:
        yield
    finally:
        setattr(place, attribute, before)
