"""Mounting and unmounting: the process that serves a mount, its start and its end.

``start`` runs ``serving.serve`` in a process of its own and returns when the mount can be used:

    start                         the serving process
    ------------------------------------------------------------
    re-executes the program  ->   opens replica, resolves the point, mounts
    reads the pipe           <-   {"at_ns": ...} or {"error", "hint", "code"}, then closes it
    returns or raises             serves until unmounted

The mount's source in /proc/self/mountinfo is ``blockrepl:GROUP:PROCESS``, so ``umount`` knows what
is ours and whom to wait for; no list of mounts is kept anywhere. Nothing heavy is imported here:
the program that waits would pay for it a second time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blockrepl.errors import BlockreplError, PointError, StateError
from blockrepl.model.points import Resolved

READY_SECONDS = 60.0  # the serving process opens the index of the open segment meanwhile
COPY_SECONDS = 2.0  # an unmounted mount's process ends by itself within it
END_SECONDS = 30.0  # an unmounted mount's process closes its files
DEVICE = "/dev/fuse"
SUBTYPE = b"fuse.blockrepl"
_SOURCE = re.compile(rb"blockrepl:([a-z0-9._-]+):(\d+)")


@dataclass(frozen=True, slots=True)
class Mount:
    directory: str
    group: str
    process: int


def mounts() -> list[Mount]:
    """This machine's mounts of ours, oldest first."""
    return parse_mounts(Path("/proc/self/mountinfo").read_bytes())


def parse_mounts(text: bytes) -> list[Mount]:
    """Those of ours in a mountinfo. Names are bytes, of which white space is escaped."""
    found = []
    for line in text.split(b"\n")[:-1]:
        before, _, after = line.partition(b" - ")
        kind, source = after.split(b" ")[:2]
        match = _SOURCE.fullmatch(source)
        if kind == SUBTYPE and match:
            name = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), before.split(b" ")[4])
            found.append(Mount(os.fsdecode(name), match[1].decode(), int(match[2])))
    return found


def fuse_descriptors(process: int | None = None) -> set[int]:
    """A process's open connections to FUSE, by default this one's; none of one that has died."""
    directory = f"/proc/{process or 'self'}/fd"
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                if os.readlink(f"{directory}/{name}") == DEVICE:
                    found.add(int(name))
    return found


def check_mount_point(directory: Path) -> Path:
    """The directory's absolute path, if a mount can go there. StateError."""
    try:
        path = Path(os.path.realpath(directory, strict=True))  # resolve: RuntimeError of a loop
        names = os.listdir(path)
    except FileNotFoundError:
        raise StateError(
            f"the mount point {directory} does not exist", hint=f"make it: mkdir {directory}"
        ) from None
    except NotADirectoryError:
        raise StateError(
            f"the mount point {directory} is not a directory", hint="choose an empty directory"
        ) from None
    except OSError as error:
        hint = "choose another directory"
        if error.errno == errno.ENOTCONN:
            hint = f"a mount whose process has died is there: blockrepl umount {directory}"
        raise StateError(
            f"the mount point {directory} cannot be used: {error.strerror}", hint=hint
        ) from error
    if any(mount.directory == str(path) for mount in mounts()):
        raise StateError(
            f"{directory} is mounted already", hint=f"first: blockrepl umount {directory}"
        )
    if names:
        raise StateError(
            f"the mount point {directory} is not empty", hint="choose an empty directory"
        )
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise StateError(
            f"this user cannot mount: {DEVICE} is missing or not accessible",
            hint="run as root after: apt-get install fuse3 && modprobe fuse",
        )
    return path


def start(home: Path, group: str, directory: Path, options: Sequence[str]) -> Resolved | None:
    """Mount in the background; the point it resolved to, None for the whole tree.

    ``options``: of the command line, that say what is mounted.

    Errors of the serving process are raised here. Without an answer it is ended.
    """
    path = check_mount_point(directory)
    log_path = home / "log" / f"mount-{group}.log"
    log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    reader, writer = os.pipe()
    arguments = [sys.executable, "-m", "blockrepl.cli.main", "--home", str(home), "mount"]
    arguments += [group, str(path), "--foreground", f"--ready-descriptor={writer}"]
    arguments += options
    with open(reader, "rb") as answers, log_path.open("ab") as log_file:
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                pass_fds=[writer],
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(writer)
        try:
            ready, _, _ = select.select([answers], [], [], READY_SECONDS)
            answer = answers.read() if ready else b""
            fields = json.loads(answer) if answer else {}
        except BaseException:
            process.terminate()
            raise
    if not fields:
        process.kill()
        status = process.wait()
        raise StateError(
            f"the mount's process gave no answer (status {status})", hint=f"see {log_path}"
        )
    if "error" in fields:
        process.wait()
        raise _error_of(fields)
    # Not a child to wait for: it lives on when this program ends.
    process.returncode = 0
    return Resolved(**fields["resolved"]) if fields["resolved"] else None


def _error_of(fields: dict[str, object]) -> BlockreplError:
    text, hint, code = (str(fields[key]) for key in ("error", "hint", "code"))
    if "nearest_before_ns" in fields:
        before, after = fields["nearest_before_ns"], fields["nearest_after_ns"]
        return PointError(
            text,
            hint=hint,
            code=code,
            nearest_before_ns=before if isinstance(before, int) else None,
            nearest_after_ns=after if isinstance(after, int) else None,
        )
    error = BlockreplError(text, hint=hint, code=code)
    error.exit_status = fields["exit_status"] if isinstance(fields["exit_status"], int) else 1
    return error


def umount(directory: Path) -> Mount:
    """Unmount what ``start`` or ``serve`` mounted; wait for its process to end. StateError."""
    path = _absolute(directory)
    mine = [mount for mount in mounts() if mount.directory == path]
    if not mine:
        others = ", ".join(mount.directory for mount in mounts()) or "none"
        raise StateError(f"{directory} is no mount of blockrepl", hint=f"mounted now: {others}")
    mount = mine[-1]
    process = _open_server(mount.process)
    try:
        _unmount(path, directory)
        if process is not None and not _has_ended(process, COPY_SECONDS):
            # A mount namespace made meanwhile has a copy of the mount, which keeps it alive.
            signal.pidfd_send_signal(process, signal.SIGTERM)
            if not _has_ended(process, END_SECONDS):
                raise StateError(
                    f"{directory} is unmounted, but its process {mount.process} has not ended",
                    hint=f"look at it, or: kill {mount.process}",
                )
    finally:
        if process is not None:
            os.close(process)
    return mount


def _open_server(number: int) -> int | None:
    """A descriptor of a mount's process. None when it has died, whoever has its number by now."""
    try:
        process = os.pidfd_open(number)
    except OSError:
        return None
    if fuse_descriptors(number):
        return process
    os.close(process)
    return None


def _has_ended(process: int, seconds: float) -> bool:
    return bool(select.select([process], [], [], seconds)[0])


def _absolute(directory: Path) -> str:
    """Without asking a mount that is there: its process may be dead. A link leads to one."""
    absolute = os.path.abspath(directory)
    with contextlib.suppress(OSError):
        os.readlink(absolute)
        return os.path.realpath(absolute)
    parent, name = os.path.split(absolute)
    return os.path.join(os.path.realpath(parent), name)


def _unmount(path: str, directory: Path) -> None:
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(path), 0) == 0:
            return
        number = ctypes.get_errno()
        busy, why = number == errno.EBUSY, os.strerror(number)
    else:
        done = subprocess.run(
            ["fusermount3", "-u", "--", path], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return
        why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "fusermount3 failed"
        busy = "busy" in why
    if busy:
        raise StateError(
            f"{directory} is in use",
            hint=f"close what uses it (fuser -vm {directory}; losetup -a), then try again",
            code="busy",
        )
    raise StateError(f"cannot unmount {directory}: {why}")
