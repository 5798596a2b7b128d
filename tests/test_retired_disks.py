"""Disks that a source has taken out of its group: retention goes past them, and they may return."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from replica_workload import DISK, DISK_BYTES, SOURCE, START, Agent, put

from blockrepl import limits
from blockrepl.errors import PointError, StateError
from blockrepl.formats.messages import AttachDisk, Attached
from blockrepl.model.points import Instant, Point
from blockrepl.services.retention import _decide
from blockrepl.storage import retained
from blockrepl.storage.base import image_path
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.replica import Replica, create_replica, open_replica
from blockrepl.storage.retained import Policy, write_policy
from blockrepl.storage.seed import place_seed
from blockrepl.units import NANOSECONDS_PER_SECOND
from blockrepl.views.view import View

SECOND = NANOSECONDS_PER_SECOND
OTHER = UUID(int=8)
BOTH = {"root": DISK, "data": OTHER}
ROOT = {"root": DISK}


class Group:
    """Two disks, from the first second on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        create_replica(directory, "web")
        self.open()
        self.agent = Agent.after(self.attach(BOTH))
        self.sync(DISK, b"r")
        self.sync(OTHER, b"A")

    def open(self) -> None:
        self.replica: Replica = open_replica(self.directory, clock=lambda: START + 10**15)
        write_policy(self.replica.catalog, Policy(ladder="all:60s"))

    def attach(self, disks: dict[str, UUID]) -> Attached:
        return self.replica.attach(
            SOURCE,
            [AttachDisk(id=id, name=name, size_bytes=DISK_BYTES) for name, id in disks.items()],
        )

    def sync(self, disk: UUID, byte: bytes) -> None:
        self.agent.disk = disk
        put(self.replica, self.agent.base(0, byte * 4096))
        put(self.replica, self.agent.consistent())

    def write_after(self, seconds: int) -> None:
        self.agent.disk = DISK
        self.agent.stamp += seconds * SECOND
        put(self.replica, self.agent.writes())

    def retire(self) -> None:
        """The second disk, ten seconds after START."""
        self.write_after(10)
        self.attach(ROOT)

    def floor_seconds(self) -> int:
        with ReplicaHistory(self.directory) as history:
            floor_ns = history.history().floor_ns
        assert floor_ns is not None
        return (floor_ns - START) // SECOND


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    made = Group(tmp_path / "web")
    yield made
    made.replica.close()


def test_the_floor_goes_past_a_disk_that_was_retired_in_a_gap(group: Group) -> None:
    # Guards union_of in retention._decide: it waited for the end of a gap that never comes.
    group.agent.disk = OTHER
    group.agent.stamp += 5 * SECOND
    put(group.replica, group.agent.gap())
    group.retire()
    group.write_after(3600)
    _decide(group.replica)
    assert group.floor_seconds() == 3555
    assert [disk.name for disk in group.replica.catalog.disks(removed=True)] == ["root"]
    assert group.replica.catalog.gaps() == []


def test_a_disk_that_was_forgotten_returns_when_its_records_are_gone(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards has_forgotten_records in attachment._add: its old records were shown above what
    # it came back with.
    group.agent.disk = OTHER
    put(group.replica, group.agent.writes())
    group.retire()
    group.write_after(3600)
    _decide(group.replica)
    with pytest.raises(StateError, match="the journal still has some of its records"):
        group.attach(BOTH)
    assert [disk.name for disk in group.replica.catalog.disks(removed=True)] == ["root"]
    monkeypatch.setattr(limits, "SEGMENT_BYTES_TARGET", 1)
    catalog = group.replica.catalog
    while not catalog.segments()[0].sealed:  # it is sealed beside the commits, and noted by one
        group.write_after(3600)
    old, newer = (catalog.segments()[:1], catalog.segments()[1:])
    assert newer
    retained.replace(catalog, old, [], None)
    group.attach(BOTH)
    assert not group.replica.catalog.rows("SELECT * FROM meta WHERE key LIKE 'forgotten%'")


def test_a_disk_that_returns_after_it_was_forgotten_is_synced_into_its_new_image(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards "_images.pop" in Replica.shorten: the first sync went into the image that was removed;
    # and "is_gone" in ReadFiles: who had read that one read it for good.
    with ReplicaHistory(group.directory) as history:
        state = history.state()
        assert View(history, state.latest_ns, state).read("data", 0, 2) == b"AA"
        group.retire()
        group.write_after(3600)
        _decide(group.replica)
        assert not image_path(group.directory, "data").exists()
        monkeypatch.setattr(retained, "has_forgotten_records", lambda *_: False)  # it has none
        group.attach(BOTH)
        group.sync(OTHER, b"N")
        group.write_after(1)
        state = history.state()
        assert View(history, state.latest_ns, state).read("data", 0, 2) == b"NN"


def test_the_room_of_a_forgotten_disk_is_freed_beside_commits(group: Group) -> None:
    # Guards OpenFile in remove_images: all commits of the group waited for its blocks to be freed.
    def removed() -> list[str]:
        opened = [os.path.realpath(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")]
        return [path for path in opened if path.endswith("data.img (deleted)")]

    group.retire()
    group.write_after(3600)
    _decide(group.replica)
    assert not image_path(group.directory, "data").exists()
    assert len(removed()) == 1
    group.replica.remove_leftovers()
    assert removed() == []


def test_a_proof_that_waits_when_its_disk_is_forgotten_fails_no_other(group: Group) -> None:
    # Guards "FROM disks" in Proofs._write_chunks: no proof could be written any more, and the next
    # disk that grew stopped the group.
    proofs = group.replica.proofs
    group.retire()
    for disk in (OTHER, DISK):
        proofs.prove(disk.bytes, DISK_BYTES, 0, DISK_BYTES, group.agent.stamp)
    group.write_after(3600)
    _decide(group.replica)
    proofs.write()
    assert proofs.proven(DISK.bytes, DISK_BYTES).is_whole


def test_no_crash_leaves_points_without_the_disks_they_had(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards forget_retired in the transaction of Replica.shorten: until the next pass the floor was
    # that of the retired disk, and points from there on showed that disk alone.
    group.retire()
    group.write_after(3600)
    with monkeypatch.context() as patched:
        patched.setattr(retained, "forget_retired", _crash)
        with pytest.raises(_Crashed):
            _decide(group.replica)
    assert group.floor_seconds() == 0
    at_ns = START + 5 * SECOND
    with ReplicaHistory(group.directory) as history:
        assert {disk.name for disk in history.state().disks_at(at_ns)} == set(BOTH)
        _decide(group.replica)
        assert group.floor_seconds() == 3550
        with pytest.raises(PointError, match="before the floor"):
            history.resolve(Point("x", Instant(at_ns)), group.agent.stamp)


def test_what_a_crash_leaves_of_a_forgotten_disk_is_no_seed(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards remove_images, where the replica is opened, a disk added, and a seed put in place.
    image = image_path(group.directory, "data")
    group.retire()
    group.write_after(3600)
    with monkeypatch.context() as patched:
        patched.setattr(retained, "remove_images", _crash)
        with pytest.raises(_Crashed):
            _decide(group.replica)
    assert image.exists()
    left = image.read_bytes()
    key = "INSERT INTO meta VALUES ('image data', '')"

    group.replica.close()
    group.open()
    assert not image.exists()

    group.replica.catalog.change(key)
    image.write_bytes(left)
    seed = group.directory / "seed"
    seed.write_bytes(b"s" * DISK_BYTES)
    place_seed(group.directory, group.replica.catalog, seed, "data")
    group.replica.close()
    group.open()  # the seed stays
    _decide(group.replica)
    assert image.read_bytes()[:1] == b"s"

    image.write_bytes(left)
    group.replica.catalog.change(key)
    assert group.attach({**ROOT, "data": UUID(int=9)}).disks[1].blank


class _Crashed(BaseException):
    pass


def _crash(*_anything: object) -> list[bytes]:
    raise _Crashed
