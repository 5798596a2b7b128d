"""What serves a fork gives way to what replicates: 20 busy forks left a guest beside them 4 MB/s of
100, and leave it 45 when they do (2 cores, measured).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

NICENESS = 10  # a tenth of what others get when there is not enough for all


def give_way() -> None:
    """Let other processes have the processors first."""
    os.nice(NICENESS)
    if os.getsid(0) == os.getpid():
        # Where Linux shares out by session (sched_autogroup) the above only counts within it.
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(f"{NICENESS}\n")
