"""One session of the agent with its receiver: hello, attach the groups, send, and hear answers.

A session has one reader task, and per group one task that attaches it and lends it the stream. The
groups outlive it (group_replication.py): nothing that a session knows is needed by the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import count
from typing import Any

import trio

from blockrepl import limits
from blockrepl.channel.framing import MessageStream
from blockrepl.errors import BlockreplError, DamageError, PeerError, StateError
from blockrepl.formats import messages
from blockrepl.formats.comparison import decode_verdict
from blockrepl.formats.messages import MessageType
from blockrepl.services.error_groups import ours_of
from blockrepl.services.group_replication import RETRY_SECONDS, GroupReplication, Link
from blockrepl.services.outbox_ends import LostError, Shape, Take

log = logging.getLogger(__name__)

_SOFTWARE = version("blockrepl")

CONFIGURATION_SECONDS = 0.2
ANSWER_SECONDS = 30.0
PASS_SECONDS = 0.5  # how often the receiver is told how scrub passes stand


class AgentSession:
    """``instance`` is this process's number at the receiver; 0 until it has been given one."""

    def __init__(
        self,
        stream: MessageStream,
        groups: Mapping[str, GroupReplication],
        shape: Shape,
        instance: int = 0,
    ) -> None:
        self.receiver = ""
        self.instance = instance
        self._stream = stream
        self._groups = groups
        self._shape = shape
        self._window = (limits.WINDOW_FRAMES, limits.WINDOW_BYTES)
        self._attached: dict[str, trio.MemorySendChannel[messages.Attached | BlockreplError]] = {}
        self._answers: dict[int, trio.MemorySendChannel[messages.Response]] = {}
        self._request_ids = count(1)

    async def run(self, welcomed: Callable[[AgentSession], None]) -> None:
        """Work until the connection ends or is refused: always raises a BlockreplError."""
        hello = messages.Hello(
            version=messages.PROTOCOL_VERSION,
            software=_SOFTWARE,
            instance=self.instance,
        )
        await self._stream.send(MessageType.HELLO, messages.encode(hello))
        try:
            async with trio.open_nursery() as nursery:
                welcome = messages.decode(messages.Welcome, await self._expect(MessageType.WELCOME))
                self._window = (welcome.window_frames, welcome.window_bytes)
                self.receiver, self.instance = welcome.receiver, welcome.instance
                welcomed(self)
                nursery.start_soon(self._read)
                nursery.start_soon(self._keep_alive)
                nursery.start_soon(self._serve_groups, nursery)
                nursery.start_soon(self._tell_passes)
        except BaseExceptionGroup as group:
            raise ours_of(group) from group

    async def request(
        self,
        verb: str,
        group: str,
        name: str | None = None,
        passes: Sequence[messages.ScrubPass] = (),
    ) -> Any:
        """Ask the receiver; its data. Raises what the receiver refuses with, or PeerError."""
        request = messages.Request.model_validate(
            {
                "id": next(self._request_ids),
                "verb": verb,
                "group": group,
                "name": name,
                "passes": list(passes),
            }
        )
        answer_to, answer_from = trio.open_memory_channel[messages.Response](1)
        self._answers[request.id] = answer_to
        try:
            await self._stream.send(MessageType.REQUEST, messages.encode(request))
            with trio.fail_after(ANSWER_SECONDS):
                response = await answer_from.receive()
        except (trio.TooSlowError, trio.EndOfChannel) as error:
            raise PeerError("the receiver does not answer", code="silent") from error
        finally:
            self._answers.pop(request.id, None)
        if response.refusal:
            raise refused(response.refusal)
        return response.data

    # --- what arrives

    async def _expect(self, wanted: MessageType) -> memoryview:
        message = await self._stream.receive()
        if message is None:
            raise PeerError("the receiver closed the connection", code="disconnected")
        kind, payload = message
        if kind == MessageType.ERROR:
            raise refused(messages.decode(messages.Refusal, payload))
        if kind != wanted:
            raise PeerError(f"message of type {kind} where {wanted.name} was due")
        return payload

    async def _read(self) -> None:
        while True:
            message = await self._stream.receive()
            if message is None:
                raise PeerError("the receiver closed the connection", code="disconnected")
            kind, payload = message
            if kind == MessageType.ACK:
                self._acknowledge(payload)
            elif kind == MessageType.ATTACHED:
                attached = messages.decode(messages.Attached, payload)
                await self._deliver(attached.group, attached)
            elif kind == MessageType.RESPONSE:
                response = messages.decode(messages.Response, payload)
                if waiting := self._answers.get(response.id):
                    await waiting.send(response)
            elif kind == MessageType.VERDICT:
                verdict = decode_verdict(payload)
                for group in self._groups.values():
                    group.verdict(verdict)
            elif kind == MessageType.VERIFY:
                wanted = messages.decode(messages.Verify, payload)
                if replication := self._groups.get(wanted.group):
                    replication.scrub.begin_now()
            elif kind == MessageType.PING:
                await self._stream.send(MessageType.PONG)
            elif kind == MessageType.ERROR:
                refusal = messages.decode(messages.Refusal, payload)
                if refusal.group is None:
                    raise refused(refusal)
                await self._deliver(refusal.group, refused(refusal))
            elif kind != MessageType.PONG:
                raise PeerError(f"unexpected message of type {kind}")

    def _acknowledge(self, payload: memoryview) -> None:
        group, count_of_messages, number = messages.decode_ack(payload)
        for replication in self._groups.values():
            replication.acknowledged(group, count_of_messages, number)

    async def _deliver(self, group: str, answer: messages.Attached | BlockreplError) -> None:
        if waiting := self._attached.pop(group, None):
            await waiting.send(answer)
        elif isinstance(answer, BlockreplError) and group in self._groups:
            self._groups[group].refuse(answer)

    async def verify(self, group: GroupReplication) -> Any:
        """Tell how the group's scrub passes stand; what the receiver has proven. As `request`."""
        return await self.request("verify", group.name, passes=[*group.scrub.passes().values()])

    async def _tell_passes(self) -> None:
        told: dict[str, object] = {}
        while True:
            await trio.sleep(PASS_SECONDS)
            for group in list(self._groups.values()):
                passes = group.scrub.passes()
                if group.is_linked and passes != told.get(group.name, {}):
                    with suppress(StateError):  # not attached any more
                        await self.verify(group)
                        told[group.name] = passes

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep(limits.IDLE_SECONDS / 3)
            await self._stream.send(MessageType.PING)
            if self._stream.stream.sent_bytes > limits.SESSION_BYTES_MAX:
                raise PeerError("the session's keys are used up", code="renew")

    # --- groups

    async def _serve_groups(self, nursery: trio.Nursery) -> None:
        served: set[GroupReplication] = set()
        while True:
            for group in list(self._groups.values()):
                if group not in served:
                    served.add(group)
                    nursery.start_soon(self._serve_group, group)
            await trio.sleep(CONFIGURATION_SECONDS)

    async def _serve_group(self, group: GroupReplication) -> None:
        link = Link(self._send, self._shape, *self._window)
        while not group.finished:
            try:
                attached = await self._attach(group.name, await group.attach_disks())
                await group.serve(attached, link)
            except PeerError:
                raise
            except (LostError, DamageError) as error:
                log.error("group %s: %s", group.name, error)
            except BlockreplError as error:
                if str(error) != str(group.error):
                    log.error("group %s: %s", group.name, error)
                group.error = error
                await trio.sleep(RETRY_SECONDS)

    async def _attach(self, name: str, disks: list[messages.AttachDisk]) -> messages.Attached:
        answer_to, answer_from = trio.open_memory_channel[messages.Attached | BlockreplError](1)
        self._attached[name] = answer_to
        attach = messages.Attach(group=name, disks=disks)
        await self._stream.send(MessageType.ATTACH, messages.encode(attach))
        try:
            with trio.fail_after(ANSWER_SECONDS):
                answer = await answer_from.receive()
        except trio.TooSlowError as error:
            raise PeerError("the receiver does not answer", code="silent") from error
        if isinstance(answer, BlockreplError):
            raise answer
        return answer

    async def _send(self, kind: MessageType, size_bytes: int, take: Take) -> None:
        await self._stream.send_taken(kind, size_bytes, take)


def refused(refusal: messages.Refusal) -> StateError:
    return StateError(refusal.error, hint=refusal.hint, code=refusal.code)
