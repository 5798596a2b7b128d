"""What is in the page cache alone is not durable, whoever looks: a killed process leaves pages that
nobody has synced, and a failed sync leaves pages that look clean and are on no disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from lossy.disk import LossyDisk, lossy_disk
from lossy.nodes import Loss
from replica_workload import Agent, attach, put, start

from blockrepl.errors import StorageError
from blockrepl.storage.base import create_image
from blockrepl.storage.files import Files
from blockrepl.storage.home import make_directory
from blockrepl.storage.replica import Replica


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LossyDisk]:
    with lossy_disk(tmp_path_factory.mktemp("lossy") / "mount") as disk:
        yield disk


def kill(replica: Replica) -> None:
    replica.error = StorageError("killed", code="fail-stop")
    replica.close()


class Reading(Files):
    """Reads what it syncs: FUSE keeps a page that was written in part only if it was read."""

    def sync(self, descriptor: int) -> None:
        os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        super().sync(descriptor)


def lose(lossy: LossyDisk) -> None:
    lossy.lose_power()
    lossy.restore(Loss.DROP)


def told(directory: Path) -> int:
    """The frame that the store asks for next."""
    replica, _ = start(directory)
    number = attach(replica).next_number
    kill(replica)
    return number


def test_frames_that_a_killed_receiver_had_not_synced_are_not_called_durable(
    lossy: LossyDisk,
) -> None:
    # Guards ``settle`` in _Recovery._take_frames.
    directory = lossy.path / "unsynced"
    replica, agent = start(directory)
    put(replica, agent.writes())
    replica._journal._writer.append([agent.writes(), agent.writes()])
    kill(replica)
    number = told(directory)
    lose(lossy)
    assert told(directory) >= number


def test_frames_whose_sync_has_failed_are_not_called_durable(lossy: LossyDisk) -> None:
    # Guards ``settle`` in _Recovery._take_frames: its ``forget``, too.
    directory = lossy.path / "failed"
    replica, agent = start(directory, Reading())
    put(replica, agent.writes())
    fail_sync(lossy, replica, agent)
    kill(replica)
    number = told(directory)
    lose(lossy)
    assert told(directory) >= number


def fail_sync(lossy: LossyDisk, replica: Replica, agent: Agent) -> None:
    """Commit, the sync of the segment failing."""
    lossy.fail(1, errno.EIO, only="fsync")
    frame = agent.writes()
    replica.append(frame[0].source, *frame)
    with pytest.raises(StorageError) as failed:
        replica.commit()
    assert failed.value.code == "fail-stop"
    assert lossy.state()["failed"] == "fsync 000000000001.seg"
    lossy.count()


def test_base_content_whose_sync_has_failed_is_not_shown_to_a_comparison(
    lossy: LossyDisk,
) -> None:
    # Guards ``image.settle`` in Replica.__init__: what compares equal is never sent again.
    directory = lossy.path / "base"
    replica, agent = start(directory)
    frame = agent.base(0, b"b" * 4096)
    replica.append(frame[0].source, *frame)
    lossy.fail(1, errno.EIO, only="fsync")
    with pytest.raises(StorageError):
        replica.commit()
    assert lossy.state()["failed"] == "fsync root.img"
    lossy.count()
    kill(replica)
    replica, _ = start(directory)
    with (directory / "base" / "root.img").open("rb") as image:
        assert image.read(4096) == bytes(4096)
    kill(replica)


def test_what_another_began_to_make_is_made_durable(lossy: LossyDisk) -> None:
    # Guards the sync of a directory's parent in make_directory, and of an image that is there
    # already in create_image.
    path = lossy.path / "made" / "base" / "d.img"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(5000)
    make_directory(lossy.path / "made")
    create_image(path, 5000)
    lose(lossy)
    assert path.stat().st_size == 5000
