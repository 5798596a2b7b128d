"""``blockrepl receiver check``: what it says, its exit status, and whom it makes way for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from journal_model import GROUP, Journal, small_segments
from test_check import contents_of, flip, frames_of, sealed
from test_forks import call

from blockrepl.storage.home import Home, exclusive_lock, make_directory
from blockrepl.units import KIB

SIZES = {"root": 320 * KIB, "data": 96 * KIB}


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    small_segments(monkeypatch)
    made = Journal(tmp_path / "home", SIZES)
    made.run(120)
    made.close()
    return made


def test_findings_are_lines_and_what_is_lost_or_to_be_repaired_fails(journal: Journal) -> None:
    status, said, told = call(journal, "receiver", "check")
    assert (status, said) == (0, "no damage found\n")
    assert "checking: 100%" in told
    path = sealed(journal)[0]
    flip(path, contents_of(path)[1].frame_table_offset)
    status, said, _ = call(journal, "receiver", "check", GROUP)
    assert status == 1
    assert said.startswith(f"derived frame-table: {GROUP} segments/{path.name} at ")
    status, said, _ = call(journal, "receiver", "check", "--repair", "--json")
    assert status == 0
    (one,) = json.loads(said)
    assert one["severity"] == "derived"
    assert one["repaired"]
    assert call(journal, "receiver", "check", "--json")[:2] == (0, "[]\n")
    path = sealed(journal)[1]
    at, header = max(frames_of(path), key=lambda each: each[1].payload_bytes)
    flip(path, at + header.frame_bytes - 1)
    status, said, _ = call(journal, "receiver", "check")
    assert status == 1
    assert said.startswith(f"lost block: {GROUP} segments/{path.name} at ")
    assert "; disk " in said.splitlines()[0]
    assert said.splitlines()[1].split() == ["severity", "found", "repaired", "meaning"]
    status, said, _ = call(journal, "receiver", "check", "--json", "--repair")
    assert status == 1
    (one,) = json.loads(said)
    assert one["code"] == "block"
    assert one["ranges"]
    assert header.first_stamp <= one["from_ns"] <= header.last_stamp
    assert not one["repaired"]


def test_a_store_in_use_is_left_alone(journal: Journal) -> None:
    with exclusive_lock(Home(journal.home).run_directory / "receiver.lock"):
        status, said, told = call(journal, "receiver", "check", "--repair")
    assert (status, said) == (1, "")
    assert "is in use by process" in told
    assert "stop the receiver first" in told
    status, _, told = call(journal, "receiver", "check", "nobody")
    assert status == 1
    assert f"groups here: {GROUP}" in told


def test_a_home_without_a_receiver_is_not_called_sound(journal: Journal, tmp_path: Path) -> None:
    other = Home.create(tmp_path / "other")
    status, said, told = call(journal, "--home", other.path, "receiver", "check")
    assert (status, said) == (1, "")
    assert told.startswith(f"error: there is no receiver in {other.path}. run `blockrepl rec")


@pytest.mark.parametrize(
    "words",
    ["receiver check", "retention show web", "retention set web --ladder all:1h"],
)
def test_what_is_asked_of_a_receiver_is_not_for_a_sources_home(
    journal: Journal, tmp_path: Path, words: str
) -> None:
    # Guards read_configuration in retention's _client: "start it" would be told where none is.
    source = Home.create(tmp_path / "source")
    make_directory(source.source_directory)
    status, said, told = call(journal, "--home", source.path, *words.split())
    assert (status, said) == (1, "")
    assert told == (
        f"error: there is no receiver in {source.path}. this home is a source's: run the command "
        "on the receiver's host, or name its home with --home\n"
    )


def test_what_a_bisect_leaves_is_known(journal: Journal) -> None:
    for name in ("bisect.json", "bisect.lock"):
        (journal.directory / name).write_text("{}")
    assert call(journal, "receiver", "check")[:2] == (0, "no damage found\n")
