"""What is found of mounts in the system's own lists, and whom unmounting ends."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from blockrepl.errors import StateError
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


def test_mounts_are_found_among_any_bytes_of_other_names() -> None:
    """Lines as the kernel writes them: of a name it escapes white space and the backslash only."""
    lines = [
        b"22 1 0:21 / /proc rw,relatime shared:12 - proc proc rw",
        b"40 22 0:50 / /mnt/\xff\xe9\x85\r rw - tmpfs tmpfs rw",
        b"41 22 0:51 / /mnt/a\\040b\\134c\xff rw - fuse.blockrepl blockrepl:web:17 rw,user_id=0",
        b"42 22 0:52 / /mnt/\xc3\xa9 rw,nosuid - fuse.blockrepl blockrepl:w.x:18 rw",
        b"43 22 0:53 / /mnt/d rw - fuse.blockrepl other rw",
        b"44 22 0:54 / /mnt/e rw - fuse.other blockrepl:web:19 rw",
    ]
    assert mounting.parse_mounts(b"\n".join([*lines, b""])) == [
        Mount(os.fsdecode(b"/mnt/a b\\c\xff"), "web", 17),
        Mount("/mnt/é", "w.x", 18),
    ]


def test_a_mount_is_unmounted_by_a_link_to_it_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "again").symlink_to(tmp_path / "link")
    mount = Mount(str((tmp_path / "real").resolve()), "web", 0)
    monkeypatch.setattr(mounting, "mounts", lambda: [mount])
    monkeypatch.setattr(mounting, "_open_server", lambda _number: None)
    undone = []
    monkeypatch.setattr(mounting, "_unmount", lambda path, _directory: undone.append(path))
    for name in ("real", "link", "again"):
        assert mounting.umount(tmp_path / name) == mount
    assert undone == [mount.directory] * 3


def test_a_loop_of_links_is_no_mount_point(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(StateError, match="cannot be used: Too many levels of symbolic links"):
        mounting.check_mount_point(loop)
    with pytest.raises(StateError, match="is no mount of blockrepl"):
        mounting.umount(loop)
