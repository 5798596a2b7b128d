"""Types that keep quantities apart, and how instants are written.

An instant is an integer number of nanoseconds since 1970-01-01T00:00:00Z (a *stamp*). On paper it
is ISO 8601 in UTC with nine decimals: ``2026-11-22T10:31:07.250000000Z``.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import NewType

Stamp = NewType("Stamp", int)  # nanoseconds UTC
FrameNumber = NewType("FrameNumber", int)  # 1 is the first frame of a stream
Sequence = NewType("Sequence", int)  # index of a record since its ring was made
Epoch = NewType("Epoch", int)

NANOSECONDS_PER_SECOND = 1_000_000_000
KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


_SIZE_UNITS = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB}


def parse_size(text: str) -> int | None:
    """Bytes, with an optional K, M, G or T (powers of 1024); None when it is no size."""
    match = re.fullmatch(r"(\d{1,15})([kmgt]?)(?:i?b)?", text.strip().lower(), re.ASCII)
    return int(match[1]) * _SIZE_UNITS[match[2]] if match else None


def format_instant(stamp: int) -> str:
    """Write a stamp as ISO 8601 UTC with nanoseconds."""
    seconds, nanoseconds = divmod(stamp, NANOSECONDS_PER_SECOND)
    day = datetime.fromtimestamp(seconds, tz=timezone.utc)
    return f"{day:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


def format_bytes(size_bytes: int) -> str:
    """``512 B``, ``1.5 KiB``, ``20 GiB``."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < KIB or unit == "TiB":
            break
        value /= KIB
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
