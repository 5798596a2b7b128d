"""The command line's entry: which verbs there are, and how every failure is told.

A verb family is one module in ``blockrepl.cli``; it is imported when one of its verbs runs, so
``blockrepl --help`` reads the table below and nothing else. The module's click command has the
verb's name (``blockrepl.cli.mount`` defines ``mount`` and ``umount``).

===========================  ======  ============================================================
what ends a command          status  stderr
===========================  ======  ============================================================
nothing                      0
BlockreplError               1 or 2  ``error: what (why). hint``
click's usage errors         2       the same
OSError                      1       the same, named by file
Ctrl-C                       130
the reader of a pipe left    1
anything else                1       ``error: internal: ...``; traceback in <home>/log/errors.log,
                                     or on stderr with BLOCKREPL_DEBUG=1
===========================  ======  ============================================================

With ``--json`` the same failure is also one object on stdout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from blockrepl.cli.failure import report
from blockrepl.cli.output import Invocation

COMMANDS = {
    # verb: (module in blockrepl.cli, what --help says)
    "receiver": ("receiver", "The replica: init, run, invite, seed, sources, revoke, check."),
    "agent": ("agent", "The source side: join, run."),
    "disk": ("disk", "Protect disks and serve them to guests."),
    "status": ("status", "State, lag, history and gaps of every group."),
    "verify": ("verify", "What of the replica is proven to equal the disks; a pass now."),
    "checkpoint": ("checkpoint", "Name an instant of a group's history."),
    "point": ("point", "Resolve a point and explain it."),
    "mount": ("mount", "Mount a group as it was at any instant."),
    "umount": ("mount", "Unmount what mount has mounted."),
    "serve": ("serve", "Serve a group over NBD as it was at any instant."),
    "fork": ("fork", "Writable views that are kept: create, list, remove."),
    "export": ("export", "Write a disk, as it was at a point, to a file."),
    "diff": ("diff", "What was written between two points; a patch of it."),
    "timeline": ("timeline", "Draw what happened to a group: writes, flushes, gaps."),
    "bisect": ("bisect", "Find the write that made a group bad."),
    "retention": ("retention", "Which points are kept for how long, and what goes next."),
    "doctor": ("doctor", "What this machine lacks, and how to install it."),
    "completion": ("completion", "Print the completion script of a shell."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"blockrepl.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=text)
            for name, (_, text) in COMMANDS.items()
            if name.startswith(incomplete)
        ]


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every command has --help with examples. Errors are one line; --json prints data.",
)
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="BLOCKREPL_HOME",
    metavar="DIR",
    help="Where state is kept. [env: BLOCKREPL_HOME; default: /var/lib/blockrepl as root, "
    "else ~/.local/share/blockrepl]",
)
@click.option(
    "--read-cache",
    envvar="BLOCKREPL_READ_CACHE",
    metavar="SIZE",
    help="Memory for what was read of a replica, per mount, server or other reader of it. "
    "[env: BLOCKREPL_READ_CACHE; default: 176M]",
)
@click.version_option(version("blockrepl"), message="blockrepl %(version)s")
@click.pass_obj
def cli(invocation: Invocation, home: Path | None, read_cache: str | None) -> None:
    """Continuous replication of virtual disks, with a time machine at the other end."""
    if home is not None:
        invocation.home = home.absolute()
    if read_cache is not None:
        from blockrepl.storage.read_memory import VARIABLE, check_read_cache

        # Read where a replica is opened: in this process or in one that it starts.
        os.environ[VARIABLE] = str(check_read_cache(read_cache))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the exit status. Never raises for what the command did."""
    invocation = Invocation()
    try:
        status = cli.main(
            args=list(arguments), prog_name="blockrepl", standalone_mode=False, obj=invocation
        )
        sys.stdout.flush()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        return report(error, home=invocation.home, json_mode="--json" in options)
    return status if isinstance(status, int) else 0


def _open_closed_streams() -> None:
    """A stream that whoever started us has closed leads nowhere: the next file is not to be it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
            assert descriptor == number
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))


def main() -> None:
    """The console script."""
    _open_closed_streams()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
