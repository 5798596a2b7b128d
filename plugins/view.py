"""nbdkit plugin: one disk of a group as it was at an instant, read-only.

Parameters: ``replica`` (its directory), ``disk``, ``at_ns``. PYTHONPATH names the directories that
hold the blockrepl package and what it needs.
"""

from __future__ import annotations

import builtins
import errno
import logging
from pathlib import Path

import nbdkit

from blockrepl.errors import BlockreplError
from blockrepl.storage.history import ReplicaHistory
from blockrepl.views.view import View

API_VERSION = 2
GRAIN = 4096  # qemu-img rounds zeros up to whole sectors, over data that begins inside one
_parameters: dict[str, str] = {}
_views: list[View] = []


def config(key: str, value: str) -> None:
    _parameters[key] = value


def config_complete() -> None:
    missing = {"replica", "disk", "at_ns"} - _parameters.keys()
    if missing:
        raise RuntimeError(f"missing parameters: {', '.join(sorted(missing))}")


def thread_model() -> int:
    # One interpreter lock answers one request at a time anyway.
    return int(nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS)


def after_fork() -> None:
    logging.basicConfig(level=logging.WARNING, format="blockrepl: %(message)s")
    replica = ReplicaHistory(Path(_parameters["replica"]))
    _views.append(View(replica, int(_parameters["at_ns"]), replica.state()))


def open(readonly: bool) -> str:
    return _parameters["disk"]


def get_size(handle: str) -> int:
    return _views[0].disk(handle).size_bytes


def can_write(handle: str) -> bool:
    return False


def can_multi_conn(handle: str) -> bool:
    return True


def can_extents(handle: str) -> bool:
    return True


def pread(handle: str, buf: memoryview, offset: int, flags: int) -> None:
    try:
        buf[:] = _views[0].read(handle, offset, len(buf))
    except BlockreplError:
        nbdkit.set_error(errno.EIO)
        raise


def extents(
    handle: str, count: int, offset: int, flags: int
) -> builtins.list[tuple[int, int, int]]:
    hole = int(nbdkit.EXTENT_HOLE) | int(nbdkit.EXTENT_ZERO)
    try:
        found = _views[0].extents(handle, offset, count, grain=GRAIN)
    except BlockreplError:
        nbdkit.set_error(errno.EIO)
        raise
    return [(each.offset, each.length, 0 if each.is_data else hole) for each in found]
