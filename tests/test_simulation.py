"""The simulation (scripts/simulate.py): some hundred seeds, and what it is worth."""

from __future__ import annotations

import pytest

from scripts.simulation.main import simulate_safely
from scripts.simulation.plants import PLANTS, planted
from scripts.simulation.run import simulate

SEEDS = 150


@pytest.mark.timeout(400)
def test_seeds_show_nothing_wrong() -> None:
    outcomes = [simulate_safely(seed) for seed in range(SEEDS)]
    assert [outcome for outcome in outcomes if outcome.violation] == []


def test_a_seed_is_one_run() -> None:
    # Guards all that World replaces: what it forgot would be other chance each time.
    for seed in (3, 4, 5):
        lines: list[str] = []
        shown = simulate(seed, lines.append)
        assert simulate(seed) == shown
        assert lines


@pytest.mark.soak
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found_within_a_thousand_seeds(plant: str) -> None:
    with planted(plant):
        assert any(simulate(seed).violation for seed in range(1000))
