"""verify, status and disk resync with the real services: what was changed behind the product's back
on either side is found exactly, told, and healed, while a guest writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import pytest
from oracle.nbd_client import Client
from oracle.writers import Pace, load, run_while
from rich.console import Console
from serving import Disk, blockrepl, place, wait_for

from blockrepl import limits
from blockrepl.cli import verify as cli_verify
from blockrepl.cli.checkpoint import receiver_client
from blockrepl.errors import StateError
from blockrepl.services.control_client import ControlClient
from blockrepl.storage.home import Home
from blockrepl.units import MIB
from scripts.guest.pair import Pair

__all__ = ["place"]

BLOCK = limits.COMPARE_BLOCK_BYTES
SIZE = 16 * MIB
IN_JOURNAL = 13 * MIB + 2 * BLOCK


def started(place: Pair, content: bytes) -> Disk:
    """A pair that replicates a disk with content."""
    image = place.directory / "d1.img"
    image.write_bytes(content)
    disk = Disk(place, image=image)
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    place.join()
    place.start_agent()
    place.wait_replicating("g")
    return disk


def flip(path: Path, *offsets: int) -> None:
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 0xFF]))


def base(place: Pair) -> Path:
    return Home(place.receiver_home).replica_directory("g") / "base" / "d1.img"


def in_journal(place: Pair, needle: bytes) -> tuple[Path, int]:
    """Where a piece of a record's payload lies."""
    for path in (Home(place.receiver_home).replica_directory("g") / "segments").glob("*.seg"):
        if (at := path.read_bytes().find(needle)) >= 0:
            return path, at
    raise AssertionError("not in the journal")


def verify(home: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and what it says of the one disk."""
    done = blockrepl(home, "verify", "g", "--json", *options)
    assert done.returncode in (0, 1), done.stderr
    (disk,) = json.loads(done.stdout)
    return done.returncode, disk


def latest(place: Pair) -> bytes:
    """The replica's content now."""
    place.wait_durable("g")
    out = place.directory / "latest.img"
    place.receiver("export", "g", "d1", out, "--at", "latest", "--force", quiet=True)
    return out.read_bytes()


def test_what_was_changed_behind_our_back_is_found_exactly_and_healed(place: Pair) -> None:
    disk = started(place, os.urandom(SIZE))
    disk.start()
    written = os.urandom(BLOCK)
    with Client(disk.socket) as client:
        client.write(IN_JOURNAL, written)
    place.wait_durable("g")
    # The guest writes into the first half; what is flipped lies in the other.
    in_source = [9 * MIB, 10 * MIB + 5 * BLOCK]
    in_base = [12 * MIB + 3 * BLOCK + 7, 15 * MIB + 15 * BLOCK]
    with load(disk.socket, SIZE // 2, seed=1, writers=2, pace=Pace(0.1)) as running:
        status, proven = verify(place.source_home, "--now")
        assert (status, proven["mismatches"], proven["found"]) == (0, 0, [])
        flip(disk.image, *in_source)
        flip(base(place), *in_base)
        segment, at = in_journal(place, written[1000:1100])
        flip(segment, at)
        status, proven = verify(place.receiver_home, "--now")
        assert status == 0  # found, and healed before the pass ended
        run_while(running, lambda: False)
    wanted = sorted(one - one % BLOCK for one in [*in_source, *in_base, IN_JOURNAL])
    assert [one["start"] for one in proven["found"]] == wanted
    assert {one["length"] for one in proven["found"]} == {BLOCK}
    assert place.scrub_finds("g") == proven["found"]
    for one in proven["found"]:
        assert one["proven_ns"] < one["at_ns"] <= one["healed_ns"]
    disk.stop()
    assert latest(place) == disk.content()
    told = place.receiver("verify", "g", quiet=True)
    assert f"disk d1: bytes {wanted[0]} to {wanted[0] + BLOCK - 1} differed at " in told


def test_what_differs_is_told_to_people_side_by_side_and_not_for_pages() -> None:
    def found(block: int, at_ns: int = 5) -> dict[str, Any]:
        times = {"at": str(at_ns), "at_ns": at_ns, "proven_ns": 3, "healed_ns": None}
        return {"start": block * BLOCK, "length": BLOCK, **times}

    lines = [found(7), found(4), found(5), found(8, at_ns=6), found(9, at_ns=6)]
    merged = [(one["start"] // BLOCK, one["length"] // BLOCK) for one in cli_verify._merged(lines)]
    assert merged == [(4, 2), (7, 1), (8, 2)]
    disk = {
        "disk": "d1",
        "size_bytes": SIZE,
        "covered_bytes": 0,
        "age_seconds": None,
        "scrub": None,
    }
    disk |= {"mismatches": 99, "found": [found(2 * number) for number in range(99)]}
    console = Console(width=200)
    with console.capture() as said:
        console.print(cli_verify._render([disk]))
    assert said.get().count("differed at") == cli_verify.FOUND_SHOWN
    assert f"disk d1: and {99 - cli_verify.FOUND_SHOWN} more; see --json" in said.get()


class _Told:
    """Answers with what a service says, look by look."""

    def __init__(self, asked: list[dict[str, Any]], *looks: list[dict[str, Any]]) -> None:
        self.asked = asked
        self.looks = list(looks)

    def post(self, _path: str) -> list[dict[str, Any]]:
        return self.asked

    def get(self, path: str) -> Any:
        if path == "/status":
            return {"groups": []}
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


def told(
    disk: str, started: int | None, ended: int | None = None, *, is_asked_for: bool = True
) -> dict[str, Any]:
    scrub = {"started_ns": started, "ended_ns": ended, "is_asked_for": is_asked_for}
    said = {**scrub, "progress": float(ended is not None)} if started else None
    return {"disk": disk, "size_bytes": MIB, "scrub": said}


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param(
            [[told("a", 5, 6), told("b", 5)], [told("a", 8, is_asked_for=False), told("b", 5, 9)]],
            id="the next pass of a small disk has begun",
        ),
        pytest.param(
            [
                [told("a", 5), told("b", None)],
                [told("a", 7, 8, is_asked_for=False), told("b", 5, 9)],
            ],
            id="an agent was started anew, and its receiver too",
        ),
        pytest.param(
            [[told("a", 5, 6), told("b", 5, 6), told("c", 2)]],
            id="another source's disk was not asked",
        ),
    ],
)
def test_a_pass_is_over_when_each_disk_that_was_asked_has_ended_one(
    looks: list[list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards `over`, `before` and _is_new in _pass_now: it waited for ever.
    monkeypatch.setattr(cli_verify, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(cli_verify, "PATIENCE_SECONDS", 0.5)
    client = _Told([told("a", 1, 2), told("b", None)], [told("a", 1, 2), told("b", None)], *looks)
    assert cli_verify._pass_now(cast(ControlClient, client), "/verify/g", "g") == looks[-1]


def test_a_pass_of_a_source_that_does_not_answer_is_not_waited_for(
    place: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards PATIENCE_SECONDS in _pass_now: it would wait for as long as the source is away.
    started(place, os.urandom(MIB))
    monkeypatch.setattr(cli_verify, "PATIENCE_SECONDS", 1.0)
    agent = place.services["agent"].process
    agent.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(StateError, match="has not got on for 1 s"):
            cli_verify._pass_now(receiver_client(place.receiver_home), "/verify/g", "g")
    finally:
        agent.send_signal(signal.SIGCONT)


def test_who_waits_for_a_group_that_is_refused_is_told_why(place: Pair) -> None:
    # Guards the order in agent_api: "group g is not attached" told nothing.
    disk = started(place, os.urandom(MIB))
    place.source("disk", "remove", "d1", quiet=True)
    wait_for(lambda: not place.group("g")["disks"], "the disk is retired")
    shutil.rmtree(place.source_home / "source" / "retired")  # as a version of before left it
    Disk(place, image=disk.image)
    wait_for(lambda: place.group("g")["state"] == "error", "the group is refused")
    wait_for(lambda: "history unknown until that is" in place.source("status", quiet=True), "there")
    for home, words in [
        (place.source_home, ("checkpoint", "create", "g", "now")),
        (place.source_home, ("verify", "g", "--now")),
        (place.receiver_home, ("verify", "g", "--now")),
        (place.source_home, ("disk", "resync", "d1", "--wait")),
    ]:
        done = blockrepl(home, *words)
        assert done.returncode == 1, words
        assert "another disk named d1" in done.stderr, words


def test_a_resync_sends_what_differs_and_survives_a_killed_agent_and_a_full_one_sends_all(
    place: Pair,
) -> None:
    disk = started(place, os.urandom(SIZE))
    before = place.group("g")["latest_ns"]
    flip(base(place), *range(0, SIZE, MIB))
    place.kill("receiver")  # the resync waits for it
    place.source("disk", "resync", "d1", quiet=True)
    assert disk.disks.load("d1").stale_ring
    place.kill("agent")
    place.start_receiver()
    place.start_agent()
    place.source("disk", "resync", "d1", "--wait", quiet=True)
    assert latest(place) == disk.content()
    (gap, *_) = place.group("g")["gaps"]
    assert before < gap["from_ns"] < gap["to_ns"]
    place.receiver("point", "g", str(place.group("g")["floor"]), quiet=True)  # still reachable
    # Guards ``state != "empty"`` in SourceDisk.must_compare: the base was blank once.
    (group,) = place.source_json("status")["groups"]
    assert group["sent_bytes"] < 2 * (SIZE // MIB) * BLOCK * 1.2

    told = place.source("disk", "resync", "d1", "--full", "--wait", quiet=True)
    assert "all of it is sent" in told
    (after,) = place.source_json("status")["groups"]
    assert after["sent_bytes"] - group["sent_bytes"] > SIZE
    wait_for(lambda: not disk.disks.load("d1").send_all, "the next resync asks again")
