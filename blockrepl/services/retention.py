"""Retention at the receiver: a pass over every group now and then.

A pass, in this order (storage/retained.py says why a crash in between does no harm), under a lock
that a worker left behind by a killed receiver still holds:

1. with the lock of the pins held, for a moment: what can be reached from now on is decided
   (model/retention_plan.py) and catalogued. Pinned are what mounts, servers and forks use, and the
   checkpoints that are kept. While another has that lock, this is left to the next pass: commits
   would wait with us
2. a fold that is due is done, as far as the journal can be read
3. segments that lie within what was thinned are written anew, a batch at a time

2 and 3 happen in a process of their own, at `RATE`; what they made is catalogued between two
commits. The files that are left over are removed beside commits, which would wait for the disk. A
batch that cannot be read is left alone until the receiver is restarted.

Age is measured from the group's newest instant, not from our clock: a group whose source is away
keeps all of its history for as long as that lasts.

Nothing that is promised or pinned goes to make room. When limits of room ask for more than that,
the pass says so, in the log and in `status`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass, field
from functools import partial

import trio
from pydantic import ValidationError

from blockrepl.errors import BlockreplError, DamageError, StorageError
from blockrepl.model.retention_plan import Pinned, decide, floor_for_room, next_batch
from blockrepl.services.group_committer import GroupCommitter
from blockrepl.storage import pins, retained
from blockrepl.storage.forks import all_pins
from blockrepl.storage.history import union_of
from blockrepl.storage.home import ExclusiveLock
from blockrepl.storage.replica import Replica
from blockrepl.storage.retained import Policy, fold_due, read_kept, read_policy
from blockrepl.storage.retention_worker import Failure, Order, Outcome
from blockrepl.units import format_instant

logger = logging.getLogger(__name__)

PASS_SECONDS = 30.0
RATE = 100e6  # bytes per second that folding and thinning write


@dataclass(slots=True)
class GroupRetention:
    """What is known of a group's retention. ``problem``: why history cannot be as asked."""

    problem: str = ""
    failed: set[int] = field(default_factory=set)  # segments that cannot be thinned


class Retention:
    def __init__(self, *, rate: float = RATE) -> None:
        self.groups: dict[str, GroupRetention] = {}
        self._rate = rate
        self._lock = trio.Lock()

    async def run_pass(self, committer: GroupCommitter) -> None:
        """Everything that is due in a group. Failures are logged, and shown as its problem."""
        replica = committer.replica
        known = self.groups.setdefault(replica.name, GroupRetention())
        defect: Exception | None = None
        async with self._lock:
            try:
                with await trio.to_thread.run_sync(retained.lock, replica.directory) as lock:
                    problem = await self._run(committer, known, lock)
            except (BlockreplError, OSError) as error:
                problem = str(error)
            except Exception as error:
                problem = f"a defect of ours, {error!r}; it is tried again"
                defect = error
        if problem and problem != known.problem:
            logger.error("group %s: retention: %s", replica.name, problem, exc_info=defect)
        known.problem = problem

    async def _run(
        self, committer: GroupCommitter, known: GroupRetention, lock: ExclusiveLock
    ) -> str:
        """The steps; what could not be done."""
        replica = committer.replica
        decided = await committer.perform(lambda: _decide(replica))
        gone, problem = decided or ([], known.problem)
        for name in gone:
            logger.info("group %s: checkpoint %s was thinned", replica.name, name)
        try:
            await self._fold(committer, lock)
        except (BlockreplError, OSError) as error:  # a damaged block holds up no thinning
            problem = str(error)
        await self._thin(committer, known, lock)
        return problem

    async def _fold(self, committer: GroupCommitter, lock: ExclusiveLock) -> None:
        replica = committer.replica
        floor_ns = await trio.to_thread.run_sync(fold_due, replica.catalog)
        if floor_ns is None:
            return
        outcome = await self._work(
            Order(directory=replica.directory, operation="fold", floor_ns=floor_ns), lock
        )
        folded_ns = floor_ns if outcome.failure is None else None  # else it stays due
        await committer.perform(
            lambda: replica.replace_segments(outcome.old, outcome.rows(), folded_ns)
        )
        if outcome.old:
            logger.info(
                "group %s: %d segments up to %s were folded into the base",
                replica.name,
                len(outcome.old),
                format_instant(floor_ns),
            )
        if outcome.failure is not None:
            raise outcome.failure.as_error()

    async def _thin(
        self, committer: GroupCommitter, known: GroupRetention, lock: ExclusiveLock
    ) -> None:
        replica = committer.replica
        while True:
            # Also of what was folded, and of a pass that was broken off.
            await trio.to_thread.run_sync(replica.remove_leftovers)
            rows = await trio.to_thread.run_sync(replica.catalog.segments)
            kept = await trio.to_thread.run_sync(read_kept, replica.catalog)
            numbers, step_ns = next_batch(rows, kept, frozenset(known.failed))
            if not numbers:
                return
            order = Order(
                directory=replica.directory, operation="thin", numbers=numbers, step_ns=step_ns
            )
            try:
                outcome = await self._work(order, lock)
            except DamageError as error:
                known.failed.update(numbers)
                logger.error("group %s: not thinned: %s", replica.name, error)
                continue
            await committer.perform(partial(replica.replace_segments, outcome.old, outcome.rows()))

    async def _work(self, order: Order, lock: ExclusiveLock) -> Outcome:
        """Have an order carried out, under the lock. DamageError, StorageError."""
        order = order.model_copy(update={"bytes_per_second": self._rate})
        done = await trio.run_process(
            [sys.executable, "-m", "blockrepl.storage.retention_worker"],
            stdin=order.model_dump_json().encode(),
            capture_stdout=True,
            check=False,
            pass_fds=(lock.fileno(),),
        )
        try:
            if done.returncode == 0:
                return Outcome.model_validate_json(done.stdout)
            failure = Failure.model_validate_json(done.stdout)
        except ValidationError:  # it was killed, or failed inside: its traceback is in our log
            raise StorageError(
                f"{order.operation} ended with {done.returncode}",
                hint="see the receiver's log; it is tried again",
            ) from None
        raise failure.as_error()


def _decide(replica: Replica) -> tuple[list[str], str] | None:
    """Step 1, in the committer's turn: checkpoints that are gone, and what could not be done.

    None when the lock of the pins is not free.
    """
    catalog = replica.catalog
    status = replica.status()
    now_ns = replica.newest_ns()
    if status.floor_ns is None or now_ns <= status.floor_ns:
        return [], ""
    policy = read_policy(catalog)
    room_ns, problem = _room(replica, policy, now_ns)
    held = pins.lock_if_free(replica.directory)
    if held is None:
        return None
    with held:
        found = [
            Pinned(pin.first_ns, pin.last_ns) for pin in all_pins(replica.directory, time.time_ns())
        ]
        found += [Pinned(one.at_ns, one.at_ns) for one in catalog.checkpoints() if one.kept]
        kept = read_kept(catalog)
        decision = decide(policy.rungs(), now_ns, kept, found, status.floor_ns, room_ns)
        # The newest first: what is kept before one may lie in an earlier one.
        for gap in reversed(union_of(status.gaps, catalog.disks(removed=True))):
            if gap.from_ns <= decision.floor_ns and (gap.to_ns or now_ns + 1) > decision.floor_ns:
                # The floor must be a point: it waits for the end of the gap.
                found.append(Pinned(gap.from_ns - 1, gap.from_ns - 1))
                decision = decide(policy.rungs(), now_ns, kept, found, status.floor_ns, room_ns)
        gone = replica.shorten(decision)
    if decision.floor_ns < room_ns:
        problem = "what is pinned holds back what should go to make room; see `retention plan`"
    return gone, problem


def _room(replica: Replica, policy: Policy, now_ns: int) -> tuple[int, str]:
    """The floor that the limits of room ask for, and what they ask for in vain."""
    status = replica.status()
    place = os.statvfs(replica.directory)
    free_bytes = place.f_bavail * place.f_frsize
    excess_bytes = max(
        status.journal_bytes - policy.size_bytes if policy.size_bytes else 0,
        policy.free_bytes - free_bytes,
    )
    if excess_bytes <= 0:
        return 0, ""
    promised_from_ns = now_ns - policy.promised_ns()
    rows = replica.catalog.segments()
    floor_ns = floor_for_room(rows, excess_bytes, promised_from_ns)
    freed = sum(row.bytes for row in rows if row.sealed and row.last_stamp <= floor_ns)
    if freed >= excess_bytes:
        return floor_ns, ""
    return floor_ns, (
        "there is less room than the promised history takes; see the limits in `retention show`"
    )
