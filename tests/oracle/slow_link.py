"""A link at a tenth of what the guest writes, for a while, then free; under the oracle's eyes.

The link is a proxy between agent and receiver that lets through so many bytes a second. First a
stretch with a good link says what the guest writes (on the wire), and how long its requests take;
then the link is throttled for as long; then it is free, and what waited in the spool drains.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import trio

from oracle.history import WRITE, Request
from oracle.run import GROUP, Outcome, Run
from oracle.writers import Load, Pace, load, run_while
from scripts.guest.pair import Pair

RING_BYTES = 16 << 20
WRITERS = 3
SHARE = 0.1
NANOSECONDS_PER_MILLISECOND = 1_000_000


@dataclass
class SlowLink:
    """A proxy on loopback. ``bytes_per_second`` may be changed at any time."""

    target_port: int
    port: int = 0
    bytes_per_second: float = math.inf
    passed_bytes: int = 0  # from the agent to the receiver
    _ready: threading.Event = field(default_factory=threading.Event)
    _stop: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_tcp, self._connected, 0, host="127.0.0.1")
            [listener] = await nursery.start(serve)
            self.port = listener.socket.getsockname()[1]
            self._ready.set()
            await self._stop.wait()
            nursery.cancel_scope.cancel()

    async def _connected(self, near: trio.SocketStream) -> None:
        try:
            far = await trio.open_tcp_stream("127.0.0.1", self.target_port)
        except OSError:
            return
        async with far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, near, far, True)
            nursery.start_soon(self._pass, far, near, False)

    async def _pass(self, source: trio.SocketStream, to: trio.SocketStream, shaped: bool) -> None:
        """Until one of the two is gone; then both."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                if shaped:
                    self.passed_bytes += len(data)
                    await trio.sleep(len(data) / self.bytes_per_second)
                await to.send_all(data)
        await source.aclose()
        await to.aclose()


@contextmanager
def slow_link(target_port: int) -> Iterator[SlowLink]:
    """The proxy, in a thread of its own."""
    link = SlowLink(target_port)
    tokens: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        await link.run()

    thread = threading.Thread(target=trio.run, args=(main,), name="slow link")
    thread.start()
    try:
        assert link._ready.wait(10)
        yield link
    finally:
        tokens[0].run_sync_soon(link._stop.set)
        thread.join()


@dataclass
class SlowOutcome(Outcome):
    good_bytes_per_second: int = 0  # on the wire
    slow_bytes_per_second: int = 0
    good_p99_ms: float = 0
    slow_p99_ms: float = 0
    good_write_p90_ms: float = 0  # of writes alone: the slowest twentieth are FUA
    slow_write_p90_ms: float = 0
    spool_bytes: int = 0  # at the end of the slow stretch
    drain_seconds: float = 0
    agent_before_kib: int = 0
    agent_peak_kib: int = 0


class SlowRun(Run):
    outcome: SlowOutcome

    def __init__(self, place: Pair, seed: int, link: SlowLink) -> None:
        super().__init__(place, seed)
        self.outcome = SlowOutcome()
        self.ring_bytes = RING_BYTES
        self.address = f"127.0.0.1:{link.port}"
        self.link = link

    def stretch(self, running: Load, seconds: float) -> tuple[float, float, float]:
        """Let the load run: bytes a second through the link, the requests' p99, the writes' p90."""
        begun, passed = time.monotonic(), self.link.passed_bytes
        done = [len(writer.log) for writer in running.writers]
        run_while(running, lambda: time.monotonic() < begun + seconds, seconds_max=2 * seconds + 60)
        rate = (self.link.passed_bytes - passed) / (time.monotonic() - begun)
        logs = zip(running.writers, done, strict=True)
        seen = [one for writer, before in logs for one in writer.log[before:] if one.acknowledged]
        writes = [one for one in seen if one.kind == WRITE]
        return rate, _quantile_ms(seen, 99), _quantile_ms(writes, 90)

    def go(self, running: Load, seconds: float) -> None:
        outcome = self.outcome
        good, outcome.good_p99_ms, outcome.good_write_p90_ms = self.stretch(running, seconds)
        outcome.agent_before_kib = self._agent_kib("VmRSS")
        self.link.bytes_per_second = good * SHARE
        slow, outcome.slow_p99_ms, outcome.slow_write_p90_ms = self.stretch(running, seconds)
        spool = self.disk.disks.home.source_directory / "spool" / GROUP
        outcome.spool_bytes = _size_bytes(spool)
        outcome.good_bytes_per_second, outcome.slow_bytes_per_second = int(good), int(slow)

    def free(self) -> None:
        self.link.bytes_per_second = math.inf
        begun = time.monotonic()
        self.settle()
        self.outcome.drain_seconds = round(time.monotonic() - begun, 1)
        self.outcome.agent_peak_kib = self._agent_kib("VmHWM")

    def _agent_kib(self, field_name: str) -> int:
        process = self.place.services["agent"].process.pid
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{field_name}:"):
                return int(line.split()[1])
        raise AssertionError(f"no {field_name}")


def _size_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*"))


def _quantile_ms(requests: list[Request], percent: int) -> float:
    took = [one.ended_ns - one.issued_ns for one in requests]
    return round(float(np.percentile(took, percent)) / NANOSECONDS_PER_MILLISECOND, 2)


def run_slow_link(
    place: Pair, seconds: float, *, seed: int, pace: Pace | None = None
) -> SlowOutcome:
    """Run in a fresh place."""
    with slow_link(place.port) as link:
        run = SlowRun(place, seed, link)
        run.set_up()
        with place.mounted(GROUP) as root:
            options = {"seed": seed, "writers": WRITERS}
            size_bytes = run.disk.size_bytes
            with load(run.disk.socket, size_bytes, pace=pace or Pace(0.1), **options) as running:
                run.go(running, seconds)
            run.free()
            run.examine(root, running.history(run.clock.offset_ns))
        place.stop("agent")
    return run.outcome
