"""Keeps an agent within its bandwidth limit: data waits here before it is sent, control does not.

Data is what content goes in: frames with records, and comparisons. Everything else goes at once:
pings, attaching, requests, marks, and the watermarks by which an idle group says that it is idle.
The groups of an agent share its limit, and take turns frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import trio

from blockrepl.channel.prompt_lock import PromptLock
from blockrepl.model.bandwidth import BandwidthLimit, Rate, TokenBucket

LOOK_SECONDS = 1.0  # how soon another rate is noticed, as when a period ends
HELD_SECONDS = 5.0  # for so long after data had to wait, the limit counts as felt


class Shaper:
    """``local_time`` replaces the host's clock."""

    def __init__(
        self, limit: BandwidthLimit, local_time: Callable[[], datetime] = datetime.now
    ) -> None:
        self._limit = limit
        self._local_time = local_time
        self._bucket = TokenBucket()
        self._turn = PromptLock()
        self._held_until = -1.0

    def rate(self) -> Rate:
        """What holds now."""
        now = self._local_time()
        return self._limit.at(now.hour * 60 + now.minute)

    @property
    def is_holding(self) -> bool:
        """Whether the limit has made data wait of late."""
        return trio.current_time() < self._held_until

    async def shape(self, size_bytes: int) -> None:
        """Wait until so many bytes of data may be sent. If cancelled, they count as not sent."""
        async with self._turn:
            while True:
                now = trio.current_time()
                wait_seconds = self._bucket.wait_seconds(self.rate().bytes_per_second, now)
                if not wait_seconds:
                    break
                self._held_until = now + wait_seconds + HELD_SECONDS
                await trio.sleep(min(wait_seconds, LOOK_SECONDS))
            self._bucket.take(size_bytes)
