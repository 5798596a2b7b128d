"""When a warning comes before history cannot be as long as promised."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockrepl.model.retention_room import Outlook, Room, outlook
from blockrepl.units import GIB

ROOM = Room(
    journal_bytes=20 * GIB,
    held_bytes=15 * GIB,
    pinned_bytes=0,
    bytes_per_day=10 * GIB,
    promised_days=2.0,
    free_bytes=100 * GIB,
    has_min_free=False,
    size_limit_bytes=None,
)


@pytest.mark.parametrize(
    ("room", "days", "level"),
    [
        (ROOM, 10.0, "ok"),
        (replace(ROOM, free_bytes=69 * GIB), 6.9, "warning"),
        (replace(ROOM, free_bytes=9 * GIB), 0.9, "error"),
        (replace(ROOM, free_bytes=-1), 0.0, "error"),
        (replace(ROOM, bytes_per_day=0, free_bytes=0), None, "ok"),
        # The oldest goes to make room: what is promised fits for good, though little is free.
        (replace(ROOM, has_min_free=True, free_bytes=0), None, "ok"),
        (replace(ROOM, has_min_free=True, free_bytes=-1 * GIB), 0.4, "error"),
        (replace(ROOM, has_min_free=True, promised_days=30.0), 10.5, "ok"),
        (replace(ROOM, has_min_free=True, promised_days=30.0, free_bytes=9 * GIB), 1.4, "warning"),
        # What is pinned does not go, either.
        (replace(ROOM, has_min_free=True, free_bytes=0, pinned_bytes=GIB), 0.5, "error"),
        (replace(ROOM, size_limit_bytes=20 * GIB), 10.0, "ok"),
        (replace(ROOM, size_limit_bytes=19 * GIB), 0.4, "error"),
        (replace(ROOM, size_limit_bytes=19 * GIB, free_bytes=GIB), 0.1, "error"),
        (replace(ROOM, size_limit_bytes=90 * GIB, promised_days=30.0), 7.5, "ok"),
        (replace(ROOM, size_limit_bytes=70 * GIB, promised_days=30.0), 5.5, "warning"),
    ],
)
def test_the_nearest_bound_says_how_long_it_lasts(
    room: Room, days: float | None, level: str
) -> None:
    # Guards each branch of outlook.
    seen = outlook(room)
    assert seen.days == pytest.approx(days)
    assert seen.level == level


def test_the_thresholds_are_days_of_the_operator() -> None:
    assert [Outlook(days).level for days in (7.0, 6.99, 1.0, 0.99)] == [
        "ok",
        "warning",
        "warning",
        "error",
    ]
