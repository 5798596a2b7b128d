"""The control API: who may reach it, how failures travel, and that it ends with its service."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from blockrepl.cli import main as cli
from blockrepl.errors import BlockreplError, PointError, StateError, UsageError
from blockrepl.services import control_client, receiver_home
from blockrepl.services.control import control_application, serve_control
from blockrepl.services.control_client import ControlClient
from blockrepl.storage.home import Home, make_directory


class Body(BaseModel):
    count: int


def application() -> Starlette:
    async def echo(request: Request) -> JSONResponse:
        body = Body.model_validate_json(await request.body())
        return JSONResponse({"count": body.count + 1})

    async def state(request: Request) -> JSONResponse:
        raise StateError("it is so", hint="do this", code="so")

    async def point(request: Request) -> JSONResponse:
        raise PointError("in a gap", nearest_before_ns=5, nearest_after_ns=None)

    async def defect(request: Request) -> JSONResponse:
        raise ZeroDivisionError

    return control_application(
        [
            Route("/echo", echo, methods=["POST"]),
            Route("/state", state),
            Route("/point", point),
            Route("/defect", defect),
        ]
    )


@pytest.fixture
async def socket_path(tmp_path: Path) -> AsyncIterator[Path]:
    directory = tmp_path / ("long" * 30)  # longer than a Unix socket's address may be
    directory.mkdir()
    path = directory / "receiver.sock"
    path.write_text("left behind")
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, application(), path)
        yield path
        nursery.cancel_scope.cancel()


async def _request(path: Path, method: str, where: str, content: object = None) -> object:
    client = ControlClient(path, "receiver")
    if method == "GET":
        return await trio.to_thread.run_sync(client.get, where)
    return await trio.to_thread.run_sync(client.post, where, content)


async def test_only_the_owner_may_connect_and_answers_are_json(socket_path: Path) -> None:
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    assert await _request(socket_path, "POST", "/echo", {"count": 1}) == {"count": 2}


async def test_refusals_arrive_as_the_errors_they_were(
    socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def refused(method: str, where: str, content: object = None) -> BlockreplError:
        with pytest.raises(BlockreplError) as error:
            await _request(socket_path, method, where, content)
        return error.value

    error = await refused("GET", "/state")
    assert isinstance(error, StateError)
    assert (str(error), error.hint, error.code) == ("it is so", "do this", "so")
    error = await refused("GET", "/point")
    assert isinstance(error, PointError)
    assert (error.nearest_before_ns, error.nearest_after_ns) == (5, None)
    assert isinstance(await refused("POST", "/echo", {"count": "x"}), UsageError)
    assert isinstance(await refused("GET", "/nowhere"), UsageError)
    assert (await refused("GET", "/defect")).code == "internal"
    with trio.fail_after(10):  # it is logged once the answer has been sent
        while "ZeroDivisionError" not in caplog.text:
            await trio.sleep(0.01)


async def test_what_is_due_of_retention_may_take_as_long_as_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Guards the patience of `retention run`: it failed after a minute, and the work went on.
    async def work(request: Request) -> JSONResponse:
        await trio.sleep(1.0)  # longer than the answer to anything else is waited for
        return JSONResponse({})

    monkeypatch.setattr(control_client, "ANSWER_SECONDS", 0.2)
    home = Home.create(tmp_path / "home")
    receiver_home.initialise(home, "vault")
    make_directory(home.run_directory)
    routes = [
        Route("/retention/web/run", work, methods=["POST"]),
        Route("/retention/web", work, methods=["GET"]),
    ]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, control_application(routes), home.receiver_socket)
        for verb, status in (("run", 0), ("show", 1)):
            words = ["--home", str(home.path), "retention", verb, "web", "--json"]
            assert await trio.to_thread.run_sync(cli.run, words) == status
        nursery.cancel_scope.cancel()
    assert "did not answer" in capfd.readouterr().err


async def test_the_socket_goes_with_the_service(tmp_path: Path) -> None:
    path = tmp_path / "run" / "agent.sock"
    for _ in range(2):
        with pytest.raises(StateError, match="agent is not running") as error:
            ControlClient(path, "agent").get("/status")
        assert error.value.code == "not-running"
        path.parent.mkdir(exist_ok=True)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, application(), path)
            assert path.is_socket()
            nursery.cancel_scope.cancel()
        assert not path.exists()
