"""Bisect: the search by itself, then real commands against real forks of a two-disk group."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journal_model import GROUP, Journal, Record, small_segments
from serving import tool, wait_for
from test_export import command
from test_forks import call, pinned
from test_fuse import blockrepl
from test_thinning import STEP, aligned, thin_all

from blockrepl.errors import DamageError, StateError
from blockrepl.formats.frame import RecordKind
from blockrepl.model.bisect import SKIPS_MAX, Candidates, Found, Outcome, Probe, step
from blockrepl.model.points import nearest
from blockrepl.model.retention import Kept, Stretch
from blockrepl.storage import cuts
from blockrepl.storage.cuts import Cuts
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import Home
from blockrepl.storage.reading import OPEN_FILES_MAX
from blockrepl.units import KIB, MIB, format_instant
from blockrepl.views import bisect as bisecting
from blockrepl.views.fuse_wait import TURN
from scripts.guest.pair import COMMAND

with_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.W_OK), reason="this user may not use /dev/fuse"
)


# The search


class Searched:
    """A search over a made-up history; cuts are even instants, the first bad one is known."""

    def __init__(
        self, count: int, first_bad: int, skips: set[int] | None = None, exact_max: int = 1 << 60
    ) -> None:
        self.cuts = np.arange(2, 2 * count + 2, 2, dtype=np.uint64)
        self.first_bad = first_bad
        self.skips = skips or set()
        self.exact_max = exact_max
        self.results: dict[int, Outcome] = {}

    def candidates(self, low: int, high: int) -> Candidates:
        first, last = np.searchsorted(self.cuts, np.array([low + 1, high], np.uint64))
        inside = self.cuts[first:last]
        if len(inside) <= self.exact_max:
            return Candidates(inside, np.ones(len(inside), np.uint64))
        some = inside[99::100]
        return Candidates(some, np.full(len(some), 100, np.uint64), is_all=False)

    def run(self, good: int = 1, bad: int | None = None, **options: bool) -> Found:
        bad = int(self.cuts[-1]) if bad is None else bad
        while True:
            todo = step(good, bad, self.results, self.candidates, **options)
            if isinstance(todo, Found):
                return todo
            assert todo.at_ns not in self.results
            self.results[todo.at_ns] = self.probe(todo)

    def probe(self, probe: Probe) -> Outcome:
        if probe.at_ns in self.skips:
            return Outcome.SKIP
        return Outcome.BAD if probe.at_ns >= self.first_bad else Outcome.GOOD


@pytest.mark.parametrize("seed", range(30))
def test_the_first_bad_cut_is_found_in_the_logarithm_of_their_number(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.choice([1, 2, 3, 10, 1000, 1_000_000])
    first_bad = 2 * chance.randrange(1, count + 1)
    searched = Searched(count, first_bad)
    assert searched.run() == Found(first_bad - 2 if first_bad > 2 else 1, first_bad, ())
    assert len(searched.results) <= math.ceil(math.log2(count)) + 2


def test_a_day_of_writes_takes_fewer_than_25_probes() -> None:
    """92 writes a second; next to one of the ends it takes one more, for that end is probed too."""
    for first_bad in (2, 16_000_000, 14_999_998, 7_654_322):
        searched = Searched(8_000_000, first_bad, exact_max=2_000_000)
        assert searched.run().bad_ns == first_bad
        assert len(searched.results) <= 23 + (first_bad in (2, 16_000_000))


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_a_command_that_skips_everything_has_found_nothing(count: int) -> None:
    searched = Searched(count, 2, set(range(2 * count + 1)))
    with pytest.raises(StateError, match="neither good nor bad of any of"):
        searched.run()


@pytest.mark.parametrize("seed", range(30))
def test_skips_are_gone_around(seed: int) -> None:
    chance = random.Random(seed)
    count = 4000
    first_bad = 2 * chance.randrange(1, count + 1)
    start, length = chance.randrange(count), chance.choice([3, 30, 1000])
    skips = {2 * (start + place) for place in range(length)} | set(
        chance.sample(range(2, 2 * count, 2), 300)
    )
    skips -= {2 * count}
    searched = Searched(count, first_bad, skips)
    found = searched.run()
    assert found.good_ns < first_bad <= found.bad_ns
    between = {cut for cut in range(found.good_ns + 1, found.bad_ns) if cut % 2 == 0}
    assert set(found.skipped) <= between & skips
    assert set(found.skipped) == between or len(found.skipped) == SKIPS_MAX
    assert len(searched.results) < 3 * SKIPS_MAX


def test_a_stretch_of_skips_before_the_answer_costs_few_probes() -> None:
    searched = Searched(100_000, 180_002, {2 * place for place in range(40_000, 60_000)})
    assert searched.run().bad_ns == 180_002
    assert len(searched.results) < 25


@pytest.mark.parametrize(
    ("first_bad", "told"), [(0, "says bad of the point"), (10**9, "says good of the point")]
)
@pytest.mark.parametrize("check_ends", [False, True])
def test_a_command_that_always_says_the_same_is_found_out(
    first_bad: int, told: str, check_ends: bool
) -> None:
    searched = Searched(5000, first_bad)
    with pytest.raises(StateError, match=told):
        searched.run(check_ends=check_ends)
    assert len(searched.results) <= (2 if check_ends else 14)


def test_a_search_goes_on_from_its_results_as_if_nothing_had_been() -> None:
    whole = Searched(5000, 3334, {3000, 5000})
    answer = whole.run()
    for done in range(len(whole.results)):
        again = Searched(5000, 3334, {3000, 5000})
        again.results = dict(list(whole.results.items())[:done])
        assert again.run() == answer
        assert list(again.results) == list(whole.results)


# Cuts of a real history


SIZES = {"root": 1 * MIB, "data": 256 * KIB}


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    small_segments(monkeypatch, 256 * KIB)
    made = Journal(tmp_path / "home", SIZES)
    yield made
    made.close()


@pytest.mark.parametrize("exact_max", [cuts.EXACT_RECORDS_MAX, 40])
def test_cuts_are_the_stamps_at_which_a_view_changes(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, exact_max: int
) -> None:
    monkeypatch.setattr(cuts, "EXACT_RECORDS_MAX", exact_max)
    journal.run(60)
    begin, end = journal.gap_and_resync("root")
    journal.run(60)
    stamps = sorted(
        {
            end if begin <= record.stamp < end else record.stamp
            for record in journal.model.records
            if record.kind != RecordKind.FLUSH
        }
    )
    with ReplicaHistory.open(journal.home, GROUP) as history:
        state = history.state()
        disks = [row.id for row in state.disks]
        found = Cuts(history, disks, stamps[3], stamps[-2])
        assert found.last(stamps[3], stamps[-2] + 1) == stamps[-2]
        assert found.is_gap_end(end)
        candidates = found.candidates(stamps[3], stamps[-2])
        if candidates.is_all:
            assert candidates.instants.tolist() == stamps[4:-2]
        else:
            assert set(candidates.instants.tolist()) < set(stamps[4:-2])
        narrow = found.candidates(stamps[10], stamps[12])
        assert narrow.instants.tolist() == [stamps[11]]
        with pytest.raises(StateError, match="nothing was written"):
            found.last(stamps[10], stamps[10])
        records, count = found.records(stamps[10], stamps[11])
        assert count == len(records) == 1
        assert records[0].at_ns == stamps[11]


def test_cuts_outlive_the_segments_they_were_found_in(journal: Journal) -> None:
    """Guards the second look in `Cuts`: places are held for as long as the command takes."""
    journal.run(400)
    begin, second = aligned(journal.model.records[0].stamp), aligned(journal.stamp)
    first = begin + 4 * STEP
    kept = Kept((Stretch(begin, second, STEP),))
    with ReplicaHistory.open(journal.home, GROUP) as history:
        disks = [row.id for row in history.state().disks]
        found = Cuts(history, disks, first, second)
        assert len(found.candidates(first, second).instants) > 100
        thin_all(journal, kept)
        history.files.close()
        assert found.last(first, second) > second - STEP
        records, count = found.records(first, second)
    assert count > len(records) > 3
    anew = {row.number for row in journal.replica.catalog.segments() if row.generation}
    assert {record.segment for record in records} & anew  # as people know them, not their places


@pytest.mark.parametrize("exact_max", [cuts.EXACT_RECORDS_MAX, 8])
def test_where_history_is_thinned_cuts_are_the_instants_that_are_left(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, exact_max: int
) -> None:
    """Guards what `_moved` takes for granted: no other instant can be mounted.

    With few stamps held at once a frame stands for instants it has no last record of.
    """
    monkeypatch.setattr(cuts, "EXACT_RECORDS_MAX", exact_max)
    journal.run(150)
    gap_end = journal.gap_and_resync("root")[1]
    journal.run(150)
    begin, edge = aligned(journal.model.records[0].stamp), aligned(journal.model.records[250].stamp)
    kept = Kept((Stretch(begin, edge, STEP),), (journal.model.records[120].stamp,))
    thin_all(journal, kept)
    changes = [each.stamp for each in journal.model.records if each.kind != RecordKind.FLUSH]
    with ReplicaHistory.open(journal.home, GROUP) as history:
        known = history.history()
        shown = {nearest(known, stamp)[1] for stamp in changes}
        instants = sorted(each for each in shown if each is not None and each > begin)
        assert any(each < edge for each in instants)
        disks = [row.id for row in history.state().disks]
        low, high = instants[0], instants[-1]
        found = Cuts(history, disks, low, high)
        assert found.last(low, high) == high
        for first, last in zip(instants, instants[2:], strict=False):
            [between] = found.candidates(first, last).instants.tolist()
            assert first < between < last
        told = found.candidates(low, high)
        assert set(told.instants.tolist()) <= set(instants)
        assert len(told.instants) == len(instants) - 2 or not told.is_all
        assert [each for each in instants if found.is_gap_end(each)] == [kept.after(gap_end)]


# Real commands


def history(journal: Journal, count: int, seed: int = 1, batch: int = 250) -> list[Record]:
    """Small random writes to both disks; the last 4 KiB of each stay as they are."""
    chance = random.Random(seed)
    made: list[Record] = []
    for first in range(0, count, batch):
        some = [_change(journal, chance) for _ in range(min(batch, count - first))]
        journal.put(some, model=False)
        made += some
    return made


def _change(journal: Journal, chance: random.Random) -> Record:
    disk = chance.choice(list(SIZES))
    offset = chance.randrange(SIZES[disk] - 8192)
    kind = chance.choices([RecordKind.WRITE, RecordKind.ZERO, RecordKind.FLUSH], [12, 1, 1])[0]
    if kind == RecordKind.FLUSH:
        return Record(journal.tick(), disk, 0, 0, kind)
    data = chance.randbytes(16) if kind == RecordKind.WRITE else b""
    return Record(journal.tick(), disk, offset, 16, kind, data)


def plant(journal: Journal) -> Record:
    """One write that does the damage, amid the others."""
    bad = Record(journal.tick(), "data", SIZES["data"] - 4000, 9, RecordKind.WRITE, b"corrupted")
    journal.put([bad], model=False)
    return bad


CHECK = 'if grep -aq corrupted "$BLOCKREPL_IMAGE_DATA"; then exit 1; fi'


def bisect(journal: Journal, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return blockrepl(journal, "bisect", GROUP, "--json", *options, "--", "sh", "-c", script)


def nothing_left(journal: Journal) -> bool:
    forks = journal.directory / "forks"
    return (
        pinned(journal) == []
        and not list(forks.iterdir())
        and not list((journal.home / "run").glob("bisect-*"))
        and str(journal.home) not in Path("/proc/self/mountinfo").read_text()
    )


@with_fuse
def test_the_one_corrupting_write_is_found_with_its_record(journal: Journal) -> None:
    first = history(journal, 1500)
    bad = plant(journal)
    history(journal, 1500, seed=2)
    begin = format_instant(first[2].stamp)
    # The command writes to what it is given: forks are its own.
    script = f'printf x | dd of="$BLOCKREPL_IMAGE_ROOT" conv=notrunc 2>/dev/null; {CHECK}'
    done = bisect(journal, script, f"--good={begin}", "--bad=latest")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    changes = [record for record in first if record.kind != RecordKind.FLUSH]
    assert (answer["exact"], answer["skipped"]) == (True, [])
    assert answer["last_good_ns"] == changes[-1].stamp
    assert answer["first_bad_ns"] == bad.stamp
    [told] = answer["first_bad_records"]
    assert (told["disk"], told["offset"], told["length"]) == ("data", bad.offset, bad.length)
    assert (told["kind"], told["at_ns"]) == ("write", bad.stamp)
    good = answer["last_good_record"]
    assert (good["disk"], good["offset"]) == (changes[-1].disk, changes[-1].offset)
    assert answer["probes"] <= 14
    assert (
        len([line for line in done.stderr.splitlines() if line.startswith("probe ")])
        == answer["probes"]
    )
    assert nothing_left(journal)


@with_fuse
def test_where_history_is_thinned_the_first_bad_instant_that_is_left_is_found(
    journal: Journal,
) -> None:
    first = history(journal, 600)
    bad = plant(journal)
    after = history(journal, 600, seed=2)
    begin, edge = aligned(first[0].stamp), aligned(after[-100].stamp)
    kept = Kept((Stretch(begin, edge, STEP),))
    thin_all(journal, kept)
    good = begin + 2 * STEP
    done = bisect(journal, CHECK, f"--good={format_instant(good)}", "--bad=latest")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["exact"], answer["skipped"]) == (True, [])
    assert answer["first_bad_ns"] == kept.after(bad.stamp)
    assert answer["last_good_ns"] == kept.after(bad.stamp) - STEP
    places = [(each["disk"], each["offset"]) for each in answer["first_bad_records"]]
    assert ("data", bad.offset) in places
    assert nothing_left(journal)


@with_fuse
def test_probes_of_more_segments_than_are_kept_open(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `fuse_wait.install` of a second mount in one process: the first's descriptor is
    another file's by then, and what waited for that went round for good at the TURN-th request.
    """
    small_segments(monkeypatch, 512)
    first = history(journal, 800, batch=4)
    bad = plant(journal)
    history(journal, 800, seed=2, batch=4)
    assert len(list((journal.directory / "segments").iterdir())) > OPEN_FILES_MAX
    ask = f'for n in $(seq {2 * TURN}); do [ ! -e "$BLOCKREPL_DIR/$n" ] || exit 1; done'
    read = 'cat "$BLOCKREPL_IMAGE_ROOT" > /dev/null'
    ends = (f"--good={format_instant(first[0].stamp)}", "--bad=latest")
    done = bisect(journal, f"{read}; {ask}; {CHECK}", *ends)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["first_bad_ns"] == bad.stamp
    assert nothing_left(journal)


@with_fuse
def test_a_search_across_a_growth_shows_each_probe_the_size_of_its_instant(
    journal: Journal, tmp_path: Path
) -> None:
    """The damage is in what is new of the disk, and is not there at all before."""
    first = history(journal, 100)
    grown_bytes = SIZES["data"] + 64 * KIB
    grown_ns = journal.grow("data", grown_bytes)
    history(journal, 30, seed=2)
    bad = Record(journal.tick(), "data", grown_bytes - 512, 9, RecordKind.WRITE, b"corrupted")
    journal.put([bad], model=False)
    history(journal, 30, seed=3)
    log = tmp_path / "log"
    script = f'echo $BLOCKREPL_AT_NS $(stat -c %s "$BLOCKREPL_IMAGE_DATA") >> {log}; {CHECK}'
    done = bisect(journal, script, f"--good={format_instant(first[0].stamp)}", "--bad=latest")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["exact"], answer["first_bad_ns"]) == (True, bad.stamp)
    probed = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    for at_ns, size_bytes in probed:
        assert size_bytes == (grown_bytes if at_ns >= grown_ns else SIZES["data"])
    assert min(probed)[0] < grown_ns < max(probed)[0]
    assert nothing_left(journal)


@with_fuse
def test_skips_one_disk_and_a_resumed_search(journal: Journal, tmp_path: Path) -> None:
    """Guards the state that is written after each probe: what was probed is not probed again."""
    first = history(journal, 150)
    bad = plant(journal)
    history(journal, 150, seed=2)
    log, stop = tmp_path / "log", tmp_path / "stop"
    # After three probes the command breaks; one of the first is skipped.
    script = f"""
    echo $BLOCKREPL_AT_NS >> {log}
    [ $(ls "$BLOCKREPL_DIR") = data.img ] || exit 127
    [ $(wc -l < {log}) = 2 ] && exit 125
    [ -e {stop} ] || [ $(wc -l < {log}) -le 3 ] || exit 126
    if grep -aq corrupted "$BLOCKREPL_IMAGE"; then exit 1; fi
    """
    ends = (f"--good={format_instant(first[0].stamp)}", "--bad=latest")
    broken = bisect(journal, script, *ends, "--disk=data")
    assert broken.returncode == 1
    assert "ended with status 126" in broken.stderr.splitlines()[-1]
    assert nothing_left(journal)
    stop.touch()
    done = blockrepl(journal, "bisect", GROUP, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["first_bad_ns"] == bad.stamp
    assert {record["disk"] for record in answer["first_bad_records"]} == {"data"}
    probed = [line for line in log.read_text().split() if line]
    assert len(probed) == len(set(probed)) + 1  # the one that broke
    again = blockrepl(journal, "bisect", GROUP, "--resume", "--json")
    assert json.loads(again.stdout) == answer
    assert len(log.read_text().split()) == len(probed)
    people = blockrepl(journal, "bisect", GROUP, "--resume")
    assert f"write of 9 bytes at {bad.offset} of data" in people.stdout


@with_fuse
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_and_leaves_nothing_mounted(
    journal: Journal, tmp_path: Path, number: signal.Signals
) -> None:
    """Guards the order in `_answer_and_run`: the command ends before the mount does."""
    first = history(journal, 30)
    begun = tmp_path / "begun"
    script = f'exec 9>>"$BLOCKREPL_IMAGE_DATA"; touch {begun}; sleep 1000 & wait'
    ends = (f"--good={format_instant(first[0].stamp)}", "--bad=latest")
    process = subprocess.Popen(
        command(journal, "bisect", GROUP, *ends, "--", "sh", "-c", script),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(begun.exists, "the first probe")
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"to go on: blockrepl bisect {GROUP} --resume" in told.decode().splitlines()
    assert nothing_left(journal)


@with_fuse
def test_what_a_killed_bisect_left_mounted_is_unmounted_by_the_next(
    journal: Journal, tmp_path: Path
) -> None:
    first = history(journal, 30)
    begun = tmp_path / "begun"
    ends = (f"--good={format_instant(first[0].stamp)}", "--bad=latest")
    process = subprocess.Popen(
        command(journal, "bisect", GROUP, *ends, "--", "sh", "-c",
                f"echo $$ > {begun}; mv {begun} {begun}.pid; sleep 1000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    pid = Path(f"{begun}.pid")
    wait_for(pid.exists, "the first probe")
    process.kill()
    process.wait()
    os.killpg(int(pid.read_text()), signal.SIGKILL)
    assert str(journal.home) in Path("/proc/self/mountinfo").read_text()
    done = bisect(journal, "exit 0", *ends)
    assert "says good of the point" in done.stderr
    assert nothing_left(journal)


@pytest.mark.parametrize(
    "changed",
    [
        {"good_ns": "1"},
        {"good_ns": -1},
        {"bad_ns": 1 << 70},
        {"bad_ns": None},
        {"disks": "data"},
        {"disks": [1]},
        {"command": []},
        {"command": "sh"},
        {"command": ["sh", 1]},
        {"command": ["sh", "\0"]},
        {"check_ends": "no"},
        {"results": [[1, "good", 2]]},
        {"results": [["1", "good"]]},
        {"results": [[1, "soso"]]},
        {"results": 1},
    ],
)
def test_a_damaged_search_is_not_resumed(tmp_path: Path, changed: dict[str, Any]) -> None:
    search = bisecting.Search(1, 9, ["data"], ["sh", "-c", "true"], False, [(5, "skip")])
    path = tmp_path / bisecting.FILE_NAME
    fields = asdict(search)
    path.write_text(json.dumps(fields))
    assert bisecting.load(tmp_path, "g") == search
    for text in (json.dumps(fields | changed), "[]", "{", "\xff", "{}"):
        path.write_text(text, "latin-1")
        with pytest.raises(DamageError, match=r"bisect\.json is damaged: .") as caught:
            bisecting.load(tmp_path, "g")
        assert "\n" not in str(caught.value)


def test_a_bisect_leaves_the_directory_of_another_groups_alone(tmp_path: Path) -> None:
    """Between its probes nothing is mounted there."""
    home = Home.create(tmp_path).path
    with bisecting._directory(home, "a") as first:
        with bisecting._directory(home, "b") as second:
            assert len({path for path in (first, second) if path.is_dir()}) == 2
        assert first.is_dir()
    assert not list((home / "run").iterdir())


@with_fuse
@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--good=latest~3", "--bad=latest"], 2, "and a command"),
        (["--good=latest", "--bad=latest~3", "--", "true"], 2, "is not before"),
        (["--good=latest~3", "--bad=latest", "--disk=nope", "--", "true"], 1, "data, root"),
        (["--good=latest~3", "--bad=latest", "--", "no-such-program"], 1, "no program no-such"),
        (["--good=-1000d", "--bad=latest", "--", "true"], 1, "before the floor"),
        (["--resume"], 1, "no bisect of web to resume"),
        (["--resume", "--good=latest"], 2, "leave --good"),
    ],
)
def test_what_cannot_be_bisected_is_one_line(
    journal: Journal, arguments: list[str], status: int, told: str
) -> None:
    history(journal, 10)
    found, _, said = call(journal, "bisect", GROUP, *arguments)
    assert found == status, said
    *before, last = said.splitlines()
    assert told in last
    assert not [line for line in before if not line.startswith("bisect from ")]
    assert pinned(journal) == []


def test_a_disk_that_is_there_at_one_point_only_is_named(journal: Journal) -> None:
    # It said that nothing was written, where much was, to a disk that was then removed.
    history(journal, 1)
    good = format_instant(journal.stamp)
    written = journal.write("data", 0, b"x")
    del journal.sizes["data"]
    journal.close()
    journal.open()
    journal.put([Record(journal.tick(), "root", 0, 0, RecordKind.FLUSH)])
    arguments = f"--good={good}", "--bad=latest", "--", "true"
    status, _, said = call(journal, "bisect", GROUP, *arguments)
    assert (status, written.disk) == (1, "data")
    assert "between the good point and the bad one to root. not looked at: data. only" in said


@with_fuse
@pytest.mark.soak
def test_one_write_among_a_million_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "home", SIZES)
    first = history(journal, 600_000, batch=8000)
    bad = plant(journal)
    history(journal, 400_000, seed=2, batch=8000)
    begin = format_instant(first[0].stamp)
    done = bisect(journal, CHECK, f"--good={begin}", "--bad=latest")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["exact"]
    [told] = answer["first_bad_records"]
    assert (told["disk"], told["offset"], told["at_ns"]) == ("data", bad.offset, bad.stamp)
    assert answer["probes"] < 23
    tool("sh", "-c", f"echo '{answer['probes']} probes'")
    journal.close()


def test_help_has_examples() -> None:
    for verb in ("bisect", "diff", "serve", "mount", "fork"):
        assert "Example" in tool(COMMAND, verb, "--help"), verb
