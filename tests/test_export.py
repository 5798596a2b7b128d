"""Exports against the model, points, checkpoints; what fails or is interrupted leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_model import GROUP, Journal, small_segments
from serving import wait_for
from test_view import find, flip, segments_of

from blockrepl.cli.main import run
from blockrepl.storage.home import exclusive_lock
from blockrepl.units import KIB, MIB, format_instant

SIZES = {"root": 3 * MIB + 512, "data": 256 * KIB}


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    small_segments(monkeypatch)
    made = Journal(tmp_path / "home", SIZES)
    made.run(60)
    yield made
    made.close()


def command(journal: Journal, *arguments: object) -> list[str]:
    program = [sys.executable, "-m", "blockrepl.cli.main", "--home", str(journal.home)]
    return [*program, *map(str, arguments)]


def blockrepl(journal: Journal, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(journal, *arguments), capture_output=True, text=True, check=False, timeout=60
    )


def test_a_raw_export_is_the_disk_and_its_holes_are_holes(journal: Journal, tmp_path: Path) -> None:
    at = journal.model.records[40].stamp
    out = tmp_path / "out.img"
    done = blockrepl(journal, "export", GROUP, "root", out, "--at", format_instant(at), "--json")
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    assert json.loads(done.stdout)["at_ns"] == at
    assert out.read_bytes() == journal.model.at(at)["root"]
    assert out.stat().st_blocks * 512 < SIZES["root"] * 0.8


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_an_export_without_room_names_its_file(
    journal: Journal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: str,
) -> None:
    # Guards naming in export: "No space left on device" alone does not say of which.
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"blockrepl.views.export.os.{call}", full)
    out = tmp_path / "out.img"
    words = ["--home", str(journal.home), "export", GROUP, "root", str(out), "--at=latest"]
    assert run(words) == 1
    monkeypatch.undo()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {out}: No space left on device (ENOSPC). free some room")
    assert list(tmp_path.glob("*out*")) == []


def test_a_qcow2_export_without_room_names_its_file(journal: Journal, tmp_path: Path) -> None:
    # Guards "what" in ErrorLines.failure.
    out = tmp_path / "out.qcow2"
    words = command(journal, "export", GROUP, "root", out, "--at=latest", "--format=qcow2")
    limited = ["prlimit", f"--fsize={256 * KIB}", *words]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert f"error: {out} could not be written: " in done.stderr
    assert list(tmp_path.glob("*out*")) == []


def test_a_qcow2_export_is_sound_and_holds_the_disk(journal: Journal, tmp_path: Path) -> None:
    out = tmp_path / "out.qcow2"
    done = blockrepl(journal, "export", GROUP, "root", out, "--at=latest", "--format=qcow2")
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    subprocess.run(["qemu-img", "check", "-q", out], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", out, tmp_path / "back.img"], check=True)
    assert (tmp_path / "back.img").read_bytes() == journal.model.at(journal.stamp)["root"]
    assert out.stat().st_size < SIZES["root"] * 0.8


@pytest.mark.parametrize("file_format", ["raw", "qcow2"])
def test_an_export_over_damage_fails_and_leaves_nothing(
    journal: Journal, tmp_path: Path, file_format: str
) -> None:
    bad = journal.write("root", 64 * KIB, journal.random.randbytes(8192))
    path = segments_of(journal)[-1]
    flip(path, find(path, bad.data[:4096]) + 9)
    before = set(os.listdir(tmp_path))
    out = tmp_path / "out.img"
    done = blockrepl(journal, "export", GROUP, "root", out, "--at=latest", "--format", file_format)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert path.name in error
    assert "is damaged at offset" in error
    assert set(os.listdir(tmp_path)) == before


def export_under_way(
    journal: Journal, directory: Path, file_format: str
) -> subprocess.Popen[bytes]:
    """An export that has made its temporary file."""
    arguments = ["export", GROUP, "root", directory / "out.img", "--at=latest"]
    process = subprocess.Popen(
        command(journal, *arguments, "--format", file_format), stderr=subprocess.PIPE
    )
    wait_for(lambda: any(directory.glob(".out.img.*.part")), "a file begun")
    return process


def test_a_killed_export_leaves_no_server_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard over processes (conftest.py) fails this test if one is left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    journal = Journal(tmp_path / "home", {"root": 192 * MIB})
    process = export_under_way(journal, tmp_path, "qcow2")
    wait_for(lambda: any(tmp_path.glob("blockrepl-export-*/socket")), "nbdkit's socket")
    process.kill()
    process.communicate(timeout=20)
    journal.close()


@pytest.mark.parametrize("file_format", ["raw", "qcow2"])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, file_format: str) -> None:
    journal = Journal(tmp_path / "home", {"root": 192 * MIB})
    before = set(os.listdir(tmp_path))
    process = export_under_way(journal, tmp_path, file_format)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert set(os.listdir(tmp_path)) == before
    journal.close()


def test_an_existing_file_is_only_replaced_by_force(journal: Journal, tmp_path: Path) -> None:
    out = tmp_path / "out.img"
    out.write_text("mine")
    done = blockrepl(journal, "export", GROUP, "data", out, "--at=latest")
    assert done.returncode == 1
    assert "exists" in done.stderr
    assert out.read_text() == "mine"
    assert (
        blockrepl(journal, "export", GROUP, "data", out, "--at=latest", "--force").returncode == 0
    )
    assert out.read_bytes() == journal.model.at(journal.stamp)["data"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nope", "out.img", "--at=latest"], "disks there: data, root"),
        (["root", "missing/out.img", "--at=latest"], "mkdir"),
        (["root", "out.img", "--at=-9000d"], "before the floor"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    journal: Journal, tmp_path: Path, arguments: list[str], told: str
) -> None:
    before = set(os.listdir(tmp_path))
    disk, out, at = arguments
    done = blockrepl(journal, "export", GROUP, disk, tmp_path / out, at)
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert set(os.listdir(tmp_path)) == before


def test_point_says_which_instant_it_is(journal: Journal) -> None:
    journal.checkpoint("tagged")
    begin, end = journal.gap_and_resync("root")
    journal.run(10)
    stamps = sorted(record.stamp for record in journal.model.records)
    done = blockrepl(journal, "point", GROUP, "latest~2", "--json")
    answer = json.loads(done.stdout)
    assert list(answer) == ["asked", "at", "at_ns", "epoch", "distance_seconds"]
    assert (answer["at_ns"], answer["epoch"]) == (stamps[-3], 2)
    assert answer["at"] == format_instant(stamps[-3])
    assert json.loads(blockrepl(journal, "point", GROUP, "tagged", "--json").stdout)["epoch"] == 1
    assert "exactly as asked" in blockrepl(journal, "point", GROUP, "tag:tagged").stdout
    refused = blockrepl(journal, "point", GROUP, format_instant(begin), "--json")
    assert refused.returncode == 1
    told = json.loads(refused.stdout)
    assert (told["nearest_before_ns"], told["nearest_after_ns"]) == (begin - 1, end)
    relative = blockrepl(journal, "point", GROUP, "-5m")
    assert relative.returncode == 1
    assert "before the floor" in relative.stderr  # the model's clock is ahead of this machine's


def test_checkpoints_are_made_listed_and_removed_without_a_running_receiver(
    journal: Journal,
) -> None:
    journal.close()
    at = json.loads(blockrepl(journal, "point", GROUP, "latest", "--json").stdout)["at_ns"]
    made = blockrepl(journal, "checkpoint", "create", GROUP, "now", "--keep", "--json")
    row = {"name": "now", "at": format_instant(at), "at_ns": at, "kind": "crash", "kept": True}
    assert json.loads(made.stdout) == row
    stamps = sorted(record.stamp for record in journal.model.records)
    blockrepl(journal, "checkpoint", "create", GROUP, "back", "--at", "latest~4")
    listed = json.loads(blockrepl(journal, "checkpoint", "list", GROUP, "--json").stdout)
    assert [(c["name"], c["at_ns"]) for c in listed] == [("back", stamps[-5]), ("now", at)]
    taken = blockrepl(journal, "checkpoint", "create", GROUP, "now")
    assert taken.returncode == 1
    assert "exists already" in taken.stderr
    kept = [
        json.loads(blockrepl(journal, "checkpoint", "keep", GROUP, "now", *option, "--json").stdout)
        for option in (["--release"], [])
    ]
    assert kept == [row | {"kept": False}, row]
    assert "no checkpoint 'x'" in blockrepl(journal, "checkpoint", "keep", GROUP, "x").stderr
    assert blockrepl(journal, "checkpoint", "remove", GROUP, "now").returncode == 0
    gone = blockrepl(journal, "checkpoint", "remove", GROUP, "now")
    assert gone.returncode == 1
    assert "no checkpoint" in gone.stderr
    with exclusive_lock(journal.home / "run" / "receiver.lock"):
        locked = blockrepl(journal, "checkpoint", "create", GROUP, "other")
        assert locked.returncode == 1
        assert "in use" in locked.stderr
    journal.open()
