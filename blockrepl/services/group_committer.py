"""Group commit: one task per replica turns what has arrived into as few fdatasyncs as possible.

The task takes everything in its queue, in order, lets a worker thread check, write and sync it,
and meanwhile reading from the network goes on: what arrives then is the next commit. Commits begin
at least COMMIT_SECONDS apart, so that a trickle of small frames shares them. Behind one that took
longer there is a pause as long as it: the busier the machine, the more frames share a commit, and
each costs it as much as a frame does.

======================  =======================================================================
what fails              who notices
======================  =======================================================================
a frame is not true     its session ends; the rest of the commit goes on
the commit (no room,    all sessions with frames in it: their group is refused, they attach again
or fail-stop)           and send again
======================  =======================================================================

Attaching, and changes that the control API asks for, are jobs in the same queue: they see all that
was received before them as durable.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import trio

from blockrepl import limits
from blockrepl.errors import BlockreplError, PeerError, StorageError
from blockrepl.formats.frame import FrameHeader
from blockrepl.storage.replica import Commit, Replica

logger = logging.getLogger(__name__)

RATE_SECONDS = 5.0  # throughput is averaged over it
GATHER_SECONDS = 0.02  # the pause behind a long commit, at most
Result = TypeVar("Result")


class FrameSource(Protocol):
    """What a committer needs of a session."""

    source: bytes

    def is_current(self, group: str, generation: int) -> bool: ...

    def committed(
        self, group: str, generation: int, *, frames: int, size_bytes: int, number: int
    ) -> None: ...

    def refused(self, group: str, generation: int, error: BlockreplError) -> None: ...

    def end(self, error: BlockreplError) -> None: ...


@dataclass(frozen=True, slots=True)
class Arrival:
    session: FrameSource
    generation: int
    header: FrameHeader
    frame: memoryview


@dataclass(slots=True)
class _Job:
    call: Callable[[], Any]
    done: trio.Event = field(default_factory=trio.Event)
    result: Any = None
    error: Exception | None = None


@dataclass(slots=True)
class _Batch:
    arrivals: list[Arrival]
    admitted: list[Arrival] = field(default_factory=list)
    faults: dict[FrameSource, PeerError] = field(default_factory=dict)


class MemoryBudget:
    """Bounds the frames of all sessions that wait for a commit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._freed = trio.Event()

    async def take(self, size_bytes: int) -> None:
        """Wait for room. A frame larger than the whole budget waits to be alone."""
        while self._used_bytes and self._used_bytes + size_bytes > self._limit_bytes:
            await self._freed.wait()
        self._used_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self._used_bytes -= size_bytes
        self._freed.set()
        self._freed = trio.Event()


class Throughput:
    """Bytes per second over the last RATE_SECONDS."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, size_bytes: int) -> None:
        self._forget_old()
        self._samples.append((trio.current_time(), size_bytes))

    def per_second(self) -> float:
        self._forget_old()
        return sum(size_bytes for _, size_bytes in self._samples) / RATE_SECONDS

    def _forget_old(self) -> None:
        oldest = trio.current_time() - RATE_SECONDS
        while self._samples and self._samples[0][0] < oldest:
            self._samples.popleft()


class GroupCommitter:
    """Owns an open replica: nothing else may change it while ``run`` runs."""

    def __init__(self, replica: Replica, budget: MemoryBudget) -> None:
        self.replica = replica
        self.throughput = Throughput()
        self._budget = budget
        self._queue: deque[Arrival | _Job] = deque()
        self._work = trio.Event()
        self._submitted = 0  # frames, ever
        self._finished = 0  # of them, committed or refused
        self._progress = trio.Event()

    def submit(self, arrival: Arrival) -> None:
        """Queue a frame whose bytes have been taken from the budget; they are given back."""
        self._queue.append(arrival)
        self._submitted += 1
        self._work.set()

    async def settled(self) -> None:
        """Wait until every frame submitted so far is durable, or refused. No commit ends earlier
        for it, as one would for a job.
        """
        due = self._submitted
        while self._finished < due:
            await self._progress.wait()

    async def perform(self, call: Callable[[], Result]) -> Result:
        """Run a blocking call on the replica, after all that is queued. Raises what it raises."""
        job = _Job(call)
        self._queue.append(job)
        self._work.set()
        await job.done.wait()
        if job.error is not None:
            raise job.error
        return cast(Result, job.result)

    async def run(self) -> None:
        """Until cancelled; a commit that has begun is finished."""
        earliest = trio.current_time()
        while True:
            if not self._queue:
                self._work = trio.Event()
                await self._work.wait()
            if trio.current_time() < earliest:
                await trio.sleep_until(earliest)
            started = trio.current_time()
            first = self._queue[0]
            if isinstance(first, _Job):
                self._queue.popleft()
                await self._run(first)
            else:
                await self._commit(self._take_arrivals())
            ended = trio.current_time()
            gathering = min(ended - started, GATHER_SECONDS)
            earliest = max(started + limits.COMMIT_SECONDS, ended + gathering)

    async def _run(self, job: _Job) -> None:
        try:
            job.result = await trio.to_thread.run_sync(job.call)
        except Exception as error:  # it is the asker's
            job.error = error
        job.done.set()

    def _take_arrivals(self) -> list[Arrival]:
        arrivals = []
        while self._queue and isinstance(self._queue[0], Arrival):
            arrivals.append(cast(Arrival, self._queue.popleft()))
        return arrivals

    async def _commit(self, arrivals: list[Arrival]) -> None:
        name = self.replica.name
        # Frames of a session that was told to send again are not looked at.
        batch = _Batch([a for a in arrivals if a.session.is_current(name, a.generation)])
        try:
            commit = await trio.to_thread.run_sync(self._store, batch)
        except BlockreplError as error:
            logger.error("group %s: nothing was acknowledged: %s", name, error)
            self._refuse(batch, error)
        except Exception:
            logger.exception("group %s: a defect of ours; the group is stopped", name)
            self.replica.error = StorageError(
                "an internal failure stopped this group",
                hint="look at the receiver's log, then restart the receiver",
                code="fail-stop",
            )
            self._refuse(batch, self.replica.error)
        else:
            self._acknowledge(batch, commit)
        finally:
            self._finished += len(arrivals)
            self._progress.set()
            self._progress = trio.Event()
            self._budget.give_back(sum(a.frame.nbytes for a in arrivals))

    def _store(self, batch: _Batch) -> Commit:
        """In a worker thread: check, stage and commit a batch."""
        for arrival in batch.arrivals:
            session = arrival.session
            if session in batch.faults:
                continue
            try:
                self.replica.append(session.source, arrival.header, arrival.frame)
            except PeerError as error:
                batch.faults[session] = error
            else:
                batch.admitted.append(arrival)
        return self.replica.commit()

    def _refuse(self, batch: _Batch, error: BlockreplError) -> None:
        for arrival in batch.arrivals:
            arrival.session.refused(self.replica.name, arrival.generation, error)

    def _acknowledge(self, batch: _Batch, commit: Commit) -> None:
        totals: dict[tuple[FrameSource, int], tuple[int, int]] = {}
        for arrival in batch.admitted:
            frames, size_bytes = totals.get((arrival.session, arrival.generation), (0, 0))
            totals[arrival.session, arrival.generation] = (
                frames + 1,
                size_bytes + arrival.frame.nbytes,
            )
        for (session, generation), (frames, size_bytes) in totals.items():
            session.committed(
                self.replica.name,
                generation,
                frames=frames,
                size_bytes=size_bytes,
                number=commit.numbers[session.source],
            )
            self.throughput.add(size_bytes)
        for session, error in batch.faults.items():
            session.end(error)
