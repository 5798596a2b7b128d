"""The guest's write path against the peers: latency, IOPS with the network down, IOPS replicating.

Each measurement warms up for a moment first (first touches of the page cache, of the ring and, with
the network down, the hot marks of regions that were cold); what the warm-up made is in the row's
note where it differs in kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from scripts.benchmark.bench import Bench
from scripts.benchmark.load import write_nbd
from scripts.benchmark.ours import Ours
from scripts.benchmark.peers import nbdkit_file, qemu_nbd, qsd_mirror
from scripts.benchmark.report import Goal, Row, summarise
from scripts.benchmark.rounds import Contestant, interleave

WARM_UP_SECONDS = 1.0
OURS = "ours"
NBDKIT = "nbdkit file plugin"
QEMU_NBD = "qemu-nbd"
MIRROR = "qemu-storage-daemon, mirror over TLS"


def _iops(bench: Bench, uri: str, depth: int = 16) -> float:
    return write_nbd(bench.scratch, uri, seconds=bench.seconds, depth=depth).iops


def _warm_up(bench: Bench, uri: str, depth: int = 16) -> float:
    bench.progress("warm-up")
    return write_nbd(bench.scratch, uri, seconds=WARM_UP_SECONDS, depth=depth).iops


def _compete(bench: Bench, contestants: list[Contestant]) -> Mapping[str, list[float]]:
    if bench.peers_only:
        contestants = [contestant for contestant in contestants if contestant.name != OURS]
    figures = interleave(contestants, bench.rounds, progress=bench.progress)
    return {OURS: [], **figures}


def write_latency_depth1(bench: Bench) -> list[Row]:
    def latency(uri: str) -> float:
        load = write_nbd(bench.scratch, uri, seconds=bench.seconds, depth=1)
        return load.latency_mean_microseconds

    contestants = []
    with nbdkit_file(bench.scratch, bench.image(NBDKIT)) as peer:
        _warm_up(bench, peer, 1)
        if not bench.peers_only:
            product = bench.product()
            product.settle()
            _warm_up(bench, product.uri, 1)
            contestants.append(Contestant(OURS, lambda: latency(product.uri), product.settle))
        contestants.append(Contestant(NBDKIT, lambda: latency(peer)))
        figures = _compete(bench, contestants)
    return [
        summarise(
            "write_latency_depth1",
            "us",
            Goal("<=", 1.15),
            figures[OURS],
            peer=NBDKIT,
            theirs=figures[NBDKIT],
        )
    ]


def network_down(bench: Bench) -> list[Row]:
    """Nobody takes what is captured: the ring is full and only the hot map is kept."""
    notes = []
    with ExitStack() as stack:
        contestants = []
        if not bench.peers_only:
            product = bench.product()
            product.settle()
            product.stop_agent()
            stack.callback(product.start_agent)
            cold = _warm_up(bench, product.uri)
            notes.append(f"{cold:,.0f} IOPS in the first {WARM_UP_SECONDS:g} s, on a cold map")
            contestants.append(Contestant(OURS, lambda: _iops(bench, product.uri)))
        for name, server in ((NBDKIT, nbdkit_file), (QEMU_NBD, qemu_nbd)):
            uri = stack.enter_context(server(bench.scratch, bench.image(name)))
            _warm_up(bench, uri)
            contestants.append(Contestant(name, partial(_iops, bench, uri)))
        figures = _compete(bench, contestants)
    return [
        summarise(name, "IOPS", goal, figures[OURS], peer=peer, theirs=figures[peer], notes=notes)
        for name, goal, peer in (
            ("write_iops_depth16_network_down", Goal(">=", 0.8), NBDKIT),
            ("write_iops_depth16_network_down_qemu_nbd", Goal(">=", 2.0), QEMU_NBD),
        )
    ]


def replicating(bench: Bench) -> list[Row]:
    notes = []
    with ExitStack() as stack:
        contestants = []
        product: Ours | None = None
        gaps_before = 0
        if not bench.peers_only:
            product = bench.product()
            product.settle()
            uri = product.uri
            _warm_up(bench, uri)
            product.settle()
            gaps_before = product.gaps()
            contestants.append(Contestant(OURS, lambda: _iops(bench, uri), product.settle))
        source, target = bench.image("mirror"), bench.image("mirror target")
        bench.progress("starting the mirror; its first pass")
        mirror = stack.enter_context(qsd_mirror(bench.scratch, source, target))
        _warm_up(bench, mirror.uri)
        contestants.append(Contestant(MIRROR, lambda: _iops(bench, mirror.uri), mirror.settle))
        figures = _compete(bench, contestants)
        if product is not None:
            gaps = product.gaps() - gaps_before
            notes.append(f"{gaps} gaps in {bench.rounds} rounds" if gaps else "no gap")
    return [
        summarise(
            "write_iops_depth16_replicating",
            "IOPS",
            Goal(">=", 3.0),
            figures[OURS],
            peer=MIRROR,
            theirs=figures[MIRROR],
            notes=notes,
        )
    ]
