"""A client for QEMU's monitor protocol: JSON lines on a Unix socket, replies among events."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from scripts.benchmark.processes import MeasurementError

REPLY_SECONDS = 60.0


class Monitor:
    """One connection to a monitor; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(REPLY_SECONDS)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        self._receive()  # the greeting
        self.execute("qmp_capabilities")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise MeasurementError("the monitor closed its connection")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return its result; events that arrive meanwhile are dropped."""
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._receive()
            if "error" in message:
                raise MeasurementError(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
