"""What every test gets: a guard against leaks, and a home of its own.

After each test, and after each module (for fixtures of module scope), the guard fails the test
that left one of these behind, and removes it so that the next test starts clean:

=================  ============================================================================
what               how it is told from those of other test runs on the same machine
=================  ============================================================================
processes          their environment carries this run's BLOCKREPL_TEST_RUN (daemons inherit it)
mounts             mounted below this run's temporary directory
loop devices       backed by a file below it
/dev/shm files     named blockrepl-*: as root, the run has a /dev/shm of its own
=================  ============================================================================

Each worker of pytest-xdist is a run of its own in this sense.

What a fixture of a wider scope set up before the test is not the test's leak.

As root the whole run lives in a mount namespace of its own (to look into one: nsenter -m -t PID),
so that its rings neither meet those of other runs and of the machine's services, nor outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import settings

RUN_VARIABLE = "BLOCKREPL_TEST_RUN"
CLONE_NEWNS = 0x00020000
GRACE_SECONDS = 10.0  # a process that was told to end may still be ending when the test returns
SHARED_MEMORY = Path("/dev/shm")

settings.register_profile("blockrepl", deadline=None)  # a machine that stalls is no failure
settings.load_profile("blockrepl")


def pytest_configure(config: pytest.Config) -> None:
    os.environ[RUN_VARIABLE] = uuid4().hex
    # A worker of pytest-xdist ignores it, and so would the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.geteuid() == 0:
        _enter_own_namespace()


def _enter_own_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        return  # a container without CAP_SYS_ADMIN: what is in /dev/shm is shared with others
    # Mounts of this run stay here; those made or undone outside are still seen.
    subprocess.run(["mount", "--make-rslave", "/"], check=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "mode=1777,nosuid,nodev", "tmpfs", str(SHARED_MEMORY)],
        check=True,
    )


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    # A test that forgets --home must not touch the machine's.
    os.environ["BLOCKREPL_HOME"] = str(tmp_path_factory.getbasetemp() / "default-home")


@pytest.fixture(scope="module", autouse=True)
def _module_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield from _guard(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def _test_leaves_nothing(
    _module_leaves_nothing: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    yield from _guard(tmp_path_factory.getbasetemp())


def _guard(base: Path) -> Iterator[None]:
    # All processes, whosever they are: one that is just becoming another has no environment.
    before = leftovers(base) | {("process", str(process)) for process in _all_processes()}
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    while leaked := sorted(leftovers(base) - before):
        if time.monotonic() > deadline:
            listed = "\n".join(f"  {kind} {name}{_command(kind, name)}" for kind, name in leaked)
            remove(leaked)
            pytest.fail(f"left behind:\n{listed}", pytrace=False)
        time.sleep(0.02)


def leftovers(base: Path) -> set[tuple[str, str]]:
    """What this run has alive now, as (kind, name)."""
    return (
        {("process", str(process)) for process in own_processes()}
        | {("mount", target) for target in mounts_below(base)}
        | {("loop", device) for device in loops_below(base)}
        | {("shm", name) for name in own_shared_memory()}
    )


def own_processes() -> list[int]:
    """Processes that this run started, however far down; zombies have no environment."""
    wanted = f"{RUN_VARIABLE}={os.environ[RUN_VARIABLE]}".encode()
    return [
        process
        for process in _all_processes()
        if process != os.getpid() and wanted in _read(f"/proc/{process}/environ").split(b"\0")
    ]


def mounts_below(base: Path) -> list[str]:
    targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    decoded = [target.encode().decode("unicode_escape") for target in targets]
    return [target for target in decoded if Path(target).is_relative_to(base)]


def loops_below(base: Path) -> list[str]:
    return [
        f"/dev/{backing.parent.parent.name}"
        for backing in Path("/sys/block").glob("loop*/loop/backing_file")
        if _read(str(backing)).startswith(os.fsencode(base))
    ]


def own_shared_memory() -> list[str]:
    names = []
    for path in SHARED_MEMORY.glob("blockrepl-*"):
        with contextlib.suppress(FileNotFoundError):  # removed while we look
            if path.stat().st_uid == os.geteuid():
                names.append(path.name)
    return names


def remove(leaked: list[tuple[str, str]]) -> None:
    for kind, name in leaked:
        match kind:
            case "process":
                _kill(int(name))
            case "mount":
                subprocess.run(["umount", "--lazy", name], check=False, capture_output=True)
            case "loop":
                subprocess.run(["losetup", "--detach", name], check=False, capture_output=True)
            case "shm":
                (SHARED_MEMORY / name).unlink(missing_ok=True)


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # ended by itself, or was not a direct child


def _all_processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]


def _command(kind: str, name: str) -> str:
    """What a process runs, for the report only: it changes when the process becomes another."""
    if kind != "process":
        return ""
    command = _read(f"/proc/{name}/cmdline").replace(b"\0", b" ").decode(errors="replace")
    return f" {command.strip()}"


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""  # the process ended meanwhile, or belongs to another user
