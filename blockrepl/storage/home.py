"""The home: the one directory that holds what a receiver, a source, or both keep on disk.

=============  =========================================================
path           content
=============  =========================================================
format         ``blockrepl 1`` and a newline: version of all that follows
receiver/      the receiver's certificates, sources and configuration
source/        the agent's key, disks and spools
replicas/G/    the replica of group G
run/           sockets and locks of running services
log/           logs
=============  =========================================================

What guests wrote is in many of these files, so they and their directories are their owner's alone,
whatever the umask: a home may have been a directory of somebody's, and a replica may be moved.

Small files are replaced whole or not at all: a temporary file beside them, fsync, rename, fsync of
the directory. A service that must run once per home holds an advisory lock (flock), which the
kernel drops with the process, so no stale lock can survive a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from blockrepl.errors import StateError, UsageError
from blockrepl.limits import NAME_PATTERN

LOOK_SECONDS = 0.001  # a look at a lock takes less
LOOKS_MAX = 1000  # then it is none
FORMAT = b"blockrepl 1\n"
_NAME = re.compile(NAME_PATTERN)


def check_name(name: str, what: str) -> str:
    """``name`` itself if it may be part of a path. UsageError otherwise."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is no {what}'s name",
            hint="use up to 63 of a-z 0-9 . _ - and begin with a letter or a digit",
        )
    return name


class Home:
    """The places in a home. Make one with `create` or `open`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path | str) -> Home:
        """Open the home, made first where there is none. StateError for another version."""
        home = cls(path)
        try:
            if not home.path.is_dir():
                make_directory(home.path.absolute(), 0o700)
            if not home._format_file.exists():
                write_atomically(home._format_file, FORMAT)
        except OSError as error:
            raise StateError(
                f"cannot make a home at {path}: {error.strerror}",
                hint="choose another directory with --home or BLOCKREPL_HOME",
            ) from error
        return cls.open(path)

    @classmethod
    def open(cls, path: Path | str) -> Home:
        """Open an existing home. StateError when there is none, or of another version."""
        home = cls(path)
        try:
            found = home._format_file.read_bytes()
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise StateError(
                    f"there is no blockrepl home at {path}",
                    hint="run `blockrepl receiver init` or `blockrepl agent join TOKEN`, "
                    "or name the right one with --home",
                    code="no-home",
                ) from error
            raise StateError(f"cannot read the home at {path}: {error.strerror}") from error
        if found != FORMAT:
            version = found[:40].decode("ascii", "replace").strip()
            raise StateError(
                f"the home at {path} is of format {version!r}, this blockrepl knows "
                f"{FORMAT.decode().strip()!r}",
                hint="use the blockrepl version that made it, or another --home",
                code="home-version",
            )
        for directory in (home.run_directory, home.log_directory):
            with contextlib.suppress(PermissionError):
                directory.mkdir(mode=0o700, exist_ok=True)
        return home

    @property
    def _format_file(self) -> Path:
        return self.path / "format"

    @property
    def receiver_directory(self) -> Path:
        return self.path / "receiver"

    @property
    def source_directory(self) -> Path:
        return self.path / "source"

    @property
    def replicas(self) -> Path:
        return self.path / "replicas"

    @property
    def run_directory(self) -> Path:
        return self.path / "run"

    @property
    def log_directory(self) -> Path:
        return self.path / "log"

    @property
    def receiver_socket(self) -> Path:
        """Control API of the running receiver."""
        return self.run_directory / "receiver.sock"

    @property
    def agent_socket(self) -> Path:
        """Control API of the running agent."""
        return self.run_directory / "agent.sock"

    def replica_directory(self, group: str) -> Path:
        """Where the replica of a group is. UsageError when that is no group's name."""
        return self.replicas / check_name(group, "group")

    def groups(self) -> list[str]:
        """Names of the groups that have a replica here."""
        try:
            return sorted(p.name for p in self.replicas.iterdir() if _NAME.fullmatch(p.name))
        except FileNotFoundError:
            return []


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path, mode: int = 0o700, *, durably: bool = True) -> None:
    """Make a directory and its parents."""
    if not path.is_dir():
        make_directory(path.parent, mode, durably=durably)
        path.mkdir(mode=mode, exist_ok=True)
    if durably:
        sync_directory(path.parent)  # also where it is: who made it may not have come so far


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """The operating system's errors inside name the file: those of a write or a sync name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file durably: after a crash it has the old content or the new, never a mix."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with naming(path), open(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


class ExclusiveLock:
    """An flock on a file that names its holder's process, until `close`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def fileno(self) -> int:
        """For a child that shall hold the lock too."""
        assert self._descriptor is not None
        return self._descriptor

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> ExclusiveLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def exclusive_lock(path: Path, what: str = "") -> ExclusiveLock:
    """Lock a file, made where it is missing, without waiting for another to let go of it.

    ``what`` names the thing protected. StateError (code "in-use") when another process has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        is_taken = _lock_unless_held(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    if not is_taken:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise StateError(
            f"{what or path} is in use by process {holder}",
            hint="stop that process first",
            code="in-use",
        )
    with contextlib.suppress(OSError):  # a full file system: the lock holds without the name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return ExclusiveLock(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_unless_held(descriptor: int) -> bool:
    """Lock it; waits only while others look at it: `is_locked` shares the lock for a moment."""
    for _ in range(LOOKS_MAX):
        if _try_lock(descriptor, fcntl.LOCK_EX):
            return True
        is_held = not _try_lock(descriptor, fcntl.LOCK_SH)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        if is_held:
            return False
        time.sleep(LOOK_SECONDS)
    return False


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def exclusive_lock_wait(path: Path) -> ExclusiveLock:
    """Lock a file, made where it is missing; waits. For locks that are held for moments only.

    Who holds the lock may remove its file: those that wait lock the next one, for a lock on a file
    without a name excludes nobody.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return ExclusiveLock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
