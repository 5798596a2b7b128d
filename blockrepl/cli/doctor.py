"""``blockrepl doctor``: what this machine lacks for each role."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from blockrepl.cli.output import emit, json_option, pass_home, print_rich, table
from blockrepl.services.requirements import ROLES, Report, Role, examine

if TYPE_CHECKING:
    from rich.console import RenderableType


@click.command()
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice(ROLES),
    help="Check this role only, and fail if it lacks something. May be repeated.",
)
@json_option
@pass_home
@click.pass_context
def doctor(ctx: click.Context, home: Path, roles: tuple[Role, ...], json_mode: bool) -> None:
    """Show what this machine lacks for each role, and the command that installs it.

    \b
    Examples:
      blockrepl doctor
      blockrepl doctor --role source && blockrepl disk serve web
    """
    report = examine(home, roles or ROLES)
    emit(report, json_mode, _table)
    if not json_mode:
        print_rich(_advice(report))
    if roles and not all(report.ready.values()):
        ctx.exit(1)


def _table(report: Report) -> RenderableType:
    return table(
        ("", "need", "for", "found"),
        [
            ("ok" if need.met else "MISSING", need.name, ", ".join(need.roles), need.detail)
            for need in report.requirements
        ],
    )


def _advice(report: Report) -> str:
    lines = [f"{role}: {'ready' if ready else 'NOT ready'}" for role, ready in report.ready.items()]
    lines += [
        f"{need.name}: {need.fix}"
        for need in report.requirements
        if not need.met and not need.package
    ]
    if report.install:
        lines.append(f"install what is missing: {report.install}")
    return "\n".join(lines)
