"""blockrepl status: state, lag, history and gaps of every group, on either side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import click

from blockrepl.cli.output import (
    LEVEL_COLOURS,
    console,
    emit,
    human_seconds,
    json_option,
    pass_home,
)
from blockrepl.units import format_bytes, format_instant

WATCH_SECONDS = 1.0
PINS_SHOWN = 3
COLOURS = {"replicating": "green", "error": "bold red", "disconnected": "red"}
Role = Literal["receiver", "source"]


@click.command()
@click.argument("group", required=False)
@click.option("--watch", is_flag=True, help="Refresh every second, until Ctrl-C.")
@click.option(
    "--role",
    type=click.Choice(["receiver", "source"]),
    help="Which side, where this home is both. [default: both; with --json the receiver]",
)
@json_option
@pass_home
def status(home: Path, group: str | None, watch: bool, role: Role | None, json_mode: bool) -> None:
    """Show the state of every GROUP: lag, history window, gaps, disks.

    Lag is how far the replica's durable history is behind now: the data one would lose.

    \b
    Examples:
      blockrepl status
      blockrepl status web --watch
      blockrepl status --json
    """
    if not watch:
        documents = _documents(home, group, role, json_mode)
        if json_mode:
            emit(documents[0], True, str)
        else:
            for document in documents:
                emit(document, False, _render)
        return
    while True:
        documents = _documents(home, group, role, json_mode)
        if json_mode:
            emit(documents[0], True, str)
        else:
            _show(documents)
        time.sleep(WATCH_SECONDS)


def _show(documents: list[dict[str, Any]]) -> None:
    screen = console()
    if screen.is_terminal:
        screen.clear()
    for document in documents:
        screen.print(_render(document))


def _documents(
    home: Path, group: str | None, role: Role | None, json_mode: bool
) -> list[dict[str, Any]]:
    """The status documents to show: one, or both of a home that is both."""
    from blockrepl.errors import StateError
    from blockrepl.storage.home import Home

    opened = Home.open(home)
    roles: list[Role] = []
    if (opened.receiver_directory / "receiver.json").exists():
        roles.append("receiver")
    if opened.source_directory.exists():
        roles.append("source")
    if role is not None:
        if role not in roles:
            raise StateError(f"the home {home} is no {role}'s", code="no-role")
        roles = [role]
    if not roles:
        raise StateError(
            f"the home {home} is neither a receiver's nor a source's yet",
            hint="run `blockrepl receiver init` or `blockrepl agent join TOKEN`",
            code="no-role",
        )
    if json_mode or len(roles) == 1:
        documents = [_document(opened, roles[0])]
    else:
        documents = [_document_or_problem(opened, one) for one in roles]
    if group is not None:
        known = {one["name"] for document in documents for one in document["groups"]}
        if group not in known:
            raise StateError(
                f"there is no group {group!r} here",
                hint=f"groups here: {', '.join(sorted(known)) or 'none'}",
                code="no-group",
            )
        for document in documents:
            document["groups"] = [one for one in document["groups"] if one["name"] == group]
    return documents


def _document_or_problem(home: Any, role: Role) -> dict[str, Any]:
    """Of a home that is both: one side that does not answer does not hide the other."""
    from blockrepl.errors import StateError

    try:
        return _document(home, role)
    except StateError as error:
        return {"role": role, "problem": str(error), "groups": []}


def _document(home: Any, role: Role) -> dict[str, Any]:
    from blockrepl.errors import StateError
    from blockrepl.services.control_client import ControlClient

    document: dict[str, Any]
    if role == "source":
        document = ControlClient(home.agent_socket, "agent").get("/status")
        return document
    try:
        document = ControlClient(home.receiver_socket, "receiver").get("/status")
    except StateError as error:
        if error.code != "not-running":
            raise
        from blockrepl.services.receiver_status import status_at_rest

        document = status_at_rest(home).model_dump()
    return document


def _render(document: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [_headline(document)]
    for group in document["groups"]:
        parts += [Text(), *_group(group, document["role"])]
    if not document["groups"]:
        parts.append(Text("no groups yet"))
    return Group(*parts)


def _headline(document: dict[str, Any]) -> Any:
    from rich.text import Text

    line = Text.assemble((f"{document['role']} {document.get('name', '')}", "bold"))
    if document.get("running") is False:
        line.append(" (not running: as it was left)", "red")
    if document.get("receiver"):
        connected = "connected to" if document.get("connected") else "not connected to"
        line.append(f", {connected} {document['receiver']}")
    limit = document.get("limit")
    if limit and limit["bytes_per_second"] is not None:
        line.append(f", {_limit(limit)}", "yellow" if limit["is_holding"] else "")
    if document.get("problem"):
        line.append(f": {document['problem']}", "red")
    return line


def _limit(limit: dict[str, Any]) -> str:
    text = f"limited to {format_bytes(limit['bytes_per_second'])}/s"
    if limit["until"] is not None:
        text += f" until {limit['until']}"
    return text + (", data is waiting for it" if limit["is_holding"] else "")


def _group(group: dict[str, Any], role: Role) -> list[Any]:
    from rich.text import Text

    state = group["state"]
    head = Text.assemble(("group ", ""), (group["name"], "bold"), "  ")
    head.append(state, COLOURS.get(state, "yellow"))
    lag = group["lag_seconds"]
    head.append(f"  lag {human_seconds(lag) if lag is not None else 'unknown'}")
    if (rate := group.get("received_bytes_per_second")) is not None:
        head.append(f"  {format_bytes(int(rate))}/s")
    lines = [head]
    if group.get("problem"):
        lines.append(Text(f"  {group['problem']}", "red"))
    lines.append(Text(f"  history {_history(group)}"))
    if group["journal_bytes"] is not None:
        lines.append(Text(f"  journal {format_bytes(group['journal_bytes'])}"))
    if outlook := group.get("retention"):
        lines += _outlook(outlook)
    if (spool := group.get("spool")) and spool["waiting_bytes"]:
        lines.append(Text(f"  spool {_spool(spool)}", "yellow"))
    for gap in group["gaps"]:
        lines.append(Text(f"  gap {_gap(gap)}", "yellow"))
    return [*lines, _disks(group["disks"], role)]


def _outlook(outlook: dict[str, Any]) -> list[Any]:
    """What is promised and held of history, by whom it is pinned, how long the room lasts."""
    from rich.text import Text

    held = outlook["held_seconds"]
    promise = f"  promised {human_seconds(outlook['promised_seconds'])}"
    promise += f", held {human_seconds(held)}" if held is not None else ""
    names = [pin["what"] for pin in outlook["pins"][:PINS_SHOWN]]
    if names:
        others = outlook["pin_count"] - len(names)
        promise += f", pinned by {', '.join(names)}" + (f" and {others} more" if others else "")
    days = outlook["days_left"]
    lasts = "" if days is None else f": {days:.1f} days at today's rate"
    lines = [Text(promise), Text(f"  room {format_bytes(outlook['free_bytes'])} free{lasts}")]
    if outlook["level"] != "ok":
        told = f"  {outlook['level'].upper()}: {outlook['reason']}"
        lines.append(Text(told, LEVEL_COLOURS[outlook["level"]]))
    return lines


def _spool(spool: dict[str, Any]) -> str:
    told = format_bytes(spool["waiting_bytes"])
    if spool["limit_bytes"] is not None:
        told += f" of {format_bytes(spool['limit_bytes'])}"
    if spool["drain_seconds"] is None:
        return f"{told}, not getting less"
    return f"{told}, drained in about {human_seconds(spool['drain_seconds'])}"


def _history(group: dict[str, Any]) -> str:
    if group["floor_ns"] is not None and group["latest_ns"] is not None:
        window = human_seconds((group["latest_ns"] - group["floor_ns"]) / 1e9)
        return f"{group['floor']} to {group['latest']} ({window})"
    if group["journal_bytes"] is not None:
        return "none yet: the first sync is not done"
    # A source that the receiver has not answered knows nothing of the history.
    if group["state"] in ("disconnected", "spooling"):
        return "unknown while disconnected"
    if group.get("problem"):
        return "unknown until that is solved"
    return "unknown: the receiver does not answer"


def _gap(gap: dict[str, Any]) -> str:
    begin = format_instant(gap["from_ns"])
    if gap["to_ns"] is None:
        return f"since {begin}"
    return f"from {begin} to {format_instant(gap['to_ns'])}"


def _disks(disks: list[dict[str, Any]], role: Role) -> Any:
    from blockrepl.cli.output import FittingTable

    rows = []
    for disk in disks:
        done = ""
        if disk["state"] == "initial-sync" and disk.get("synced_bytes"):
            done = f"{format_bytes(disk['synced_bytes'])} received"
        elif disk.get("to_sync_bytes"):
            done = f"{format_bytes(disk['to_sync_bytes'])} to go"
            if disk.get("differing_bytes"):
                done += f", {format_bytes(disk['differing_bytes'])} differed"
        hot = disk.get("hot_bytes")
        rows.append(
            [
                f"  {disk['name']}",
                format_bytes(disk["size_bytes"]),
                disk["state"],
                format_bytes(hot) if hot is not None else "-",
                done,
                _verified(disk),
                *(["yes" if disk["serving"] else "no"] if role == "source" else []),
                disk.get("problem") or "",
            ]
        )
    served = ["served"] if role == "source" else []
    headers = ["  disk", "size", "state", "hot", "sync", "verified", *served, ""]
    return FittingTable(
        headers,
        rows,
        right="size hot",
        whole="disk state served",
        least="hot verified sync served size",
    )


def _verified(disk: dict[str, Any]) -> str:
    from blockrepl.cli.verify import pass_text

    parts = []
    if disk.get("mismatches"):
        parts.append(f"{disk['mismatches']} MISMATCHES")
    if (verified := disk.get("verified_ns")) is not None:
        parts.append(f"{human_seconds(max(0, time.time_ns() - verified) / 1e9)} ago")
    scrub = disk.get("scrub")
    if scrub and (scrub["ended_ns"] is None or verified is None):
        parts.append(pass_text(scrub))
    return ", ".join(parts) or "-"
