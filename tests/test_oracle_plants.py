"""The oracle on what capture really recorded: as it is, and with a fault planted in it."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Sequence

import pytest
from oracle import stamps
from oracle.checker import check
from oracle.history import History, View
from oracle.writers import Pace, load, run_while
from serving import Disk, Record, Replay

from blockrepl.storage.clock import open_clock
from blockrepl.units import MIB
from scripts.guest.pair import pair

Change = tuple[int, int, bytes]  # stamp, offset, content
Fault = Callable[[list[Change], int], list[Change]]  # what a view of so many records shows


def changes_of(disk: Disk, replay: Replay) -> list[Change]:
    """The ring's records with the content that each put there."""
    found: list[Change] = []

    def note(record: Record) -> None:
        if record.length:
            content = bytes(replay.content[record.offset : record.after])
            found.append((record.stamp, record.offset, content))

    replay.drain(each=note)
    return found


def view_at(changes: Sequence[Change], at_ns: int, size_bytes: int) -> View:
    content = bytearray(size_bytes)
    for _, offset, data in changes:
        content[offset : offset + len(data)] = data
    return View(at_ns, stamps.decode(bytes(content)))


def as_they_are(changes: list[Change], upto: int) -> list[Change]:
    return changes[:upto]


def one_too_few(changes: list[Change], upto: int) -> list[Change]:
    return changes[: max(0, upto - 1)]


def one_too_many(changes: list[Change], upto: int) -> list[Change]:
    return changes[: upto + 1]


def swapped(changes: list[Change], upto: int) -> list[Change]:
    """Each record trades places with the sixth after it: more than are in flight at once."""
    order = sorted(range(upto), key=lambda n: n + (6 if n % 12 < 6 else -6))
    return [changes[n] for n in order]


def kept_buffers(changes: list[Change], upto: int) -> list[Change]:
    """Each record shows what the next request put into the same memory."""
    following = [data for _, _, data in changes[1:]] + [b""]
    mixed = [
        (stamp, offset, (later + data[len(later) :])[: len(data)])
        for (stamp, offset, data), later in zip(changes, following, strict=True)
    ]
    return mixed[:upto]


@pytest.mark.parametrize(
    ("fault", "legal"),
    [
        (as_they_are, True),
        (one_too_few, False),
        (one_too_many, False),
        (swapped, False),
        (kept_buffers, False),
    ],
)
def test_the_oracle_sees_faults_planted_in_real_records(
    real: tuple[History, list[Change], int], fault: Fault, legal: bool
) -> None:
    history, changes, size_bytes = real
    choose = random.Random(9)
    stamps_taken = [stamp for stamp, _, _ in changes]
    ends = history.ended.tolist()
    views = []
    for _ in range(30):
        at = choose.choice(ends) + 1
        upto = bisect.bisect_right(stamps_taken, at)
        views.append(view_at(fault(changes, upto), at, size_bytes))
    assert (check(history, views) == []) == legal


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, list[Change], int]:
    """What three writers saw, and what the ring kept of it."""
    with pair(tmp_path_factory.mktemp("real"), print) as made:
        disk = Disk(made, size_bytes=8 * MIB, ring_bytes=256 * MIB)
        disk.start()
        replay = Replay(disk.reader(), bytes(disk.size_bytes))
        clock = open_clock(disk.disks.home.source_directory)
        with load(disk.socket, disk.size_bytes, seed=4, pace=Pace(0.02)) as running:
            run_while(running, lambda: replay.reader.head() < 500)
        changes = changes_of(disk, replay)
        assert replay.reader.dropped() == 0
        return running.history(clock.offset_ns), changes, disk.size_bytes
