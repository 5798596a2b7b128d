"""Marks: what a source says about its history, as JSON in frames of kind mark, in stream order.

==============  =====================================================================
mark            meaning
==============  =====================================================================
checkpoint      ``name`` is the state of the group at ``at_ns``
gap             from ``from_ns`` on, history of ``disk`` is incomplete
consistent      from ``at_ns`` on, the replica of ``disk`` equals the source again (or for the
                first time: then the first sync is done and ``at_ns`` is the disk's floor)
grow            from ``at_ns`` on, ``disk`` has ``size_bytes``; what is new reads as zeros. It
                comes before all records in the new part
==============  =====================================================================
"""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from blockrepl.errors import PeerError
from blockrepl.limits import NAME_PATTERN, SECTOR_BYTES

_STAMP_MAX = (1 << 63) - 1  # what SQLite holds
StampField = Annotated[int, Field(ge=0, le=_STAMP_MAX)]
NameField = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]


class _Mark(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CheckpointMark(_Mark):
    mark: Literal["checkpoint"] = "checkpoint"
    name: NameField
    at_ns: StampField
    kind: Literal["crash", "application"] = "crash"
    kept: bool = False


class GapMark(_Mark):
    mark: Literal["gap"] = "gap"
    disk: UUID
    from_ns: StampField


class ConsistentMark(_Mark):
    mark: Literal["consistent"] = "consistent"
    disk: UUID
    at_ns: StampField


class GrowMark(_Mark):
    mark: Literal["grow"] = "grow"
    disk: UUID
    at_ns: StampField
    size_bytes: Annotated[int, Field(gt=0, multiple_of=SECTOR_BYTES)]


Mark = CheckpointMark | GapMark | ConsistentMark | GrowMark
_ADAPTER: TypeAdapter[Mark] = TypeAdapter(Annotated[Mark, Field(discriminator="mark")])


def encode_mark(mark: Mark) -> bytes:
    return mark.model_dump_json().encode()


def decode_mark(data: bytes) -> Mark:
    """Raises PeerError."""
    try:
        return _ADAPTER.validate_json(data)
    except ValidationError as error:
        raise PeerError("mark does not parse") from error
