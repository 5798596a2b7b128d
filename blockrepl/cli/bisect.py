"""``bisect``: the last good instant, by running a command against forks of points in between."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blockrepl.cli.output import emit, human_seconds, json_option, pass_home
from blockrepl.cli.point import complete_group, complete_point
from blockrepl.errors import UsageError
from blockrepl.model import points
from blockrepl.units import format_instant

if TYPE_CHECKING:
    from blockrepl.storage.cuts import Record
    from blockrepl.storage.history import ReplicaHistory
    from blockrepl.views.bisect import Answer, Search, Told

KINDS = {0: "write", 1: "zero", 2: "trim"}


@click.command(
    epilog="Examples: blockrepl bisect web --good -1d --bad latest -- "
    'sh -c \'e2fsck -fy "$BLOCKREPL_IMAGE_ROOT" >/dev/null; e2fsck -fn "$BLOCKREPL_IMAGE_ROOT"\';  '
    "blockrepl bisect web --resume"
)
@click.argument("group", shell_complete=complete_group)
@click.option("--good", metavar="POINT", shell_complete=complete_point, help="It was good then.")
@click.option("--bad", metavar="POINT", shell_complete=complete_point, help="It was bad then.")
@click.option(
    "--disk", "names", metavar="DISK", multiple=True, help="Look at this disk (or these) alone."
)
@click.option("--check-ends", is_flag=True, help="Try the two points first: two probes more.")
@click.option("--resume", is_flag=True, help="Go on with the last one of the group.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@json_option
@pass_home
def bisect(
    home: Path,
    group: str,
    good: str | None,
    bad: str | None,
    names: tuple[str, ...],
    check_ends: bool,
    resume: bool,
    command: tuple[str, ...],
    json_mode: bool,
) -> None:
    """Find the write that made GROUP bad: run COMMAND for one instant after the other.

    COMMAND gets a writable fork of each instant, thrown away afterwards. It ends with 0 where all
    is good, 1 to 124 where it is bad, 125 where it cannot say. In its environment are
    BLOCKREPL_IMAGE_<DISK> for each disk (upper case, _ for other characters), BLOCKREPL_IMAGE when
    there is one disk, BLOCKREPL_DIR, BLOCKREPL_GROUP, BLOCKREPL_AT and BLOCKREPL_AT_NS.

    What is found is the last good instant and the first bad record. Twice as many writes in between
    take one probe more: a million take 20.
    """
    from blockrepl.storage.history import ReplicaHistory
    from blockrepl.views import bisect as bisects

    with ReplicaHistory.open(home, group) as history:
        if resume:
            if good or bad or names or check_ends:
                raise UsageError(
                    "--resume goes on with what was asked for then",
                    hint="leave --good, --bad, --disk and --check-ends out",
                )
            search = bisects.load(history.directory, group)
            search.command = list(command) or search.command
        else:
            search = _begin(history, good, bad, names, check_ends, command)
        _tell_begin(search)
        try:
            answer = bisects.run(home, history, search, _tell_probe)
        except KeyboardInterrupt:
            print(f"to go on: blockrepl bisect {group} --resume", file=sys.stderr)
            raise
    emit(_data(group, answer), json_mode, _text)


def _begin(
    history: ReplicaHistory,
    good: str | None,
    bad: str | None,
    names: tuple[str, ...],
    check_ends: bool,
    command: tuple[str, ...],
) -> Search:
    from blockrepl.views.bisect import Search

    if good is None or bad is None or not command:
        raise UsageError(
            "bisect needs a good point, a bad one and a command",
            hint="bisect GROUP --good POINT --bad POINT -- COMMAND; or --resume",
        )
    state, now_ns = history.state(), time.time_ns()
    ends = [history.resolve(points.parse(text), now_ns, state).at_ns for text in (good, bad)]
    if ends[0] >= ends[1]:
        raise UsageError(
            f"the good point ({format_instant(ends[0])}) is not before the bad one "
            f"({format_instant(ends[1])})",
            hint="to find what made it good again, let the command say the opposite",
        )
    return Search(ends[0], ends[1], list(names), list(command), check_ends)


def _tell_begin(search: Search) -> None:
    tried = f", {len(search.results)} probes done" if search.results else ""
    print(
        f"bisect from {format_instant(search.good_ns)} to {format_instant(search.bad_ns)}{tried}",
        file=sys.stderr,
    )


def _tell_probe(told: Told) -> None:
    rest = f"; {told.left // 2} writes are left" if told.left else ""
    print(
        f"probe {told.number}: {format_instant(told.at_ns)} is {told.outcome.value} "
        f"(status {told.status}, {human_seconds(told.seconds)}){rest}",
        file=sys.stderr,
        flush=True,
    )


def _data(group: str, answer: Answer) -> dict[str, Any]:
    found = answer.found
    return {
        "group": group,
        "exact": answer.is_exact,
        "last_good": format_instant(found.good_ns),
        "last_good_ns": found.good_ns,
        "first_bad": format_instant(found.bad_ns),
        "first_bad_ns": found.bad_ns,
        "last_good_record": _record(answer, answer.good[-1]) if answer.good else None,
        "first_bad_records": [_record(answer, each) for each in answer.bad],
        "first_bad_records_count": answer.bad_count,
        "after_gap": answer.is_after_gap,
        "probes": answer.probes,
        "skipped": [format_instant(at_ns) for at_ns in found.skipped],
    }


def _record(answer: Answer, record: Record) -> dict[str, Any]:
    return {
        "disk": answer.disks[record.disk],
        "offset": record.offset,
        "length": record.length,
        "kind": KINDS[record.kind & 3],
        "at": format_instant(record.at_ns),
        "at_ns": record.at_ns,
        "segment": record.segment,
        "frame": record.frame,
    }


def _text(data: dict[str, Any]) -> str:
    lines = [f"last good: {data['last_good']}"]
    if data["last_good_record"]:
        lines.append(f"  {_line(data['last_good_record'])}")
    lines.append(f"first bad: {data['first_bad']}")
    lines += [f"  {_line(record)}" for record in data["first_bad_records"]]
    more = data["first_bad_records_count"] - len(data["first_bad_records"])
    if more:
        lines.append(f"  ... and {more} more records")
    if data["after_gap"]:
        lines.append("history has a gap just before it: what was lost there may be the cause")
    if data["skipped"]:
        lines.append(f"{len(data['skipped'])} instants between the two could not be judged")
    lines.append(f"{data['probes']} probes")
    return "\n".join(lines)


def _line(record: dict[str, Any]) -> str:
    return (
        f"{record['kind']} of {record['length']} bytes at {record['offset']} of {record['disk']}, "
        f"{record['at']}"
    )
