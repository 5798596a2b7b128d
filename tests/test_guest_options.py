"""What `disk show` prints, given to the programs it is for: QEMU, libnbd, libvirt's schema."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl import limits
from blockrepl.services import guest_options
from blockrepl.units import MIB

LONG = "postgres-production-cluster-data-"
NAMES = st.one_of(
    st.from_regex(re.compile(limits.NAME_PATTERN), fullmatch=True),
    st.integers(0, 99).map(lambda number: f"{LONG}{number}"),
)


@contextmanager
def server(socket: Path) -> Iterator[None]:
    process = subprocess.Popen(
        ["nbdkit", "--foreground", f"--unix={socket}", "memory", "8M"], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait()


def qemu(options: str, *commands: dict[str, Any]) -> list[Any]:
    """Start QEMU with the options as a shell reads them, without a guest running; its answers."""
    asked = [{"execute": "qmp_capabilities"}, *commands, {"execute": "quit"}]
    done = subprocess.run(
        "exec qemu-system-x86_64 -machine pc,accel=tcg -nodefaults -display none -S -qmp stdio "
        + options,
        shell=True,
        input="\n".join(map(json.dumps, asked)),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert not any("error" in answer for answer in answers), answers
    return [answer["return"] for answer in answers if "return" in answer][1:-1]


@pytest.mark.parametrize("directory", ["plain", "with space, comma and 'quote$(x)"])
def test_qemu_takes_the_options_as_a_shell_reads_them(tmp_path: Path, directory: str) -> None:
    socket = tmp_path / directory / "disk.sock"
    socket.parent.mkdir()
    with server(socket):
        options = guest_options.qemu("web.root_1", socket)
        assert "\n" not in options
        blocks, nodes = qemu(
            options, {"execute": "query-block"}, {"execute": "query-named-block-nodes"}
        )
    (block,) = blocks
    assert "virtio-backend" in block["qdev"]
    image = block["inserted"]["image"]
    assert image["virtual-size"] == 8 * MIB
    (node,) = [n for n in nodes if n["drv"] == "nbd"]
    assert node["detect_zeroes"] == "unmap"
    assert not node["ro"]


def test_a_restart_of_the_server_is_a_pause_for_qemu() -> None:
    options = guest_options.qemu("root", Path("/run/x.sock"))
    assert f"reconnect-delay={guest_options.RECONNECT_SECONDS}" in options
    assert guest_options.RECONNECT_SECONDS >= 600


def test_disks_with_long_names_live_in_one_guest(tmp_path: Path) -> None:
    names = [LONG + "1", LONG + "2", "a.b", "a-b", "0", "x" * 63]
    socket = tmp_path / "s"
    with server(socket):
        options = " ".join(guest_options.qemu(name, socket) for name in names)
        (blocks,) = qemu(options, {"execute": "query-block"})
    assert len(blocks) == len(names)


@given(st.lists(NAMES, min_size=2, max_size=8, unique=True))
def test_node_names_keep_to_qemus_rules_and_differ(names: list[str]) -> None:
    found = []
    for name in names:
        options = guest_options.qemu(name, Path("/s"))
        node = re.search(r"node-name=([^, ]+)", options)
        assert node is not None
        assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9._-]{0,30}", node[1])
        assert options.endswith(f"drive={node[1]}")
        found.append(node[1])
    assert len(set(found)) == len(names)


@pytest.mark.parametrize("directory", ["plain", "a b&c=d?e#f%20'ü"])
def test_the_uri_leads_to_the_server(tmp_path: Path, directory: str) -> None:
    socket = tmp_path / directory / "disk.sock"
    socket.parent.mkdir()
    with server(socket):
        done = subprocess.run(
            ["nbdinfo", "--size", guest_options.uri(socket)],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    assert int(done.stdout) == 8 * MIB


# --- libvirt


@pytest.mark.parametrize("directory", ["/run", "/a b<c>&'d\"e"])
def test_the_xml_says_where_the_server_is(directory: str) -> None:
    disk = ET.fromstring(guest_options.libvirt("web.root", Path(directory) / "disk.sock"))
    assert (disk.tag, disk.get("type"), disk.get("device")) == ("disk", "network", "disk")
    source = disk.find("source")
    assert source is not None
    assert source.get("protocol") == "nbd"
    host, reconnect = source.find("host"), source.find("reconnect")
    assert host is not None
    assert reconnect is not None
    assert (host.get("transport"), host.get("socket")) == ("unix", f"{directory}/disk.sock")
    assert reconnect.get("delay") == str(guest_options.RECONNECT_SECONDS)
    driver = disk.find("driver")
    assert driver is not None
    assert (driver.get("type"), driver.get("discard")) == ("raw", "unmap")


@given(st.lists(NAMES, min_size=2, max_size=8, unique=True))
def test_serials_fit_a_virtio_disk_and_differ(names: list[str]) -> None:
    serials = set()
    for name in names:
        serial = ET.fromstring(guest_options.libvirt(name, Path("/s"))).findtext("serial")
        assert serial is not None
        assert re.fullmatch(r"[A-Za-z0-9_.+ -]{1,20}", serial)
        serials.add(serial)
    assert len(serials) == len(names)


@pytest.mark.skipif(
    shutil.which("virt-xml-validate") is None or shutil.which("xmllint") is None,
    reason="needs Debian's libvirt-clients and libxml2-utils",
)
def test_libvirts_own_schema_accepts_the_xml(tmp_path: Path) -> None:
    disk = ET.fromstring(guest_options.libvirt("web.root", tmp_path / "a & b" / "disk.sock"))
    printed = subprocess.run(["virsh", "--version"], capture_output=True, text=True, check=True)
    if tuple(map(int, printed.stdout.split(".")[:2])) < (9, 1):
        # Debian 12's libvirt 9.0 has no reconnect delay yet: it passes the element over.
        source = disk.find("source")
        assert source is not None
        source[:] = [child for child in source if child.tag != "reconnect"]
    domain = ET.fromstring(
        "<domain type='kvm'><name>a</name><memory>1024</memory>"
        "<os><type>hvm</type></os><devices/></domain>"
    )
    domain.find("devices").append(disk)  # type: ignore[union-attr]
    path = tmp_path / "domain.xml"
    ET.ElementTree(domain).write(path)
    done = subprocess.run(
        ["virt-xml-validate", str(path), "domain"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stdout + done.stderr
