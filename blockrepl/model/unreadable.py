"""Regions of a disk that gave an error when they were read: they hold up no others.

Of several that were read together it is not known which one failed: from then on each is read
alone, behind all others. One that failed alone is left in peace for a while.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

REST_SECONDS = 5.0  # until a region that failed alone is read again
RETRIES_PER_SECOND = 10  # of all regions, where most of a disk fails


class Unreadable:
    """Arrays have an element per region, as far as any has failed."""

    def __init__(self) -> None:
        self._alone = np.zeros(0, bool)
        self._rest_until = np.zeros(0)  # 0: has not failed alone

    def regions(self) -> list[int]:
        """Those that failed alone when they were read last."""
        return [int(region) for region in np.nonzero(self._rest_until)[0]]

    def failed(self, regions: Sequence[int], now: float) -> None:
        """Reading them together gave an error. ``now``: by a clock that is above 0."""
        missing = max(regions) + 1 - len(self._alone)
        if missing > 0:
            self._alone = np.pad(self._alone, (0, missing))
            self._rest_until = np.pad(self._rest_until, (0, missing))
        self._alone[regions] = True
        if len(regions) == 1:
            count = np.count_nonzero(self._rest_until)
            self._rest_until[regions] = now + max(REST_SECONDS, count / RETRIES_PER_SECOND)

    def were_read(self, regions: Sequence[int]) -> None:
        known = [region for region in regions if region < len(self._alone)]
        self._alone[known] = False
        self._rest_until[known] = 0.0

    def choice(self, stale: np.ndarray, now: float) -> np.ndarray:
        """Of the stale regions (a byte for each) those that the next read may be of; perhaps none.

        What follows the first one and is there too may be read with it.
        """
        if not self._alone.any():
            return stale
        chosen = stale.copy()
        chosen[: len(self._alone)][self._alone[: len(chosen)]] = 0
        if chosen.any():
            return chosen
        count = min(len(stale), len(self._alone))
        due = self._alone[:count] & (stale[:count] != 0) & (self._rest_until[:count] <= now)
        chosen[np.nonzero(due)[0][:1]] = 1
        return chosen
