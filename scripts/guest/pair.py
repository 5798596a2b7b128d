"""A receiver and a source on loopback: the product as its user runs it, command by command.

==================  =============================================================================
what                how it ends
==================  =============================================================================
services            SIGTERM, then SIGKILL, to the process group of each, in reverse order
mounts              those below the pair's directory are undone, lazily if they must be
stray processes     found by PAIR_VARIABLE in their environment: SIGKILL, and named in ``strays``
shared memory       what the source's disks have in /dev/shm goes with the disks
directory           removed
==================  =============================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from scripts.benchmark.processes import Scratch, Service, free_port, scratch, wait_until

COMMAND = Path(sys.executable).with_name("blockrepl")
PAIR_VARIABLE = "BLOCKREPL_PAIR"
SYNC_SECONDS = 120.0
GRACE_SECONDS = 5.0  # a mount's own process ends by itself, a moment after the mount
Json = Any  # what a command prints with --json; its keys are the product's contract


@dataclass
class Pair:
    """Homes, services and mounts of one receiver and one source. Made by `pair`."""

    scratch: Scratch
    tell: Callable[[str], None]  # takes each command as one would type it
    port: int = field(default_factory=free_port)
    services: dict[str, Service] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)  # what had to be killed at the end

    @property
    def directory(self) -> Path:
        return self.scratch.directory

    @property
    def receiver_home(self) -> Path:
        return self.directory / "receiver"

    @property
    def source_home(self) -> Path:
        return self.directory / "source"

    def receiver(self, *words: str | Path, quiet: bool = False) -> str:
        """Run a command on the receiver's side; its standard output."""
        return self._run(self.receiver_home, words, quiet)

    def source(self, *words: str | Path, quiet: bool = False) -> str:
        """Run a command on the source's side; its standard output."""
        return self._run(self.source_home, words, quiet)

    def receiver_json(self, *words: str | Path, quiet: bool = True) -> Json:
        return json.loads(self.receiver(*words, "--json", quiet=quiet))

    def source_json(self, *words: str | Path, quiet: bool = True) -> Json:
        return json.loads(self.source(*words, "--json", quiet=quiet))

    def start_receiver(self) -> None:
        listen = f"127.0.0.1:{self.port}"
        service = self._start("receiver", self.receiver_home, "receiver", "run", "--listen", listen)
        service.wait_ready(lambda: b"ready" in service.log.read_bytes())

    def start_agent(self, *options: str) -> None:
        service = self._start("agent", self.source_home, "agent", "run", *options)
        service.wait_ready(lambda: b"ready" in service.log.read_bytes())

    def start_disk(self, name: str) -> None:
        """Start the disk's NBD server and wait until it serves."""
        service = self._start(f"disk-{name}", self.source_home, "disk", "serve", name)
        service.wait_ready(lambda: b"ready" in service.log.read_bytes())

    def stop(self, name: str) -> None:
        """End a service: receiver, agent or disk-NAME."""
        self.scratch.stop(self.services.pop(name))

    def kill(self, name: str) -> None:
        """kill -9 a service with all its processes."""
        service = self.services.pop(name)
        os.killpg(service.process.pid, signal.SIGKILL)
        self.scratch.stop(service)

    def join(self, address: str | None = None) -> None:
        """Give the source its identity: a token from the receiver, used once.

        ``address``: where the source is to reach the receiver, if not at its own port.
        """
        words = ("--address", address) if address else ()
        token = self.receiver("receiver", "invite", *words).strip()
        self._say(self.source_home, ("agent", "join", "TOKEN"))
        self.source("agent", "join", token, quiet=True)

    def disk(self, name: str) -> Json:
        [disk] = [disk for disk in self.source_json("disk", "list") if disk["name"] == name]
        return disk

    def qemu_options(self, name: str) -> list[str]:
        """What `disk show --qemu` prints, as a shell would read it."""
        printed = self.source("disk", "show", name, "--qemu")
        return shlex.split(printed.replace("\\\n", " "))

    def group(self, name: str) -> Json:
        """The group as the receiver's `status` has it; empty while it does not know it."""
        groups = self.receiver_json("status")["groups"]
        return next((group for group in groups if group["name"] == name), {})

    def scrub_finds(self, group: str) -> Json:
        """What scrubs have found to differ, healed since or not.

        Where nobody flips bytes that must be nothing: a scrub heals what a test was to see.
        """
        return [one for disk in self.receiver_json("verify", group) for one in disk["found"]]

    def wait_replicating(self, group: str, each: Callable[[Json], None] | None = None) -> None:
        """Wait for the first sync (or a resync) to end; ``each`` sees every status on the way."""

        def replicating() -> bool:
            status = self.group(group)
            if each is not None and status:
                each(status)
            return bool(status) and status["state"] == "replicating"

        wait_until(replicating, f"group {group} replicating", SYNC_SECONDS)

    def wait_durable(self, group: str, stamp_ns: int | None = None) -> None:
        """Wait until the receiver has everything up to ``stamp_ns`` (now, if not given)."""
        wanted = time.time_ns() if stamp_ns is None else stamp_ns

        def durable() -> bool:
            return int(self.group(group).get("latest_ns") or 0) >= wanted

        wait_until(durable, f"group {group} durable at the receiver", SYNC_SECONDS)

    @contextmanager
    def mounted(self, group: str, at: str | None = None) -> Iterator[Path]:
        """Mount a group, at a point or as the tree of all points."""
        target = self.directory / f"mount{len(list(self.directory.glob('mount*')))}"
        target.mkdir()
        point = ("--at", at) if at is not None else ()
        self.receiver("mount", group, target, *point)
        try:
            yield target
        finally:
            self.receiver("umount", target, quiet=True)

    def tell_logs(self, tell: Callable[[str], None], lines_max: int = 15) -> None:
        """The last lines of each service's log, for the reader of a failure."""
        for log in sorted(self.directory.glob("*.log")):
            for line in log.read_text(errors="replace").splitlines()[-lines_max:]:
                tell(f"{log.stem}: {line}")

    def _start(self, name: str, home: Path, *words: str) -> Service:
        self._say(home, words, background=True)
        service = self.scratch.start(name, [COMMAND, "--home", home, *words])
        self.services[name] = service
        return service

    def _run(self, home: Path, words: tuple[str | Path, ...], quiet: bool) -> str:
        if not quiet:
            self._say(home, words)
        return self.scratch.run([COMMAND, "--home", home, *words])

    def _say(self, home: Path, words: tuple[str | Path, ...], *, background: bool = False) -> None:
        line = shlex.join(["blockrepl", "--home", str(home), *map(str, words)])
        line = line.replace(f"{self.directory}/", "")
        self.tell(line + (" &" if background else ""))


@contextmanager
def pair(parent: Path, tell: Callable[[str], None] = lambda line: None) -> Iterator[Pair]:
    """A pair in a fresh directory below ``parent``; nothing of it is left afterwards."""
    mark = uuid4().hex
    before = os.environ.get(PAIR_VARIABLE)
    os.environ[PAIR_VARIABLE] = mark
    try:
        with scratch(parent, "blockrepl-") as place:
            made = Pair(place, tell)
            try:
                yield made
            finally:
                _end(made, mark)
    finally:
        os.environ.pop(PAIR_VARIABLE)
        if before is not None:
            os.environ[PAIR_VARIABLE] = before


def _end(made: Pair, mark: str) -> None:
    for target in mounts_below(made.directory):
        _quietly("fusermount3", "-u", "-z", target)
    for name in reversed(list(made.services)):
        made.stop(name)
    with contextlib.suppress(Exception):  # half a pair may have no disks to list
        for disk in made.source_json("disk", "list"):
            made.source("disk", "remove", disk["name"], quiet=True)
    deadline = time.monotonic() + GRACE_SECONDS
    while (found := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in found:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ")
            os.kill(process, signal.SIGKILL)
            made.strays.append(command.decode(errors="replace").strip())


def mounts_below(directory: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    targets = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return [target for target in targets if Path(target).is_relative_to(directory)]


def marked_processes(mark: str) -> list[int]:
    """Processes started under a pair, however far down."""
    wanted = f"{PAIR_VARIABLE}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _quietly(*command: str) -> None:
    with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, timeout=10, check=False)
