"""The load: connections that write, zero, trim and flush at random, and log what they saw.

Each writer sends bursts of a few pipelined requests and then waits for their replies, so that
requests overlap in time within a connection and between connections, and between bursts there are
quiet instants. When the server goes away a writer notes what was in flight, comes back, goes on.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from oracle import nbd_client, stamps
from oracle.history import FLUSH, WRITE, ZERO, History, Request
from oracle.nbd_client import Client

SECTOR = stamps.SECTOR_BYTES
LENGTH_SECTORS_MAX = 2048  # 1 MiB
BURST_MAX = 4
HOT_SHARE = 0.5  # of requests that go to a sixteenth of the disk, to overlap often
RECONNECT_SECONDS = 60.0


@dataclass
class Pace:
    """How long a writer rests between bursts, at most."""

    pause_seconds_max: float = 0.03


@dataclass
class Writer:
    number: int
    path: Path
    sectors: int
    seed: int
    pace: Pace
    stop: threading.Event
    log: list[Request] = field(default_factory=list)
    failure: BaseException | None = None
    reconnects: int = 0
    sequence: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed * 1000 + self.number)
        self.thread = threading.Thread(target=self._run, name=f"writer-{self.number}")

    def _run(self) -> None:
        try:
            client = self._connect()
            while not self.stop.is_set():
                if not self._burst(client):
                    client.vanish()
                    client = self._connect()
                    self.reconnects += 1
                self.stop.wait(self.random.random() * self.pace.pause_seconds_max)
            client.close()
        except BaseException as error:  # told by the thread that waits for this one
            self.failure = error

    def _connect(self) -> Client:
        deadline = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                return Client(self.path)
            except (ConnectionError, FileNotFoundError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _burst(self, client: Client) -> bool:
        """Send some requests and take their replies. False when the server went away."""
        prepared = [self._prepare() for _ in range(self.random.randint(1, BURST_MAX))]
        flying: dict[int, Request] = {}
        try:
            for request, kind, data, flags in prepared:
                offset, length = request.first * SECTOR, (request.after - request.first) * SECTOR
                request = request._replace(issued_ns=time.monotonic_ns())
                # noted before it is sent: a server may have taken what it did not read to the end
                flying[client.next_cookie()] = request
                client.send(kind, offset, length, data, flags)
            while flying:
                cookie, error, _ = client.receive()
                ended = time.monotonic_ns()
                if error not in (0, errno.EOPNOTSUPP):
                    raise AssertionError(f"request failed with errno {error}")
                done = flying.pop(cookie)
                if not error:  # a refused fast zero has done nothing
                    self.log.append(done._replace(ended_ns=ended))
        except (ConnectionError, TimeoutError):
            ended = time.monotonic_ns()
            self.log += [
                request._replace(ended_ns=ended, acknowledged=False) for request in flying.values()
            ]
            return False
        return True

    def _prepare(self) -> tuple[Request, int, bytes, int]:
        """A request without instants, its NBD kind, payload and flags."""
        self.sequence += 1
        choose = self.random
        first, after = self._range()
        flags = nbd_client.FUA if choose.random() < 0.05 else 0
        turn = choose.random()
        if turn < 0.05:
            return self._request(FLUSH, 0, 0), nbd_client.FLUSH, b"", 0
        if turn < 0.17:
            return self._request(ZERO, first, after), nbd_client.TRIM, b"", flags
        if turn < 0.29:
            flags |= choose.choice((0, nbd_client.NO_HOLE, nbd_client.FAST_ZERO))
            return self._request(ZERO, first, after), nbd_client.WRITE_ZEROES, b"", flags
        data = stamps.encode(self.number, self.sequence, first, after - first)
        return self._request(WRITE, first, after), nbd_client.WRITE, data, flags

    def _request(self, kind: int, first: int, after: int) -> Request:
        return Request(self.number, self.sequence, kind, first, after, 0, 0)

    def _range(self) -> tuple[int, int]:
        """Lengths from one sector to 1 MiB, each order of magnitude as often as the others."""
        length = min(int(2 ** (self.random.random() * 11.01)), LENGTH_SECTORS_MAX)
        room = self.sectors // 16 if self.random.random() < HOT_SHARE else self.sectors
        first = self.random.randrange(max(1, room - length))
        return first, first + length


@dataclass
class Load:
    """Writers at work on one export."""

    writers: list[Writer]
    sectors: int

    def history(self, clock_offset_ns: int) -> History:
        """What was seen, in stamps. Once the load has ended."""
        moved = (
            request._replace(
                issued_ns=request.issued_ns + clock_offset_ns,
                ended_ns=request.ended_ns + clock_offset_ns,
            )
            for writer in self.writers
            for request in writer.log
        )
        return History(moved, self.sectors)

    def check_alive(self) -> None:
        for writer in self.writers:
            if writer.failure is not None:
                raise writer.failure


@contextmanager
def load(
    path: Path,
    size_bytes: int,
    *,
    seed: int,
    writers: int = 3,
    pace: Pace | None = None,
    first_writer: int = 1,
) -> Iterator[Load]:
    """Writers that run for the length of the block; their failures are raised at its end."""
    stop = threading.Event()
    sectors = size_bytes // SECTOR
    numbers = range(first_writer, first_writer + writers)
    made = [Writer(n, path, sectors, seed, pace or Pace(), stop) for n in numbers]
    for writer in made:
        writer.thread.start()
    running = Load(made, sectors)
    try:
        yield running
    finally:
        stop.set()
        for writer in made:
            writer.thread.join()
    running.check_alive()


def run_while(
    running: Load, true: Callable[[], bool], *, poll_seconds: float = 0.05, seconds_max: float = 60
) -> None:
    """Let the load run, looking now and then whether it still does."""
    deadline = time.monotonic() + seconds_max
    while true():
        running.check_alive()
        assert time.monotonic() < deadline, f"not done in {seconds_max:g} s"
        time.sleep(poll_seconds)
