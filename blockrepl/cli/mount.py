"""``mount`` and ``umount``: a group's disks as files, at one instant or at any.

``mount`` returns when the mount can be used; a process in the background serves it and writes to
<home>/log/mount-GROUP.log. ``--foreground`` serves it in this process.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import click

from blockrepl.cli.failure import describe, principal
from blockrepl.cli.output import emit, json_option, pass_home
from blockrepl.cli.point import complete_group, complete_point, explain
from blockrepl.errors import UsageError
from blockrepl.model.points import Resolved
from blockrepl.units import format_instant

log = logging.getLogger(__name__)

HOW_TO_USE = """\
The disks are read-only files. To mount the file system inside one:
  losetup --find --show --read-only --partscan --direct-io=on {image}
  mount -o ro,noload /dev/loopNp1 /mnt      ext4 (XFS: ro,norecovery)
or /dev/loopN itself when the image has no partition table
(the image is as after a power cut, and its journal cannot be replayed on a read-only device)"""


@click.command(
    epilog="Examples: blockrepl mount web /mnt/web;  ls -l /mnt/web/at/-5m;  "
    "blockrepl mount web /mnt/then --at tag:before-upgrade"
)
@click.argument("group", shell_complete=complete_group)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--at", metavar="POINT", shell_complete=complete_point, help="Mount this instant alone."
)
@click.option("--foreground", is_flag=True, help="Serve the mount in this process.")
@click.option("--writable", is_flag=True, help="Mount a fork that can be written to.")
@click.option("--ready-descriptor", type=int, hidden=True)
@json_option
@pass_home
def mount(
    home: Path,
    group: str,
    directory: Path,
    at: str | None,
    foreground: bool,
    writable: bool,
    ready_descriptor: int | None,
    json_mode: bool,
) -> None:
    """Mount GROUP's disks on DIRECTORY, read-only.

    With --at POINT: DIRECTORY/<disk>.img. Without: latest/, checkpoints/<name>/ and at/<POINT>/
    for any point you type, each with <disk>.img.
    """
    if writable:
        raise UsageError(
            "--writable comes with forks, which this version does not have yet",
            hint="mount it read-only, or export the disk and write to the copy",
        )

    def tell(resolved: Resolved | None) -> None:
        _tell(group, directory, resolved, json_mode)

    if ready_descriptor is not None:
        _serve_for(ready_descriptor, home, group, directory, at)
    elif foreground:
        _log(logging.WARNING)
        from blockrepl.views import serving

        serving.serve(home, group, directory, at, tell)
    else:
        from blockrepl.views import mounting

        tell(mounting.start(home.absolute(), group, directory, at))


def _log(level: int) -> None:
    """As the services do."""
    from blockrepl.services.foreground import LOG_FORMAT, LOG_TIME

    logging.basicConfig(level=level, format=LOG_FORMAT, datefmt=LOG_TIME)


def _serve_for(descriptor: int, home: Path, group: str, directory: Path, at: str | None) -> None:
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
        serving.serve(home, group, directory, at, ready)
    except Exception as error:
        failure = describe(principal(error))
        if failure is not None and not answered:
            answer({**json.loads(failure.as_json()), "exit_status": failure.exit_status})
        raise
    log.info("unmounted %s from %s", group, directory)


def _tell(group: str, directory: Path, resolved: Resolved | None, json_mode: bool) -> None:
    if resolved is None:
        data: dict[str, object] = {"group": group, "directory": str(directory)}
        image = directory / "latest" / "DISK.img"
        text = f"{group} is mounted on {directory}: latest/, checkpoints/<name>/, at/<POINT>/"
    else:
        data = {
            "group": group,
            "directory": str(directory),
            "at": format_instant(resolved.at_ns),
            "at_ns": resolved.at_ns,
            "distance_seconds": resolved.distance_seconds,
        }
        image = directory / "DISK.img"
        text = f"{group} is mounted on {directory} as of {explain(resolved)}"
    emit(data, json_mode, lambda _: f"{text}\n{HOW_TO_USE.format(image=image)}")


@click.command(epilog="Example: blockrepl umount /mnt/web")
@click.argument("directory", type=click.Path(path_type=Path))
def umount(directory: Path) -> None:
    """Unmount DIRECTORY and end the process that serves it."""
    from blockrepl.views import mounting

    mounting.umount(directory)
