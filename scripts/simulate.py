"""Deterministic simulation of the whole product under faults; see simulation/world.py.

scripts/simulate.py --seed 4711           one run, with its trace
scripts/simulate.py --seeds 0:10000       many, on all cores; what fails is shown with its seed
scripts/simulate.py --count 1000 --jobs 1
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.simulation.main import main

if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is chance of Python's
        os.execve(
            sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"}
        )
    main()
