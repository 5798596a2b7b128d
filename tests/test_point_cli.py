"""Points on the command line: what is completed, what is read as one, what is said of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from journal_model import GROUP, Journal

from blockrepl.cli.main import cli, run
from blockrepl.cli.point import explain
from blockrepl.model.points import Resolved
from blockrepl.units import KIB, MIB

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / "home", {"root": 96 * KIB})
    made.run(10)
    made.checkpoint("before-upgrade")
    yield made
    made.close()


def completions(home: Path, *words: str) -> set[str]:
    """What TAB offers after ``words``, of which the last is being typed."""
    before = ["--home", str(home), *words[:-1]]
    shell = ShellComplete(cli, {}, "blockrepl", "_BLOCKREPL_COMPLETE")
    return {item.value for item in shell.get_completions(before, words[-1])}


def test_points_are_completed_where_the_group_is_known(journal: Journal) -> None:
    def offered(*words: str) -> set[str]:
        return completions(journal.home, *words)

    tag = "tag:before-upgrade"
    assert tag in offered("point", GROUP, "")
    assert {tag, "latest"} <= offered("mount", GROUP, "m", "--at", "")
    assert tag in offered("checkpoint", "create", GROUP, "x", "--at", "tag:")
    assert offered("checkpoint", "remove", GROUP, "") == {"before-upgrade"}
    assert offered("checkpoint", "remove", GROUP, "x") == set()


def test_completion_never_complains(journal: Journal, tmp_path: Path) -> None:
    assert "latest" in completions(journal.home, "mount", "--at", "")
    for home in (journal.home, tmp_path / "none"):
        assert "latest" in completions(home, "mount", "../no such", "m", "--at", "")
        assert completions(home, "checkpoint", "remove", "nope", "") == set()
        assert completions(home, "disk", "show", "") == set()
    assert completions(tmp_path / "none", "mount", "") == set()
    (journal.directory / "catalog.sqlite").write_bytes(b"no catalog")
    assert "latest" in completions(journal.home, "point", GROUP, "")


def test_disks_are_completed_by_name(tmp_path: Path) -> None:
    home = tmp_path / "source"
    for name in ("vm1", "data"):
        image = tmp_path / f"{name}.img"
        words = ["disk", "add", name, str(image), "--group", "g", "--size", str(MIB)]
        assert run(["--home", str(home), *words]) == 0
    for verb in ("show", "serve", "remove"):
        assert completions(home, "disk", verb, "") == {"data", "vm1"}
    assert completions(home, "disk", "show", "v") == {"vm1"}


def test_a_relative_point_is_no_call_for_help(journal: Journal, capsys: Capture) -> None:
    at = ["--home", str(journal.home), "point", GROUP]
    assert run([*at, "-1h30m~"]) == 2
    assert "after ~ comes a number" in capsys.readouterr().err
    assert run([*at, "-h"]) == 2
    assert "neither a time nor a name" in capsys.readouterr().err
    assert run([*at, "-1h30m"]) == 1  # read as a point, and refused as one
    assert "cannot be reached" in capsys.readouterr().err
    assert run(["point", "--help"]) == 0


@pytest.mark.parametrize(
    ("asked", "distance_seconds", "said"),
    [
        ("latest", -5.09, "latest: 5.09 s ago"),
        ("latest~0", -5.09, "latest~0: 5.09 s ago"),
        ("latest~3", -5.09, "latest~3: 3 records before latest"),
        ("-5m~1", -0.5, "-5m~1: 1 record before -5m"),
        ("tag:x", 0.0, "tag:x: exactly as asked"),
    ],
)
def test_what_is_said_of_a_point(asked: str, distance_seconds: float, said: str) -> None:
    assert explain(Resolved(asked, 1, 1, distance_seconds)).endswith(f"({said})")


@pytest.mark.parametrize("name", ["latest", "flush", "2026-11-22", "2026-13-01"])
def test_a_checkpoint_may_not_have_the_name_of_another_point(
    journal: Journal, tmp_path: Path, capsys: Capture, name: str
) -> None:
    image = tmp_path / "vm1.img"
    source = ["--home", str(tmp_path / "source")]
    add = ["disk", "add", "vm1", str(image), "--group", GROUP, "--size", str(MIB)]
    assert run([*source, *add]) == 0
    for home in (["--home", str(journal.home)], source):
        assert run([*home, "checkpoint", "create", GROUP, name]) == 2
        assert "choose another name" in capsys.readouterr().err
