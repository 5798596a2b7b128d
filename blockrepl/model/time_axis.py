"""Where a time axis has its marks, and how they are written: UTC, on round instants."""

from __future__ import annotations

from datetime import datetime, timezone

from blockrepl.units import NANOSECONDS_PER_SECOND

_SECOND = NANOSECONDS_PER_SECOND
_DAY = 86_400 * _SECOND
STEPS_NS = (
    *(digit * 10**power for power in range(9) for digit in (1, 2, 5)),
    *(count * _SECOND for count in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800)),
    *(count * 3600 * _SECOND for count in (1, 2, 3, 6, 12)),
    *(count * _DAY for count in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)),
)


def marks(from_ns: int, to_ns: int, most: int) -> list[tuple[int, str]]:
    """At most ``most`` instants of the window, evenly spaced, and what to write there."""
    most = max(1, most)
    step = next(
        (one for one in STEPS_NS if to_ns // one - (from_ns - 1) // one <= most), STEPS_NS[-1]
    )
    first = -(-from_ns // step) * step
    return [(at, _written(at, step)) for at in range(first, to_ns + 1, step)][:most]


def _written(at_ns: int, step_ns: int) -> str:
    seconds, rest = divmod(at_ns, _SECOND)
    moment = datetime.fromtimestamp(seconds, tz=timezone.utc)
    if step_ns >= _DAY:
        return f"{moment:%Y-%m-%d}"
    if step_ns >= 3600 * _SECOND:
        return f"{moment:%m-%d %H:%M}"
    if step_ns >= 60 * _SECOND:
        return f"{moment:%H:%M}"
    if step_ns >= _SECOND:
        return f"{moment:%H:%M:%S}"
    digits = next(count for count in range(1, 10) if step_ns % 10 ** (9 - count) == 0)
    return f"{moment:%S}.{rest:09d}"[: 3 + digits]
