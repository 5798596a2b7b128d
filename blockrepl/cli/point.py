"""``point``: which instant a point means, and how far it is from what was asked.

What each command that takes a point says of it, and completes, is here too.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from blockrepl.cli.output import Invocation, emit, human_seconds, json_option, pass_home
from blockrepl.errors import BlockreplError
from blockrepl.model import points
from blockrepl.model.points import Resolved
from blockrepl.units import format_instant


def complete_group(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from blockrepl.storage.history import groups

    return [
        CompletionItem(name)
        for name in groups(completion_home(context))
        if name.startswith(incomplete)
    ]


def complete_point(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The fixed words, and the group's checkpoints."""
    words = {"latest": "the newest instant", "flush": "the last guest flush", "-5m": "before now"}
    for name, at in _checkpoints(context).items():
        words[f"tag:{name}"] = at
    return [CompletionItem(w, help=h) for w, h in words.items() if w.startswith(incomplete)]


def complete_checkpoint(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    known = _checkpoints(context)
    return [CompletionItem(n, help=at) for n, at in known.items() if n.startswith(incomplete)]


def _checkpoints(context: click.Context) -> dict[str, str]:
    """The group's checkpoints and their instants, where its replica is here."""
    from blockrepl.storage.history import ReplicaHistory

    # Before an option's value, click has left the arguments where they are.
    group = context.params.get("group") or next(iter(context.args), None)
    if group is not None:
        with contextlib.suppress(BlockreplError, OSError, sqlite3.Error):  # never complains
            with ReplicaHistory.open(completion_home(context), group) as replica:
                rows = replica.catalog.checkpoints()
            return {row.name: format_instant(row.at_ns) for row in rows}
    return {}


def completion_home(context: click.Context) -> Path:
    """The home of a command line that is being completed: nothing has been run yet."""
    invocation = context.find_object(Invocation) or Invocation()
    given = context.find_root().params.get("home")
    return given if isinstance(given, Path) else invocation.home


def explain(resolved: Resolved) -> str:
    """One line: the instant, and how far it is from what was asked."""
    distance = resolved.distance_seconds
    base, _, back = resolved.asked.partition("~")
    if back.strip("0 "):
        how_far = f"{int(back)} record{'s'[: int(back) > 1]} before {base}"
    elif distance == 0:
        how_far = "exactly as asked"
    else:
        side = "before" if distance < 0 else "after"
        how_far = f"{human_seconds(abs(distance))} {side} what was asked"
        if base.strip() in ("latest", "flush", "@flush"):
            how_far = f"{human_seconds(abs(distance))} {'ago' if distance < 0 else 'ahead of now'}"
    return f"{format_instant(resolved.at_ns)} ({resolved.asked}: {how_far})"


def resolve(home: Path, group: str, text: str) -> Resolved:
    """PointError, UsageError, StateError."""
    from blockrepl.storage.history import ReplicaHistory

    point = points.parse(text)
    with ReplicaHistory.open(home, group) as replica:
        return replica.resolve(point, time.time_ns())


# Unknown options are arguments here, so that -5m can be typed as it is; -1h30m is no call for help.
@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
    epilog="Examples: blockrepl point web latest~3;  blockrepl point web -5m;  "
    "blockrepl point web 2026-11-22T10:31:07.25Z",
)
@click.argument("group", shell_complete=complete_group)
@click.argument("point", shell_complete=complete_point)
@json_option
@pass_home
def point(home: Path, group: str, point: str, json_mode: bool) -> None:
    """Resolve POINT in GROUP's history and say which instant it is.

    POINT is latest, a time with or without zone, a time before now (-90s, -5m, -2h, -1d),
    tag:NAME or a checkpoint's bare name, or flush; with ~N, N records before that.
    """
    resolved = resolve(home, group, point)
    data = {
        "asked": resolved.asked,
        "at": format_instant(resolved.at_ns),
        "at_ns": resolved.at_ns,
        "epoch": resolved.epoch,
        "distance_seconds": resolved.distance_seconds,
    }
    emit(data, json_mode, lambda _: f"{explain(resolved)}, epoch {resolved.epoch}")
