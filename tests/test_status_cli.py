"""blockrepl status, as its reader sees it: what is served, what history there is, its gaps."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from oracle.nbd_client import Client
from rich.console import Console
from serving import Disk, place, wait_for

from blockrepl.cli import status
from blockrepl.cli.output import print_rich
from blockrepl.units import MIB
from scripts.guest.pair import Pair

__all__ = ["place"]


def served(place: Pair) -> str:
    """The cell below the header ``served``."""
    lines = place.source("status", quiet=True).splitlines()
    header = next(line for line in lines if "served" in line)
    row = next(line for line in lines if line.startswith("  d1"))
    return row[header.index("served") :].split()[0]


def test_each_side_says_what_it_knows_of_the_history(place: Pair) -> None:
    disk = Disk(place)
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    place.join()
    place.start_agent()
    place.wait_replicating("g")
    assert served(place) == "no"
    disk.start()
    assert served(place) == "yes"
    floor = place.group("g")["floor"]
    assert f"history {floor} to " in place.source("status", quiet=True)

    disk.stop()
    place.source("disk", "remove", "d1", quiet=True)
    wait_for(lambda: not place.group("g")["disks"], "the disk is retired")
    assert f"history {floor} to " in place.receiver("status", quiet=True)
    Disk(place, "d2")
    wait_for(
        lambda: [one["name"] for one in place.group("g")["disks"]] == ["d2"], "the other's turn"
    )
    assert f"history {floor} to " in place.receiver("status", quiet=True)

    place.stop("receiver")
    assert f"history {floor} to " in place.receiver("status", quiet=True)
    wait_for(lambda: not place.source_json("status")["connected"], "the source notices")
    told = place.source("status", quiet=True)
    assert "history unknown while disconnected" in told
    assert "none yet" not in told


def group(**changes: Any) -> dict[str, Any]:
    plain = {
        "name": "g",
        "state": "replicating",
        "lag_seconds": 0.1,
        "floor": None,
        "floor_ns": None,
        "latest": None,
        "latest_ns": None,
        "gaps": [],
        "journal_bytes": 0,
        "disks": [],
    }
    return plain | changes


def shown(capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    print_rich(status._render({"role": "receiver", "name": "vault", "groups": [group(**changes)]}))
    return capsys.readouterr().out


def test_a_gap_is_told_by_its_instants(capsys: pytest.CaptureFixture[str]) -> None:
    first, last = 1_250_000_000, 2_000_000_000
    closed = shown(capsys, gaps=[{"disk": "d1", "from_ns": first, "to_ns": last}])
    assert "gap from 1970-01-01T00:00:01.250000000Z to 1970-01-01T00:00:02." in closed
    assert "gap since 1970-01-01T00:00:01.250000000Z" in shown(
        capsys, gaps=[{"disk": "d1", "from_ns": first, "to_ns": None}]
    )


def test_before_the_first_sync_there_is_no_history(capsys: pytest.CaptureFixture[str]) -> None:
    assert "history none yet: the first sync is not done" in shown(capsys)


def test_a_source_that_was_refused_does_not_say_that_nobody_answers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused = {"state": "error", "journal_bytes": None}
    told = shown(capsys, **refused, problem="no room left")
    assert "no room left\n  history unknown until that is solved" in told
    assert "history unknown: the receiver does not answer" in shown(capsys, **refused)


def test_a_spool_is_told_with_when_it_is_drained(capsys: pytest.CaptureFixture[str]) -> None:
    spool = {"waiting_bytes": 3 << 20, "limit_bytes": 10 << 30, "drain_seconds": 90.0}
    told = shown(capsys, spool=spool)
    assert "spool 3 MiB of 10 GiB, drained in about 1 m 30 s" in told
    assert "not getting less" in shown(capsys, spool=spool | {"drain_seconds": None})
    assert "spool" not in shown(capsys, spool=spool | {"waiting_bytes": 0})


def test_a_disk_says_what_is_proven_and_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    scrub = {"ended_ns": None, "progress": 0.25, "skipped_regions": 2, "bytes_per_second": 5 << 20}
    disk = {"name": "d1", "size_bytes": 1 << 30, "state": "replicating", "mismatches": 3}
    assert "3 MISMATCHES, 25% at up to 5 MiB/s, 2 MiB busy" in shown(
        capsys, disks=[disk | {"verified_ns": None, "scrub": scrub}]
    )
    proven = disk | {"mismatches": 0, "verified_ns": time.time_ns() - 7200 * 10**9}
    assert "2 h ago" in shown(capsys, disks=[proven | {"scrub": scrub | {"ended_ns": 1}}])


@pytest.mark.parametrize(
    ("width", "headers"),
    [
        (120, "disk size state hot sync verified served"),
        (70, "disk size state sync served"),
        (40, "disk size state"),
        (30, "disk state"),
    ],
)
def test_on_a_narrow_terminal_the_least_columns_go_and_no_name_is_torn(
    width: int, headers: str
) -> None:
    # Guards FittingTable: at 40 columns the headers read "di/sk" and the states "rep/lic/ati/ng".
    disk = {
        "name": "database",
        "size_bytes": 1536 * MIB,
        "state": "initial-sync",
        "hot_bytes": 64 * MIB,
        "synced_bytes": 700 * MIB,
        "verified_ns": None,
        "serving": True,
    }
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(status._disks([disk], "source"))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].split() == headers.split()
    assert len(lines) == 3
    assert lines[2].startswith("  database")
    assert ("1.5 GiB" in lines[2]) == ("size" in headers)
    assert " initial-sync " in f"{lines[2]} "


def test_what_is_promised_and_held_and_pinned_and_the_room_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outlook = {
        "level": "ok",
        "reason": "",
        "promised_seconds": 86400.0,
        "held_seconds": 7200.0,
        "pins": [{"what": f"pin {n}", "first_ns": n, "last_ns": n} for n in range(5)],
        "pin_count": 5,
        "free_bytes": 20 << 30,
        "bytes_per_day": 4 << 30,
        "days_left": 5.0,
        "promise_days_left": 5.0,
    }
    told = shown(capsys, retention=outlook)
    assert "promised 1 d, held 2 h, pinned by pin 0, pin 1, pin 2 and 2 more" in told
    assert "room 20 GiB free: 5.0 days at today's rate" in told
    assert "WARNING" not in told
    late = outlook | {"level": "warning", "reason": "too little", "pins": [], "days_left": None}
    told = shown(capsys, retention=late)
    assert "  promised 1 d, held 2 h\n" in told
    assert "  room 20 GiB free\n" in told
    assert "WARNING: too little" in told


def test_an_image_that_was_cut_short_is_named_in_status_and_log(place: Pair) -> None:
    # Guards cut_short: status said replicating, and the agent nothing.
    disk = Disk(place)
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    place.join()
    disk.start()
    place.start_agent()
    place.wait_replicating("g")
    os.truncate(disk.image, MIB)
    what = f"image {disk.image} has {MIB} bytes, not {disk.size_bytes}"
    (group,) = place.source_json("status")["groups"]
    assert (group["state"], group["disks"][0]["state"]) == ("error", "error")
    assert what in group["disks"][0]["problem"]
    log = place.services["agent"].log
    wait_for(lambda: what in log.read_text(), "the log says it")
    os.truncate(disk.image, disk.size_bytes)
    (group,) = place.source_json("status")["groups"]
    assert group["disks"][0]["problem"] is None
    assert log.read_text().count(what) == 1


def test_status_says_before_the_promise_cannot_be_kept(place: Pair) -> None:
    # Guards describe_retention in facts_of and in status_at_rest.
    disk = Disk(place)
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    place.join()
    place.start_agent()
    disk.start()
    place.wait_replicating("g")
    with Client(disk.socket) as client:
        for turn in range(16):
            client.write(turn % 8 * MIB, os.urandom(MIB))
    place.wait_durable("g")
    place.receiver("checkpoint", "create", "g", "stays", "--keep", quiet=True)
    place.receiver("retention", "set", "g", "--promise", "1h", "--max-size", "1G", quiet=True)
    found = place.group("g")["retention"]
    assert found["promised_seconds"] == 3600.0
    assert found["held_seconds"] >= 0
    assert [pin["what"] for pin in found["pins"]] == ["checkpoint stays"]
    assert found["bytes_per_day"] >= 24 * 16 * MIB  # an hour's, at the least, times 24
    assert found["level"] == "ok" or found["days_left"] < 7  # of this machine
    place.receiver("retention", "set", "g", "--promise", "1h", "--max-size", "8M", quiet=True)
    found = place.group("g")["retention"]
    assert found["level"] == "error"
    assert "that is promised takes" in found["reason"]
    told = place.receiver("status", quiet=True)
    assert "promised 1 h" in told
    assert "pinned by checkpoint stays" in told
    assert "ERROR: at today's rate" in told
    place.stop("receiver")
    assert place.group("g")["retention"]["level"] == "error"
