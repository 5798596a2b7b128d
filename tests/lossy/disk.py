"""A lossy file system for a test: mounted, commanded, and gone with the block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lossy.filesystem import CONTROL
from lossy.nodes import Loss

When = Literal["before", "after"]


class LossyDisk:
    """The commands (lossy/filesystem.py) as methods. Each begins the counts anew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _command(self, **command: object) -> None:
        os.setxattr(self.path, CONTROL, json.dumps(command).encode())

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(os.getxattr(self.path, CONTROL))
        return found

    def lose_power(self) -> None:
        self._command(cut=0)

    def lose_power_at(self, sync: int, when: When, *, of: str = "") -> None:
        self._command(cut=sync, when=when, of=of)

    def restore(self, loss: Loss, seed: int = 0) -> None:
        self._command(restore=loss.value, seed=seed)

    def fail(self, call: int, error: int | Literal["short"], *, only: str = "") -> None:
        self._command(fail=call, error=error, only=only)

    def count(self) -> None:
        """Only begin the counts anew; no fault is due any more."""
        self._command()

    def set_full(self, full: bool) -> None:
        self._command(full=full)


@contextmanager
def lossy_disk(target: Path) -> Iterator[LossyDisk]:
    """Mounted at a new directory ``target``, by a process of its own."""
    target.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "lossy.filesystem", str(target)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        try:
            assert process.stdout.readline() == "ready\n"
            yield LossyDisk(target)
        finally:
            subprocess.run(["fusermount3", "-u", "-z", target], check=False, capture_output=True)
            process.kill()  # who still has files open would keep it alive
