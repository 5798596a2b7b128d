"""blockrepl agent: join a receiver, and run the service that replicates."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import click

from blockrepl import limits
from blockrepl.cli.output import pass_home
from blockrepl.cli.sizes import RateType, SizeType


@click.group()
def agent() -> None:
    """The source side: join a receiver once, then keep the agent running.

    \b
    Examples:
      blockrepl agent join br1.eyJhZGRyZXNzIjoi...
      blockrepl agent run
    """


@agent.command()
@click.argument("token")
@click.option("--name", help="This source's name at the receiver. [default: the host's name]")
@pass_home
def join(home: Path, token: str, name: str | None) -> None:
    """Get this source's certificate with a TOKEN from `blockrepl receiver invite`.

    The key is made here and never travels. A token works once.

    \b
    Example:
      blockrepl agent join "$(ssh replica blockrepl receiver invite)"
    """
    import trio

    from blockrepl.channel import enrolment
    from blockrepl.storage.home import Home, check_name, make_directory

    wanted = check_name(name or _host_name(), "source")
    enrolment.decode_token(token)
    opened = Home.create(home)
    make_directory(opened.source_directory)
    identity = trio.run(enrolment.join, token, wanted, opened.source_directory / "identity")
    click.echo(f"joined {identity.address} as {identity.name}")


@agent.command()
@click.option(
    "--spool-size",
    type=SizeType(),
    help="Most that a group's spool may take. [default: 10G, or a fifth of the free space]",
)
@click.option(
    "--spool-reserve",
    type=SizeType(),
    default="1G",
    show_default=True,
    help="Free space that spools leave to others.",
)
@click.option(
    "--scrub-rate",
    type=RateType(),
    default="20MB/s",
    show_default=True,
    help="Most that proving the replica may read from the disks, all together; 0 turns it off.",
)
@click.option(
    "--limit",
    multiple=True,
    metavar="RATE|HH:MM-HH:MM=RATE",
    help="Send at most so much, always or in a period of the day. May be repeated.",
)
@pass_home
def run(
    home: Path,
    spool_size: int | None,
    spool_reserve: int,
    scrub_rate: int,
    limit: tuple[str, ...],
) -> None:
    """Run the agent in the foreground, until SIGTERM or Ctrl-C.

    It takes up disks that are added or removed while it runs, and survives restarts of the
    receiver, of the disks' servers and of itself. While the receiver is away or slow, what the
    guests write waits in spools beside the home's other files: no point of history is lost as long
    as they have room. In the background it proves, region by region, that the replica equals the
    disks (`blockrepl verify`).

    A limit holds back what the guests wrote, for all groups together; what keeps the session alive,
    and an idle group's lag low, it does not hold back. Periods are in local time.

    \b
    Examples:
      blockrepl agent run &
      blockrepl agent run --spool-size 50G --spool-reserve 5G
      blockrepl agent run --scrub-rate 5MB/s
      blockrepl agent run --limit 50MB/s
      blockrepl agent run --limit 08:00-18:00=10MB/s --limit 22:00-06:00=none --limit 50MB/s
    """
    from blockrepl.model.bandwidth import parse_limits
    from blockrepl.services.agent import Agent, AgentOptions, run_agent
    from blockrepl.services.foreground import run_foreground
    from blockrepl.storage.home import Home
    from blockrepl.storage.spool import SpoolLimits

    bandwidth = parse_limits(limit)
    opened = Home.open(home)
    spool = SpoolLimits(spool_size, spool_reserve)
    options = AgentOptions(spool=spool, bandwidth=bandwidth, scrub_rate=scrub_rate)

    async def service(notify: Callable[[], None]) -> None:
        def ready(running: Agent) -> None:
            identity = running.identity
            click.echo(
                f"agent ready: source {identity.name}, receiver {identity.address} (home {home})"
            )
            notify()

        await run_agent(opened, options, ready=ready)

    run_foreground(service)


def _host_name() -> str:
    name = re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().lower()).strip("-._")[:63]
    return name if re.fullmatch(limits.NAME_PATTERN, name) else "source"
