"""The control API: HTTP and JSON on a Unix socket, an ASGI application under Hypercorn on Trio.

The socket is in the home's run directory (0700) and itself 0600: who may connect may do everything.
A failure is answered as ``{"error", "code", "hint"}`` (and the nearest instants of a PointError)
with status 400 for wrong usage, 409 for everything else that is expected; ``control_client`` makes
the same errors of it again. Defects are 500 and keep their traceback in the log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from blockrepl.errors import BlockreplError, PointError, UsageError

STOP_SECONDS = 1.0  # a request being answered may end


def control_application(routes: Sequence[BaseRoute]) -> Starlette:
    """An application whose handlers may raise BlockreplError and pydantic's ValidationError."""
    return Starlette(
        routes=routes,
        exception_handlers={BlockreplError: _refuse, ValidationError: _refuse_body, 404: _no_route},
    )


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, BlockreplError)
    content: dict[str, object] = {"error": str(error), "code": error.code, "hint": error.hint}
    if isinstance(error, PointError):
        content["nearest_before_ns"] = error.nearest_before_ns
        content["nearest_after_ns"] = error.nearest_after_ns
    return JSONResponse(content, 400 if isinstance(error, UsageError) else 409)


async def _refuse_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return await _refuse(request, UsageError(f"{where or 'the request'}: {first['msg']}"))


async def _no_route(request: Request, error: Exception) -> Response:
    return await _refuse(
        request, UsageError(f"{request.method} {request.url.path} is not known", code="unknown")
    )


async def serve_control(
    app: Starlette,
    socket_path: Path,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; started once the socket accepts. The socket's file goes with it.

    A file left behind by a crash is replaced: hold the home's lock.
    """
    listener = _listen(socket_path)
    descriptor = listener.detach()
    config = Config()
    config.bind = [f"fd://{descriptor}"]
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.graceful_timeout = STOP_SECONDS

    async def until_serving() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, app, config)
            # Hypercorn makes it inheritable, for worker processes that there are none of.
            os.set_inheritable(descriptor, False)
            task_status.started()

    try:
        await until_serving()
    finally:
        with contextlib.suppress(FileNotFoundError):
            socket_path.unlink()


def _listen(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(path) as name:
            old = os.umask(0o177)
            try:
                listener.bind(name)
            finally:
                os.umask(old)
        listener.listen(64)
    except BaseException:
        listener.close()
        raise
    return listener


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for a Unix socket that fits its 107 bytes, however long the path is."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
