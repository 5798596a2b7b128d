"""One writer per image: among blockrepl's servers, of whatever home, and against QEMU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import Disk, as_root, blockrepl, place, tool, wait_for

from blockrepl.errors import StateError
from blockrepl.storage.image import is_locked, lock_image
from blockrepl.units import MIB
from scripts.benchmark.processes import bound
from scripts.guest.pair import Pair

__all__ = ["place"]


@contextmanager
def qemu_holds(image: Path, directory: Path, *options: str) -> Iterator[None]:
    """A qemu-nbd that has the image open, for writing unless told otherwise."""
    socket = directory / "qemu.sock"
    words = ["qemu-nbd", "--format=raw", "--persistent", f"--socket={socket}", *options, str(image)]
    process = subprocess.Popen(bound(words), stderr=subprocess.PIPE)
    try:
        wait_for(lambda: socket.exists() or process.poll() is not None, "qemu-nbd")
        assert process.poll() is None
        yield
    finally:

        def ended() -> bool:
            process.terminate()  # again and again: one right after its start has no effect
            return process.poll() is not None

        wait_for(ended, "qemu-nbd's end")
        process.communicate()
        socket.unlink(missing_ok=True)


def refused(process: subprocess.CompletedProcess[str], *words: str) -> None:
    assert process.returncode == 1
    assert process.stdout == ""
    [line] = process.stderr.splitlines()
    for word in words:
        assert word in line


def test_a_second_server_of_the_same_disk_is_refused(place: Pair) -> None:
    disk = Disk(place)
    disk.start()
    refused(blockrepl(place.source_home, "disk", "serve", "d1"), str(disk.image), "in use")
    assert int(tool("nbdinfo", "--size", disk.uri)) == disk.size_bytes  # the first one goes on
    assert disk.is_alive()


def test_a_second_server_by_another_home_and_another_name_is_refused(place: Pair) -> None:
    disk = Disk(place)
    link = place.directory / "link.img"
    link.symlink_to(disk.image)
    other = place.directory / "other"
    added = blockrepl(other, "disk", "add", "same", link, "--group", "g")
    assert added.returncode == 0
    disk.start()
    refused(blockrepl(other, "disk", "serve", "same"), "in use")
    assert blockrepl(other, "disk", "list").returncode == 0
    disk.stop()
    assert blockrepl(other, "disk", "remove", "same").returncode == 0


def test_an_image_that_is_served_cannot_be_added_elsewhere(place: Pair) -> None:
    disk = Disk(place)
    disk.start()
    other = place.directory / "other"
    refused(blockrepl(other, "disk", "add", "x", disk.image, "--group", "g"), "in use")
    assert list((other / "source" / "disks").glob("x*")) == []


def test_no_server_while_qemu_writes_the_image(place: Pair) -> None:
    disk = Disk(place)
    with qemu_holds(disk.image, place.directory):
        refused(blockrepl(place.source_home, "disk", "serve", "d1"), str(disk.image), "QEMU")
    disk.start()


def test_no_adding_while_qemu_writes_the_image(place: Pair) -> None:
    image = place.directory / "vm.img"
    image.touch()
    os.truncate(image, MIB)
    with qemu_holds(image, place.directory):
        added = blockrepl(place.source_home, "disk", "add", "vm", image, "--group", "g")
        refused(added, "in use", "QEMU")


def test_qemu_is_refused_while_we_serve(place: Pair) -> None:
    disk = Disk(place)
    disk.start()
    said = tool("qemu-io", "-f", "raw", "-c", "quit", disk.image, status=1)
    assert "lock" in said
    tool("qemu-img", "info", "-U", disk.image)  # a look without a claim is nobody's harm
    assert disk.is_alive()


def test_the_locks_go_with_the_server_however_it_ends(place: Pair) -> None:
    disk = Disk(place)
    for end in (disk.stop, disk.kill):
        disk.start()
        assert is_locked(disk.image)
        assert disk.disks.is_serving(disk.entry)
        end()
        assert not is_locked(disk.image)
        assert not disk.disks.is_serving(disk.entry)
        with qemu_holds(disk.image, place.directory):
            pass


def test_a_server_is_known_by_its_ring_when_its_image_is_elsewhere(place: Pair) -> None:
    # Guards lock_ring in exec_server: the agent retired the ring that a guest was writing to.
    disk = Disk(place)
    disk.start()
    moved = disk.image.with_suffix(".moved")
    disk.image.rename(moved)
    shutil.copyfile(moved, disk.image)
    assert not is_locked(disk.image)
    assert disk.disks.is_serving(disk.entry)
    refused(blockrepl(place.source_home, "disk", "serve", "d1"), "in use", str(disk.ring))
    refused(blockrepl(place.source_home, "disk", "remove", "d1"), "in use", str(disk.ring))
    disk.kill()
    assert not disk.disks.is_serving(disk.entry)
    moved.rename(disk.image)
    disk.start()


def test_the_lock_is_one_for_all_descriptors(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    first = lock_image(image)
    try:
        with pytest.raises(StateError, match="in use"):
            lock_image(image)
        assert is_locked(image)
    finally:
        os.close(first)
    assert not is_locked(image)
    os.close(lock_image(image))


@as_root
def test_a_block_device_is_locked_too(place: Pair) -> None:
    backing = place.directory / "backing.img"
    backing.touch()
    os.truncate(backing, 4 * MIB)
    device = Path(tool("losetup", "--find", "--show", backing).strip())
    try:
        disk = Disk(place, image=device)
        disk.start()
        refused(blockrepl(place.source_home, "disk", "serve", "d1"), "in use")
        tool("qemu-io", "-f", "raw", "-c", "quit", device, status=1)
        disk.stop()
    finally:
        tool("losetup", "--detach", device)


def test_serving_needs_the_image_as_it_was_added(place: Pair) -> None:
    disk = Disk(place)
    os.truncate(disk.image, 9 * MIB)
    refused(blockrepl(place.source_home, "disk", "serve", "d1"), "9437184", "8388608")
    os.truncate(disk.image, 8 * MIB)
    away = disk.image.with_suffix(".away")
    disk.image.rename(away)
    refused(blockrepl(place.source_home, "disk", "serve", "d1"), "No such file", str(disk.image))
    away.rename(disk.image)
    disk.start()
