"""A run of the whole product under the oracle's eyes: load, faults, and then many instants.

The load writes through the source's NBD server while agent and receiver run; some of them are
killed (kill -9) and started again on the way. Then the group is mounted, and each view of it, at
random instants, right after acknowledgements, and at checkpoints, goes to the checker. A point may
be refused when it lies in a gap that `status` reports; such are counted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serving import Disk, blockrepl, wait_for

from blockrepl.storage.clock import SourceClock, open_clock
from blockrepl.units import MIB, NANOSECONDS_PER_SECOND, format_instant
from oracle import stamps
from oracle.checker import check
from oracle.history import History, View
from oracle.writers import Load, Pace, load, run_while
from scripts.guest.pair import Json, Pair

GROUP = "g"
DISK_BYTES = 32 * MIB
RING_BYTES = 128 * MIB  # an agent that is away for a moment makes no gap
INSTANTS = 50
SETTLE_SECONDS = 90.0


@dataclass
class Outcome:
    """What a run found. ``problems`` is empty when all is well."""

    problems: list[str] = field(default_factory=list)
    requests: int = 0
    unacknowledged: int = 0
    reconnects: int = 0
    views: int = 0
    refused: int = 0  # points in a gap
    gaps: int = 0
    checkpoints: int = 0

    def __str__(self) -> str:
        words = (f"{name} {value}" for name, value in vars(self).items() if name != "problems")
        return ", ".join(words)


class Run:
    """One source and one receiver, one disk, and what is noted of them."""

    def __init__(self, place: Pair, seed: int) -> None:
        self.place, self.seed = place, seed
        self.random = random.Random(seed)
        self.outcome = Outcome()
        self.ring_bytes = RING_BYTES
        self.instants = INSTANTS
        self.address: str | None = None  # of a link in between
        self.early: list[View] = []  # seen while the load was running
        self.disk: Disk
        self.clock: SourceClock

    def set_up(self) -> None:
        place = self.place
        place.receiver("receiver", "init")
        place.start_receiver()
        place.join(self.address)
        self.disk = Disk(place, size_bytes=DISK_BYTES, ring_bytes=self.ring_bytes, group=GROUP)
        self.clock = open_clock(self.disk.disks.home.source_directory)
        place.start_agent()
        self.disk.start()
        place.wait_replicating(GROUP)

    # --- while the load runs

    def disturb(self, running: Load, seconds: float, faults: Sequence[str]) -> None:
        """Spread the faults and three checkpoints over the time."""
        events = [("checkpoint", f"c{number}") for number in range(3)]
        events += [("kill", fault) for fault in faults]
        self.random.shuffle(events)
        begun = time.monotonic()
        for number, (kind, name) in enumerate(events, 1):
            instant = begun + seconds * number / (len(events) + 1)
            run_while(running, lambda: time.monotonic() < instant, seconds_max=seconds)  # noqa: B023
            if kind == "kill":
                self._kill(name)
            else:
                wait_for(lambda: self._checkpoint(name), f"checkpoint {name}")  # noqa: B023
        end = begun + seconds
        run_while(running, lambda: time.monotonic() < end, seconds_max=2 * seconds)

    def _checkpoint(self, name: str) -> bool:
        """False while the product says that it cannot be had: the other side was just killed."""
        made = blockrepl(self.place.source_home, "checkpoint", "create", GROUP, name)
        return made.returncode == 0 or "exists" in made.stderr

    def _kill(self, name: str) -> None:
        self.place.kill(name)
        self.start(name)

    def start(self, name: str) -> None:
        place = self.place
        match name:
            case "agent":
                place.start_agent()
            case "receiver":
                place.start_receiver()
            case _:
                self.disk.start()

    def look_early(self, root: Path) -> None:
        """Views taken while the receiver writes: they must be the same afterwards."""
        for _ in range(2):
            latest = int(self.place.group(GROUP)["latest_ns"])
            view = self._view(root, latest)
            if view is not None:
                self.early.append(view)

    # --- afterwards

    def settle(self) -> None:
        """Until all that was written is durable at the receiver and no gap is open."""
        now = self.clock.now()

        def settled() -> bool:
            group = self.place.group(GROUP)
            return group["state"] == "replicating" and int(group["latest_ns"] or 0) >= now

        wait_for(settled, "everything durable at the receiver", SETTLE_SECONDS)

    def examine(self, root: Path, history: History) -> None:
        group = self.place.group(GROUP)
        self.outcome.gaps = len(group["gaps"])
        views = list(self.early)
        for at_ns in self._instants(group, history):
            view = self._view(root, at_ns)
            if view is not None:
                views.append(view)
            elif in_gap(group, at_ns):
                self.outcome.refused += 1
            else:
                self.outcome.problems.append(f"{format_instant(at_ns)} is refused without a gap")
        views += self._checkpoints(root)
        self.outcome.views = len(views)
        self.outcome.requests = len(history)
        self.outcome.unacknowledged = int((~history.acknowledged).sum())
        self.outcome.problems += check(history, views)
        self._check_early(root)
        self._check_latest(root)
        self._check_flush(history)
        for found in self.place.scrub_finds(GROUP):
            self.outcome.problems.append(f"a scrub has found, and healed, a difference: {found}")

    def _instants(self, group: Json, history: History) -> list[int]:
        """Half at random, half when something had just been acknowledged."""
        first = max(int(group["floor_ns"]), int(history.issued[0]) - NANOSECONDS_PER_SECOND)
        latest = int(group["latest_ns"])
        ends = history.ended[history.acknowledged & (history.ended >= first)].tolist()
        chosen = [self.random.randint(first, latest) for _ in range(self.instants // 2)]
        return chosen + [self.random.choice(ends) + 1 for _ in range(self.instants - len(chosen))]

    def _view(self, root: Path, at_ns: int) -> View | None:
        """The disk at an instant; None where the product refuses the point."""
        try:
            data = (root / "at" / format_instant(at_ns) / f"{self.disk.name}.img").read_bytes()
        except FileNotFoundError:
            return None
        return View(at_ns, stamps.decode(data), format_instant(at_ns))

    def _checkpoints(self, root: Path) -> list[View]:
        found = []
        for row in self.place.receiver_json("checkpoint", "list", GROUP):
            path = root / "checkpoints" / row["name"] / f"{self.disk.name}.img"
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                self.outcome.problems.append(f"checkpoint {row['name']} cannot be mounted")
                continue
            found.append(View(int(row["at_ns"]), stamps.decode(data), f"checkpoint {row['name']}"))
        self.outcome.checkpoints = len(found)
        return found

    def _check_early(self, root: Path) -> None:
        for view in self.early:
            again = self._view(root, view.at_ns)
            if again is None or (again.sectors != view.sectors).any():
                self.outcome.problems.append(f"the view at {view.name} has changed")

    def _check_latest(self, root: Path) -> None:
        view = (root / "latest" / f"{self.disk.name}.img").read_bytes()
        image = self.disk.content()
        if view != image:
            where = next(i for i, (a, b) in enumerate(zip(view, image, strict=False)) if a != b)
            self.outcome.problems.append(f"latest differs from the source's image at {where}")

    def _check_flush(self, history: History) -> None:
        at_ns = int(self.place.receiver_json("point", GROUP, "flush")["at_ns"])
        if not any(flush.issued_ns < at_ns <= flush.ended_ns for flush in history.flushes):
            self.outcome.problems.append(f"no guest flush was at {format_instant(at_ns)}")


def in_gap(group: Json, at_ns: int) -> bool:
    return any(
        gap["from_ns"] <= at_ns and (gap["to_ns"] is None or at_ns < gap["to_ns"])
        for gap in group["gaps"]
    )


def run_oracle(
    place: Pair, seconds: float, *, seed: int, faults: Sequence[str] = (), pace: Pace | None = None
) -> Outcome:
    """Run in a fresh place. ``faults`` are names of services: agent, receiver, disk-d1."""
    run = Run(place, seed)
    run.set_up()
    with place.mounted(GROUP) as root:
        chosen = pace or Pace()
        with load(run.disk.socket, DISK_BYTES, seed=seed, pace=chosen) as running:
            run.disturb(running, seconds, faults)
            run.look_early(root)
        run.outcome.reconnects = sum(writer.reconnects for writer in running.writers)
        run.settle()
        run.examine(root, running.history(run.clock.offset_ns))
    return run.outcome
