"""The agent and its sessions: when it comes back, when it may not, and how fast it may send."""

from __future__ import annotations

import errno
import json
import os
import shutil
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from uuid import uuid4

import pytest
import trio
from pumping import Source, StalledWrite, until
from serving import Disk, blockrepl, place, wait_for
from trio.testing import MockClock

from blockrepl import limits
from blockrepl.channel.certificates import Authority, key_to_pem, make_key_and_request
from blockrepl.channel.enrolment import CA, CERTIFICATE, KEY, RECEIVER, Identity
from blockrepl.channel.framing import MessageStream
from blockrepl.errors import BlockreplError, PeerError, StateError, TrustError
from blockrepl.model.backoff import FIRST_SECONDS, LAST_SECONDS
from blockrepl.services import agent as agent_module
from blockrepl.services.agent import FENCED_SECONDS, Agent
from blockrepl.services.agent_api import _take_checkpoint, _WantedCheckpoint
from blockrepl.services.agent_session import AgentSession
from blockrepl.services.group_replication import GroupReplication
from blockrepl.storage import clock
from blockrepl.storage.clock import LEASE_NS
from blockrepl.storage.group_notes import GroupNote, write_note
from blockrepl.storage.home import Home
from blockrepl.storage.source import SourceDisks
from blockrepl.units import MIB
from scripts.guest.pair import COMMAND, Pair

__all__ = ["place"]
IMPATIENT_AGENT = """
from blockrepl.services import agent
agent.FENCED_SECONDS = 0.3
from blockrepl.cli.main import main
main()
"""


def joined_home(directory: Path) -> Home:
    home = Home.create(directory / "home")
    identity = home.source_directory / "identity"
    identity.mkdir(parents=True)
    authority = Authority.create(directory / "authority")
    key, request = make_key_and_request()
    (identity / KEY).write_text(key_to_pem(key))
    (identity / CERTIFICATE).write_text(authority.sign(request, "web1", str(uuid4()))[0])
    (identity / RECEIVER).write_text(json.dumps({"address": "vault:7420"}))
    return home


async def tries(agent_home: Home, error: BlockreplError, seconds: float) -> list[float]:
    """When an agent tries to connect that always fails like this."""
    times: list[float] = []

    async def connect() -> MessageStream:
        times.append(trio.current_time())
        raise error

    with trio.move_on_after(seconds):
        await Agent(agent_home, connect=connect).run()
    return times


async def test_a_receiver_that_is_away_is_tried_again_with_back_off_and_jitter(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    # Guards the wait in Agent._keep_session, and its random share.
    home = joined_home(tmp_path)
    gaps = []
    for _ in range(3):
        times = await tries(home, PeerError("no answer", code="unreachable"), 60)
        gaps.append([after - before for before, after in pairwise(times)])
    for mine in gaps:
        for turn, gap in enumerate(mine):
            whole = min(FIRST_SECONDS * 2**turn, LAST_SECONDS)
            assert whole / 2 <= gap <= whole + 0.001
    assert len({round(mine[8], 6) for mine in gaps}) == 3


async def test_an_agent_that_is_fenced_leaves_the_receiver_in_peace(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    # Guards FENCED_SECONDS in Agent._keep_session, and that it logs an error that stays once.
    error = TrustError("another agent has started", hint="stop one of the two", code="fenced")
    times = await tries(joined_home(tmp_path), error, 10 * FENCED_SECONDS)
    assert len(times) <= 10
    told = [line for line in caplog.messages if "another agent" in line]
    assert told == ["no session with vault:7420: another agent has started. stop one of the two"]


async def test_an_identity_that_cannot_be_read_now_is_tried_again_and_opens_no_connection(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the order in Agent._connect_receiver: with no descriptor left, the agent ended.
    opened, looked = [], []

    async def open_transport(address: str) -> trio.SocketStream:
        opened.append(address)
        raise PeerError("no answer", code="unreachable")

    def no_descriptor(*_: object) -> ssl.SSLContext:
        looked.append(trio.current_time())
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("blockrepl.services.agent.open_transport", open_transport)
    home = joined_home(tmp_path)
    (home.source_directory / "identity" / CA).touch()
    agent = Agent(home)
    monkeypatch.setattr("blockrepl.channel.enrolment.client_context", no_descriptor)
    with trio.move_on_after(10):
        await agent.run()
    assert len(looked) > 1
    assert opened == []
    assert agent.problem is not None
    assert "Too many open files" in str(agent.problem)


async def test_a_disk_whose_entry_cannot_be_read_is_not_taken_out_of_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Guards "lacking" in Agent._follow_groups: the receiver retired the disk, and when its entry
    # was restored, points of the other disks were gone, too.
    monkeypatch.setattr(agent_module, "CONFIGURATION_SECONDS", 0.01)
    home = joined_home(tmp_path)
    disks = SourceDisks(home)
    sizes = {"create_bytes": MIB, "ring_bytes": limits.RING_BYTES_MIN}
    for name, group in (("root", "web"), ("data", "web"), ("post", "mail")):
        image = tmp_path / f"{name}.img"
        disks.add(name, image, group, **sizes)
    path = disks.directory / "data.json"
    whole = path.read_bytes()
    write_note(home, "web", GroupNote(replica=uuid4(), next_number=1, disks=("data", "root")))

    def disks_of(agent: Agent, group: str) -> list[str]:
        return [entry.name for entry in agent.groups[group].entries]

    @asynccontextmanager
    async def running() -> AsyncIterator[Agent]:
        async with trio.open_nursery() as nursery:
            agent = Agent(home, connect=trio.sleep_forever)
            nursery.start_soon(agent.run)
            await until(lambda: "mail" in agent.groups)
            yield agent
            nursery.cancel_scope.cancel()

    async with running() as agent:
        path.write_bytes(whole[:-10])
        (disks.directory / "post.json").unlink()
        await until(lambda: not disks_of(agent, "mail"))
        assert disks_of(agent, "web") == ["data", "root"]
        assert "until the entry of disk data can be read, or is removed, group web" in caplog.text
    disks.add("letters", tmp_path / "new.img", "mail", **sizes)
    async with running() as agent:
        assert disks_of(agent, "mail") == ["letters"]
        assert "web" not in agent.groups
        path.write_bytes(whole)
        await until(lambda: "web" in agent.groups)
        assert disks_of(agent, "web") == ["data", "root"]
        path.unlink()
        await until(lambda: disks_of(agent, "web") == ["root"])


async def test_whether_a_checkpoints_name_is_taken_is_asked_of_that_name_alone(
    tmp_path: Path,
) -> None:
    # Guards the name in agent_api._take_checkpoint: the list of all ends at the newest.
    asked = []

    class Session:
        async def request(self, verb: str, group: str, name: str | None = None) -> object:
            asked.append((verb, group, name))
            return [{"name": name}]

    agent = Agent(joined_home(tmp_path))
    disks = [SimpleNamespace(group="web")]
    agent.disks = cast(SourceDisks, SimpleNamespace(all=lambda: disks))
    agent.session = cast(AgentSession, Session())
    agent.groups["web"] = cast(GroupReplication, SimpleNamespace(error=None, errors={}, pump=1))
    with pytest.raises(StateError) as error:
        await _take_checkpoint(agent, "web", _WantedCheckpoint(name="monday"))
    assert error.value.code == "taken"
    assert asked == [("checkpoint-list", "web", "monday")]


def test_of_two_copies_of_a_home_the_one_started_last_replicates_and_the_other_says_so(
    place: Pair,
) -> None:
    # Guards the rule end to end, without turn-taking: ``raise fenced()`` in TrustStore.admit, and
    # that Agent._one_session says its instance again. And that a restarted agent comes in:
    # ``newest + 1`` in TrustStore.admit.
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    place.join()
    copy = place.directory / "copy"
    shutil.copytree(place.source_home, copy)

    def start(name: str, home: Path) -> None:
        words = ("-c", IMPATIENT_AGENT, "--home", str(home), "agent", "run")
        service = place.scratch.start(name, [sys.executable, *words])
        service.wait_ready(lambda: b"ready" in service.log.read_bytes())
        place.services[name] = service

    def problem(home: Path) -> str | None:
        status = json.loads(blockrepl(home, "status", "--role", "source", "--json").stdout)
        assert status["connected"] == (status["problem"] is None) or "yet" in status["problem"]
        found: str | None = status["problem"]
        return found

    def count(name: str, words: str) -> int:
        return (place.directory / f"{name}.log").read_text().count(words)

    def check_stays(name: str, home: Path) -> None:
        begun = count("receiver", "session begun")
        wait_for(lambda: count("receiver", "session begun") > begun + 3, "the other asks again")
        assert problem(home) is None
        assert count(name, "connected to") == 1

    start("agent", place.source_home)
    wait_for(lambda: problem(place.source_home) is None, "the first agent is connected")
    start("copied", copy)
    wait_for(lambda: "another agent" in (problem(place.source_home) or ""), "the older is refused")
    check_stays("copied", copy)
    assert "stop one of the two" in blockrepl(place.source_home, "status").stdout
    place.stop("agent")
    start("agent", place.source_home)
    wait_for(lambda: "another agent" in (problem(copy) or ""), "the restarted one comes in")
    check_stays("agent", place.source_home)


def test_a_limit_slows_data_down_and_status_says_so(place: Pair) -> None:
    # Guards the Shaper that Agent hands to its sessions.
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    place.join()
    image = place.directory / "d1.img"
    image.write_bytes(os.urandom(24 * MIB))
    place.scratch.start(
        "agent",
        [COMMAND, "--home", place.source_home, "agent", "run", "--limit", "0:00-24:00=64K/s"],
    )
    Disk(place, image=image)
    disks = place.source_json("disk", "list")
    place.start_disk(disks[0]["name"])

    def holding() -> bool:
        answer = blockrepl(place.source_home, "status", "--role", "source", "--json")
        if answer.returncode:
            return False
        limit = json.loads(answer.stdout)["limit"]
        assert (limit["bytes_per_second"], limit["until"]) == (64 * 1024, "00:00")
        return bool(limit["is_holding"])

    wait_for(holding, "the limit is felt")
    shown = blockrepl(place.source_home, "status").stdout
    assert "limited to 64 KiB/s until 00:00, data is waiting for it" in shown
    assert place.group("g")["state"] == "initial-sync"
    assert place.group("g")["disks"][0]["synced_bytes"] < 16 * MIB


async def test_the_clocks_lease_is_renewed_ahead_of_time_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards Agent._keep_clock: the lease would run out, and each pump wait for the disk then.
    source = Source(tmp_path)
    source.end_lease(left_ns=LEASE_NS // 2)
    write = StalledWrite()
    monkeypatch.setattr(clock, "write_atomically", write)
    identity = Identity("source", str(uuid4()), "1", "receiver", tmp_path)
    agent = Agent(
        source.disks.home, connect=trio.sleep_forever, clock=source.clock, identity=identity
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        await until(write.begun.is_set)
        assert source.clock.covers(source.clock.now())  # while the disk stalls
        write.goes_on.set()
        await until(lambda: not source.clock.is_due())
        nursery.cancel_scope.cancel()
    source.close()
