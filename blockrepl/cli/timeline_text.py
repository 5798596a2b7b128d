"""A timeline as text: a row a metric, a column an interval, a time axis below.

A column's height is its share of the row's greatest value, which stands behind the row; whatever is
not nothing shows at least as the lowest block. In the row ``history`` a column says the worst that
befell its interval: ``×`` damage, ``·`` a gap, ``▒`` thinned, ``█`` every write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from blockrepl.cli.output import human_seconds
from blockrepl.model.time_axis import marks
from blockrepl.units import format_bytes, format_instant
from blockrepl.views.timeline import Rates, Timeline

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

LABEL_COLUMNS = 12
SCALE_COLUMNS = 17
COLUMNS_MIN = 10  # however narrow the terminal
MARK_COLUMNS = 14  # of the time axis, for each of its marks
LISTED_MAX = 12  # checkpoints, gaps and damage below the picture; --json has all
_BLOCKS = " ▁▂▃▄▅▆▇█"


def columns(width: int) -> int:
    """How many intervals are drawn in a terminal of that width."""
    return max(COLUMNS_MIN, width - LABEL_COLUMNS - SCALE_COLUMNS)


def render(timeline: Timeline) -> Group:
    """The rows are never folded; what stands above and below them is."""
    from rich.console import Group
    from rich.text import Text

    title = Text(_title(timeline), "bold")
    return Group(title, _rows(timeline), Text(_lists(timeline)))


def _rows(timeline: Timeline) -> Text:
    from rich.text import Text

    count = len(timeline.bins.edges) - 1
    text = Text(no_wrap=True, overflow="crop", end="")
    written = timeline.per_second("written_bytes")
    changed = timeline.bins.changed_bytes().astype(np.float64)
    flushes = timeline.per_second("flushes")
    about = "" if bool(timeline.bins.changed_is_exact().all()) else "~"
    for label, values, top, scale, style in (
        ("write rate", written, None, f"{format_bytes(round(_top(written)))}/s", "cyan"),
        ("changed", changed, None, about + format_bytes(int(_top(changed))), "green"),
        ("stored", timeline.stored_share(), 1.0, "100 % of written", "magenta"),
        ("flushes", flushes, None, f"{_top(flushes):.3g}/s", "yellow"),
    ):
        text.append(f"{label:<{LABEL_COLUMNS}}")
        text.append(_blocks(values, _top(values) if top is None else top), style)
        text.append(f" {scale}\n", "dim")
    text.append(f"{'checkpoints':<{LABEL_COLUMNS}}")
    text.append(_placed(timeline, [(row.at_ns, "▲") for row in timeline.checkpoints]) + "\n", "red")
    text.append(f"{'history':<{LABEL_COLUMNS}}")
    text.append(_history(timeline), "blue")
    text.append(f" {_legend(timeline)}\n".rstrip(" "), "dim")
    text.append(_axis(timeline, count), "dim")
    return text


def _title(timeline: Timeline) -> str:
    seconds = (timeline.to_ns - timeline.from_ns) / 1e9
    return (
        f"{timeline.group} ({', '.join(timeline.disks)})\n"
        f"{_instant(timeline.from_ns)} + {human_seconds(seconds)}, "
        f"{human_seconds(timeline.interval_seconds)} a column"
    )


def _instant(at_ns: int) -> str:
    """To the millisecond: it is read, not typed."""
    return format_instant(at_ns)[:23] + "Z"


def _top(values: Rates) -> float:
    return float(np.nanmax(values)) if not np.isnan(values).all() else 0.0


def _blocks(values: Rates, top: float) -> str:
    shares = np.nan_to_num(values) / (top or 1.0)
    heights = np.clip(np.ceil(shares * 8), 0, 8).astype(int)
    return "".join(_BLOCKS[height] for height in heights.tolist())


def _place(timeline: Timeline, at_ns: int) -> int:
    """The column of an instant."""
    edges = timeline.bins.edges
    found = int(np.searchsorted(edges, np.uint64(at_ns), side="left")) - 1
    return min(max(found, 0), len(edges) - 2)


def _placed(timeline: Timeline, signs: list[tuple[int, str]]) -> str:
    row = [" "] * (len(timeline.bins.edges) - 1)
    for at_ns, sign in signs:
        row[_place(timeline, at_ns)] = sign
    return "".join(row)


def _history(timeline: Timeline) -> str:
    row = ["█"] * (len(timeline.bins.edges) - 1)
    for sign, stretches in (
        ("▒", [(one.from_ns, one.to_ns) for one in timeline.thinned]),
        ("·", [(one.from_ns, one.to_ns) for one in timeline.gaps]),
        ("×", [(one.from_ns, one.to_ns) for one in timeline.damaged]),
    ):
        for from_ns, to_ns in stretches:
            first, last = _place(timeline, from_ns + 1), _place(timeline, to_ns)
            row[first : last + 1] = [sign] * (last + 1 - first)
    return "".join(row)


def _legend(timeline: Timeline) -> str:
    """Of what there is: at most as wide as a scale."""
    if timeline.damaged:
        return "× damaged"
    parts = ["▒ thinned"] if timeline.thinned else []
    return ", ".join(parts + (["· gap"] if timeline.gaps else []))


def _axis(timeline: Timeline, count: int) -> str:
    ticks, labels = [" "] * count, [" "] * (count + SCALE_COLUMNS)
    for at_ns, written in marks(timeline.from_ns, timeline.to_ns, max(1, count // MARK_COLUMNS)):
        place = _place(timeline, at_ns)
        ticks[place] = "╵"
        labels[place : place + len(written)] = written
    indent = " " * LABEL_COLUMNS
    return f"{indent}{''.join(ticks).rstrip()}\n{indent}{''.join(labels).rstrip()} UTC\n"


def _lists(timeline: Timeline) -> str:
    sums = timeline.bins.sums
    written, stored = int(sums["written_bytes"].sum()), int(sums["stored_bytes"].sum())
    share = f", stored as {stored * 100 / written:.0f} %" if written else ""
    lines = [
        f"{format_bytes(written)} in {sums['writes'].sum()} writes{share}; "
        f"{sums['flushes'].sum()} flushes"
    ]
    lines += _some([f"▲ {_instant(row.at_ns)} {row.name}" for row in timeline.checkpoints])
    lines += _some(
        [
            f"gap of {gap.disk}: {_instant(gap.from_ns)} + "
            f"{human_seconds((gap.to_ns - gap.from_ns) / 1e9)}"
            f"{', not ended' if gap.is_open else ''}"
            for gap in timeline.gaps
        ]
    )
    lines += _some([f"damaged: {one.why}" for one in timeline.damaged])
    return "\n".join(lines)


def _some(lines: list[str]) -> list[str]:
    if len(lines) <= LISTED_MAX:
        return lines
    return [*lines[:LISTED_MAX], f"... and {len(lines) - LISTED_MAX} more (--json has all)"]
