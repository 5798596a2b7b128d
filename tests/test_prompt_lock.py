"""The lock of what every frame passes: no turn of the scheduler where it is free, else in order."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from blockrepl.channel.prompt_lock import PromptLock


async def test_a_free_lock_is_taken_without_a_turn_of_the_scheduler() -> None:
    lock = PromptLock()
    others: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.checkpoint)
        nursery.start_soon(_append, others)
        for _ in range(3):
            async with lock:
                pass
        assert others == []
    assert others == [1]


async def _append(to: list[int]) -> None:
    to.append(1)


async def test_it_goes_to_whoever_waits_longest_though_its_holder_asks_again_at_once() -> None:
    lock, order = PromptLock(), []

    async def wait(number: int) -> None:
        async with lock:
            order.append(number)

    async with trio.open_nursery() as nursery:
        async with lock:
            for number in (1, 2):
                nursery.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
        async with lock:
            order.append(3)
    assert order == [1, 2, 3]


async def test_a_cancelled_task_does_not_get_it() -> None:
    lock = PromptLock()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with lock:
            pytest.fail("the task went on")
    assert scope.cancelled_caught
    with trio.fail_after(5):
        async with lock:  # nor keep it
            pass
