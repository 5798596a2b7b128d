"""Which regions of disks could not be compared when they were tried last, and why.

A region is hidden until it is compared: that others of its disk can be says nothing of it. A disk
has one reason, the last one found: a damaged index may give each region its own, and a byte for
each region is what a large disk may cost.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from blockrepl.limits import REGION_BYTES
from blockrepl.storage.proofs import whole_regions


class HiddenRegions:
    """Of one group. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hidden: dict[bytes, npt.NDArray[np.bool_]] = {}  # by disk; some of each are set
        self._why: dict[bytes, str] = {}

    def hide(self, disk: bytes, offset: int, length: int, why: str) -> bool:
        """A range could not be compared. Whether the disk's reason is a new one."""
        first, last = offset // REGION_BYTES, -(-(offset + length) // REGION_BYTES)
        with self._lock:
            hidden = self._hidden.get(disk, np.zeros(0, np.bool_))
            if len(hidden) < last:
                hidden = np.pad(hidden, (0, last - len(hidden)))
            hidden[first:last] = True
            self._hidden[disk] = hidden
            is_new = self._why.get(disk) != why
            self._why[disk] = why
            return is_new

    def compared(self, disk: bytes, size_bytes: int, offset: int, length: int) -> None:
        """A range was. Regions it covers in part stay as they are."""
        first, last = whole_regions(size_bytes, offset, length)
        with self._lock:
            hidden = self._hidden.get(disk)
            if hidden is None:
                return
            hidden[first:last] = False
            if not hidden.any():
                del self._hidden[disk], self._why[disk]

    def reasons(self) -> dict[bytes, str]:
        """Of the disks of which some region is hidden."""
        with self._lock:
            return dict(self._why)
