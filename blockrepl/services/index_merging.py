"""Merging indexes in the background of the receiver: never in the way of what comes in.

One thread for all groups. It works for at most MERGE_SHARE of the time, in pieces of some
milliseconds: a merge of ten million records takes about 3 s of a core in all, per level. A merge
that finds no room, or cannot be written, is tried again later: lookups use smaller runs meanwhile.
So is one that met a defect of ours, LOOK_ANYWAY_SECONDS later.
When all is merged, what statistics are missing is made (storage/statistics.py): some 50 ms each.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from blockrepl.errors import BlockreplError
from blockrepl.services.group_committer import GroupCommitter
from blockrepl.storage.merging import Merger
from blockrepl.storage.replica import Replica
from blockrepl.storage.segment_reader import Known
from blockrepl.storage.statistics import StatisticsMaker

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0  # between looks at whether a segment was sealed
LOOK_ANYWAY_SECONDS = 60.0  # a run may have been deleted, or found damaged
MERGE_SHARE = 0.15  # of the time, at most: it keeps up with 100,000 records a second


@dataclass(slots=True)
class _Group:
    merger: Merger
    statistics: StatisticsMaker
    seen: object = None  # the sealed segments when all was merged
    seen_at: float = 0.0
    told: str = ""
    not_before: float = 0.0


class IndexMerging:
    """``committers`` are the groups in use; it may change while ``run`` runs."""

    def __init__(self, committers: Mapping[str, GroupCommitter]) -> None:
        self._committers = committers
        self._groups: dict[str, _Group] = {}

    async def run(self) -> None:
        """Until cancelled; then the merge at work is given up."""
        while True:
            for name, committer in list(self._committers.items()):
                await trio.to_thread.run_sync(self._look, name, committer.replica)
            await trio.sleep(LOOK_SECONDS)

    def _look(self, name: str, replica: Replica) -> None:
        group = self._groups.get(name)
        if group is None:
            of = replica.directory, replica.group_id
            group = self._groups[name] = _Group(Merger(*of), StatisticsMaker(*of))
        now = trio.from_thread.run_sync(trio.current_time)
        try:
            if now < group.not_before:
                return
            state = replica.catalog.sealed_state()
            if state == group.seen and now < group.seen_at + LOOK_ANYWAY_SECONDS:
                return
            while group.merger.step(
                {row.number: Known.of(row) for row in replica.catalog.segments()}, _pause
            ):
                _pause(0.0)
            group.statistics.make(replica.catalog.segments(), _pause)
            group.seen, group.seen_at, group.told = state, now, ""
        except BlockreplError as error:
            if str(error) != group.told:
                logger.warning("group %s: its index is not merged: %s", name, error)
                group.told = str(error)
        except Exception as error:
            group.not_before = now + LOOK_ANYWAY_SECONDS
            if repr(error) != group.told:
                logger.exception("group %s: its index is not merged: a defect of ours", name)
                group.told = repr(error)


def _pause(worked_seconds: float) -> None:
    """Sleep in proportion; raises when the task has been cancelled."""
    trio.from_thread.run(trio.sleep, worked_seconds * (1 / MERGE_SHARE - 1))
