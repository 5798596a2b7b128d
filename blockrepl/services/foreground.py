"""How a service runs in the foreground: until SIGTERM or Ctrl-C, with one line a warning on stderr.

When started by systemd (NOTIFY_SOCKET), READY=1 is sent once the service says so, and STOPPING=1
when it is told to end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable

import trio

from blockrepl.heap import share_one_heap

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LOG_TIME = "%Y-%m-%dT%H:%M:%S%z"

Notify = Callable[[], None]


def run_foreground(service: Callable[[Notify], Awaitable[None]]) -> None:
    """Run ``service(ready)`` until it ends or a signal comes. Raises what the service raises."""
    share_one_heap()
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, datefmt=LOG_TIME)
    for quiet in ("hypercorn", "httpx"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    trio.run(_until_signal, service)


async def _until_signal(service: Callable[[Notify], Awaitable[None]]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def wait_for_signal() -> None:
                async for _ in signals:
                    sd_notify("STOPPING=1")
                    nursery.cancel_scope.cancel()

            nursery.start_soon(wait_for_signal)
            await service(lambda: sd_notify("READY=1"))
            nursery.cancel_scope.cancel()


def sd_notify(state: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), address)
