"""What the watermarks of a group's sources say of its disks.

A view of an instant has the disks that were synced by then and not yet retired. So a source counts
from the first instant on that its disks are in a view of, and a retired disk up to its retirement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from blockrepl.storage.catalog import DiskRow


def sources_shown(disks: Iterable[DiskRow]) -> dict[bytes, int]:
    """The sources that views have disks of, and up to which instant they have none of them.

    Not those whose disks are all still to be synced: these will not be in a view of before the
    group's watermark.
    """
    found: dict[bytes, int] = {}
    for disk in disks:
        if disk.ready_ns is not None:
            before_ns = disk.ready_ns - 1
            found[disk.source] = min(before_ns, found.get(disk.source, before_ns))
    return found


def newest_instant(disks: Iterable[DiskRow], watermarks: Mapping[bytes, int]) -> int:
    """Up to where nothing is missing of any disk in view, by its sources' watermarks; 0: nowhere.

    A disk that is synced holds up the others, but before that instant it is in no view. When no
    such disk is left, what the retired ones have had stays: one is in views of before its
    retirement only, which is right after its source's watermark of then.
    """
    live, retired_ns = list[DiskRow](), 0
    for disk in disks:
        if disk.removed_ns is None:
            live.append(disk)
        elif disk.ready_ns is not None:
            last_ns = min(disk.removed_ns - 1, watermarks.get(disk.source, 0))
            retired_ns = max(retired_ns, last_ns)
    synced = [
        max(watermarks.get(disk.source, 0), disk.ready_ns - 1)
        for disk in live
        if disk.ready_ns is not None
    ]
    if synced:
        return min(synced)
    return max(retired_ns, min((watermarks.get(disk.source, 0) for disk in live), default=0))
