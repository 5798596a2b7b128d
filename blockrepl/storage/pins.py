"""Pins: which instants of a group's history are in use, and so may not be thinned or folded away.

==========================================  ====================================================
file, in ``replicas/<group>/``              is
==========================================  ====================================================
pins/<random>                               an interval that a process uses: JSON (``Pin``), locked
                                            (flock) for as long as the process has it
forks/<name>/fork.json                      a fork: pins its instant until it is removed or has
                                            expired (storage/forks.py)
pins.lock                                   held for moments, see below
==========================================  ====================================================

Rules:

1. Who pins holds ``pins.lock`` while it looks whether the instant can still be reached and makes
   its file. Who shortens history holds it from the reading of ``pins`` until what it has decided
   is in the catalog. So an instant that was pinned stays reachable.
2. A pin's file is locked and written under a name with a dot, and renamed then: whoever looks
   without ``pins.lock`` finds a whole pin or none. The next to pin removes what a crash left so.
3. The kernel drops a process's locks with the process: a pin whose file is not locked is void, and
   its file is removed by whoever meets it. Nothing here need survive a power cut.

They are files and not rows of the catalog because the kernel's word on who is alive is better than
ours, and because the catalog has one writer, which must never wait for a view.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from blockrepl.errors import StateError, StorageError
from blockrepl.model.points import Instant, Point
from blockrepl.storage.files import Files, failure, is_full, write_all
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import ExclusiveLock, exclusive_lock, exclusive_lock_wait
from blockrepl.units import format_instant

LOCK_NAME = "pins.lock"
DIRECTORY_NAME = "pins"
_UNFINISHED = "."
WHAT_LETTERS_MAX = 256  # up to 12 bytes each in JSON, of which `held` reads 4096


@dataclass(frozen=True, slots=True)
class Pin:
    """Every instant in [first_ns, last_ns] stays; most often it is one. ``what`` says for whom."""

    first_ns: int
    last_ns: int
    what: str
    process: int
    since_ns: int


def lock(replica: Path) -> ExclusiveLock:
    """Wait for the lock of a replica's pins and forks."""
    return exclusive_lock_wait(replica / LOCK_NAME)


def lock_if_free(replica: Path) -> ExclusiveLock | None:
    """The same lock without waiting; None when somebody has it."""
    try:
        return exclusive_lock(replica / LOCK_NAME)
    except StateError:
        return None


class HeldPin:
    """A pin of this process, until ``release`` or its end."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def hold(history: ReplicaHistory, first_ns: int, last_ns: int, what: str) -> HeldPin | None:
    """Pin an interval whose ends can be reached. PointError when they cannot (any more).

    None on a read-only file system, where nobody shortens history. StorageError.
    """
    pin = Pin(first_ns, last_ns, _told(what), os.getpid(), time.time_ns())
    try:
        with lock(history.directory):
            check_reachable(history, first_ns, last_ns)
            return _make(history.directory / DIRECTORY_NAME, pin)
    except OSError as error:
        if error.errno == errno.EROFS:
            check_reachable(history, first_ns, last_ns)
            return None
        problem = f"cannot pin {format_instant(first_ns)} in {history.directory}"
        if is_full(error):
            raise failure(error, problem) from error
        raise StorageError(
            f"{problem}: {error.strerror}", hint="run it as the user that the replica belongs to"
        ) from error


def _told(what: str) -> str:
    """Text that can be printed, and not too long: paths may be neither."""
    text = os.fsencode(what).decode(errors="replace")
    return text if len(text) <= WHAT_LETTERS_MAX else f"{text[: WHAT_LETTERS_MAX - 3]}..."


def _make(directory: Path, pin: Pin) -> HeldPin:
    """Rule 2. Under `lock`. OSError."""
    directory.mkdir(mode=0o700, exist_ok=True)
    remove_unfinished(directory.parent)
    name = secrets.token_hex(8)
    unfinished, path = directory / f"{_UNFINISHED}{name}", directory / name
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        write_all(Files(), descriptor, [json.dumps(asdict(pin)).encode()], 0)
        unfinished.rename(path)
    except BaseException:
        os.close(descriptor)
        with suppress(OSError):
            unfinished.unlink()
        raise
    return HeldPin(path, descriptor)


def remove_unfinished(replica: Path) -> None:
    """Remove what a crash left of pins being made. Under `lock`. OSError."""
    for path in (replica / DIRECTORY_NAME).glob(f"{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def check_reachable(history: ReplicaHistory, *instants: int) -> None:
    """PointError, with the nearest, for an instant that is not there."""
    state = history.state()
    for at_ns in instants:
        text = format_instant(at_ns)
        history.resolve(Point(text, Instant(at_ns)), time.time_ns(), state)


@contextmanager
def holding(
    history: ReplicaHistory, first_ns: int, last_ns: int, what: str
) -> Iterator[HeldPin | None]:
    pin = hold(history, first_ns, last_ns, what)
    try:
        yield pin
    finally:
        if pin is not None:
            pin.release()


def held(replica: Path) -> list[Pin]:
    """The pins of processes, oldest instant first. With ``lock`` held when it is to be relied on.

    Forks pin too: storage/forks.py has both together.
    """
    found = []
    for path in _files(replica / DIRECTORY_NAME):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            found.append(Pin(**json.loads(os.pread(descriptor, 4096, 0))))
        else:
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
    return sorted(found, key=lambda pin: (pin.first_ns, pin.since_ns))


def _files(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if not path.name.startswith(_UNFINISHED)]
    except FileNotFoundError:
        return []
