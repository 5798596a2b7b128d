"""The groups of a running receiver: open replicas, each with its committer.

A replica that cannot be opened is no reason not to start: its group is reported with the error, its
sources are refused with it, and it is tried again whenever one of them attaches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from blockrepl.channel.certificates import PeerIdentity
from blockrepl.errors import BlockreplError, StateError, StorageError
from blockrepl.formats.comparison import Compare, Verdict
from blockrepl.formats.messages import Request
from blockrepl.limits import FORK_SWEEP_SECONDS
from blockrepl.model.points import Instant, Point
from blockrepl.services.comparison import PROOF_SECONDS, Comparisons
from blockrepl.services.group_committer import GroupCommitter, MemoryBudget
from blockrepl.services.receiver_api import Checkpoint, NewCheckpoint
from blockrepl.storage import forks
from blockrepl.storage.catalog import CheckpointRow, no_checkpoint
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import Home
from blockrepl.storage.replica import Replica, create_replica, open_replica
from blockrepl.storage.seed import place_seed, seed_path
from blockrepl.storage.trust import TrustStore
from blockrepl.units import format_instant

logger = logging.getLogger(__name__)


class ReceiverGroups:
    """``committers`` are the groups in use, ``failures`` those that could not be opened."""

    def __init__(
        self, home: Home, trust: TrustStore, nursery: trio.Nursery, budget: MemoryBudget
    ) -> None:
        self.budget = budget
        self.committers: dict[str, GroupCommitter] = {}
        self.failures: dict[str, BlockreplError] = {}
        self.answer_with: Callable[[GroupCommitter, bytes, Request], Awaitable[Any]]
        self._home = home
        self._trust = trust
        self._nursery = nursery
        self._opening = trio.Lock()
        self.comparisons = Comparisons()

    async def open_all(self) -> None:
        """Open what is in the home; failures are kept and logged."""
        for name in self._home.groups():
            try:
                await self._open(name)
            except BlockreplError as error:
                logger.error("group %s cannot be used: %s", name, error)

    async def close_all(self) -> None:
        self.comparisons.close()
        for committer in self.committers.values():
            await trio.to_thread.run_sync(committer.replica.close)

    async def attach(self, identity: PeerIdentity, group: str) -> GroupCommitter:
        """A group for a source that owns it, made if there is none. BlockreplError."""
        await trio.to_thread.run_sync(self._trust.claim_group, identity.source_id, group)
        return await self._open(group)

    async def answer(self, committer: GroupCommitter, source: bytes, request: Request) -> Any:
        return await self.answer_with(committer, source, request)

    async def compare(self, committer: GroupCommitter, source: bytes, compare: Compare) -> Verdict:
        return await self.comparisons.compare(committer, source, compare)

    async def write_proofs(self) -> None:
        """Write what has been proven, every few seconds, beside commits; until cancelled."""
        while True:
            await trio.sleep(PROOF_SECONDS)
            for committer in list(self.committers.values()):
                replica = committer.replica
                try:
                    await trio.to_thread.run_sync(replica.proofs.write)
                except StorageError as error:
                    logger.warning("group %s: proofs are not written: %s", replica.name, error)

    async def sweep_forks(self) -> None:
        """Remove forks that have expired and what crashes left of others; until cancelled."""
        while True:
            for committer in list(self.committers.values()):
                replica = committer.replica
                try:
                    names = await trio.to_thread.run_sync(forks.sweep_if_free, replica.directory)
                except OSError as error:
                    logger.warning("group %s: forks are not swept: %s", replica.name, error)
                else:
                    for name in names:
                        logger.info("group %s: fork %s has expired", replica.name, name)
            await trio.sleep(FORK_SWEEP_SECONDS)

    def find(self, group: str) -> GroupCommitter:
        """A group in use. StateError."""
        if group in self.failures:
            raise self.failures[group]
        if group not in self.committers:
            others = ", ".join(sorted(self.committers)) or "none"
            raise StateError(
                f"there is no group {group!r} at this receiver",
                hint=f"groups here: {others}",
                code="no-group",
            )
        return self.committers[group]

    async def _open(self, name: str) -> GroupCommitter:
        if name in self.committers:  # without the lock: another group's recovery may hold it
            return self.committers[name]
        async with self._opening:
            if name in self.committers:
                return self.committers[name]
            try:
                replica = await trio.to_thread.run_sync(self._open_replica, name)
            except BlockreplError as error:
                self.failures[name] = error
                raise
            self.failures.pop(name, None)
            committer = GroupCommitter(replica, self.budget)
            self.committers[name] = committer
            self._nursery.start_soon(committer.run)
            return committer

    def _open_replica(self, name: str) -> Replica:
        directory = self._home.replica_directory(name)
        create_replica(directory, name)
        return open_replica(directory)

    async def place_seed(self, group: str, disk: str) -> None:
        """Make the copy that waits the base of a disk to come. StateError."""
        committer = await self._open(group)
        replica, seed = committer.replica, seed_path(self._home, group, disk)
        await committer.perform(lambda: place_seed(replica.directory, replica.catalog, seed, disk))

    # Checkpoints

    async def checkpoints(
        self, committer: GroupCommitter, name: str | None = None
    ) -> list[Checkpoint]:
        """All, by instant, or the one of a name, if there is one."""
        catalog = committer.replica.catalog
        if name is None:
            rows = await trio.to_thread.run_sync(catalog.checkpoints)
        else:
            row = await trio.to_thread.run_sync(catalog.checkpoint, name)
            rows = [row] if row else []
        return [Checkpoint.of(row) for row in rows]

    async def create_checkpoint(
        self, committer: GroupCommitter, wanted: NewCheckpoint
    ) -> Checkpoint:
        """Name an instant that can be reached. StateError when the name is taken, PointError."""
        row = await committer.perform(lambda: self._create(committer.replica, wanted))
        return Checkpoint.of(row)

    def _create(self, replica: Replica, wanted: NewCheckpoint) -> CheckpointRow:
        at_ns = replica.status().watermark if wanted.at_ns is None else wanted.at_ns
        with ReplicaHistory(replica.directory) as history:
            history.resolve(Point(format_instant(at_ns), Instant(at_ns)), time.time_ns())
        row = CheckpointRow(wanted.name, at_ns, "crash", wanted.keep)
        if not replica.catalog.add_checkpoint(row):
            raise StateError(
                f"checkpoint {wanted.name!r} exists already",
                hint="choose another name, or remove that one first",
                code="taken",
            )
        return row

    async def remove_checkpoint(
        self, committer: GroupCommitter, name: str, *, kept_too: bool
    ) -> Checkpoint:
        """Forget a name. StateError when there is none, or it is kept and may not go."""
        row = await committer.perform(lambda: self._remove(committer.replica, name, kept_too))
        return Checkpoint.of(row)

    async def keep_checkpoint(self, committer: GroupCommitter, name: str, kept: bool) -> Checkpoint:
        """Let retention never thin it out, or again. StateError when there is none."""
        catalog = committer.replica.catalog
        row = await committer.perform(lambda: catalog.keep_checkpoint(name, kept))
        if row is None:
            raise no_checkpoint(committer.replica.name, name)
        return Checkpoint.of(row)

    def _remove(self, replica: Replica, name: str, kept_too: bool) -> CheckpointRow:
        row = replica.catalog.checkpoint(name)
        if row is None:
            raise no_checkpoint(replica.name, name)
        if row.kept and not kept_too:
            raise StateError(
                f"checkpoint {name!r} is kept",
                hint="remove it on the receiver's host",
                code="kept",
            )
        replica.catalog.remove_checkpoint(name)
        return row
