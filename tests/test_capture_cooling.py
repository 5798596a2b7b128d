"""A cold region is the same at the replica, whatever dies; and the hot map stays small.

The rules are in hot_map.h. Everything here runs the core's own C (capture_model.py), on a disk
whose power may fail at any instant, with a random load around it; each rule is taken out in turn,
and must be missed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from capture_model import HOT_MAX, REGION, REGIONS, World, compile_core, misuse

SEEDS = 6
ACTIONS = 1500
COOL_SECONDS, FLUSH_SECONDS, IDLE_FLUSH_SECONDS = 10, 5, 300
MakeWorld = Callable[..., World]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_core(tmp_path_factory.mktemp("core"))


@pytest.fixture
def make_world(tmp_path: Path, library: Path) -> Iterator[MakeWorld]:
    made: list[World] = []

    def make(*, cold: bool = False, core: Path = library) -> World:
        made.append(World(core, tmp_path, cold=cold))
        return made[-1]

    yield make
    for world in made:
        world.end()


def write_regions(world: World, regions: range) -> None:
    for region in regions:
        assert world.write(region * REGION, b"x" * REGION) == 0


# --- what cools, and when


def test_a_cold_region_is_the_same_there_whatever_dies(make_world: MakeWorld) -> None:
    colds = 0
    for seed in range(SEEDS):
        world = make_world()
        misuse(world, seed, ACTIONS)
        assert world.violated == "", f"seed {seed}"
        colds += REGIONS - len(world.hot_regions())
    assert colds > 0  # or nothing was tried


FAULTS = {
    "before it is durable at the receiver": (
        "hot_map.c",
        "return age(m, region) < s->durable && is_synced(m, region);",
        "return is_synced(m, region);",
    ),
    "before a local flush": (
        "hot_map.c",
        "age(m, region) < flushed && is_selected(m, region, s)",
        "is_selected(m, region, s)",
    ),
    "after a flush that began before its record": (
        "hot_map.c",
        "    uint64_t head = ring_load(&m->ring->head);\n    int slot",
        "    uint64_t head = UINT64_MAX - 1;\n    int slot",
    ),
    "while a write is in flight": (
        "hot_map.c",
        "if (!in_flight(m, region) && age(",
        "if (age(",
    ),
    "while it is stale or being synced": (
        "hot_map.c",
        "    return !ring_load_byte(&m->stale[region]) && !ring_load_byte(&m->syncing[region]) &&\n"
        "           !ring_load_byte(&m->stale[region]);",
        "    return 1;",
    ),
    "while it is being synced": (
        "hot_map.c",
        " && !ring_load_byte(&m->syncing[region]) &&\n",
        " &&\n",
    ),
    "after a flush that failed": (
        "hot_map.c",
        "        ring_store(&m->ring->flush_failed, 1);\n    else {",
        "        ;\n    else {",
    ),
    "after a flush whose server was killed": (
        "hot_map.c",
        "           ring_load(&m->ring->flush_unknown) == ring_load(&m->ring->flush_known);",
        "           1;",
    ),
    "after a flush that a server found its predecessor killed in": (
        "device.c",
        "    ring_store(&ring->flush_unknown, ring->flush_unknown + 1);",
        "    ;",
    ),
    "before the flush of a server that was just started": (
        "hot_map.c",
        "    flushed = ring_load(&m->flushed);",
        "    flushed = m->flushed ? m->flushed : 1;",
    ),
    "though it was written again since it was looked at": (
        "device.c",
        "        hot_map_touch(&d->map, offset, offset + length, head + 1);",
        "        ;",
    ),
    "though its record was not kept": (
        "device.c",
        "        ring_store_byte(&d->stale[r], 1);",
        "        ;",
    ),
    "and its bit is not durable when it is written": (
        "hot_map.c",
        "    if (rc == 0 && fdatasync(m->map_fd) < 0)\n        rc = -errno;\n",
        "",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_cooling_without_one_of_its_rules_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, make_world: MakeWorld, fault: str
) -> None:
    """Guards each rule in hot_map.c that FAULTS takes out."""
    core = compile_core(tmp_path_factory.mktemp("fault"), FAULTS[fault])
    for seed in range(20 * SEEDS):
        world = make_world(core=core)
        misuse(world, seed, ACTIONS)
        if world.violated:
            return
    pytest.fail("nothing was noticed")


def test_an_idle_region_cools_although_the_guest_never_flushes(make_world: MakeWorld) -> None:
    """Guards the flush in hot_map_step."""
    world = make_world(cold=True)
    write_regions(world, range(4))
    world.catch_up()
    for _ in range(IDLE_FLUSH_SECONDS - 1):
        world.step()
        assert world.hot_regions() == [0, 1, 2, 3]
    world.step()
    assert world.hot_regions() == []


def test_a_region_that_is_written_again_and_again_stays_hot(make_world: MakeWorld) -> None:
    world = make_world(cold=True)
    write_regions(world, range(4))
    for _ in range(3 * COOL_SECONDS):
        write_regions(world, range(2))
        world.flush()
        world.catch_up()
        world.step()
    assert world.hot_regions() == [0, 1]


def test_above_the_bound_the_oldest_cool_first_and_at_once(make_world: MakeWorld) -> None:
    """Guards select_oldest in hot_map.c."""
    world = make_world(cold=True)
    order = random.Random(3).sample(range(REGIONS), 30)
    for region in order:
        world.write(region * REGION, b"x")
    world.catch_up()
    world.flush()
    world.catch_up()
    world.step()
    assert world.hot_regions() == sorted(order[-HOT_MAX:])


def test_above_the_bound_what_the_receiver_lacks_stays_hot(make_world: MakeWorld) -> None:
    world = make_world(cold=True)
    write_regions(world, range(10))
    world.catch_up()
    write_regions(world, range(10, 40))
    world.flush()
    for _ in range(3 * COOL_SECONDS):
        world.step()
    assert world.hot_regions() == list(range(10, 40))
    world.catch_up()
    world.flush()
    world.step()
    assert len(world.hot_regions()) <= HOT_MAX


def test_the_bound_holds_under_a_random_load(make_world: MakeWorld) -> None:
    world, choose = make_world(cold=True), random.Random(4)
    for _ in range(200):
        for _ in range(5):
            world.write(choose.randrange(REGIONS) * REGION, b"x" * 512)
        world.catch_up()
        world.step()
        # the guest never flushes: what was heated between two flushes comes on top
        assert len(world.hot_regions()) <= HOT_MAX + 5 * (FLUSH_SECONDS + 1)
    assert world.violated == ""


def test_regions_of_one_age_cool_down_to_the_bound_and_no_further(make_world: MakeWorld) -> None:
    """As after a start, when all that is hot has the same age."""
    world = make_world()
    world.catch_up()
    world.flush()
    world.step()
    assert len(world.hot_regions()) == HOT_MAX


def test_every_flush_of_the_image_is_seen_while_it_is_under_way(make_world: MakeWorld) -> None:
    """Guards hot_map_flush_begins in sync_image and flush_image, and its end in
    hot_map_flush_ended: a server that is killed there leaves word of it."""
    world, seen = make_world(cold=True), []
    world.during_flush = lambda: seen.append(
        (len(world.ring.flushes_under_way()), world.ring.flush_failed())
    )
    world.write(0, b"x" * 512, fua=True)
    world.flush()
    write_regions(world, range(1))
    world.catch_up()
    for _ in range(IDLE_FLUSH_SECONDS):
        world.step()
    assert world.ring.flushes_under_way() == frozenset()
    world.flush_fails = True
    world.flush()
    assert world.ring.flushes_under_way() == frozenset()
    assert world.ring.flush_failed()
    assert seen == [(1, False)] * 4


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_cools_until_the_flush_of_a_killed_server_is_known_to_have_succeeded(
    make_world: MakeWorld, fails: bool
) -> None:
    """Guards recover_flushes in device.c and is_trusted in hot_map.c."""
    world = make_world(cold=True)
    write_regions(world, range(4))
    world.catch_up()
    world.kill_in_flush(fails=fails)
    for _ in range(2 * COOL_SECONDS):
        assert world.flush() == 0
        world.catch_up()
        world.step()
    assert world.hot_regions() == [0, 1, 2, 3]
    world.ask()
    for _ in range(2 * COOL_SECONDS):
        world.step()
    assert world.hot_regions() == ([0, 1, 2, 3] if fails else [])


def test_nothing_cools_for_good_after_a_failed_flush(make_world: MakeWorld) -> None:
    world = make_world(cold=True)
    write_regions(world, range(4))
    world.catch_up()
    world.flush_fails = True
    assert world.flush() != 0
    world.flush_fails = False
    world.close()
    world.open()
    for _ in range(3 * COOL_SECONDS):
        assert world.flush() == 0
        world.catch_up()
        world.step()
    assert world.hot_regions() == [0, 1, 2, 3]
