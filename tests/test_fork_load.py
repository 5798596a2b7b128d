"""Twenty forks of different instants are written at once while replication runs at full rate."""

from __future__ import annotations

import json
import os
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from outage import BLOCK, GROUP, Sample, Stage, assert_same
from serving import place

from blockrepl.storage.home import Home
from blockrepl.units import KIB, MIB, format_instant
from scripts.guest.pair import Pair

__all__ = ["place"]

FORKS = 20
ROUND_SECONDS = float(os.environ.get("BLOCKREPL_FORK_SECONDS", "20"))
ROUNDS = 3  # with forks being written, and without, in turn
LAG_POLL_SECONDS = 0.1
LOADED_BYTES = 32 * MIB  # the part of the disk that the guest writes to meanwhile
SIZE = 48 * MIB
WRITE_BYTES = 16 * KIB


@pytest.fixture
def stage(place: Pair) -> Iterator[Stage]:
    made = Stage(place, size_bytes=SIZE)
    yield made
    made.close()


@dataclass
class Guest:
    """Writes as fast as the ring takes it, without a pause."""

    stage: Stage
    written_bytes: int = 0
    failed: BaseException | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def writing(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            if self.failed is not None:
                raise self.failed

    def _run(self) -> None:
        it = self.stage
        try:
            while not self._stop.is_set():
                while it.reader.fill() > 0.4 and not self._stop.is_set():
                    time.sleep(0.001)
                offset = it.random.randrange(LOADED_BYTES // BLOCK) * BLOCK
                it.write(offset, it.random.randbytes(BLOCK))
                self.written_bytes += BLOCK
        except BaseException as error:  # told by the main thread
            self.failed = error


@dataclass
class Fork:
    """A writable mount of an instant; ``content`` is what it must hold."""

    path: Path
    content: bytearray
    random: random.Random
    written_bytes: int = 0

    def write_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            while time.monotonic() < end:
                data = self.random.randbytes(self.random.randrange(1, WRITE_BYTES))
                offset = self.random.randrange(SIZE - len(data))
                assert os.pwrite(descriptor, data, offset) == len(data)
                self.content[offset : offset + len(data)] = data
                self.written_bytes += len(data)
                if self.random.random() < 0.05:
                    os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass
class Lags:
    seconds: list[float] = field(default_factory=list)
    guest_bytes: int = 0
    took_seconds: float = 0.0

    def watch(self, it: Stage, guest: Guest, seconds: float) -> None:
        begin, before = time.monotonic(), guest.written_bytes
        while time.monotonic() < begin + seconds:
            lag = it.group()["lag_seconds"]
            assert lag is not None
            self.seconds.append(lag)
            time.sleep(LAG_POLL_SECONDS)
        self.took_seconds += time.monotonic() - begin
        self.guest_bytes += guest.written_bytes - before

    def told(self) -> dict[str, float]:
        ordered = sorted(self.seconds)
        return {
            "p50_ms": round(statistics.median(ordered) * 1000, 1),
            "p99_ms": round(ordered[len(ordered) * 99 // 100] * 1000, 1),
            "guest_MBps": round(self.guest_bytes / self.took_seconds / 1e6, 1),
        }


def files(home: Path, directory: str) -> dict[Path, bytes]:
    root = Home(home).replica_directory(GROUP) / directory
    return {path: path.read_bytes() for path in root.iterdir()}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_forks_do_not_hold_up_replication_that_runs_at_full_rate(stage: Stage) -> None:
    """Reports the lag with forks being written over the lag without, interleaved in one run."""
    it = stage
    for _ in range(FORKS):
        it.write_some(8)
        it.sample()
    it.wait_synced()
    home = it.place.receiver_home
    base, journal = files(home, "base"), files(home, "segments")
    chance = random.Random(9)
    with ExitStack() as closing:
        forks = [closing.enter_context(forked(it, sample, chance)) for sample in it.samples]
        assert len(forks) == FORKS
        pool = closing.enter_context(ThreadPoolExecutor(FORKS))
        guest, without, beside = Guest(it), Lags(), Lags()
        with guest.writing():
            it.place.wait_replicating(GROUP)
            Lags().watch(it, guest, 3.0)  # until it runs evenly
            for _ in range(ROUNDS):
                without.watch(it, guest, ROUND_SECONDS)
                busy = [pool.submit(fork.write_for, ROUND_SECONDS) for fork in forks]
                beside.watch(it, guest, ROUND_SECONDS)
                for one in busy:
                    one.result()
        for fork in forks:
            assert_same(fork.path.read_bytes(), bytes(fork.content), str(fork.path))
    ratio = statistics.median(beside.seconds) / statistics.median(without.seconds)
    print(
        json.dumps(
            {
                "without": without.told(),
                "with_forks": beside.told(),
                "lag_ratio_p50": round(ratio, 2),
                "lag_ratio_p99": round(beside.told()["p99_ms"] / without.told()["p99_ms"], 2),
                "forks_MBps": round(
                    sum(fork.written_bytes for fork in forks) / beside.took_seconds / 1e6, 1
                ),
            }
        )
    )
    it.write_some(1)
    it.sample()
    it.wait_synced()
    assert it.gaps() == []
    assert files(home, "base") == base
    now = files(home, "segments")
    for path, content in journal.items():  # it has grown at its end, and sealed what was open
        whole = content if len(content) < len(now[path]) else content[: len(now[path])]
        assert now[path].startswith(whole), path.name
    it.check()


@contextmanager
def forked(it: Stage, sample: Sample, chance: random.Random) -> Iterator[Fork]:
    target = it.place.directory / f"fork-{sample.at_ns}"
    target.mkdir()
    at = f"--at={format_instant(sample.at_ns)}"
    it.place.receiver("mount", GROUP, target, at, "--writable", quiet=True)
    try:
        seed = random.Random(chance.randrange(1 << 30))
        yield Fork(target / f"{it.disk.name}.img", bytearray(sample.content), seed)
    finally:
        it.place.receiver("umount", target, quiet=True)
