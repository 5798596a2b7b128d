"""Messages of the channel between an agent and a receiver.

On the wire (channel/framing.py): u32 length, u8 type, payload. Types and who sends them:

====  =========  ========  ==================================================================
type  name       from      payload
====  =========  ========  ==================================================================
1     HELLO      agent     JSON Hello; the first message
2     DATA       agent     one frame (frame.py)
3     WELCOME    receiver  JSON Welcome; the answer to HELLO
4     ACK        receiver  binary: group id, u64 messages, u64 number: the first ``messages`` DATA
                           messages of this session for the group are durable; ``number`` is the
                           last durable frame
5     REQUEST    agent     JSON Request
6     RESPONSE   receiver  JSON Response with the request's id
7     PING       both      empty; an agent's, every IDLE_SECONDS / 3
8     PONG       both      empty; the answer to PING. A receiver says it unasked as often
9     ERROR      both      JSON Refusal; closes the session, or one group of it when it names one
10    ATTACH     agent     JSON Attach: a group and all disks this source has in it
11    ATTACHED   receiver  JSON Attached: where to go on
12    COMPARE    agent     binary (comparison.py): digests of a range, in the order of DATA
13    VERDICT    receiver  binary (comparison.py): which blocks of it differ
14    VERIFY     receiver  JSON Verify: begin a scrub pass of the group now
====  =========  ========  ==================================================================

Types 32 to 63 belong to enrolment. After ATTACHED, DATA for the group starts counting at 1 again.

Instances: every agent process has a number of its own, given to it in WELCOME and said again in
each HELLO after that. A process that has just started says 0 and gets the next number, so it comes
before all of its source that started earlier: those are refused (code ``fenced``), until the
later ones have had no session for some minutes.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats.comparison import COMPARE_MESSAGE_BYTES_MAX, VERDICT_MESSAGE_BYTES_MAX
from blockrepl.formats.marks import NameField, StampField

PROTOCOL_VERSION = 2  # 1 compared by BLAKE2b
# Of a group in a RESPONSE, the newest: with the longest names 700 KB, and 150 KB of a status.
CHECKPOINTS_TOLD_MAX = 4000
GAPS_TOLD_MAX = 1000
ACK = struct.Struct("<16sQQ")


class MessageType(IntEnum):
    HELLO = 1
    DATA = 2
    WELCOME = 3
    ACK = 4
    REQUEST = 5
    RESPONSE = 6
    PING = 7
    PONG = 8
    ERROR = 9
    ATTACH = 10
    ATTACHED = 11
    COMPARE = 12
    VERDICT = 13
    VERIFY = 14


CONTROL = limits.CONTROL_MESSAGE_BYTES_MAX
RECEIVER_ACCEPTS: dict[int, int] = {  # type -> largest payload
    MessageType.HELLO: CONTROL,
    MessageType.DATA: limits.MESSAGE_BYTES_MAX,
    MessageType.REQUEST: CONTROL,
    MessageType.PING: 0,
    MessageType.PONG: 0,
    MessageType.ERROR: CONTROL,
    MessageType.ATTACH: CONTROL,
    MessageType.COMPARE: COMPARE_MESSAGE_BYTES_MAX,
}
AGENT_ACCEPTS: dict[int, int] = {
    MessageType.WELCOME: CONTROL,
    MessageType.ACK: ACK.size,
    MessageType.RESPONSE: CONTROL,
    MessageType.PING: 0,
    MessageType.PONG: 0,
    MessageType.ERROR: CONTROL,
    MessageType.ATTACHED: CONTROL,
    MessageType.VERDICT: VERDICT_MESSAGE_BYTES_MAX,
    MessageType.VERIFY: CONTROL,
}


InstanceField = Annotated[int, Field(ge=0, lt=1 << 62)]


class Message(BaseModel):
    # Without infinities: what a peer told is told on as JSON (status), which has no word for them.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Hello(Message):
    version: int
    software: str = Field(default="", max_length=100)
    instance: InstanceField = 0  # as the last WELCOME said; 0: just started


class Welcome(Message):
    version: int
    receiver: str = Field(max_length=100)
    instance: InstanceField = 0
    window_frames: int = Field(ge=1, le=65536)
    window_bytes: int = Field(ge=limits.MESSAGE_BYTES_MAX, le=1 << 32)


SizeField = Annotated[int, Field(gt=0, le=limits.DISK_BYTES_MAX, multiple_of=limits.SECTOR_BYTES)]


class AttachDisk(Message):
    """More than the receiver knows of: the disk has grown, and a mark will say when."""

    id: UUID
    name: NameField
    size_bytes: SizeField


class Attach(Message):
    group: NameField
    disks: Annotated[list[AttachDisk], Field(max_length=limits.DISKS_PER_SOURCE_MAX)]


# What comes back in headers of frames: within their fields, with room for the next one.
EpochField = Annotated[int, Field(ge=0, lt=1 << 31)]
PositionField = Annotated[int, Field(ge=0, lt=(1 << 63) - 1)]


class AttachedDisk(Message):
    id: UUID
    epoch: EpochField  # current epoch of the disk
    state: Literal["empty", "ready", "gap"]  # empty: the first sync is not done
    ring_id: Annotated[int, Field(ge=0, lt=1 << 64)]  # of its last durable frame; 0: none
    next_sequence: PositionField  # in that ring: the first record that is not durable here
    # The base image is known to be all zeros: nothing to compare a first sync with.
    blank: bool = False
    # Up to its last durable frame; None: it does not say, and knows of no growing.
    size_bytes: SizeField | None = None


class Attached(Message):
    group: NameField
    group_id: UUID
    next_number: Annotated[StampField, Field(ge=1)]
    watermark: PositionField  # last durable one of this source
    disks: list[AttachedDisk]


class Verify(Message):
    group: NameField


class ScrubPass(Message):
    """How a disk's last scrub pass stands. Instants are stamps of the source."""

    disk: UUID
    started_ns: StampField
    ended_ns: StampField | None
    is_asked_for: bool
    progress: Annotated[float, Field(ge=0, le=1)]
    skipped_regions: Annotated[int, Field(ge=0, lt=1 << 31)]  # never quiet while they were read
    differing_regions: Annotated[int, Field(ge=0, lt=1 << 31)]
    bytes_per_second: Annotated[float, Field(ge=0)]


class Refusal(Message):
    code: str = Field(max_length=64)
    error: str = Field(max_length=1000)
    hint: str = Field(default="", max_length=1000)
    group: str | None = None


class Request(Message):
    id: int
    verb: Literal["checkpoint-list", "checkpoint-remove", "group-status", "verify"]
    group: NameField
    name: NameField | None = None  # of a checkpoint; with checkpoint-list: that one only
    # With verify: how the passes of the source's disks stand.
    passes: Annotated[list[ScrubPass], Field(max_length=limits.DISKS_PER_SOURCE_MAX)] = []


def _tellable(data: Any) -> Any:
    json.dumps(data, allow_nan=False)  # allow_inf_nan does not reach into Any
    return data


class Response(Message):
    id: int
    refusal: Refusal | None = None
    data: Annotated[Any, AfterValidator(_tellable)] = None


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    return message.model_dump_json().encode()


def decode(model: type[M], payload: bytes | bytearray | memoryview) -> M:
    """Parse a JSON message. Raises PeerError."""
    try:
        return model.model_validate_json(bytes(payload))
    except ValidationError as error:
        raise PeerError(f"{model.__name__} message does not parse") from error


def encode_ack(group: bytes, messages: int, number: int) -> bytes:
    return ACK.pack(group, messages, number)


def decode_ack(payload: bytes | bytearray | memoryview) -> tuple[bytes, int, int]:
    """Group id, durable DATA messages of this session, last durable frame. Raises PeerError."""
    if len(payload) != ACK.size:
        raise PeerError("acknowledgement has the wrong size")
    group, messages, number = ACK.unpack(payload)
    return group, messages, number
