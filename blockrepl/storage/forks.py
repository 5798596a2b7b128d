"""The forks of a replica: writable views, each an instant and what was written on top of it.

==========================  ===========================================================
path in ``forks/``          is
==========================  ===========================================================
<name>/fork.json            name, instant, limits and disks; its rename makes the fork
<name>/<disk>.img, .map     overlays (storage/overlay.py)
<name>/lock                 flock of the one process that has the fork open
.unnamed-<random>/          the same, thrown away by whoever made it
.new-<random>/, .gone-.../  being made, being removed
==========================  ===========================================================

Rules:

1. Whatever makes, opens or removes a fork holds the lock of the pins (storage/pins.py) meanwhile.
   Hence what begins with a dot and has no lock's holder was left by a crash, and is removed by the
   next command that sweeps.
2. What is to go is renamed under that lock, and its files are removed without it: that takes a disk
   long, and retention would wait. Nobody looks into .gone-...: whoever sweeps may remove it, two at
   once too, and what a crash has left of it.
3. A fork pins its instant until it is removed, or has expired and is not in use.
4. Base and journal are only read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockrepl.errors import DamageError, StateError
from blockrepl.limits import FORK_RESERVE_BYTES, FORK_RESERVE_SHARE, FORKS_MAX
from blockrepl.storage import pins
from blockrepl.storage.files import Files, private
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import (
    ExclusiveLock,
    check_name,
    exclusive_lock,
    is_locked,
    make_directory,
    sync_directory,
    write_atomically,
)
from blockrepl.storage.overlay import Overlay, Room, create_overlay
from blockrepl.storage.pins import Pin
from blockrepl.units import format_instant

log = logging.getLogger(__name__)

DIRECTORY_NAME = "forks"
FILE_NAME = "fork.json"
LOCK_NAME = "lock"
_UNNAMED, _NEW, _GONE = ".unnamed-", ".new-", ".gone-"


@dataclass(frozen=True, slots=True)
class ForkDisk:
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Fork:
    """What fork.json says. ``name`` is empty for one that is thrown away."""

    name: str
    at_ns: int
    created_ns: int
    size_limit_bytes: int | None
    expires_ns: int | None
    disks: tuple[ForkDisk, ...]

    def has_expired(self, now_ns: int) -> bool:
        return self.expires_ns is not None and self.expires_ns <= now_ns


@dataclass(frozen=True, slots=True)
class ForkStatus:
    fork: Fork
    used_bytes: int
    process: int | None  # that has it open


class OpenFork:
    """A fork that is this process's to write to: nobody else can open or remove it."""

    def __init__(self, directory: Path, fork: Fork, lock: ExclusiveLock) -> None:
        self.directory = directory
        self.fork = fork
        self.lock = lock

    def close(self) -> None:
        """Let go of it; one without a name is thrown away."""
        if not self.fork.name:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(_set_aside(self.directory), ignore_errors=True)
        self.lock.close()


def open_overlays(directory: Path, fork: Fork, files: Files | None = None) -> dict[str, Overlay]:
    """The overlays of a fork that is ours, by disk. DamageError, StorageError, OSError."""
    label = fork.name or "without a name"
    room = Room(label, directory, fork.size_limit_bytes, _reserve(directory))
    return {
        disk.name: Overlay(
            directory, disk.name, disk.size_bytes, room, files, is_durable=bool(fork.name)
        )
        for disk in fork.disks
    }


def _reserve(directory: Path) -> int:
    found = os.statvfs(directory)
    return min(FORK_RESERVE_BYTES, int(found.f_blocks * found.f_frsize * FORK_RESERVE_SHARE))


def create(
    history: ReplicaHistory,
    name: str | None,
    at_ns: int,
    *,
    size_limit_bytes: int | None = None,
    expires_ns: int | None = None,
) -> OpenFork:
    """Make a fork of an instant and open it; without a name it lives until it is closed.

    StateError when the name is taken, PointError.
    """
    forks = history.directory / DIRECTORY_NAME
    sweep(history.directory)
    with pins.lock(history.directory):
        pins.check_reachable(history, at_ns)
        make_directory(forks, 0o700)
        if name is not None and (forks / check_name(name, "fork")).exists():
            raise StateError(
                f"fork {name!r} of {history.group} exists already",
                hint="choose another name, or remove that one first",
                code="taken",
            )
        if sum(not path.name.startswith(_GONE) for path in forks.iterdir()) >= FORKS_MAX:
            raise StateError(
                f"group {history.group} has {FORKS_MAX} forks", hint="remove some of them first"
            )
        disks = tuple(ForkDisk(row.name, row.size_bytes) for row in history.state().disks_at(at_ns))
        fork = Fork(name or "", at_ns, time.time_ns(), size_limit_bytes, expires_ns, disks)
        target = forks / (name or f"{_UNNAMED}{secrets.token_hex(6)}")
        made = forks / f"{_NEW}{secrets.token_hex(6)}"
        try:
            _fill(made, fork)
            made.rename(target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        if name is not None:
            sync_directory(forks)
        return OpenFork(target, fork, exclusive_lock(target / LOCK_NAME))


def _fill(directory: Path, fork: Fork) -> None:
    """One without a name is gone after a crash anyway, and need not be durable."""
    directory.mkdir(mode=0o700)
    for disk in fork.disks:
        create_overlay(directory, disk.name, disk.size_bytes, is_durable=bool(fork.name))
    data = json.dumps(asdict(fork)).encode()
    if fork.name:
        write_atomically(directory / FILE_NAME, data, 0o600)
    else:
        with open(directory / FILE_NAME, "xb", opener=private) as file:
            file.write(data)


def open_fork(replica: Path, group: str, name: str, now_ns: int) -> OpenFork:
    """Open a fork to write to it. StateError when there is none, it is in use or has expired."""
    with pins.lock(replica):
        directory = _find(replica, group, name)
        fork = load(directory)
        lock = _lock(directory, group, name)
        if fork.has_expired(now_ns):
            lock.close()
            assert fork.expires_ns is not None
            raise StateError(
                f"fork {name} of {group} has expired on {format_instant(fork.expires_ns)}",
                hint="make another: blockrepl fork create",
                code="expired",
            )
        return OpenFork(directory, fork, lock)


def load(directory: Path) -> Fork:
    """What a fork's directory says. DamageError, FileNotFoundError."""
    path = directory / FILE_NAME
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        disks = tuple(ForkDisk(**disk) for disk in fields.pop("disks"))
        return Fork(**fields, disks=disks)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(
            f"{path} is damaged: {error}", hint="remove the fork: blockrepl fork remove"
        ) from error


def remove(replica: Path, group: str, name: str) -> Fork:
    """Throw a fork away. StateError when there is none, or it is in use."""
    with pins.lock(replica):
        directory = _find(replica, group, name)
        with _lock(directory, group, name):
            try:
                fork = load(directory)
            except DamageError:
                fork = Fork(name, 0, 0, None, None, ())
            gone = _set_aside(directory)
    shutil.rmtree(gone, ignore_errors=True)
    return fork


def statuses(replica: Path) -> list[ForkStatus]:
    """The named forks by name, and the unnamed that are in use. Under ``pins.lock``."""
    found = []
    for directory in _directories(replica):
        if directory.name.startswith((_NEW, _GONE)):
            continue
        try:
            fork, process = load(directory), _holder(directory)
            if fork.name or process is not None:
                used = sum((directory / f"{d.name}.img").stat().st_blocks for d in fork.disks)
                found.append(ForkStatus(fork, used * 512, process))
        except FileNotFoundError:  # it has just been thrown away
            continue
        except DamageError as error:
            log.warning("%s; %s", error, error.hint)
    return found


def all_pins(replica: Path, now_ns: int) -> list[Pin]:
    """What processes and forks pin. With ``pins.lock`` held when it is to be relied on."""
    of_forks = [
        Pin(
            status.fork.at_ns,
            status.fork.at_ns,
            f"fork {status.fork.name}".strip(),
            status.process or 0,
            status.fork.created_ns,
        )
        for status in statuses(replica)
        if status.process is not None or not status.fork.has_expired(now_ns)
    ]
    return sorted([*pins.held(replica), *of_forks], key=lambda pin: (pin.first_ns, pin.since_ns))


def sweep(replica: Path) -> list[str]:
    """Remove what crashes left and what has expired; names of the latter. Takes ``pins.lock``."""
    return _sweep(replica, pins.lock(replica))


def sweep_if_free(replica: Path) -> list[str]:
    """`sweep`, unless somebody is just making, opening or removing one: then another time."""
    held = pins.lock_if_free(replica)
    return [] if held is None else _sweep(replica, held)


def _sweep(replica: Path, held: ExclusiveLock) -> list[str]:
    """Rule 2; lets go of the lock."""
    expired = []
    with held:
        for directory in _directories(replica):
            if directory.name.startswith(_NEW):
                _set_aside(directory)
            elif not directory.name.startswith(_GONE) and _holder(directory) is None:
                with contextlib.suppress(DamageError, FileNotFoundError):
                    fork = load(directory)
                    if not fork.name or fork.has_expired(time.time_ns()):
                        _set_aside(directory)
                        expired += [fork.name] if fork.name else []
    for directory in _directories(replica):
        if directory.name.startswith(_GONE):
            shutil.rmtree(directory, ignore_errors=True)
    return expired


def _directories(replica: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in (replica / DIRECTORY_NAME).iterdir() if path.is_dir())
    except FileNotFoundError:
        return


def _find(replica: Path, group: str, name: str) -> Path:
    directory = replica / DIRECTORY_NAME / check_name(name, "fork")
    if not directory.is_dir():
        names = ", ".join(s.fork.name for s in statuses(replica) if s.fork.name) or "none"
        raise StateError(
            f"group {group} has no fork {name!r}", hint=f"forks there: {names}", code="no-fork"
        )
    return directory


def _lock(directory: Path, group: str, name: str) -> ExclusiveLock:
    try:
        return exclusive_lock(directory / LOCK_NAME, f"fork {name} of {group}")
    except StateError as error:
        hint = "unmount it, or end what serves it, first; or make another fork"
        raise StateError(str(error), hint=hint, code=error.code) from None


def _holder(directory: Path) -> int | None:
    """The process that has a fork open; 0 when it does not say."""
    path = directory / LOCK_NAME
    try:
        if not is_locked(path):
            return None
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdecimal() else 0


def is_in_use(directory: Path) -> bool:
    """Whether a process has the fork of a directory open."""
    return _holder(directory) is not None


def _set_aside(directory: Path) -> Path:
    """From now on it is no fork; where its files are, to be removed."""
    gone = directory.with_name(f"{_GONE}{secrets.token_hex(6)}")
    directory.rename(gone)
    return gone
