"""What each role needs from the machine, whether it is there, and what brings it.

========  ==========================================================================
role      needs
========  ==========================================================================
source    nbdkit, its Python plugin, the capture core loading inside it, shared memory
receiver  a home that can be written
views     FUSE (mount), qemu-img (export --format qcow2)
tests     all of these, and the foreign tools and guests that tests, demo and bench use
========  ==========================================================================

Checks run the real thing where that is possible: that the core loads inside nbdkit is found out by
loading it there, because nbdkit embeds the system's Python, not the one this package runs in.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel

from blockrepl.limits import RING_BYTES_DEFAULT
from blockrepl.paths import import_root
from blockrepl.units import MIB

Role = Literal["source", "receiver", "views", "tests"]
ROLES: tuple[Role, ...] = get_args(Role)

PROBE_SECONDS = 15.0  # a tool that has not answered by then is broken
CORE_MODULE = "blockrepl.capture._core"

# The least that nbdkit takes for a plugin; its exit status says whether the import worked.
CORE_PROBE = """\
import {module}
def open(readonly): return 1
def get_size(handle): return 512
def pread(handle, buffer, offset, flags): pass
API_VERSION = 2
"""


@dataclass(frozen=True)
class Finding:
    """The answer to one check. ``detail`` is what was found, or what is wrong."""

    met: bool
    detail: str
    fix: str = ""  # for what no package brings


class Requirement(BaseModel):
    """One need, as `doctor --json` prints it."""

    name: str
    roles: list[Role]
    met: bool
    detail: str
    package: str | None
    fix: str


class Report(BaseModel):
    """``ready`` per role; ``install`` is one command that brings all missing packages."""

    ready: dict[Role, bool]
    install: str
    requirements: list[Requirement]


@dataclass(frozen=True)
class Need:
    name: str
    roles: tuple[Role, ...]
    package: str | None
    check: Callable[[], Finding]


def examine(home: Path, roles: Sequence[Role] = ROLES) -> Report:
    """Check what ``roles`` need on this machine. Takes about a second; changes nothing."""
    requirements = [
        _requirement(need) for need in _needs(home) if not set(need.roles).isdisjoint(roles)
    ]
    missing = [r for r in requirements if not r.met]
    return Report(
        ready={role: not any(role in r.roles for r in missing) for role in roles},
        install=install_command([r.package for r in missing if r.package]),
        requirements=requirements,
    )


def install_command(packages: Sequence[str]) -> str:
    """The command that installs Debian packages; empty for none."""
    unique = list(dict.fromkeys(packages))
    return f"apt-get install --no-install-recommends {' '.join(unique)}" if unique else ""


def _requirement(need: Need) -> Requirement:
    finding = need.check()
    package = None if finding.fix else need.package
    fix = "" if finding.met else finding.fix or install_command([package] if package else [])
    return Requirement(
        name=need.name,
        roles=list(need.roles),
        met=finding.met,
        detail=finding.detail,
        package=package,
        fix=fix,
    )


def _needs(home: Path) -> list[Need]:
    def program(roles: tuple[Role, ...], package: str, name: str, *version: str) -> Need:
        return Need(name, roles, package, lambda: check_program(name, version))

    tools = [
        ("qemu-system-x86", "qemu-system-x86_64", "--version"),
        ("libnbd-bin", "nbdinfo", "--version"),
        ("fio", "fio", "--version"),
        ("busybox-static", "busybox"),
        ("cpio", "cpio"),
        ("kmod", "depmod"),
        ("zstd", "zstd"),
        ("sqlite3", "sqlite3"),
        ("e2fsprogs", "mkfs.ext4"),
        ("xfsprogs", "mkfs.xfs"),
        ("btrfs-progs", "mkfs.btrfs"),
        ("gnutls-bin", "certtool"),
        ("openssl", "openssl"),
        ("tcpdump", "tcpdump"),
    ]
    return [
        program(("source", "tests"), "nbdkit", "nbdkit", "--version"),
        Need("nbdkit's Python plugin", ("source", "tests"), "nbdkit-plugin-python", check_plugin),
        Need("capture core in nbdkit", ("source", "tests"), None, check_core_in_nbdkit),
        Need("shared memory", ("source", "tests"), None, check_shared_memory),
        Need("home", ("source", "receiver"), None, lambda: check_home(home)),
        program(("views", "tests"), "fuse3", "fusermount3", "--version"),
        Need("/dev/fuse", ("views", "tests"), None, check_fuse_device),
        program(("views", "tests"), "qemu-utils", "qemu-img", "--version"),
        *(program(("tests",), *tool) for tool in tools),
    ]


def check_program(name: str, version: Sequence[str] = ()) -> Finding:
    """A program on PATH or where only root's PATH looks; its version with ``version`` arguments."""
    path = find_program(name)
    if path is None:
        return Finding(False, "not found")
    if not version:
        return Finding(True, path)
    status, output = _run([path, *version])
    first = output.strip().splitlines()[0] if output.strip() else path
    return Finding(status == 0, first if status == 0 else f"{path} does not run: {first}")


def find_program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def check_plugin() -> Finding:
    """nbdkit's Python plugin, and the Python that it embeds."""
    nbdkit = find_program("nbdkit")
    if nbdkit is None:
        return Finding(False, "nbdkit not found")
    status, output = _run([nbdkit, "--dump-plugin", "python"])
    if status != 0:
        return Finding(False, "not found")
    fields = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    return Finding(True, f"embeds Python {fields.get('python_version', 'of an unknown version')}")


def check_core_in_nbdkit() -> Finding:
    """Load the capture core inside nbdkit, as ``disk serve`` does."""
    nbdkit = find_program("nbdkit")
    if nbdkit is None:
        return Finding(False, "nbdkit not found", "install nbdkit first")
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory(prefix="blockrepl-doctor-") as directory:
        script = Path(directory) / "probe.py"
        script.write_text(CORE_PROBE.format(module=CORE_MODULE))
        status, output = _run(
            [nbdkit, "--exit-with-parent", "--unix", "-", "python", str(script), "--run", "true"],
            {"PYTHONPATH": str(import_root())},
        )
    if status == 0:
        return Finding(True, f"loads (built for Python {own})")
    errors = [line for line in output.splitlines() if "Error" in line]
    why = errors[-1].strip() if errors else f"nbdkit ended with status {status}"
    return Finding(
        False,
        f"does not load: {why} (built for Python {own})",
        "install blockrepl into an environment made by the system's Python: "
        "/usr/bin/python3 -m venv DIR",
    )


def check_shared_memory(path: str = "/dev/shm") -> Finding:
    """Room for a ring of the default size: it is filled when a disk is served, not when needed."""
    try:
        room = os.statvfs(path)
    except OSError as error:
        return Finding(False, f"{path}: {error.strerror}", f"mount -t tmpfs tmpfs {path}")
    free_bytes = room.f_bavail * room.f_frsize
    wanted_bytes = RING_BYTES_DEFAULT + 16 * MIB  # the ring's slots and marks come on top
    rings = free_bytes // wanted_bytes
    return Finding(
        rings >= 1,
        f"{free_bytes // MIB} MiB free in {path}: room for {rings} disks of the default ring",
        f"mount -o remount,size=1G {path}",
    )


def check_home(home: Path) -> Finding:
    """The home, or the directory it will be made in, can be written."""
    place = next(path for path in (home, *home.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            False,
            f"{home} cannot be made or written by this user",
            "run blockrepl as the user who owns it, or choose another with --home",
        )
    free_bytes = shutil.disk_usage(place).free
    return Finding(True, f"{home}: {free_bytes // MIB} MiB free")


def check_fuse_device(path: str = "/dev/fuse") -> Finding:
    try:
        is_device = stat.S_ISCHR(os.stat(path).st_mode)
        os.close(os.open(path, os.O_RDWR))
    except FileNotFoundError:
        return Finding(False, "not there", "modprobe fuse (in a container: pass /dev/fuse in)")
    except OSError as error:
        return Finding(False, f"{path}: {error.strerror}", f"chmod 0666 {path}")
    return Finding(is_device, path if is_device else "no device", f"remove {path}; modprobe fuse")


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and both outputs of a probe; -1 when it could not run or did not end."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except OSError as error:
        return -1, str(error.strerror)
    except subprocess.TimeoutExpired:
        return -1, f"no answer within {PROBE_SECONDS:.0f} s"
    return done.returncode, done.stdout.decode(errors="replace")
