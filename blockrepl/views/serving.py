"""Serving a mount in this process, from its start until it is unmounted or told to end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from blockrepl.errors import StateError
from blockrepl.heap import share_one_heap
from blockrepl.model import points
from blockrepl.model.points import Resolved
from blockrepl.storage.forks import open_overlays
from blockrepl.storage.history import ReplicaHistory
from blockrepl.views.forking import Wanted, open_wanted
from blockrepl.views.fuse import READERS, ViewFileSystem
from blockrepl.views.fuse_fork import ForkFileSystem
from blockrepl.views.fuse_wait import install
from blockrepl.views.mounting import check_mount_point, fuse_descriptors, mounts
from blockrepl.views.priority import give_way

READ_AHEAD_KIB = 4096  # 128 KiB, the default, reads at 0.4x of this (measured)
TASKS = 2 * READERS  # of pyfuse3; with a fixed number it starts and ends none per request


def serve(
    home: Path,
    group: str,
    directory: Path,
    wanted: Wanted,
    ready: Callable[[Resolved | None], None],
) -> None:
    """Mount and serve until unmounted, or until SIGTERM or SIGINT. ``ready`` is called once."""
    path = check_mount_point(directory)
    share_one_heap()
    if wanted.is_fork:
        give_way()
    with contextlib.ExitStack() as closing:
        replica = closing.enter_context(ReplicaHistory.open(home, group))
        files, resolved = closing.enter_context(_files(replica, wanted, f"mount {path}"))
        closing.enter_context(mounted(files, path, group, is_writable=wanted.is_fork))
        trio.run(_serve, path, partial(ready, resolved))


@contextlib.contextmanager
def mounted(files: ViewFileSystem, path: Path, group: str, *, is_writable: bool) -> Iterator[None]:
    """A mount that pyfuse3 answers in this process, undone at the end. StateError."""
    options = set(pyfuse3.default_options)
    options |= {"subtype=blockrepl", f"fsname=blockrepl:{group}:{os.getpid()}"}
    options.add("rw" if is_writable else "ro")
    if os.geteuid() == 0:
        options.add("allow_other")
    before = fuse_descriptors()
    try:
        pyfuse3.init(files, str(path), options)
    except RuntimeError as error:
        raise StateError(
            f"cannot mount on {path}: the kernel or fusermount3 refused",
            hint="see: blockrepl doctor",
        ) from error
    for descriptor in fuse_descriptors() - before:
        files.has_more = install(descriptor, files.has_threads)
    try:
        yield
    finally:
        # Unmounted already, the directory may be somebody else's mount by now.
        is_mounted = any(mount.process == os.getpid() for mount in mounts())
        pyfuse3.close(unmount=is_mounted)


@contextlib.contextmanager
def _files(
    replica: ReplicaHistory, wanted: Wanted, what: str
) -> Iterator[tuple[ViewFileSystem, Resolved | None]]:
    """The file system that is wanted, and the instant if it is of one."""
    files: ViewFileSystem
    with contextlib.ExitStack() as closing:
        if wanted.is_fork:
            opened, resolved = open_wanted(replica, wanted)
            closing.callback(opened.close)
            overlays = open_overlays(opened.directory, opened.fork)
            files = ForkFileSystem(replica, resolved.at_ns, replica.state(), overlays, what)
        else:
            state = replica.state()
            resolved = None
            if wanted.at is not None:
                resolved = replica.resolve(points.parse(wanted.at), time.time_ns(), state)
            files = ViewFileSystem(replica, resolved.at_ns if resolved else None, state, what)
        closing.callback(files.close)
        yield files, resolved


async def _serve(path: Path, ready: Callable[[], None]) -> None:
    async with trio.open_nursery() as nursery:

        async def end_on_signal() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    pyfuse3.terminate()

        async def tell_when_ready() -> None:
            # It asks the mount, which may be told to end, and so answer no more, meanwhile.
            await trio.to_thread.run_sync(_read_ahead, path, abandon_on_cancel=True)
            ready()

        nursery.start_soon(end_on_signal)
        nursery.start_soon(tell_when_ready)
        await answer()
        nursery.cancel_scope.cancel()


async def answer() -> None:
    """Answer the kernel until unmounted or `pyfuse3.terminate`."""
    await pyfuse3.main(TASKS, TASKS)


def _read_ahead(path: Path) -> None:
    """Let the kernel read further ahead of sequential readers. It answers: the mount is ready."""
    device = os.stat(path).st_dev
    file = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    with contextlib.suppress(OSError):  # only root may
        file.write_text(f"{READ_AHEAD_KIB}\n")
