"""Locks on a byte of a file that belong to the open file description (Linux: F_OFD_SETLK).

As with flock, they pass to a program over exec and go with the last process that holds them; and
they can be asked for without taking one, so that a look keeps nobody else from locking.
"""

from __future__ import annotations

import fcntl
import struct

_FLOCK = struct.Struct("hhqqi4x")
_F_OFD_GETLK = 36
_F_OFD_SETLK = 37


def lock_byte(descriptor: int, byte: int, *, shared: bool = False) -> None:
    """Without waiting. OSError (EACCES or EAGAIN) when another's lock is in the way."""
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    fcntl.fcntl(descriptor, _F_OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))


def is_held_by_another(descriptor: int, byte: int) -> bool:
    """Whether a lock of either kind is on it that is not this descriptor's."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0)
    found = _FLOCK.unpack(fcntl.fcntl(descriptor, _F_OFD_GETLK, asked))
    return bool(found[0] != fcntl.F_UNLCK)
