"""The point-in-time oracle on the running product: every instant of a disk's history is a state
that somebody who logged each request's issue and acknowledgement allows, also when each service was
killed in between. The checker's own tests are in test_oracle_checker.py.
"""

from __future__ import annotations

import os

import pytest
from oracle.kills import run_kills
from oracle.run import Outcome, run_oracle
from oracle.slow_link import run_slow_link
from oracle.writers import Pace
from serving import place

from scripts.guest.pair import Pair

__all__ = ["place"]

MEMORY_AGENT_KIB = 200_000_000 // 1024  # the budget of `make bench`
SERVICES = ("agent", "receiver", "disk-d1")


def show(outcome: Outcome) -> None:
    print(outcome)
    print("\n".join(outcome.problems[:20]))


@pytest.mark.timeout(240)
def test_every_instant_is_a_state_the_observer_allows(place: Pair) -> None:
    outcome = run_oracle(place, 8.0, seed=1)
    show(outcome)
    assert outcome.problems == []
    assert (outcome.refused, outcome.gaps, outcome.unacknowledged) == (0, 0, 0)
    assert outcome.checkpoints == 3
    assert outcome.views >= 53
    assert outcome.requests > 300


@pytest.mark.timeout(360)
def test_kills_of_agent_receiver_and_server_lose_nothing(place: Pair) -> None:
    outcome = run_oracle(place, 10.0, seed=2, faults=SERVICES)
    show(outcome)
    assert outcome.problems == []
    assert outcome.reconnects == 3  # each writer, once: the server was killed
    assert outcome.views >= 20  # the others were in the gap that the server's death leaves


@pytest.mark.timeout(360)
def test_kills_in_random_order_leave_the_same_bytes_and_legal_points(place: Pair) -> None:
    outcome = run_kills(place, 6, seed=3, pace=Pace(0.2))
    show(outcome)
    assert outcome.problems == []
    assert outcome.rounds == 6
    assert outcome.views > outcome.rounds


@pytest.mark.timeout(360)
def test_a_link_slower_than_the_guest_costs_no_point(place: Pair) -> None:
    """Guards is_crowded in Outbox._place: the ring is smaller than what memory may hold."""
    outcome = run_slow_link(place, 6.0, seed=4, pace=Pace(0.25))  # the ring lasts some seconds
    show(outcome)
    assert outcome.problems == []
    assert (outcome.refused, outcome.gaps) == (0, 0)
    assert outcome.spool_bytes > 0  # or the link was not slow
    assert outcome.agent_peak_kib < MEMORY_AGENT_KIB


@pytest.mark.soak
def test_a_link_at_a_tenth_of_the_load(place: Pair) -> None:
    """For a minute (or BLOCKREPL_SLOW_SECONDS): a point of every instant, and no slower guest."""
    seconds = float(os.environ.get("BLOCKREPL_SLOW_SECONDS", "60"))
    outcome = run_slow_link(place, seconds, seed=5)
    show(outcome)
    assert outcome.problems == []
    assert (outcome.refused, outcome.gaps) == (0, 0)
    assert outcome.agent_peak_kib < MEMORY_AGENT_KIB
    assert outcome.spool_bytes > 0
    assert outcome.slow_bytes_per_second < 0.15 * outcome.good_bytes_per_second
    assert outcome.slow_p99_ms <= 2 * outcome.good_p99_ms
    assert outcome.slow_write_p90_ms <= 2 * outcome.good_write_p90_ms


@pytest.mark.soak
def test_many_rounds_of_kills(place: Pair) -> None:
    rounds = int(os.environ.get("BLOCKREPL_KILL_ROUNDS", "200"))
    outcome = run_kills(place, rounds, seed=rounds, pace=Pace(0.2))
    show(outcome)
    assert outcome.problems == []
    assert outcome.rounds == rounds
    assert outcome.views >= rounds / 2
    assert min(outcome.spooled_rounds, outcome.gaps, outcome.unacknowledged) > rounds / 50


@pytest.mark.soak
def test_soak(place: Pair) -> None:
    seconds = float(os.environ.get("BLOCKREPL_SOAK_SECONDS", "600"))
    faults = SERVICES * max(1, int(seconds // 60))
    outcome = run_oracle(place, seconds, seed=int(seconds), faults=faults, pace=Pace(0.1))
    show(outcome)
    assert outcome.problems == []
