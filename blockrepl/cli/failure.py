"""How a failure is told: one line on stderr, one object on stdout with ``--json``, a status."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import click

from blockrepl.errors import BlockreplError, PointError

INTERRUPTED_STATUS = 130  # what shells report for SIGINT

OS_HINTS = {
    errno.ENOSPC: "free some room there, then run the command again",
    errno.EDQUOT: "raise the quota or free some room there, then run the command again",
    errno.EACCES: "run the command as the user who owns it, or as root",
    errno.EPERM: "run the command as root",
    errno.EROFS: "choose a place on a writable file system",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EADDRINUSE: "choose another address with --listen, or stop what uses it",
    errno.ECONNREFUSED: "start the service and check its address",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "look at the kernel's log (dmesg) for the device's errors",
}


@dataclass(frozen=True)
class Failure:
    """What is told of an error. ``message`` and ``hint`` are one line each."""

    message: str
    hint: str
    code: str
    exit_status: int
    nearest: dict[str, int | None] | None = None

    def line(self) -> str:
        if not self.hint:
            return f"error: {self.message}"
        stop = "" if self.message.endswith((".", "?", "!")) else "."
        return f"error: {self.message}{stop} {self.hint}"

    def as_json(self) -> str:
        fields: dict[str, object] = {
            "error": self.message,
            "code": self.code,
            "hint": self.hint,
            **(self.nearest or {}),
        }
        return json.dumps(fields)


def report(error: BaseException, *, home: Path, json_mode: bool) -> int:
    """Tell ``error`` and return the exit status. Never raises."""
    error = principal(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return INTERRUPTED_STATUS
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, BrokenPipeError):
        _discard_stdout()
        return 1
    if isinstance(error, click.exceptions.NoArgsIsHelpError) and not json_mode:
        print(error.format_message(), file=sys.stderr)
        return error.exit_code
    failure = describe(error)
    if failure is None:
        failure = _internal(error, home)
    try:
        if json_mode:
            print(failure.as_json(), flush=True)
    except OSError:
        _discard_stdout()
    print(failure.line(), file=sys.stderr)
    return failure.exit_status


def principal(error: BaseException) -> BaseException:
    """The one error worth telling of a group: a defect first, then an interrupt, then the rest."""
    leaves = list(_leaves(error))
    ranks = [_rank(leaf) for leaf in leaves]
    return leaves[ranks.index(min(ranks))]


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _rank(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt | click.Abort | SystemExit):
        return 1
    return 0 if describe(error) is None else 2


def describe(error: BaseException) -> Failure | None:
    """What to tell of an expected failure; None for a defect of ours."""
    match error:
        case PointError():
            nearest = {
                "nearest_before_ns": error.nearest_before_ns,
                "nearest_after_ns": error.nearest_after_ns,
            }
            return Failure(
                one_line(str(error)), one_line(error.hint), error.code, error.exit_status, nearest
            )
        case BlockreplError():
            return Failure(
                one_line(str(error)), one_line(error.hint), error.code, error.exit_status
            )
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else "blockrepl"
            message = one_line(error.format_message())
            return Failure(message, f"see: {path} --help", "usage", error.exit_code)
        case click.ClickException():
            return Failure(one_line(error.format_message()), "", "failed", error.exit_code)
        case OSError() if error.errno is not None:
            place = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            name = errno.errorcode.get(error.errno, str(error.errno))
            what = one_line(f"{place}{error.strerror or os.strerror(error.errno)} ({name})")
            return Failure(what, OS_HINTS.get(error.errno, ""), "system", 1)
        case _:
            return None


def one_line(text: str) -> str:
    """One line without control characters: a peer's bytes may be quoted in a message."""
    words = " ".join(text.split())
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words
    )


def _internal(error: BaseException, home: Path) -> Failure:
    message = one_line(f"internal: {type(error).__name__}: {error}")
    if os.environ.get("BLOCKREPL_DEBUG") == "1":
        traceback.print_exception(error)
        hint = "this is a defect of blockrepl; the traceback is above"
    else:
        log = home / "log" / "errors.log"
        try:
            _append_traceback(log, error)
            hint = f"this is a defect of blockrepl; the traceback is in {log}"
        except OSError:
            hint = "this is a defect of blockrepl; BLOCKREPL_DEBUG=1 shows the traceback"
    return Failure(message, hint, "internal", 1)


def _append_traceback(log: Path, error: BaseException) -> None:
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ} {' '.join(sys.argv)}\n")
        traceback.print_exception(error, file=file)


def _discard_stdout() -> None:
    # The interpreter flushes stdout at exit and would complain about the broken pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
