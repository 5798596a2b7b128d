"""Groups of two sources, one of which lags, joins or goes: no wrong bytes, no hidden history."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
from replica_workload import DISK_BYTES, SOURCE, START, Agent, Frame, start

from blockrepl import limits
from blockrepl.errors import DamageError
from blockrepl.formats.frame import RecordKind
from blockrepl.formats.messages import AttachDisk
from blockrepl.formats.segment import file_name
from blockrepl.storage import durable as durables
from blockrepl.storage.check import check_replica
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.replica import open_replica
from blockrepl.units import NANOSECONDS_PER_SECOND as SECOND
from blockrepl.views.view import View

OTHER = b"x" * 16
DATA = AttachDisk(id=UUID(int=9), name="data", size_bytes=DISK_BYTES)


class Group:
    """A replica of two sources; of the second none is there yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.replica, self.agent = start(directory)

    def reopen(self) -> None:
        self.replica.close()
        self.replica = open_replica(self.directory)

    def put(self, source: bytes, frame: Frame) -> None:
        self.replica.append(source, *frame)
        self.replica.commit()

    def join(self) -> Agent:
        self.replica.attach(OTHER, [DATA])
        return Agent(self.agent.group, OTHER, DATA.id, stamp=self.agent.stamp)

    def begin_segment(self, source: bytes, frame: Frame) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "SEGMENT_FRAMES_MAX", 1)
            self.put(source, frame)

    def damage(self, offset: int) -> None:
        """A frame's header in the open segment."""
        path = self.directory / "segments" / file_name(self.replica._journal.segment_number)
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), b"\xff" * 8, offset + 40)

    def read(self, disk: str, seconds: int) -> bytes:
        with ReplicaHistory(self.directory) as history:
            view = View(history, START + seconds * SECOND, history.state())
            return bytes(view.read(disk, 0, 4))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    made = Group(tmp_path / "web")
    yield made
    made.replica.close()


def write(agent: Agent, seconds: int, data: bytes) -> Frame:
    agent.stamp = START + seconds * SECOND
    data *= 1024
    return agent.records([(agent.stamp, 0, len(data), int(RecordKind.WRITE))], data)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_damaged_header_refuses_what_a_lagging_source_may_have_written_behind_it(
    group: Group, restarted: bool
) -> None:
    # Guards SegmentReader._oldest: the least watermark of the sources seen in this segment let a
    # view show what the other source's disk held before.
    agent = group.agent
    group.put(SOURCE, agent.consistent())
    other = group.join()
    group.put(OTHER, other.consistent())
    group.put(OTHER, write(other, 40, b"old!"))
    group.begin_segment(SOURCE, write(agent, 100, b"more"))
    if restarted:  # then the catalog's row bounds what is in the segment so far, not what comes
        group.reopen()
    offset = group.replica._journal.segment_bytes
    group.put(SOURCE, write(agent, 101, b"bad!"))
    group.put(OTHER, write(other, 50, b"new!"))
    group.put(OTHER, write(other, 200, b"last"))
    group.put(SOURCE, write(agent, 200, b"last"))
    assert group.read("data", 60) == b"new!"
    group.damage(offset)
    with pytest.raises(DamageError, match=str(offset)):
        group.read("data", 60)
    assert group.read("data", 40) == b"old!"
    found = [one for one in check_replica(group.directory) if one.code == "frames"]
    assert {one.from_ns for one in found} == {START + 40 * SECOND + 1}


def test_a_damaged_file_header_refuses_nothing_of_the_segments_before(group: Group) -> None:
    # Guards the bound of a lost segment in JournalIndex.refresh: it has outgrown its row.
    agent = group.agent
    group.put(SOURCE, agent.consistent())
    group.put(SOURCE, write(agent, 40, b"here"))
    group.begin_segment(SOURCE, write(agent, 50, b"next"))
    group.put(SOURCE, write(agent, 60, b"last"))
    group.damage(-40)
    assert group.read("root", 40) == b"here"
    with pytest.raises(DamageError):
        group.read("root", 60)


def test_a_damaged_header_refuses_nothing_of_before_another_source_was_there(
    group: Group,
) -> None:
    agent = group.agent
    group.put(SOURCE, agent.consistent())
    group.begin_segment(SOURCE, write(agent, 40, b"here"))
    offset = group.replica._journal.segment_bytes
    group.put(SOURCE, write(agent, 50, b"bad!"))
    other = group.join()
    group.put(OTHER, other.consistent())
    group.put(OTHER, write(other, 60, b"last"))
    group.put(SOURCE, write(agent, 60, b"last"))
    group.damage(offset)
    assert group.read("root", 40) == b"here"
    for disk in ("root", "data"):
        with pytest.raises(DamageError):
            group.read(disk, 60)


def latest(group: Group) -> int:
    with ReplicaHistory(group.directory) as history:
        return (history.state().latest_ns - START) // SECOND


def lose_record(group: Group) -> None:
    group.replica.close()
    (group.directory / durables.FILE_NAME).unlink()


def all_removed(group: Group) -> None:
    group.replica.attach(SOURCE, [])


def joining(group: Group) -> None:
    group.join()


def all_removed_and_joining(group: Group) -> None:
    all_removed(group)
    joining(group)


def one_removed(group: Group) -> None:
    """The one whose source is behind: it holds up nobody any more."""
    other = group.join()
    group.put(OTHER, write(other, 12, b"data"))
    group.put(OTHER, other.consistent())
    group.put(OTHER, write(other, 15, b"data"))
    group.replica.attach(OTHER, [])


@pytest.mark.parametrize("what", [all_removed, joining, all_removed_and_joining, one_removed])
def test_without_a_durable_record_all_that_could_be_reached_still_can(
    group: Group, what: Callable[[Group], None]
) -> None:
    # Guards newest_instant: a group without disks, or with a source of no watermark yet, could
    # not be reached at any instant once its record was lost.
    group.put(SOURCE, group.agent.consistent())
    group.put(SOURCE, write(group.agent, 10, b"data"))
    what(group)
    group.replica.commit()
    assert latest(group) == 10
    lose_record(group)
    assert latest(group) == 10
    assert group.read("root", 10) == b"data"
    group.replica = open_replica(group.directory)
    assert group.replica.status().watermark == START + 10 * SECOND
    assert latest(group) == 10


def test_a_disk_whose_source_is_behind_changes_no_instant_that_could_be_reached(
    group: Group,
) -> None:
    # Guards "least + 1" in admission.bounded: the newest instant had the disk, and then more of it.
    group.put(SOURCE, group.agent.consistent())
    group.put(SOURCE, write(group.agent, 10, b"data"))
    other = group.join()
    other.stamp = START + 3 * SECOND
    group.put(OTHER, other.consistent())
    with ReplicaHistory(group.directory) as history:
        assert View(history, START + 10 * SECOND, history.state()).disks.keys() == {"root"}
    group.put(OTHER, write(other, 9, b"late"))
    group.put(OTHER, write(other, 12, b"more"))
    group.put(SOURCE, write(group.agent, 12, b"data"))
    with ReplicaHistory(group.directory) as history:
        assert View(history, START + 10 * SECOND, history.state()).disks.keys() == {"root"}
    assert group.read("data", 11) == b"late"


def test_without_a_durable_record_no_instant_is_offered_that_a_disk_may_lack_records_of(
    group: Group,
) -> None:
    agent = group.agent
    group.put(SOURCE, agent.consistent())
    other = group.join()
    group.put(OTHER, other.consistent())
    group.put(SOURCE, write(agent, 10, b"data"))
    group.put(OTHER, write(other, 5, b"data"))
    lose_record(group)
    assert latest(group) == 5
    group.replica = open_replica(group.directory)
    assert group.replica.status().watermark == START + 5 * SECOND
    all_removed(group)
    lose_record(group)
    assert latest(group) == 5
    group.replica = open_replica(group.directory)
    assert group.replica.status().watermark == START + 5 * SECOND


def test_a_disk_that_is_synced_late_hides_nothing_of_before_when_the_record_is_lost(
    group: Group,
) -> None:
    # Its mark is bounded by the group's watermark, which its source's own may be far behind.
    agent = group.agent
    group.put(SOURCE, agent.consistent())
    group.put(SOURCE, write(agent, 10, b"data"))
    other = group.join()
    other.stamp = START + 3 * SECOND
    group.put(OTHER, other.consistent())
    lose_record(group)
    with ReplicaHistory(group.directory) as history:
        assert history.state().latest_ns == START + 10 * SECOND
    group.replica = open_replica(group.directory)
