"""A seed: the base of a disk that came by other means, and a first sync that sends what differs."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from uuid import uuid4

import pytest
from serving import Disk, blockrepl, place

from blockrepl import limits
from blockrepl.errors import StateError, StorageError
from blockrepl.formats.messages import AttachDisk
from blockrepl.storage.home import Home
from blockrepl.storage.replica import create_replica, open_replica
from blockrepl.storage.seed import place_seed
from blockrepl.units import MIB
from scripts.guest.pair import Pair

__all__ = ["place"]

SIZE = 16 * MIB
BLOCK = limits.COMPARE_BLOCK_BYTES


def seed(place: Pair, image: Path, *options: str, disk: str = "d1") -> tuple[int, str]:
    done = blockrepl(place.receiver_home, "receiver", "seed", "g", disk, image, *options)
    return done.returncode, done.stderr if done.returncode else done.stdout


def test_a_seeded_first_sync_sends_what_differs_and_no_more(place: Pair) -> None:
    # Guards ``blank`` in the receiver's answer to ATTACH: everything would be sent.
    content = os.urandom(SIZE // 2) + bytes(SIZE // 2)
    image, old = place.directory / "d1.img", place.directory / "old.img"
    old.write_bytes(content)
    image.write_bytes(content)
    differing = range(0, SIZE, MIB)  # a block in each region, in data and in holes
    with image.open("r+b") as file:
        for offset in differing:
            file.seek(offset + 4096)
            file.write(os.urandom(512))
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    status, told = seed(place, old, "--move")
    assert status == 0, told
    assert not old.exists()
    disk = Disk(place, image=image)
    place.join()
    place.start_agent()
    place.wait_replicating("g")
    (group,) = place.source_json("status")["groups"]
    assert group["sent_bytes"] < len(differing) * BLOCK * 1.2
    assert place.group("g")["journal_bytes"] < MIB  # it went into the base
    place.receiver("export", "g", "d1", place.directory / "out.img", "--at", "latest", quiet=True)
    assert (place.directory / "out.img").read_bytes() == disk.content()
    status, told = seed(place, image)  # what is synced is not replaced
    assert status == 1
    assert "its first sync has begun" in told
    assert not list((Home(place.receiver_home).replicas / ".seeds").iterdir())


def test_a_receiver_at_rest_is_seeded_and_holes_stay_holes(place: Pair) -> None:
    content = os.urandom(SIZE // 2) + bytes(SIZE // 2)
    image = place.directory / "old.img"
    image.write_bytes(bytes(SIZE))
    place.receiver("receiver", "init", quiet=True)
    assert seed(place, image)[0] == 0
    image.write_bytes(content)
    assert seed(place, image)[0] == 0  # the later one counts
    copied = Home(place.receiver_home).replica_directory("g") / "base" / "d1.img"
    assert copied.read_bytes() == content
    assert copied.stat().st_blocks * 512 <= SIZE // 2 + MIB
    assert copied.stat().st_mode & 0o777 == 0o600


def test_a_file_system_that_fails_as_an_image_is_looked_for_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the first ``failures`` in attachment._add: an OSError went through to the session.
    directory = tmp_path / "g"
    create_replica(directory, "g")
    replica = open_replica(directory)

    def exists(path: Path) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(Path, "exists", exists)
    disk = AttachDisk(id=uuid4(), name="d1", size_bytes=SIZE)
    with pytest.raises(StorageError, match=r"cannot look at .*/d1\.img: Input/output error"):
        replica.attach(b"s" * 16, [disk])
    monkeypatch.undo()
    replica.close()


def test_a_seed_of_another_size_is_refused_when_its_disk_comes(tmp_path: Path) -> None:
    # Guards the size's check in attachment._add: the base would be longer than its disk.
    directory, waiting = tmp_path / "g", tmp_path / "seed"
    disk = AttachDisk(id=uuid4(), name="d1", size_bytes=SIZE)
    create_replica(directory, "g")
    replica = open_replica(directory)
    waiting.write_bytes(b"x" * (SIZE + MIB))
    place_seed(directory, replica.catalog, waiting, "d1")
    with pytest.raises(StateError, match="was seeded with an image of"):
        replica.attach(bytes(16), [disk])
    waiting.write_bytes(b"x" * SIZE)
    place_seed(directory, replica.catalog, waiting, "d1")
    (attached,) = replica.attach(bytes(16), [disk]).disks
    assert not attached.blank
    waiting.write_bytes(b"y" * SIZE)
    with pytest.raises(StateError, match="is known here"):  # guards check_free in place_seed
        place_seed(directory, replica.catalog, waiting, "d1")
    replica.close()


def test_what_is_no_image_is_no_seed(place: Pair) -> None:
    place.receiver("receiver", "init", quiet=True)
    image = place.directory / "odd.img"
    image.write_bytes(b"x" * 700)
    status, told = seed(place, image)
    assert (status, told.count("\n")) == (2, 1)
    assert "multiple of 512" in told
    assert seed(place, place.directory / "none.img")[0] == 1
