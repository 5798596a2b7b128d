"""The NBD door: nbdkit with the view plugin (plugins/view.py), one export per disk.

serve                                    nbdkit
------------------------------------------------------------------
removes what killed ones have left
opens the replica, pins or opens the fork
starts nbdkit, which inherits        ->  listens in a directory of ours
the fork's lock                          nobody else may enter
gives the socket its mode and name
says what is served                      one process: readers of all disks share its caches
waits for a signal                       ends with its parent, however that ends
ends nbdkit, which flushes the fork  ->  ends with a status that says whether it could
removes the socket, closes the fork
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket as sockets
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from blockrepl.errors import DamageError, StateError, StorageError
from blockrepl.model.points import Resolved
from blockrepl.paths import import_root, plugin_script
from blockrepl.storage import pins
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import Home
from blockrepl.views.forking import Wanted, open_wanted, resolve

SOCKET_PATH_BYTES_MAX = 107  # of the system's address structure
END_SECONDS = 30.0  # nbdkit answers what it has begun, and flushes
_MAKING = ".nbd{}-"  # our process, and eight letters: where nbdkit listens at first
_MADE = re.compile(r"\.nbd(\d+)-.{8}")
ERROR_LINES_MAX = 100  # kept
_TOLD_PREFIX = "blockrepl: "  # of the plugin's own lines; nbdkit's others are tracebacks


@dataclass(frozen=True, slots=True)
class Served:
    """What is said when the door is open. ``disks``: names and sizes."""

    resolved: Resolved
    socket: Path
    disks: list[tuple[str, int]]


class Ended(BaseException):
    """A signal has told this process to end."""


def serve(
    home: Path, group: str, wanted: Wanted, socket: Path | None, ready: Callable[[Served], None]
) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP. StateError, PointError, StorageError."""
    process: subprocess.Popen[bytes] | None = None
    with (
        contextlib.suppress(Ended),
        ending_in_order(Ended),
        contextlib.ExitStack() as closing,
    ):
        replica = closing.enter_context(ReplicaHistory.open(home, group))
        run = Home.open(home).run_directory
        _sweep(run)
        path = _socket_path(socket or run / f"serve-{group}-{os.getpid()}.sock")
        arguments, locks = [f"replica={replica.directory}"], []
        if wanted.is_fork:
            opened, resolved = open_wanted(replica, wanted)
            closing.callback(opened.close)
            arguments.append(f"fork={opened.directory}")
            locks.append(opened.lock.fileno())
        else:
            assert wanted.at is not None
            resolved = resolve(replica, wanted.at)
            what = f"serve {path}"
            closing.enter_context(pins.holding(replica, resolved.at_ns, resolved.at_ns, what))
        arguments.append(f"at_ns={resolved.at_ns}")
        disks = [(row.name, row.size_bytes) for row in replica.state().disks_at(resolved.at_ns)]
        process = closing.enter_context(_on_socket(path, arguments, locks))
        ready(Served(resolved, path, disks))
        raise _ended(process.wait())
    if process is not None and process.returncode:  # told to end, it could not flush the fork
        raise _ended(process.returncode)


def _ended(status: int) -> StorageError:
    return StorageError(f"nbdkit has ended with status {status}", hint="see its last words above")


def _sweep(run: Path) -> None:
    """Remove what killed servers have left in the home: nobody gives their names again."""
    for path in run.iterdir():
        made = _MADE.fullmatch(path.name)
        if made and not Path(f"/proc/{made[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)
        elif path.match("serve-*.sock") and not _is_served(path):
            path.unlink(missing_ok=True)


def _socket_path(wanted: Path) -> Path:
    """Where to listen; what a killed server left there is removed. StateError."""
    path = wanted.absolute()
    making = path.parent / f"{_MAKING.format(os.getpid())}12345678" / "s"
    longest = max((path, making), key=lambda p: len(bytes(p)))
    if len(bytes(longest)) > SOCKET_PATH_BYTES_MAX:
        raise StateError(
            f"the socket's path {path} is too long", hint="give a shorter one with --socket"
        )
    if not path.parent.is_dir():
        raise StateError(
            f"{path.parent} is not a directory", hint=f"make it: mkdir -p {path.parent}"
        )
    if os.path.lexists(path):
        if not path.is_socket() or _is_served(path):
            raise StateError(
                f"{path} is there already", hint="give another one with --socket", code="in-use"
            )
        path.unlink()
    return path


def _is_served(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


@contextmanager
def _on_socket(
    path: Path, arguments: list[str], locks: list[int]
) -> Iterator[subprocess.Popen[bytes]]:
    """nbdkit on a socket that is this user's alone."""
    with contextlib.ExitStack() as closing:
        directory = Path(tempfile.mkdtemp(prefix=_MAKING.format(os.getpid()), dir=path.parent))
        closing.callback(shutil.rmtree, directory, ignore_errors=True)
        errors = closing.enter_context(ErrorLines(lambda line: print(line, file=sys.stderr)))
        made = directory / "s"
        process = closing.enter_context(
            nbdkit(arguments, made, errors, is_writable=bool(locks), inherited=locks)
        )
        made.chmod(0o600)
        closing.callback(path.unlink, missing_ok=True)
        made.rename(path)
        yield process


class ErrorLines:
    """What programs write to their standard error: the plugin's own lines are told as they come,
    the last lines of all are kept, to say why one of them has failed.
    """

    def __init__(self, tell: Callable[[str], None] = lambda _line: None) -> None:
        reader, self.descriptor = os.pipe()
        self._lines: deque[str] = deque(maxlen=ERROR_LINES_MAX)
        self._told = ""
        self._tell = tell
        self._thread = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._thread.start()

    def __enter__(self) -> ErrorLines:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Once the programs have ended."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            self._thread.join(END_SECONDS)

    def _read(self, reader: int) -> None:
        with open(reader, encoding="utf-8", errors="replace") as lines:
            for line in map(str.strip, lines):
                if line.startswith(_TOLD_PREFIX):
                    self._told = self._told or line.removeprefix(_TOLD_PREFIX)
                    self._tell(line)
                if line:
                    self._lines.append(line)

    def failure(
        self, status: int, what: str = "serving the view failed"
    ) -> StorageError | DamageError:
        """Why a program has failed, when all have ended: the view's own words, or the last line."""
        self.close()
        if self._told:
            return DamageError(self._told, hint="an earlier point may be readable")
        last = self._lines[-1] if self._lines else f"status {status}"
        return StorageError(f"{what}: {last}", hint="see: blockrepl doctor")


@contextmanager
def nbdkit(
    arguments: Sequence[str],
    socket: Path,
    errors: ErrorLines,
    *,
    is_writable: bool = False,
    inherited: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """nbdkit with the view plugin, from when it answers on a socket. StateError, StorageError.

    It ends when its parent's end of a pipe is closed, by whatever: nothing is left of a killed one.
    (Told by a signal, nbdkit would wait for its clients to leave.)
    """
    require("nbdkit", "nbdkit nbdkit-plugin-python")
    reader, writer = os.pipe()
    command = [
        *("nbdkit", "--foreground", "--unix", str(socket)),
        *(() if is_writable else ("--readonly",)),
        *("python", str(plugin_script("view")), f"until={reader}", *arguments),
    ]
    with contextlib.ExitStack() as closing, open(writer, "wb") as held:
        try:
            process = closing.enter_context(
                running(command, errors, env=_environment(), inherited=[reader, *inherited])
            )
        finally:
            os.close(reader)
        closing.callback(_end, process, held)
        while not _greets(socket):
            if process.poll() is not None:
                raise errors.failure(process.returncode)
            time.sleep(0.01)
        yield process


def _greets(path: Path) -> bool:
    """Wait for a server's first byte: it listens before the plugin has opened the view. False when
    it does not listen, or ends without.
    """
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as client:
        try:
            client.connect(str(path))
            return bool(client.recv(1))
        except (FileNotFoundError, ConnectionError):
            return False


def _end(process: subprocess.Popen[bytes], held: IO[bytes]) -> None:
    held.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)


def require(program: str, packages: str) -> None:
    """StateError when a program is not installed."""
    if shutil.which(program) is None:
        raise StateError(f"{program} is not installed", hint=f"apt-get install {packages}")


@contextmanager
def running(
    command: list[str],
    errors: ErrorLines,
    *,
    env: dict[str, str] | None = None,
    stdout: int = subprocess.DEVNULL,
    inherited: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A program, in a session of its own so that Ctrl-C is ours to handle; ended in any case."""
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=errors.descriptor,
        start_new_session=True,
        pass_fds=inherited,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    """For the Python that nbdkit embeds, which knows nothing of this environment's packages."""
    paths = [str(import_root()), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    environment.pop("PYTHONHOME", None)
    return environment


@contextmanager
def ending_in_order(error: type[BaseException] = SystemExit) -> Iterator[None]:
    """Signals that end a program unwind it instead of cutting it off.

    SystemExit: with the status that shells report, and Ctrl-C stays what it is.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        raise error(128 + number)

    numbers = [signal.SIGTERM, signal.SIGHUP]
    if error is not SystemExit:
        numbers.append(signal.SIGINT)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
