"""Waiting for the kernel's next FUSE request without an event loop's turn per request.

pyfuse3 registers its descriptor with epoll, and runs a turn of Trio's loop, for every request:
18 000 reads of 4 KiB a second, page cache hot, where the qemu-storage-daemon's export does 40 000.
Asking poll(2) first, and for SPIN_SECONDS more, does 60 000 (at depth 1: 12 000 becomes 20 000 or
more, for a request that follows its reply closely finds us awake).

Rules:

1. Every TURN-th request takes the long way, so that threads' results and signals are never late
   by more than a millisecond.
2. A request is only taken when poll says so at that moment: another task may have taken the one
   that woke this task, and a read of the descriptor blocks.
3. While threads are at work there is no waiting here: their results come through the loop, and they
   want the interpreter and the core.

The function replaced is private to pyfuse3. Where a version has none of that name, nothing is
replaced, and only speed is lost. It is what each mount's own wait falls back to, never that of the
mount before in this process, whose descriptor may be any file by now.
"""

from __future__ import annotations

import select
import time
from collections.abc import Awaitable, Callable

import pyfuse3

SPIN_SECONDS = 30e-6
TURN = 64
_FUNCTION = "_wait_fuse_readable"
_original: Callable[[], Awaitable[bool]] | None = getattr(pyfuse3, _FUNCTION, None)


def install(descriptor: int, has_threads: Callable[[], bool]) -> Callable[[], bool]:
    """Wait for requests on ``descriptor``, the one connection that pyfuse3 has.

    ``has_threads``: whether threads are at work. Returned is what tells, at any time, whether there
    are requests.
    """
    ask = select.poll()
    ask.register(descriptor, select.POLLIN)

    def has_more() -> bool:
        return bool(ask.poll(0))

    original = _original
    if original is None:
        return has_more
    requests = 0

    async def wait() -> bool:
        nonlocal requests
        requests += 1
        if requests % TURN:
            give_up = time.perf_counter() + SPIN_SECONDS
            while not ask.poll(0):
                if has_threads() or time.perf_counter() > give_up:
                    break
            else:
                return True
        while await original():
            if ask.poll(0):
                return True
        return False

    setattr(pyfuse3, _FUNCTION, wait)
    return has_more
