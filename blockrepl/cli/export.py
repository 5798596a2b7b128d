"""``export``: a disk, as it was at a point, as a file."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import click

from blockrepl.cli.output import emit, json_option, pass_home, progress
from blockrepl.cli.point import complete_group, complete_point, explain
from blockrepl.model import points
from blockrepl.units import format_bytes, format_instant


@click.command(
    epilog="Examples: blockrepl export web root /backup/root.img --at latest;  "
    "blockrepl export web root root.qcow2 --at tag:before-upgrade --format qcow2"
)
@click.argument("group", shell_complete=complete_group)
@click.argument("disk")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--at", metavar="POINT", required=True, shell_complete=complete_point)
@click.option(
    "--format", "file_format", type=click.Choice(["raw", "qcow2"]), default="raw", show_default=True
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@json_option
@pass_home
def export(
    home: Path,
    group: str,
    disk: str,
    out: Path,
    at: str,
    file_format: str,
    force: bool,
    json_mode: bool,
) -> None:
    """Write DISK of GROUP, as it was at a point, to the file OUT (sparse).

    OUT appears when it is complete and durable; what fails or is interrupted leaves nothing.
    """
    from blockrepl.storage import pins
    from blockrepl.storage.history import ReplicaHistory
    from blockrepl.views import export as exports
    from blockrepl.views.view import View

    point = points.parse(at)
    exports.check_target(out, force=force)
    with ExitStack() as closing:
        replica = closing.enter_context(ReplicaHistory.open(home, group))
        state = replica.state()
        resolved = replica.resolve(point, time.time_ns(), state)
        closing.enter_context(pins.holding(replica, resolved.at_ns, resolved.at_ns, "export"))
        view = View(replica, resolved.at_ns, state)
        size_bytes = view.disk(disk).size_bytes
        with progress(f"{disk} to {out.name}", size_bytes) as update:
            if file_format == "raw":
                exports.export_raw(view, disk, out, update)
            else:
                exports.export_qcow2(replica.directory, view, disk, out, update)
    data = {
        "out": str(out),
        "format": file_format,
        "size_bytes": size_bytes,
        "stored_bytes": out.stat().st_blocks * 512,
        "at": format_instant(resolved.at_ns),
        "at_ns": resolved.at_ns,
        "distance_seconds": resolved.distance_seconds,
    }
    text = f"{out}: {disk} of {group} ({format_bytes(size_bytes)}) as of {explain(resolved)}"
    emit(data, json_mode, lambda _: text)
