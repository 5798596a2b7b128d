"""The receiver's half of a session, as a value: messages and outcomes in, effects out. No I/O.

A session begins with HELLO, which the receiver answers with WELCOME, or refuses.

A group in a session:

==========  ============  ==========  ===========================================================
state       input         next state  meaning
==========  ============  ==========  ===========================================================
(none)      ATTACH        ATTACHING
ATTACHING   accepted      ATTACHED    ATTACHED is sent; DATA counts from 1
ATTACHING   refused       REFUSED     ERROR that names the group is sent
ATTACHED    DATA          ATTACHED    it is appended; the window shrinks
ATTACHED    committed     ATTACHED    ACK is sent; the window grows
ATTACHED    COMPARE       ATTACHED    answered with VERDICT
ATTACHED    refused       REFUSED     as above: what was not acknowledged must be sent again
ATTACHED    ATTACH        ATTACHING
REFUSED     DATA          REFUSED     dropped: it was on its way when the ERROR was sent
REFUSED     COMPARE       REFUSED     the same
REFUSED     ATTACH        ATTACHING
==========  ============  ==========  ===========================================================

Any other message is a PeerError, and so is one that overruns the window. Each ATTACH begins a new
generation of its group: what is still to be said of an older one is dropped.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats import messages
from blockrepl.formats.comparison import Compare, Verdict, decode_compare, encode_verdict
from blockrepl.formats.frame import FrameHeader, decode_header
from blockrepl.formats.messages import (
    Attach,
    Attached,
    MessageType,
    Refusal,
    Request,
    Response,
    Verify,
)


class GroupState(enum.Enum):
    ATTACHING = "attaching"
    ATTACHED = "attached"
    REFUSED = "refused"


class GroupInput(enum.Enum):
    ATTACH = "attach"
    DATA = "data"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    COMMITTED = "committed"
    COMPARE = "compare"


TRANSITIONS: dict[tuple[GroupState | None, GroupInput], GroupState] = {
    (None, GroupInput.ATTACH): GroupState.ATTACHING,
    (GroupState.ATTACHING, GroupInput.ACCEPTED): GroupState.ATTACHED,
    (GroupState.ATTACHING, GroupInput.REFUSED): GroupState.REFUSED,
    (GroupState.ATTACHED, GroupInput.DATA): GroupState.ATTACHED,
    (GroupState.ATTACHED, GroupInput.COMMITTED): GroupState.ATTACHED,
    (GroupState.ATTACHED, GroupInput.COMPARE): GroupState.ATTACHED,
    (GroupState.ATTACHED, GroupInput.REFUSED): GroupState.REFUSED,
    (GroupState.ATTACHED, GroupInput.ATTACH): GroupState.ATTACHING,
    (GroupState.REFUSED, GroupInput.DATA): GroupState.REFUSED,
    (GroupState.REFUSED, GroupInput.COMPARE): GroupState.REFUSED,
    (GroupState.REFUSED, GroupInput.ATTACH): GroupState.ATTACHING,
}


@dataclass(frozen=True, slots=True)
class Send:
    """Send this message."""

    type: MessageType
    payload: bytes


@dataclass(frozen=True, slots=True)
class Greet:
    """An agent process says hello: call ``welcomed`` with its number, or refuse it."""

    instance: int


@dataclass(frozen=True, slots=True)
class AttachGroup:
    """Attach, then call ``accepted`` or ``refused`` with this generation."""

    attach: Attach
    generation: int


@dataclass(frozen=True, slots=True)
class Append:
    """Append this frame, then call ``committed`` or ``refused`` with this generation."""

    group: str
    generation: int
    header: FrameHeader
    frame: memoryview


@dataclass(frozen=True, slots=True)
class CompareRange:
    """When all appended before is durable, compare; then ``compared`` with this generation."""

    group: str
    generation: int
    compare: Compare


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer this request, then call ``answered``."""

    request: Request


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer has said goodbye: close the session."""

    refusal: Refusal


Effect = Send | Greet | AttachGroup | Append | CompareRange | Answer | Closed


@dataclass(slots=True)
class _Group:
    state: GroupState | None = None
    generation: int = 0
    group_id: bytes = b""
    waiting_frames: int = 0  # received and not yet acknowledged
    waiting_bytes: int = 0
    acknowledged: int = 0  # DATA messages since the last ATTACHED

    def step(self, what: GroupInput) -> None:
        state = TRANSITIONS.get((self.state, what))
        if state is None:
            now = self.state.value if self.state else "not attached"
            raise PeerError(f"{what.value} for a group that is {now}")
        self.state = state


class ReceiverSession:
    """One session with one source. Methods that take messages raise PeerError."""

    def __init__(
        self,
        receiver: str,
        *,
        window_frames: int = limits.WINDOW_FRAMES,
        window_bytes: int = limits.WINDOW_BYTES,
    ) -> None:
        self.software = ""
        self._receiver = receiver
        self._window_frames = window_frames
        self._window_bytes = window_bytes
        self._is_open = False
        self._groups: dict[str, _Group] = {}
        self._names: dict[bytes, str] = {}  # of the groups that have been attached, by id

    def received(self, kind: int, payload: memoryview) -> Effect | None:
        """Take a message in; what to do about it."""
        if self._is_open != (kind != MessageType.HELLO):
            raise PeerError("the session must begin with one HELLO")
        match kind:
            case MessageType.DATA:
                return self._data(payload)
            case MessageType.COMPARE:
                return self._compare(decode_compare(payload))
            case MessageType.PING:
                return Send(MessageType.PONG, b"")
            case MessageType.PONG:
                return None
            case MessageType.HELLO:
                return self._hello(messages.decode(messages.Hello, payload))
            case MessageType.ATTACH:
                return self._attach(messages.decode(Attach, payload))
            case MessageType.REQUEST:
                return Answer(messages.decode(Request, payload))
            case MessageType.ERROR:
                return self._error(messages.decode(Refusal, payload))
        raise PeerError(f"message of type {kind} is not for a receiver")

    def _hello(self, hello: messages.Hello) -> Effect:
        if hello.version != messages.PROTOCOL_VERSION:
            raise PeerError(
                f"the agent speaks protocol {hello.version}, this receiver "
                f"{messages.PROTOCOL_VERSION}",
                hint="install the same blockrepl version on both sides",
                code="version",
            )
        self._is_open = True
        self.software = hello.software
        return Greet(hello.instance)

    def welcomed(self, instance: int) -> Send:
        welcome = messages.Welcome(
            version=messages.PROTOCOL_VERSION,
            receiver=self._receiver,
            instance=instance,
            window_frames=self._window_frames,
            window_bytes=self._window_bytes,
        )
        return Send(MessageType.WELCOME, messages.encode(welcome))

    def _attach(self, attach: Attach) -> Effect:
        if attach.group not in self._groups and len(self._groups) >= limits.GROUPS_PER_SESSION_MAX:
            raise PeerError(f"more than {limits.GROUPS_PER_SESSION_MAX} groups in a session")
        if len({disk.id for disk in attach.disks}) != len(attach.disks):
            raise PeerError("a disk is attached twice")
        group = self._groups.setdefault(attach.group, _Group())
        group.step(GroupInput.ATTACH)
        group.generation += 1
        group.waiting_frames = group.waiting_bytes = 0
        return AttachGroup(attach, group.generation)

    def _attached_group(self, group_id: bytes, what: str) -> tuple[str, _Group]:
        name = self._names.get(group_id)
        if name is None:
            raise PeerError(f"{what} for a group that is not attached")
        return name, self._groups[name]

    def _data(self, payload: memoryview) -> Effect | None:
        header = decode_header(payload)
        name, group = self._attached_group(header.group, "data")
        group.step(GroupInput.DATA)
        if group.state is GroupState.REFUSED:
            return None
        group.waiting_frames += 1
        group.waiting_bytes += payload.nbytes
        if group.waiting_frames > self._window_frames or group.waiting_bytes > self._window_bytes:
            raise PeerError("the window is overrun")
        return Append(name, group.generation, header, payload)

    def _compare(self, compare: Compare) -> Effect | None:
        name, group = self._attached_group(compare.group, "comparison")
        group.step(GroupInput.COMPARE)
        if group.state is GroupState.REFUSED:
            return None
        return CompareRange(name, group.generation, compare)

    def _error(self, refusal: Refusal) -> Effect | None:
        if refusal.group is None:
            return Closed(refusal)
        group = self._groups.get(refusal.group)
        if group is not None and group.state is not GroupState.REFUSED:
            group.step(GroupInput.REFUSED)
        return None

    # Outcomes of effects. None when they are of an older generation.

    def is_current(self, name: str, generation: int) -> bool:
        """Whether an effect of this generation still matters."""
        group = self._groups[name]
        return group.generation == generation and group.state is not GroupState.REFUSED

    def accepted(self, generation: int, attached: Attached) -> Send | None:
        if not self.is_current(attached.group, generation):
            return None
        group = self._groups[attached.group]
        group.step(GroupInput.ACCEPTED)
        group.group_id = attached.group_id.bytes
        group.acknowledged = 0
        self._names[group.group_id] = attached.group
        return Send(MessageType.ATTACHED, messages.encode(attached))

    def refused(self, name: str, generation: int, refusal: Refusal) -> Send | None:
        if not self.is_current(name, generation):
            return None
        self._groups[name].step(GroupInput.REFUSED)
        return Send(MessageType.ERROR, messages.encode(refusal))

    def committed(
        self, name: str, generation: int, *, frames: int, size_bytes: int, number: int
    ) -> Send | None:
        """So many more frames are durable; ``number`` is the source's last durable one."""
        if not self.is_current(name, generation):
            return None
        group = self._groups[name]
        group.step(GroupInput.COMMITTED)
        group.waiting_frames -= frames
        group.waiting_bytes -= size_bytes
        group.acknowledged += frames
        return Send(
            MessageType.ACK, messages.encode_ack(group.group_id, group.acknowledged, number)
        )

    def compared(self, name: str, generation: int, verdict: Verdict) -> Send | None:
        if not self.is_current(name, generation):
            return None
        return Send(MessageType.VERDICT, encode_verdict(verdict))

    def verify(self, name: str) -> Send | None:
        """Ask the source for a scrub pass of a group now; None when it is not attached."""
        group = self._groups.get(name)
        if group is None or group.state is not GroupState.ATTACHED:
            return None
        return Send(MessageType.VERIFY, messages.encode(Verify(group=name)))

    def answered(self, response: Response) -> Send:
        payload = messages.encode(response)
        if len(payload) > limits.CONTROL_MESSAGE_BYTES_MAX:
            # The agent would have to drop the session, and with it all its groups.
            refusal = Refusal(
                code="too-large",
                error=f"the answer has {len(payload)} bytes, which is more than a message takes",
                hint="ask on the receiver's host",
            )
            payload = messages.encode(Response(id=response.id, refusal=refusal))
        return Send(MessageType.RESPONSE, payload)

    def may_ask(self, name: str) -> bool:
        """Whether the session has been let into the group: only then are requests answered."""
        return name in self._names.values()
