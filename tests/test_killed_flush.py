"""A server that is killed inside a flush, with the real services: on a disk that is well, and on
one that is not. The system tells the server of the flush's outcome, and the server is killed before
it can tell anybody.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from outage import BLOCK, Stage
from serving import as_root, place, tool, wait_for

from blockrepl.units import MIB
from scripts.guest.pair import Pair

__all__ = ["place"]
pytestmark = pytest.mark.timeout(180)
SIZE = 8 * MIB

# fdatasync for the server: of the image it is the last, once the file "order" is there
SHIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
int fdatasync(int fd)
{
    const char *order = getenv("KILL_ORDER"), *image = getenv("KILL_IMAGE"), *told;
    struct stat there, here;
    int rc = (int)syscall(SYS_fdatasync, fd), error = errno, out;
    if (order && image && !access(order, F_OK) && !stat(image, &there) && !fstat(fd, &here) &&
        there.st_dev == here.st_dev && there.st_ino == here.st_ino) {
        told = rc ? strerror(error) : "ok";
        out = open(order, O_WRONLY | O_TRUNC);
        if (write(out, told, strlen(told)) > 0)
            kill(getpid(), SIGKILL);
        pause();
    }
    errno = error;
    return rc;
}
"""
KillInFlush = Callable[[Stage], str]


@pytest.fixture
def kill_in_flush(place: Pair, monkeypatch: pytest.MonkeyPatch) -> KillInFlush:
    """What the system told the server that it killed inside the guest's flush."""
    source, shim = place.directory / "shim.c", place.directory / "shim.so"
    source.write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source], check=True)
    order = place.directory / "order"

    def kill(it: Stage) -> str:
        it.disk.stop()
        with monkeypatch.context() as patch:
            patch.setenv("KILL_ORDER", str(order))
            patch.setenv("KILL_IMAGE", str(it.disk.image))
            patch.setenv("LD_PRELOAD", str(shim))
            it.restart_disk()
        wait_for(lambda: agent_has(it), "the agent has the image open")
        it.write_anew(5 * MIB)
        it.wait_synced()
        order.touch()
        with pytest.raises(ConnectionError):
            it.client.flush()
        it.disk.kill()  # what is left of it
        return order.read_text()

    return kill


def agent_has(it: Stage) -> bool:
    agent = it.place.services["agent"].process.pid
    held = {os.path.realpath(one) for one in Path(f"/proc/{agent}/fd").iterdir()}
    return (
        str(it.disk.ring) in Path(f"/proc/{agent}/maps").read_text() and str(it.disk.image) in held
    )


@pytest.fixture
def stage(place: Pair) -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(image: Path | None = None) -> Stage:
        made.append(Stage(place, size_bytes=SIZE, image=image))
        made[0].write_some(4)
        made[0].wait_synced()
        return made[0]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("finder", ["agent", "server"])
def test_a_disk_that_is_well_goes_on_as_before(
    stage: Callable[..., Stage], kill_in_flush: KillInFlush, finder: str
) -> None:
    # Guards set_known_flushes in FlushWatch.ask, and FlushDoubts in GroupReplication.run.
    it = stage()
    assert kill_in_flush(it) == "ok"
    ring = it.reader
    if finder == "server":
        it.restart_disk()
        assert it.client.read(0, 512) == bytes(it.content[:512])  # it has looked at the ring
        assert ring.unknown_flushes() == 1
    wait_for(lambda: ring.unknown_flushes() == 1, "the kill is found")
    wait_for(lambda: ring.known_flushes() == 1, "the agent has asked")
    assert not ring.flush_failed()
    if finder == "server":
        it.disk.stop()
    wait_for(lambda: not it.disk.ring.exists(), "the ring is given back")
    assert it.disk.hot_regions() == []
    assert it.source_group()["disks"][0]["problem"] is None


# fdatasync of the image takes 2 s, and says in the file "begun" that it has begun
SLOW = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
int fdatasync(int fd)
{
    struct stat there, here;
    if (!stat(getenv("SLOW_IMAGE"), &there) && !fstat(fd, &here) &&
        there.st_dev == here.st_dev && there.st_ino == here.st_ino) {
        close(open(getenv("SLOW_BEGUN"), O_CREAT | O_WRONLY, 0600));
        sleep(2);
    }
    return (int)syscall(SYS_fdatasync, fd);
}
"""


def test_a_server_that_is_stopped_ends_its_own_flush_first(
    stage: Callable[..., Stage], place: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the plugin's cleanup: without it the flush looks like one of a killed server.
    it = stage()
    it.disk.stop()
    begun, shim = place.directory / "begun", place.directory / "slow.so"
    shim.with_suffix(".c").write_text(SLOW)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, shim.with_suffix(".c")], check=True)
    programs = place.directory / "programs"
    programs.mkdir()
    cools = programs / "nbdkit"  # one hot region is the most here, so it flushes for the others
    cools.write_text(f'#!/bin/bash\nexec {shutil.which("nbdkit")} "${{@/#hot=*/hot=1}}"\n')
    cools.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        patch.setenv("LD_PRELOAD", str(shim))
        patch.setenv("SLOW_IMAGE", str(it.disk.image))
        patch.setenv("SLOW_BEGUN", str(begun))
        it.restart_disk()
    for region in range(3):
        it.write_anew(region * MIB)
    it.wait_synced()
    it.client.close()  # nbdkit waits for it
    wait_for(begun.exists, "the core flushes")
    ring = it.reader
    assert ring.flushes_under_way()
    it.disk.stop()
    assert not ring.flushes_under_way()
    assert ring.unknown_flushes() == 0


@pytest.fixture
def failing(place: Pair) -> Iterator[tuple[Path, Path]]:
    """A block device, and a file: once that is there, the device can write nothing new."""
    directory = place.directory / "small"
    directory.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory)
    backing = directory / "backing"
    backing.touch()
    os.truncate(backing, SIZE)
    device = Path(tool("losetup", "--find", "--show", backing).strip())
    yield device, directory / "ballast"
    tool("losetup", "--detach", device)
    tool("umount", "--lazy", directory)


@as_root
def test_a_disk_that_has_failed_is_never_trusted_again(
    stage: Callable[..., Stage], kill_in_flush: KillInFlush, failing: tuple[Path, Path]
) -> None:
    # Guards the fsync in FlushWatch.ask, and the warning and the status of FlushDoubts.
    device, ballast = failing
    it = stage(device)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:  # until there is no space
            file.write(bytes(BLOCK))
    assert kill_in_flush(it) == "Input/output error"
    descriptor = os.open(device, os.O_RDWR)
    os.fdatasync(descriptor)  # who opens it now is told that all is well
    os.close(descriptor)
    ring = it.reader
    wait_for(ring.flush_failed, "the failure is known")
    wait_for(lambda: it.source_group()["disks"][0]["problem"], "it is told")
    log = it.place.directory / "agent.log"
    wait_for(lambda: "failed to flush" in log.read_text(), "it is logged")
    it.restart_disk()
    it.client.flush()
    assert ring.flush_failed()
    assert log.read_text().count("failed to flush") == 1
    assert "failed to flush" in it.place.source("status")
    assert 5 in it.disk.hot_regions()
