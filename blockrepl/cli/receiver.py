"""blockrepl receiver: make one, run it, invite sources, see and revoke them, check its store."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blockrepl.cli.check import check
from blockrepl.cli.output import (
    emit,
    json_option,
    pass_home,
    progress,
    table,
)
from blockrepl.cli.sizes import Duration
from blockrepl.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table


@click.group()
def receiver() -> None:
    """The replica side: make it once, keep it running, invite sources.

    \b
    Examples:
      blockrepl receiver init
      blockrepl receiver run
      blockrepl receiver invite --address vault.example.org:7420
    """


receiver.add_command(check)


@receiver.command()
@click.option("--name", help="The receiver's name. [default: the host's name]")
@pass_home
def init(home: Path, name: str | None) -> None:
    """Make a receiver: its authority and an empty store.

    \b
    Example:
      blockrepl receiver init --name vault
    """
    from blockrepl.services.receiver_home import initialise
    from blockrepl.storage.home import Home

    configuration = initialise(Home.create(home), name)
    click.echo(f"receiver {configuration.name} made in {home}")


@receiver.command()
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Where sources connect. [default: as last time, at first 0.0.0.0:7420]",
)
@pass_home
def run(home: Path, listen: str | None) -> None:
    """Run the receiver in the foreground, until SIGTERM or Ctrl-C.

    Prints one line when sources may connect. Whatever the last stop left behind is recovered first.

    \b
    Example:
      blockrepl receiver run --listen 0.0.0.0:7420
    """
    from blockrepl.services.foreground import Notify, run_foreground
    from blockrepl.services.receiver import run_receiver
    from blockrepl.services.receiver_home import (
        join_address,
        read_configuration,
        remember_listen,
        split_listen,
    )
    from blockrepl.storage.home import Home

    opened = Home.open(home)
    host, port = split_listen(listen or read_configuration(opened).listen)

    async def service(notify: Notify) -> None:
        def ready(address: str) -> None:
            if listen is not None:
                # The host as it was told: it may stand for more addresses than the first one. The
                # port may have been 0.
                remember_listen(opened, join_address(host, split_listen(address)[1]))
            click.echo(f"receiver ready on {address} (home {home})")
            notify()

        await run_receiver(opened, host, port, ready=ready)

    run_foreground(service)


@receiver.command()
@click.option(
    "--expires", type=Duration(), default="1h", show_default=True, help="How long it is good for."
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="G",
    help="Also let it into a group that another source owns (repeatable).",
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Where the source reaches this receiver. [default: this host's name, the port of `run`]",
)
@pass_home
def invite(home: Path, expires: float, groups: tuple[str, ...], address: str | None) -> None:
    """Print a token that lets one source join, once.

    \b
    Examples:
      blockrepl receiver invite
      blockrepl receiver invite --expires 10m --address 10.0.0.2:7420
    """
    from blockrepl.services import receiver_home
    from blockrepl.storage.home import Home

    token = receiver_home.invite(
        Home.open(home), expires_seconds=expires, groups=list(groups), address=address
    )
    click.echo(token)


@receiver.command()
@click.argument("group")
@click.argument("disk")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--move", is_flag=True, help="Take IMAGE over instead of copying it.")
@pass_home
def seed(home: Path, group: str, disk: str, image: Path, move: bool) -> None:
    """Begin the replica of DISK with IMAGE, a copy that came here by other means.

    For a disk whose first sync would take the network too long: copy its raw image to the receiver
    by whatever way there is, seed with it, then `disk add` at the source. The first sync compares
    and sends only what differs, so the copy may be old, and the guest may go on meanwhile.

    It must come before the source names the disk. The receiver may run or not.

    \b
    Examples:
      blockrepl receiver seed shop web /mnt/usb/web.img
      blockrepl receiver seed shop web web.img --move
    """
    from blockrepl.services.seeding import seed as seed_disk
    from blockrepl.storage.home import Home
    from blockrepl.storage.seed import check_seed

    with progress(f"seeding {disk}", check_seed(image)) as tell:
        size_bytes = seed_disk(Home.open(home), group, disk, image, move=move, progress=tell)
    click.echo(
        f"disk {disk} of group {group} begins with {image} ({format_bytes(size_bytes)}); at the "
        f"source: blockrepl disk add {disk} IMAGE --group {group}"
    )


@receiver.command()
@json_option
@pass_home
def sources(home: Path, json_mode: bool) -> None:
    """List the sources that have joined.

    \b
    Example:
      blockrepl receiver sources
    """
    from blockrepl.services.receiver_home import open_trust, read_configuration
    from blockrepl.storage.home import Home
    from blockrepl.units import format_instant

    opened = Home.open(home)
    read_configuration(opened)
    with closing(open_trust(opened)) as trust:
        rows = [
            {
                "name": source.name,
                "id": source.id,
                "groups": list(source.groups),
                "joined": format_instant(source.joined_ns),
                "joined_ns": source.joined_ns,
                "revoked": source.revoked_ns is not None,
                "revoked_ns": source.revoked_ns,
            }
            for source in trust.list_sources()
        ]
    emit(rows, json_mode, _sources_table)


def _sources_table(rows: list[dict[str, Any]]) -> Table | str:
    if not rows:
        return "no source has joined; `blockrepl receiver invite` makes a token for one"
    return table(
        ["source", "groups", "joined", "state"],
        [
            [
                row["name"],
                ", ".join(row["groups"]) or "-",
                row["joined"],
                "revoked" if row["revoked"] else "trusted",
            ]
            for row in rows
        ],
    )


@receiver.command()
@click.argument("name")
@pass_home
def revoke(home: Path, name: str) -> None:
    """Trust the source NAME no more. A session it has ends at once; its replicas stay.

    \b
    Example:
      blockrepl receiver revoke web1
    """
    from blockrepl.services.receiver_home import open_trust, read_configuration
    from blockrepl.storage.home import Home

    opened = Home.open(home)
    read_configuration(opened)
    with closing(open_trust(opened)) as trust:
        trust.revoke(name, time.time_ns())
    click.echo(f"source {name} is revoked")
