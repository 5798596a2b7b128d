"""A small Linux guest made on the spot: Debian's kernel, busybox, sqlite3.

What is made, once, under ``build/guest/`` (safe to delete at any time):

===========================  =====================================================================
``packages/*.deb``           Debian's cloud kernel, downloaded by apt; never installed on the host
``<recipe>/vmlinuz``         the kernel out of that package
``<recipe>/initramfs.gz``    busybox and the virtio modules: finds /dev/vda, switches to it
``<recipe>/root/``           the root tree: busybox, sqlite3 and its libraries, modules, init
===========================  =====================================================================

``<recipe>`` is a digest of this file and its scripts, so that an edited recipe is built anew. A
root image is an ext4 file system that ``mkfs.ext4 -d`` fills from the tree: no mount, no loop
device, no privilege.

The guest is driven through a virtio serial port (its init is the loop at the other end):

======================================  ======================================================
host to guest, one line                 guest to host
======================================  ======================================================
``hello``                               ``ready KERNEL-RELEASE``
``run ID SECONDS BASE64-OF-A-SCRIPT``   ``done ID STATUS BYTES`` and then that many bytes
``poweroff``                            ``unmounted STATUS``, then the machine goes off
end of file (the host has gone)         the machine goes off by itself
======================================  ======================================================
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

CACHE = Path(__file__).resolve().parents[2] / "build" / "guest"
KERNEL_METAPACKAGE = "linux-image-cloud-amd64"  # ext4 built in, lz4: boots fastest under TCG
DOWNLOAD_SECONDS = 300
TOOL_SECONDS = 120

# In the order of their dependencies: initramfs loads them with insmod.
BOOT_MODULES = (
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
    "char/virtio_console",
)
ROOT_MODULES = ("xfs.ko", "btrfs.ko", "libcrc32c.ko", "raid6_pq.ko", "xor.ko", "zstd_compress.ko")
PROGRAMS = ("sqlite3",)
PROGRAMS_IF_PRESENT = ("mkfs.ext4", "e2fsck", "mkfs.xfs", "mkfs.btrfs")

INITRAMFS_INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
for m in $($b cat /modules/order); do $b insmod /modules/$m; done
i=0
until [ -b /dev/vda ] || [ $i -ge 300 ]; do $b usleep 50000; i=$((i + 1)); done
# noatime: a command that is in memory runs while the disk is away.
$b mount -t ext4 -o noatime /dev/vda /root || echo "cannot mount the root file system"
exec $b switch_root /root /sbin/init
"""

ROOT_INIT = """#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=dumb
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
hostname guest
ip link set lo up
port=$(grep -lx control /sys/class/virtio-ports/*/name)
port=/dev/$(basename $(dirname "$port"))
exec 3<>"$port"

off() {  # everything ends, the root file system is left clean, the machine goes off
    kill -TERM -1; usleep 200000; kill -KILL -1; usleep 50000
    sync
    for point in $(awk '$2 != "/" && $3 ~ /^(ext4|xfs|btrfs)$/ { print $2 }' /proc/mounts); do
        umount "$point"
    done
    mount -o remount,ro /
    echo "unmounted $?" >&3
    sync
    poweroff -f
}

# The port reads as closed until the host's side of it is known: the first line is waited for.
i=0
until read -r word <&3 || [ $i -ge 600 ]; do usleep 50000; i=$((i + 1)); done
[ "$word" = hello ] || { exec 3> /dev/null; off; }
echo "ready $(uname -r)" >&3
while read -r word id seconds script <&3; do
    case "$word" in
    run)
        echo "$script" | base64 -d > /run/script
        timeout -s KILL "$seconds" sh /run/script > /run/output 2>&1 < /dev/null 3>&-
        status=$?
        echo "done $id $status $(wc -c < /run/output)" > /run/reply
        cat /run/output >> /run/reply
        timeout -s KILL 120 cat /run/reply >&3 || break
        ;;
    poweroff) off ;;
    esac
done
exec 3> /dev/null  # a write to a port without a host never returns
off
"""


class GuestError(RuntimeError):
    """The guest could not be built, booted or driven; one line that says why."""


class Boot(NamedTuple):
    """What QEMU needs to start the guest beside its disks."""

    kernel: Path
    initramfs: Path


def boot_files() -> Boot:
    """The kernel and the initramfs; built when missing."""
    recipe = _recipe()
    return Boot(recipe / "vmlinuz", recipe / "initramfs.gz")


def build_root_image(path: Path, size_bytes: int, *, archive_bytes: int = 0) -> None:
    """Make ``path`` a sparse raw image with the guest's root file system on the whole disk.

    ``archive_bytes`` of incompressible content are put into ``/srv/archive.bin``, for tests and
    tours that want a disk that is not nearly empty. An existing file is replaced.
    """
    root = _recipe() / "root"
    path.unlink(missing_ok=True)
    with path.open("wb") as image:
        image.truncate(size_bytes)
    # Tables written at once: a lazily initialised ext4 would write in the background for minutes.
    options = "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
    _call("mkfs.ext4", "-q", "-F", "-L", "guest", "-E", options, "-d", str(root), str(path))
    if archive_bytes:
        archive = path.with_name(path.name + ".archive")
        try:
            with archive.open("wb") as file:
                for offset in range(0, archive_bytes, 1 << 20):
                    file.write(os.urandom(min(1 << 20, archive_bytes - offset)))
            _call("debugfs", "-w", "-R", f"write {archive} /srv/archive.bin", str(path))
        finally:
            archive.unlink(missing_ok=True)


def _recipe() -> Path:
    """The directory of this recipe's kernel, initramfs and root tree; complete when it exists."""
    directory = CACHE / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    if directory.is_dir():
        return directory
    with _locked():
        if not directory.is_dir():
            half = directory.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
            _build(half)
            for older in CACHE.glob("[0-9a-f]" * 16):
                shutil.rmtree(older)
            half.rename(directory)
    return directory


@contextmanager
def _locked() -> Iterator[None]:
    """Two builds at once would write over each other: the second waits for the first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(directory: Path) -> None:
    package = directory / "package"
    _call("dpkg-deb", "-x", str(_kernel_package()), str(package))
    [kernel] = package.glob("boot/vmlinuz-*")
    kernel.rename(directory / "vmlinuz")
    [modules] = package.glob("lib/modules/*")
    _initramfs(directory, modules)
    _root_tree(directory / "root", modules)
    shutil.rmtree(package)


def _kernel_package() -> Path:
    """Debian's kernel package, downloaded once."""
    packages = CACHE / "packages"
    packages.mkdir(exist_ok=True)
    kept = sorted(packages.glob("linux-image-*.deb"))
    if kept:
        return kept[-1]
    depends = _call("apt-cache", "depends", KERNEL_METAPACKAGE)
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise GuestError(f"apt knows no {KERNEL_METAPACKAGE}; try `apt-get update`")
    half = packages / "half"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    options = ("-q", "-o", "APT::Sandbox::User=root") if os.geteuid() == 0 else ("-q",)
    command = ("apt-get", *options, "download", found[1])
    _call(*command, directory=half, seconds=DOWNLOAD_SECONDS, hint="try `apt-get update`")
    [package] = half.glob("*.deb")
    return package.rename(packages / package.name)


def _initramfs(directory: Path, modules: Path) -> None:
    tree = directory / "initramfs"
    for name in ("bin", "dev", "modules", "proc", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(_program("busybox"), tree / "bin" / "busybox")
    _script(tree / "init", INITRAMFS_INIT)
    names = [f"{Path(name).name}.ko" for name in BOOT_MODULES]
    for name in BOOT_MODULES:
        shutil.copy2(modules / "kernel" / "drivers" / f"{name}.ko", tree / "modules")
    (tree / "modules" / "order").write_text("\n".join(names) + "\n")
    listing = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    made = subprocess.run(
        ("busybox", "cpio", "-o", "-H", "newc"),
        cwd=tree,
        input=listing.encode(),
        capture_output=True,
        timeout=TOOL_SECONDS,
        check=True,
    )
    (directory / "initramfs.gz").write_bytes(gzip.compress(made.stdout, 1))
    shutil.rmtree(tree)


def _root_tree(root: Path, modules: Path) -> None:
    for name in ("dev", "etc", "home", "mnt", "proc", "root", "run", "srv", "sys", "tmp", "var"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "usr/bin", "usr/sbin"):
        (root / name).mkdir(parents=True)
    shutil.copy2(_program("busybox"), root / "bin" / "busybox")
    for applet in _call("busybox", "--list-full").split():
        link = root / applet
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to("/bin/busybox")
    for program in PROGRAMS:
        _copy_program(root, _program(program))
    for program in PROGRAMS_IF_PRESENT:
        if found := shutil.which(program, path=_SEARCH):
            _copy_program(root, Path(found))
    kept = root / "lib" / "modules" / modules.name
    kept.mkdir(parents=True)
    for name in ROOT_MODULES:
        [module] = modules.rglob(name)
        shutil.copy2(module, kept / name)
    # The boot modules are loaded already; depmod only has to know of the file systems' own.
    _call("busybox", "depmod", "-b", str(root), modules.name)
    _script(root / "sbin" / "init", ROOT_INIT)
    (root / "etc" / "passwd").write_text("root::0:0:root:/root:/bin/sh\n")
    (root / "etc" / "hostname").write_text("guest\n")
    (root / "etc" / "mke2fs.conf").write_text(Path("/etc/mke2fs.conf").read_text())


_SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _program(name: str) -> Path:
    found = shutil.which(name, path=_SEARCH)
    if found is None:
        package = {"busybox": "busybox-static"}.get(name, name)
        raise GuestError(f"the guest needs {name}; `apt-get install {package}`")
    return Path(found).resolve()


def _copy_program(root: Path, program: Path) -> None:
    """Copy a program and the shared libraries it is linked with, to the places it expects."""
    target = root / "usr" / "bin" / program.name
    target.unlink(missing_ok=True)
    shutil.copy2(program, target)
    for library in re.findall(r"(/\S+) \(0x", _call("ldd", str(program))):
        place = root / library.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            shutil.copy2(library, place)


def _script(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _call(
    *command: str, directory: Path | None = None, seconds: float = TOOL_SECONDS, hint: str = ""
) -> str:
    """Run a tool to its end; its standard output, or an error of one line."""
    environment = {**os.environ, "PATH": _SEARCH, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError as error:
        raise GuestError(f"{command[0]} is not installed; try `make setup`") from error
    except subprocess.TimeoutExpired as error:
        raise GuestError(f"{command[0]} did not end within {seconds:.0f} s") from error
    if done.returncode != 0:
        reason = " ".join((done.stderr or done.stdout).split())[-300:]
        advice = f"; {hint}" if hint else ""
        raise GuestError(f"{command[0]} failed: {reason}{advice}")
    return done.stdout
