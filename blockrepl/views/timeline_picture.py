"""A timeline as a picture: PNG or SVG, four panels over one time axis, readable in print."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blockrepl.errors import UsageError
from blockrepl.model.time_axis import marks
from blockrepl.storage.statistics import Damaged
from blockrepl.units import GIB, KIB, MIB, NANOSECONDS_PER_SECOND
from blockrepl.views.export import replacing
from blockrepl.views.timeline import Gap, Rates, Thinned, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
INCHES = (11.0, 7.6)
DOTS_PER_INCH = 150
MARKS_MAX = 8
NAMES_MAX = 30  # checkpoints whose names are written; the lines are drawn for all
_GREY, _BLUE, _GREEN, _VIOLET, _ORANGE, _RED = (
    "#555555",
    "#1f5f9e",
    "#2a7f4f",
    "#7a4a9e",
    "#c46a00",
    "#b3261e",
)


def check_suffix(target: Path) -> None:
    """UsageError for a name that says no format."""
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{target.name} is neither a PNG nor an SVG file",
            hint="let the name end in .png or .svg",
        )


def write(timeline: Timeline, target: Path) -> None:
    """Draw to a file, which is there whole or not at all. OSError."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # It tells of its font cache, and of a home that it cannot write: neither is the user's concern.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # Text in an SVG stays text: it can be searched, and read without the font's outlines.
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "blockrepl",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "hatch.linewidth": 0.5,
        }
    ):
        figure = Figure(figsize=INCHES, layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, timeline)
        form = target.suffix.lower()[1:]
        with replacing(target) as temporary:
            figure.savefig(temporary, format=form, dpi=DOTS_PER_INCH, metadata=_metadata(form))


def _metadata(form: str) -> dict[str, Any]:
    return {"Software": "blockrepl"} if form == "png" else {"Creator": "blockrepl", "Date": None}


def _draw(figure: Figure, timeline: Timeline) -> None:
    panels: list[Axes] = list(figure.subplots(4, 1, sharex=True, height_ratios=[3, 2, 2, 2]))
    written = timeline.per_second("written_bytes")
    resynced = timeline.per_second("resynced_bytes")
    size, unit = _unit(written if written.any() else resynced)
    _steps(panels[0], timeline, written / size, _BLUE, "guest writes")
    if resynced.any():
        _steps(panels[0], timeline, resynced / size, _GREY, "sent again after a gap")
        if 0 < written.max() < resynced.max():
            # A resync is one instant, however much it sends: it must not flatten all else.
            panels[0].set_ylim(top=1.3 * float(written.max()) / size)
    panels[0].set_ylabel(f"write rate\n[{unit}/s]")
    changed = timeline.bins.changed_bytes().astype(np.float64)
    size, unit = _unit(changed)
    about = "" if timeline.bins.changed_is_exact().all() else " (estimated)"
    _steps(panels[1], timeline, changed / size, _GREEN, f"distinct 4 KiB blocks{about}")
    panels[1].set_ylabel(f"changed\nper interval\n[{unit}]")
    _steps(panels[2], timeline, timeline.stored_share() * 100, _VIOLET, "after compression")
    panels[2].set_ylabel("stored of\nwritten [%]")
    panels[2].set_ylim(0, 108)
    _steps(panels[3], timeline, timeline.per_second("flushes"), _ORANGE, "guest flushes")
    panels[3].set_ylabel("flushes\n[1/s]")
    for panel in panels:
        panel.set_ylim(0, max(panel.get_ylim()[1], 1e-9))
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        _stretches(panel, timeline)
        for place, row in enumerate(timeline.checkpoints):
            panel.axvline(
                _x(timeline, row.at_ns),
                color=_RED,
                linewidth=0.8,
                linestyle="--",
                label="checkpoint" if place == 0 else None,
            )
    _name_checkpoints(panels[0], timeline)
    _time_axis(panels[-1], timeline)
    _legend(figure, panels)
    figure.suptitle(_title(timeline), fontsize=10)


def _x(timeline: Timeline, at_ns: int) -> float:
    """Seconds from the window's begin: a double holds those to the nanosecond, not an instant."""
    return (at_ns - timeline.from_ns) / NANOSECONDS_PER_SECOND


def _unit(values: Rates) -> tuple[int, str]:
    top = float(np.nanmax(values, initial=0))
    return next(
        (each for each in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if top >= each[0]), (1, "B")
    )


def _steps(panel: Axes, timeline: Timeline, values: Rates, colour: str, label: str) -> None:
    edges = (timeline.bins.edges - timeline.bins.edges[0]).astype(np.float64)
    edges /= NANOSECONDS_PER_SECOND
    panel.stairs(np.nan_to_num(values), edges, color=colour, fill=True, alpha=0.35)
    panel.stairs(values, edges, color=colour, linewidth=1.0, label=label, baseline=None)


def _stretches(panel: Axes, timeline: Timeline) -> None:
    kinds: tuple[tuple[str, str, str, Sequence[Thinned | Gap | Damaged]], ...] = (
        ("thinned by retention", "#9a9a9a", "", timeline.thinned),
        ("gap", _RED, "///", timeline.gaps),
        ("damaged", "#000000", "xxx", timeline.damaged),
    )
    for label, colour, hatch, stretches in kinds:
        for place, one in enumerate(stretches):
            panel.axvspan(
                _x(timeline, one.from_ns),
                _x(timeline, one.to_ns),
                facecolor=colour,
                alpha=0.18,
                hatch=hatch,
                linewidth=0,
                label=label if place == 0 else None,
            )


def _name_checkpoints(panel: Axes, timeline: Timeline) -> None:
    """Above the first panel, leaning; where they would lie on one another, not all."""
    width = _x(timeline, timeline.to_ns)
    reached = -1.0
    for row in timeline.checkpoints:
        at = _x(timeline, row.at_ns)
        if at < reached:
            continue
        reached = at + width / NAMES_MAX
        panel.annotate(
            row.name,
            (at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(1, 3),
            textcoords="offset points",
            rotation=35,
            fontsize=7.5,
            color=_RED,
            annotation_clip=False,
        )


def _time_axis(panel: Axes, timeline: Timeline) -> None:
    found = marks(timeline.from_ns, timeline.to_ns, MARKS_MAX)
    panel.set_xticks([_x(timeline, at) for at, _ in found], [text for _, text in found])
    panel.set_xlim(0, _x(timeline, timeline.to_ns))
    begin = datetime.fromtimestamp(timeline.from_ns // NANOSECONDS_PER_SECOND, tz=timezone.utc)
    panel.set_xlabel(f"time [UTC], from {begin:%Y-%m-%d %H:%M:%S}")


def _legend(figure: Figure, panels: list[Axes]) -> None:
    entries = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False
    )


def _title(timeline: Timeline) -> str:
    what = f"{timeline.group} ({', '.join(timeline.disks)})"
    return f"{what}: what was written, in intervals of {timeline.interval_seconds:.3g} s"
