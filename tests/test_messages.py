"""Messages of the channel: the table of types, round trips, and peers that do not keep to it."""

from __future__ import annotations

import json
import math
import re
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats import messages
from blockrepl.formats.frame import NO_ID, FrameKind, encode_frame
from blockrepl.formats.marks import GapMark, encode_mark
from blockrepl.formats.messages import (
    AGENT_ACCEPTS,
    RECEIVER_ACCEPTS,
    Attach,
    Attached,
    AttachedDisk,
    Hello,
    Message,
    MessageType,
    Refusal,
    Request,
    Response,
    ScrubPass,
    Verify,
    Welcome,
)
from blockrepl.services.receiver_api import Checkpoint, GapStatus
from blockrepl.storage.catalog import CheckpointRow

ID = str(UUID(int=9))
MODELS: list[type[Message]] = [Hello, Welcome, Attach, Attached, Refusal, Request, Response, Verify]


def type_table() -> list[tuple[int, str, str]]:
    rows = re.findall(
        r"^(\d+) +([A-Z]+) +(agent|receiver|both) ", messages.__doc__ or "", re.MULTILINE
    )
    return [(int(number), name, sender) for number, name, sender in rows]


def test_the_docstring_names_the_types_there_are() -> None:
    assert {name: number for number, name, _ in type_table()} == dict(MessageType.__members__)


def test_each_side_accepts_what_the_other_sends_and_nothing_else() -> None:
    senders = {number: sender for number, _, sender in type_table()}
    assert set(RECEIVER_ACCEPTS) == {n for n, who in senders.items() if who != "receiver"}
    assert set(AGENT_ACCEPTS) == {n for n, who in senders.items() if who != "agent"}


def test_every_payload_has_a_bound_that_a_frame_fits() -> None:
    bounds = [*RECEIVER_ACCEPTS.values(), *AGENT_ACCEPTS.values()]
    assert max(bounds) <= limits.MESSAGE_BYTES_MAX
    assert RECEIVER_ACCEPTS[MessageType.DATA] > limits.FRAME_BODY_BYTES_MAX + 144


SAMPLES: list[Message] = [
    Hello(version=1, software="blockrepl 0.1.0"),
    Welcome(version=1, receiver="r", window_frames=1, window_bytes=limits.MESSAGE_BYTES_MAX),
    Attach(group="web", disks=[messages.AttachDisk(id=UUID(int=1), name="root", size_bytes=512)]),
    Attached(
        group="web",
        group_id=UUID(int=2),
        next_number=1,
        watermark=0,
        disks=[
            AttachedDisk(
                id=UUID(int=1), epoch=0, state="empty", ring_id=(1 << 64) - 1, next_sequence=0
            )
        ],
    ),
    Refusal(code="taken", error="why", hint="what", group="web"),
    Request(id=1, verb="checkpoint-remove", group="web", name="x"),
    Request(
        id=1,
        verb="verify",
        group="web",
        passes=[
            ScrubPass(
                disk=UUID(int=1),
                started_ns=1,
                ended_ns=None,
                is_asked_for=True,
                progress=0.5,
                skipped_regions=0,
                differing_regions=0,
                bytes_per_second=1e6,
            )
        ],
    ),
    Response(id=1, data={"a": [1, 2]}),
    Verify(group="web"),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert messages.decode(type(message), messages.encode(message)) == message
    assert messages.decode(type(message), memoryview(messages.encode(message))) == message


@given(st.sampled_from(MODELS), st.binary(max_size=100))
def test_garbage_is_refused(model: type[Message], data: bytes) -> None:
    with pytest.raises(PeerError):
        messages.decode(model, data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.sampled_from(SAMPLES), st.data())
def test_any_field_replaced_by_any_json_is_taken_or_refused(
    message: Message, data: st.DataObject
) -> None:
    content: dict[str, Any] = json.loads(messages.encode(message))
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(JSON)
    try:
        taken = messages.decode(type(message), json.dumps(content).encode("utf-8", "replace"))
    except PeerError:
        return
    assert isinstance(taken, type(message))


def places(content: Any, *path: Any) -> list[tuple[Any, ...]]:
    """Where every value of a JSON document is, from its root on."""
    if not isinstance(content, dict | list):
        return [path]
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    return [path, *(place for key, value in pairs for place in places(value, *path, key))]


@given(st.sampled_from(SAMPLES), st.sampled_from([math.inf, -math.inf, math.nan]) | JSON)
def test_what_is_taken_can_be_told_as_the_control_api_tells_it(message: Message, lie: Any) -> None:
    # One pass at Infinity bytes per second, and no group's status could be told any more.
    for *path, last in places(json.loads(messages.encode(message)))[1:]:
        content: dict[str, Any] = json.loads(messages.encode(message))
        holder: Any = content
        for key in path:
            holder = holder[key]
        holder[last] = lie
        try:
            taken = messages.decode(type(message), json.dumps(content).encode("utf-8", "replace"))
        except PeerError:
            continue
        json.dumps(taken.model_dump(), allow_nan=False, ensure_ascii=False, default=str).encode()


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_a_number_without_an_end_is_refused(number: str) -> None:
    told = messages.encode(SAMPLES[6])
    for within in (b"0.5", b"1000000.0"):
        assert within in told
        with pytest.raises(PeerError):
            messages.decode(Request, told.replace(within, number.encode()))
    with pytest.raises(PeerError):
        messages.decode(Response, b'{"id": 1, "data": [{"rate": ' + number.encode() + b"}]}")


def attached(**changes: object) -> bytes:
    content = json.loads(messages.encode(SAMPLES[3]))
    disk = {key: changes.pop(key) for key in list(changes) if key in content["disks"][0]}
    content["disks"][0].update(disk)
    content.update(changes)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "lie",
    [
        {"next_number": 0},
        {"next_number": -1},
        {"next_number": 1 << 64},
        {"watermark": -1},
        {"watermark": (1 << 63) - 1},
        {"epoch": -1},
        {"epoch": 1 << 32},
        {"ring_id": -1},
        {"ring_id": 1 << 64},
        {"next_sequence": -1},
        {"next_sequence": 1 << 64},
        {"state": "broken"},
        {"group": "../etc"},
    ],
)
def test_a_receiver_that_answers_nonsense_is_refused(lie: dict[str, object]) -> None:
    assert messages.decode(Attached, attached())
    with pytest.raises(PeerError):
        messages.decode(Attached, attached(**lie))


def test_whatever_an_answer_may_say_fits_a_frame() -> None:
    answer = messages.decode(
        Attached,
        attached(
            next_number=(1 << 63) - 1,
            watermark=(1 << 63) - 2,
            epoch=(1 << 31) - 1,
            next_sequence=(1 << 63) - 2,
        ),
    )
    disk = answer.disks[0]
    frame = encode_frame(
        kind=FrameKind.RECORDS,
        group=answer.group_id.bytes,
        source=NO_ID,
        number=answer.next_number,
        epoch=disk.epoch + 1,
        watermark=answer.watermark + 1,
        ring_id=disk.ring_id,
        first_sequence=disk.next_sequence,
    )
    assert frame.header.number == answer.next_number
    assert encode_mark(GapMark(disk=disk.id, from_ns=answer.watermark + 1))


@pytest.mark.parametrize(
    ("model", "content"),
    [
        (Attach, {"group": "web", "disks": [{"id": ID, "name": "a", "size_bytes": 513}]}),
        (Attach, {"group": "web", "disks": [{"id": ID, "name": "a", "size_bytes": 0}]}),
        (Attach, {"group": "web", "disks": [{"id": ID, "name": "a", "size_bytes": 1 << 47}]}),
        (Attach, {"group": "web", "disks": [{"id": ID, "name": "a/b", "size_bytes": 512}]}),
        (Attach, {"group": "web\n", "disks": []}),
        (Attach, {"group": "web", "disks": [{"id": ID, "name": "a", "size_bytes": 512}] * 1025}),
        (Request, {"id": 1, "verb": "truncate", "group": "web"}),
        (Request, {"id": 1, "verb": "checkpoint-list", "group": ".."}),
        (Welcome, {"version": 1, "receiver": "r", "window_frames": 0, "window_bytes": 1 << 25}),
        (Welcome, {"version": 1, "receiver": "r", "window_frames": 1, "window_bytes": 1 << 10}),
        (Welcome, {"version": 1, "receiver": "r", "window_frames": 1, "window_bytes": 1 << 33}),
        (Refusal, {"code": "x" * 65, "error": "y"}),
        (Refusal, {"code": "x", "error": "y" * 1001}),
        (Hello, {"version": 1, "software": "x" * 101}),
    ],
)
def test_what_is_out_of_bounds_is_refused(model: type[Message], content: object) -> None:
    with pytest.raises(PeerError):
        messages.decode(model, json.dumps(content).encode())


def test_the_longest_lists_in_an_answer_fit_a_message() -> None:
    stamp = (1 << 63) - 1
    checkpoint = Checkpoint.of(CheckpointRow("c" * 63, stamp, "crash", False))
    gap = GapStatus(disk="d" * 63, from_ns=stamp, to_ns=stamp)
    for one, count in (
        (checkpoint, messages.CHECKPOINTS_TOLD_MAX),
        (gap, 2 * messages.GAPS_TOLD_MAX),  # a status has more in it
    ):
        answer = Response(id=1, data=[one.model_dump()] * count)
        assert len(messages.encode(answer)) < limits.CONTROL_MESSAGE_BYTES_MAX


def test_no_verb_shortens_or_rewrites_history() -> None:
    verbs = Request.model_fields["verb"].annotation.__args__  # type: ignore[union-attr]
    assert set(verbs) == {"checkpoint-list", "checkpoint-remove", "group-status", "verify"}


# --- acknowledgements


@given(st.binary(min_size=16, max_size=16), *[st.integers(0, (1 << 64) - 1)] * 2)
def test_an_acknowledgement_comes_back_as_it_was(group: bytes, count: int, number: int) -> None:
    data = messages.encode_ack(group, count, number)
    assert messages.decode_ack(data) == (group, count, number)
    assert messages.decode_ack(memoryview(data)) == (group, count, number)


@given(st.binary(max_size=64).filter(lambda data: len(data) != messages.ACK.size))
def test_an_acknowledgement_of_another_size_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        messages.decode_ack(data)
