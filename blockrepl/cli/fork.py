"""``fork``: writable views that outlive their mount: create, list, remove.

The options of whatever opens one (``mount``, ``serve``) are here too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from blockrepl.cli.output import emit, human_seconds, json_option, pass_home, table
from blockrepl.cli.point import complete_group, complete_point, completion_home, explain
from blockrepl.cli.sizes import Duration, SizeType
from blockrepl.units import format_bytes, format_instant

if TYPE_CHECKING:
    from rich.table import Table

    from blockrepl.storage.forks import Fork, ForkStatus

Row = dict[str, Any]


def complete_fork(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from blockrepl.storage.home import Home

    # Before an option's value, click has left the arguments where they are.
    group = context.params.get("group") or next(iter(context.args), "")
    forks = Home(completion_home(context)).replicas / str(group) / "forks"
    names = sorted(path.name for path in forks.glob("[a-z0-9]*"))
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


_limit_option = click.option(
    "--size-limit",
    type=SizeType(),
    help="What the fork may take; more is ENOSPC to its writer. [default: what the disk can spare]",
)
_expires_option = click.option(
    "--expires", type=Duration(), help="Remove it so long from now, once it is not in use."
)


def fork_options(function: Callable[..., None]) -> Callable[..., None]:
    """``--writable``, ``--fork`` and its limits; with ``--at``, the command gets ``wanted``."""

    @functools.wraps(function)
    def with_wanted(
        *arguments: Any,
        at: str | None,
        writable: bool,
        fork: str | None,
        size_limit: int | None,
        expires: float | None,
        **options: Any,
    ) -> None:
        from blockrepl.views.forking import Wanted

        wanted = Wanted(at, writable, fork, size_limit, expires)
        function(*arguments, wanted=wanted, **options)

    options = [
        click.option("--writable", is_flag=True, help="A fork, thrown away at the end."),
        click.option(
            "--fork",
            metavar="NAME",
            shell_complete=complete_fork,
            help="A fork that is kept: the one of that name, or made of --at when there is none.",
        ),
        _limit_option,
        _expires_option,
    ]
    for option in reversed(options):
        with_wanted = option(with_wanted)
    return with_wanted


@click.group()
def fork() -> None:
    """Writable copy-on-write views of a group that are kept, on the receiver's host.

    \b
    Examples:
      blockrepl fork create web trial --at tag:before-upgrade --size-limit 10G --expires 2d
      blockrepl mount web /mnt/trial --fork trial
      blockrepl fork list web
      blockrepl fork remove web trial
    """


@fork.command(
    epilog="Example: blockrepl fork create web trial --at -5m --size-limit 10G --expires 2d"
)
@click.argument("group", shell_complete=complete_group)
@click.argument("name")
@click.option("--at", metavar="POINT", required=True, shell_complete=complete_point)
@_limit_option
@_expires_option
@json_option
@pass_home
def create(
    home: Path,
    group: str,
    name: str,
    at: str,
    size_limit: int | None,
    expires: float | None,
    json_mode: bool,
) -> None:
    """Make a fork of GROUP at a point. It takes no room until it is written to.

    Its instant stays in the history for as long as the fork is there.
    """
    from blockrepl.storage.history import ReplicaHistory
    from blockrepl.views import forking

    wanted = forking.Wanted(at, True, name, size_limit, expires)
    with ReplicaHistory.open(home, group) as history:
        opened, resolved = forking.create(history, wanted)
        opened.close()
    row = _fields(opened.fork) | {"distance_seconds": resolved.distance_seconds}
    emit(row, json_mode, lambda _: f"fork {name} of {group} is made, as of {explain(resolved)}")


@fork.command("list", epilog="Example: blockrepl fork list web --json")
@click.argument("group", shell_complete=complete_group)
@json_option
@pass_home
def list_forks(home: Path, group: str, json_mode: bool) -> None:
    """List GROUP's forks; those that have expired and are not in use are removed."""
    from blockrepl.storage import forks, pins
    from blockrepl.storage.history import ReplicaHistory

    with ReplicaHistory.open(home, group) as history:
        forks.sweep(history.directory)
        with pins.lock(history.directory):
            rows = [_row(status) for status in forks.statuses(history.directory)]
    emit(rows, json_mode, _table)


@fork.command(epilog="Example: blockrepl fork remove web trial")
@click.argument("group", shell_complete=complete_group)
@click.argument("name", shell_complete=complete_fork)
@json_option
@pass_home
def remove(home: Path, group: str, name: str, json_mode: bool) -> None:
    """Throw the fork NAME of GROUP away, with all that was written to it."""
    from blockrepl.storage import forks
    from blockrepl.storage.history import ReplicaHistory

    with ReplicaHistory.open(home, group) as history:
        removed = forks.remove(history.directory, group, name)
    emit(_fields(removed), json_mode, lambda _: f"fork {name} of {group} is removed")


def _fields(fork: Fork) -> Row:
    return {
        "name": fork.name,
        "at": format_instant(fork.at_ns),
        "at_ns": fork.at_ns,
        "created_ns": fork.created_ns,
        "size_limit_bytes": fork.size_limit_bytes,
        "expires_ns": fork.expires_ns,
        "disks": [disk.name for disk in fork.disks],
    }


def _row(status: ForkStatus) -> Row:
    return _fields(status.fork) | {"used_bytes": status.used_bytes, "process": status.process}


def _table(rows: list[Row]) -> Table:
    return table(
        ["name", "at", "used", "limit", "expires", "in use by"],
        [
            [
                row["name"] or "(thrown away at its end)",
                row["at"],
                format_bytes(row["used_bytes"]),
                "" if row["size_limit_bytes"] is None else format_bytes(row["size_limit_bytes"]),
                _expiry(row["expires_ns"]),
                "" if row["process"] is None else f"process {row['process']}",
            ]
            for row in rows
        ],
        right="used limit",
    )


def _expiry(expires_ns: int | None) -> str:
    if expires_ns is None:
        return ""
    left_seconds = (expires_ns - time.time_ns()) / 1e9
    return f"in {human_seconds(left_seconds)}" if left_seconds > 0 else "has expired"
