"""What is found of mounts in the system's own lists, and whom unmounting ends."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from blockrepl.views import mounting
from blockrepl.views.mounting import Mount


def test_a_process_that_got_a_dead_servers_number_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `_open_server`: the mount's source still names the process that has died."""
    with subprocess.Popen(["sleep", "100"]) as other:
        mount = Mount(str(tmp_path), "web", other.pid)
        monkeypatch.setattr(mounting, "mounts", lambda: [mount])
        monkeypatch.setattr(mounting, "_unmount", lambda _path, _directory: None)
        monkeypatch.setattr(mounting, "COPY_SECONDS", 0.0)
        assert mounting.umount(tmp_path) == mount
        assert other.poll() is None
        other.kill()
        assert other.wait() == -9
