"""What a crash left of a spool's file (spool.py, rule 5)."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from blockrepl.errors import PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import FrameHeader

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """``is_damaged``: more is missing than half a frame that a killed agent was writing."""

    frames: int
    size_bytes: int
    is_damaged: bool


@dataclass(frozen=True, slots=True)
class FileRecovery:
    """``bodies``: read them too, not their headers alone. ``is_last``: of the spool's files."""

    group: bytes
    bodies: bool
    is_last: bool

    def cut(self, path: Path, number: int) -> Recovered:
        """Cut a file, which begins with that frame, at the first that is not whole and true."""
        count = at = 0
        is_damaged = False
        with path.open("r+b") as opened:
            descriptor = opened.fileno()
            end = os.fstat(descriptor).st_size
            while at < end:
                header = self._true_header(descriptor, number + count, at, end)
                if header is None:
                    log.warning("%s: cut at %d of %d bytes", path, at, end)
                    is_damaged = not (
                        self.is_last and _is_torn(descriptor, number + count, at, end)
                    )
                    if not _truncated(descriptor, at):
                        count = at = 0
                        is_damaged = True
                    break
                at += header.frame_bytes
                count += 1
        return Recovered(count, at, is_damaged)

    def _true_header(self, descriptor: int, number: int, at: int, end: int) -> FrameHeader | None:
        try:
            header = frames.decode_header(os.pread(descriptor, frames.HEADER_BYTES, at))
            is_due = (header.number, header.group) == (number, self.group)
            if not is_due or at + header.frame_bytes > end:
                return None
            if self.bodies:
                body = os.pread(descriptor, header.body_bytes, at + frames.HEADER_BYTES)
                frames.check_body(header, body)
        except (PeerError, OSError):
            return None
        return header


def _is_torn(descriptor: int, number: int, at: int, end: int) -> bool:
    """Whether [at, end) is the beginning of the frame that was due there."""
    if end - at < frames.HEADER_BYTES:
        return True
    try:
        header = frames.decode_header(os.pread(descriptor, frames.HEADER_BYTES, at))
    except (PeerError, OSError):
        return False
    return header.number == number and at + header.frame_bytes > end


def _truncated(descriptor: int, at: int) -> bool:
    """False: it had to be emptied. Old frames left behind might follow on new ones later."""
    try:
        os.ftruncate(descriptor, at)
    except OSError:  # XFS reads the block that it cuts in two
        os.ftruncate(descriptor, 0)
        return False
    return True
