"""``serve``: a group's disks, as they were at a point, over NBD: for QEMU to boot from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blockrepl.cli.fork import fork_options
from blockrepl.cli.output import emit, json_option, pass_home
from blockrepl.cli.point import complete_group, complete_point, explain
from blockrepl.errors import UsageError
from blockrepl.units import format_instant

if TYPE_CHECKING:
    from blockrepl.views.forking import Wanted
    from blockrepl.views.nbd import Served


@click.command(
    epilog="Examples: blockrepl serve web --at -5m --writable;  "
    "blockrepl serve web --at tag:before-upgrade --fork trial --socket /run/trial.sock;  "
    "blockrepl serve web --fork trial"
)
@click.argument("group", shell_complete=complete_group)
@click.option("--at", metavar="POINT", shell_complete=complete_point, help="The instant to serve.")
@fork_options
@click.option(
    "--socket",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to listen; only this user may connect. [default: in the home's run directory]",
)
@json_option
@pass_home
def serve(home: Path, group: str, wanted: Wanted, socket: Path | None, json_mode: bool) -> None:
    """Serve GROUP's disks over NBD, one export per disk, until Ctrl-C or SIGTERM.

    Prints each disk's URI and the QEMU options to boot from it. Read-only, or a fork: with
    --writable or --fork NAME the guest's writes go into it, and base, journal and replication stay
    as they are. A crash-consistent instant boots from a fork only: its file systems replay their
    journals.
    """
    from blockrepl.views import nbd

    if wanted.at is None and not wanted.is_fork:
        raise UsageError("serve needs to know what", hint="add --at POINT, or --fork NAME")
    nbd.serve(home, group, wanted, socket, lambda served: _tell(group, wanted, served, json_mode))


def _tell(group: str, wanted: Wanted, served: Served, json_mode: bool) -> None:
    from blockrepl.services import guest_options

    disks: list[dict[str, Any]] = [
        {
            "name": name,
            "size_bytes": size_bytes,
            "uri": guest_options.uri(served.socket, name),
            "qemu": guest_options.qemu_view(name, served.socket, read_only=not wanted.is_fork),
        }
        for name, size_bytes in served.disks
    ]
    data: dict[str, Any] = {
        "group": group,
        "at": format_instant(served.resolved.at_ns),
        "at_ns": served.resolved.at_ns,
        "distance_seconds": served.resolved.distance_seconds,
        "writable": wanted.is_fork,
        "fork": wanted.fork,
        "socket": str(served.socket),
        "disks": disks,
    }
    emit(data, json_mode, lambda _: _text(group, wanted, served, disks))
    sys.stdout.flush()


def _text(group: str, wanted: Wanted, served: Served, disks: list[dict[str, Any]]) -> str:
    what = "read-only"
    if wanted.is_fork:
        what = f"fork {wanted.fork}, kept" if wanted.fork else "a fork, thrown away at the end"
    lines = [f"{group} is served as of {explain(served.resolved)} ({what}); Ctrl-C ends it"]
    for disk in disks:
        lines += [f"{disk['name']}: {disk['uri']}", f"  {disk['qemu']}"]
    return "\n".join(lines)
