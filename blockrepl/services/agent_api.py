"""The agent's control API: status of the source, and checkpoints taken from it.

====================================  =================================================
request                               does
====================================  =================================================
GET /status                           the status document of role ``source``
GET /checkpoints/G                    the group's newest checkpoints, as the receiver lists them:
                                      CHECKPOINTS_TOLD_MAX at the most
POST /checkpoints/G                   ``{"name", "keep"}``: takes one, answers when it is durable
POST /checkpoints/G/NAME/remove       forgets one
GET /verify/G                         what the scrub has proven, per disk
POST /verify/G                        begins a pass of this source's disks; their proofs before it
POST /disks/NAME/resync               ``{"full"}``: compares all of a disk and sends what differs,
                                      or sends all of it
POST /disks/NAME/grow                 ``{"size_bytes"}``: takes the size that its image has got
====================================  =================================================
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import trio
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from blockrepl import limits
from blockrepl.errors import BlockreplError, StateError, UsageError, explain
from blockrepl.formats.marks import NameField
from blockrepl.model.bandwidth import format_minute
from blockrepl.services.agent import Agent
from blockrepl.services.agent_session import AgentSession
from blockrepl.services.control import control_application
from blockrepl.services.flush_doubts import failed_flush
from blockrepl.services.group_pump import WantedCheckpoint
from blockrepl.services.group_replication import GroupReplication
from blockrepl.services.image_watch import cut_short
from blockrepl.services.verification import PassStatus
from blockrepl.storage.source import DiskEntry
from blockrepl.units import NANOSECONDS_PER_SECOND, format_instant

CHECKPOINT_SECONDS = 30.0
LOOK_SECONDS = 0.1  # how often the group's error is looked at meanwhile


class _WantedCheckpoint(BaseModel):
    name: NameField
    keep: bool = False


class _WantedResync(BaseModel):
    full: bool = False


class _WantedSize(BaseModel):
    size_bytes: int


def agent_application(agent: Agent) -> Starlette:
    async def status(request: Request) -> JSONResponse:
        return JSONResponse(await _status(agent))

    async def checkpoints(request: Request) -> JSONResponse:
        group = request.path_params["group"]
        if request.method == "GET":
            session = _session(agent, group)
            return JSONResponse(await session.request("checkpoint-list", group))
        wanted = _WantedCheckpoint.model_validate_json(await request.body())
        return JSONResponse(await _take_checkpoint(agent, group, wanted))

    async def remove(request: Request) -> JSONResponse:
        group, name = request.path_params["group"], request.path_params["name"]
        if not re.fullmatch(limits.NAME_PATTERN, name):
            raise UsageError(f"{name!r} is not a checkpoint's name")
        session = _session(agent, group)
        return JSONResponse(await session.request("checkpoint-remove", group, name))

    async def verify(request: Request) -> JSONResponse:
        group = request.path_params["group"]
        session = _session(agent, group)
        replication = _replication(agent, group)
        if request.method == "POST" and (error := _error_of(replication)):
            raise error
        proofs = await session.verify(replication)
        if request.method == "POST":
            replication.scrub.begin_now()
            own = {disk.entry.name for disk in replication.disks}
            proofs = [proof for proof in proofs if proof["disk"] in own]
        return JSONResponse(proofs)

    async def resync(request: Request) -> JSONResponse:
        wanted = _WantedResync.model_validate_json(await request.body())
        return JSONResponse(await _resync(agent, request.path_params["name"], wanted.full))

    async def grow(request: Request) -> JSONResponse:
        wanted = _WantedSize.model_validate_json(await request.body())
        grown = await agent.grow(request.path_params["name"], wanted.size_bytes)
        return JSONResponse(grown.model_dump(mode="json"))

    return control_application(
        [
            Route("/status", status),
            Route("/checkpoints/{group}", checkpoints, methods=["GET", "POST"]),
            Route("/checkpoints/{group}/{name}/remove", remove, methods=["POST"]),
            Route("/verify/{group}", verify, methods=["GET", "POST"]),
            Route("/disks/{name}/resync", resync, methods=["POST"]),
            Route("/disks/{name}/grow", grow, methods=["POST"]),
        ]
    )


def _session(agent: Agent, group: str) -> AgentSession:
    if group not in {entry.group for entry in agent.disks.all()}:
        raise StateError(
            f"there is no group {group!r} at this source",
            hint="`blockrepl disk list` shows the groups",
            code="unknown-group",
        )
    if agent.session is None:
        raise StateError(
            f"there is no session with the receiver: {agent.problem or 'connecting'}",
            hint="see `blockrepl status`; try again when it is back",
            code="disconnected",
        )
    return agent.session


def _replication(agent: Agent, group: str) -> GroupReplication:
    """A group that runs. StateError, or what keeps it from running."""
    replication = agent.groups.get(group)
    if replication is None or replication.pump is None:
        error = replication.error if replication else None
        raise error or StateError("the group does not replicate yet", hint="see `blockrepl status`")
    return replication


def _error_of(replication: GroupReplication) -> BlockreplError | None:
    """What holds the group up: nothing of it becomes durable until that is solved."""
    return replication.error or next(iter(replication.errors.values()), None)


async def _durable(replication: GroupReplication, checkpoint: WantedCheckpoint) -> None:
    """Wait for a checkpoint; not any longer than the group works. StateError."""
    deadline = trio.current_time() + CHECKPOINT_SECONDS
    while not checkpoint.durable.is_set():
        if error := _error_of(replication):
            raise StateError(
                f"checkpoint {checkpoint.name!r} is not durable: {explain(error)}",
                hint="it comes when that is solved; `blockrepl checkpoint list` shows if it came",
                code=error.code,
            )
        if trio.current_time() > deadline:
            raise StateError(
                f"checkpoint {checkpoint.name!r} was not durable within {CHECKPOINT_SECONDS:.0f} s",
                hint="see `blockrepl status` for the lag; `blockrepl checkpoint list` shows if it "
                "came",
                code="slow",
            )
        with trio.move_on_after(LOOK_SECONDS):
            await checkpoint.durable.wait()


async def _take_checkpoint(agent: Agent, group: str, wanted: _WantedCheckpoint) -> dict[str, Any]:
    session = _session(agent, group)
    replication = _replication(agent, group)
    if error := _error_of(replication):
        raise StateError(
            f"checkpoint {wanted.name!r} cannot be taken: {error}", hint=error.hint, code=error.code
        )
    taken = await session.request("checkpoint-list", group, wanted.name)
    if any(checkpoint["name"] == wanted.name for checkpoint in taken):
        raise StateError(
            f"checkpoint {wanted.name!r} exists already",
            hint="choose another name, or remove that one first",
            code="taken",
        )
    pump = _replication(agent, group).pump
    assert pump is not None
    checkpoint = WantedCheckpoint(wanted.name, wanted.keep)
    pump.want_checkpoint(checkpoint)
    await _durable(replication, checkpoint)
    return {
        "name": wanted.name,
        "at": format_instant(checkpoint.at_ns),
        "at_ns": checkpoint.at_ns,
        "kind": "crash",
        "kept": wanted.keep,
    }


async def _resync(agent: Agent, name: str, full: bool) -> dict[str, Any]:
    entry = agent.disks.load(name)
    replication = _replication(agent, entry.group)
    pump = replication.pump
    assert pump is not None
    disk = next((one for one in pump.disks if one.id == entry.id.bytes), None)
    async with pump.retiring, pump.between_rounds:
        if disk is None or replication.pump is not pump:
            raise replication.errors.get(name) or StateError(
                f"disk {name!r} is not taken up yet", hint="try again in a moment"
            )
        from_ns = pump.outbox.due.watermark + 1
        doubt = partial(disk.doubt, slice(None), from_ns, "a resync was asked for", send_all=full)
        await trio.to_thread.run_sync(doubt)
    return {
        "disk": name,
        "group": entry.group,
        "full": full,
        "to_sync_bytes": entry.size_bytes,
        "linked": replication.is_linked,
    }


# --- status


async def _status(agent: Agent) -> dict[str, Any]:
    entries = agent.disks.all()
    groups = []
    for name in sorted({entry.group for entry in entries}):
        mine = [entry for entry in entries if entry.group == name]
        groups.append(await _group_status(agent, name, mine))
    return {
        "role": "source",
        "name": agent.identity.name,
        "receiver": agent.identity.address,
        "connected": agent.session is not None,
        "problem": explain(agent.problem) if agent.problem else None,
        "limit": _limit_status(agent),
        "groups": groups,
    }


def _limit_status(agent: Agent) -> dict[str, Any]:
    """``bytes_per_second`` null: no limit now. ``is_holding``: it has made data wait of late."""
    rate = agent.shaper.rate()
    return {
        "bytes_per_second": rate.bytes_per_second,
        "until": format_minute(rate.until) if rate.until is not None else None,
        "is_holding": agent.shaper.is_holding,
    }


async def _group_status(agent: Agent, name: str, entries: list[DiskEntry]) -> dict[str, Any]:
    group = agent.groups.get(name)
    outbox = group.pump.outbox if group and group.pump else None
    remote: dict[str, Any] = {}
    error = (group.error if group else None) or agent.problem
    if agent.session and group and group.is_linked:
        try:
            remote = await agent.session.request("group-status", name)
        except BlockreplError as failure:
            error = failure
    durable_ns = outbox.known.watermark if outbox else None
    now = agent.clock.now()
    return {
        "name": name,
        "state": _group_state(group),
        "lag_seconds": (now - durable_ns) / NANOSECONDS_PER_SECOND if durable_ns else None,
        "floor": remote.get("floor"),
        "floor_ns": remote.get("floor_ns"),
        "latest": remote.get("latest"),
        "latest_ns": remote.get("latest_ns"),
        "gaps": remote.get("gaps", []),
        "journal_bytes": remote.get("journal_bytes"),
        "problem": explain(error) if error else None,
        "sent_bytes": outbox.sent_bytes if outbox else 0,
        "in_flight_bytes": outbox.waiting_bytes if outbox else 0,
        "spool": _spool_status(group),
        "disks": [_disk_status(agent, entry, group, remote) for entry in entries],
    }


def _spool_status(group: GroupReplication | None) -> dict[str, Any]:
    """Bytes that wait on the disk; ``drain_seconds`` null while it does not get less."""
    if group is None:
        return {"waiting_bytes": 0, "limit_bytes": None, "drain_seconds": None}
    waiting = group.spool.unread_bytes()
    return {
        "waiting_bytes": waiting,
        "limit_bytes": group.spool.limit_bytes(),
        "drain_seconds": group.drain_seconds() if waiting else 0.0,
    }


def _group_state(group: GroupReplication | None) -> str:
    if group is None or group.pump is None:
        return "error" if group and group.error else "disconnected"
    if group.error or group.errors or any(cut_short(disk) for disk in group.disks):
        return "error"
    if group.spool.has_unread():
        return "spooling"
    if not group.is_linked:
        return "disconnected"
    states = {disk.state for disk in group.disks}
    if "empty" in states:
        return "initial-sync"
    return "resync" if "gap" in states else "replicating"


def _disk_status(
    agent: Agent, entry: DiskEntry, group: GroupReplication | None, remote: dict[str, Any]
) -> dict[str, Any]:
    """``remote``: the receiver's status of the group, empty while it does not answer."""
    there: dict[str, Any] = next(
        (one for one in remote.get("disks", []) if one["name"] == entry.name), {}
    )
    told = group.scrub.passes().get(entry.id.bytes) if group else None
    disk = next((d for d in group.disks if d.entry.name == entry.name), None) if group else None
    ring = disk.ring if disk else None
    problem = group.errors.get(entry.name) if group else None
    problem = problem or (cut_short(disk) if disk else None)
    state = "disconnected"
    if problem:
        state = "error"
    elif disk and group and group.is_linked:
        state = {"empty": "initial-sync", "gap": "resync", "ready": "replicating"}[disk.state]
    if not problem and ring and ring.flush_failed():
        problem = failed_flush(entry)
    sync = group.pump.syncs.get(entry.id.bytes) if group and group.pump else None
    if not problem and sync:
        problem = sync.problem
    stale = int((ring.stale | ring.syncing).sum()) if ring else 0
    hot = int(agent.disks.hot_regions(entry).sum())
    return {
        "name": entry.name,
        "size_bytes": entry.size_bytes,
        "state": state,
        "serving": agent.disks.is_serving(entry),
        "hot_bytes": min(hot * limits.REGION_BYTES, entry.size_bytes),
        "to_sync_bytes": min(stale * limits.REGION_BYTES, entry.size_bytes),
        "ring_used_bytes": ring.used_bytes(ring.head()) if ring else 0,
        "ring_bytes": entry.ring_bytes,
        "dropped_records": ring.dropped() if ring else 0,
        "differing_bytes": sync.differing_bytes if sync else 0,
        "verified_ns": there.get("verified_ns"),
        "mismatches": there.get("mismatches", 0),
        "scrub": PassStatus.of(told).model_dump() if told else None,
        "problem": explain(problem) if problem else None,
    }
