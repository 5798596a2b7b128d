"""The timeline of a group: what happened in each interval of a window, and what became of it.

A window is a stretch of history: it is cut where history begins and ends, and refused where it has
nothing of it. Its ends need not be points that can be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockrepl.errors import StateError, UsageError
from blockrepl.model.points import NOTHING_YET, History, Instant, Latest, Point, Relative
from blockrepl.model.timeline import Bins
from blockrepl.storage.catalog import CheckpointRow
from blockrepl.storage.history import ReplicaHistory, State
from blockrepl.storage.statistics import Damaged, Pace, activity
from blockrepl.units import NANOSECONDS_PER_SECOND, format_instant

Rates = npt.NDArray[np.float64]
WINDOW_SECONDS = 3600  # drawn unless told otherwise, or all that there is


@dataclass(frozen=True, slots=True)
class Gap:
    disk: str
    from_ns: int  # both are cut at the window's ends
    to_ns: int
    is_open: bool


@dataclass(frozen=True, slots=True)
class Thinned:
    from_ns: int
    to_ns: int
    step_ns: int


@dataclass(frozen=True, slots=True)
class Timeline:
    group: str
    disks: tuple[str, ...]
    bins: Bins
    checkpoints: tuple[CheckpointRow, ...]
    gaps: tuple[Gap, ...]
    thinned: tuple[Thinned, ...]
    damaged: tuple[Damaged, ...]

    @property
    def from_ns(self) -> int:
        return int(self.bins.edges[0])

    @property
    def to_ns(self) -> int:
        return int(self.bins.edges[-1])

    @property
    def interval_seconds(self) -> float:
        """On average: they differ by a nanosecond at most."""
        count = len(self.bins.edges) - 1
        return (self.to_ns - self.from_ns) / count / NANOSECONDS_PER_SECOND

    def per_second(self, name: str) -> Rates:
        """A sum's rate in each interval."""
        seconds = np.diff(self.bins.edges).astype(np.float64) / NANOSECONDS_PER_SECOND
        return self.bins.sums[name] / seconds

    def stored_share(self) -> Rates:
        """Stored of written bytes; not a number where nothing was written."""
        written = self.bins.sums["written_bytes"].astype(np.float64)
        written[written == 0] = np.nan
        return self.bins.sums["stored_bytes"] / written


def window(
    history: ReplicaHistory, state: State, begin: Point | None, end: Point | None, now_ns: int
) -> tuple[int, int]:
    """The stretch (from, to] to be drawn. PointError, StateError, UsageError."""
    known = history.history(state)
    if known.floor_ns is None:
        raise StateError(
            f"group {history.group} has nothing to draw: {NOTHING_YET}", hint="see blockrepl status"
        )
    to_ns = known.latest_ns if end is None else _instant(history, state, end, now_ns)
    if begin is None:
        from_ns = min(to_ns, known.latest_ns) - WINDOW_SECONDS * NANOSECONDS_PER_SECOND
    else:
        from_ns = _instant(history, state, begin, now_ns)
        if from_ns == to_ns:
            raise UsageError(
                f"the window is empty: it begins and ends at {format_instant(to_ns)}",
                hint="give --from and --to two instants",
            )
        if from_ns > to_ns:
            raise UsageError(
                f"the window ends ({format_instant(max(0, to_ns))}) before it begins",
                hint="--from is the earlier point",
            )
    return _cut(history.group, known, known.floor_ns, from_ns, to_ns)


def _cut(group: str, known: History, floor_ns: int, from_ns: int, to_ns: int) -> tuple[int, int]:
    first, last = max(from_ns, floor_ns), min(to_ns, known.latest_ns)
    if first >= last:
        raise StateError(
            f"the window lies outside the history of group {group}",
            hint=f"history: {format_instant(floor_ns)} to {format_instant(known.latest_ns)}",
            code="window",
        )
    return first, last


def _instant(history: ReplicaHistory, state: State, point: Point, now_ns: int) -> int:
    """A time as it is, also where no point can be reached; anything else as everywhere."""
    if not point.records_back:
        match point.base:
            case Instant():
                return point.base.at_ns
            case Relative():
                return now_ns - point.base.back_ns
            case Latest():  # the newest there is, also in a gap
                return state.latest_ns
    return history.resolve(point, now_ns, state).at_ns


def timeline(
    history: ReplicaHistory,
    state: State,
    names: Sequence[str],
    from_ns: int,
    to_ns: int,
    count: int,
    pace: Pace = lambda _size_bytes: None,
) -> Timeline:
    """Of all disks, or of those named, in at most ``count`` intervals. StateError, StorageError."""
    rows = {row.id: row for row in state.disks}
    there = sorted({row.name for row in rows.values()})
    for name in names:
        if name not in there:
            raise StateError(
                f"group {history.group} has no disk {name}",
                hint=f"its disks: {', '.join(there) or 'none'}",
                code="no-disk",
            )
    chosen = {identity for identity, row in rows.items() if not names or row.name in names}
    found = activity(history, sorted(chosen), from_ns, to_ns, count, pace)
    gaps = []
    for gap in state.gaps:
        if gap.disk not in chosen:
            continue
        retired = rows[gap.disk].removed_ns
        ends = [at_ns for at_ns in (gap.to_ns, retired) if at_ns is not None]
        first, last = max(gap.from_ns, from_ns), min([*ends, to_ns])
        if first < last:
            gaps.append(Gap(rows[gap.disk].name, first, last, is_open=not ends))
    return Timeline(
        history.group,
        tuple(name for name in there if not names or name in names),
        found.bins,
        tuple(
            row
            for row in sorted(state.checkpoints.values(), key=lambda row: (row.at_ns, row.name))
            if from_ns <= row.at_ns <= to_ns
        ),
        tuple(gaps),
        tuple(
            Thinned(max(one.from_ns, from_ns), min(one.to_ns, to_ns), one.step_ns)
            for one in state.kept.stretches
            if one.from_ns < to_ns and one.to_ns > from_ns
        ),
        tuple(found.damaged),
    )
