"""Starting a disk's NBD server: this process locks the image and the ring, then becomes nbdkit.

The locks belong to the open files that nbdkit inherits: they last exactly as long as the server.
The socket is made here and handed over as systemd would (LISTEN_FDS): nbdkit sets a umask of its
own, so one that it made would be open to everybody; and a client may connect as soon as the line
"ready" is read.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

from blockrepl import limits
from blockrepl.errors import StateError
from blockrepl.paths import import_root, plugin_script
from blockrepl.storage.clock import open_clock
from blockrepl.storage.image import image_size, lock_image
from blockrepl.storage.ring import lock_ring
from blockrepl.storage.source import SourceDisks, check_unwritten

THREADS = 16
_LISTEN_FD = 3  # where a program that is handed its sockets looks for the first


def nbdkit_version(program: str) -> str:
    """nbdkit's version, as in ``1.32.5``."""
    printed = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+\.\d+", printed.stdout)
    if printed.returncode or not found:
        raise StateError(
            f"{program} does not run: {printed.stderr.strip()[:200]}",
            hint="see `blockrepl doctor`",
            code="no-nbdkit",
        )
    return found[0]


def exec_server(disks: SourceDisks, name: str) -> None:
    """Replace this process by the disk's server. Returns only by raising."""
    entry = disks.load(name)
    program = shutil.which("nbdkit")
    if program is None:
        raise StateError("nbdkit is not installed", hint="see `blockrepl doctor`", code="no-nbdkit")
    version = nbdkit_version(program)
    clock = open_clock(disks.home.source_directory)
    with disks.lock(entry):
        entry = disks.load(name)  # it may have been removed meanwhile, or have grown
        image = lock_image(entry.image)
        check_unwritten(entry)
        size_bytes = image_size(entry.image)
        if size_bytes != entry.size_bytes:
            raise StateError(
                f"image {entry.image} has {size_bytes} bytes, disk {name!r} was added with "
                f"{entry.size_bytes}",
                hint=f"if it was enlarged on purpose: blockrepl disk resize {name}"
                if size_bytes > entry.size_bytes
                else "restore its size, or remove the disk and add it under another name",
                code="image-size",
            )
        ring = lock_ring(disks.ensure_ring(entry, clock))
    path = disks.socket_path(entry)
    image, ring = _handed_over(image), _handed_over(ring)
    _listen(path)
    environment = {
        **os.environ,
        "PYTHONPATH": str(import_root()),
        "BLOCKREPL_NBDKIT": version,
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": "1",
    }
    environment.pop("PYTHONHOME", None)
    command = [
        program,
        "--foreground",
        f"--threads={THREADS}",
        "python",
        str(plugin_script("capture")),
        f"image_fd={image}",
        f"map={disks.hot_map_path(entry)}",
        f"ring_fd={ring}",
        f"size={entry.size_bytes}",
        f"region={limits.REGION_BYTES}",
        f"hot={limits.HOT_REGIONS_MAX}",
        f"disk={name}",
        f"image={entry.image}",
    ]
    print(f"disk {name} ready on {path}", flush=True)
    os.execve(program, command, environment)


def _handed_over(descriptor: int) -> int:
    """For the server to inherit, out of the way of the socket's."""
    inherited = fcntl.fcntl(descriptor, fcntl.F_DUPFD, _LISTEN_FD + 1)
    os.close(descriptor)
    return inherited


def _listen(path: Path) -> None:
    """Listen on a Unix socket that only this user may open, as the descriptor nbdkit takes."""
    path.unlink(missing_ok=True)  # of a killed server: nobody else holds the image
    os.umask(0o177)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen()
    except OSError as error:
        raise StateError(
            f"cannot listen on {path}: {error.strerror}",
            hint="check that the home's run directory is there and writable",
            code="socket",
        ) from error
    descriptor = listener.detach()
    os.dup2(descriptor, _LISTEN_FD)
    os.set_inheritable(_LISTEN_FD, True)  # dup2 leaves it as it was where both are the same
    if descriptor != _LISTEN_FD:
        os.close(descriptor)
