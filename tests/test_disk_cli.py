"""blockrepl disk: add, list, show, remove, and how each refuses what cannot be."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import serving
from serving import Disk, place

from blockrepl.cli.main import run
from blockrepl.units import MIB
from scripts.guest.pair import Pair

__all__ = ["place"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.img"
    path.touch()
    os.truncate(path, MIB)
    return path


def blockrepl(home: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command in this process: starting Python takes longer than all that it does."""
    if "serve" in words:
        return serving.blockrepl(home, *words)  # becomes nbdkit where it succeeds
    output, errors = io.StringIO(), io.StringIO()
    arguments = ["--home", str(home), *map(str, words)]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = run(arguments)
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), errors.getvalue())


def add(home: Path, name: str, image: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return blockrepl(home, "disk", "add", name, image, "--group", "web", *words)


def refused(process: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert process.returncode == status, process.stderr
    [line] = process.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def names(home: Path) -> list[str]:
    return [disk["name"] for disk in json.loads(blockrepl(home, "disk", "list", "--json").stdout)]


def files(home: Path) -> list[str]:
    return sorted(p.name for p in (home / "source" / "disks").glob("[a-z]*"))


def test_a_disk_is_added_listed_shown_and_removed(home: Path, image: Path) -> None:
    added = add(home, "vm1", image, "--json")
    assert added.returncode == 0, added.stderr
    data = json.loads(added.stdout)
    assert (data["name"], data["group"], data["size_bytes"]) == ("vm1", "web", MIB)
    [row] = json.loads(blockrepl(home, "disk", "list", "--json").stdout)
    socket = home / "run" / "disk-vm1.sock"
    assert row == {
        "name": "vm1",
        "group": "web",
        "image": str(image),
        "size_bytes": MIB,
        "uri": f"nbd+unix:///?socket={socket}",
        "serving": False,
    }
    shown = json.loads(blockrepl(home, "disk", "show", "vm1", "--json").stdout)
    assert row.items() <= shown.items()
    assert "vm1" in blockrepl(home, "disk", "list").stdout
    assert "vm1" in blockrepl(home, "disk", "show", "vm1").stdout
    removed = blockrepl(home, "disk", "remove", "vm1")
    assert removed.returncode == 0, removed.stderr
    assert names(home) == []
    assert files(home) == []
    assert image.stat().st_size == MIB


def test_size_creates_a_sparse_image(home: Path, tmp_path: Path) -> None:
    image = tmp_path / "new.img"
    assert add(home, "vm1", image, "--size", "1G").returncode == 0
    assert image.stat().st_size == 1 << 30
    assert image.stat().st_blocks == 0
    assert image.stat().st_mode & 0o077 == 0


def test_a_new_disk_is_hot_everywhere(place: Pair) -> None:
    """Nothing is known of it at the receiver yet."""
    disk = Disk(place, size_bytes=5 * MIB + 512)
    assert disk.hot_regions() == list(range(6))


def test_serving_is_told(place: Pair) -> None:
    disk = Disk(place)
    disk.start()
    assert place.disk("d1")["serving"] is True
    disk.stop()
    assert place.disk("d1")["serving"] is False


@pytest.mark.parametrize("name", ["", "UPPER", "-x", "a/b", "..", "a" * 64, "ä", "a b"])
def test_names_that_cannot_be(home: Path, image: Path, name: str) -> None:
    refused(blockrepl(home, "disk", "add", "--group", "web", "--", name, str(image)), 2, "name")
    assert files(home) == []
    refused(blockrepl(home, "disk", "add", "ok", image, f"--group={name}"), 2, "group name")
    assert files(home) == []


def test_names_and_images_that_are_taken(home: Path, image: Path, tmp_path: Path) -> None:
    assert add(home, "vm1", image).returncode == 0
    other = tmp_path / "other.img"
    refused(add(home, "vm1", other, "--size", "1M"), 1, "exists already")
    assert not other.exists()
    refused(add(home, "vm2", image), 1, "already protected", "vm1")
    link = tmp_path / "hard.img"
    link.hardlink_to(image)
    refused(add(home, "vm2", link), 1, "already protected", "vm1")
    refused(add(home, "vm2", image, "--size", "1M"), 1, "exists already")
    assert names(home) == ["vm1"]


def test_images_that_cannot_be_disks(home: Path, tmp_path: Path) -> None:
    refused(add(home, "x", tmp_path / "absent.img"), 1, "No such file", "--size")
    refused(add(home, "x", tmp_path), 1, "neither a file nor a block device")
    refused(add(home, "x", Path("/dev/null")), 1, "neither")
    odd = tmp_path / "odd.img"
    odd.write_bytes(bytes(1000))
    refused(add(home, "x", odd), 2, "1000 bytes", "512")
    odd.write_bytes(b"")
    refused(add(home, "x", odd), 2, "0 bytes")
    odd.write_bytes(b"QFI\xfb".ljust(512, b"\0"))
    refused(add(home, "x", odd), 1, "qcow2", "qemu-img convert")
    assert names(home) == []
    assert files(home) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--size", "0"), "512"),
        (("--size", "1000"), ". use a multiple of 512"),
        (("--size", "ten"), "not a size"),
        (("--size", "-1"), "not a size"),
        (("--size", "1M", "--ring", "1M"), "ring"),
        (("--size", "1M", "--ring", "1T"), "ring"),
    ],
)
def test_sizes_that_cannot_be(
    home: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    image = tmp_path / "new.img"
    refused(add(home, "x", image, *words), 2, said)
    assert not image.exists()


def test_an_image_where_it_cannot_be_made(home: Path, tmp_path: Path) -> None:
    image = tmp_path / "no" / "where.img"
    refused(add(home, "x", image, "--size", "1M"), 1, "cannot be created", "No such file")
    assert names(home) == []


def test_a_home_whose_sockets_would_have_too_long_a_path(tmp_path: Path, image: Path) -> None:
    home = tmp_path / ("h" * 100)
    refused(add(home, "x", image), 1, "socket", "shorter")
    assert files(home) == []


@pytest.mark.parametrize("verb", ["serve", "show", "remove"])
@pytest.mark.parametrize("name", ["absent", "../../etc/passwd", "UPPER"])
def test_a_disk_that_is_not_there(home: Path, image: Path, verb: str, name: str) -> None:
    assert add(home, "vm1", image).returncode == 0
    refused(blockrepl(home, "disk", verb, name), 1, "there is no disk", "disk list")


def test_a_home_that_is_not_there(home: Path) -> None:
    refused(blockrepl(home, "disk", "list"), 1, "no blockrepl home")
    failed = blockrepl(home, "disk", "list", "--json")
    assert failed.returncode == 1
    assert json.loads(failed.stdout).keys() == {"error", "code", "hint"}
    assert not home.exists()


def test_a_damaged_entry(home: Path, image: Path) -> None:
    assert add(home, "vm1", image).returncode == 0
    entry = home / "source" / "disks" / "vm1.json"
    entry.write_text(entry.read_text().replace('"size_bytes"', '"size"'))
    refused(blockrepl(home, "disk", "serve", "vm1"), 1, "does not parse")


def test_a_disk_that_is_served_cannot_be_removed(place: Pair) -> None:
    disk = Disk(place)
    disk.start()
    refused(blockrepl(place.source_home, "disk", "remove", "d1"), 1, "in use")
    assert disk.is_alive()
    assert names(place.source_home) == ["d1"]
    disk.stop()
    assert blockrepl(place.source_home, "disk", "remove", "d1").returncode == 0
    assert not disk.ring.exists()
    assert disk.image.exists()


def test_a_map_that_cannot_be_trusted_makes_everything_hot(place: Pair) -> None:
    disk = Disk(place)
    disk.make_cold()
    assert disk.hot_regions() == []
    disk.hot_map.write_bytes(disk.hot_map.read_bytes()[:-1])
    disk.start()
    assert disk.hot_regions() == list(range(8))
    assert disk.reader().stale.all()


def test_show_prints_what_guests_need(home: Path, image: Path) -> None:
    assert add(home, "vm1", image).returncode == 0
    socket = str(home / "run" / "disk-vm1.sock")
    qemu = shlex.split(blockrepl(home, "disk", "show", "vm1", "--qemu").stdout)
    assert qemu[0] == "-blockdev"
    assert f"server.path={socket}" in qemu[1]
    assert "reconnect-delay=" in qemu[1]
    libvirt = ElementTree.fromstring(blockrepl(home, "disk", "show", "vm1", "--libvirt").stdout)
    host = libvirt.find("source/host")
    assert host is not None
    assert host.get("socket") == socket
    uri = blockrepl(home, "disk", "show", "vm1", "--uri").stdout.strip()
    assert uri == f"nbd+unix:///?socket={socket}"
    table = blockrepl(home, "disk", "show", "vm1").stdout.splitlines()
    facts = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in table if " " in line}
    assert (facts["size"], facts["ring"], facts["serving"]) == ("1 MiB", "64 MiB", "no")


@pytest.mark.parametrize(
    "forms", [("--json", "--uri"), ("--qemu", "--libvirt"), ("--uri", "--qemu")]
)
def test_show_has_one_form_at_a_time(home: Path, image: Path, forms: tuple[str, str]) -> None:
    assert add(home, "vm1", image).returncode == 0
    refused(blockrepl(home, "disk", "show", "vm1", *forms), 2, "one of them")


def test_the_ring_has_limits_in_the_help(home: Path) -> None:
    told = " ".join(blockrepl(home, "disk", "add", "--help").stdout.split())
    assert "[default: 64M; 16M to 16G]" in told
