"""The product as its user runs it: real processes of the ``blockrepl`` command, on loopback.

=========  ======================================================================================
process    started by
=========  ======================================================================================
receiver   ``receiver init``, ``receiver run``; its home is the replica side's
agent      ``agent join`` with a token of ``receiver invite``, ``agent run``
server     ``disk add``, ``disk serve``: the NBD server the guest writes to
=========  ======================================================================================

States are asked of the receiver's control API (``/status`` on its Unix socket): a command for each
sample would take more of the processor than what is measured.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from scripts.benchmark.processes import MeasurementError, Scratch, Service, free_port, wait_until

COMMAND = Path(sys.executable).with_name("blockrepl")
GROUP = "bench"
DISK = "disk0"
DEFAULT_RING = "64M"
STATUS_PATH = f"/status?group={GROUP}"
CAUGHT_UP_SECONDS = 300.0  # the first sync, and a resync after a gap, of a 1 GiB disk


class Status(BaseModel):
    """What ``status --json`` says of a group, as far as it is needed here."""

    name: str
    state: str
    lag_seconds: float | None
    latest_ns: int | None
    gaps: list[dict[str, object]]


class _UnixConnection(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass
class Ours:
    """Receiver, agent and NBD server of one protected disk."""

    scratch: Scratch
    image: Path
    receiver_home: Path
    source_home: Path
    receiver: Service
    server: Service
    agent: Service | None
    uri: str

    def services(self) -> dict[str, Service]:
        found = {"server": self.server, "receiver": self.receiver}
        if self.agent is not None:
            found["agent"] = self.agent
        return found

    def blockrepl(self, home: Path, *words: str | Path) -> str:
        return self.scratch.run([COMMAND, "--home", home, *words])

    def control(self) -> AbstractContextManager[_UnixConnection]:
        """A connection to the receiver's control API, kept for many questions."""
        return _connection(self.receiver_home / "run" / "receiver.sock")

    def status(self) -> Status:
        """The group as the receiver's ``status`` shows it."""
        with self.control() as connection:
            return ask_status(connection)

    def gaps(self) -> int:
        """How many gaps the group's history has."""
        return len(self.status().gaps)

    def settle(self) -> None:
        """Wait until the receiver has all that was written until now, and no resync runs."""
        if self.agent is not None:
            wait_until(
                lambda: self.status().state == "replicating",
                "the group is replicating",
                CAUGHT_UP_SECONDS,
            )
            self.wait_durable(time.time_ns())

    def wait_durable(self, stamp_ns: int) -> float:
        """Wait until everything up to ``stamp_ns`` is durable there; when that was, wall clock."""
        with self.control() as connection:

            def durable() -> bool:
                return (ask_status(connection).latest_ns or 0) >= stamp_ns

            wait_until(durable, "the receiver made all writes durable", CAUGHT_UP_SECONDS)
        return time.time()

    def wait_written(self) -> float:
        """Wait until all that was written before is durable there; when it was, wall clock.

        Sharper than `wait_durable`, since the watermark of an idle group moves once a second: a
        checkpoint is sent at once, behind all records before it.
        """
        name = f"barrier-{time.time_ns()}"
        with _connection(self.source_home / "run" / "agent.sock") as connection:
            _ask(connection, "POST", f"/checkpoints/{GROUP}", json.dumps({"name": name}))
        return time.time()

    def stop_agent(self) -> None:
        if self.agent is not None:
            self.scratch.stop(self.agent)
            self.agent = None

    def start_agent(self) -> None:
        command: list[str | Path] = [COMMAND, "--home", self.source_home, "agent", "run"]
        self.agent = self.scratch.start("agent", command)

    def segments(self) -> list[Path]:
        """The journal's files, oldest first."""
        return sorted((self.receiver_home / "replicas" / GROUP / "segments").glob("*.seg"))

    def merged_runs(self) -> list[Path]:
        return sorted((self.receiver_home / "replicas" / GROUP / "index").glob("*.run"))

    def journal_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.segments())


@contextmanager
def _connection(path: Path) -> Iterator[_UnixConnection]:
    connection = _UnixConnection(path)
    try:
        yield connection
    finally:
        connection.close()


def _ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: str | None = None
) -> bytes:
    """The body of an answer that is not a refusal. MeasurementError."""
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        answer = response.read()
    except http.client.HTTPException as error:
        raise MeasurementError(f"{path}: {error!r}") from error
    if response.status != 200:
        raise MeasurementError(f"{path}: {response.status} {answer[:200]!r}")
    return answer


class _Answer(BaseModel):
    groups: list[Status]


def ask_status(connection: http.client.HTTPConnection) -> Status:
    """One question on a connection that stays open."""
    body = _ask(connection, "GET", STATUS_PATH)
    try:
        answer = _Answer.model_validate_json(body)
    except ValidationError as error:
        raise MeasurementError(f"the receiver's status has another form: {error}") from error
    for group in answer.groups:
        if group.name == GROUP:
            return group
    raise MeasurementError(f"the receiver does not know the group {GROUP} yet")


@contextmanager
def ours(
    scratch: Scratch, image: Path, *, ring: str = DEFAULT_RING, place: str = ""
) -> Iterator[Ours]:
    """Start receiver, agent and server for ``image``; yields when the first sync is done.

    ``place`` tells several stacks in one scratch directory apart.
    """
    receiver_home = scratch.directory / f"receiver{place}"
    source_home = scratch.directory / f"source{place}"

    def command(home: Path, *words: str | Path) -> list[str | Path]:
        return [COMMAND, "--home", home, *words]

    if not COMMAND.exists():
        raise MeasurementError(f"{COMMAND.name} is not installed: run make setup")
    scratch.run(command(receiver_home, "receiver", "init", "--name", "bench"))
    started: list[Service] = []

    def start(name: str, home: Path, *words: str) -> Service:
        service = scratch.start(name, command(home, *words))
        started.append(service)
        return service

    stack: Ours | None = None
    try:
        listen = f"127.0.0.1:{free_port()}"
        receiver = start("receiver", receiver_home, "receiver", "run", "--listen", listen)
        receiver.wait_ready(lambda: receiver.log.stat().st_size > 0)  # its one line when ready
        token = scratch.run(command(receiver_home, "receiver", "invite")).strip()
        scratch.run(command(source_home, "agent", "join", token))
        add = ("disk", "add", DISK, image, "--group", GROUP, "--ring", ring)
        scratch.run(command(source_home, *add))
        server = start("server", source_home, "disk", "serve", DISK)
        uri = scratch.run(command(source_home, "disk", "show", DISK, "--uri")).strip()
        server.wait_ready(lambda: _answers(uri))
        stack = Ours(scratch, image, receiver_home, source_home, receiver, server, None, uri)
        stack.start_agent()
        _first_sync(stack)
        yield stack
    finally:
        if stack is not None:
            stack.stop_agent()
        for service in reversed(started):
            scratch.stop(service)
        with suppress(MeasurementError):  # it was never added
            # Its ring is in shared memory, outside the scratch directory.
            scratch.run(command(source_home, "disk", "remove", DISK))


def _answers(uri: str) -> bool:
    """Whether an NBD server is there; waits for no longer than the question takes."""
    asked = subprocess.run(["nbdinfo", "--size", uri], check=False, capture_output=True)
    return asked.returncode == 0


def _first_sync(stack: Ours) -> None:
    """Wait for the group to appear at the receiver and for its first sync to end."""

    def known() -> bool:
        try:
            stack.status()
        except (MeasurementError, OSError):
            return False
        return True

    wait_until(known, "the receiver knows the group")
    stack.settle()
