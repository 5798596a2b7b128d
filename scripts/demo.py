"""``make demo``: a guest loses its data and gets it back; see scripts/guest/tour.py.

Exit status 0 only if every check held. Nothing is left behind, whatever happens: services, mounts,
the guest and the demo's directory end with it, after Ctrl-C, SIGTERM or the time limit, too.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

LIMIT_SECONDS = 285  # make demo promises five minutes


class TimeUpError(RuntimeError):
    """The demo took longer than it may."""


def _time_is_up(number: int, frame: FrameType | None) -> None:
    raise TimeUpError(f"the demo did not end within {LIMIT_SECONDS} s")


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from rich.console import Console

    from scripts.benchmark.processes import MeasurementError
    from scripts.guest.build import GuestError
    from scripts.guest.pair import pair
    from scripts.guest.tour import Tour, TourError

    console = Console(highlight=False, soft_wrap=True)

    def tell(command: str) -> None:
        console.print(f"  $ {command}", style="cyan", markup=False)

    signal.signal(signal.SIGALRM, _time_is_up)
    signal.signal(signal.SIGTERM, _terminate)
    signal.alarm(LIMIT_SECONDS)
    try:
        with pair(Path(tempfile.gettempdir()), tell) as made:
            console.print(f"Everything happens in {made.directory} and is removed at the end.")
            try:
                Tour(console, made).run()
            except (GuestError, MeasurementError, TourError, TimeUpError) as error:
                console.print(f"\nerror: {error}", style="bold red", markup=False)
                made.tell_logs(lambda line: console.print(line, style="dim", markup=False))
                return 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.alarm(0)
    if made.strays or made.directory.exists():
        left = "; ".join([*made.strays, str(made.directory)])
        console.print(f"\nerror: left behind: {left}", style="bold red", markup=False)
        return 1
    console.print("\nEvery check held; nothing is left running.", style="bold green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
