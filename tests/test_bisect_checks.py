"""The checks that the README gives, run as they stand there, find the write that did the damage."""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_model import GROUP, Journal, Record
from serving import as_root, tool
from test_bisect import nothing_left
from test_fuse import blockrepl

from blockrepl.formats.frame import RecordKind
from blockrepl.units import MIB, format_instant

README = Path(__file__).resolve().parents[1] / "README.md"
FILE_SYSTEM_BYTES = 16 * MIB
DISK_BYTES = 20 * MIB  # behind the file system the guest writes what nobody looks at

pytestmark = as_root


def script(name: str, into: Path) -> Path:
    """A script of the README, by the name in its first comment."""
    for block in re.findall(r"((?:^    .*\n|^\n)+)", README.read_text(), re.MULTILINE):
        for text in block.split("    #!/bin/sh\n")[1:]:
            lines = [line.removeprefix("    ") for line in text.rstrip().splitlines()]
            if lines[0].startswith(f"# {name}: "):
                path = into / name
                path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
                path.chmod(0o755)
                return path
    raise AssertionError(f"README has no script {name}")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """A disk with an ext4 file system with a database in it, as the guest left it."""
    made = Journal(tmp_path / "home", {"root": DISK_BYTES})
    data = tmp_path / "made" / "data"
    data.mkdir(parents=True)
    database = sqlite3.connect(data / "shop.db")
    database.execute("create table t (x)")
    database.executemany("insert into t values (?)", [(f"row {n:06d} " * 9,) for n in range(2000)])
    database.commit()
    database.close()
    image = tmp_path / "made.img"
    tool(
        "mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "made", image, str(FILE_SYSTEM_BYTES // 1024)
    )
    content = image.read_bytes()
    for offset in range(0, len(content), MIB):
        piece = content[offset : offset + MIB]
        made.put([Record(made.tick(), "root", offset, MIB, RecordKind.WRITE, piece)], model=False)
    yield made
    made.close()


def noise(journal: Journal, count: int, seed: int) -> None:
    chance = random.Random(seed)
    records = [
        Record(
            journal.tick(),
            "root",
            chance.randrange(FILE_SYSTEM_BYTES, DISK_BYTES - 512),
            512,
            RecordKind.WRITE,
            chance.randbytes(512),
        )
        for _ in range(count)
    ]
    journal.put(records, model=False)


def place_of(kind: str, image: Path) -> int:
    """Where on the disk one write does the damage: a page of the database, the root's inode."""
    if kind == "check-files":
        said = tool("debugfs", "-R", "imap <2>", image)
        found = re.search(r"located at block (\d+), offset (0x[0-9a-f]+)", said)
        assert found is not None
        return int(found[1]) * 1024 + int(found[2], 16)
    return image.read_bytes().index(b"row 001000 ") // 4096 * 4096


@pytest.mark.parametrize("kind", ["check-database", "check-files"])
def test_a_check_of_the_readme_finds_the_write(journal: Journal, tmp_path: Path, kind: str) -> None:
    image = tmp_path / "made.img"
    good = journal.stamp
    noise(journal, 100, 1)
    length = 128 if kind == "check-files" else 4096
    bad = Record(journal.tick(), "root", place_of(kind, image), length, RecordKind.WRITE,
                 b"\xff" * length)  # fmt: skip
    journal.put([bad], model=False)
    noise(journal, 60, 2)
    ends = (f"--good={format_instant(good)}", "--bad=latest")
    done = blockrepl(journal, "bisect", GROUP, *ends, "--json", "--", script(kind, tmp_path))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["exact"], done.stderr
    [told] = answer["first_bad_records"]
    assert (told["offset"], told["length"], told["at_ns"]) == (bad.offset, length, bad.stamp)
    assert nothing_left(journal)
