"""Coverage-guided fuzzing of every parser of foreign bytes (foreign_bytes.py), one after the other.

    python tests/fuzz.py SECONDS [TARGET...]

Each target runs in a process of its own for its share of the time, from its samples and from what
earlier runs found to reach new code (build/fuzz/TARGET/). A find ends the run with status 1, and
stands in build/fuzz/TARGET.crash: make a test of it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

DIRECTORY = Path("build/fuzz")
RSS_MEGABYTES_MAX = 1024
INPUT_BYTES_MAX = 64 * 1024


def main(seconds: int, names: list[str]) -> int:
    from foreign_bytes import TARGETS

    wanted = names or list(TARGETS)
    share_seconds = max(1, seconds // len(wanted))
    failed = []
    for name in wanted:
        corpus = DIRECTORY / name
        corpus.mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(TARGETS[name].samples):
            (corpus / f"sample-{number}").write_bytes(sample)
        process = subprocess.run(
            [
                *(sys.executable, __file__, "--one", name, corpus),
                f"-max_total_time={share_seconds}",
                f"-exact_artifact_path={DIRECTORY / name}.crash",
                f"-rss_limit_mb={RSS_MEGABYTES_MAX}",
                f"-max_len={INPUT_BYTES_MAX}",
            ],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        lines = process.stdout.splitlines()
        done = next((line for line in reversed(lines) if line.startswith("Done ")), "no end")
        print(f"{name:24} {done if process.returncode == 0 else 'FOUND SOMETHING'}", flush=True)
        if process.returncode != 0:
            failed.append(name)
            print("\n".join(lines[-40:]))
    return 1 if failed else 0


def fuzz_one(name: str, arguments: list[str]) -> None:
    """In a process of its own: does not return."""
    import atheris

    with atheris.instrument_imports(include=["blockrepl"], enable_loader_override=False):
        from foreign_bytes import TARGETS

    target = TARGETS[name]

    def parse(data: bytes) -> None:
        with contextlib.suppress(*target.errors):
            target.parse(data)

    atheris.Setup([sys.argv[0], *arguments], parse)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        fuzz_one(sys.argv[2], sys.argv[3:])
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
