"""Child processes that never outlive the benchmark, and the directory that holds all its files.

Each child leads a process group of its own and is told to die with its parent
(``PR_SET_PDEATHSIG``), so that neither Ctrl-C, nor a failure, nor even ``kill -9`` of the benchmark
leaves a server behind. What a child says goes to a log in the scratch directory; when a measurement
fails, the log's last line is the reason shown.

=====================================  ========================================================
the benchmark ends                     what ends the child
=====================================  ========================================================
by Ctrl-C, SIGTERM or an error         whoever has it on record. No such signal is acted upon
                                       between its fork and the record, nor during the clean-up
                                       (`unhurried`)
by kill -9                             the kernel: setpriv has asked for it (between fork and exec
                                       no Python may run, since the benchmark has threads)
by kill -9, before setpriv has asked   the child: its parent is another by then (`bound`)
=====================================  ========================================================

A child that makes processes of its own must keep them in its group: only the group is ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

READY_SECONDS = 30.0  # a server that has not opened its socket by then will not
STOP_SECONDS = 10.0  # from SIGTERM to SIGKILL
POLL_SECONDS = 0.02
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)
EXEC_IF_PARENT_LIVES = '[ "$PPID" = "$0" ] && exec "$@"'


class MeasurementError(Exception):
    """A row could not be measured; one line that says why."""


def bound(command: Sequence[str | Path]) -> list[str]:
    """The command as a child of this process that never outlives it."""
    tied = ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", EXEC_IF_PARENT_LIVES]
    return [*tied, str(os.getpid()), *(str(word) for word in command)]


@contextmanager
def unhurried() -> Iterator[None]:
    """Ctrl-C and SIGTERM are acted upon at the end of the block. Only the main thread has them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: held.append(number))
        for number in INTERRUPTIONS
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for one in held:
            signal.raise_signal(one)


def wait_until(ready: Callable[[], bool], what: str, seconds: float = READY_SECONDS) -> None:
    """Poll ``ready``; MeasurementError with ``what`` when it is still false at the deadline."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise MeasurementError(f"{what}: still not so after {seconds:g} s")
        time.sleep(POLL_SECONDS)


def free_port() -> int:
    """A TCP port nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Service:
    """A running child, its process group and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def wait_ready(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready``, or say why the child ended before it was."""

        def ready_or_dead() -> bool:
            if self.process.poll() is not None:
                raise MeasurementError(
                    f"{self.name} ended with {self.process.returncode}: {self.last_words()}"
                )
            return ready()

        wait_until(ready_or_dead, f"{self.name} ready")

    def stop(self) -> None:
        """End the whole process group: politely, then not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()

    def process_ids(self) -> list[int]:
        """Every process of the group."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue  # it ended meanwhile
                if int(fields[2]) == self.process.pid:
                    found.append(int(entry.name))
        return found


@dataclass
class Scratch:
    """The benchmark's directory and its children; ``scratch()`` ends and removes all of it."""

    directory: Path
    services: list[Service] = field(default_factory=list)
    commands: list[subprocess.Popen[str]] = field(default_factory=list)  # that `run` waits for
    images: int = 0

    def start(self, name: str, command: Sequence[str | Path], **extra: str) -> Service:
        """Start a child; ``extra`` are environment variables."""
        log = self.directory / f"{name}.log"
        with log.open("wb") as output, unhurried():
            process = subprocess.Popen(
                bound(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | extra,
            )
            service = Service(name, process, log)
            self.services.append(service)
        return service

    def stop(self, service: Service) -> None:
        service.stop()
        if service in self.services:
            self.services.remove(service)

    @contextmanager
    def running(self, name: str, command: Sequence[str | Path], *files: Path) -> Iterator[Service]:
        """A child for the length of a block; ``files`` (its sockets) are removed with it."""
        service = self.start(name, command)
        try:
            yield service
        finally:
            self.stop(service)
            for file in files:
                file.unlink(missing_ok=True)

    def run(self, command: Sequence[str | Path], seconds: float = 120.0) -> str:
        """Run a command to its end and return its stdout; MeasurementError when it fails."""
        words = [str(word) for word in command]
        with unhurried():
            process = subprocess.Popen(
                bound(words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                text=True,
            )
            self.commands.append(process)
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise MeasurementError(f"{' '.join(words[:3])} did not end in {seconds:g} s") from None
        finally:
            self._end_command(process)
        if process.returncode != 0:
            why = (errors.strip() or output.strip() or "it said nothing").splitlines()[-1]
            raise MeasurementError(f"{Path(words[0]).name} {' '.join(words[1:3])}: {why}")
        return output

    def _end_command(self, process: subprocess.Popen[str]) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()
        self.commands.remove(process)

    def end_all(self) -> None:
        for process in self.commands.copy():
            self._end_command(process)
        for service in reversed(self.services):
            service.stop()

    def image(self, size_bytes: int) -> Path:
        """A raw image of incompressible bytes, every block written: no holes, all allocated."""
        self.images += 1
        path = self.directory / f"image{self.images}.img"
        block = 1 << 20
        with path.open("wb") as stream:
            for _ in range(size_bytes // block):
                stream.write(os.urandom(block))
            stream.flush()
            os.fdatasync(stream.fileno())
        return path


@contextmanager
def scratch(parent: Path, prefix: str = "bench-") -> Iterator[Scratch]:
    """A fresh directory under ``parent``; on the way out its children end and it is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with unhurried():
            place = Scratch(Path(tempfile.mkdtemp(prefix=prefix, dir=parent)))
            stack.callback(_clean_up, place)
        yield place


def _clean_up(place: Scratch) -> None:
    with unhurried():
        place.end_all()
        shutil.rmtree(place.directory, ignore_errors=True)
