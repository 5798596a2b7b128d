"""``timeline``: what happened to a group, drawn in the terminal or as a picture."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blockrepl.cli.output import (
    emit,
    json_option,
    pass_home,
    picture_columns,
    print_rich,
    progress,
)
from blockrepl.cli.point import complete_group, complete_point
from blockrepl.model import points
from blockrepl.units import NANOSECONDS_PER_SECOND, format_instant

if TYPE_CHECKING:
    from blockrepl.storage.statistics import Pace
    from blockrepl.views.timeline import Timeline

INTERVALS_DEFAULT = 240  # of a picture and in JSON; a terminal has a column for each
INTERVALS_MAX = 10_000


@click.command(
    epilog="Examples: blockrepl timeline shop;  blockrepl timeline shop --from -1d --output "
    "day.png;  blockrepl timeline shop --from tag:monday --to tag:tuesday --disk web --json"
)
@click.argument("group", shell_complete=complete_group)
@click.option(
    "--from",
    "begin",
    metavar="POINT",
    help="Where the window begins.",
    shell_complete=complete_point,
)
@click.option(
    "--to",
    "end",
    metavar="POINT",
    help="Where it ends. [default: the newest instant]",
    shell_complete=complete_point,
)
@click.option("--disk", "names", metavar="DISK", multiple=True, help="Only this disk (or these).")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw to this file: .png or .svg.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option(
    "--intervals",
    type=click.IntRange(1, INTERVALS_MAX),
    help=f"How many to divide the window into, at most. [default: {INTERVALS_DEFAULT}; in the "
    "terminal a column each]",
)
@json_option
@pass_home
def timeline(
    home: Path,
    group: str,
    begin: str | None,
    end: str | None,
    names: tuple[str, ...],
    output: Path | None,
    force: bool,
    intervals: int | None,
    json_mode: bool,
) -> None:
    """Draw what happened to GROUP: write rate, changed bytes, compression, flushes, checkpoints.

    The window is the last hour of the history, or all where that is less, unless --from and --to
    say otherwise; it is cut where the history begins and ends. Times are UTC. No content is read.
    Of a stretch that retention has thinned, what was kept is counted: no flushes, for one.

    \b
    --json prints: group, disks, from, from_ns, to, to_ns, interval_seconds, output, and
      intervals    from_ns, to_ns, written_bytes, stored_bytes (of them, compressed),
                   zeroed_bytes, trimmed_bytes, resynced_bytes (sent again after a gap),
                   writes, zeros, trims, flushes, changed_bytes (distinct 4 KiB blocks),
                   changed_exact (false: estimated from a sample)
      checkpoints  name, at, at_ns, kind, kept
      gaps         disk, from_ns, to_ns (within the window), open
      thinned      from_ns, to_ns, step_seconds (one point is left in each)
      damaged      from_ns, to_ns, why
    """
    from blockrepl.cli import timeline_text
    from blockrepl.storage.history import ReplicaHistory
    from blockrepl.views import timeline as timelines
    from blockrepl.views import timeline_picture
    from blockrepl.views.export import check_target

    asked = [None if text is None else points.parse(text) for text in (begin, end)]
    if output is not None:
        timeline_picture.check_suffix(output)
        check_target(output, force=force)
    count = intervals or INTERVALS_DEFAULT
    if output is None and not json_mode and intervals is None:
        count = timeline_text.columns(picture_columns())
    with ExitStack() as closing:
        history = closing.enter_context(ReplicaHistory.open(home, group))
        state = history.state()
        from_ns, to_ns = timelines.window(history, state, asked[0], asked[1], time.time_ns())
        pace = _Pace(group, closing)
        found = timelines.timeline(history, state, names, from_ns, to_ns, count, pace.update)
    if output is not None:
        timeline_picture.write(found, output)
    if json_mode or output is None:
        emit(_data(found, output), json_mode, lambda _: timeline_text.render(found))
    else:
        print_rich(
            f"{output}: {group} from {format_instant(found.from_ns)} "
            f"to {format_instant(found.to_ns)}"
        )


class _Pace:
    """Progress, once enough segments have been read for the first time that somebody waits."""

    QUIET_SECONDS = 2.0

    def __init__(self, group: str, closing: ExitStack) -> None:
        self._label = f"statistics of {group}'s segments"
        self._closing = closing
        self._began = time.monotonic()
        self._read_bytes = 0
        self._update: Pace | None = None

    def update(self, size_bytes: int) -> None:
        self._read_bytes += size_bytes
        if time.monotonic() - self._began < self.QUIET_SECONDS:
            return
        if self._update is None:
            self._update = self._closing.enter_context(progress(self._label, None))
        self._update(self._read_bytes)


def _data(found: Timeline, output: Path | None) -> dict[str, Any]:
    edges = found.bins.edges.tolist()
    changed = found.bins.changed_bytes().tolist()
    exact = found.bins.changed_is_exact().tolist()
    sums = {name: values.tolist() for name, values in found.bins.sums.items()}
    return {
        "group": found.group,
        "disks": list(found.disks),
        "from": format_instant(found.from_ns),
        "from_ns": found.from_ns,
        "to": format_instant(found.to_ns),
        "to_ns": found.to_ns,
        "interval_seconds": found.interval_seconds,
        "intervals": [
            {"from_ns": edges[at], "to_ns": edges[at + 1]}
            | {name: values[at] for name, values in sums.items()}
            | {"changed_bytes": changed[at], "changed_exact": exact[at]}
            for at in range(len(edges) - 1)
        ],
        "checkpoints": [
            {
                "name": row.name,
                "at": format_instant(row.at_ns),
                "at_ns": row.at_ns,
                "kind": row.kind,
                "kept": row.kept,
            }
            for row in found.checkpoints
        ],
        "gaps": [
            {"disk": gap.disk, "from_ns": gap.from_ns, "to_ns": gap.to_ns, "open": gap.is_open}
            for gap in found.gaps
        ],
        "thinned": [
            {
                "from_ns": one.from_ns,
                "to_ns": one.to_ns,
                "step_seconds": one.step_ns / NANOSECONDS_PER_SECOND,
            }
            for one in found.thinned
        ],
        "damaged": [
            {"from_ns": one.from_ns, "to_ns": one.to_ns, "why": one.why} for one in found.damaged
        ],
        "output": None if output is None else str(output),
    }
