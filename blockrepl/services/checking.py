"""Examines the replicas of a home whose receiver is not running, and repairs what is derived."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from blockrepl.errors import StateError
from blockrepl.services.receiver_home import read_configuration
from blockrepl.storage.check import Progress, bytes_to_check, check_replica
from blockrepl.storage.check_findings import Finding
from blockrepl.storage.home import Home, exclusive_lock
from blockrepl.storage.repair import repair


def replicas(home: Home, names: Sequence[str]) -> tuple[list[Path], int]:
    """Replicas of some groups (none: of all), and the bytes there are to examine. StateError."""
    present = home.groups()
    if not present:
        read_configuration(home)  # in a home that is no receiver's, all would always be well
    for name in names:
        if name not in present:
            raise StateError(
                f"no replica of a group {name} in {home.path}",
                hint=f"groups here: {', '.join(present) or 'none'}",
                code="no-group",
            )
    found = [home.replica_directory(name) for name in dict.fromkeys(names) or present]
    return found, sum(map(bytes_to_check, found))


def check(
    home: Home, directories: Sequence[Path], *, repairing: bool, progress: Progress
) -> list[Finding]:
    """What is wrong with replicas. StateError when a receiver runs; StorageError."""
    try:
        lock = exclusive_lock(home.run_directory / "receiver.lock", f"the store in {home.path}")
    except StateError as error:
        raise StateError(
            str(error),
            hint="stop the receiver first; while it runs, `blockrepl verify` proves the replica",
            code=error.code,
        ) from None
    found: list[Finding] = []
    done_bytes = 0
    with lock:
        for directory in directories:
            size_bytes = bytes_to_check(directory)
            mine = check_replica(directory, partial(_tell, progress, done_bytes))
            done_bytes += size_bytes
            if repairing:
                repair(directory, mine)
            found += mine
    return found


def _tell(progress: Progress, before_bytes: int, done_bytes: int) -> None:
    progress(before_bytes + done_bytes)
