"""The simulated machines: time, threads, chance and processes, all decided by one seed.

The product's code runs as it is. What it takes from outside is replaced while a `World` is
installed:

=====================  =========================================================================
what                   by
=====================  =========================================================================
Trio's clock           one that jumps to the next deadline as soon as nothing can run
Trio's scheduler       the order of a batch is drawn from the seed
worker threads         the call itself, at once or after a pause, in the same thread
time (module)          Trio's time, and a step of chance per reading
random, secrets, uuid  the seed
/dev/shm, boot id      a directory of the seed
limits, pauses         smaller ones (scale.py), so that a short history meets them
=====================  =========================================================================

A process is killed at an instant, or at one of its own file operations (`World.crash_in`). From
then on it does nothing: its files and connections are gone (`Killed`), its tasks are cancelled.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import trio
from trio._core import _run as trio_run

from scripts.simulation import scale

EPOCH_NS = 1_790_000_000 * 10**9  # what the simulated wall clocks show at the beginning
STEPS_MAX = 20_000  # of the scheduler, at one instant
Result = TypeVar("Result")


class Killed(BaseException):
    """The process that does this is no more. No Exception: nothing may handle it."""


class Violation(AssertionError):
    """What a checker found."""


class JumpingClock(trio.abc.Clock):
    """Time passes only when nothing can run."""

    def __init__(self) -> None:
        self.now = 0.0
        self._steps = 0  # since time has passed
        self._looks = 0  # in a row at a world in which nothing is due

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        self._steps += 1
        if self._steps > STEPS_MAX:
            raise Violation("busy: something runs on and on, and time does not pass")
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        if deadline == math.inf:
            self._looks += 1  # Trio wakes itself through a socket as it ends
            if self._looks > 1000:
                raise Violation("deadlock: nothing can run and nothing is waited for")
            return 0
        self._looks = self._steps = 0
        self.now = max(self.now, deadline)
        return 0


@dataclass(eq=False)
class Process:
    """A process of a simulated machine; ``on_death`` is called as it dies."""

    name: str
    alive: bool = True
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    on_death: list[Callable[[], None]] = field(default_factory=list)

    def die(self) -> None:
        if self.alive:
            self.alive = False
            self.scope.cancel()
            for call in self.on_death:
                try:
                    call()
                except Exception as error:  # nobody would see it: the process is dead
                    raise Violation(f"{self.name} did not die as it should: {error!r}") from error

    def check(self) -> None:
        if not self.alive:
            raise Killed(self.name)


running: ContextVar[Process | None] = ContextVar("running", default=None)


class _Time:
    """The module `time`, for one machine's product code."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic_ns(self) -> int:
        return self._world.now_ns() - EPOCH_NS

    def time_ns(self) -> int:
        return self._world.now_ns()

    def monotonic(self) -> float:
        # Whoever asks in a loop waits for something that cannot happen meanwhile: time out.
        self._world.steps_ns += 1_000_000
        return self.monotonic_ns() / 1e9


class _Secrets:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def randbits(self, bits: int) -> int:
        return self._chance.getrandbits(bits)

    def token_hex(self, count: int) -> str:
        return self._chance.randbytes(count).hex()


class _Log(logging.Handler):
    """What the product logs: errors of ours are violations, the rest is trace."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        process = running.get()
        if process is not None and not process.alive:
            return
        message = record.getMessage()
        self._world.trace("log", record.levelname.lower(), message)
        if record.exc_info:
            self._world.failures.append(f"logged as a defect: {message}: {record.exc_info[1]!r}")
            self._world.tracebacks.append(record.exc_info)


class World:
    """One simulated run. ``chance`` decides what the world does, other streams what is planned."""

    def __init__(
        self, seed: int, directory: Path, show: Callable[[str], None] | None = None
    ) -> None:
        self.seed = seed
        self.directory = directory
        self._place = f"{directory}/"
        self.chance = random.Random(f"world {seed}")
        self.clock = JumpingClock()
        self.steps_ns = 0
        self.failures: list[str] = []
        self.tracebacks: list[Any] = []
        self.scale: dict[str, object] = {}
        self._show = show
        self._digest = hashlib.blake2b(digest_size=16)
        self._crashes: dict[Process, tuple[int, str, Callable[[], None]]] = {}

    # --- time and trace

    def now_ns(self) -> int:
        self.steps_ns += self.chance.randrange(50, 2000)
        return self.glance_ns()

    def glance_ns(self) -> int:
        """What the wall clocks show; no time passes for the looking."""
        return EPOCH_NS + int(self.clock.now * 1e9) + self.steps_ns

    def trace(self, *parts: object) -> None:
        line = " ".join(map(str, (f"{self.clock.now:9.4f}", *parts)))
        line = line.replace(self._place, "")
        self._digest.update(line.encode() + b"\n")
        if self._show is not None:
            self._show(line)

    def trace_digest(self) -> str:
        return self._digest.hexdigest()

    # --- processes

    async def run(self, process: Process, main: Callable[[], Any]) -> None:
        """A process, to its end. What it raises while it lives is a failure."""
        before = running.set(process)
        try:
            with process.scope:
                await main()
        except BaseException as error:
            if process.alive:
                raise
            _raise_what_is_not_of(error)
        finally:
            self._crashes.pop(process, None)
            process.die()
            running.reset(before)

    def crash_in(
        self, process: Process, operations: int, crash: Callable[[], None], *, only: str = ""
    ) -> None:
        """Call ``crash``, which ends the process, at its n-th file operation from now, of those
        that are called ``only``.
        """
        self._crashes[process] = (operations, only, crash)

    def no_more_crashes(self) -> None:
        self._crashes.clear()

    def operation(self, what: str) -> None:
        """A step that a crash may come before. Raises Killed."""
        process = running.get()
        if process is None:
            return
        process.check()
        if process in self._crashes:
            left, only, crash = self._crashes[process]
            if only not in {"", what}:
                return
            if left > 0:
                self._crashes[process] = (left - 1, only, crash)
                return
            del self._crashes[process]
            self.trace("crash", process.name, "before", what)
            crash()
            raise Killed(process.name)

    async def in_thread(
        self, call: Callable[..., Result], *args: object, **_options: object
    ) -> Any:
        """What `trio.to_thread.run_sync` does, without a thread."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.chance.random() < 0.1:
            await self._pause()
        process = running.get()
        if process is not None:
            process.check()
        result = call(*args)
        if self.chance.random() < 0.1:
            await self._pause()
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
        if process is not None:
            process.check()
        return result

    async def _pause(self) -> None:
        """A worker thread takes its time, and cannot be cancelled."""
        with trio.CancelScope(shield=True):
            await trio.sleep(self.chance.uniform(0, 0.02))

    # --- what is replaced

    @contextmanager
    def installed(self) -> Iterator[None]:
        log = logging.getLogger("blockrepl")
        before = (log.level, log.propagate, log.handlers)
        log.handlers, log.propagate = [_Log(self)], False
        log.setLevel(logging.INFO)
        try:
            with self.replaced(self._replacements()):
                yield
        finally:
            log.setLevel(before[0])
            log.propagate, log.handlers = before[1], before[2]

    @contextmanager
    def replaced(self, replacements: Iterator[tuple[object, str, object]]) -> Iterator[None]:
        """Place, name and value of each; all as before at the end."""
        saved: list[tuple[object, str, object]] = []
        try:
            for place, name, value in replacements:
                saved.append((place, name, getattr(place, name)))
                setattr(place, name, value)
            yield
        finally:
            for place, name, value in reversed(saved):
                setattr(place, name, value)

    def _replacements(self) -> Iterator[tuple[object, str, object]]:
        from scripts.simulation import substitutes

        chance = random.Random(f"secrets {self.seed}")
        yield trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True
        yield trio_run, "_r", random.Random(f"trio {self.seed}")
        yield trio.to_thread, "run_sync", self.in_thread
        yield trio.from_thread, "check_cancelled", lambda: None
        yield from scale.replacements(self.scale)
        yield from substitutes.replacements(
            self,
            time=_Time(self),
            secrets=_Secrets(chance),
            uuid4=lambda: UUID(int=chance.getrandbits(128), version=4),
            chance=chance,
        )


def _raise_what_is_not_of(error: BaseException) -> None:
    """After a death, anything may come out of tasks that were cut off; but no finding."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            _raise_what_is_not_of(inner)
    elif isinstance(error, Violation | KeyboardInterrupt | SystemExit):
        raise error
