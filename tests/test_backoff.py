"""When a connection is tried again."""

from __future__ import annotations

import pytest

from blockrepl.model.backoff import FIRST_SECONDS, LAST_SECONDS, Backoff


def test_waits_double_up_to_the_last() -> None:
    backoff = Backoff()
    waits = [backoff.wait_seconds(0.0, 0.0) for _ in range(10)]
    assert waits == [min(FIRST_SECONDS * 2**turn, LAST_SECONDS) for turn in range(10)]


@pytest.mark.parametrize("turn", [0, 3, 9])
def test_chance_cuts_a_wait_by_half_at_the_most(turn: int) -> None:
    # Guards ``random_share`` in Backoff.wait_seconds: sources would come back all at once.
    waits = []
    for share in (0.0, 0.3, 1.0):
        backoff = Backoff()
        waits.append([backoff.wait_seconds(0.0, share) for _ in range(turn + 1)][-1])
    whole, part, half = waits
    assert whole > part > half == whole / 2


def test_only_a_session_that_held_begins_anew() -> None:
    backoff = Backoff()
    for _ in range(6):
        assert backoff.wait_seconds(LAST_SECONDS / 2, 0.0) <= LAST_SECONDS
    assert backoff.wait_seconds(LAST_SECONDS / 2, 0.0) == LAST_SECONDS
    assert backoff.wait_seconds(LAST_SECONDS, 0.0) == FIRST_SECONDS
