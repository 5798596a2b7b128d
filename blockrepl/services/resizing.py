"""Growing a disk on command, beside an agent that runs or in its place (storage/growing.py)."""

from __future__ import annotations

from dataclasses import dataclass

from blockrepl.errors import StateError
from blockrepl.services.control_client import ControlClient
from blockrepl.storage.clock import open_clock
from blockrepl.storage.growing import Progress, grow_disk, grow_image
from blockrepl.storage.home import Home, exclusive_lock
from blockrepl.storage.source import DiskEntry, SourceDisks


@dataclass(frozen=True, slots=True)
class Resized:
    entry: DiskEntry
    before_bytes: int


def resize(home: Home, name: str, size_bytes: int | None, progress: Progress) -> Resized:
    """Give a disk more bytes; None: those that its image has already. Blocks.

    UsageError, StateError, StorageError: done again, it goes on where it broke off.
    """
    disks = SourceDisks(home)
    before = disks.load(name)
    wanted = grow_image(disks, before, size_bytes, progress)
    try:
        ControlClient(home.agent_socket, "agent").post(
            f"/disks/{name}/grow", {"size_bytes": wanted}
        )
    except StateError as error:
        if error.code != "not-running":
            raise
        # No agent may begin meanwhile.
        with exclusive_lock(home.run_directory / "agent.lock", f"the source at {home.path}"):
            grow_disk(disks, name, wanted, open_clock(home.source_directory))
    return Resized(disks.load(name), before.size_bytes)
