"""The benchmark's report: what is counted as met, and that it cleans up after itself.

Nothing here is timed. The one row that is really measured is run for its status, its JSON and what
it leaves behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmark.load import fio_command
from scripts.benchmark.processes import MeasurementError, bound, scratch
from scripts.benchmark.report import Goal, Row, remarks, summarise, tally, write_json
from scripts.benchmark.rounds import Contestant, interleave, percentile, slices
from scripts.benchmark.run import ROWS, SCENARIOS, chosen_rows, run

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench.py"
KEYS = {"name", "ours", "unit", "peer", "peer_value", "ratio", "goal", "met", "low", "high"}
TINY = ["--rounds", "1", "--seconds", "0.2", "--image-mib", "8", "--peers-only"]


def row(ours: list[float], theirs: list[float], goal: Goal, needs: str | None = None) -> Row:
    return summarise("row", "us", goal, ours, peer="peer", theirs=theirs, needs=needs)


def test_row_with_a_peer_is_judged_by_the_ratio_of_medians() -> None:
    result = row([10, 30, 20], [10, 20, 40], Goal("<=", 1.15))
    assert (result.ours, result.peer_value, result.ratio) == (20, 20, 1.0)
    assert (result.low, result.high) == (0.5, 1.5)
    assert result.met is True


def test_absolute_row_is_judged_by_our_median_and_ranges_over_our_rounds() -> None:
    result = summarise("row", "MB/s", Goal(">=", 250), [300, 240, 260])
    assert (result.peer, result.peer_value, result.ratio) == (None, None, None)
    assert (result.ours, result.low, result.high, result.met) == (260, 240, 300, True)


@pytest.mark.parametrize(
    ("goal", "measured", "met"),
    [
        (Goal("<=", 1.15), 1.15, True),
        (Goal("<=", 1.15), 1.16, False),
        (Goal(">=", 3.0), 3.0, True),
        (Goal(">=", 3.0), 2.99, False),
    ],
)
def test_goal_itself_is_met_and_what_is_beyond_is_not(
    goal: Goal, measured: float, met: bool
) -> None:
    assert goal.met(measured) is met


def test_row_that_needs_a_later_issue_is_measured_but_never_met() -> None:
    result = row([3, 3], [1, 1], Goal(">=", 1), needs="later")
    assert result.ratio == 3
    assert result.met is None
    assert tally([result]) == "0 of 0 goals met, 1 rows need a later issue"
    assert "later" in remarks([result])[0]


def test_row_without_our_rounds_is_not_met() -> None:
    result = row([], [1, 2], Goal("<=", 1))
    assert (result.ours, result.ratio, result.met, result.low) == (None, None, None, None)
    assert tally([result]) == "0 of 0 goals met, 1 not measured"


def test_peer_that_measured_nothing_yields_no_ratio() -> None:
    assert row([1, 1], [0, 0], Goal("<=", 1)).met is None


def test_rounds_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rounds of ours, 1 of peer"):
        row([1, 2], [1], Goal("<=", 1))


def test_json_has_the_agreed_keys_and_optional_ones_only_where_they_say_something(
    tmp_path: Path,
) -> None:
    path = tmp_path / "build" / "bench.json"
    plain = row([1], [1], Goal("<=", 1))
    later = summarise("later", "s", Goal("<=", 0.5), [], needs="An issue", notes=["a", "b"])
    write_json(path, [plain, later])
    document = json.loads(path.read_text())
    assert set(document) == {"rows"}
    assert set(document["rows"][0]) == KEYS
    assert set(document["rows"][1]) == KEYS | {"needs", "note"}
    assert document["rows"][1]["note"] == "a; b"
    assert [entry.name for entry in path.parent.iterdir()] == ["bench.json"]


def test_turns_alternate_and_each_follows_a_sync_and_a_quiet_machine() -> None:
    events: list[str] = []

    def contestant(name: str) -> Contestant:
        def measure() -> float:
            events.append(name)
            return float(len(events))

        return Contestant(name, measure, lambda: events.append(f"{name} settles"))

    figures = interleave(
        [contestant("ours"), contestant("peer")],
        2,
        progress=lambda _: None,
        sync=lambda: events.append("sync"),
    )
    turn = ["sync", "ours", "ours settles", "sync", "peer", "peer settles"]
    assert events == ["ours settles", "peer settles", *turn, *turn]
    assert figures == {"ours": [4.0, 10.0], "peer": [7.0, 13.0]}


def test_percentile_is_a_value_that_was_seen() -> None:
    samples = [float(number) for number in range(1, 101)]
    assert percentile(samples, 0.5) == 50
    assert percentile(samples, 0.99) == 99
    assert percentile([7.0], 0.01) == 7
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 0.5)


@pytest.mark.parametrize("length", [1, 4, 5, 7, 23])
def test_slices_lose_nothing_and_none_is_empty(length: int) -> None:
    samples = [float(number) for number in range(length)]
    parts = slices(samples, 5)
    assert [value for part in parts for value in part] == samples
    assert all(parts)


def test_rows_are_chosen_by_name_or_beginning_with_commas_or_spaces() -> None:
    assert chosen_rows([]) == list(ROWS)
    assert chosen_rows(["lag"]) == ["lag_p50", "lag_p99"]
    assert chosen_rows(["memory_agent,open_point", "lag_p99"]) == [
        "lag_p99",
        "open_point",
        "memory_agent",
    ]


def test_every_row_has_one_scenario() -> None:
    assert len(set(ROWS)) == len(ROWS) == sum(len(scenario.rows) for scenario in SCENARIOS)


def test_unknown_row_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["speed"]) == 2
    assert capsys.readouterr().err.startswith("error: no row is called 'speed'; rows: ")


def test_peer_is_measured_and_a_missing_goal_is_no_failure(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    assert run(["write_latency_depth1", *TINY, "--output", str(output)]) == 0
    (only,) = json.loads(output.read_text())["rows"]
    assert only["peer_value"] > 0
    assert only["met"] is None


def test_failed_measurement_is_one_line_and_the_other_rows_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    broken = tools / "nbdkit"
    broken.write_text("#!/bin/sh\necho it is broken today >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    output = tmp_path / "bench.json"
    assert run(["write_latency_depth1", "open_point", *TINY, "--output", str(output)]) == 1
    assert [entry["name"] for entry in json.loads(output.read_text())["rows"]] == ["open_point"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == [
        "error: not measured: write_latency_depth1: nbdkit ended with 3: it is broken today"
    ]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_ends_its_servers_and_removes_its_files(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    output = tmp_path / "bench.json"
    words = ["write_latency_depth1", *TINY, "--seconds", "60", "--output", str(output)]
    bench = subprocess.Popen(
        [sys.executable, str(SCRIPT), *words], stderr=subprocess.PIPE, text=True
    )
    assert bench.stderr is not None
    for line in bench.stderr:
        if "warm-up" in line:  # the peer's server runs
            break
    scratches = [path for path in _scratches() if _owner(path) == bench.pid]
    bench.send_signal(number)
    bench.stderr.read()
    assert bench.wait(30) == status
    bench.stderr.close()
    assert not output.exists()
    assert scratches
    assert not any(path.exists() for path in scratches)


@pytest.mark.parametrize("begin", ["start", "run"])
def test_interruption_right_after_a_fork_leaves_no_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str
) -> None:
    """Guards `unhurried` around Popen in Scratch.start and Scratch.run."""
    started: list[int] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            started.append(self.pid)
            signal.raise_signal(signal.SIGINT)

    def work() -> None:
        with scratch(tmp_path) as place:
            monkeypatch.setattr(subprocess, "Popen", Interrupted)
            if begin == "start":
                place.start("sleep", ["sleep", "600"])
            place.run(["sleep", "600"])

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not any(_alive(process) for process in started)
    assert len(started) == 1
    assert list(tmp_path.iterdir()) == []


def test_child_whose_parent_died_before_it_could_ask_for_its_signal_does_nothing(
    tmp_path: Path,
) -> None:
    """Guards EXEC_IF_PARENT_LIVES: the command is handed to a parent that is not this process."""
    mark = tmp_path / "ran"
    command = bound(["touch", mark])
    other = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command], check=False)
    assert other.returncode == 1
    assert not mark.exists()
    assert subprocess.run(command, check=False).returncode == 0
    assert mark.exists()


def test_load_is_one_process_group(tmp_path: Path) -> None:
    """Guards --thread in load.py: a job of fio that is a process leaves the group of the run."""
    with scratch(tmp_path) as place:
        file = place.image(1 << 20)
        words = fio_command("look", [f"--filename={file}", "--rw=read", "--ioengine=psync"])
        looked = place.start("fio", [*words, "--time_based", "--runtime=600s"])
        looked.wait_ready(lambda: len(_threads(looked.process.pid)) > 1)
        assert looked.process_ids() == [looked.process.pid]
        children = Path(f"/proc/{looked.process.pid}/task/{looked.process.pid}/children")
        assert children.read_text() == ""


def test_stopped_service_takes_its_children_along(tmp_path: Path) -> None:
    with scratch(tmp_path) as place:
        service = place.start("parent", ["sh", "-c", "sleep 600 & echo ready; wait"])
        service.wait_ready(lambda: service.log.stat().st_size > 0)
        members = service.process_ids()
        assert len(members) == 2
        place.stop(service)
        deadline = time.monotonic() + 5
        while any(_alive(member) for member in members):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def test_command_that_fails_gives_its_last_line_as_the_reason(tmp_path: Path) -> None:
    with scratch(tmp_path) as place, pytest.raises(MeasurementError, match=r"sh .*: because$"):
        place.run(["sh", "-c", "echo noise >&2; echo because >&2; exit 1"])


def test_image_is_as_large_as_asked_and_has_no_holes(tmp_path: Path) -> None:
    with scratch(tmp_path) as place:
        status = place.image(3 << 20).stat()
    assert status.st_size == 3 << 20
    assert status.st_blocks * 512 >= 3 << 20


def _scratches() -> list[Path]:
    return list((SCRIPT.parent.parent / "build").glob("bench-*"))


def _owner(place: Path) -> int:
    """The parent of a process that works on the scratch directory."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_text()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if str(place) in command:
                return parent
    return 0


def _threads(process_id: int) -> list[str]:
    return os.listdir(f"/proc/{process_id}/task")


def _alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
