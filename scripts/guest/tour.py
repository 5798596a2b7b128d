"""The tour that `make demo` gives: a guest loses its data and gets it back, step by step.

=============================  =====================================================================
instant                        what the disk holds at it, and how the tour knows
=============================  =====================================================================
the plain time                 the photos; the database amid its transactions: at least the rows
                               the guest had counted before, at most those it counted after
the checkpoint ``before``      the photos and the database, as the guest's own digests say
``latest``                     nothing of either: the guest has destroyed them
``latest`` after the shutdown  the source's image, byte by byte
=============================  =====================================================================

A view of a disk that was in use holds a file system with a journal to replay, as after a power cut.
The tour replays it in a copy of the view with e2fsck and reads the copy with debugfs: no privilege,
no loop device. Every claim is a check; the first one that fails ends the tour with exit status 1.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scripts.guest.build import boot_files, build_root_image
from scripts.guest.machine import Guest
from scripts.guest.pair import Json, Pair

MIB = 1 << 20
GROUP = "shop"
DISK = "vm1"
TAG = "before"
IMAGE_BYTES = 256 * MIB
ARCHIVE_BYTES = 160 * MIB  # content from before the protection: the first sync has to carry it
MARGIN_SECONDS = 0.3  # between a time noted here and the guest's statements around it
LAG_SAMPLES = 5

FIRST_WORK = """
set -e
mkdir -p /data/photos
for i in $(seq 1 40); do head -c 100000 /dev/urandom > /data/photos/$i.jpg; done
sqlite3 /data/shop.db 'pragma journal_mode=wal' 'create table orders(id integer primary key, item)'
sync
# A reader that stays: the database keeps its write-ahead log, as a running application's does.
(echo 'select count(*) from orders;'; sleep 900) | sqlite3 /data/shop.db > /dev/null 2>&1 &
# One transaction after the other until told to stop.
touch /run/open
(
    while [ -e /run/open ]; do
        echo 'insert into orders(item) values (hex(randomblob(150)));'
        usleep 10000
    done | sqlite3 /data/shop.db
    touch /run/closed
) > /dev/null 2>&1 &
"""
COUNT = "sqlite3 /data/shop.db 'select count(*) from orders'"
SECOND_WORK = """
rm /run/open
until [ -e /run/closed ]; do usleep 20000; done
sync
cd /data && find photos -type f | sort | xargs sha256sum | sha256sum
sqlite3 /data/shop.db .sha3sum
"""
DISASTER = """
rm -rf /data/photos
dd if=/dev/urandom of=/data/shop.db bs=64k count=4 conv=notrunc 2> /dev/null
rm -f /data/shop.db-wal /data/shop.db-shm
sync
"""


class TourError(RuntimeError):
    """A check that did not hold; one line that says which."""


class Tour:
    """The steps in order; `run` takes them all."""

    def __init__(self, console: Console, source_and_receiver: Pair) -> None:
        self.console = console
        self.pair = source_and_receiver
        self.image = self.pair.directory / "vm1.img"
        self.step_count = 0
        self.timings: dict[str, str] = {}
        self.lags: list[float] = []
        self.plain_time = ""
        self.rows_around: tuple[int, int] = (0, 0)
        self.photos_digest = ""
        self.orders_digest = ""

    def run(self) -> None:
        started = time.monotonic()
        self.make_disk()
        self.connect()
        self.protect()
        with Guest() as guest:
            self.boot(guest)
            self.work(guest)
            self.destroy(guest)
            self.look_back()
            self.step("The guest shuts down; the replica must now equal the source's disk")
            guest.shutdown()
        self.compare()
        self.timings["the whole tour"] = f"{time.monotonic() - started:.0f} s"
        self.summary()

    def make_disk(self) -> None:
        self.step("Build a small Linux guest's disk: Debian's kernel, busybox, sqlite3")
        with self.timed("building the guest's disk"):
            boot_files()
            build_root_image(self.image, IMAGE_BYTES, archive_bytes=ARCHIVE_BYTES)

    def connect(self) -> None:
        self.step("Start the replica side: a receiver with its own certificate authority")
        self.pair.receiver("receiver", "init")
        self.pair.start_receiver()
        self.step("Invite a source with a one-time token; the agent makes its own key and joins")
        self.pair.join()
        self.pair.start_agent()

    def protect(self) -> None:
        self.step("Put a disk that already has content under protection: the first sync begins")
        self.say(self.pair.source("disk", "add", DISK, self.image, "--group", GROUP))
        with self.timed(f"first sync of {ARCHIVE_BYTES // MIB} MiB of content"):
            self.pair.wait_replicating(GROUP, self.sync_progress)
        self.good("the replica follows every write from now on")

    def sync_progress(self, status: Json) -> None:
        [disk] = status["disks"]
        done, whole = disk.get("synced_bytes") or 0, disk["size_bytes"]
        self.say(f"{status['state']}: {done // MIB} of {whole // MIB} MiB (zeros are not sent)")

    def boot(self, guest: Guest) -> None:
        self.step("Serve it, and boot a guest with the options the product prints (QEMU, TCG)")
        self.pair.start_disk(DISK)
        guest.start(self.pair.qemu_options(DISK))
        self.timings["guest's boot"] = f"{guest.boot_seconds:.1f} s"
        self.good(f"Linux {guest.kernel_release} is up after {guest.boot_seconds:.1f} s")

    def work(self, guest: Guest) -> None:
        self.step("The guest writes 40 photos, then orders into SQLite, one transaction each")
        guest.check(FIRST_WORK)
        for _ in range(LAG_SAMPLES):
            self.lags.append(float(self.pair.group(GROUP)["lag_seconds"]))
        before = int(guest.check(COUNT))
        time.sleep(MARGIN_SECONDS)
        noted = datetime.now(timezone.utc)
        time.sleep(MARGIN_SECONDS)
        self.plain_time = f"{noted:%Y-%m-%dT%H:%M:%S}.{noted.microsecond // 1000:03d}Z"
        self.rows_around = (before, int(guest.check(COUNT)))
        self.good(f"amid the transactions we look at the clock: {self.plain_time}")
        photos, orders = guest.check(SECOND_WORK).splitlines()[-2:]
        self.photos_digest, self.orders_digest = photos.split()[0], orders.split()[0]
        rows = int(guest.check(COUNT))
        self.step(f"All is well ({rows} orders): name this instant")
        self.say(self.pair.source("checkpoint", "create", GROUP, TAG))

    def destroy(self, guest: Guest) -> None:
        self.step("The guest destroys its data: photos removed, database overwritten")
        guest.check(DISASTER)
        self.require(guest.run("ls /data/photos").status != 0, "the photos are gone")
        self.require(guest.run(COUNT).status != 0, "SQLite cannot read the database any more")
        self.pair.wait_durable(GROUP)
        self.step("Both sides know where they are")
        for status in (self.pair.source("status"), self.pair.receiver("status")):
            self.console.print(status.rstrip(), markup=False, highlight=False)

    def look_back(self) -> None:
        self.step(f"Mount the disk as it was at the checkpoint {TAG!r}")
        started = time.monotonic()
        with self.pair.mounted(GROUP, f"tag:{TAG}") as target:
            self.timings["mount at the checkpoint"] = f"{time.monotonic() - started:.1f} s"
            data = self.recover(target / f"{DISK}.img")
        self.require(photos_digest(data) == self.photos_digest, "40 photos, digests as before")
        self.require(integrity(data) == "ok", "PRAGMA integrity_check: ok")
        self.require(orders_digest(data) == self.orders_digest, "every order, digest as before")

        self.step("Mount it at the plain time, while transactions were running")
        self.say(self.pair.receiver("point", GROUP, self.plain_time))
        with self.pair.mounted(GROUP, self.plain_time) as target:
            data = self.recover(target / f"{DISK}.img")
        low, high = self.rows_around
        rows = row_count(data)
        self.require(photos_digest(data) == self.photos_digest, "40 photos, digests as before")
        self.require(integrity(data) == "ok", "PRAGMA integrity_check: ok")
        self.require(low <= rows <= high, f"{rows} orders; the guest had {low} to {high}")

        self.step("The tree of all points, and the disk as it is now")
        with self.pair.mounted(GROUP) as target:
            names = sorted(path.name for path in target.iterdir())
            self.good(f"in the mount: {', '.join(names)}")
            named = target / "checkpoints" / TAG / f"{DISK}.img"
            self.require(named.is_file(), f"checkpoints/{TAG}/{DISK}.img is there")
            data = self.recover(target / "latest" / f"{DISK}.img")
        self.require(not (data / "photos").exists(), "latest: the photos are gone there, too")
        self.require(integrity(data) != "ok", "latest: the database is garbage there, too")

    def compare(self) -> None:
        self.pair.wait_durable(GROUP)
        with self.pair.mounted(GROUP, "latest") as target:
            view = target / f"{DISK}.img"
            self.require(file_digest(view) == file_digest(self.image), "equal, byte by byte")
            checked = tool("e2fsck", "-fn", str(view), accept=(0, 4))
        self.require(checked.returncode == 0, "fsck of the view: clean")

    def summary(self) -> None:
        status = self.pair.group(GROUP)
        table = Table(title="The demo in numbers", show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        lags = sorted(self.lags)
        middle, worst = lags[len(lags) // 2], lags[-1]
        table.add_row("lag while the guest wrote", f"{middle:.3f} s median, {worst:.3f} s worst")
        table.add_row("journal", f"{status['journal_bytes'] / MIB:.1f} MiB")
        history_seconds = (status["latest_ns"] - status["floor_ns"]) / 1e9
        table.add_row("history, every write a point", f"{history_seconds:.0f} s")
        for what, value in self.timings.items():
            table.add_row(what, value)
        self.console.print(table)

    def recover(self, view: Path) -> Path:
        """The files under /data of a view, read from a copy whose journal was replayed."""
        copy = self.pair.directory / f"recovered-{self.step_count}.img"
        tool("cp", "--sparse=always", str(view), str(copy))
        tool("e2fsck", "-E", "journal_only", "-y", str(copy), accept=(0, 1))
        tool("e2fsck", "-fn", str(copy))
        out = copy.with_suffix("")
        out.mkdir()
        tool("debugfs", "-R", f"rdump /data {out}", str(copy))
        copy.unlink()
        self.good(f"{view.relative_to(self.pair.directory)}: fsck after journal replay is clean")
        return out / "data"

    def step(self, what: str) -> None:
        self.step_count += 1
        self.console.print(f"\n[bold]{self.step_count}. {escape(what)}[/bold]")

    def say(self, what: str) -> None:
        self.console.print(f"  {escape(what.strip())}", style="dim", highlight=False)

    def good(self, what: str) -> None:
        self.console.print(f"  [green]✓[/green] {escape(what)}", highlight=False)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            raise TourError(f"this should hold and does not: {what}")
        self.good(what)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.timings[what] = f"{time.monotonic() - started:.1f} s"


def photos_digest(data: Path) -> str:
    """As the guest computes it: the digest of sha256sum's own output."""
    names = sorted(f"photos/{path.name}" for path in (data / "photos").iterdir())
    lines = [f"{file_digest(data / name)}  {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def integrity(data: Path) -> str:
    """What SQLite's own integrity check says; the first line."""
    said = tool("sqlite3", str(data / "shop.db"), "pragma integrity_check", accept=(0, 1, 11, 26))
    return (said.stdout or said.stderr).strip().partition("\n")[0]


def row_count(data: Path) -> int:
    return int(tool("sqlite3", str(data / "shop.db"), "select count(*) from orders").stdout)


def orders_digest(data: Path) -> str:
    return tool("sqlite3", str(data / "shop.db"), ".sha3sum").stdout.split()[0]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tool(*command: str, accept: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a system tool to its end; TourError for a status that is not accepted."""
    path = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    done = subprocess.run(
        command, env=path, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode not in accept:
        said = " ".join((done.stdout + done.stderr).split())[-300:]
        raise TourError(f"{' '.join(command)} ended with {done.returncode}: {said}")
    return done
