"""nbdkit plugin: one protected disk. The requests are served by the compiled core, nothing else.

Parameters: ``image_fd`` and ``ring_fd``, the shared memory (both opened and locked by the program
that starts nbdkit), ``map`` (the hot map), ``size`` and ``region`` in bytes, ``hot`` (the bound on
hot regions), ``disk`` (its name) and ``image`` (the path), for the log. PYTHONPATH names the
directory that holds the blockrepl package.
"""

from __future__ import annotations

import builtins
import os
import traceback
from types import TracebackType

import nbdkit

from blockrepl.capture import _core
from blockrepl.capture._core import (
    close,
    extents,
    flush,
    get_size,
    open,
    pread,
    pwrite,
    trim,
    zero,
)

__all__ = ["close", "extents", "flush", "get_size", "open", "pread", "pwrite", "trim", "zero"]

API_VERSION = 2
_parameters: dict[str, str] = {}


def config(key: str, value: str) -> None:
    _parameters[key] = value


def config_complete() -> None:
    missing = {
        "image_fd",
        "ring_fd",
        "map",
        "size",
        "region",
        "hot",
        "disk",
        "image",
    } - _parameters.keys()
    if missing:
        raise RuntimeError(f"missing parameters: {', '.join(sorted(missing))}")


def thread_model() -> int:
    # Before 1.34 PARALLEL aborts, or answers the wrong client, when one goes away with replies
    # in flight.
    version = tuple(int(part) for part in os.environ["BLOCKREPL_NBDKIT"].split(".")[:2])
    if version >= (1, 34):
        return int(nbdkit.THREAD_MODEL_PARALLEL)
    return int(nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS)


_format_exception = traceback.format_exception


def _failed_request(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> builtins.list[str]:
    """nbdkit logs what this makes of an error: what failed is the image's file system, not us."""
    if not isinstance(error, OSError):
        return _format_exception(kind, error, trace)
    disk, image = _parameters["disk"], _parameters["image"]
    return [f"disk {disk}: {error.strerror} (image {image})"]


def after_fork() -> None:
    _core.start(
        int(_parameters["image_fd"]),
        os.open(_parameters["map"], os.O_RDWR | os.O_CLOEXEC),
        int(_parameters["ring_fd"]),
        int(_parameters["size"]),
        int(_parameters["region"]),
        int(_parameters["hot"]),
        nbdkit.set_error,
    )
    traceback.format_exception = _failed_request  # type: ignore[assignment]  # no other way in


def cleanup() -> None:
    """A flush of the core's own is waited for: the next server would take it for a killed one's."""
    _core.stop()


def block_size(handle: int) -> tuple[int, int, int]:
    return (1, 4096, 4 * 1024 * 1024)


def can_write(handle: int) -> bool:
    return True


def can_flush(handle: int) -> bool:
    return True


def can_trim(handle: int) -> bool:
    return True


def can_zero(handle: int) -> bool:
    return True


def can_fast_zero(handle: int) -> bool:
    return True


def can_extents(handle: int) -> bool:
    return True


def can_fua(handle: int) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_multi_conn(handle: int) -> bool:
    return True
