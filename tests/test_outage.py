"""Outages with real services: within the spool they cost no point of history, beyond it a gap."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from outage import BLOCK, GROUP, Stage
from serving import place, wait_for

from blockrepl.units import MIB
from scripts.guest.pair import Pair

__all__ = ["place"]
RING_BYTES = 16 * MIB
MakeStage = Callable[..., Stage]


@pytest.fixture
def stage(place: Pair) -> Iterator[MakeStage]:
    made: list[Stage] = []

    def make(**options: object) -> Stage:
        made.append(Stage(place, **options))  # type: ignore[arg-type]
        return made[0]

    yield make
    for one in made:
        one.close()


@pytest.mark.timeout(240)
def test_an_outage_within_the_spool_costs_no_point_of_history(stage: MakeStage) -> None:
    # Guards ``kept`` in Outbox._is_kept (the ring fills up: a gap), the reading of state.json in
    # Spool.open, and the loop of Outbox._catch_up.
    it = stage()
    it.sample()
    it.place.kill("receiver")
    for step in range(12):
        for _ in range(8):
            it.wait_ring()
            it.write_some(8)
        it.sample()
        if step == 5:
            it.place.kill("agent")
            it.start_agent("--limit", "0:00-24:00=8M/s")
    assert it.reader.head() * BLOCK > 3 * RING_BYTES
    waiting = it.source_group()
    assert waiting["state"] == "spooling"
    assert waiting["spool"]["waiting_bytes"] > RING_BYTES
    it.place.start_receiver()
    drained_ns = it.samples[1].at_ns
    wait_for(lambda: int(it.group()["latest_ns"]) > drained_ns, "some of the spool is drained")
    it.write_some(20)
    it.place.kill("agent")
    it.start_agent()
    it.sample()
    it.wait_synced()
    assert it.gaps() == []
    assert it.reader.dropped() == 0
    it.check()
    wait_for(lambda: it.source_group()["spool"]["waiting_bytes"] == 0, "the spool's end")
    directory = it.disk.disks.home.source_directory / "spool" / GROUP
    wait_for(lambda: not list(directory.iterdir()), "the spool's files are gone")


@pytest.mark.timeout(240)
def test_beyond_the_spool_there_is_a_gap_and_only_what_differs_is_sent(stage: MakeStage) -> None:
    # Guards `must_compare` in SourceDisk: all regions that may differ were sent, whole.
    it = stage(size_bytes=64 * MIB, spool_size="4M")
    for block in range(0, 40 * MIB, MIB):
        it.wait_ring()  # the gap is to be that of the outage alone
        it.write_anew(block, MIB)
        if block % (8 * MIB) == 0:
            it.sample()
    it.wait_synced()
    before = it.source_group()["sent_bytes"]
    it.place.stop("receiver")
    first_lost = None
    differing, offset = 0, 40 * MIB
    while first_lost is None or differing < 23 * MIB:
        issued = it.clock.now()
        it.write_anew(offset)
        offset, differing = offset + BLOCK, differing + BLOCK
        if first_lost is None and it.reader.dropped():
            first_lost = (issued, it.clock.now())
        elif first_lost is None and differing % MIB == 0:
            it.sample()
    whole = len(it.samples)
    for same in range(0, 40 * MIB, MIB):  # regions that may differ, and do not
        it.write(same, bytes(it.content[same : same + MIB]))
    it.sample()
    inside = it.samples.pop()
    restarted = it.clock.now()
    it.place.start_receiver()
    it.wait_synced()
    sent = it.source_group()["sent_bytes"] - before
    [(from_ns, to_ns)] = it.gaps()
    assert first_lost[0] < from_ns <= first_lost[1]
    assert restarted < to_ns <= it.clock.now()
    assert differing <= sent <= 1.2 * differing
    with it.place.mounted(GROUP) as root:
        assert it.view(root, inside.at_ns) is None
        for sample in it.samples[:whole]:
            it.check_view(root, sample)
    it.samples = it.samples[:whole]
    it.write_some(5)
    it.sample()
    it.wait_synced()
    it.check()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kills",
    [
        ("receiver",),
        ("agent",),
        pytest.param(("receiver", "agent") * 4, marks=pytest.mark.soak),
    ],
)
def test_a_resync_that_is_interrupted_again_and_again_ends_with_the_same_bytes(
    stage: MakeStage, kills: tuple[str, ...]
) -> None:
    # Guards ``restart_syncs``: in DiskSync.interrupted when the receiver is killed, in
    # SourceDisk.attach when the agent is.
    slow = ("--limit", "0:00-24:00=4M/s")  # it is not over before it is seen
    it = stage(size_bytes=64 * MIB, spool_size="4M", seed=3, agent_options=slow)
    it.write_some(40)
    it.sample()
    it.wait_synced()
    for kill in kills:
        it.place.kill(kill)
        lost = it.reader.dropped()
        while it.reader.dropped() < lost + 200:  # all over the disk
            it.write_some(10)
        it.start(kill)
        wait_syncing(it)
        it.write_some(2)
        it.place.kill(kill)
        assert (it.reader.stale | it.reader.syncing).any(), "it was over"
        it.write_some(3)
        it.start(kill)
    it.write_some(10)
    it.wait_synced()
    assert 1 <= len(it.gaps()) <= len(kills)  # a resync may have ended in between
    it.check()


def wait_syncing(it: Stage) -> None:
    """Until content is on its way: looked at without a pause, for it may soon be over."""
    deadline = time.monotonic() + 30
    while not it.reader.syncing.any():
        assert time.monotonic() < deadline, "no resync begins"
