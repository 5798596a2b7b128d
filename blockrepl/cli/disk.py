"""blockrepl disk: protect images, serve them to guests, and print how guests reach them."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from blockrepl import limits
from blockrepl.cli.output import emit, json_option, pass_home, progress, table
from blockrepl.cli.point import completion_home
from blockrepl.cli.sizes import SizeType
from blockrepl.errors import StateError
from blockrepl.units import format_bytes, format_instant

if TYPE_CHECKING:
    from rich.table import Table

    from blockrepl.services.control_client import ControlClient
    from blockrepl.storage.source import SourceDisks

WAIT_SECONDS = 0.25  # between looks at a resync


def complete_disk(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from blockrepl.storage.home import Home
    from blockrepl.storage.source import SourceDisks

    names: list[str] = []
    with suppress(OSError):  # never complains
        names = SourceDisks(Home(completion_home(context))).names()
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.group()
def disk() -> None:
    """Protect disks: raw image files or block devices.

    \b
    Examples:
      blockrepl disk add vm1 /var/lib/images/vm1.img --group web
      blockrepl disk serve vm1
      qemu-system-x86_64 ... $(blockrepl disk show vm1 --qemu)
    """


@disk.command()
@click.argument("name")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--group", required=True, help="Consistency group: disks recovered to one instant.")
@click.option("--size", type=SizeType(), help="Create IMAGE, sparse, with this size (10G).")
@click.option(
    "--ring",
    type=SizeType(),
    default=limits.RING_BYTES_DEFAULT,
    help="Shared memory between server and agent. [default: 64M; 16M to 16G]",
)
@json_option
@pass_home
def add(
    home: Path, name: str, image: Path, group: str, size: int | None, ring: int, json_mode: bool
) -> None:
    """Put IMAGE under protection as disk NAME of a group.

    \b
    Examples:
      blockrepl disk add vm1 /var/lib/images/vm1.img --group web
      blockrepl disk add data /dev/vg0/data --group web
      blockrepl disk add scratch scratch.img --group lab --size 10G
    """
    from blockrepl.errors import UsageError
    from blockrepl.storage.home import Home, make_directory

    if not limits.RING_BYTES_MIN <= ring <= limits.RING_BYTES_MAX:
        raise UsageError(
            f"a ring of {format_bytes(ring)} is outside "
            f"{format_bytes(limits.RING_BYTES_MIN)} to {format_bytes(limits.RING_BYTES_MAX)}",
            hint="leave --ring out for the default",
        )
    opened = Home.create(home)
    make_directory(opened.source_directory)
    disks = _disks(home)
    entry = disks.add(name, image, group, create_bytes=size, ring_bytes=ring)
    data = {
        "name": entry.name,
        "group": entry.group,
        "image": str(entry.image),
        "size_bytes": entry.size_bytes,
        "uri": _uri(disks, name),
    }
    if json_mode:
        emit(data, True, lambda _: "")
    else:
        click.echo(
            f"disk {entry.name} ({format_bytes(entry.size_bytes)}) is in group {entry.group}; "
            f"serve it with: blockrepl disk serve {entry.name}"
        )


@disk.command(name="list")
@json_option
@pass_home
def list_disks(home: Path, json_mode: bool) -> None:
    """List the protected disks.

    \b
    Example:
      blockrepl disk list --json
    """
    disks = _disks(home)
    data = [
        {
            "name": entry.name,
            "group": entry.group,
            "image": str(entry.image),
            "size_bytes": entry.size_bytes,
            "uri": _uri(disks, entry.name),
            "serving": disks.is_serving(entry),
        }
        for entry in disks.all()
    ]
    emit(data, json_mode, _table)


def _table(data: list[dict[str, Any]]) -> Table:
    rows = [
        (
            row["name"],
            row["group"],
            format_bytes(row["size_bytes"]),
            "yes" if row["serving"] else "no",
            row["image"],
        )
        for row in data
    ]
    return table(("disk", "group", "size", "serving", "image"), rows, right="size")


@disk.command()
@click.argument("name", shell_complete=complete_disk)
@pass_home
def remove(home: Path, name: str) -> None:
    """Take a disk out of protection. Its image and its history at the receiver stay.

    \b
    Example:
      blockrepl disk remove vm1
    """
    disks = _disks(home)
    entry = disks.load(name)
    disks.remove(entry)
    click.echo(
        f"disk {name} is no longer protected; its image {entry.image} is untouched, its history "
        f"in group {entry.group} is kept under that name"
    )


@disk.command()
@click.argument("name", shell_complete=complete_disk)
@click.argument("size", type=SizeType(), required=False)
@json_option
@pass_home
def resize(home: Path, name: str, size: int | None, json_mode: bool) -> None:
    """Make a disk larger: to SIZE, or to the size that its image has got already.

    A raw file is extended. A block device must have been resized before (lvextend, for instance);
    what is new of it is overwritten with zeros. History goes on without a gap, and nothing is sent
    again: points before that instant show the disk with its old size, later ones with its new one.

    The disk's server must not run meanwhile: end it, and the guest's requests wait for the next
    one. A running QEMU is then told the new size, and tells its guest: block_resize in its monitor,
    or `virsh blockresize`.

    \b
    Examples:
      systemctl stop blockrepl-disk@vm1
      blockrepl disk resize vm1 20G
      systemctl start blockrepl-disk@vm1
      virsh blockresize DOMAIN vda 20G

      lvextend --size 20G vg0/data && blockrepl disk resize data
    """
    from blockrepl.services.resizing import resize as resize_disk
    from blockrepl.storage.home import Home

    with progress(f"zeros behind {name}", size) as tell:
        done = resize_disk(Home.open(home), name, size, tell)
    entry, before_bytes = done.entry, done.before_bytes
    at_ns = entry.growths[-1].at_ns if entry.size_bytes > before_bytes else None
    data = {
        "name": entry.name,
        "group": entry.group,
        "size_bytes": entry.size_bytes,
        "before_bytes": before_bytes,
        "at": None if at_ns is None else format_instant(at_ns),
        "at_ns": at_ns,
    }
    emit(data, json_mode, _resized)


def _resized(data: dict[str, Any]) -> str:
    name, size = data["name"], format_bytes(data["size_bytes"])
    if data["at"] is None:
        return f"disk {name} has {size} already"
    return (
        f"disk {name} has {size} from {data['at']} on, "
        f"{format_bytes(data['before_bytes'])} before; "
        f"serve it again: blockrepl disk serve {name}\n"
        f"then tell a QEMU that runs (a reboot of its guest does not): block_resize in its monitor "
        f"(-blockdev: node blockrepl-{name}), or virsh blockresize, with {data['size_bytes']} bytes"
    )


@disk.command()
@click.argument("name", shell_complete=complete_disk)
@click.option("--full", is_flag=True, help="Send all of it, without asking what differs.")
@click.option("--wait", is_flag=True, help="Return when the replica equals the disk.")
@json_option
@pass_home
def resync(home: Path, name: str, full: bool, wait: bool, json_mode: bool) -> None:
    """Make sure that the replica equals the disk: compare all of it, and send what differs.

    The guest goes on meanwhile, and so does the replication of its writes. History gets a gap until
    it is done; the instants before stay as they are. A restart of the agent does not end it.

    Nothing needs this in daily use: what may differ is known and synced by itself, and the scrub
    proves the rest (`blockrepl verify`). --full is for a replica whose digests are in doubt.

    \b
    Examples:
      blockrepl disk resync vm1
      blockrepl disk resync vm1 --full --wait
    """
    from blockrepl.services.control_client import ControlClient
    from blockrepl.storage.home import Home, check_name

    client = ControlClient(Home(home).agent_socket, "agent")
    begun = client.post(f"/disks/{check_name(name, 'disk')}/resync", {"full": full})
    if not json_mode:
        what = "all of it is sent" if full else "all of it is compared, what differs is sent"
        later = "" if begun["linked"] else ", once the receiver is back"
        click.echo(f"resync of disk {name} ({format_bytes(begun['to_sync_bytes'])}): {what}{later}")
    if wait:
        _wait_synced(client, begun)
    if json_mode:
        emit(begun, True, str)
    elif wait:
        click.echo(f"disk {name} is replicated again")


def _wait_synced(client: ControlClient, begun: dict[str, Any]) -> None:
    """Until nothing is owed any more. Ctrl-C leaves the resync running. StateError."""
    from blockrepl.cli.waiting import check_working, find_group

    total = begun["to_sync_bytes"]
    with progress(f"resync of {begun['disk']}", total) as tell:
        while True:
            group = find_group(client, begun["group"])
            disks = group["disks"] if group else []
            disk = next((one for one in disks if one["name"] == begun["disk"]), None)
            if disk is None:
                raise StateError(f"disk {begun['disk']!r} was removed", code="unknown-disk")
            check_working(
                group,
                f"the resync of disk {begun['disk']} does not get on",
                "it goes on by itself when that is solved",
            )
            tell(max(0, total - disk["to_sync_bytes"]))
            if disk["state"] == "replicating" and not disk["to_sync_bytes"]:
                return
            time.sleep(WAIT_SECONDS)


@disk.command()
@click.argument("name", shell_complete=complete_disk)
@pass_home
def serve(home: Path, name: str) -> None:
    """Serve a disk to its guest over NBD, in the foreground.

    The server is a process of its own: guests keep running when the agent dies. It listens on a
    Unix socket that only this user may open.

    \b
    Example:
      blockrepl disk serve vm1 &
      qemu-system-x86_64 -m 2048 $(blockrepl disk show vm1 --qemu)
    """
    from blockrepl.services.disk_server import exec_server

    exec_server(_disks(home), name)


@disk.command()
@click.argument("name", shell_complete=complete_disk)
@click.option("--qemu", is_flag=True, help="QEMU's options, ready to paste.")
@click.option("--libvirt", is_flag=True, help="libvirt's <disk> element.")
@click.option("--uri", is_flag=True, help="The NBD URI.")
@json_option
@pass_home
def show(home: Path, name: str, qemu: bool, libvirt: bool, uri: bool, json_mode: bool) -> None:
    """Show a disk, and how a guest reaches it.

    \b
    Examples:
      qemu-system-x86_64 -m 2048 $(blockrepl disk show vm1 --qemu)
      blockrepl disk show vm1 --libvirt
      nbdinfo "$(blockrepl disk show vm1 --uri)"
    """
    from blockrepl.errors import UsageError
    from blockrepl.services import guest_options

    if qemu + libvirt + uri + json_mode > 1:
        raise UsageError(
            "--qemu, --libvirt, --uri and --json are forms of one answer",
            hint="give one of them",
        )
    disks = _disks(home)
    entry = disks.load(name)
    socket = disks.socket_path(entry)
    if qemu:
        click.echo(guest_options.qemu(entry.name, socket))
    elif libvirt:
        click.echo(guest_options.libvirt(entry.name, socket))
    elif uri:
        click.echo(guest_options.uri(socket))
    else:
        data = {
            "name": entry.name,
            "group": entry.group,
            "image": str(entry.image),
            "size_bytes": entry.size_bytes,
            "uri": guest_options.uri(socket),
            "serving": disks.is_serving(entry),
            "id": str(entry.id),
            "ring_bytes": entry.ring_bytes,
        }
        emit(data, json_mode, _facts)


def _facts(data: dict[str, Any]) -> Table:
    told = {
        **data,
        "size_bytes": format_bytes(data["size_bytes"]),
        "ring_bytes": format_bytes(data["ring_bytes"]),
        "serving": "yes" if data["serving"] else "no",
    }
    rows = [(key.removesuffix("_bytes"), str(value)) for key, value in told.items()]
    return table(("what", "value"), rows)


def _disks(home: Path) -> SourceDisks:
    from blockrepl.storage.home import Home
    from blockrepl.storage.source import SourceDisks

    return SourceDisks(Home.open(home))


def _uri(disks: SourceDisks, name: str) -> str:
    from blockrepl.services import guest_options

    return guest_options.uri(disks.socket_path(disks.load(name)))
