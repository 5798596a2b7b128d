"""What cannot be read of a disk is found out, and holds up nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.model.unreadable import REST_SECONDS, RETRIES_PER_SECOND, Unreadable

REGIONS = 64


def next_read(stale: np.ndarray, length_max: int) -> list[int]:
    """As choose_regions: the first one and those behind it."""
    first = int(stale.argmax())
    behind = np.nonzero(stale[first:] == 0)[0]
    return list(
        range(first, first + min(int(behind[0]) if len(behind) else REGIONS - first, length_max))
    )


@given(st.sets(st.integers(0, REGIONS - 1), max_size=10), st.integers(1, 20))
def test_only_regions_that_fail_are_left_and_they_are_read_once_in_a_while(
    bad: set[int], length_max: int
) -> None:
    unreadable = Unreadable()
    stale = np.ones(REGIONS, np.uint8)
    now, failures = 1.0, 0

    def read() -> bool:
        nonlocal failures
        chosen = unreadable.choice(stale, now)
        if not chosen.any():
            return False
        regions = next_read(chosen, length_max)
        if bad & set(regions):
            unreadable.failed(regions, now)
            failures += 1
        else:
            unreadable.were_read(regions)
            stale[regions] = 0
        return True

    while read():
        assert failures <= 2 * len(bad)
    assert set(np.nonzero(stale)[0].tolist()) == bad == set(unreadable.regions())
    before = failures
    now += REST_SECONDS
    while read():
        pass
    assert failures - before == len(bad)
    now += REST_SECONDS
    bad.clear()
    while read():
        pass
    assert not stale.any()
    assert unreadable.regions() == []


def test_a_disk_of_which_nothing_can_be_read_is_not_asked_all_the_time() -> None:
    unreadable = Unreadable()
    stale = np.ones(1000, np.uint8)
    for region in range(1000):
        unreadable.failed([region], 0.001 * (region + 1))
    assert not unreadable.choice(stale, REST_SECONDS - 1).any()
    late = np.zeros(1000, np.uint8)
    late[999] = 1
    assert not unreadable.choice(late, 999 / RETRIES_PER_SECOND).any()
    assert unreadable.choice(late, 1000 / RETRIES_PER_SECOND + 2).any()
