"""A lock for what every frame passes: taken without a turn of the scheduler where it is free.

trio's locks yield each time they are taken. A turn costs 50 to 100 us beside busy processors, a
frame meets several locks, and nearly all are free. Whoever loops over such a lock yields elsewhere.
"""

from __future__ import annotations

from types import TracebackType

import trio


class PromptLock:
    """First come, first served. Used as ``async with``; a cancelled task does not get it."""

    def __init__(self) -> None:
        self._lock = trio.StrictFIFOLock()

    async def __aenter__(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
