"""Bisect: a command is run against forks of points in between, until one single write is left.

Each probe, in this order:

1. a fork of the instant, without a name, mounted in this process on a directory of its own
2. the command, in a process group of its own; its standard output goes to our standard error
3. unmounted, the fork thrown away
4. the result written to ``replicas/<group>/bisect.json``, durably: ``--resume`` goes on from there

============  ===================================================
exit status   means
============  ===================================================
0             good
1 to 124      bad
125           skip: nothing can be said of this instant
others        the command does not work: the search stops there
============  ===================================================

A signal ends the command and undoes the mount before this process ends. What a killed one has left
mounted is unmounted by the group's next.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pyfuse3
import trio
from pydantic import Field, TypeAdapter, ValidationError

from blockrepl.errors import DamageError, StateError, UsageError
from blockrepl.model.bisect import Found, Outcome, Probe, step
from blockrepl.storage import forks, pins
from blockrepl.storage.catalog import DiskRow
from blockrepl.storage.cuts import Cuts, Record
from blockrepl.storage.history import ReplicaHistory, State
from blockrepl.storage.home import Home, exclusive_lock, write_atomically
from blockrepl.units import format_instant
from blockrepl.views import serving
from blockrepl.views.fuse import IMAGE_SUFFIX
from blockrepl.views.fuse_fork import ForkFileSystem
from blockrepl.views.nbd import ending_in_order

FILE_NAME = "bisect.json"
KILL_SECONDS = 5.0  # from SIGTERM to SIGKILL, for a command that is told to end
SKIP_STATUS, BAD_STATUS_MAX = 125, 124
MNT_DETACH = 2


Instant = Annotated[int, Field(ge=0, lt=1 << 63)]
Word = Annotated[str, Field(pattern=r"^[^\x00]*$")]  # as a program's argument


@dataclass
class Search:
    """What bisect.json holds. ``results``: (instant, outcome) in the order of the probes."""

    good_ns: Instant
    bad_ns: Instant
    disks: list[str]
    command: Annotated[list[Word], Field(min_length=1)]
    check_ends: bool = False
    results: list[tuple[Instant, Literal["good", "bad", "skip"]]] = field(default_factory=list)

    def outcomes(self) -> dict[int, Outcome]:
        return {at_ns: Outcome(outcome) for at_ns, outcome in self.results}


@dataclass(frozen=True, slots=True)
class Told:
    """A probe that was made."""

    number: int
    at_ns: int
    outcome: Outcome
    status: int
    seconds: float
    left: int


@dataclass(frozen=True, slots=True)
class Answer:
    """``bad`` are the records that make the difference, ``bad_count`` how many there are of them;
    ``good`` is the last record before."""

    found: Found
    probes: int
    good: list[Record]
    bad: list[Record]
    bad_count: int
    disks: dict[bytes, str]
    is_after_gap: bool

    @property
    def is_exact(self) -> bool:
        return not self.found.skipped and not self.is_after_gap


def load(replica: Path, group: str) -> Search:
    """The search that was begun last. StateError when there is none, DamageError."""
    path = replica / FILE_NAME
    try:
        return TypeAdapter(Search).validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        raise StateError(
            f"there is no bisect of {group} to resume",
            hint=f"begin one: blockrepl bisect {group} --good POINT --bad POINT -- COMMAND",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise DamageError(f"{path} is damaged: {what}", hint="begin the bisect anew") from error


def run(
    home: Path, history: ReplicaHistory, search: Search, tell: Callable[[Told], None]
) -> Answer:
    """Search to the end. StateError when the command does not work or an end is not what it was
    said to be, PointError, DamageError; Interrupted by a signal.
    """
    if shutil.which(search.command[0]) is None:
        raise StateError(
            f"there is no program {search.command[0]} to run",
            hint="give one, and its arguments, after --",
            code="bisect-command",
        )
    with contextlib.ExitStack() as closing:
        closing.enter_context(ending_in_order())
        closing.enter_context(
            exclusive_lock(history.directory / "bisect.lock", f"the bisect of {history.group}")
        )
        state = history.state()
        closing.enter_context(pins.holding(history, search.good_ns, search.bad_ns, "bisect"))
        disks = _disks(history, state, search)
        cuts = Cuts(history, [row.id for row in disks], search.good_ns, search.bad_ns)
        bad_ns = _last_cut(cuts, state, search, disks)
        _write(history.directory, search)
        directory = closing.enter_context(_directory(home, history.group))
        while True:
            results = search.outcomes()
            todo = step(
                search.good_ns, bad_ns, results, cuts.candidates, check_ends=search.check_ends
            )
            if isinstance(todo, Found):
                return _answer(todo, cuts, disks, len(search.results), search)
            began = time.monotonic()
            status = _probe(history, state, todo, [row.name for row in disks], search, directory)
            outcome = _outcome(search.command, status)
            search.results.append((todo.at_ns, outcome.value))
            _write(history.directory, search)
            seconds = time.monotonic() - began
            tell(Told(len(search.results), todo.at_ns, outcome, status, seconds, todo.left))


def _disks(history: ReplicaHistory, state: State, search: Search) -> list[DiskRow]:
    """The disks that are looked at: those of both ends, or the chosen ones of them."""
    at_end = {row.name: row for row in state.disks_at(search.bad_ns)}
    both = {row.name for row in state.disks_at(search.good_ns)} & at_end.keys()
    for name in search.disks:
        if name not in both:
            raise StateError(
                f"group {history.group} has no disk {name} at both points",
                hint=f"disks there: {', '.join(sorted(both)) or 'none'}",
                code="no-disk",
            )
    return [at_end[name] for name in sorted(search.disks or both)]


def _last_cut(cuts: Cuts, state: State, search: Search, disks: list[DiskRow]) -> int:
    """The newest cut. StateError that names the disks looked at, and those that are not."""
    try:
        return cuts.last(search.good_ns, search.bad_ns)
    except StateError as error:
        ends = [state.disks_at(at_ns) for at_ns in (search.good_ns, search.bad_ns)]
        others = sorted({row.name for rows in ends for row in rows} - {row.name for row in disks})
        if not others:
            raise
        raise StateError(
            f"nothing was written between the good point and the bad one to "
            f"{', '.join(row.name for row in disks) or 'a disk that is there at both'}",
            hint=f"not looked at: {', '.join(others)}. only a disk that is there at both can "
            "be; see: blockrepl timeline",
            code=error.code,
        ) from None


def _write(replica: Path, search: Search) -> None:
    write_atomically(replica / FILE_NAME, json.dumps(asdict(search)).encode(), 0o600)


def _outcome(command: Sequence[str], status: int) -> Outcome:
    if status == 0:
        return Outcome.GOOD
    if status == SKIP_STATUS:
        return Outcome.SKIP
    if 0 < status <= BAD_STATUS_MAX:
        return Outcome.BAD
    why = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    raise StateError(
        f"the command {command[0]} {why}, which says neither good nor bad",
        hint="0 is good, 1 to 124 bad, 125 skip; then go on with --resume",
        code="bisect-command",
    )


def _answer(found: Found, cuts: Cuts, disks: list[DiskRow], probes: int, search: Search) -> Answer:
    bad, count = cuts.records(found.good_ns, found.bad_ns)
    good: list[Record] = []
    if found.good_ns > search.good_ns:
        good, _ = cuts.records(found.good_ns - 1, found.good_ns)
    names = {row.id: row.name for row in disks}
    return Answer(found, probes, good, bad, count, names, cuts.is_gap_end(found.bad_ns))


# A probe


class Interrupted(KeyboardInterrupt):
    """A signal came; the command has ended and nothing is mounted."""


@contextlib.contextmanager
def _directory(home: Path, group: str) -> Iterator[Path]:
    """A directory to mount on: the group's own, hence of whoever holds its bisect.lock.

    What a killed bisect has left mounted there is unmounted.
    """
    directory = Home.open(home).run_directory.resolve() / f"bisect-{group}"
    _detach(directory)
    directory.mkdir(mode=0o700, exist_ok=True)
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _detach(directory: Path) -> None:
    if os.geteuid() == 0:
        ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(directory), MNT_DETACH)
    else:
        command = ["fusermount3", "-u", "-z", "--", str(directory)]
        subprocess.run(command, capture_output=True, check=False)


def _probe(
    history: ReplicaHistory,
    state: State,
    probe: Probe,
    names: list[str],
    search: Search,
    directory: Path,
) -> int:
    """The command's exit status, for a fork of an instant."""
    with contextlib.ExitStack() as closing:
        opened = forks.create(history, None, probe.at_ns)
        closing.callback(opened.close)
        overlays = forks.open_overlays(opened.directory, opened.fork)
        for name in overlays.keys() - set(names):
            overlays.pop(name).close()
        files = ForkFileSystem(history, probe.at_ns, state, overlays)
        closing.callback(files.close)
        closing.enter_context(serving.mounted(files, directory, history.group, is_writable=True))
        environment = {**os.environ, **_variables(history.group, probe.at_ns, names, directory)}
        status = trio.run(_answer_and_run, search.command, environment)
    if status is None:
        raise Interrupted
    return status


def _variables(group: str, at_ns: int, names: list[str], directory: Path) -> dict[str, str]:
    images = {name: str(directory / f"{name}{IMAGE_SUFFIX}") for name in names}
    found = {
        f"BLOCKREPL_IMAGE_{re.sub(r'[^A-Z0-9]', '_', name.upper())}": image
        for name, image in images.items()
    }
    if len(found) < len(images):
        raise UsageError(
            "two of the disks would have one variable's name", hint="choose one with --disk"
        )
    if len(images) == 1:
        found["BLOCKREPL_IMAGE"] = next(iter(images.values()))
    return found | {
        "BLOCKREPL_DIR": str(directory),
        "BLOCKREPL_GROUP": group,
        "BLOCKREPL_AT": format_instant(at_ns),
        "BLOCKREPL_AT_NS": str(at_ns),
    }


async def _answer_and_run(command: list[str], environment: dict[str, str]) -> int | None:
    """Answer the kernel while the command runs; its status, None when a signal ended it."""
    status: int | None = None
    async with trio.open_nursery() as answering:
        answering.start_soon(serving.answer)
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        with trio.open_signal_receiver(*numbers) as signals, trio.CancelScope() as running:

            async def end_on_signal() -> None:
                async for _ in signals:
                    running.cancel()

            answering.start_soon(end_on_signal)
            status = await _run(command, environment)
        pyfuse3.terminate()
        answering.cancel_scope.cancel()
    return None if running.cancelled_caught else status


async def _run(command: list[str], environment: dict[str, str]) -> int:
    process = await trio.run_process(
        command,
        stdout=2,
        env=environment,
        check=False,
        start_new_session=True,
        deliver_cancel=_end_group,
    )
    return process.returncode


async def _end_group(process: trio.Process) -> None:
    """End a command with all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with trio.move_on_after(KILL_SECONDS):
            await process.wait()
        os.killpg(process.pid, signal.SIGKILL)
