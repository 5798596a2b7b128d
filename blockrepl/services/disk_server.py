"""Starting a disk's NBD server: this process locks the image, then becomes nbdkit.

The lock belongs to the open file that nbdkit inherits: it lasts exactly as long as the server.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from blockrepl import limits
from blockrepl.errors import StateError
from blockrepl.paths import import_root, plugin_script
from blockrepl.storage.clock import open_clock
from blockrepl.storage.image import image_size, lock_image
from blockrepl.storage.source import SourceDisks

THREADS = 16


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
        image = lock_image(entry.image, inheritable=True)
        size_bytes = image_size(entry.image)
        if size_bytes != entry.size_bytes:
            raise StateError(
                f"image {entry.image} has {size_bytes} bytes, disk {name!r} was added with "
                f"{entry.size_bytes}",
                hint="restore its size, or remove the disk and add it again",
                code="image-size",
            )
        ring = disks.ensure_ring(entry, clock)
    socket = disks.socket_path(entry)
    socket.unlink(missing_ok=True)  # of a killed server: nobody else holds the image
    os.umask(0o177)
    environment = {**os.environ, "PYTHONPATH": str(import_root()), "BLOCKREPL_NBDKIT": version}
    environment.pop("PYTHONHOME", None)
    command = [
        program,
        "--foreground",
        f"--unix={socket}",
        f"--threads={THREADS}",
        "python",
        str(plugin_script("capture")),
        f"image_fd={image}",
        f"map={disks.hot_map_path(entry)}",
        f"ring={ring}",
        f"size={entry.size_bytes}",
        f"region={limits.REGION_BYTES}",
    ]
    print(f"disk {name} ready on {socket}", flush=True)
    os.execve(program, command, environment)
