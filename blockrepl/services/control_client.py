"""The control API's other end, for commands: blocking, over the service's Unix socket."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import httpx

from blockrepl.errors import BlockreplError, PointError, StateError, UsageError
from blockrepl.services.control import short_path

ANSWER_SECONDS = 60.0  # a checkpoint from the source waits until it is durable


class ControlClient:
    """Talks to one running service. ``service`` is "receiver" or "agent".

    Methods raise what the service refused with, and StateError (code "not-running") when nobody
    answers.
    """

    def __init__(self, socket_path: Path, service: str) -> None:
        self._socket_path = socket_path
        self._service = service

    def get(self, path: str) -> Any:
        return self._request("GET", path, None, ANSWER_SECONDS)

    def post(self, path: str, content: object = None, *, is_long: bool = False) -> Any:
        """``is_long``: waits for the answer without end; a service that dies closes the socket."""
        return self._request("POST", path, content, None if is_long else ANSWER_SECONDS)

    def _request(
        self, method: str, path: str, content: object, answer_seconds: float | None
    ) -> Any:
        try:
            with (
                short_path(self._socket_path) as name,
                socket.socket(socket.AF_UNIX) as probe,
            ):
                # httpcore leaves its own socket open when nobody answers.
                probe.connect(name)
            with (
                short_path(self._socket_path) as name,
                httpx.Client(
                    # No certificates are read, which takes 50 ms: there is no TLS on a Unix socket.
                    transport=httpx.HTTPTransport(uds=name, verify=False),
                    base_url="http://control",
                    timeout=httpx.Timeout(ANSWER_SECONDS, read=answer_seconds),
                ) as client,
            ):
                response = client.request(method, path, json=content)
        except (ConnectionError, FileNotFoundError, NotADirectoryError) as error:
            raise StateError(
                f"the {self._service} is not running (home {self._socket_path.parent.parent})",
                hint=f"start it: `blockrepl {self._service} run`",
                code="not-running",
            ) from error
        except httpx.TransportError as error:
            raise StateError(
                f"the {self._service} did not answer: {error or type(error).__name__}",
                hint="look at its log",
                code="no-answer",
            ) from error
        return self._result(response)

    def _result(self, response: httpx.Response) -> Any:
        if response.is_success:
            return response.json()
        try:
            refusal = response.json()
            error, code, hint = refusal["error"], refusal["code"], refusal["hint"]
        except (ValueError, KeyError, TypeError):
            raise StateError(
                f"the {self._service} failed inside (HTTP {response.status_code})",
                hint="look at its log",
                code="internal",
            ) from None
        raise _error(refusal, error, code=code, hint=hint, status=response.status_code)


def _error(
    refusal: dict[str, Any], message: str, *, code: str, hint: str, status: int
) -> BlockreplError:
    if "nearest_before_ns" in refusal:
        return PointError(
            message,
            hint=hint,
            code=code,
            nearest_before_ns=refusal["nearest_before_ns"],
            nearest_after_ns=refusal["nearest_after_ns"],
        )
    kind = UsageError if status == httpx.codes.BAD_REQUEST else StateError
    return kind(message, hint=hint, code=code)
