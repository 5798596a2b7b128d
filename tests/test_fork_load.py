"""Twenty forks of different instants are written at once while replication runs at full rate."""

from __future__ import annotations

import json
import os
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
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


def writes(chance: random.Random) -> Iterator[tuple[int, bytes, bool]]:
    """What a fork is written: offset, data, and whether it is synced then."""
    while True:
        data = chance.randbytes(chance.randrange(1, WRITE_BYTES))
        yield chance.randrange(SIZE - len(data)), data, chance.random() < 0.05


def write_for(path: Path, seed: int, seconds: float) -> int:
    """Write to a fork, in a process of its own; how many writes it took."""
    end = time.monotonic() + seconds
    descriptor = os.open(path, os.O_RDWR)
    try:
        for count, (offset, data, is_synced) in enumerate(writes(random.Random(seed))):
            if time.monotonic() >= end:
                return count
            assert os.pwrite(descriptor, data, offset) == len(data)
            if is_synced:
                os.fsync(descriptor)
    finally:
        os.close(descriptor)
    raise AssertionError


@dataclass
class Fork:
    """A writable mount of an instant; ``content`` is what it must hold."""

    path: Path
    content: bytearray
    written_bytes: int = 0

    def wrote(self, seed: int, count: int) -> None:
        for offset, data, _ in islice(writes(random.Random(seed)), count):
            self.content[offset : offset + len(data)] = data
            self.written_bytes += len(data)


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
        forks = [closing.enter_context(forked(it, sample)) for sample in it.samples]
        assert len(forks) == FORKS
        pool = closing.enter_context(ProcessPoolExecutor(FORKS, get_context("fork")))
        list(pool.map(time.sleep, [0.2] * FORKS))  # starts them, while no thread runs here
        guest, without, beside = Guest(it), Lags(), Lags()
        counts: list[tuple[list[int], list[int]]] = []
        with guest.writing():
            it.place.wait_replicating(GROUP)
            Lags().watch(it, guest, 3.0)  # until it runs evenly
            for _ in range(ROUNDS):
                without.watch(it, guest, ROUND_SECONDS)
                seeds = [chance.randrange(1 << 30) for _ in forks]
                busy = [
                    pool.submit(write_for, fork.path, seed, ROUND_SECONDS)
                    for fork, seed in zip(forks, seeds, strict=True)
                ]
                beside.watch(it, guest, ROUND_SECONDS)
                counts += [(seeds, [one.result() for one in busy])]
        for seeds, numbers in counts:
            for fork, seed, count in zip(forks, seeds, numbers, strict=True):
                fork.wrote(seed, count)
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
def forked(it: Stage, sample: Sample) -> Iterator[Fork]:
    target = it.place.directory / f"fork-{sample.at_ns}"
    target.mkdir()
    at = f"--at={format_instant(sample.at_ns)}"
    it.place.receiver("mount", GROUP, target, at, "--writable", quiet=True)
    try:
        yield Fork(target / f"{it.disk.name}.img", bytearray(sample.content))
    finally:
        it.place.receiver("umount", target, quiet=True)
