"""What a benchmark row says, and how rows are summed up, shown and written.

A row compares medians of interleaved rounds. ``build/bench.json`` is ``{"rows": [row, ...]}``:

===========  =======================================================================================
key          meaning
===========  =======================================================================================
name         of the row, as ``make bench ROWS=`` takes it
ours         median of our rounds, in ``unit``; null: not measured
unit         of ``ours`` and ``peer_value``
peer         what it is compared with; null: the goal is absolute
peer_value   median of the peer's rounds; null: no peer, or not measured
ratio        ``ours / peer_value``; null unless both were measured
goal         ``"<= N"`` or ``">= N"``: of ``ratio`` where there is a peer, of ``ours`` where not
met          whether the goal was reached; null: not measured, or the row needs a later issue
low, high    least and greatest of what the goal is about: the ratio of each pair of neighbouring
             rounds where there is a peer, our rounds where not
needs        only on rows that wait for a later issue: its title. Never counted as met
note         only where something must be known to read the row: a gap, a failure, how it was taken
===========  =======================================================================================

A row whose measurement failed is absent, and the benchmark ends with status 1.

The ratio of two medians lies between the least and the greatest ratio of the pairs, so ``low <=
ratio <= high`` always holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel
from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """A bound: at most or at least ``value``."""

    direction: Literal["<=", ">="]
    value: float

    def met(self, measured: float) -> bool:
        return measured <= self.value if self.direction == "<=" else measured >= self.value

    def __str__(self) -> str:
        return f"{self.direction} {self.value:g}"


class Row(BaseModel):
    """One line of the report; the module docstring is its contract."""

    name: str
    ours: float | None
    unit: str
    peer: str | None
    peer_value: float | None
    ratio: float | None
    goal: str
    met: bool | None
    low: float | None
    high: float | None
    needs: str | None = None
    note: str | None = None


def summarise(
    name: str,
    unit: str,
    goal: Goal,
    ours: Sequence[float],
    *,
    peer: str | None = None,
    theirs: Sequence[float] = (),
    needs: str | None = None,
    notes: Sequence[str] = (),
) -> Row:
    """Sum up the rounds of one row; ``ours`` and ``theirs`` in round order, either may be empty.

    A row with a ``peer`` is judged by its ratio, one without by our median.
    """
    if ours and theirs and len(ours) != len(theirs):
        raise ValueError(f"{name}: {len(ours)} rounds of ours, {len(theirs)} of {peer}")
    our_median = median(ours) if ours else None
    their_median = median(theirs) if theirs else None
    ratio = None
    judged: list[float] = []
    if peer is None:
        judged = list(ours)
    elif our_median is not None and their_median:
        ratio = our_median / their_median
        judged = [mine / other for mine, other in zip(ours, theirs, strict=True) if other]
    value = our_median if peer is None else ratio
    return Row(
        name=name,
        ours=our_median,
        unit=unit,
        peer=peer,
        peer_value=their_median,
        ratio=ratio,
        goal=str(goal),
        met=None if needs or value is None else goal.met(value),
        low=min(judged, default=None),
        high=max(judged, default=None),
        needs=needs,
        note="; ".join(notes) or None,
    )


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Replace ``path`` with the rows, whole or not at all."""
    records = [row.model_dump() for row in rows]
    for record in records:
        for optional in ("needs", "note"):
            if record[optional] is None:
                del record[optional]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps({"rows": records}, indent=2) + "\n")
    os.replace(temporary, path)


def figure(value: float | None) -> str:
    """Three digits that matter, thousands apart."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def verdict(row: Row) -> str:
    if row.needs:
        return "[dim]later[/dim]"
    if row.met is None:
        return "[yellow]not measured[/yellow]"
    return "[green]met[/green]" if row.met else "[red]missed[/red]"


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows for a human's eyes; notes and needs follow as captions."""
    shown = Table(title=title, title_justify="left", caption_justify="left")
    shown.add_column("row", no_wrap=True)
    for heading in ("ours", "peer", "ratio", "range", "goal"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("compared with")
    shown.add_column("verdict", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.name,
            f"{figure(row.ours)} {row.unit}",
            figure(row.peer_value),
            figure(row.ratio),
            "-" if row.low is None else f"{figure(row.low)} .. {figure(row.high)}",
            row.goal,
            row.peer or "-",
            verdict(row),
        )
    return shown


def remarks(rows: Sequence[Row]) -> list[str]:
    """One line for each row that waits for a later issue or must be read with care."""
    lines = []
    for row in rows:
        if row.needs:
            lines.append(f'{row.name}: needs the later issue "{row.needs}", not counted')
        if row.note:
            lines.append(f"{row.name}: {row.note}")
    return lines


def tally(rows: Sequence[Row]) -> str:
    counted = [row for row in rows if row.met is not None]
    met = sum(1 for row in counted if row.met)
    later = sum(1 for row in rows if row.needs)
    missing = len(rows) - len(counted) - later
    text = f"{met} of {len(counted)} goals met"
    if later:
        text += f", {later} rows need a later issue"
    if missing:
        text += f", {missing} not measured"
    return text
