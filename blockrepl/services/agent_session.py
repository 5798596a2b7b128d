"""One session of the agent with its receiver: hello, attach the groups, pump, and hear answers.

A session has one reader task, and per group one task that attaches it and runs its pump. Groups and
disks may come and go while it lasts: `disk add` and `disk remove` change files, which are looked at
again every half second; a group that changed is stopped, attached anew, and goes on where the
receiver says. The session ends with the connection; nothing it knows is needed by the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from itertools import count
from typing import Any

import trio

from blockrepl import limits
from blockrepl.channel.framing import MessageStream
from blockrepl.errors import BlockreplError, PeerError, StateError, StorageError
from blockrepl.formats import messages
from blockrepl.formats.frame import Buffer
from blockrepl.formats.messages import MessageType
from blockrepl.services.group_pump import GroupPump
from blockrepl.services.source_disk import SourceDisk
from blockrepl.session.sender import GroupSender
from blockrepl.storage.clock import SourceClock
from blockrepl.storage.source import DiskEntry, SourceDisks

log = logging.getLogger(__name__)

CONFIGURATION_SECONDS = 0.5
RETIRE_SECONDS = 1.0
RETRY_SECONDS = 5.0  # a group that was refused, or a disk whose image was missing
ANSWER_SECONDS = 30.0


class GroupSession:
    """One group of a session. ``pump`` is there while it replicates, ``error`` when it does not."""

    def __init__(self, name: str, entries: list[DiskEntry]) -> None:
        self.name = name
        self.entries = entries
        self.disks: list[SourceDisk] = []
        self.errors: dict[str, BlockreplError] = {}  # per disk
        self.error: BlockreplError | None = None
        self.pump: GroupPump | None = None
        self.retry_at = trio.current_time() + RETRY_SECONDS

    def is_outdated(self, entries: list[DiskEntry]) -> bool:
        mine = [(entry.id, entry.size_bytes, entry.image) for entry in self.entries]
        if mine != [(entry.id, entry.size_bytes, entry.image) for entry in entries]:
            return True
        return bool(self.error or self.errors) and trio.current_time() > self.retry_at


class AgentSession:
    def __init__(
        self, stream: MessageStream, source: bytes, disks: SourceDisks, clock: SourceClock
    ) -> None:
        self.groups: dict[str, GroupSession] = {}
        self.receiver = ""
        self._stream = stream
        self._source = source
        self._disks = disks
        self._clock = clock
        self._window = (limits.WINDOW_FRAMES, limits.WINDOW_BYTES)
        self._attached: dict[str, trio.MemorySendChannel[messages.Attached | BlockreplError]] = {}
        self._answers: dict[int, trio.MemorySendChannel[messages.Response]] = {}
        self._request_ids = count(1)

    async def run(self) -> None:
        """Work until the connection ends or is refused: always raises a BlockreplError."""
        hello = messages.Hello(version=messages.PROTOCOL_VERSION, software=version("blockrepl"))
        await self._stream.send(MessageType.HELLO, messages.encode(hello))
        try:
            async with trio.open_nursery() as nursery:
                welcome = messages.decode(messages.Welcome, await self._expect(MessageType.WELCOME))
                self._window = (welcome.window_frames, welcome.window_bytes)
                self.receiver = welcome.receiver
                nursery.start_soon(self._read)
                nursery.start_soon(self._keep_alive)
                nursery.start_soon(self._follow_configuration, nursery)
        except BaseExceptionGroup as group:  # not except*: what it raises comes out in a group
            ours, others = group.split((BlockreplError, OSError))
            if ours is None or others is not None:
                raise
            raise _first(ours) from group
        finally:
            for session in self.groups.values():
                for disk in session.disks:
                    disk.close()

    async def request(self, verb: str, group: str, name: str | None = None) -> Any:
        """Ask the receiver; its data. Raises what the receiver refuses with, or PeerError."""
        request = messages.Request.model_validate(
            {"id": next(self._request_ids), "verb": verb, "group": group, "name": name}
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
        for session in self.groups.values():
            if session.pump is not None and session.pump.sender.group == group:
                session.pump.acknowledged(count_of_messages, number)

    async def _deliver(self, group: str, answer: messages.Attached | BlockreplError) -> None:
        if waiting := self._attached.pop(group, None):
            await waiting.send(answer)
        elif isinstance(answer, BlockreplError):
            raise answer  # a group of ours failed at the receiver: begin anew

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep(limits.IDLE_SECONDS / 3)
            await self._stream.send(MessageType.PING)
            if self._stream.stream.sent_bytes > limits.SESSION_BYTES_MAX:
                raise PeerError("the session's keys are used up", code="renew")

    # --- groups

    async def _follow_configuration(self, nursery: trio.Nursery) -> None:
        while True:
            wanted: dict[str, list[DiskEntry]] = {}
            for entry in self._disks.all():
                wanted.setdefault(entry.group, []).append(entry)
            for name in wanted.keys() | self.groups.keys():
                session = self.groups.get(name)
                if session is None or session.is_outdated(wanted.get(name, [])):
                    await self._restart_group(nursery, name, wanted.get(name, []))
            await trio.sleep(CONFIGURATION_SECONDS)

    async def _restart_group(
        self, nursery: trio.Nursery, name: str, entries: list[DiskEntry]
    ) -> None:
        old = self.groups.get(name)
        if old is not None and old.pump is not None:
            await old.pump.stop()
        session = GroupSession(name, entries)
        try:
            attached = await self._attach(session)
        except PeerError:
            raise
        except BlockreplError as error:
            log.error("group %s: %s", name, error)
            session.error = error
            attached = None
        if old is not None:
            for disk in old.disks:
                disk.close()
        if attached is not None:
            self._open_disks(session, attached)
        self.groups[name] = session
        if not entries:
            del self.groups[name]
        elif session.pump is not None:
            nursery.start_soon(session.pump.run)
            nursery.start_soon(self._retire_rings, session)

    async def _attach(self, session: GroupSession) -> messages.Attached:
        answer_to, answer_from = trio.open_memory_channel[messages.Attached | BlockreplError](1)
        self._attached[session.name] = answer_to
        attach = messages.Attach(
            group=session.name,
            disks=[
                messages.AttachDisk(id=entry.id, name=entry.name, size_bytes=entry.size_bytes)
                for entry in session.entries
            ],
        )
        await self._stream.send(MessageType.ATTACH, messages.encode(attach))
        try:
            with trio.fail_after(ANSWER_SECONDS):
                answer = await answer_from.receive()
        except trio.TooSlowError as error:
            raise PeerError("the receiver does not answer", code="silent") from error
        if isinstance(answer, BlockreplError):
            raise answer
        return answer

    def _open_disks(self, session: GroupSession, attached: messages.Attached) -> None:
        known = {disk.id: disk for disk in attached.disks}
        for entry in session.entries:
            disk = SourceDisk(self._disks, entry, self._clock)
            try:
                disk.attach(known[entry.id], attached.group_id, attached.watermark)
            except KeyError as error:
                raise PeerError(f"the receiver leaves out disk {entry.name}") from error
            except (BlockreplError, OSError) as error:
                if isinstance(error, PeerError):
                    raise
                log.error("disk %s: %s", entry.name, error)
                session.errors[entry.name] = (
                    error if isinstance(error, BlockreplError) else StateError(str(error))
                )
                continue
            session.disks.append(disk)
        sender = GroupSender.attached(attached, *self._window)
        session.pump = GroupPump(
            session.disks,
            sender,
            self._source,
            self._clock,
            self._sending(),
            held=bool(session.errors),
        )

    def _sending(self) -> Callable[[tuple[Buffer, ...]], Awaitable[None]]:
        async def send(buffers: tuple[Buffer, ...]) -> None:
            await self._stream.send(MessageType.DATA, *buffers)

        return send

    async def _retire_rings(self, session: GroupSession) -> None:
        """Give back the rings of disks that nobody serves any more."""
        while self.groups.get(session.name) is session:
            await trio.sleep(RETIRE_SECONDS)
            for disk in session.disks:
                if session.pump and disk.ring and not self._disks.is_serving(disk.entry):
                    async with session.pump.between_rounds:
                        await trio.to_thread.run_sync(disk.retire)


def refused(refusal: messages.Refusal) -> StateError:
    return StateError(refusal.error, hint=refusal.hint, code=refusal.code)


def _first(group: BaseExceptionGroup[Exception]) -> BlockreplError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError):
        return StorageError(str(error), hint="the agent tries again by itself")
    assert isinstance(error, BlockreplError)
    return error
