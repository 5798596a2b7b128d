"""Export: a disk of a view as a file of its own, whole or not at all.

Both formats write to a temporary name beside the target, sync it, and rename it. Whatever fails or
is interrupted before that leaves nothing. Signals that end the program end it in order here.

raw    straight from the view: holes stay holes, and 64 KiB of zeros become one
qcow2  nbdkit serves the view on a private socket to ``qemu-img convert``
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from blockrepl.errors import StateError
from blockrepl.limits import BLOCK_BYTES
from blockrepl.storage.home import naming, sync_directory
from blockrepl.units import MIB
from blockrepl.views.nbd import ErrorLines, ending_in_order, nbdkit, require, running
from blockrepl.views.view import View

CHUNK_BYTES = 4 * MIB
AREA_BYTES = 64 * MIB  # extents are asked for piece by piece
_ZEROS = bytes(BLOCK_BYTES)
_PERCENT = re.compile(rb"\(\s*([\d.]+)/100%\)")
Progress = Callable[[int], None]


def export_raw(view: View, disk: str, target: Path, progress: Progress) -> None:
    """Write a sparse raw image. DamageError, StorageError, OSError."""
    size_bytes = view.disk(disk).size_bytes
    with (
        replacing(target) as temporary,
        naming(target),
        temporary.open("r+b", buffering=0) as file,
    ):
        file.truncate(size_bytes)
        for area in range(0, size_bytes, AREA_BYTES):
            for extent in view.extents(disk, area, AREA_BYTES):
                if extent.is_data:
                    end = extent.offset + extent.length
                    for at in range(extent.offset, end, CHUNK_BYTES):
                        data = view.read(disk, at, min(CHUNK_BYTES, end - at))
                        _write_sparse(file, memoryview(data), at)
                        progress(at + len(data))
            progress(min(size_bytes, area + AREA_BYTES))


def _write_sparse(file: IO[bytes], data: memoryview, offset: int) -> None:
    """Write what is not zeros, in stretches of blocks as long as they come."""
    start = 0
    for at in range(0, len(data) + BLOCK_BYTES, BLOCK_BYTES):
        block = data[at : at + BLOCK_BYTES]
        if len(block) and block != _ZEROS[: len(block)]:
            continue
        while start < min(at, len(data)):
            start += os.pwrite(file.fileno(), data[start : min(at, len(data))], offset + start)
        start = at + BLOCK_BYTES


def export_qcow2(replica: Path, view: View, disk: str, target: Path, progress: Progress) -> None:
    """Convert with qemu-img. StateError when a program is missing, DamageError, StorageError."""
    size_bytes = view.disk(disk).size_bytes
    require("qemu-img", "qemu-utils")
    with contextlib.ExitStack() as closing:
        temporary = closing.enter_context(replacing(target))
        errors = closing.enter_context(ErrorLines())
        directory = closing.enter_context(tempfile.TemporaryDirectory(prefix="blockrepl-export-"))
        socket = Path(directory, "socket")
        arguments = [f"replica={replica}", f"disk={disk}", f"at_ns={view.at_ns}"]
        uri = f"nbd+unix:///?socket={socket}"
        command = ["qemu-img", "convert", "-p", "-f", "raw", "-O", "qcow2", uri, str(temporary)]
        # When nbdkit ends with a killed export, qemu-img ends for want of a server.
        with (
            nbdkit(arguments, socket, errors),
            running(command, errors, stdout=subprocess.PIPE) as process,
        ):
            assert process.stdout is not None
            for percent in _percents(process.stdout):
                progress(int(size_bytes * percent / 100))
            status = process.wait()
        if status:
            raise errors.failure(status, f"{target} could not be written")
        progress(size_bytes)


def _percents(stream: IO[bytes]) -> Iterator[float]:
    """What qemu-img says of its progress, on one line that it writes over and over."""
    rest = b""
    while piece := os.read(stream.fileno(), 4096):
        *lines, rest = re.split(rb"[\r\n]", rest + piece)
        for line in lines:
            if match := _PERCENT.search(line):
                yield float(match[1])
    stream.close()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside the target that becomes it in the end, or goes."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    with ending_in_order():
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            yield temporary
            with naming(target), temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.rename(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)


def check_target(target: Path, *, force: bool) -> None:
    """StateError when the target may not be written."""
    if not target.parent.is_dir():
        raise StateError(
            f"{target.parent} is not a directory", hint=f"make it: mkdir -p {target.parent}"
        )
    if target.exists() and not target.is_file():
        raise StateError(f"{target} is not a regular file", hint="choose another name")
    if target.exists() and not force:
        raise StateError(
            f"{target} exists", hint="choose another name, or --force to replace it", code="exists"
        )
