"""nbdkit plugin: a group's disks as they were at an instant, each an export of its name.

Parameters: ``replica`` (its directory), ``at_ns``; ``disk``, the export without a name (needless
when there is one disk); ``fork``, a fork's directory: what is written goes there. Whoever starts
nbdkit holds the fork's lock, and the other end of the pipe ``until``: this process ends with it,
whatever its clients do. PYTHONPATH names the directories that hold the blockrepl package and
what it needs.
"""

from __future__ import annotations

import builtins
import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbdkit

from blockrepl.errors import BlockreplError
from blockrepl.storage import forks
from blockrepl.storage.history import ReplicaHistory
from blockrepl.views.fork import WritableView
from blockrepl.views.priority import give_way
from blockrepl.views.view import View

API_VERSION = 2
GRAIN = 4096  # qemu-img rounds zeros up to whole sectors, over data that begins inside one
_parameters: dict[str, str] = {}
_views: list[View | WritableView] = []
_told: set[str] = set()
log = logging.getLogger(__name__)


def config(key: str, value: str) -> None:
    _parameters[key] = value


def config_complete() -> None:
    missing = {"replica", "at_ns", "until"} - _parameters.keys()
    if missing:
        raise RuntimeError(f"missing parameters: {', '.join(sorted(missing))}")


def thread_model() -> int:
    # One interpreter lock answers one request at a time anyway.
    return int(nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS)


def after_fork() -> None:
    logging.basicConfig(level=logging.WARNING, format="blockrepl: %(message)s")
    replica = ReplicaHistory(Path(_parameters["replica"]))
    view = View(replica, int(_parameters["at_ns"]), replica.state())
    if "fork" in _parameters:
        give_way()
        directory = Path(_parameters["fork"])
        _views.append(WritableView(view, forks.open_overlays(directory, forks.load(directory))))
    else:
        _views.append(view)
    threading.Thread(target=_end, args=(int(_parameters["until"]),), daemon=True).start()


def _end(until: int) -> None:
    """Wait for the parent's end, or its word; what was written to the fork is made durable."""
    os.read(until, 1)
    status = 0
    try:
        if "fork" in _parameters:
            _fork().flush_all()
    except BlockreplError as error:
        log.error("%s", error)
        status = 1
    os._exit(status)


def list_exports(readonly: bool, is_tls: bool) -> builtins.list[str]:
    return sorted(_views[0].disks)


def default_export(readonly: bool, is_tls: bool) -> str:
    names = sorted(_views[0].disks)
    return _parameters.get("disk", names[0] if len(names) == 1 else "")


def open(readonly: bool) -> str:
    """The name of the disk."""
    name = str(nbdkit.export_name()) or default_export(readonly, False)
    if name not in _views[0].disks:
        nbdkit.set_error(errno.ENOENT)
        raise RuntimeError(f"no export {name!r}; there are: {', '.join(sorted(_views[0].disks))}")
    return name


def close(handle: str) -> None:
    if "fork" in _parameters:
        _fork().flush(handle)


def get_size(handle: str) -> int:
    return _views[0].disk(handle).size_bytes


def block_size(handle: str) -> tuple[int, int, int]:
    return (1, 4096, 4 * 1024 * 1024)


def can_write(handle: str) -> bool:
    return "fork" in _parameters


def can_flush(handle: str) -> bool:
    return True


def can_fua(handle: str) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_trim(handle: str) -> bool:
    return True


def can_zero(handle: str) -> bool:
    return True


def can_fast_zero(handle: str) -> bool:
    return True


def can_multi_conn(handle: str) -> bool:
    return True  # one view, whatever the connection: a flush is everybody's


def can_extents(handle: str) -> bool:
    return True


def pread(handle: str, buf: memoryview, offset: int, flags: int) -> None:
    with _errors():
        _views[0].read_into(handle, offset, buf)


def extents(
    handle: str, count: int, offset: int, flags: int
) -> builtins.list[tuple[int, int, int]]:
    hole = int(nbdkit.EXTENT_HOLE) | int(nbdkit.EXTENT_ZERO)
    with _errors():
        found = _views[0].extents(handle, offset, count, grain=GRAIN)
    return [(each.offset, each.length, 0 if each.is_data else hole) for each in found]


def pwrite(handle: str, buf: memoryview, offset: int, flags: int) -> None:
    with _errors():
        _fork().write(handle, offset, buf)
        _force(handle, flags)


def zero(handle: str, count: int, offset: int, flags: int) -> None:
    with _errors():
        _fork().zero(handle, offset, count)
        _force(handle, flags)


def trim(handle: str, count: int, offset: int, flags: int) -> None:
    zero(handle, count, offset, flags)


def flush(handle: str, flags: int) -> None:
    if "fork" in _parameters:
        with _errors():
            _fork().flush(handle)


def _force(handle: str, flags: int) -> None:
    if flags & int(nbdkit.FLAG_FUA):
        _fork().flush(handle)


def _fork() -> WritableView:
    fork = _views[0]
    assert isinstance(fork, WritableView)
    return fork


@contextmanager
def _errors() -> Iterator[None]:
    """Our errors as the client's; each is told once."""
    try:
        yield
    except BlockreplError as error:
        nbdkit.set_error(errno.ENOSPC if error.code == "full" else errno.EIO)
        if error.code != "damage" and str(error) not in _told:  # damage is told where it is found
            _told.add(str(error))
            log.error("%s", error)
        raise
