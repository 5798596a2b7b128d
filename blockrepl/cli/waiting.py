"""Waiting for a group: whoever waits is told of its error at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockrepl.errors import StateError

if TYPE_CHECKING:
    from blockrepl.services.control_client import ControlClient

IN_ERROR = "in-error"


def find_group(client: ControlClient, name: str) -> dict[str, Any] | None:
    """The group in the service's status."""
    groups: list[dict[str, Any]] = client.get("/status")["groups"]
    return next((one for one in groups if one["name"] == name), None)


def check_working(group: dict[str, Any] | None, what: str, later: str) -> None:
    """StateError when a group's status says that it is in error: ``what`` would wait for long.

    ``later``: what becomes of it when that is solved.
    """
    if group is None or group["state"] != "error":
        return
    problems = [group.get("problem"), *(disk.get("problem") for disk in group["disks"])]
    why = next((one for one in problems if one), "its group is in error; see `blockrepl status`")
    raise StateError(f"{what}: {why}", hint=later, code=IN_ERROR)
