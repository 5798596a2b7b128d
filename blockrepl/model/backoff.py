"""How long to wait before a connection is tried again.

The wait doubles from FIRST_SECONDS to LAST_SECONDS, and each is cut by up to half at random, so
that sources which lost their receiver at the same instant do not come back at the same instant. It
begins anew once a session has held for LAST_SECONDS: a receiver that welcomes and then drops its
sources is not asked any faster than one that is down.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_SECONDS = 0.2
LAST_SECONDS = 5.0


@dataclass(slots=True)
class Backoff:
    _next_seconds: float = FIRST_SECONDS

    def wait_seconds(self, session_seconds: float, random_share: float) -> float:
        """Until the next try. ``session_seconds``: how long the last session was up; 0 for none.

        ``random_share`` is from 0 to 1.
        """
        if session_seconds >= LAST_SECONDS:
            self._next_seconds = FIRST_SECONDS
        wait_seconds = self._next_seconds * (1 - random_share / 2)
        self._next_seconds = min(self._next_seconds * 2, LAST_SECONDS)
        return wait_seconds
