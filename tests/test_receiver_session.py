"""The receiver's half of a session: what it answers, and what it does not let pass."""

from __future__ import annotations

from uuid import UUID

import pytest
from replica_workload import Agent, Frame

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats import messages
from blockrepl.formats.messages import (
    PROTOCOL_VERSION,
    Attach,
    AttachDisk,
    Attached,
    Hello,
    MessageType,
    Refusal,
    Request,
    Response,
)
from blockrepl.session import receiver
from blockrepl.session.receiver import (
    Answer,
    Append,
    AttachGroup,
    Closed,
    Effect,
    Greet,
    GroupInput,
    GroupState,
    ReceiverSession,
    Send,
)

GROUP = UUID(int=3)
AGENT = Agent(GROUP.bytes)
DISK = AttachDisk(id=UUID(int=7), name="root", size_bytes=1 << 20)
FULL = Refusal(code="full", error="no room left", group="web")


def say(session: ReceiverSession, kind: MessageType, message: messages.Message) -> Effect | None:
    return session.received(kind, memoryview(messages.encode(message)))


def send(session: ReceiverSession, frame: Frame) -> Effect | None:
    return session.received(MessageType.DATA, memoryview(bytes(frame[1])))


def greeted(**window: int) -> ReceiverSession:
    session = ReceiverSession("vault", **window)
    effect = say(session, MessageType.HELLO, Hello(version=PROTOCOL_VERSION, software="test"))
    assert effect == Greet(instance=0)
    answer = session.welcomed(7)
    welcome = messages.decode(messages.Welcome, answer.payload)
    assert (answer.type, welcome.receiver) == (MessageType.WELCOME, "vault")
    assert welcome.instance == 7
    return session


def attach(session: ReceiverSession, group: str = "web") -> int:
    effect = say(session, MessageType.ATTACH, Attach(group=group, disks=[DISK]))
    assert isinstance(effect, AttachGroup)
    attached = Attached(group=group, group_id=GROUP, next_number=1, watermark=0, disks=[])
    answer = session.accepted(effect.generation, attached)
    assert answer == Send(MessageType.ATTACHED, messages.encode(attached))
    return effect.generation


def test_a_frame_is_acknowledged_when_it_is_durable_and_counted_from_the_attach() -> None:
    session = greeted()
    for _ in range(2):
        generation = attach(session)
        frame = AGENT.writes()
        effect = send(session, frame)
        assert isinstance(effect, Append)
        assert (effect.group, effect.header, effect.frame) == ("web", *frame)
        send(session, AGENT.writes())
        ack = session.committed("web", generation, frames=2, size_bytes=9, number=12)
        assert ack == Send(MessageType.ACK, messages.encode_ack(GROUP.bytes, 2, 12))


def test_what_is_said_of_an_older_attach_is_not_sent() -> None:
    session = greeted()
    old = attach(session)
    send(session, AGENT.writes())
    attach(session)
    assert session.committed("web", old, frames=1, size_bytes=9, number=12) is None
    assert session.refused("web", old, FULL) is None
    assert not session.is_current("web", old)


def test_frames_under_way_to_a_refused_group_are_dropped_until_it_attaches_again() -> None:
    session = greeted()
    generation = attach(session)
    send(session, AGENT.writes())
    assert session.refused("web", generation, FULL) == Send(
        MessageType.ERROR, messages.encode(FULL)
    )
    assert session.refused("web", generation, FULL) is None
    assert session.committed("web", generation, frames=1, size_bytes=1, number=1) is None
    for _ in range(2 * limits.WINDOW_FRAMES):
        assert send(session, AGENT.writes(1)) is None
    attach(session)
    assert isinstance(send(session, AGENT.writes()), Append)


@pytest.mark.parametrize("bound", ["frames", "bytes"])
def test_a_peer_that_overruns_its_window_is_at_fault(bound: str) -> None:
    frames = [AGENT.writes(1) for _ in range(4)]
    size = len(frames[0][1])
    if bound == "frames":
        session = greeted(window_frames=3)
    else:
        session = greeted()
        session._window_bytes = 3 * size  # smaller than a Welcome may offer
    generation = attach(session)
    for frame in frames[:3]:
        send(session, frame)
    session.committed("web", generation, frames=1, size_bytes=size, number=1)
    send(session, frames[3])
    with pytest.raises(PeerError, match="window"):
        send(session, frames[3])


def test_requests_pings_and_goodbyes() -> None:
    session = greeted()
    assert session.received(MessageType.PING, memoryview(b"")) == Send(MessageType.PONG, b"")
    assert session.received(MessageType.PONG, memoryview(b"")) is None
    request = Request(id=4, verb="checkpoint-list", group="web")
    assert say(session, MessageType.REQUEST, request) == Answer(request)
    assert not session.may_ask("web")
    attach(session)
    assert session.may_ask("web")
    response = Response(id=4, data=[1])
    assert session.answered(response) == Send(MessageType.RESPONSE, messages.encode(response))
    assert say(session, MessageType.ERROR, FULL) is None  # the agent gives up one group
    assert send(session, AGENT.writes()) is None
    goodbye = Refusal(code="stopped", error="the agent stops")
    assert say(session, MessageType.ERROR, goodbye) == Closed(goodbye)


def test_an_answer_that_fits_no_message_is_refused_and_ends_no_session() -> None:
    # The agent would have dropped the session, and with it all its groups.
    room = limits.CONTROL_MESSAGE_BYTES_MAX - len(messages.encode(Response(id=4, data="")))
    fits = greeted().answered(Response(id=4, data="x" * room))
    assert len(fits.payload) == limits.CONTROL_MESSAGE_BYTES_MAX
    answer = messages.decode(Response, greeted().answered(Response(id=4, data="ä" * room)).payload)
    assert (answer.id, answer.data) == (4, None)
    assert answer.refusal is not None
    assert answer.refusal.code == "too-large"
    assert answer.refusal.hint


def test_only_the_listed_transitions_exist() -> None:
    for state in (None, *GroupState):
        for what in GroupInput:
            group = receiver._Group(state)
            expected = receiver.TRANSITIONS.get((state, what))
            if expected is None:
                with pytest.raises(PeerError):
                    group.step(what)
                assert group.state is state
            else:
                group.step(what)
                assert group.state is expected


@pytest.mark.parametrize("kind", [*MessageType, 0, 77])
def test_nothing_but_one_hello_opens_a_session(kind: int) -> None:
    if kind == MessageType.HELLO:
        with pytest.raises(PeerError):
            say(greeted(), MessageType.HELLO, Hello(version=PROTOCOL_VERSION))
    else:
        with pytest.raises(PeerError):
            ReceiverSession("vault").received(kind, memoryview(b""))


@pytest.mark.parametrize("kind", [MessageType.WELCOME, MessageType.ACK, MessageType.ATTACHED, 77])
def test_messages_for_agents_are_refused(kind: int) -> None:
    with pytest.raises(PeerError):
        greeted().received(kind, memoryview(b"{}"))


def test_other_illegal_messages_are_refused() -> None:
    session = greeted()
    with pytest.raises(PeerError):
        send(session, AGENT.writes())  # never attached
    with pytest.raises(PeerError):
        session.received(MessageType.ATTACH, memoryview(b'{"group": "../x", "disks": []}'))
    with pytest.raises(PeerError):
        say(session, MessageType.ATTACH, Attach(group="web", disks=[DISK, DISK]))
    with pytest.raises(PeerError) as error:
        say(ReceiverSession("vault"), MessageType.HELLO, Hello(version=PROTOCOL_VERSION + 1))
    assert error.value.code == "version"
    say(session, MessageType.ATTACH, Attach(group="db", disks=[]))
    with pytest.raises(PeerError):
        say(session, MessageType.ATTACH, Attach(group="db", disks=[]))  # still attaching
    for number in range(limits.GROUPS_PER_SESSION_MAX - 1):
        say(session, MessageType.ATTACH, Attach(group=f"g{number}", disks=[]))
    with pytest.raises(PeerError, match="groups"):
        say(session, MessageType.ATTACH, Attach(group="one-more", disks=[]))
