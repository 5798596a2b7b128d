"""``diff``: what was written between two points, and a patch of it."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blockrepl.cli.output import emit, json_option, pass_home, progress
from blockrepl.cli.point import complete_group, complete_point, explain
from blockrepl.errors import StateError, UsageError
from blockrepl.model import points
from blockrepl.units import format_bytes, format_instant

if TYPE_CHECKING:
    from blockrepl.model.points import Resolved
    from blockrepl.views.diff import DiskDiff

RANGES_SHOWN = 20  # per disk; all of them with --json


# Unknown options are arguments here, so that -5m can be typed as it is; -1h30m is no call for help.
@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
    epilog="Examples: blockrepl diff web -1h latest;  "
    "blockrepl diff web tag:before tag:after --compare --json;  "
    "blockrepl diff web -1d latest --disk root --patch root.qcow2",
)
@click.argument("group", shell_complete=complete_group)
@click.argument("point1", shell_complete=complete_point)
@click.argument("point2", shell_complete=complete_point)
@click.option("--disk", "names", metavar="DISK", multiple=True, help="Only this disk (or these).")
@click.option("--compare", is_flag=True, help="Read both, and leave out what is the same.")
@click.option(
    "--patch",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the changed clusters of one disk, as of POINT2, to this qcow2 file.",
)
@click.option("--force", is_flag=True, help="Replace the patch's file if it exists.")
@json_option
@pass_home
def diff(
    home: Path,
    group: str,
    point1: str,
    point2: str,
    names: tuple[str, ...],
    compare: bool,
    patch: Path | None,
    force: bool,
    json_mode: bool,
) -> None:
    """List the ranges of GROUP's disks that were written between POINT1 and POINT2.

    From the index alone, without reading any content: so what was written with the bytes it had
    before counts as changed, unless --compare reads both. Trimmed and zeroed ranges are changes.

    A patch is applied to an image of POINT1:
      qemu-img rebase -u -F raw -b IMAGE PATCH && qemu-img commit PATCH
    """
    from blockrepl.storage import pins
    from blockrepl.storage.history import ReplicaHistory
    from blockrepl.views import diff as diffs
    from blockrepl.views.export import check_target
    from blockrepl.views.view import View, window_cache

    asked = [points.parse(text) for text in (point1, point2)]
    if patch is not None:
        check_target(patch, force=force)
    with ExitStack() as closing:
        history = closing.enter_context(ReplicaHistory.open(home, group))
        state, now_ns = history.state(), time.time_ns()
        first, second = (history.resolve(point, now_ns, state) for point in asked)
        for resolved in (first, second):
            closing.enter_context(pins.holding(history, resolved.at_ns, resolved.at_ns, "diff"))
        found = _chosen(diffs.diff(history, state, first.at_ns, second.at_ns), group, names)
        windows = window_cache()
        views = [View(history, each.at_ns, state, windows) for each in (first, second)]
        if compare:
            found = [diffs.compare(views[0], views[1], each) for each in found]
        if patch is not None:
            one = _only(found)
            with progress(f"{one.name} to {patch.name}", diffs.patch_bytes(one)) as update:
                diffs.write_patch(views[1], one, patch, update)
    data = _data(group, first, second, compare, found) | {
        "patch": None if patch is None else str(patch)
    }
    emit(data, json_mode, lambda _: _text(group, first, second, found))


def _chosen(found: list[DiskDiff], group: str, names: tuple[str, ...]) -> list[DiskDiff]:
    there = {each.name for each in found}
    for name in names:
        if name not in there:
            raise StateError(
                f"group {group} has no disk {name} at these points",
                hint=f"disks there: {', '.join(sorted(there)) or 'none'}",
                code="no-disk",
            )
    return [each for each in found if not names or each.name in names]


def _only(found: list[DiskDiff]) -> DiskDiff:
    if len(found) != 1:
        raise UsageError(
            "a patch is of one disk",
            hint="choose it with --disk: " + ", ".join(d.name for d in found),
        )
    if found[0].only_at is not None:
        raise StateError(
            f"disk {found[0].name} is there at one of the points only", hint="export it instead"
        )
    return found[0]


def _data(
    group: str, first: Resolved, second: Resolved, compared: bool, found: list[DiskDiff]
) -> dict[str, Any]:
    return {
        "group": group,
        "from": format_instant(first.at_ns),
        "from_ns": first.at_ns,
        "to": format_instant(second.at_ns),
        "to_ns": second.at_ns,
        "compared": compared,
        "disks": [
            {
                "disk": each.name,
                "size_bytes": each.size_bytes,
                "before_bytes": each.before_bytes,
                "only_at": each.only_at,
                "records": each.records,
                "changed_bytes": each.changed_bytes,
                "ranges": [
                    {"offset": start, "length": end - start}
                    for start, end in zip(each.starts.tolist(), each.ends.tolist(), strict=True)
                ],
            }
            for each in found
        ],
    }


def _text(group: str, first: Resolved, second: Resolved, found: list[DiskDiff]) -> str:
    lines = [f"{group} from {explain(first)}", f"{' ' * len(group)}   to {explain(second)}"]
    for each in found:
        if each.only_at is not None:
            lines.append(f"{each.name}: only there at the {each.only_at} point")
            continue
        if each.before_bytes not in (None, each.size_bytes):
            lines.append(
                f"{each.name}: its size goes from {each.before_bytes} to {each.size_bytes} bytes"
            )
        lines.append(
            f"{each.name}: {format_bytes(each.changed_bytes)} in {len(each.starts)} ranges, "
            f"{each.records} records"
        )
        shown = zip(
            each.starts[:RANGES_SHOWN].tolist(), each.ends[:RANGES_SHOWN].tolist(), strict=True
        )
        lines += [f"  {start:>16} + {end - start}" for start, end in shown]
        if len(each.starts) > RANGES_SHOWN:
            lines.append(f"  ... and {len(each.starts) - RANGES_SHOWN} more (--json has all)")
    return "\n".join(lines)
