"""QEMU with the small guest in it, driven by commands and never left behind.

A guest ends in one of these ways, and in no case is its process left running:

=========================  ======================================================================
``shutdown()``             file systems unmounted, powered off by itself: the disk is clean
``kill()``, ``with`` ends  SIGKILL, as a power cut would
the caller dies            the guest sees its control port closed and powers itself off
lifetime is over           ``timeout`` ends QEMU, whatever the guest or its disk are doing
=========================  ======================================================================
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from scripts.guest.build import GuestError, boot_files

BOOT_SECONDS = 120.0  # 5 s on a quiet machine; TCG shares two cores with everything else
COMMAND_SECONDS = 60.0
SHUTDOWN_SECONDS = 60.0
LIFETIME_SECONDS = 900
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 nowatchdog nokaslr mitigations=off random.trust_cpu=on "
    "tsc=reliable no_timer_check cryptomgr.notests"
)


class Result(NamedTuple):
    """A command's exit status and what it wrote to standard output and error together."""

    status: int
    output: str


def plain_disk_options(image: Path) -> list[str]:
    """QEMU options for a raw image without blockrepl: what a guest's disk looks like unprotected"""
    node = f"driver=raw,node-name=plain,file.driver=file,file.filename={image}"
    return ["-blockdev", node, "-device", "virtio-blk-pci,drive=plain"]


class Guest:
    """One virtual machine. Not thread-safe; commands run one after the other."""

    def __init__(
        self, *, memory_mib: int = 512, lifetime_seconds: float = LIFETIME_SECONDS
    ) -> None:
        self.memory_mib = memory_mib
        self.lifetime_seconds = lifetime_seconds
        self.boot_seconds = 0.0
        self.kernel_release = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._directory: Path | None = None
        self._received = b""
        self._command_count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, qemu_disk_options: list[str], *, timeout_seconds: float = BOOT_SECONDS) -> None:
        """Boot from the first disk of the options and wait until the guest takes commands."""
        if self._process is not None:
            raise GuestError("the guest has been started already")
        qemu = shutil.which("qemu-system-x86_64")
        if qemu is None:
            raise GuestError(
                "QEMU is not installed; `apt-get install qemu-system-x86`, or `make setup`"
            )
        boot = boot_files()
        started = time.monotonic()
        self._directory = Path(tempfile.mkdtemp(prefix="blockrepl-guest-"))
        ours, theirs = socket.socketpair()
        self._control = ours
        machine = ["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "1"]
        machine += ["-m", str(self.memory_mib), "-nodefaults", "-no-user-config", "-no-reboot"]
        machine += ["-display", "none", "-serial", f"file:{self._directory / 'console'}"]
        machine += ["-kernel", str(boot.kernel), "-initrd", str(boot.initramfs)]
        machine += ["-append", KERNEL_ARGUMENTS]
        port = ["-chardev", f"socket,id=control-port,fd={theirs.fileno()}"]
        port += ["-device", "virtio-serial-pci"]
        port += ["-device", "virtserialport,chardev=control-port,name=control"]
        limit = ["timeout", "--signal=KILL", str(self.lifetime_seconds)]
        try:
            with theirs, (self._directory / "errors").open("wb") as errors:
                self._process = subprocess.Popen(
                    [*limit, qemu, *machine, *qemu_disk_options, *port],
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # Ctrl-C reaches us, and we end the guest
                )
            deadline = started + timeout_seconds
            ours.sendall(b"hello\n")
            word, *rest = self._line(deadline, "boot").split()
            if word != "ready":
                raise GuestError(f"the guest said {word!r} instead of 'ready'")
        except BaseException:
            self.kill()
            raise
        self.kernel_release = " ".join(rest)
        self.boot_seconds = time.monotonic() - started

    def run(self, command: str, timeout_seconds: float = COMMAND_SECONDS) -> Result:
        """Run a shell script in the guest. One that takes too long is killed there (status 137).

        Raises GuestError when the guest itself does not answer, some time after that.
        """
        self._command_count += 1
        script = base64.b64encode(command.encode()).decode()
        request = f"run {self._command_count} {max(1, round(timeout_seconds))} {script}\n"
        deadline = time.monotonic() + timeout_seconds + 15
        self._send(request.encode(), deadline)
        word, number, status, size = self._line(deadline, "a command").split()
        if word != "done" or int(number) != self._command_count:
            raise GuestError(f"the guest answered {word} {number} out of turn")
        output = self._bytes(int(size), deadline, "a command's output")
        return Result(int(status), output.decode(errors="replace"))

    def check(self, command: str, timeout_seconds: float = COMMAND_SECONDS) -> str:
        """The output of a command that must succeed in the guest."""
        result = self.run(command, timeout_seconds)
        if result.status != 0:
            said = " ".join(result.output.split())[-300:]
            raise GuestError(f"the guest's command ended with status {result.status}: {said}")
        return result.output

    def shutdown(self, *, timeout_seconds: float = SHUTDOWN_SECONDS) -> None:
        """Power off with file systems unmounted; raises GuestError when that did not work."""
        process = self._process
        if process is None or self._control is None:
            raise GuestError("the guest is not running")
        deadline = time.monotonic() + timeout_seconds
        try:
            self._send(b"poweroff\n", deadline)
            said = self._line(deadline, "shutdown")
            if said != "unmounted 0":
                raise GuestError(f"the guest's root file system could not be unmounted ({said})")
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise GuestError("the guest did not power off") from error
            if process.returncode != 0:
                raise GuestError(f"QEMU ended with status {process.returncode}{self._why()}")
        finally:
            self.kill()

    def kill(self) -> None:
        """End the guest as a power cut would. Does nothing when it has ended."""
        if self._process is not None:
            # The group, not the process: `timeout` killed alone would leave QEMU behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        self._received = b""

    def console(self) -> str:
        """What the guest's kernel has printed so far."""
        if self._directory is None:
            return ""
        file = self._directory / "console"
        return file.read_text(errors="replace") if file.exists() else ""

    def _send(self, data: bytes, deadline: float) -> None:
        if self._control is None:
            raise GuestError("the guest is not running")
        self._control.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            self._control.sendall(data)
        except TimeoutError as error:
            raise GuestError("the guest takes no commands") from error
        except OSError as error:
            raise GuestError(f"the guest has ended{self._why()}") from error

    def _line(self, deadline: float, what: str) -> str:
        while b"\n" not in self._received:
            self._receive(deadline, what)
        line, self._received = self._received.split(b"\n", 1)
        return line.decode(errors="replace")

    def _bytes(self, size: int, deadline: float, what: str) -> bytes:
        while len(self._received) < size:
            self._receive(deadline, what)
        data, self._received = self._received[:size], self._received[size:]
        return data

    def _receive(self, deadline: float, what: str) -> None:
        assert self._control is not None
        self._control.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self._control.recv(1 << 16)
        except TimeoutError as error:
            raise GuestError(f"no answer from the guest in time to {what}{self._why()}") from error
        except OSError:
            data = b""
        if not data:
            raise GuestError(f"the guest ended while waiting for {what}{self._why()}")
        self._received += data

    def _why(self) -> str:
        """QEMU's own last words and the console's, for an error's one line."""
        if self._directory is None:
            return ""
        errors = self._directory / "errors"
        said = errors.read_text(errors="replace") if errors.exists() else ""
        last = " ".join((said + " " + self.console()[-400:]).split())
        return f": {last[-600:]}" if last else ""
