"""What must hold, whatever has happened. Nothing here is the product's, or the run's.

==================  ================================================================================
checker             when
==================  ================================================================================
check_recovered     the receiver has started: what the source was told is durable is there
check_store         now and then, and at the end: every point that is offered shows what the disk
                    was (as far as the guest can know), and shows it for ever; gaps have causes;
                    checkpoints are where they were said to be; `flush` is one
check_limits        now and then: spool, outbox and window stay within their bounds
check_converged     at the end, when all faults are over: both sides are the same, byte for byte
==================  ================================================================================
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from blockrepl import limits
from blockrepl.errors import PointError
from blockrepl.model import points
from blockrepl.model.points import History
from blockrepl.services import outbox as outboxes
from blockrepl.services import scrub_pace
from blockrepl.services.group_replication import GroupReplication
from blockrepl.storage.catalog import GapRow
from blockrepl.storage.history import ReplicaHistory, State
from blockrepl.storage.replica import Replica
from blockrepl.views.view import View
from scripts.simulation.model import DiskModel, Model
from scripts.simulation.world import Violation

POINTS_MAX = 8  # looked at per check


def check_recovered(replica: Replica, model: Model) -> None:
    if not model.acknowledged_number:
        return
    rows = replica.catalog.sources()
    number = rows[0].last_number if rows else 0
    watermark = rows[0].watermark if rows else 0
    if number < model.acknowledged_number:
        raise Violation(
            f"frame {model.acknowledged_number} was acknowledged; after a crash of the receiver "
            f"{number} is the last"
        )
    if watermark < model.acknowledged_watermark:
        raise Violation(
            f"the watermark {model.acknowledged_watermark} was acknowledged; after a crash of the "
            f"receiver it is {watermark}"
        )


def check_store(
    directory: Path, model: Model, chance: random.Random, points_max: int = POINTS_MAX
) -> None:
    """As a reader beside the receiver, or without it, sees it."""
    if not (directory / "catalog.sqlite").exists():
        return
    with ReplicaHistory(directory) as replica:
        state = replica.state()
        history = replica.history(state)
        names = {disk.id: disk.name for disk in state.disks}
        gaps = {
            name: [gap for gap in state.gaps if names[gap.disk] == name] for name in model.disks
        }
        for name, disk in model.disks.items():
            _check_gaps(disk, gaps[name])
        _check_checkpoints(model, state)
        _check_offered(model, history)
        ready = {disk.name: disk.ready_ns for disk in state.disks}
        for at_ns in _chosen(model, history, chance, points_max):
            _check_point(replica, state, model, at_ns, gaps, ready)
        _check_flush(replica, state, model)


def _check_gaps(disk: DiskModel, gaps: list[GapRow]) -> None:
    """Each has a cause of its own, that may begin a gap there.

    A drop that the agent sees half way, as it takes the ring up, begins one at the watermark. So
    does the death of a server before any record of its ring is known to the receiver: there may
    have been another ring between the two.
    """
    causes = list(disk.causes)
    for gap in gaps:
        fitting = [
            cause
            for cause in causes
            if (
                cause.kind == "dropped"
                or cause.earliest <= gap.from_ns
                or gap.from_ns <= cause.ring_began
            )
            and (gap.to_ns is None or cause.stamp <= gap.to_ns)
        ]
        if not fitting:
            raise Violation(f"disk {disk.name}: the gap from {gap.from_ns} has no cause")
        causes.remove(fitting[0])


def _check_checkpoints(model: Model, state: State) -> None:
    for name, at_ns in model.checkpoints.items():
        row = state.checkpoints.get(name)
        if row is None or row.at_ns != at_ns:
            raise Violation(f"checkpoint {name} is not at {at_ns}: {row}")


def _is_reachable(history: History, at_ns: int) -> bool:
    return points.nearest(history, at_ns)[0] == at_ns


def _check_offered(model: Model, history: History) -> None:
    for at_ns in model.offered:
        if not _is_reachable(history, at_ns):
            raise Violation(f"point {at_ns} was offered, and is not any more")


def _chosen(model: Model, history: History, chance: random.Random, points_max: int) -> list[int]:
    """The edges of what is offered, instants at and around changes, old points again."""
    edges = [at for stretch in points._stretches(history) for at in stretch]
    stamps = [
        change.stamp + step
        for disk in model.disks.values()
        for change in disk.changes
        for step in (-1, 0)
    ]
    stamps += model.checkpoints.values()
    stamps = [at for at in stamps if _is_reachable(history, at)]
    chance.shuffle(stamps)
    again = chance.sample(sorted(model.offered), min(2, len(model.offered)))
    room = max(0, points_max - len(again))
    return list(dict.fromkeys([*edges[-4:], *again, *stamps[:room]]))


def _check_point(
    replica: ReplicaHistory,
    state: State,
    model: Model,
    at_ns: int,
    gaps: dict[str, list[GapRow]],
    ready: dict[str, int | None],
) -> None:
    view = View(replica, at_ns, state)
    seen = model.offered.setdefault(at_ns, {})
    for name in view.disks:
        disk = model.disks[name]
        shown = bytes(view.read(name, 0, len(disk.initial)))
        ends = [(gap.from_ns, gap.to_ns) for gap in gaps[name]]
        # A first sync notices it as the gap would, at the next start of the disk's server.
        begun = ready[name] or 0
        ends += [(start, begun) for start in disk.server_starts if start <= begun]

        def settled(instant: int, ends: list[tuple[int, int | None]] = ends) -> bool:
            return any(
                first >= instant and last is not None and last <= at_ns for first, last in ends
            )

        if problem := disk.explains(shown, at_ns, settled):
            raise Violation(problem)
        digest = hashlib.blake2b(shown, digest_size=8).digest()
        if seen.setdefault(name, digest) != digest:
            raise Violation(f"disk {name} at {at_ns} shows something else than it did before")


def _check_flush(replica: ReplicaHistory, state: State, model: Model) -> None:
    """It is a guest's flush; and the last one, but for those a power loss may have taken."""
    try:
        found = replica.resolve(points.parse("flush"), state.latest_ns, state).at_ns
    except PointError:
        return
    if all(found not in disk.flushes for disk in model.disks.values()):
        raise Violation(f"flush is at {found}, where no guest flushed")
    history = replica.history(state)
    for disk in model.disks.values():
        if any(cause.kind != "dropped" for cause in disk.causes):
            continue
        for stamp in disk.flushes:
            is_there = found < stamp <= state.latest_ns and _is_reachable(history, stamp)
            # Before its first sync was done, a disk's flushes are none of the group's.
            if is_there and disk.name in {one.name for one in state.disks_at(stamp)}:
                raise Violation(f"flush is at {found}, the guest flushed at {stamp}")


def check_limits(group: GroupReplication | None, spool_bytes: int) -> None:
    if group is None:
        return
    if group.spool.size_bytes > spool_bytes:
        raise Violation(f"the spool has {group.spool.size_bytes} bytes, more than {spool_bytes}")
    if group.pump is None:
        return
    outbox = group.pump.outbox
    if len(outbox._memory) > outboxes.MEMORY_FRAMES + scrub_pace.UNDER_WAY_MAX:
        raise Violation(f"the outbox holds {len(outbox._memory)} frames in memory")
    # Comparisons are small, and few: the number above bounds them.
    frames = [item.size_bytes for item in outbox._memory.items() if item.header is not None]
    if len(frames) > 1 and sum(frames) > outboxes.MEMORY_BYTES:
        raise Violation(f"the outbox holds {sum(frames)} bytes of frames in memory")
    if outbox.window is not None and len(outbox.window.items) > limits.WINDOW_FRAMES:
        raise Violation(f"{len(outbox.window.items)} frames are on their way")


def why_not_converged(replica: Replica | None, group: GroupReplication | None, model: Model) -> str:
    """Empty when both sides say that they are the same."""
    if group is None or group.pump is None or not group.is_linked:
        return "the group has no link"
    if replica is None or replica.error is not None:
        return "the receiver does not work"
    status = replica.status()
    if not group.pump.outbox.is_drained:
        return "frames wait"
    if len(status.disks) != len(model.disks) or any(disk.ready_ns is None for disk in status.disks):
        return "a first sync is not done"
    if any(gap.to_ns is None for gap in status.gaps):
        return "a gap is open"
    if status.watermark < max(disk.last_stamp for disk in model.disks.values()):
        return "the watermark is behind"
    for disk in group.disks:
        if disk.ring is not None and (disk.ring.needs_sync() or disk.ring.is_syncing()):
            return "content waits"
    return ""


def check_converged(directory: Path, model: Model, images: dict[str, bytes]) -> None:
    with ReplicaHistory(directory) as replica:
        state = replica.state()
        view = View(replica, state.latest_ns, state)
        for name, image in images.items():
            disk = model.disks[name]
            if disk.state_at(state.latest_ns) != image:
                raise Violation(f"the model of disk {name} is not its image")
            shown = bytes(view.read(name, 0, len(image)))
            if shown != image:
                differing = (at for at in range(0, len(image), 512) if shown[at] != image[at])
                at = next(differing, 0)
                found = disk._describe(at, shown[at : at + 512], state.latest_ns)
                raise Violation(f"converged, and wrong: {found}")
