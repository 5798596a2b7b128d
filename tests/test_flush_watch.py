"""What is known of the flush that a server was killed in: each row of storage/flush_watch.py."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ring_writer import RingWriter

from blockrepl import limits
from blockrepl.storage.flush_watch import FlushWatch
from blockrepl.storage.ring import RingReader, create_ring
from blockrepl.storage.ring_growth import make_grown
from blockrepl.units import MIB

DISK = bytes(range(16))


@pytest.fixture
def ring(tmp_path: Path) -> RingReader:
    path = tmp_path / "d.ring"
    create_ring(
        path,
        disk=DISK,
        size_bytes=2 * MIB,
        region_bytes=limits.REGION_BYTES,
        ring_bytes=limits.RING_BYTES_MIN,
        clock_offset=0,
        stale=np.zeros(2, np.uint8),
    )
    return RingReader(path, DISK)


@pytest.fixture
def server(ring: RingReader) -> RingWriter:
    return RingWriter(ring.path)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def ask(watch: FlushWatch) -> bool:
    descriptor = watch.descriptor()
    try:
        return watch.ask(descriptor)
    finally:
        os.close(descriptor)


def kill(ring: RingReader) -> None:
    ring.recover_in_flight(1)


def test_nobody_asks_while_nobody_is_killed(
    ring: RingReader, server: RingWriter, image: int
) -> None:
    watch = FlushWatch(ring, image)
    server.begin_flush(0)
    assert watch.look() == "none"
    server.end_flush(0)
    kill(ring)  # outside a flush
    assert watch.look() == "none"
    assert ring.trusts_flushes()


def test_a_flush_that_began_after_the_opening_is_asked_about(
    ring: RingReader, server: RingWriter, image: int
) -> None:
    watch = FlushWatch(ring, image)
    for count in (1, 2):
        server.begin_flush(3)
        kill(ring)
        assert not ring.trusts_flushes()
        assert watch.look() == "ask"
        assert ask(watch)
        assert ring.trusts_flushes()
        assert ring.known_flushes() == count
        assert watch.look() == "none"


def test_a_flush_that_fails_when_asked_about_has_failed(
    ring: RingReader, server: RingWriter, image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = FlushWatch(ring, image)
    server.begin_flush(0)
    kill(ring)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("blockrepl.storage.flush_watch.os.fsync", fail)
        assert not ask(watch)
    assert ring.flush_failed()
    assert watch.look() == "none"  # nothing is left to ask
    assert not ring.trusts_flushes()


def test_a_flush_that_was_under_way_at_the_opening_stays_in_doubt(
    ring: RingReader, server: RingWriter, image: int
) -> None:
    """Guards ``_older``: the system may have told of the error just before."""
    server.begin_flush(0)
    watch = FlushWatch(ring, image)
    assert watch.look() == "none"
    kill(ring)
    assert watch.look() == "stays"


def test_a_flush_that_was_killed_before_a_look_has_not_been_seen_to_end(
    ring: RingReader, server: RingWriter, image: int
) -> None:
    """Guards the look at the count behind that at the slots: its slot is even now."""
    server.begin_flush(0)
    watch = FlushWatch(ring, image)
    kill(ring)
    assert watch.look() == "stays"
    assert watch.look() == "stays"


def test_flushes_that_were_under_way_at_the_opening_may_end_one_by_one(
    ring: RingReader, server: RingWriter, image: int
) -> None:
    """There may be no moment without any."""
    server.begin_flush(0)
    server.begin_flush(1)
    watch = FlushWatch(ring, image)
    server.end_flush(0)
    server.begin_flush(0)
    watch.look()
    server.end_flush(1)
    server.begin_flush(1)
    assert watch.look() == "none"
    kill(ring)
    assert watch.look() == "ask"


def test_a_flush_that_was_killed_before_the_opening_stays_in_doubt(
    ring: RingReader, server: RingWriter, image: int
) -> None:
    """Guards _unknown_at_opening: to this descriptor the system says that all is well."""
    server.begin_flush(0)
    kill(ring)
    assert FlushWatch(ring, image).look() == "stays"


def test_an_answer_that_another_got_is_good(
    ring: RingReader, server: RingWriter, image: int
) -> None:
    earlier = FlushWatch(ring, image)
    server.begin_flush(0)
    kill(ring)
    watch = FlushWatch(ring, image)
    assert ask(earlier)
    assert watch.look() == "none"
    server.begin_flush(0)
    kill(ring)
    assert watch.look() == "ask"


def test_an_answer_says_nothing_of_who_is_killed_meanwhile(
    ring: RingReader, server: RingWriter, image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the count before the fsync in FlushWatch.ask."""
    watch = FlushWatch(ring, image)
    server.begin_flush(0)
    kill(ring)

    def and_another(_descriptor: int) -> None:
        server.begin_flush(0)
        kill(ring)

    with monkeypatch.context() as patch:
        patch.setattr("blockrepl.storage.flush_watch.os.fsync", and_another)
        assert ask(watch)
    assert not ring.trusts_flushes()
    assert watch.look() == "ask"


@pytest.mark.parametrize("is_found", [False, True])
def test_a_ring_that_grows_keeps_the_doubt(
    ring: RingReader, server: RingWriter, image: int, is_found: bool
) -> None:
    server.begin_flush(0)
    if is_found:
        kill(ring)
    os.rename(make_grown(ring.path, 3 * MIB), ring.path)
    grown = RingReader(ring.path, DISK)
    kill(grown)
    assert grown.unknown_flushes() == 1
    assert FlushWatch(grown, image).look() == "stays"
