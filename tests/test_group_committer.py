"""Group commit: how frames gather, and what the bound on their memory holds back."""

from __future__ import annotations

import time
from typing import cast

import pytest
import trio
import trio.testing

from blockrepl import limits
from blockrepl.formats.frame import FrameHeader
from blockrepl.services.group_committer import (
    GATHER_SECONDS,
    Arrival,
    FrameSource,
    GroupCommitter,
    MemoryBudget,
)
from blockrepl.storage.replica import Commit, Replica

PATIENCE_SECONDS = 20


class SlowReplica:
    """In the place of a Replica: each commit takes ``seconds``."""

    name = "web"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.frames = 0
        self.commits: list[tuple[float, float, int]] = []  # begun, ended, frames in it

    def append(self, source: bytes, header: FrameHeader, frame: memoryview) -> None:
        self.frames += 1

    def commit(self) -> Commit:
        begun = time.monotonic()
        time.sleep(self.seconds)
        self.commits.append((begun, time.monotonic(), self.frames))
        self.frames = 0
        return Commit({b"s": 1}, 0)


class Session:
    source = b"s"

    def is_current(self, group: str, generation: int) -> bool:
        return True

    def committed(
        self, group: str, generation: int, *, frames: int, size_bytes: int, number: int
    ) -> None: ...

    def refused(self, group: str, generation: int, error: BaseException) -> None:
        raise error

    def end(self, error: BaseException) -> None:
        raise error


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.05])
async def test_behind_a_long_commit_frames_gather(seconds: float) -> None:
    replica = SlowReplica(seconds)
    budget = MemoryBudget(1 << 20)
    committer = GroupCommitter(cast(Replica, replica), budget)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(committer.run)
        with trio.fail_after(PATIENCE_SECONDS):
            while len(replica.commits) < 6:
                arrival = Arrival(
                    cast(FrameSource, Session()), 1, cast(FrameHeader, None), memoryview(b"f")
                )
                await budget.take(1)
                committer.submit(arrival)
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    for (begun, ended, _), (following, _, _) in zip(
        replica.commits[:-1], replica.commits[1:], strict=True
    ):
        assert following >= begun + limits.COMMIT_SECONDS * 0.9
        assert following >= ended + min(seconds, GATHER_SECONDS) * 0.9


async def test_a_frame_waits_for_room_and_one_larger_than_all_of_it_to_be_alone() -> None:
    budget, taken = MemoryBudget(10), []

    async def take(size_bytes: int) -> None:
        await budget.take(size_bytes)
        taken.append(size_bytes)

    async with trio.open_nursery() as nursery:
        await take(6)
        await take(4)
        for size_bytes in (5, 11):
            nursery.start_soon(take, size_bytes)
        await trio.testing.wait_all_tasks_blocked()
        assert taken == [6, 4]
        budget.give_back(6)
        await trio.testing.wait_all_tasks_blocked()
        assert taken == [6, 4, 5]
        budget.give_back(4)
        await trio.testing.wait_all_tasks_blocked()
        assert taken == [6, 4, 5]
        budget.give_back(5)
        await trio.testing.wait_all_tasks_blocked()
        assert taken == [6, 4, 5, 11]
