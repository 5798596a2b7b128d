"""Whether an agent process may come back although a later one of its source has started.

Of two agents with one identity the one that started last is let in. When it is gone for good, the
other must not stay out for good:

1. An agent is let in when none that started later has had a session for AWAY_SECONDS. One that
   loses its connection is back long before (model/backoff.py).
2. A receiver that has just started knows of no session before: it waits as long.
3. One that started later comes in at any time, and ends the session of the earlier one. So they
   never take turns: the earlier is there only while the later is away.
"""

from __future__ import annotations

from blockrepl.model.backoff import LAST_SECONDS

AWAY_SECONDS = 300.0  # far more than the network is away in an agent's daily life
assert AWAY_SECONDS > 10 * LAST_SECONDS


class Presence:
    """``now`` is in seconds, of a clock that only goes forward."""

    def __init__(self, now: float) -> None:
        self._begun = now
        self._seen: dict[bytes, dict[int, float]] = {}  # by source and number: a session's end

    def ended(self, source: bytes, instance: int, now: float) -> None:
        """A session of the source's agent with this number has ended."""
        recent = {
            number: seen
            for number, seen in self._seen.get(source, {}).items()
            if seen > now - AWAY_SECONDS
        }
        self._seen[source] = {**recent, instance: now}

    def may_return(self, source: bytes, instance: int, there: int, now: float) -> bool:
        """``there``: the number of the agent with a session now; 0: there is none."""
        later = [seen for number, seen in self._seen.get(source, {}).items() if number > instance]
        return there <= instance and max([self._begun, *later]) <= now - AWAY_SECONDS
