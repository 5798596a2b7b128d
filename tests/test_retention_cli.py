"""``blockrepl retention`` with real services."""

from __future__ import annotations

import json
from pathlib import Path

from serving import Disk, as_root, blockrepl, place, tool, wait_for
from test_verify_cli import latest

from blockrepl.units import MIB, format_instant
from scripts.guest.pair import Pair

__all__ = ["place"]

pytestmark = as_root
SHORT = ("--ladder", "all:2s,1s:4s")


def refusal(home: Path, point: str) -> dict[str, object]:
    done = blockrepl(home, "point", "g", point, "--json")
    assert done.returncode == 1
    found: dict[str, object] = json.loads(done.stdout)
    return found


def assert_planned(place: Pair, first: int) -> None:
    """What another ladder would let go of is told, and it is not set. Guards Receiver.retention."""
    planned = place.receiver_json("retention", "plan", "g", *SHORT, "--max-size=1G")
    policy = planned["policy"]
    assert (policy["ladder"], policy["size_bytes"]) == (SHORT[1], 1 << 30)
    [goes_soon] = planned["upcoming"]
    assert (goes_soon["what"], goes_soon["from_ns"]) == ("fold", first)
    assert goes_soon["held_by"] == ["checkpoint stays"]
    now = place.receiver_json("retention", "plan", "g")
    assert now["policy"]["ladder"] == "all:1d,1m:1w,1h:90d"
    # A minute that ends meanwhile is to be thinned in a day.
    assert [step for step in now["upcoming"] if step["what"] == "fold"] == []
    bad = blockrepl(place.receiver_home, "retention", "plan", "g", "--ladder", "all:1d,1h:12h")
    assert (bad.returncode, bad.stdout) == (2, "")


def test_history_is_shortened_as_it_was_set_and_what_is_gone_is_refused(place: Pair) -> None:
    # Guards write_policy in Receiver.set_retention, the kept checkpoints in retention._decide,
    # raise_floor and thin_to in Replica.shorten, and the ages of rungs in parse_ladder.
    disk = Disk(place, size_bytes=8 * MIB)
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    place.join()
    place.start_agent()
    disk.start()
    place.wait_replicating("g")
    tool("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", disk.uri)
    place.wait_durable("g")
    first = place.group("g")["floor_ns"]
    home = place.receiver_home

    shown = place.receiver_json("retention", "show", "g")
    assert shown["policy"]["ladder"] == "all:1d,1m:1w,1h:90d"
    bad = blockrepl(home, "retention", "set", "g", "--ladder", "all:1d,1h:12h")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "ends no later than" in bad.stderr
    assert len(bad.stderr.splitlines()) == 1
    assert blockrepl(home, "retention", "show", "nobody").returncode == 1

    place.receiver("checkpoint", "create", "g", "stays", quiet=True)
    refused = blockrepl(place.source_home, "checkpoint", "keep", "g", "stays")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "on the receiver's host only" in refused.stderr
    place.receiver("checkpoint", "keep", "g", "stays", quiet=True)
    stays = place.receiver_json("checkpoint", "list", "g")[0]["at_ns"]
    place.receiver("checkpoint", "create", "g", "goes", quiet=True)
    goes = place.receiver_json("checkpoint", "list", "g")[-1]["at_ns"]
    wait_for(lambda: place.group("g")["latest_ns"] > goes + 6 * 10**9, "history of some length")
    assert_planned(place, first)
    ladder = ("retention", "set", "g", *SHORT)
    bad = blockrepl(home, *ladder)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert f"there now: from {format_instant(first)} to " in bad.stderr
    assert "; the checkpoint goes goes too. add --shorten" in bad.stderr
    assert len(bad.stderr.splitlines()) == 1
    assert place.receiver_json("retention", "show", "g")["policy"] == shown["policy"]
    place.receiver_json("retention", "set", "g", "--ladder", "all:2d,1m:1w,1h:90d")  # more is kept
    place.receiver_json(*ladder, "--shorten")

    def is_thinned() -> bool:
        ran = place.receiver_json("retention", "run", "g")
        return ran["floor_ns"] == stays and len(ran["stretches"]) > 1

    wait_for(is_thinned, "the history is thinned")
    ran = place.receiver_json("retention", "show", "g")
    assert first < stays
    assert [pin["what"] for pin in ran["pins"]] == ["checkpoint stays"]
    assert "before the floor" in str(refusal(home, format_instant(first))["error"])
    thinned = refusal(home, format_instant(ran["stretches"][0]["to_ns"] - 1))
    assert "thinned by retention" in str(thinned["error"])
    assert thinned["nearest_after_ns"] == ran["stretches"][0]["to_ns"]
    assert place.receiver_json("point", "g", "tag:stays")["at_ns"] == stays
    assert "checkpoint stays" in place.receiver("retention", "plan", "g", quiet=True)
    assert latest(place) == disk.image.read_bytes()
