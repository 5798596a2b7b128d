"""The guest's load: fio, over NBD as a guest would, or on a file of a mounted view.

Buffers are refilled for every write and do not compress, so that nobody gains by LZ4. The figures
are fio's own, from its JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmark.processes import MeasurementError, Scratch

MEGABYTE = 1_000_000
FIO_GRACE_SECONDS = 60.0  # beyond the asked runtime, on a machine that is busy


@dataclass(frozen=True)
class Load:
    """What one fio run measured."""

    iops: float
    latency_mean_microseconds: float  # completion latency
    transferred_bytes: int
    operations: int
    runtime_seconds: float
    ended_seconds: float  # wall clock, when the last request was done

    @property
    def megabytes_per_second(self) -> float:
        return self.transferred_bytes / self.runtime_seconds / MEGABYTE


def fio_command(name: str, options: list[str]) -> list[str]:
    # A thread, since a job that is a process makes a session of its own, and is not ended with fio.
    common = ["--thread", "--randrepeat=0", "--refill_buffers=1", "--buffer_compress_percentage=0"]
    return ["fio", f"--name={name}", *common, *options]


def _fio(scratch: Scratch, name: str, direction: str, options: list[str], seconds: float) -> Load:
    output = scratch.directory / f"fio-{name}.json"
    scratch.run(
        [*fio_command(name, options), "--output-format=json", f"--output={output}"],
        seconds + FIO_GRACE_SECONDS,
    )
    text = output.read_text()
    report = json.loads(text[text.index("{") :])  # fio may put notes before its JSON
    job = report["jobs"][0]
    side = job[direction]
    if job["error"] or not side["total_ios"]:
        raise MeasurementError(f"fio {name}: error {job['error']}, {side['total_ios']} requests")
    return Load(
        iops=side["iops"],
        latency_mean_microseconds=side["clat_ns"]["mean"] / 1000,
        transferred_bytes=side["io_bytes"],
        operations=side["total_ios"],
        runtime_seconds=side["runtime"] / 1000,
        ended_seconds=report["timestamp_ms"] / 1000,
    )


def write_nbd(
    scratch: Scratch,
    uri: str,
    *,
    seconds: float,
    depth: int,
    block_bytes: int = 4096,
    rate_bytes: int | None = None,
) -> Load:
    """Random writes over NBD for ``seconds``; ``rate_bytes`` a second at most."""
    options = [
        "--ioengine=nbd",
        f"--uri={uri}",
        "--rw=randwrite",
        f"--bs={block_bytes}",
        f"--iodepth={depth}",
        "--time_based",
        f"--runtime={seconds:g}s",
    ]
    if rate_bytes is not None:
        options.append(f"--rate={rate_bytes}")
    return _fio(scratch, "write", "write", options, seconds)


def read_once(
    scratch: Scratch, source: Path | str, *, pattern: str, block_bytes: int, seconds: float
) -> Load:
    """Read a file with pread, or an NBD export by its URI, one request at a time: every block at
    most once, for ``seconds``.
    """
    options = [
        f"--rw={pattern}",
        f"--bs={block_bytes}",
        "--readonly",
        f"--runtime={seconds:g}s",  # without time_based: ends at the end of the file if sooner
    ]
    if isinstance(source, Path):
        options += ["--ioengine=psync", f"--filename={source}", "--invalidate=1"]
    else:
        options += ["--ioengine=nbd", f"--uri={source}"]
    return _fio(scratch, "read", "read", options, seconds)
