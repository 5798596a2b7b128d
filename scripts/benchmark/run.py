"""The benchmark's command: which rows to run, and what it ends with.

Usage: ``scripts/bench.py [ROW ...] [--rounds N] [--seconds S] [--peers-only]``. A ROW is a name or
its beginning (``lag`` is lag_p50 and lag_p99); several are separated by spaces or commas.

======  ==========================================================================================
status  when
======  ==========================================================================================
0       all rows asked for were measured, whether their goals were met or not: this is no test
1       a measurement failed: one line on stderr for each, the other rows stand
2       wrong usage: no such row
130     Ctrl-C (143: terminated); nothing is left behind then either
======  ==========================================================================================
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from scripts.benchmark import memory_rows, stream_rows, view_rows, write_rows
from scripts.benchmark.bench import Bench
from scripts.benchmark.processes import MeasurementError, scratch
from scripts.benchmark.report import Row, remarks, table, tally, write_json

BUILD = Path(__file__).resolve().parent.parent.parent / "build"
PIPE_WIDTH_COLUMNS = 160


@dataclass(frozen=True)
class Scenario:
    """One measurement and the rows it yields."""

    rows: tuple[str, ...]
    measure: Callable[[Bench], list[Row]]


# In this order: the network goes down after the rows that want an unbroken history, and memory
# is last since it sums up what all before it made the processes hold.
SCENARIOS = (
    Scenario(("write_latency_depth1",), write_rows.write_latency_depth1),
    Scenario(("write_iops_depth16_replicating",), write_rows.replicating),
    Scenario(("sustained_replication",), stream_rows.sustained_replication),
    Scenario(
        ("lag_p50", "lag_p99", "journal_overhead", "index_bytes_per_record"),
        stream_rows.lag_and_journal,
    ),
    Scenario(("open_point", "point_growth", "memory_view"), view_rows.open_point),
    Scenario(("merge_ingest",), view_rows.merge_ingest),
    *(
        Scenario(view_rows.view_names(history), partial(view_rows.views, history))
        for history in (view_rows.SETTLED, view_rows.SCATTERED)
    ),
    Scenario(
        ("write_iops_depth16_network_down", "write_iops_depth16_network_down_qemu_nbd"),
        write_rows.network_down,
    ),
    Scenario(("memory_server", "memory_agent", "memory_receiver"), memory_rows.memory),
)
ROWS = tuple(name for scenario in SCENARIOS for name in scenario.rows)


def chosen_rows(words: Sequence[str]) -> list[str]:
    """The rows that the words name, in the order they run; all when there are no words.

    ValueError for a word that begins no row's name.
    """
    wanted = [name for word in words for name in word.split(",") if name]
    for name in wanted:
        if not any(row.startswith(name) for row in ROWS):
            raise ValueError(f"no row is called {name!r}; rows: {', '.join(ROWS)}")
    return [row for row in ROWS if not wanted or any(row.startswith(name) for name in wanted)]


def measure(bench: Bench, names: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Run the scenarios that yield the named rows: the rows, and a line for each that failed."""
    rows: list[Row] = []
    failures: list[str] = []
    for scenario in SCENARIOS:
        asked = [name for name in scenario.rows if name in names]
        if not asked:
            continue
        bench.progress(", ".join(asked))
        try:
            rows += [row for row in scenario.measure(bench) if row.name in asked]
        except (MeasurementError, OSError) as error:
            failures.append(f"{', '.join(asked)}: {error}")
    return rows, failures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Measure blockrepl against its peers on this machine."
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of load in each turn (3)")
    parser.add_argument("--image-mib", type=int, default=1024, help="size of each image (1024)")
    parser.add_argument(
        "--records", type=int, default=10_000_000, help="of the longest journal (10 million)"
    )
    parser.add_argument("--peers-only", action="store_true", help="leave blockrepl out")
    parser.add_argument("--output", type=Path, default=BUILD / "bench.json", help="the JSON file")
    return parser


def _title(options: argparse.Namespace, load: float) -> str:
    return (
        f"blockrepl against its peers: medians of {options.rounds} interleaved rounds of "
        f"{options.seconds:g} s, {os.cpu_count()} processors, load {load:.1f} at the start"
    )


def run(arguments: Sequence[str]) -> int:
    """Run the benchmark; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        names = chosen_rows(options.rows)
        if options.rounds < 1 or options.seconds <= 0 or options.image_mib < 1:
            raise ValueError("rounds, seconds and image size are at least 1")
        if options.records < 10:
            raise ValueError("a journal and a tenth of it: at least 10 records")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    load = os.getloadavg()[0]
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        with scratch(BUILD) as place, ExitStack() as stack:
            bench = Bench(
                place,
                stack,
                options.rounds,
                options.seconds,
                options.image_mib << 20,
                options.records,
                options.peers_only,
                lambda text: print(f"  {text}", file=sys.stderr, flush=True),
            )
            rows, failures = measure(bench, names)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    write_json(options.output, rows)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH_COLUMNS, highlight=False)
    console.print(table(rows, _title(options, load)))
    for line in remarks(rows):
        console.print(f"  {line}", markup=False)
    console.print(f"{tally(rows)}; {options.output}", markup=False)
    for line in failures:
        print(f"error: not measured: {line}", file=sys.stderr)
    return 1 if failures else 0


def _terminated(number: int, _frame: object) -> None:
    """SIGTERM unwinds like an exit, so that everything is cleaned up."""
    sys.exit(128 + number)
