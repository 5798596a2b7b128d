"""``timeline`` as it is typed: the terminal's rows, pictures, JSON, and what is refused."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from journal_model import GROUP, START, Journal, small_segments
from rich.console import Console
from test_forks import fail, succeed
from test_thinning import aligned, thin_all
from test_timeline import SIZES, read_frames

from blockrepl.cli import timeline_text
from blockrepl.formats.marks import ConsistentMark, GapMark
from blockrepl.model import points, time_axis
from blockrepl.model.retention import Kept, Stretch
from blockrepl.model.timeline import SUMS, Bins, edges
from blockrepl.storage.history import ReplicaHistory
from blockrepl.units import KIB, NANOSECONDS_PER_SECOND, format_instant
from blockrepl.views import timeline as timelines
from blockrepl.views.timeline import Timeline

SECOND = NANOSECONDS_PER_SECOND


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """Two minutes: thinned, a checkpoint after 60 s, a gap of ``data`` from 80 s to 100 s."""
    small_segments(monkeypatch, 16 * KIB)
    made = Journal(tmp_path / "home", SIZES, seed=3)
    run_until(made, 60)
    made.checkpoint("before-upgrade", kept=True)
    run_until(made, 80)
    made.mark(GapMark(disk=made.ids["data"], from_ns=made.stamp))
    made.replica.commit()
    made.stamp = START + 100 * SECOND
    made.mark(ConsistentMark(disk=made.ids["data"], at_ns=made.stamp))
    made.replica.commit()
    run_until(made, 120)
    yield made
    made.close()


def run_until(journal: Journal, seconds: int) -> None:
    while journal.stamp < START + (seconds - 6) * SECOND:
        journal.stamp += journal.random.randrange(5 * SECOND)
        journal.run(12)
    journal.stamp = START + seconds * SECOND
    journal.run(1)


def at(seconds: float) -> str:
    return format_instant(START + int(seconds * SECOND))


def told(journal: Journal, *options: object) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(succeed(journal, "timeline", GROUP, "--json", *options))
    return answer


def drawn(journal: Journal, width: int, begin: float = 0, end: float = 121) -> list[str]:
    with ReplicaHistory.open(journal.home, GROUP) as history:
        state = history.state()
        first, last = (points.parse(at(each)) for each in (begin, end))
        window = timelines.window(history, state, first, last, journal.stamp)
        found = timelines.timeline(history, state, (), *window, timeline_text.columns(width))
    console = Console(width=width, highlight=False, file=None, color_system=None)
    with console.capture() as captured:
        console.print(timeline_text.render(found))
    return captured.get().splitlines()


def test_json_has_what_the_help_says_and_sums_to_what_was_written(journal: Journal) -> None:
    answer = told(journal)
    written = read_frames(journal)
    assert sum(one["writes"] for one in answer["intervals"]) == sum(
        kind == 0 for frame in written for *_, kind in frame.records
    )
    assert len(answer["intervals"]) == 240
    for before, after in pairwise(answer["intervals"]):
        assert before["to_ns"] == after["from_ns"] > before["from_ns"]
    assert (answer["from"], answer["disks"]) == (at(0), ["data", "root"])
    [checkpoint] = answer["checkpoints"]
    assert (checkpoint["name"], checkpoint["kept"]) == ("before-upgrade", True)
    [gap] = answer["gaps"]
    assert gap["disk"] == "data"
    assert gap["to_ns"] == START + 100 * SECOND
    assert gap["open"] is False
    text = succeed(journal, "timeline", "--help")
    keys = set(answer) | set(answer["intervals"][0]) | set(checkpoint) | set(gap)
    assert set(SUMS) < keys
    for key in keys | {"step_seconds", "why"}:
        assert re.search(rf"\b{key}\b", text), key


def test_the_window_is_the_last_hour_or_what_was_asked_for(journal: Journal) -> None:
    """Guards WINDOW_SECONDS and `_cut` in views/timeline.py."""
    assert told(journal)["from_ns"] == START
    answer = told(journal, "--from", at(-500), "--to", at(30), "--intervals", 3)
    assert (answer["from_ns"], answer["to_ns"]) == (START, START + 30 * SECOND)
    assert len(answer["intervals"]) == 3
    inside_the_gap = told(journal, "--from", at(85), "--to", at(90))
    assert inside_the_gap["from"] == at(85)
    assert inside_the_gap["gaps"][0] == {
        "disk": "data",
        "from_ns": START + 85 * SECOND,
        "to_ns": START + 90 * SECOND,
        "open": False,
    }
    assert told(journal, "--from", "tag:before-upgrade", "--disk", "root")["disks"] == ["root"]
    journal.stamp += 2 * 3600 * SECOND
    journal.run(10)
    answer = told(journal)
    assert answer["to_ns"] == journal.stamp
    assert answer["from_ns"] == journal.stamp - 3600 * SECOND
    for number in ("--from=-10000d", "--from=-100000h"):  # before now, which is before the journal
        assert told(journal, number, "--intervals", 1)["from_ns"] == START


def test_a_gap_ends_where_its_disk_was_retired(journal: Journal) -> None:
    """Guards ``ends`` in `timeline`: later windows had a gap that ended before it began."""
    begin = journal.stamp + 1  # what was written until then shows
    journal.mark(GapMark(disk=journal.ids["data"], from_ns=begin))
    journal.replica.commit()
    del journal.sizes["data"]
    run_until(journal, 130)
    journal.close()
    journal.open()
    [retired] = [
        row.removed_ns for row in journal.replica.catalog.disks(removed=True) if row.removed_ns
    ]
    run_until(journal, 150)
    for first, last, shown in (
        (123, 125, [(START + 123 * SECOND, START + 125 * SECOND)]),
        (110, 150, [(begin, retired)]),
        (140, 150, []),
    ):
        gaps = told(journal, "--from", at(first), "--to", at(last))["gaps"]
        assert [(gap["from_ns"], gap["to_ns"]) for gap in gaps] == shown
        assert not any(gap["open"] for gap in gaps)


def test_what_cannot_be_drawn_is_one_line(journal: Journal) -> None:
    for options, status, what in (
        (("--from", at(1000), "--to", at(2000)), 1, "outside the history"),
        (("--from", at(-9), "--to", at(-5)), 1, "outside the history"),
        (("--from", at(30), "--to", at(20)), 2, "before it begins"),
        (("--from", at(20), "--to", at(20)), 2, "is empty: it begins and ends at"),
        (("--from", "tag:nowhere"), 1, "nowhere"),
        (("--from", "no time"), 2, "neither a time nor a name"),
        (("--disk", "swap"), 1, "no disk swap"),
        (("--intervals", "0"), 2, "intervals"),
        (("--output", "x.pdf"), 2, "neither a PNG nor an SVG"),
        (("--output", "/nowhere/x.png"), 1, "not a directory"),
        (("--output", "/dev/x/y.svg"), 1, "not a directory"),
    ):
        assert what in fail(journal, "timeline", GROUP, *options, status=status)


def test_no_file_is_replaced_unless_forced(journal: Journal, tmp_path: Path) -> None:
    """Guards check_target in cli/timeline.py."""
    target = tmp_path / "t.png"
    target.write_text("mine")
    assert "exists" in fail(journal, "timeline", GROUP, "--output", target)
    assert target.read_text() == "mine"
    succeed(journal, "timeline", GROUP, "--output", target, "--force")
    assert target.read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_a_png_is_whole_and_as_large_as_it_says(journal: Journal, tmp_path: Path) -> None:
    target = tmp_path / "t.png"
    assert str(target) in succeed(journal, "timeline", GROUP, "--output", target)
    data, place, kinds, pixels = target.read_bytes(), 8, [], b""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, place + 8 + length)
        assert checksum == zlib.crc32(kind + body)
        kinds.append(kind)
        pixels += body if kind == b"IDAT" else b""
        place += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    width, height = struct.unpack_from(">II", data, 16)
    assert (width, height) == (1650, 1140)
    rows = np.frombuffer(zlib.decompress(pixels), np.uint8)
    assert len(rows) == height * (width * 4 + 1)
    assert len(np.unique(rows)) > 50  # something was drawn


def test_an_svg_says_what_is_drawn(journal: Journal, tmp_path: Path) -> None:
    edge = aligned(journal.stamp - 80 * SECOND, SECOND)
    thin_all(journal, Kept((Stretch(0, edge, SECOND),)), step_ns=SECOND)
    target = tmp_path / "t.svg"
    answer = told(journal, "--output", target)
    assert answer["output"] == str(target)
    assert answer["thinned"] == [{"from_ns": START, "to_ns": edge, "step_seconds": 1.0}]
    root = ElementTree.parse(target).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = " | ".join("".join(each.itertext()) for each in root.iter() if "text" in each.tag)
    for part in (
        f"{GROUP} (data, root)",
        "write rate",
        "KiB/s]",
        "changed",
        "stored of",
        "written [%]",
        "flushes",
        "[1/s]",
        "time [UTC], from 2027-01-15 08:00:00",
        "08:01:00",
        "before-upgrade",
        "checkpoint",
        "gap",
        "thinned by retention",
        "guest writes",
        "distinct 4 KiB blocks",
    ):
        assert part in texts, part
    assert "damaged" not in texts
    assert "sent again" not in texts


@pytest.mark.parametrize("width", [39, 60, 80, 133, 250])
def test_rows_fit_the_terminal_and_stand_below_each_other(journal: Journal, width: int) -> None:
    """Guards `columns` and `_place`: a mark is where its instant is."""
    lines = drawn(journal, width)
    assert all(len(line) <= width for line in lines)
    count = timeline_text.columns(width)
    rows = {line.split("  ")[0].strip(): line[12 : 12 + count] for line in lines}
    rows["history"] = next(line for line in lines if line.startswith("history"))[12 : 12 + count]
    written = next(line for line in lines if line.startswith("write rate"))
    checkpoints = next(line for line in lines if line.startswith("checkpoints"))
    whole = journal.stamp - START
    place = checkpoints.index("▲") - 12
    instant = told(journal)["checkpoints"][0]["at_ns"] - START
    assert place * whole // count < instant <= (place + 1) * whole // count
    gap = [at for at, sign in enumerate(rows["history"]) if sign == "·"]
    assert abs(gap[0] - 80 * SECOND * count / whole) <= 1
    assert abs(gap[-1] - 100 * SECOND * count / whole) <= 1
    assert set(rows["history"]) == {"█", "·"}
    answer = told(journal, "--intervals", count)
    for sign, one in zip(written[12 : 12 + count], answer["intervals"], strict=True):
        assert (sign == " ") == (one["written_bytes"] == 0)
    assert "█" in written[12 : 12 + count]
    assert re.search(r"KiB/s$|MiB/s$| B/s$", written)
    assert any(re.search(r"08:0[01].* UTC$", line) for line in lines)
    assert any("before-upgrade" in line for line in lines)


def test_a_terminal_shows_what_was_thinned_and_what_is_damaged(journal: Journal) -> None:
    edge = aligned(journal.stamp - 80 * SECOND, SECOND)
    thin_all(journal, Kept((Stretch(0, edge, SECOND),)), step_ns=SECOND)
    history = next(line for line in drawn(journal, 149) if line.startswith("history"))
    assert history[12:42] == "▒" * 30
    assert history[60:70] == "█" * 10
    name = sorted((journal.directory / "segments").glob("????????????.seg"))[1].name
    (journal.directory / "segments" / name).unlink()
    lines = drawn(journal, 149)
    assert "×" in next(line for line in lines if line.startswith("history"))
    assert any(f"{name} is missing" in " ".join(lines[at : at + 2]) for at in range(20))


def test_nothing_written_is_drawn_as_nothing(journal: Journal, tmp_path: Path) -> None:
    answer = told(journal, "--from", at(90), "--to", at(91))
    assert sum(one["writes"] for one in answer["intervals"]) == 0
    lines = drawn(journal, 80, 90, 91)
    assert next(line for line in lines if line.startswith("stored"))[12:60].strip() == ""
    for name in ("t.png", "t.svg"):
        options = "--from", at(90), "--to", at(91), "--output", tmp_path / name
        succeed(journal, "timeline", GROUP, *options)


def test_a_timeline_of_nothing_at_all_can_be_drawn() -> None:
    empty = Timeline("web", (), Bins(edges(5, 9, 240), []), (), (), (), ())
    assert empty.bins.edges.tolist() == [5, 6, 7, 8, 9]
    assert np.isnan(empty.stored_share()).all()
    timeline_text.render(empty)


def test_nothing_heavy_is_imported_before_a_picture_is_asked_for(journal: Journal) -> None:
    code = (
        "import sys; from blockrepl.cli.main import run; "
        f"run(['--home', {str(journal.home)!r}, 'timeline', {GROUP!r}]); "
        "sys.exit('matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("most", [1, 3, 8, 20])
def test_a_time_axis_has_a_few_round_instants(most: int) -> None:
    for power in range(1, 18):
        for length in (10**power, 3 * 10**power + 7):
            begin = START + 123_456_789
            found = time_axis.marks(begin, begin + length, most)
            assert 1 <= len(found) <= most or (most == 1 and not found)
            instants = [instant for instant, _ in found]
            assert all(begin <= instant <= begin + length for instant in instants)
            assert len({after - before for before, after in pairwise(instants)}) <= 1
            assert len({text for _, text in found}) == len(found)
