"""``mount`` and ``umount``: a group's disks as files, at one instant or at any; forks of them too.

``mount`` returns when the mount can be used; a process in the background serves it and writes to
<home>/log/mount-GROUP.log. ``--foreground`` serves it in this process.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from blockrepl.cli.failure import describe, principal
from blockrepl.cli.fork import fork_options
from blockrepl.cli.output import emit, json_option, pass_home
from blockrepl.cli.point import complete_group, complete_point, explain
from blockrepl.model.points import Resolved
from blockrepl.units import format_instant

if TYPE_CHECKING:
    from blockrepl.views.forking import Wanted

log = logging.getLogger(__name__)

HOW_TO_USE = """\
The disks are read-only files. To mount the file system inside one:
  losetup --find --show --read-only --partscan --direct-io=on {image}
  mount -o ro,noload /dev/loopNp1 /mnt      ext4 (XFS: ro,norecovery)
or /dev/loopN itself when the image has no partition table
(the image is as after a power cut, and its journal cannot be replayed on a read-only device)"""


HOW_TO_WRITE = """\
The disks are files that can be written to; what is written goes into a fork{kept}.
To mount the file system inside one (its journal is replayed then):
  losetup --find --show --partscan --direct-io=on {image}
  mount /dev/loopNp1 /mnt                   or /dev/loopN without a partition table"""


@click.command(
    epilog="Examples: blockrepl mount web /mnt/web;  ls -l /mnt/web/at/-5m;  "
    "blockrepl mount web /mnt/then --at tag:before-upgrade;  "
    "blockrepl mount web /mnt/try --at -5m --writable;  blockrepl mount web /mnt/try --fork trial"
)
@click.argument("group", shell_complete=complete_group)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--at", metavar="POINT", shell_complete=complete_point, help="Mount this instant alone."
)
@fork_options
@click.option("--foreground", is_flag=True, help="Serve the mount in this process.")
@click.option("--ready-descriptor", type=int, hidden=True)
@json_option
@pass_home
def mount(
    home: Path,
    group: str,
    directory: Path,
    wanted: Wanted,
    foreground: bool,
    ready_descriptor: int | None,
    json_mode: bool,
) -> None:
    """Mount GROUP's disks on DIRECTORY, read-only or as a fork.

    With --at POINT: DIRECTORY/<disk>.img. Without: latest/, checkpoints/<name>/ and at/<POINT>/
    for any point you type, each with <disk>.img.

    With --writable, or --fork NAME, the files of that instant can be written to: base, journal and
    replication stay as they are. What was written is thrown away on umount, unless the fork has a
    name.
    """

    def tell(resolved: Resolved | None) -> None:
        _tell(group, directory, wanted, resolved, json_mode)

    if ready_descriptor is not None:
        _serve_for(ready_descriptor, home, group, directory, wanted)
    elif foreground:
        _log(logging.WARNING)
        from blockrepl.views import serving

        serving.serve(home, group, directory, wanted, tell)
    else:
        from blockrepl.views import mounting

        tell(mounting.start(home.absolute(), group, directory, wanted.arguments()))


def _log(level: int) -> None:
    """As the services do."""
    from blockrepl.services.foreground import LOG_FORMAT, LOG_TIME

    logging.basicConfig(level=level, format=LOG_FORMAT, datefmt=LOG_TIME)


def _serve_for(descriptor: int, home: Path, group: str, directory: Path, wanted: Wanted) -> None:
    """Serve on behalf of a ``mount`` that waits at the other end of a pipe."""
    from blockrepl.views import serving

    os.set_inheritable(descriptor, False)
    _log(logging.INFO)
    logging.captureWarnings(True)
    answered = False

    def answer(fields: dict[str, object]) -> None:
        nonlocal answered
        answered = True
        with open(descriptor, "wb") as file:
            file.write(json.dumps(fields).encode())

    def ready(resolved: Resolved | None) -> None:
        fields = None
        if resolved is not None:
            fields = {name: getattr(resolved, name) for name in Resolved.__slots__}
        log.info("serving %s on %s", group, directory)
        answer({"resolved": fields})

    try:
        serving.serve(home, group, directory, wanted, ready)
    except Exception as error:
        failure = describe(principal(error))
        if failure is not None and not answered:
            answer({**json.loads(failure.as_json()), "exit_status": failure.exit_status})
        raise
    log.info("unmounted %s from %s", group, directory)


def _tell(
    group: str, directory: Path, wanted: Wanted, resolved: Resolved | None, json_mode: bool
) -> None:
    data: dict[str, object] = {"group": group, "directory": str(directory)}
    if resolved is None:
        image = directory / "latest" / "DISK.img"
        text = f"{group} is mounted on {directory}: latest/, checkpoints/<name>/, at/<POINT>/"
    else:
        data |= {
            "at": format_instant(resolved.at_ns),
            "at_ns": resolved.at_ns,
            "distance_seconds": resolved.distance_seconds,
            "writable": wanted.is_fork,
            "fork": wanted.fork,
        }
        image = directory / "DISK.img"
        text = f"{group} is mounted on {directory} as of {explain(resolved)}"
    how = HOW_TO_USE
    if wanted.is_fork:
        kept = f" that is kept: {wanted.fork}" if wanted.fork else ", thrown away on umount"
        how = HOW_TO_WRITE.replace("{kept}", kept)
    emit(data, json_mode, lambda _: f"{text}\n{how.format(image=image)}")


@click.command(epilog="Example: blockrepl umount /mnt/web")
@click.argument("directory", type=click.Path(path_type=Path))
def umount(directory: Path) -> None:
    """Unmount DIRECTORY and end the process that serves it."""
    from blockrepl.views import mounting

    mounting.umount(directory)
