"""Rounds of kill -9: server, agent and receiver in random order, under a load that overlaps itself.

A round: one of the three is killed, or two, or all; now and then it stays away for a while, so that
the spool comes into play, or the ring overflows. It comes back, and the load goes on for a moment.
Every CALM_ROUNDS the product gets the time to become consistent again: between two of these there
is hardly an instant that is not in a gap, since each death of a server leaves one.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from oracle.run import GROUP, SETTLE_SECONDS, Outcome, Run
from oracle.writers import Load, Pace, load, run_while
from scripts.guest.pair import Pair

SERVICES = ("agent", "receiver", "disk-d1")
WRITERS = 4
RING_BYTES = 16 << 20  # the smallest: an agent that is away makes gaps
AWAY_SHARE = 0.3  # of the rounds in which it does not come back at once
AWAY_SECONDS = 2.0
PAUSE_SECONDS = 0.8
CALM_ROUNDS = 5
CALM_SECONDS = 1.0
POINTS_PER_ROUND = 2


@dataclass
class KillsOutcome(Outcome):
    rounds: int = 0
    spooled_rounds: int = 0  # in which the agent was seen to have a spool


class Kills(Run):
    outcome: KillsOutcome

    def __init__(self, place: Pair, seed: int, rounds: int) -> None:
        super().__init__(place, seed)
        self.rounds = rounds
        self.ring_bytes = RING_BYTES
        self.outcome = KillsOutcome()
        self.instants = max(50, POINTS_PER_ROUND * rounds)
        self.killed: Counter[str] = Counter()

    def kill_in_turn(self, running: Load) -> None:
        for number in range(1, self.rounds + 1):
            choose = self.random
            victims = choose.sample(SERVICES, choose.choice((1, 1, 1, 1, 2, 3)))
            for victim in victims:
                process = self.place.services[victim].process
                assert process.poll() is None, f"{victim} has ended by itself"
                self.place.kill(victim)
                self.killed[victim] += 1
            if choose.random() < AWAY_SHARE:
                self._let_run(running, choose.random() * AWAY_SECONDS)
            self.outcome.spooled_rounds += self._has_spool()
            choose.shuffle(victims)
            for victim in victims:
                self.start(victim)
            self._let_run(running, choose.random() * PAUSE_SECONDS)
            self.outcome.rounds = number
            if number % CALM_ROUNDS == 0:
                self._calm(running)

    def _has_spool(self) -> bool:
        directory = self.disk.disks.home.source_directory / "spool" / GROUP
        return any(directory.glob("*.frames")) or (directory / "state.json").exists()

    def _let_run(self, running: Load, seconds: float) -> None:
        end = time.monotonic() + seconds
        run_while(running, lambda: time.monotonic() < end)

    def _calm(self, running: Load) -> None:
        """Until history goes on, and then for a moment."""

        def is_disturbed() -> bool:
            return bool(self.place.group(GROUP)["state"] != "replicating")

        run_while(running, is_disturbed, poll_seconds=0.2, seconds_max=SETTLE_SECONDS)
        self._let_run(running, CALM_SECONDS)


def run_kills(place: Pair, rounds: int, *, seed: int, pace: Pace | None = None) -> KillsOutcome:
    """Run in a fresh place."""
    run = Kills(place, seed, rounds)
    run.set_up()
    size_bytes = run.disk.size_bytes
    socket, chosen = run.disk.socket, pace or Pace()
    with place.mounted(GROUP) as root:
        with load(socket, size_bytes, seed=seed, pace=chosen, writers=WRITERS) as running:
            run.kill_in_turn(running)
            run.look_early(root)
        run.outcome.reconnects = sum(writer.reconnects for writer in running.writers)
        run.settle()
        run.examine(root, running.history(run.clock.offset_ns))
    print(f"killed: {dict(run.killed)}")
    return run.outcome
