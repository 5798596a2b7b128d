"""``receiver check``: a store examined, and what is derived in it repaired."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from blockrepl.cli.output import emit, json_option, pass_home, progress, table
from blockrepl.cli.point import complete_group
from blockrepl.units import format_bytes, format_instant

if TYPE_CHECKING:
    from rich.table import Table

    from blockrepl.storage.check_findings import Finding

RANGES_SHOWN = 5  # of a finding; all of them with --json
_SEVERITIES = {
    "lost": "primary data: restore it from a copy, or live with what is named above",
    "derived": "can be made again: --repair",
    "leftover": "harmless; --repair removes what is ours",
}


@click.command()
@click.argument("groups", metavar="[GROUP]...", nargs=-1, shell_complete=complete_group)
@click.option("--repair", "repairing", is_flag=True, help="Make again what is derived.")
@json_option
@pass_home
def check(home: Path, groups: tuple[str, ...], repairing: bool, json_mode: bool) -> None:
    """Examine a store that no receiver is running on: every byte, index and row of it.

    Says what is lost, as the interval of instants and the ranges of each disk that cannot be read:
    everything else can. With --repair indexes are made again and leftovers removed; what the
    sources sent is never touched. The content of base images is not examined: `blockrepl verify`
    proves it.

    Exit status 1 when anything is lost, or derived and not repaired: until it is, reading may be
    refused.

    \b
    Examples:
      blockrepl receiver check
      blockrepl receiver check shop --repair
    """
    from blockrepl.services.checking import check as check_store
    from blockrepl.services.checking import replicas
    from blockrepl.storage.home import Home

    opened = Home.open(home)
    directories, total_bytes = replicas(opened, groups)
    with progress("checking", total_bytes) as tell:
        findings = check_store(opened, directories, repairing=repairing, progress=tell)
    if not json_mode:
        for one in findings:
            click.echo(_line(one))  # a line each, however long
    emit([one.as_json() for one in findings], json_mode, lambda _: _summary(findings))
    if any(one.severity != "leftover" and not one.repaired for one in findings):
        sys.stdout.flush()
        sys.exit(1)


def _summary(findings: list[Finding]) -> Table | str:
    if not findings:
        return "no damage found"
    rows = []
    for severity, meaning in _SEVERITIES.items():
        mine = [one for one in findings if one.severity == severity]
        repaired = sum(one.repaired for one in mine)
        if mine:
            rows.append([severity, str(len(mine)), str(repaired), meaning])
    return table(["severity", "found", "repaired", "meaning"], rows, right="found repaired")


def _line(one: Finding) -> str:
    place = one.file if one.offset is None else f"{one.file} at {one.offset}"
    parts = [f"{one.severity} {one.code}: {one.group} {place}: {one.what}"]
    if one.ranges:
        until = "now" if one.to_ns is None else format_instant(one.to_ns)
        since = "the beginning" if one.from_ns is None else format_instant(one.from_ns)
        size_bytes = sum(last - first for first, last in one.ranges)
        shown = ", ".join(f"{first}-{last}" for first, last in one.ranges[:RANGES_SHOWN])
        more = len(one.ranges) - RANGES_SHOWN
        more_text = f" and {more} more" if more > 0 else ""
        parts.append(
            f"disk {one.disk}, from {since} until {until}: {format_bytes(size_bytes)} "
            f"(bytes {shown}{more_text})"
        )
    elif one.severity == "lost":
        parts.append("no instant shows any of it" if one.disk else "")
    if one.repaired:
        parts.append("repaired")
    return "; ".join(part for part in parts if part)
