"""What arrives at the receiver: sustained throughput, lag, the journal's own cost.

Sustained: 64 KiB writes at a steady rate; bytes written over the time from the first write until
the receiver has all of it durable. The rate is the highest, to within 6 %, that this keeps pace
with, first once and then in most rounds: at a higher one what waits only grows, in the ring and
then in the spool, which is written and read too (dearly on a machine that reports free memory to
its host: there a page of the page cache that is used anew takes 12 us instead of 0.3). A figure
with a gap would count bytes that never arrived, so a round with one counts as nothing. The disk has
a ring of 512 MiB instead of 64: source and receiver share one disk here, whose fdatasync stalls for
up to 0.4 s when two streams write to it (with no blockrepl involved, too), and at this rate that is
more than the default ring holds.

Lag: 20 MB/s of 4 KiB writes, the receiver's ``lag_seconds`` sampled all the while over its control
API. Percentiles are of all samples; the range is that of fifths of the run.
"""

from __future__ import annotations

import math
import os
import threading
import time
from statistics import median

from blockrepl.formats import segment
from scripts.benchmark.bench import Bench
from scripts.benchmark.load import MEGABYTE, Load, write_nbd
from scripts.benchmark.ours import Ours, ask_status, ours
from scripts.benchmark.processes import MeasurementError
from scripts.benchmark.report import Goal, Row, summarise
from scripts.benchmark.rounds import percentile, slices

SUSTAINED_BLOCK_BYTES = 64 * 1024
SUSTAINED_SECONDS = 8.0  # at least: a second's worth of a disk's whims is an eighth of it
FIRST_RATE_BYTES = 100 * MEGABYTE
RATE_FACTOR = 1.25
HALVINGS = 2  # of the step between what was kept pace with and what was not: 6 % of it
PACE = 0.9  # of fio's rate, from its first write until all is durable, in the median of the rounds
WIDE_RING = "512M"
LAG_SECONDS = 15.0
LAG_RATE_BYTES = 20 * MEGABYTE
LAG_RATE_SHARE_MIN = 0.95  # of it, or it is not measured
LAG_SAMPLE_SECONDS = 0.02
LAG_SLICES = 5
SAMPLES_MIN = 50


def _sustained(bench: Bench, product: Ours, rate_bytes: int) -> float:
    """MB/s durable at the receiver; 0 when it made a gap."""
    product.settle()
    gaps = product.gaps()
    load = write_nbd(
        bench.scratch,
        product.uri,
        seconds=max(bench.seconds, SUSTAINED_SECONDS),
        depth=16,
        block_bytes=SUSTAINED_BLOCK_BYTES,
        rate_bytes=rate_bytes,
    )
    durable = product.wait_written()
    began = load.ended_seconds - load.runtime_seconds
    product.settle()
    if product.gaps() > gaps:
        return 0.0
    return load.transferred_bytes / MEGABYTE / (durable - began)


def sustained_replication(bench: Bench) -> list[Row]:
    if bench.peers_only:
        return [summarise("sustained_replication", "MB/s", Goal(">=", 250), [])]
    with ours(bench.scratch, bench.image("wide"), ring=WIDE_RING, place="-wide") as product:
        return [_sustained_row(bench, product)]


def _sustained_row(bench: Bench, product: Ours) -> Row:
    os.sync()  # else what rows before left in the page cache is written back within this one
    rate = _sustained_rate(bench, product)
    while True:
        figures = []
        for number in range(1, bench.rounds + 1):
            figures.append(_sustained(bench, product, rate))
            said = f"{figures[-1]:,.1f} MB/s" if figures[-1] else "a gap"
            bench.progress(f"round {number}/{bench.rounds}: ours: {said}")
        if median(figures) * MEGABYTE >= PACE * rate or rate <= FIRST_RATE_BYTES:
            break
        rate = int(rate / RATE_FACTOR ** (0.5**HALVINGS))  # kept pace with once, not in most rounds
        bench.progress(f"not sustained: {rate / MEGABYTE:.0f} MB/s from fio")
    notes = [f"ring of {WIDE_RING}iB; at {rate / MEGABYTE:.0f} MB/s from fio"]
    if lost := figures.count(0.0):
        notes.append(f"{lost} of {bench.rounds} rounds had a gap and count as 0")
    return summarise("sustained_replication", "MB/s", Goal(">=", 250), figures, notes=notes)


def _sustained_rate(bench: Bench, product: Ours) -> int:
    """The highest rate that was kept pace with once, in bytes a second. MeasurementError."""

    def keeps_pace(rate: int) -> bool:
        """At the first or second try: once may be a disk's whim."""
        for _ in range(2):
            reached = _sustained(bench, product, rate)
            bench.progress(f"{rate / MEGABYTE:.0f} MB/s from fio: {reached:.0f} MB/s durable")
            if reached * MEGABYTE >= PACE * rate:
                return True
        return False

    rate, faster = 0, FIRST_RATE_BYTES
    while keeps_pace(faster):
        rate, faster = faster, int(faster * RATE_FACTOR)
    if not rate:
        raise MeasurementError(f"not even {FIRST_RATE_BYTES // MEGABYTE} MB/s can be kept up")
    for _ in range(HALVINGS):
        between = int(math.sqrt(rate * faster))
        if keeps_pace(between):
            rate = between
        else:
            faster = between
    return rate


def _lag_samples(bench: Bench, product: Ours) -> tuple[list[float], Load]:
    """Milliseconds of lag while the load runs, and the load.

    What was sampled before fio's first write does not count: the watermark of an idle group moves
    once a second.
    """
    samples: list[tuple[float, float]] = []  # wall clock in seconds, lag in ms
    failures: list[Exception] = []
    done = threading.Event()

    def sample() -> None:
        try:
            with product.control() as connection:
                while not done.wait(LAG_SAMPLE_SECONDS):
                    lag_seconds = ask_status(connection).lag_seconds
                    if lag_seconds is None:
                        raise MeasurementError("the receiver knows no lag")
                    samples.append((time.time(), lag_seconds * 1000))
        except (MeasurementError, OSError) as error:
            failures.append(error)

    sampler = threading.Thread(target=sample, name="lag sampler")
    sampler.start()
    try:
        load = write_nbd(
            bench.scratch, product.uri, seconds=LAG_SECONDS, depth=16, rate_bytes=LAG_RATE_BYTES
        )
    finally:
        done.set()
        sampler.join()
    if failures:
        raise MeasurementError(f"the lag was not told: {failures[0]}")
    began = load.ended_seconds - load.runtime_seconds
    return [lag for at, lag in samples if began <= at <= load.ended_seconds], load


def lag_and_journal(bench: Bench) -> list[Row]:
    goals = {
        "lag_p50": ("ms", Goal("<=", 20)),
        "lag_p99": ("ms", Goal("<=", 100)),
        "journal_overhead": ("bytes/byte", Goal("<=", 1.02)),
        "index_bytes_per_record": ("bytes", Goal("<=", 32)),
    }
    if bench.peers_only:
        return [summarise(name, unit, goal, []) for name, (unit, goal) in goals.items()]
    product = bench.product()
    product.settle()
    os.sync()  # as above
    bench.progress(f"{LAG_RATE_BYTES // MEGABYTE} MB/s of 4 KiB writes for {LAG_SECONDS:g} s")
    gaps = product.gaps()
    before = product.journal_bytes()
    samples, load = _lag_samples(bench, product)
    product.settle()
    journal_bytes = product.journal_bytes() - before
    if len(samples) < SAMPLES_MIN:
        raise MeasurementError(f"only {len(samples)} samples of lag in {LAG_SECONDS:g} s")
    rate = load.megabytes_per_second
    if rate < LAG_RATE_SHARE_MIN * LAG_RATE_BYTES / MEGABYTE:
        raise MeasurementError(f"only {rate:.1f} MB/s were written: that is another lag")
    if lost := product.gaps() - gaps:
        raise MeasurementError(f"{lost} gaps: what was dropped has no lag")
    taken = f"{len(samples)} samples at {rate:.1f} MB/s, no gap"
    rows = []
    for name, fraction in (("lag_p50", 0.5), ("lag_p99", 0.99)):
        unit, goal = goals[name]
        parts = [percentile(part, fraction) for part in slices(samples, LAG_SLICES)]
        row = summarise(name, unit, goal, [percentile(samples, fraction)], notes=[taken])
        rows.append(row.model_copy(update={"low": min(parts), "high": max(parts)}))
    overhead = [journal_bytes / load.transferred_bytes]
    note = f"{journal_bytes:,} journal bytes, {load.transferred_bytes:,} payload bytes"
    rows.append(summarise("journal_overhead", *goals["journal_overhead"], overhead, notes=[note]))
    rows.append(_index_row(product, *goals["index_bytes_per_record"]))
    return rows


def _index_row(product: Ours, unit: str, goal: Goal) -> Row:
    """Bytes of sealed segments that are not frames, and of merged runs, by record."""
    figures = []
    records = 0
    for path in product.segments():
        data = path.read_bytes()
        trailer = segment.decode_trailer(data[-segment.TRAILER_BYTES :])
        if trailer is None:
            continue  # still open
        end = trailer.contents_offset + trailer.contents_bytes
        contents = segment.decode_contents(trailer, data[trailer.contents_offset : end])
        count = sum(entry.count for entry in contents.runs)
        if count:
            figures.append((len(data) - contents.frames_end) / count)
            records += count
    merged_bytes = sum(path.stat().st_size for path in product.merged_runs())
    figures = [figure + merged_bytes / records for figure in figures]
    notes = [f"{len(figures)} sealed segments, {records:,} records"]
    return summarise("index_bytes_per_record", unit, goal, figures, notes=notes)
