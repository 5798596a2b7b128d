"""``checkpoint``: names for instants, on either side.

==========================  ====================================================
home                        goes to
==========================  ====================================================
has the group's replica     the running receiver, else straight to the catalog
otherwise, has a source     the agent: its checkpoint travels with the records
==========================  ====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blockrepl.cli.output import emit, json_option, pass_home, table
from blockrepl.cli.point import complete_checkpoint, complete_group, complete_point, resolve
from blockrepl.errors import StateError, UsageError
from blockrepl.model.points import check_checkpoint_name
from blockrepl.storage.home import Home, check_name, exclusive_lock
from blockrepl.units import format_instant

if TYPE_CHECKING:
    from blockrepl.services.control_client import ControlClient
    from blockrepl.storage.catalog import Catalog, CheckpointRow

Row = dict[str, Any]
NOT_RUNNING = "not-running"


@click.group()
def checkpoint() -> None:
    """Name an instant of a group's history, on the source or on the receiver's host."""


@checkpoint.command(
    epilog="Examples: blockrepl checkpoint create web before-upgrade --keep;  "
    "blockrepl checkpoint create web last-good --at -10m (on the receiver's host)"
)
@click.argument("group", shell_complete=complete_group)
@click.argument("name")
@click.option("--keep", is_flag=True, help="Retention may never thin it out.")
@click.option(
    "--at",
    metavar="POINT",
    shell_complete=complete_point,
    help="The instant to name, on the receiver's host. [default: now]",
)
@json_option
@pass_home
def create(home: Path, group: str, name: str, keep: bool, at: str | None, json_mode: bool) -> None:
    """Name the newest instant of GROUP (or another, with --at) NAME.

    On the source: every write the guest knows to be done by now is in it, and the command returns
    when it is durable at the receiver.
    """
    check_checkpoint_name(check_name(name, "checkpoint"))
    if is_replica(home, group):
        row = _create_on_replica(home, group, name, keep, at)
    elif at is not None:
        raise UsageError(
            "--at works on the receiver's host only",
            hint="leave it out to name this instant",
        )
    else:
        row = agent_client(home).post(f"/checkpoints/{group}", {"name": name, "keep": keep})
    emit(row, json_mode, lambda row: f"checkpoint {row['name']} of {group} is {row['at']}")


def _create_on_replica(home: Path, group: str, name: str, keep: bool, at: str | None) -> Row:
    resolved = resolve(home, group, at or "latest")
    try:
        wanted = {"name": name, "at_ns": resolved.at_ns, "keep": keep}
        return dict(receiver_client(home).post(f"/checkpoints/{group}", wanted))
    except StateError as error:
        if error.code != NOT_RUNNING:
            raise
    from blockrepl.storage.catalog import CheckpointRow

    row = CheckpointRow(name, resolved.at_ns, "crash", keep)
    with _catalog(home, group) as catalog:
        if not catalog.add_checkpoint(row):
            raise StateError(
                f"checkpoint {name!r} exists already",
                hint="choose another name, or remove that one first",
                code="taken",
            )
    return _row(row)


@checkpoint.command("list", epilog="Example: blockrepl checkpoint list web --json")
@click.argument("group", shell_complete=complete_group)
@json_option
@pass_home
def list_checkpoints(home: Path, group: str, json_mode: bool) -> None:
    """List GROUP's checkpoints by instant; on the source the newest, if there are thousands."""
    rows: list[Row]
    if is_replica(home, group):
        from blockrepl.storage.history import ReplicaHistory

        with ReplicaHistory.open(home, group) as replica:
            found = sorted(replica.state().checkpoints.values(), key=lambda row: row.at_ns)
        rows = [_row(row) for row in found]
    else:
        from blockrepl.formats.messages import CHECKPOINTS_TOLD_MAX

        rows = agent_client(home).get(f"/checkpoints/{group}")
        if len(rows) >= CHECKPOINTS_TOLD_MAX:
            click.echo(f"the newest {len(rows)}; the receiver's host lists all", err=True)
    emit(
        rows,
        json_mode,
        lambda rows: table(
            ["name", "at", "kind", "kept"],
            [[row["name"], row["at"], row["kind"], "kept" if row["kept"] else ""] for row in rows],
        ),
    )


@checkpoint.command(epilog="Example: blockrepl checkpoint remove web before-upgrade")
@click.argument("group", shell_complete=complete_group)
@click.argument("name", shell_complete=complete_checkpoint)
@json_option
@pass_home
def remove(home: Path, group: str, name: str, json_mode: bool) -> None:
    """Forget the checkpoint NAME of GROUP. The instant itself stays in the history."""
    check_name(name, "checkpoint")
    path = f"/checkpoints/{group}/{name}/remove"
    if is_replica(home, group):
        row = _on_replica(home, group, name, path, lambda catalog: _remove(catalog, name))
    else:
        row = agent_client(home).post(path)
    emit(row, json_mode, lambda _: f"checkpoint {name} of {group} is removed")


@checkpoint.command(
    epilog="Examples: blockrepl checkpoint keep web before-upgrade;  "
    "blockrepl checkpoint keep web before-upgrade --release"
)
@click.argument("group", shell_complete=complete_group)
@click.argument("name", shell_complete=complete_checkpoint)
@click.option("--release", is_flag=True, help="Retention may thin it out again.")
@json_option
@pass_home
def keep(home: Path, group: str, name: str, release: bool, json_mode: bool) -> None:
    """Keep the checkpoint NAME of GROUP: retention may never thin it out.

    On the receiver's host, whose room it takes.
    """
    check_name(name, "checkpoint")
    if not is_replica(home, group):
        raise UsageError(
            "a checkpoint is kept on the receiver's host only",
            hint="on the source one can be taken so: checkpoint create --keep",
        )
    path = f"/checkpoints/{group}/{name}/{'release' if release else 'keep'}"
    row = _on_replica(home, group, name, path, lambda it: it.keep_checkpoint(name, not release))
    what = "is kept" if row["kept"] else "goes when retention passes it"
    emit(row, json_mode, lambda _: f"checkpoint {name} of {group} {what}")


def _remove(catalog: Catalog, name: str) -> CheckpointRow | None:
    row = catalog.checkpoint(name)
    catalog.remove_checkpoint(name)
    return row


def _on_replica(
    home: Path,
    group: str,
    name: str,
    path: str,
    change: Callable[[Catalog], CheckpointRow | None],
) -> Row:
    """Have the receiver do what a path means, or change the catalog when there is none."""
    try:
        return dict(receiver_client(home).post(path))
    except StateError as error:
        if error.code != NOT_RUNNING:
            raise
    from blockrepl.storage.catalog import no_checkpoint

    with _catalog(home, group) as catalog:
        row = change(catalog)
    if row is None:
        raise no_checkpoint(group, name)
    return _row(row)


def is_replica(home: Path, group: str) -> bool:
    """Whether the group's replica is here; StateError where neither side is."""
    from blockrepl.storage.history import ReplicaHistory, groups

    place = Home.open(home)
    check_name(group, "group")
    if group in groups(home):
        return True
    if not place.source_directory.exists():
        ReplicaHistory.open(home, group).close()  # says what there is
    return False


def receiver_client(home: Path) -> ControlClient:
    from blockrepl.services.control_client import ControlClient

    return ControlClient(Home(home).receiver_socket, "receiver")


def agent_client(home: Path) -> ControlClient:
    from blockrepl.services.control_client import ControlClient

    return ControlClient(Home(home).agent_socket, "agent")


@contextmanager
def _catalog(home: Path, group: str) -> Iterator[Catalog]:
    """The catalog to write to, while no receiver can start."""
    from blockrepl.storage import catalog as catalogs

    place = Home(home)
    with exclusive_lock(place.run_directory / "receiver.lock", f"the receiver's home {home}"):
        catalog = catalogs.Catalog.open(place.replica_directory(group) / catalogs.FILE_NAME)
        try:
            yield catalog
        finally:
            catalog.close()


def _row(row: CheckpointRow) -> Row:
    return {
        "name": row.name,
        "at": format_instant(row.at_ns),
        "at_ns": row.at_ns,
        "kind": row.kind,
        "kept": row.kept,
    }
