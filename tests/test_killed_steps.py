"""kill -9 at each step of seal, merge, thin, fold and index rebuild, of real processes: the 100
instants that were sampled before show the same bytes after it, or are refused with the nearest ones
that are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from journal_model import GROUP, Journal, small_segments
from killed_steps import PHASES, SEGMENT_BYTES, run

from blockrepl.errors import PointError
from blockrepl.model.points import Instant, Point
from blockrepl.storage.check import check_replica
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import Home
from blockrepl.storage.replica import open_replica
from blockrepl.storage.retained import Policy, read_kept, write_policy
from blockrepl.units import KIB, NANOSECONDS_PER_SECOND
from blockrepl.views.view import View

SIZES = {"root": 192 * KIB, "data": 300 * KIB + 512}
SECOND = NANOSECONDS_PER_SECOND
LADDER = "all:20s,5s:60s,20s:120s"
SAMPLES = 100
STEPS_MAX = int(os.environ.get("BLOCKREPL_KILLED_STEPS", "1000"))  # per phase, in the soak
KILLED = -signal.SIGKILL
Samples = dict[int, str]  # instant -> digest of all disks


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples]:
    """A receiver's home with a history of some minutes, at rest, and its sampled instants."""
    home = tmp_path_factory.mktemp("killed") / "home"
    subprocess.run(
        [sys.executable, "-m", "blockrepl.cli.main", "--home", home, "receiver", "init"],
        check=True,
        capture_output=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        small_segments(patch, SEGMENT_BYTES)

        def tick(self: Journal) -> int:
            self.stamp += self.random.randrange(1, SECOND)
            return self.stamp

        patch.setattr(Journal, "tick", tick)
        journal = Journal(home, SIZES)
        write_policy(journal.replica.catalog, Policy(ladder=LADDER))
        journal.run(200)
        journal.gap_and_resync("data")
        journal.run(200)
        journal.close()
        found = {stamp: _digest(content) for stamp, content in journal.model.states()}
    chosen = random.Random(7).sample(sorted(found), SAMPLES)
    return home, {stamp: found[stamp] for stamp in sorted(chosen)}


def _digest(contents: dict[str, bytearray]) -> str:
    whole = hashlib.sha256()
    for name in SIZES:
        whole.update(contents[name])
    return whole.hexdigest()


def prepared(template: Path, place: Path, phase: str) -> Path:
    """A copy of the home, in which the phase has work to do."""
    home = place / "home"
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(template, home)
    if phase == "rebuild":
        sealed = sorted((Home(home).replica_directory(GROUP) / "segments").glob("*.seg"))[:-1]
        for path in sealed[1:6:2]:
            with path.open("r+b") as file:
                file.seek(-16, os.SEEK_END)
                file.write(bytes(16))
    return home


def run_phase(phase: str, home: Path, count: int) -> int:
    """In a child, which has what it needs in memory already; how it ended."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            log = os.open(home / "child.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            status = run(phase, home, count)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    ended = os.waitstatus_to_exitcode(status)
    if not count:
        assert ended == 0, (home / "child.log").read_text()
    return ended


def in_one_go(template: tuple[Path, Samples], place: Path, phase: str) -> tuple[int, int]:
    """How many calls a phase makes in a process that is not killed; the samples that are left."""
    home = prepared(template[0], place, phase)
    run_phase(phase, home, 0)
    name = f"worker-{phase}" if phase in ("fold", "thin") else phase
    return int((home / f"{name}.calls").read_text()), check(home, template[1])[0]


def check(home: Path, samples: Samples) -> tuple[int, int]:
    """Every sample is what it was, or refused as it should be; how many of each."""
    shown = 0
    with ReplicaHistory(Home(home).replica_directory(GROUP)) as history:
        state = history.state()
        kept = read_kept(history.catalog)
        floor_ns = history.history(state).floor_ns
        assert floor_ns is not None
        for stamp, digest in samples.items():
            point = Point("x", Instant(stamp))
            before, after = kept.before(stamp), kept.after(stamp)
            if stamp >= floor_ns and before == stamp:
                assert history.resolve(point, state.latest_ns, state).at_ns == stamp
                view = View(history, stamp, state)
                contents = {name: view.read(name, 0, size) for name, size in SIZES.items()}
                assert _digest(contents) == digest, stamp
                shown += 1
                continue
            with pytest.raises(PointError) as refused:
                history.resolve(point, state.latest_ns, state)
            nearest = refused.value.nearest_before_ns, refused.value.nearest_after_ns
            if stamp < floor_ns:
                assert nearest == (None, kept.after(floor_ns))
            else:
                assert nearest[0] in (before, None) if before < floor_ns else nearest[0] == before
                assert nearest[1] == after
    return shown, len(samples) - shown


def killed(template: tuple[Path, Samples], place: Path, phase: str, count: int, whole: int) -> bool:
    """Kill a phase at a call; look as it lies there, after a restart, and when it is done.

    ``whole``: how many samples are left when it is not killed. False when it made fewer calls: a
    thread seals, and how many it takes for that varies by a few.
    """
    home, samples = prepared(template[0], place, phase), template[1]
    status = run_phase(phase, home, count)
    if phase not in ("fold", "thin") and status != KILLED:
        assert status == 0, (home / "child.log").read_text()
        return False
    shown, _ = check(home, samples)
    assert shown > 10
    open_replica(Home(home).replica_directory(GROUP)).close()
    assert check(home, samples)[0] == shown
    assert run_phase(phase, home, 0) == 0
    done, _ = check(home, samples)
    assert 10 < done <= shown
    assert done == whole  # as if it had not been killed
    left = [one for one in check_replica(Home(home).replica_directory(GROUP)) if one.ranges]
    assert left == [], left
    return True


@pytest.mark.timeout(300)
@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_that_is_killed_half_way_loses_no_instant(
    template: tuple[Path, Samples], tmp_path: Path, phase: str
) -> None:
    count, whole = in_one_go(template, tmp_path, phase)
    assert count > 5, count
    assert killed(template, tmp_path, phase, random.Random(phase).randrange(1, count + 1), whole)


@pytest.mark.soak
@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_that_is_killed_at_any_call_loses_no_instant(
    template: tuple[Path, Samples], tmp_path: Path, phase: str
) -> None:
    count, whole = in_one_go(template, tmp_path, phase)
    chosen = sorted({1 + step * count // STEPS_MAX for step in range(STEPS_MAX)} - {count + 1})
    reached = sum(killed(template, tmp_path, phase, step, whole) for step in chosen)
    assert reached >= 0.95 * len(chosen)
    print(json.dumps({"phase": phase, "calls": count, "killed": reached}))
