"""The most memory each of our processes held, without what is shared with others.

Counted is ``RssAnon + RssFile`` of /proc/PID/status, of every process a service consists of: the
ring is shared memory (``RssShmem``) and not counted, since it is one, and its size is configured.
A thread samples all the time; what a process had for less than a sample's distance goes unseen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from scripts.benchmark.processes import Service

SAMPLE_SECONDS = 0.5


def resident_bytes(process_id: int) -> int:
    """What the process holds alone; 0 when it has ended."""
    total = 0
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(("RssAnon:", "RssFile:")):
            total += int(line.split()[1]) * 1024
    return total


class Sampler:
    """Greatest memory by service name, in bytes."""

    def __init__(self, services: Callable[[], Mapping[str, Service]]) -> None:
        self._services = services
        self.most_bytes: dict[str, int] = {}

    def sample(self) -> None:
        for name, service in self._services().items():
            held = sum(resident_bytes(process_id) for process_id in service.process_ids())
            self.most_bytes[name] = max(held, self.most_bytes.get(name, 0))


@contextmanager
def sampling(services: Callable[[], Mapping[str, Service]]) -> Iterator[Sampler]:
    """Sample for the length of a block."""
    sampler = Sampler(services)
    done = threading.Event()

    def loop() -> None:
        while not done.wait(SAMPLE_SECONDS):
            sampler.sample()

    thread = threading.Thread(target=loop, name="memory sampler")
    thread.start()
    try:
        yield sampler
    finally:
        done.set()
        thread.join()
