"""A real Linux guest: on a plain disk, and on a protected one with the options the product prints.

It boots, works and leaves its disk clean, its replica is its disk, and none is ever left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.guest.build import GuestError, build_root_image
from scripts.guest.machine import Guest, plain_disk_options
from scripts.guest.pair import Pair, pair

MIB = 1 << 20
GROUP = "shop"
DISK = "vm1"
ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WRITES = """
set -e
mkdir /data
head -c 300000 /dev/urandom > /data/random.bin
sqlite3 /data/books.db 'create table t(x); insert into t values(1),(2)' 'select sum(x) from t'
sha256sum /data/random.bin
"""


def file_system_state(image: Path) -> str:
    """What fsck says of an ext4 image without changing it; empty when it is clean."""
    done = subprocess.run(
        ("e2fsck", "-fn", str(image)), capture_output=True, text=True, timeout=60, check=False
    )
    wrong = done.returncode != 0 or "recover" in done.stdout + done.stderr
    return done.stdout + done.stderr if wrong else ""


def read_file(image: Path, name: str, into: Path) -> bytes:
    """A file out of an ext4 image, without mounting it."""
    command = ("debugfs", "-R", f"dump {name} {into}", str(image))
    subprocess.run(command, capture_output=True, timeout=60, check=True)
    return into.read_bytes()


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def guest_processes(image: Path) -> list[int]:
    """QEMU processes that have this image on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if entry.name.isdigit() and b"qemu-system" in words and os.fsencode(image) in words:
            found.append(int(entry.name))
    return found


def test_a_guest_boots_from_a_plain_image_and_leaves_it_clean(tmp_path: Path) -> None:
    image = tmp_path / "plain.img"
    build_root_image(image, 128 * MIB, archive_bytes=MIB)
    with Guest() as guest:
        guest.start(plain_disk_options(image))
        said = guest.check(WRITES).split()
        assert said[0] == "3"
        assert guest.run("exit 7").status == 7
        assert guest.run("sleep 60", timeout_seconds=1).status == 137
        assert len(guest.check("head -c 200000 /dev/zero | tr '\\0' x")) == 200000
        assert guest.check("wc -c < /srv/archive.bin").strip() == str(MIB)
        guest.shutdown()
        assert not guest.running
    assert file_system_state(image) == ""
    random = read_file(image, "/data/random.bin", tmp_path / "random.bin")
    digest = subprocess.run(("sha256sum",), input=random, capture_output=True, check=True).stdout
    assert digest.split()[0].decode() == said[1]


def test_a_killed_guest_leaves_no_process_and_a_journal_to_replay(tmp_path: Path) -> None:
    image = tmp_path / "killed.img"
    build_root_image(image, 128 * MIB)
    guest = Guest()
    guest.start(plain_disk_options(image))
    guest.check("echo kept > /home/note; sync")
    assert guest_processes(image)
    guest.kill()
    # Killed it is; how long the kernel takes to free what it had is another thing.
    wait_until(lambda: guest_processes(image) == [], 20, "the killed guest's end")
    assert "recover" in file_system_state(image)
    with pytest.raises(GuestError, match="not running"):
        guest.run("true")


def test_a_guest_whose_caller_was_killed_powers_itself_off(tmp_path: Path) -> None:
    image = tmp_path / "orphan.img"
    build_root_image(image, 128 * MIB)
    program = (
        "import signal, sys\n"
        "from scripts.guest.machine import Guest, plain_disk_options\n"
        "from pathlib import Path\n"
        "guest = Guest()\n"
        "guest.start(plain_disk_options(Path(sys.argv[1])))\n"
        "print('booted', flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        (sys.executable, "-c", program, str(image)),
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as caller:
        assert caller.stdout is not None
        try:
            assert caller.stdout.readline() == "booted\n"
        finally:
            caller.send_signal(signal.SIGKILL)
    try:
        wait_until(lambda: guest_processes(image) == [], 60, "the orphaned guest's end")
    finally:
        for process in guest_processes(image):
            os.kill(process, signal.SIGKILL)
    assert file_system_state(image) == ""


def test_qemu_refusing_its_options_is_told_in_one_line(tmp_path: Path) -> None:
    with Guest() as guest, pytest.raises(GuestError, match=r"no-such-file") as refused:
        guest.start(plain_disk_options(tmp_path / "no-such-file.img"))
    assert "\n" not in str(refused.value)
    assert guest_processes(tmp_path) == []


# Each line is durable before it is counted; whatever fails is noted in memory.
WRITING = """
mkdir -p /data
rm -f /run/closed
: > /run/failed
echo 0 > /run/count
touch /run/open
(
    n=0
    while [ -e /run/open ]; do
        n=$((n + 1))
        echo $n | dd of=/data/lines oflag=append conv=notrunc,fsync 2> /run/said ||
            cat /run/said >> /run/failed
        echo $n > /run/next && mv /run/next /run/count
    done
    touch /run/closed
) > /dev/null 2>&1 &
"""


def lines_written(guest: Guest) -> int:
    return int(guest.check("cat /run/count"))


@pytest.fixture
def protected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A receiver, a source and a guest's disk under protection, served, its first sync begun."""
    with pair(tmp_path_factory.getbasetemp()) as made:
        image = made.directory / f"{DISK}.img"
        build_root_image(image, 128 * MIB, archive_bytes=16 * MIB)
        made.receiver("receiver", "init")
        made.start_receiver()
        made.join()
        made.start_agent()
        made.source("disk", "add", DISK, image, "--group", GROUP)
        made.start_disk(DISK)
        yield made


def assert_latest_equals_source(made: Pair) -> None:
    """After a shutdown: the newest view is the source's disk byte for byte, and fsck is content."""
    made.wait_replicating(GROUP)
    made.wait_durable(GROUP)
    with made.mounted(GROUP) as tree:
        view = tree / "latest" / f"{DISK}.img"
        state = file_system_state(view)
        assert not state, state
        same = subprocess.run(
            ("cmp", str(view), str(made.directory / f"{DISK}.img")),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert same.returncode == 0, same.stdout + same.stderr


def test_a_guest_boots_from_disk_show_and_its_replica_passes_fsck(protected: Pair) -> None:
    with Guest() as guest:
        guest.start(protected.qemu_options(DISK))
        guest.check(WRITES)
        guest.shutdown()
    assert_latest_equals_source(protected)


def steady_count(guest: Guest) -> int:
    """Lines written, once nothing has moved for a second for want of a disk."""
    seen: list[int] = []

    def steady() -> bool:
        seen.append(lines_written(guest))
        return len(seen) > 10 and seen[-1] == seen[-10]

    wait_until(steady, 30, "the guest's I/O pausing")
    return seen[-1]


def test_a_guest_waits_for_its_restarted_server_and_goes_on(protected: Pair) -> None:
    protected.wait_replicating(GROUP)
    with Guest() as guest:
        guest.start(protected.qemu_options(DISK))
        guest.check(WRITING)
        wait_until(lambda: lines_written(guest) > 5, 30, "the guest's first writes")
        protected.kill(f"disk-{DISK}")
        held = steady_count(guest)
        assert guest.run("cat /run/failed").output == ""
        protected.start_disk(DISK)
        wait_until(lambda: lines_written(guest) > held + 5, 60, "the guest's I/O going on")
        guest.check("rm /run/open; until [ -e /run/closed ]; do usleep 20000; done")
        assert guest.run("cat /run/failed").output == ""
        assert "I/O error" not in guest.check("dmesg")
        guest.shutdown()
    assert_latest_equals_source(protected)
