"""The command: one seed with its trace, or many with their violations."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import click

from scripts.simulation.plants import PLANTS, planted
from scripts.simulation.run import Outcome, simulate

SHOWN_MAX = 10  # violations shown; the rest is counted
CHUNK_SEEDS = 10  # that a worker takes at once


@click.command()
@click.option("--seed", type=int, help="Run one seed and show its trace.")
@click.option("--seeds", metavar="A:B", help="Run the seeds from A up to B.")
@click.option("--count", type=int, help="Run so many seeds from 0 on.")
@click.option("--jobs", type=int, default=os.cpu_count, help="Processes. Default: one per core.")
@click.option(
    "--plant", type=click.Choice([*PLANTS, "all"]), help="Plant a fault; runs until it is found."
)
@click.option("--quiet", is_flag=True, help="With --seed: no trace.")
def main(
    seed: int | None,
    seeds: str | None,
    count: int | None,
    jobs: int,
    plant: str | None,
    quiet: bool,
) -> None:
    """Simulate the product under faults that a seed decides. Exit 1 when something is wrong.

    \b
    scripts/simulate.py --seed 4711
    scripts/simulate.py --seeds 0:10000
    """
    if seed is not None:
        outcome = simulate(seed, None if quiet else click.echo)
        click.echo(f"seed {seed}: {outcome.violation or 'nothing wrong'}; trace {outcome.digest}")
        raise SystemExit(bool(outcome.violation))
    first, last = _range(seeds, count)
    if plant is not None:
        names = PLANTS if plant == "all" else [plant]
        missed = [name for name in names if not _find(name, range(first, last))]
        raise SystemExit(bool(missed))
    raise SystemExit(_run_many(range(first, last), jobs))


def _range(seeds: str | None, count: int | None) -> tuple[int, int]:
    if seeds is None:
        return 0, 1000 if count is None else count
    first, separator, last = seeds.partition(":")
    if not separator or not first.isdigit() or not last.isdigit():
        raise click.UsageError("--seeds takes A:B, two numbers")
    return int(first), int(last)


def _run_many(seeds: range, jobs: int) -> int:
    began = time.monotonic()
    done = violations = 0
    for outcome in _outcomes(seeds, jobs):
        done += 1
        if outcome.violation:
            violations += 1
            if violations <= SHOWN_MAX:
                click.echo(f"seed {outcome.seed}: {outcome.violation}")
        if done % 1000 == 0:
            rate = done / (time.monotonic() - began)
            click.echo(f"{done} seeds, {violations} violations, {rate:.0f} seeds/s")
    seconds = time.monotonic() - began
    click.echo(f"{done} seeds in {seconds:.0f} s: {violations} violations")
    return int(violations > 0)


def _find(plant: str, seeds: range) -> bool:
    with planted(plant):
        for tried, seed in enumerate(seeds, 1):
            outcome = simulate(seed)  # a fault that no checker finds, but an error, is not found
            if outcome.violation:
                click.echo(f"{plant}: found after {tried} seeds ({seed}: {outcome.violation})")
                return True
    click.echo(f"{plant}: not found in {len(seeds)} seeds")
    return False


def _outcomes(seeds: range, jobs: int) -> Iterator[Outcome]:
    if jobs <= 1:
        for seed in seeds:
            yield simulate_safely(seed)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(simulate_safely, seeds, chunksize=CHUNK_SEEDS)


def simulate_safely(seed: int) -> Outcome:
    """As `simulate`; whatever else goes wrong is a violation too."""
    gc.disable()  # a run's cycles are few; looking for them costs a tenth of it
    try:
        return simulate(seed)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found: BaseException = error
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        return Outcome(seed, "", f"{type(found).__name__}: {found}")
    finally:
        gc.enable()
        gc.collect(1)
