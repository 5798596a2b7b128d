"""Interleaved rounds: ours, peer, ours, peer ... so that a machine's drift hits all alike.

Before each turn the page cache is written out and dropped, and every contestant is quiet: whoever
still has work in the background (a mirror job, our agent) is waited for outside the measured time,
so that nobody's leftovers slow the next one down. Dropped, because what an image was last read or
written with decides how large its cached folios are, and a 4 KiB write into a large one costs
several times one into a small one (half of a server's time in ext4_block_write_begin): that would
measure the image's past, not the server.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


def clear_page_cache() -> None:
    """Write everything out; then, where this is root, forget it."""
    os.sync()
    with contextlib.suppress(PermissionError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def nothing() -> None:
    """There is no background work to wait for."""


@dataclass(frozen=True)
class Contestant:
    """Something that can be measured again and again."""

    name: str
    measure: Callable[[], float]  # one turn; returns the figure of the row
    settle: Callable[[], None] = nothing  # returns when the contestant's background work is done


def interleave(
    contestants: Sequence[Contestant],
    rounds: int,
    *,
    progress: Callable[[str], None],
    sync: Callable[[], None] = clear_page_cache,
) -> Mapping[str, list[float]]:
    """Measure each contestant once a round, in the given order; figures by name, in round order."""
    figures: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for contestant in contestants:
        contestant.settle()
    for number in range(1, rounds + 1):
        for contestant in contestants:
            sync()
            figure = contestant.measure()
            progress(f"round {number}/{rounds}: {contestant.name}: {figure:,.1f}")
            figures[contestant.name].append(figure)
            contestant.settle()
    return figures


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The nearest-rank percentile: a value that was seen, never one in between."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


def slices(samples: Sequence[float], count: int) -> list[list[float]]:
    """Cut a series into ``count`` stretches of nearly equal length, none of them empty."""
    count = min(count, len(samples))
    edges = [round(index * len(samples) / count) for index in range(count + 1)]
    return [list(samples[start:end]) for start, end in pairwise(edges)]
