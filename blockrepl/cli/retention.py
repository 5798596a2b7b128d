"""``retention``: which history is kept, what will go and when, and how long the room lasts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from blockrepl.cli.checkpoint import receiver_client
from blockrepl.cli.output import LEVEL_COLOURS, emit, json_option, pass_home, table
from blockrepl.cli.point import complete_group
from blockrepl.cli.sizes import SizeType
from blockrepl.storage.home import Home, check_name
from blockrepl.units import format_bytes, format_instant


@click.group()
def retention() -> None:
    """Which points of history are kept, for how long, and what goes next."""


@retention.command(epilog="Example: blockrepl retention show web")
@click.argument("group", shell_complete=complete_group)
@json_option
@pass_home
def show(home: Path, group: str, json_mode: bool) -> None:
    """Show GROUP's ladder, and how much history there is at which distance of points."""
    emit(_client(home, group).get(f"/retention/{group}"), json_mode, _shown)


def _policy_options(function: Any) -> Any:
    """What a policy is made of; what is not given stays as it is."""
    for option in (
        click.option("--min-free", type=SizeType(), help="Room to leave free on the file system."),
        click.option(
            "--max-size", type=SizeType(), help="Most that the journal may take; 0: no limit."
        ),
        click.option(
            "--promise", help="Age up to which nothing goes to make room. [default: first rung]"
        ),
        click.option(
            "--ladder",
            help="As in all:24h,1m:7d,1h:90d: every write for a day, then a point a minute...",
        ),
    ):
        function = option(function)
    return function


def _policy(
    client: Any,
    group: str,
    ladder: str | None,
    promise: str | None,
    max_size: int | None,
    min_free: int | None,
) -> dict[str, Any]:
    policy: dict[str, Any] = client.get(f"/retention/{group}")["policy"]
    if ladder is not None:
        policy["ladder"] = ladder
    if promise is not None:
        policy["promised"] = promise
    if max_size is not None:
        policy["size_bytes"] = max_size or None
    if min_free is not None:
        policy["free_bytes"] = min_free
    return policy


@retention.command(
    epilog="Examples: blockrepl retention plan web;  "
    "blockrepl retention plan web --ladder all:12h,1m:7d"
)
@click.argument("group", shell_complete=complete_group)
@_policy_options
@json_option
@pass_home
def plan(home: Path, /, group: str, json_mode: bool, **wanted: Any) -> None:
    """Show what goes within a day, what is pinned and by whom, and how long the room lasts.

    With options of `retention set`: as it would be with them. Nothing is changed.
    """
    client = _client(home, group)
    if all(value is None for value in wanted.values()):
        document = client.get(f"/retention/{group}")
    else:
        document = client.post(f"/retention/{group}/plan", _policy(client, group, **wanted))
    emit(document, json_mode, _planned)


@retention.command(
    name="set",
    epilog="Examples: blockrepl retention set web --ladder all:24h,1m:7d,1h:90d;  "
    "blockrepl retention set web --max-size 500G --promise 12h",
)
@click.argument("group", shell_complete=complete_group)
@_policy_options
@click.option("--shorten", is_flag=True, help="Also if the ladder lets go of history at once.")
@json_option
@pass_home
def set_(home: Path, /, group: str, shorten: bool, json_mode: bool, **wanted: Any) -> None:
    """Change what is kept of GROUP's history; what is not given stays as it is.

    What is older than the last rung is folded into the base images. A ladder that lets go of
    history at once is refused, with what would go, unless you add --shorten: checkpoints that are
    not kept (`checkpoint create --keep`) go with their instants. Where room is limited, history
    is shortened from its old end, but nothing that is promised, pinned or kept ever goes to make
    room: the receiver would rather stop acknowledging, and say so. `retention plan` shows what
    the same options would do.
    """
    client = _client(home, group)
    policy = _policy(client, group, **wanted)
    emit(client.post(f"/retention/{group}", policy | {"shorten": shorten}), json_mode, _shown)


@retention.command(epilog="Example: blockrepl retention run web")
@click.argument("group", shell_complete=complete_group)
@json_option
@pass_home
def run(home: Path, group: str, json_mode: bool) -> None:
    """Do now what is due for GROUP, and wait for it."""
    done = _client(home, group).post(f"/retention/{group}/run", {}, is_long=True)
    emit(done, json_mode, _shown)


def _client(home: Path, group: str) -> Any:
    """For requests about a group: its name becomes a part of their paths. UsageError."""
    from blockrepl.services.receiver_home import read_configuration

    check_name(group, "group")
    read_configuration(Home.open(home))  # says where there is no receiver at all
    return receiver_client(home)


def _shown(document: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    lines = [
        _headline(document),
        Text(f"  {_limits(document['policy'])}"),
        Text(f"  {_room(document)}"),
    ]
    if document["reason"]:
        lines.append(Text(f"  {document['reason']}", LEVEL_COLOURS[document["level"]]))
    rows = [
        [
            f"  {format_instant(one['from_ns'])}",
            format_instant(one["to_ns"]),
            _step(one["step_seconds"]),
            format_bytes(one["journal_bytes"]),
        ]
        for one in document["stretches"]
    ]
    headers = ["  from", "to", "points", "journal"]
    return Group(*lines, table(headers, rows, right="journal"))


def _planned(document: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    parts = [_headline(document), Text(_limits(document["policy"])), Text(_room(document))]
    if document["reason"]:
        parts.append(Text(document["reason"], LEVEL_COLOURS[document["level"]]))
    rows = [
        [
            "goes into the base" if one["what"] == "fold" else _step(one["step_seconds"]),
            format_instant(one["from_ns"]),
            format_instant(one["to_ns"]),
            ", ".join(one["held_by"]) or "-",
        ]
        for one in document["upcoming"]
    ]
    parts.append(table(["within a day", "from", "to", "held back by"], rows))
    pins = [
        [pin["what"], format_instant(pin["first_ns"]), format_instant(pin["last_ns"])]
        for pin in document["pins"]
    ]
    parts.append(table(["pinned by", "from", "to"], pins))
    return Group(*parts)


def _headline(document: dict[str, Any]) -> Any:
    from rich.text import Text

    ladder = document["policy"]["ladder"]
    return Text.assemble("group ", (document["group"], "bold"), f"  ladder {ladder}")


def _limits(policy: dict[str, Any]) -> str:
    promised = policy["promised"] or policy["ladder"].partition(",")[0].partition(":")[2]
    size, free = policy["size_bytes"], policy["free_bytes"]
    return ", ".join(
        [
            f"promised {promised}",
            f"journal at most {format_bytes(size)}" if size else "no limit of the journal's size",
            *([f"{format_bytes(free)} left free"] if free else []),
        ]
    )


def _room(document: dict[str, Any]) -> str:
    used, free = format_bytes(document["journal_bytes"]), format_bytes(document["free_bytes"])
    days = document["days_left"]
    lasts = "nothing was written today" if days is None else f"{days:.1f} days at today's rate"
    return f"journal {used}, free {free}: {lasts}"


def _step(seconds: float) -> str:
    if not seconds:
        return "every write"
    return f"one every {time.strftime('%H:%M:%S', time.gmtime(seconds))}"
