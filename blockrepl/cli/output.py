"""How commands print: data as JSON or as rich tables, quantities in human units, progress.

=================  ================================================  =======================
what               where to                                          when
=================  ================================================  =======================
JSON               stdout, one document                              ``--json``
tables and text    stdout                                            otherwise
progress           stderr: a bar on a terminal, else a line a tenth  always
=================  ================================================  =======================
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import click

from blockrepl.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

Data = TypeVar("Data")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")
Command = TypeVar("Command", bound=Callable[..., object])

PIPE_COLUMNS = 1 << 20  # more than any line has: into a pipe none is folded
PICTURE_COLUMNS = 200  # of what is drawn into a pipe
COLUMN_GAP = 3  # between the columns of a table
FOLDED_COLUMNS_MIN = 16  # a column that may be folded can be read with so much
PROGRESS_LINES_MAX = 10  # without a terminal: a line a tenth, not a line a chunk
PROGRESS_UNKNOWN_SECONDS = 10.0  # without a total: a line every so often


def default_home() -> Path:
    """Where state is kept when nobody says where."""
    if os.geteuid() == 0:
        return Path("/var/lib/blockrepl")
    data = os.environ.get("XDG_DATA_HOME", "")
    base = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return base / "blockrepl"


@dataclass
class Invocation:
    """What all commands of one command line share (click's ``ctx.obj``)."""

    home: Path = field(default_factory=default_home)


def pass_home(
    function: Callable[Concatenate[Path, Parameters], Result],
) -> Callable[Parameters, Result]:
    """Pass the home directory as a command's first argument."""

    @click.pass_obj
    def with_home(
        invocation: Invocation, /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        return function(invocation.home, *args, **kwargs)

    with_home.__name__ = function.__name__
    with_home.__doc__ = function.__doc__
    return with_home


def json_option(function: Command) -> Command:
    """Add ``--json``; the command receives ``json_mode: bool``."""
    return click.option("--json", "json_mode", is_flag=True, help="Print JSON.")(function)


def emit(data: Data, json_mode: bool, render: Callable[[Data], RenderableType]) -> None:
    """Print ``data`` as JSON, or what ``render`` makes of it."""
    if json_mode:
        print(json.dumps(data, default=_plain))
    else:
        print_rich(render(data))


def print_rich(renderable: RenderableType) -> None:
    """Print text (as it is) or a rich renderable on stdout."""
    if isinstance(renderable, str):
        print(renderable)
    else:
        console().print(renderable)


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr that does not fold lines into a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_COLUMNS
    return Console(stderr=stderr, width=width, highlight=False)


def picture_columns() -> int:
    """How wide to draw what takes all of a line."""
    return console().width if sys.stdout.isatty() else PICTURE_COLUMNS


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "", whole: str = ""
) -> Table:
    """A plain table. ``right`` names the right-aligned columns: their headers, space-separated.

    They and those of ``whole`` are never folded; such a header is one word. Cells are text, never
    markup.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    result = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for header in headers:
        if header in right.split():
            result.add_column(Text(header), justify="right", no_wrap=True)
        elif header.strip() in whole.split():
            result.add_column(Text(header), no_wrap=True)
        else:
            result.add_column(Text(header), overflow="fold")
    for row in rows:
        result.add_row(*(Text(cell) for cell in row))
    return result


@dataclass
class FittingTable:
    """A `table` without the columns of ``least`` that it has no room for; its first goes first."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: str
    whole: str
    least: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        shown = list(range(len(self.headers)))
        for name in self.least.split():
            if self._columns(shown) <= options.max_width:
                break
            shown = [place for place in shown if self.headers[place] != name]
        yield table(
            [self.headers[place] for place in shown],
            [[row[place] for place in shown] for row in self.rows],
            right=self.right,
            whole=self.whole,
        )

    def _columns(self, shown: list[int]) -> int:
        """How much room those columns want."""
        from rich.cells import cell_len

        wanted = COLUMN_GAP * (len(shown) - 1)
        for place in shown:
            longest = max(cell_len(row[place]) for row in (self.headers, *self.rows))
            is_folded = self.headers[place].strip() not in f"{self.right} {self.whole}".split()
            wanted += min(longest, FOLDED_COLUMNS_MIN) if is_folded else longest
        return wanted


LEVEL_COLOURS = {"ok": "", "warning": "yellow", "error": "bold red"}


def human_seconds(seconds: float) -> str:
    """A duration to two units: ``12 ms``, ``1.25 s``, ``3 m 20 s``, ``2 h 5 m``, ``8 d 1 h``."""
    if seconds < 0:
        return f"-{human_seconds(-seconds)}"
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for unit, size, below, below_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if whole >= size:
            rest = whole % size // below_size
            return f"{whole // size} {unit} {rest} {below}" if rest else f"{whole // size} {unit}"
    raise AssertionError("a minute or more has a unit")


@contextmanager
def progress(label: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr. Yields a function that takes the bytes done so far (not a delta)."""
    if not sys.stderr.isatty():
        yield _line_progress(label, total_bytes)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
    ) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda done_bytes: bar.update(task, completed=done_bytes)


def _line_progress(label: str, total_bytes: int | None) -> Callable[[int], None]:
    shown_tenth = -1
    shown_at = time.monotonic()

    def update(done_bytes: int) -> None:
        nonlocal shown_tenth, shown_at
        if total_bytes:
            tenth = done_bytes * PROGRESS_LINES_MAX // total_bytes
            if tenth > shown_tenth:
                shown_tenth = tenth
                done, total = format_bytes(done_bytes), format_bytes(total_bytes)
                share = done_bytes * 100 // total_bytes
                print(f"{label}: {share}% ({done} of {total})", file=sys.stderr)
        elif time.monotonic() - shown_at >= PROGRESS_UNKNOWN_SECONDS:
            shown_at = time.monotonic()
            print(f"{label}: {format_bytes(done_bytes)}", file=sys.stderr)

    return update


def _plain(value: object) -> object:
    """What json cannot write by itself: pydantic's models and paths."""
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
