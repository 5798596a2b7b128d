"""The receiver's status as data, and its control API.

=====================================  ==================================================
request                                does
=====================================  ==================================================
GET /status                            Status
GET /checkpoints/GROUP                 the group's checkpoints, by instant
POST /checkpoints/GROUP                NewCheckpoint: names an instant that can be reached
POST /checkpoints/GROUP/NAME/remove    forgets one, kept or not
POST /checkpoints/GROUP/NAME/keep      retention may never thin it out
POST /checkpoints/GROUP/NAME/release   retention may
GET /retention/GROUP                   RetentionStatus
POST /retention/GROUP                  NewPolicy: is kept by from now on
POST /retention/GROUP/plan             Policy: RetentionStatus as it were with it
POST /retention/GROUP/run              does what is due, answers when it is done
GET /verify/GROUP                      what the scrub has proven, per disk
POST /verify/GROUP                     asks the group's sources for a pass now; as before it
POST /seeds/GROUP/DISK                 puts the copy that waits in place (storage/seed.py)
=====================================  ==================================================
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Protocol

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from blockrepl.formats.marks import NameField, StampField
from blockrepl.services.control import control_application
from blockrepl.services.retention_status import HistoryOutlook, RetentionStatus
from blockrepl.services.verification import DiskProof, PassStatus
from blockrepl.storage.catalog import CheckpointRow
from blockrepl.storage.retained import Policy
from blockrepl.units import format_instant

GroupState = Literal["initial-sync", "replicating", "resync", "disconnected", "error"]


class GapStatus(BaseModel):
    disk: str
    from_ns: int
    to_ns: int | None


class DiskStatus(BaseModel):
    """``hot_bytes`` is known at the source only. ``synced_bytes``: first sync, since the start.

    ``verified_ns``: every byte is proven at that instant or a later one.
    """

    name: str
    size_bytes: int
    state: GroupState
    hot_bytes: int | None = None
    verified_ns: int | None = None
    mismatches: int = 0
    scrub: PassStatus | None = None
    synced_bytes: int = 0
    source: str = ""


class NewPolicy(Policy):
    """``shorten``: also when it lets go of history at once."""

    shorten: bool = False


class SourceStatus(BaseModel):
    name: str
    connected: bool


class GroupStatus(BaseModel):
    name: str
    state: GroupState
    lag_seconds: float | None
    ahead_seconds: float | None = None  # of its stamps before this clock, when that is no trifle
    floor: str | None
    floor_ns: int | None
    latest: str | None
    latest_ns: int | None
    gaps: list[GapStatus]
    journal_bytes: int
    disks: list[DiskStatus]
    problem: str | None = None
    received_bytes_per_second: float = 0.0
    sources: list[SourceStatus] = []
    retention: HistoryOutlook | None = None  # None: it cannot be told


class Status(BaseModel):
    role: Literal["receiver"] = "receiver"
    name: str
    running: bool
    groups: list[GroupStatus]


class Checkpoint(BaseModel):
    name: str
    at: str
    at_ns: int
    kind: str
    kept: bool

    @classmethod
    def of(cls, row: CheckpointRow) -> Checkpoint:
        return cls(
            name=row.name,
            at=format_instant(row.at_ns),
            at_ns=row.at_ns,
            kind=row.kind,
            kept=row.kept,
        )


class NewCheckpoint(BaseModel):
    """``at_ns``: default the newest instant."""

    name: NameField
    at_ns: StampField | None = None
    keep: bool = False


class ReceiverControl(Protocol):
    """What the control API asks of the receiver. Methods raise BlockreplError."""

    async def status(self) -> Status: ...

    async def checkpoints(self, group: str) -> list[Checkpoint]: ...

    async def create_checkpoint(self, group: str, wanted: NewCheckpoint) -> Checkpoint: ...

    async def remove_checkpoint(self, group: str, name: str) -> Checkpoint: ...

    async def keep_checkpoint(self, group: str, name: str, kept: bool) -> Checkpoint: ...

    async def place_seed(self, group: str, disk: str) -> None: ...

    async def verify(self, group: str) -> list[DiskProof]: ...

    async def begin_verify(self, group: str) -> list[DiskProof]: ...

    async def retention(self, group: str, policy: Policy | None = None) -> RetentionStatus: ...

    async def set_retention(self, group: str, policy: Policy, shorten: bool) -> RetentionStatus: ...

    async def run_retention(self, group: str) -> RetentionStatus: ...


def receiver_application(receiver: ReceiverControl) -> Starlette:
    async def status(request: Request) -> JSONResponse:
        return _answer(await receiver.status())

    async def checkpoints(request: Request) -> JSONResponse:
        group = request.path_params["group"]
        if request.method == "GET":
            found = await receiver.checkpoints(group)
            return JSONResponse([checkpoint.model_dump() for checkpoint in found])
        wanted = NewCheckpoint.model_validate_json(await request.body())
        return _answer(await receiver.create_checkpoint(group, wanted))

    async def remove(request: Request) -> JSONResponse:
        parameters = request.path_params
        return _answer(await receiver.remove_checkpoint(parameters["group"], parameters["name"]))

    async def keep(kept: bool, request: Request) -> JSONResponse:
        parameters = request.path_params
        return _answer(
            await receiver.keep_checkpoint(parameters["group"], parameters["name"], kept)
        )

    async def seed(request: Request) -> JSONResponse:
        await receiver.place_seed(request.path_params["group"], request.path_params["disk"])
        return JSONResponse({})

    async def verify(request: Request) -> JSONResponse:
        group = request.path_params["group"]
        call = receiver.verify if request.method == "GET" else receiver.begin_verify
        return JSONResponse([proof.model_dump() for proof in await call(group)])

    async def retention(request: Request) -> JSONResponse:
        group = request.path_params["group"]
        if request.method == "GET":
            return _answer(await receiver.retention(group))
        wanted = NewPolicy.model_validate_json(await request.body())
        policy = Policy.model_validate(wanted.model_dump(exclude={"shorten"}))
        return _answer(await receiver.set_retention(group, policy, wanted.shorten))

    async def plan_retention(request: Request) -> JSONResponse:
        policy = Policy.model_validate_json(await request.body())
        return _answer(await receiver.retention(request.path_params["group"], policy))

    async def run_retention(request: Request) -> JSONResponse:
        return _answer(await receiver.run_retention(request.path_params["group"]))

    return control_application(
        [
            Route("/retention/{group}", retention, methods=["GET", "POST"]),
            Route("/retention/{group}/plan", plan_retention, methods=["POST"]),
            Route("/retention/{group}/run", run_retention, methods=["POST"]),
            Route("/status", status),
            Route("/checkpoints/{group}", checkpoints, methods=["GET", "POST"]),
            Route("/checkpoints/{group}/{name}/remove", remove, methods=["POST"]),
            Route("/checkpoints/{group}/{name}/keep", partial(keep, True), methods=["POST"]),
            Route("/checkpoints/{group}/{name}/release", partial(keep, False), methods=["POST"]),
            Route("/seeds/{group}/{disk}", seed, methods=["POST"]),
            Route("/verify/{group}", verify, methods=["GET", "POST"]),
        ]
    )


def _answer(model: BaseModel) -> JSONResponse:
    content: dict[str, Any] = model.model_dump()
    return JSONResponse(content)
