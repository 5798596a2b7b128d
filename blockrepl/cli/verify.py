"""``verify``: what the scrub has proven, on either side, and a pass now.

==========================  ====================================================
home                        asks
==========================  ====================================================
has the group's replica     the running receiver, else its files
otherwise, has a source     the agent, and through it the receiver
==========================  ====================================================

A pass that was asked for is over when every disk that was asked has ended one that began after the
asking: the receiver asks all sources that are there, a source its own disks. The exit status is 1
when something differs that is not healed, or cannot be compared.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from blockrepl.cli.checkpoint import agent_client, is_replica, receiver_client
from blockrepl.cli.output import (
    emit,
    human_seconds,
    json_option,
    pass_home,
    progress,
    table,
)
from blockrepl.cli.point import complete_group
from blockrepl.cli.waiting import check_working, find_group
from blockrepl.errors import StateError
from blockrepl.services.control_client import ControlClient
from blockrepl.units import format_bytes, format_instant

Proofs = list[dict[str, Any]]
FOUND_SHOWN = 20  # of a disk; all of them with --json
LOOK_SECONDS = 0.5
LOOK_UP_SECONDS = 1.0  # without progress, until the status is asked why
PATIENCE_SECONDS = 60.0  # with a pass that does not get on; a region is read again within 16


@click.command(
    epilog="Examples: blockrepl verify web;  blockrepl verify web --now;  "
    "blockrepl verify web --json"
)
@click.argument("group", shell_complete=complete_group)
@click.option("--now", is_flag=True, help="Begin a pass of all disks, and wait for its end.")
@json_option
@pass_home
def verify(home: Path, group: str, now: bool, json_mode: bool) -> int:
    """Show what has been proven of GROUP's replica, how long ago, and what was found to differ.

    The agent reads its disks in the background and has the receiver compare each piece with its own
    content at that very instant. What differs is sent again at once; the history before stays, and
    the table says from when to when which bytes of it are not to be trusted.

    With --now, Ctrl-C leaves the pass running. Exit status 1: something differs and is not healed,
    a disk cannot be compared, or the pass has not got on for a minute.
    """
    is_here = is_replica(home, group)
    client = receiver_client(home) if is_here else agent_client(home)
    path = f"/verify/{group}"
    proofs = _pass_now(client, path, group) if now else _proofs(home, client, path, group, is_here)
    emit(proofs, json_mode, _render)
    return 1 if any(disk["mismatches"] or disk.get("unreadable") for disk in proofs) else 0


def _proofs(home: Path, client: ControlClient, path: str, group: str, is_here: bool) -> Proofs:
    try:
        return list(client.get(path))
    except StateError as error:
        if error.code != "not-running" or not is_here:
            raise
    from blockrepl.services.verification import proofs_at_rest

    return [one.model_dump() for one in proofs_at_rest(home, group, time.time_ns())]


def _pass_now(client: ControlClient, path: str, group: str) -> Proofs:
    asked: Proofs = client.post(path)
    before = {disk["disk"]: _began(disk) for disk in asked}
    over: set[str] = set()  # for good: a later pass of such a disk does not matter
    seen, since = None, time.monotonic()
    try:
        with progress(f"verifying {group}", sum(disk["size_bytes"] for disk in asked)) as tell:
            while True:
                proofs: Proofs = client.get(path)
                asked = [disk for disk in proofs if disk["disk"] in before]
                over |= {one["disk"] for one in asked if _is_over(one, before[one["disk"]])}
                waiting = [disk for disk in asked if disk["disk"] not in over]
                tell(
                    sum(disk["size_bytes"] for disk in asked if disk["disk"] in over)
                    + sum(_done_bytes(disk, before[disk["disk"]]) for disk in waiting)
                )
                if not waiting:
                    return proofs
                if _passes(waiting) != seen:
                    seen, since = _passes(waiting), time.monotonic()
                elif time.monotonic() > since + LOOK_UP_SECONDS:
                    check_working(
                        find_group(client, group),
                        f"the pass of group {group} does not get on",
                        "a pass that has begun goes on when that is solved",
                    )
                if time.monotonic() > since + PATIENCE_SECONDS:
                    raise StateError(
                        f"the pass of group {group} has not got on for {PATIENCE_SECONDS:g} s",
                        hint="is its source connected? See `blockrepl status`; a pass that has "
                        "begun goes on when it is",
                        code="stalled",
                    )
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        print(f"the pass goes on; see: blockrepl verify {group}", file=sys.stderr)
        raise


def _passes(proofs: Proofs) -> list[Any]:
    return [disk["scrub"] for disk in proofs]


def _began(disk: dict[str, Any]) -> int | None:
    return disk["scrub"]["started_ns"] if disk["scrub"] else None


def _is_new(disk: dict[str, Any], before: int | None) -> bool:
    """Whether its pass began after the asking; also one that nobody asked for, behind a restart."""
    return _began(disk) not in (None, before)


def _is_over(disk: dict[str, Any], before: int | None) -> bool:
    return _is_new(disk, before) and disk["scrub"]["ended_ns"] is not None


def _done_bytes(disk: dict[str, Any], before: int | None) -> int:
    if not _is_new(disk, before):
        return 0
    return int(disk["scrub"]["progress"] * disk["size_bytes"])


def _render(proofs: Proofs) -> Any:
    from rich.console import Group
    from rich.text import Text

    rows = [
        [
            disk["disk"],
            format_bytes(disk["size_bytes"]),
            f"{disk['covered_bytes'] * 100 // disk['size_bytes']}%",
            "never" if disk["age_seconds"] is None else f"{human_seconds(disk['age_seconds'])} ago",
            str(disk["mismatches"]),
            pass_text(disk["scrub"]),
        ]
        for disk in proofs
    ]
    headers = ["disk", "size", "proven", "oldest proof", "mismatches", "pass"]
    parts: list[Any] = [table(headers, rows, right="size proven mismatches")]
    for disk in proofs:
        found = _merged(disk["found"])
        parts += [_found(disk["disk"], one) for one in found[:FOUND_SHOWN]]
        if (more := len(found) - FOUND_SHOWN) > 0:
            parts.append(Text(f"disk {disk['disk']}: and {more} more; see --json", "bold red"))
        if unreadable := disk.get("unreadable"):  # a receiver of before says nothing of it
            parts.append(Text(unreadable, "bold red"))
    return Group(*parts) if len(parts) > 1 else Group(parts[0], Text("nothing is known to differ"))


def _merged(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What lies side by side and differed, was proven and healed at the same times, as one."""
    merged: list[dict[str, Any]] = []
    for one in sorted(found, key=lambda one: (one["at_ns"], one["start"])):
        last = merged[-1] if merged else {}
        alike = all(last.get(name) == one[name] for name in ("at_ns", "proven_ns", "healed_ns"))
        if alike and last["start"] + last["length"] == one["start"]:
            last["length"] += one["length"]
        else:
            merged.append(dict(one))
    return merged


def _found(disk: str, found: dict[str, Any]) -> Any:
    from rich.text import Text

    last = found["start"] + found["length"] - 1
    proven = found["proven_ns"]
    since = "never proven before" if proven is None else f"proven last {format_instant(proven)}"
    line = Text(f"disk {disk}: bytes {found['start']} to {last} differed at {found['at']}; {since}")
    if found["healed_ns"] is None:
        return line.append("; not healed yet", "bold red")
    return line.append(f"; healed {format_instant(found['healed_ns'])}")


def pass_text(told: dict[str, Any] | None) -> str:
    """A scrub pass in a few words."""
    if told is None:
        return ""
    skipped = f", {told['skipped_regions']} MiB busy" if told["skipped_regions"] else ""
    if told["ended_ns"] is not None:
        return f"done{skipped}"
    rate = format_bytes(int(told["bytes_per_second"]))
    return f"{int(told['progress'] * 100)}% at up to {rate}/s{skipped}"
