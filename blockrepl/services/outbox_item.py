"""What an outbox holds: a message to the receiver, and what is let go once that is durable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from blockrepl.formats.frame import (
    Buffer,
    Columns,
    EncodedFrame,
    FrameHeader,
    FrameKind,
    parse_columns,
)
from blockrepl.formats.marks import Mark
from blockrepl.formats.messages import MessageType
from blockrepl.session.release import Release, release_of
from blockrepl.storage.spool import SpooledFrame


@dataclass(slots=True, eq=False)
class Item:
    message: MessageType
    buffers: tuple[Buffer, ...]
    size_bytes: int
    release: Release = field(default_factory=Release)
    header: FrameHeader | None = None
    mark: Mark | None = None
    is_spooled: bool = False

    @property
    def number(self) -> int:
        return self.header.number if self.header else 0

    @property
    def is_data(self) -> bool:
        """Whether it waits for a bandwidth limit; marks and mere watermarks do not."""
        return self.header is None or self.header.record_count > 0


def frame_item(
    frame: EncodedFrame, columns: Columns | None, sync_epoch: int, mark: Mark | None
) -> Item:
    """Of a frame that was just built. ``columns`` and ``sync_epoch``: of content."""
    header = frame.header
    release = replace(release_of(header, columns, mark), sync_epoch=sync_epoch)
    return Item(MessageType.DATA, tuple(frame.buffers), header.frame_bytes, release, header, mark)


def spooled_item(found: SpooledFrame, sync_epoch: int = 0) -> Item:
    """Of a frame that was read from the spool."""
    header, mark = found.header, found.mark()
    columns = parse_columns(header, found.body) if header.kind == FrameKind.SYNC else None
    release = replace(release_of(header, columns, mark), sync_epoch=sync_epoch)
    buffers = (found.frame,)
    return Item(MessageType.DATA, buffers, header.frame_bytes, release, header, mark, True)


def total_bytes(items: Sequence[Item]) -> int:
    return sum(item.size_bytes for item in items)


def own(buffers: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
    """Copies of what may be the ring's memory."""
    return tuple(bytes(one) if isinstance(one, memoryview) else one for one in buffers)
