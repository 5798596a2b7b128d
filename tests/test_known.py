"""What a source thinks the receiver knows, against a receiver that knows it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outgoing import DISK, GROUP, RING, attached
from replica_workload import Agent, Frame, attach, columns, put, start

from blockrepl.formats import frame as frames
from blockrepl.formats.frame import FrameKind, RecordKind
from blockrepl.formats.marks import decode_mark
from blockrepl.formats.messages import Attached
from blockrepl.session.known import Known
from blockrepl.units import MIB

STEPS = st.lists(
    st.sampled_from(
        ["records", "watermark", "sync", "gap", "consistent", "checkpoint", "another ring"]
    ),
    max_size=12,
)


def step(agent: Agent, what: str) -> Frame | None:
    agent.stamp += 1000
    match what:
        case "records":
            return agent.writes(3)
        case "watermark":
            return agent._frame(FrameKind.RECORDS, None, b"")
        case "sync":
            rows = [(agent.stamp, 0, MIB, int(RecordKind.ZERO))]
            return agent._frame(
                FrameKind.SYNC,
                columns(rows),
                b"",
                ring_id=agent.ring,
                sequence=agent.sequence,
            )
        case "gap":
            return agent.gap()
        case "consistent":
            agent.sequence += 2  # records that were skipped for content
            return agent.consistent()
        case "checkpoint":
            return agent.checkpoint(f"c{agent.number}")
    agent.ring, agent.sequence = agent.ring - 1, 0
    return None


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_carried_on_frame_by_frame_it_is_the_receivers_next_answer(steps: list[str]) -> None:
    # Guards each row of known.py's table: the source would give up the group, or worse, go on.
    with tempfile.TemporaryDirectory() as directory:
        replica, agent = start(Path(directory) / "web")
        known = Known.of(attach(replica))
        try:
            for what in steps:
                if what == "sync" and known.attached().disks[0].state == "ready":
                    continue  # content is taken for a gap only
                frame = step(agent, what)
                if frame is None:
                    continue
                put(replica, frame)
                header, whole = frame
                body = whole[frames.HEADER_BYTES :]
                is_mark = header.kind == FrameKind.MARK
                mark = decode_mark(frames.decode_payload(header, body)) if is_mark else None
                known.apply(header, mark)
                answer = attach(replica)
                assert known.differs(answer) == ""
                assert _without_blank(known.attached()) == _without_blank(answer)
        finally:
            replica.close()


def _without_blank(answer: Attached) -> dict[str, object]:
    """``blank`` is of the moment of the attachment."""
    found = answer.model_dump()
    for disk in found["disks"]:
        disk.pop("blank")
    return found


OTHERS = {
    "another replica": attached(5, 3, group=UUID(int=9)),
    "fewer frames": attached(4, 3),
    "more frames": attached(6, 3),
    "another position": attached(5, 4),
}


@pytest.mark.parametrize("answer", OTHERS.values(), ids=OTHERS)
def test_an_answer_that_contradicts_it_is_told_apart(answer: Attached) -> None:
    known = Known.of(attached(5, 3))
    assert known.differs(attached(5, 3)) == ""
    assert known.differs(answer)
    assert known.copy().differs(answer)


@pytest.mark.parametrize("change", [{"state": "gap"}, {"ring_id": RING + 1}])
def test_a_disk_in_another_state_or_ring_is_told_apart(change: dict[str, object]) -> None:
    answer = attached(5, 3)
    disk = answer.disks[0].model_copy(update=change)
    assert Known.of(answer).differs(answer.model_copy(update={"disks": [disk]}))
    assert (answer.group_id, disk.id) == (GROUP, DISK)
