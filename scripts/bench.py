"""``make bench``: measure blockrepl against its peers on this machine; see scripts/benchmark/."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from scripts.benchmark.run import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
