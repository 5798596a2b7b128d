"""What a process may keep of what it has read: bounded by configuration, whatever is read.

``--read-cache SIZE`` of the command line, or BLOCKREPL_READ_CACHE, which is how it reaches the
processes that a command starts. It is shared out in these parts of 11:

===========  =====  ==============================================================================
kept         parts  which is, by default
===========  =====  ==============================================================================
payloads     4      64 MiB of decompressed blocks (storage/payload.py)
windows      4      64 MiB of resolved ranges, of about 3 million extents (views/view.py)
directories  2      32 MiB of the index runs', of about 600 million records (storage/runs.py)
tables       1      16 MiB of frames' block tables, of about 40 GiB of journal of full frames
===========  =====  ==============================================================================

The rest of a process does not depend on it: about 60 MB, and the requests being answered.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from blockrepl.errors import UsageError
from blockrepl.limits import READ_CACHE_BYTES_DEFAULT, READ_CACHE_BYTES_MIN
from blockrepl.units import MIB, parse_size

VARIABLE = "BLOCKREPL_READ_CACHE"
_PARTS = 11


@dataclass(frozen=True, slots=True)
class ReadMemory:
    """In bytes."""

    payloads: int
    windows: int
    directories: int
    tables: int

    @classmethod
    def of(cls, total_bytes: int) -> ReadMemory:
        part = total_bytes // _PARTS
        return cls(4 * part, 4 * part, 2 * part, part)


def check_read_cache(text: str) -> int:
    """The bytes that a setting means. UsageError."""
    size_bytes = parse_size(text)
    if size_bytes is None or size_bytes < READ_CACHE_BYTES_MIN:
        least = READ_CACHE_BYTES_MIN // MIB
        raise UsageError(
            f"a read cache of {text!r} is not possible",
            hint=f"write a size of {least}M or more, as --read-cache 64M or {VARIABLE}=64M",
        )
    return size_bytes


def read_memory() -> ReadMemory:
    """What this process may keep. UsageError."""
    text = os.environ.get(VARIABLE)
    return ReadMemory.of(READ_CACHE_BYTES_DEFAULT if text is None else check_read_cache(text))
