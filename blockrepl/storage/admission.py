"""What a frame must be before it may be journaled. Anything else is its sender's fault: PeerError.
But for rule 8: a mark that says too much stands for what its source may say.

1. Of this group, of the source whose session it came through, and as long as its message.
2. Numbers that the catalog can hold (below 2^63 - 1); number 0 for base frames, and only for them.
3. With records, a ring's position, or a mark that names a disk: of a disk that this source has
   attached.
4. Columns, block table and every block match their digests, and every block decompresses: else a
   commit of base content would fail for all its sources, and nothing behind a false record would
   ever be folded. (It is not kept: it may take 250 times the memory counted for its frame.)
5. Every record inside its disk, of a known kind.
6. A disk grows, to DISK_BYTES_MAX at the most and DISK_GROWTHS_MAX times, and after the watermark:
   a point up to that may be mounted already.
7. Content of a resync: of a disk whose first sync is not done, or in a gap of it that is open. Its
   stamps lie in the past, and would show in every point behind them.
8. A gap begins after the watermark: from the instants up to that, which can be reached, nothing is
   taken. A disk is consistent from an instant on between the watermark of before, of its source and
   of the group, and the frame's own; where that is behind the group's, just after the latter. (The
   pump reports a gap before a watermark passes it, and says that a disk is consistent in a frame
   with that watermark.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockrepl.errors import PeerError
from blockrepl.formats.frame import (
    KIND_MASK,
    FrameHeader,
    FrameKind,
    RecordKind,
    check_body,
    check_payload,
    decode_payload,
    parse_columns,
)
from blockrepl.formats.marks import (
    CheckpointMark,
    ConsistentMark,
    GapMark,
    GrowMark,
    Mark,
    decode_mark,
)
from blockrepl.limits import DISK_BYTES_MAX, DISK_GROWTHS_MAX
from blockrepl.storage.catalog import DiskRow

NUMBER_MAX = (1 << 63) - 2  # what SQLite's integers hold, with room for the next one


def check_header(
    header: FrameHeader,
    frame: memoryview,
    *,
    group: bytes,
    source: bytes,
    disks: Mapping[bytes, DiskRow],
) -> None:
    """Rules 1 to 3."""
    if header.group != group or header.source != source:
        raise PeerError("frame is of another group or source")
    if header.frame_bytes != frame.nbytes:
        raise PeerError("frame does not fill its message")
    if (header.number == 0) != (header.kind == FrameKind.BASE):
        raise PeerError("frame number does not suit its kind")
    next_sequence = header.first_sequence + header.record_count
    if max(header.number, header.watermark, header.last_stamp, next_sequence) > NUMBER_MAX:
        raise PeerError("frame numbers are out of range")
    if header.record_count or header.ring_id:
        _own_disk(disks, header.disk, source)


def _own_disk(disks: Mapping[bytes, DiskRow], disk: bytes, source: bytes) -> DiskRow:
    row = disks.get(disk)
    if row is None or row.source != source:
        raise PeerError("frame of a disk that its source has not attached")
    return row


def check_content(header: FrameHeader, body: memoryview, disk: DiskRow | None) -> None:
    """Rules 4 and 5. ``disk`` is the frame's, where it has records."""
    check_body(header, body)
    check_payload(header, body)
    if disk is None:
        return
    columns = parse_columns(header, body)
    offsets = columns.offsets
    # The first test keeps the sums of the second within 64 bits.
    if (
        int(offsets.max()) > disk.size_bytes
        or int((offsets + columns.lengths).max()) > disk.size_bytes
    ):
        raise PeerError(f"frame has a record beyond the end of disk {disk.name}")
    if int((columns.kinds & KIND_MASK).max()) > RecordKind.FLUSH:
        raise PeerError("frame has a record of an unknown kind")


def read_mark(header: FrameHeader, body: memoryview, disks: Mapping[bytes, DiskRow]) -> Mark:
    """The mark of a checked mark frame (rule 3)."""
    mark = decode_mark(decode_payload(header, body))
    if not isinstance(mark, CheckpointMark):
        _own_disk(disks, mark.disk.bytes, header.source)
    return mark


def bounded(mark: Mark, header: FrameHeader, watermark: int, group_watermark: int) -> Mark:
    """What a mark stands for by rule 8. ``watermark``: of its source, before this frame.

    Bounded, not refused: a source whose clock went back would be stopped for good.
    """
    if isinstance(mark, GapMark):
        return mark.model_copy(update={"from_ns": max(mark.from_ns, watermark + 1)})
    if isinstance(mark, ConsistentMark):
        least = max(watermark, group_watermark)
        # A source that is behind the group has records yet to come up to the group's watermark.
        at_ns = least + 1
        if header.watermark >= least:
            at_ns = min(max(mark.at_ns, least), header.watermark)
        return mark.model_copy(update={"at_ns": at_ns})
    return mark


def check_resync(header: FrameHeader, disk: DiskRow, gap_begins: Sequence[int]) -> None:
    """Rule 7. ``gap_begins``: of the disk's gaps that are open."""
    if disk.ready_ns is not None and header.first_stamp < min(gap_begins, default=NUMBER_MAX):
        raise PeerError(f"frame {header.number} has content for no gap of disk {disk.name}")


def check_growth(mark: GrowMark, disk: DiskRow, growth_count: int, watermark: int) -> None:
    """Rule 6. ``disk`` as it will be when all that is staged has been applied."""
    if mark.size_bytes <= disk.size_bytes:
        raise PeerError(
            f"disk {disk.name} cannot grow to {mark.size_bytes} bytes: it has {disk.size_bytes}"
        )
    if mark.size_bytes > DISK_BYTES_MAX:
        raise PeerError(
            f"disk {disk.name} cannot grow to {mark.size_bytes} bytes: a disk may have "
            f"{DISK_BYTES_MAX} (DISK_BYTES_MAX)"
        )
    if growth_count >= DISK_GROWTHS_MAX:
        raise PeerError(
            f"disk {disk.name} has grown {growth_count} times: that is all a disk may "
            "(DISK_GROWTHS_MAX)"
        )
    if mark.at_ns <= watermark:
        raise PeerError(f"disk {disk.name} grew before the watermark {watermark}")
