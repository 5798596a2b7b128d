"""The memory of our processes, over all the rows that ran before and a load of its own."""

from __future__ import annotations

from scripts.benchmark.bench import Bench
from scripts.benchmark.load import MEGABYTE, write_nbd
from scripts.benchmark.report import Goal, Row, summarise

GOALS = {"server": 60, "agent": 200, "receiver": 300}  # MB
QUALIFICATION = "ring not counted; not yet with 10 million records in the journal"


def memory(bench: Bench) -> list[Row]:
    held: dict[str, int] = {}
    if not bench.peers_only:
        product = bench.product()
        bench.progress("writes at depth 16, memory sampled")
        write_nbd(bench.scratch, product.uri, seconds=bench.seconds, depth=16)
        product.settle()
        sampler = bench.sampler()
        sampler.sample()
        held = sampler.most_bytes
    return [
        summarise(
            f"memory_{name}",
            "MB",
            Goal("<=", limit),
            [held[name] / MEGABYTE] if name in held else [],
            notes=[QUALIFICATION] if held else [],
        )
        for name, limit in GOALS.items()
    ]
