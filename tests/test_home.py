"""The home's format, its atomic files and its locks."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockrepl.errors import StateError, UsageError
from blockrepl.storage.home import (
    Home,
    exclusive_lock,
    exclusive_lock_wait,
    is_locked,
    write_atomically,
)


def test_a_made_home_opens_and_is_private(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home")
    assert (home.path / "format").read_bytes() == b"blockrepl 1\n"
    assert home.path.stat().st_mode & 0o077 == 0
    assert home.run_directory.stat().st_mode & 0o777 == 0o700
    assert Home.create(home.path).path == Home.open(home.path).path


def test_a_missing_home_and_one_of_another_version_are_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no blockrepl home") as missing:
        Home.open(tmp_path)
    assert missing.value.hint
    (tmp_path / "format").write_text("blockrepl 2\n")
    for open_it in (Home.open, Home.create):
        with pytest.raises(StateError, match="'blockrepl 2'") as other:
            open_it(tmp_path)
        assert other.value.code == "home-version"
        assert other.value.hint


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", ".a", "a" * 64, "a\n", "a\0"])
def test_no_foreign_name_becomes_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Home.create(tmp_path).replica_directory(name)


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        write_atomically(path, b"new", 0o600)
    assert caught.value.filename == str(path)  # the system's error of a sync names none
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = (
        "import sys; from pathlib import Path; from blockrepl.storage.home import exclusive_lock\n"
        f"lock = exclusive_lock(Path({str(path)!r})); print('ready', flush=True)\n"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(StateError, match=f"process {holder.pid}") as refused:
            exclusive_lock(path, "the home")
        assert refused.value.code == "in-use"
        holder.kill()
    with exclusive_lock(path), pytest.raises(StateError, match=str(os.getpid())):
        exclusive_lock(path)
    exclusive_lock(path).close()


def test_a_look_at_a_lock_keeps_nobody_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `_lock_unless_held`: status looks at forks while others open and remove them."""
    path = tmp_path / "lock"
    exclusive_lock(path).close()
    with path.open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda _seconds: fcntl.flock(look, fcntl.LOCK_UN))
        with exclusive_lock(path):
            assert is_locked(path)
        fcntl.flock(look, fcntl.LOCK_SH)  # and does not end
        monkeypatch.setattr(time, "sleep", lambda _seconds: None)
        with pytest.raises(StateError, match="in use"):
            exclusive_lock(path)


def test_a_lock_whose_file_is_removed_while_somebody_waits_is_taken_on_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the look at the path in exclusive_lock_wait: two would hold what they call one lock.
    path, real = tmp_path / "lock", fcntl.flock

    def removed_meanwhile(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with exclusive_lock_wait(path):
        assert is_locked(path)
    assert not is_locked(path)
