"""The source's clock: never back, whatever the wall clock does and however often the host boots."""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrepl.storage import clock as clocks
from blockrepl.storage.clock import LEASE_NS, RENEW_NS, SourceClock, open_clock
from blockrepl.storage.home import write_atomically
from blockrepl.units import NANOSECONDS_PER_SECOND

SECOND = NANOSECONDS_PER_SECOND
START = 1_800_000_000 * SECOND


@dataclass
class Host:
    """A host whose clocks stand still unless told."""

    boot_file: Path
    wall_ns: int = START
    monotonic_ns: int = 5 * SECOND
    boots: int = 0

    def boot(self, *, wall_ns: int | None = None, monotonic_ns: int = 3 * SECOND) -> None:
        self.boots += 1
        self.boot_file.write_text(f"boot-{self.boots}\n")
        self.monotonic_ns = monotonic_ns
        self.wall_ns = self.wall_ns if wall_ns is None else wall_ns

    def run(self, duration_ns: int) -> None:
        self.wall_ns += duration_ns
        self.monotonic_ns += duration_ns


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return make_host(tmp_path, monkeypatch)


def make_host(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    found = Host(directory / "boot_id")
    found.boot()
    monkeypatch.setattr(clocks, "_BOOT_ID", found.boot_file)
    monkeypatch.setattr(time, "time_ns", lambda: found.wall_ns)
    monkeypatch.setattr(time, "monotonic_ns", lambda: found.monotonic_ns)
    return found


def test_stamps_read_as_utc(host: Host, tmp_path: Path) -> None:
    clock = open_clock(tmp_path)
    assert clock.now() == START
    host.run(SECOND)
    assert clock.now() == START + SECOND
    assert clock.offset_ns == START - 3 * SECOND


def test_all_processes_of_a_boot_share_the_offset(host: Host, tmp_path: Path) -> None:
    first = open_clock(tmp_path)
    host.run(100 * SECOND)
    host.wall_ns += 1234
    assert open_clock(tmp_path).offset_ns == first.offset_ns


@pytest.mark.parametrize("step_seconds", [-86_400, -1, 1, 86_400])
def test_a_stepped_wall_clock_changes_nothing(
    host: Host, tmp_path: Path, step_seconds: int
) -> None:
    clock = open_clock(tmp_path)
    before = clock.now()
    host.wall_ns += step_seconds * SECOND
    assert clock.now() == before
    assert open_clock(tmp_path).now() == before


def test_a_reboot_with_a_right_wall_clock_reads_as_utc_again(host: Host, tmp_path: Path) -> None:
    open_clock(tmp_path)
    host.run(1000 * SECOND)
    host.boot()
    assert open_clock(tmp_path).now() == host.wall_ns


def test_a_reboot_into_the_past_never_goes_back(host: Host, tmp_path: Path) -> None:
    clock = open_clock(tmp_path)
    for _ in range(100):
        host.run(10 * SECOND)
        clock.renew()
    last = clock.now()
    host.boot(wall_ns=0)
    assert last < open_clock(tmp_path).now() <= last + LEASE_NS


def test_reboots_within_the_lease_never_go_back(host: Host, tmp_path: Path) -> None:
    last = 0
    for _ in range(5):
        clock = open_clock(tmp_path)
        assert clock.now() > last
        host.run(SECOND)
        clock.renew()
        last = clock.now()
        host.boot(wall_ns=START)


def test_the_mark_is_always_ahead_while_it_is_renewed(host: Host, tmp_path: Path) -> None:
    clock = open_clock(tmp_path)
    for _ in range(50):
        host.run(7 * SECOND)
        clock.renew()
        assert high_water(tmp_path) >= clock.now() + LEASE_NS - RENEW_NS - 7 * SECOND


def high_water(directory: Path) -> int:
    content = clocks._ClockFile.model_validate_json((directory / "clock.json").read_bytes())
    return content.high_water_ns


def test_renewing_often_writes_rarely(host: Host, tmp_path: Path) -> None:
    clock = open_clock(tmp_path)
    written = set()
    for _ in range(400):
        host.run(SECOND // 4)
        clock.renew()
        written.add((tmp_path / "clock.json").stat().st_ino)
        assert high_water(tmp_path) > clock.now()
    assert len(written) <= 100 * SECOND // RENEW_NS + 2


def test_a_mark_counts_once_it_is_on_the_disk(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the order in SourceClock.renew: a stamp under a mark that is lost comes again.
    clock = open_clock(tmp_path)
    assert clock.covers(START + LEASE_NS - 1)
    host.run(LEASE_NS)
    assert not clock.covers(clock.now())

    def full(_path: Path, _data: bytes) -> None:
        assert not clock.covers(clock.now())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(clocks, "write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            clock.renew()
    assert not clock.covers(clock.now())
    clock.renew()
    assert clock.covers(clock.now())


def test_of_several_that_renew_one_writes(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the lock in SourceClock.renew.
    clock = open_clock(tmp_path)
    host.run(LEASE_NS)
    written: list[bytes] = []
    others = [threading.Thread(target=clock.renew) for _ in range(2)]

    def slow(path: Path, data: bytes) -> None:
        written.append(data)
        if len(written) == 1:
            for other in others:
                other.start()
                other.join(0.1)  # it has to wait for us
        write_atomically(path, data)

    monkeypatch.setattr(clocks, "write_atomically", slow)
    clock.renew()
    for other in others:
        other.join()
    assert len(written) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b'{"boot_id": 1}'])
def test_a_damaged_file_is_made_anew(host: Host, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clock.json").write_bytes(content)
    assert open_clock(tmp_path).now() == START
    assert open_clock(tmp_path).now() == START


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.integers(1, 59 * SECOND)),
        st.tuples(st.just("step"), st.integers(-3600 * SECOND, 3600 * SECOND)),
        st.tuples(st.just("boot"), st.integers(0, 2 * START)),
        st.tuples(st.just("open"), st.just(0)),
    ),
    max_size=25,
)


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_stamps_only_rise_over_any_life_of_a_host(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    directory = tmp_path_factory.mktemp("clock")
    with pytest.MonkeyPatch.context() as monkeypatch:
        host = make_host(directory, monkeypatch)
        clock: SourceClock = open_clock(directory)
        last = clock.now()
        for what, amount in steps:
            match what:
                case "run":
                    host.run(amount)
                case "step":
                    host.wall_ns = max(0, host.wall_ns + amount)
                case "boot":
                    host.boot(wall_ns=amount)
                    clock = open_clock(directory)
                case "open":
                    clock = open_clock(directory)
            assert clock.now() >= last
            last = clock.now()
            clock.renew()
