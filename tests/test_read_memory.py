"""How much of what is read is kept: the setting, and that every part of it is obeyed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from journal_model import GROUP, Journal, small_segments

from blockrepl.errors import UsageError
from blockrepl.limits import READ_CACHE_BYTES_DEFAULT, READ_CACHE_BYTES_MIN
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.read_memory import VARIABLE, ReadMemory, check_read_cache, read_memory
from blockrepl.units import KIB
from blockrepl.views.view import View, window_cache


def test_the_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for total in (READ_CACHE_BYTES_MIN, READ_CACHE_BYTES_DEFAULT, 1 << 40):
        memory = ReadMemory.of(total)
        parts = (memory.payloads, memory.windows, memory.directories, memory.tables)
        assert total - 11 < sum(parts) <= total
    assert read_memory() == ReadMemory.of(READ_CACHE_BYTES_DEFAULT)
    monkeypatch.setenv(VARIABLE, "64M")
    assert read_memory() == ReadMemory.of(64 << 20)


@pytest.mark.parametrize("text", ["much", "", "-1", "7M", "0"])
def test_what_is_no_size_or_too_small_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="read cache"):
        check_read_cache(text)
    command = [sys.executable, "-m", "blockrepl.cli.main", "--read-cache", text, "status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "write a size of 8M or more" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_cache_stays_under_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_segments(monkeypatch)
    monkeypatch.setattr("blockrepl.storage.read_memory.READ_CACHE_BYTES_MIN", 0)
    monkeypatch.setattr("blockrepl.views.view.WINDOW_BYTES_MIN", 4 * KIB)
    monkeypatch.setattr("blockrepl.views.view.WINDOW_ENTRIES_TARGET", 4)
    monkeypatch.setenv(VARIABLE, "110K")
    part = 10 * KIB
    journal = Journal(tmp_path / "home", {"root": 1024 * KIB})
    for number in range(300):
        packed = bytes([number % 251]) * 4096
        data = packed if number % 2 else journal.random.randbytes(4096)  # fills segments
        journal.write("root", number % 256 * 4096, data)
    journal.close()
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        windows = window_cache()
        view = View(replica, journal.stamp, replica.state(), windows)
        for _ in range(2):
            assert view.read("root", 0, 1024 * KIB) == journal.model.at(journal.stamp)["root"]
        kept = replica.payload.kept
        held = (kept.payload_bytes, windows.held, replica.index.directory_bytes, kept.table_bytes)
        for bytes_held, parts in zip(held, (4, 4, 2, 1), strict=True):
            assert 0 < bytes_held <= parts * part
