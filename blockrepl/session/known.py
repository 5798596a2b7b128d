"""What a receiver knows of a group: its answer to ATTACH, carried on frame by frame.

The source keeps two of these per group: one as of the last frame that was acknowledged, one as of
the last frame that was numbered. The receiver's next answer must equal the one or lie between the
two; anything else means that one of the sides has lost something (`differs`).

============  ==================  ============================================================
frame         of a disk that is   then
============  ==================  ============================================================
records       any                 the ring's position is behind its last record
sync          any                 the ring's position is its ``first_sequence``
mark          any                 the same: where nothing differed, no content tells of records that
consistent                        were skipped for it
mark gap      ready               gap, and the next epoch
mark gap      empty, gap          nothing: there is no history to break, or it is broken already
mark          empty, gap          ready
consistent
mark grow     any                 the disk has that size
base          any                 nothing: it has no number (release.py says what stands for it)
============  ==================  ============================================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from uuid import UUID

from blockrepl.formats.frame import FrameHeader, FrameKind
from blockrepl.formats.marks import ConsistentMark, GapMark, GrowMark, Mark
from blockrepl.formats.messages import Attached, AttachedDisk


@dataclass(slots=True)
class Known:
    group: str
    group_id: UUID
    next_number: int
    watermark: int
    disks: dict[bytes, AttachedDisk]

    @classmethod
    def of(cls, attached: Attached) -> Known:
        disks = {disk.id.bytes: disk for disk in attached.disks}
        return cls(
            attached.group, attached.group_id, attached.next_number, attached.watermark, disks
        )

    def attached(self) -> Attached:
        return Attached(
            group=self.group,
            group_id=self.group_id,
            next_number=self.next_number,
            watermark=self.watermark,
            disks=list(self.disks.values()),
        )

    def copy(self) -> Known:
        return replace(self, disks=dict(self.disks))

    def apply(self, header: FrameHeader, mark: Mark | None) -> None:
        """The frame that carries ``next_number`` is known to the receiver."""
        assert header.number == self.next_number
        self.next_number += 1
        self.watermark = max(self.watermark, header.watermark)
        if header.ring_id:
            taken = header.record_count if header.kind == FrameKind.RECORDS else 0
            self._update(
                header.disk, ring_id=header.ring_id, next_sequence=header.first_sequence + taken
            )
        if isinstance(mark, GapMark):
            disk = self.disks.get(mark.disk.bytes)
            if disk is not None and disk.state == "ready":
                self._update(mark.disk.bytes, state="gap", epoch=disk.epoch + 1)
        elif isinstance(mark, ConsistentMark):
            self._update(mark.disk.bytes, state="ready", blank=False)
        elif isinstance(mark, GrowMark):
            self._update(mark.disk.bytes, size_bytes=mark.size_bytes)

    def _update(self, disk: bytes, **changes: object) -> None:
        if disk in self.disks:
            self.disks[disk] = self.disks[disk].model_copy(update=changes)

    def differs(self, attached: Attached) -> str:
        """What the receiver's answer contradicts, in words; empty when it agrees."""
        if attached.group_id != self.group_id:
            return "another replica"
        if attached.next_number > self.next_number:
            return f"it has frames up to {attached.next_number - 1}, which were never sent"
        if attached.next_number != self.next_number:
            return f"frame {attached.next_number} is due there, {self.next_number} here"
        for answer in attached.disks:
            mine = self.disks.get(answer.id.bytes)
            if mine is not None and _position(mine) != _position(answer):
                return f"disk {answer.id} is elsewhere"
        return ""


def _position(disk: AttachedDisk) -> tuple[int, int, str, int | None]:
    return disk.ring_id, disk.next_sequence, disk.state, disk.size_bytes
