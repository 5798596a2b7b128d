"""One session of the receiver: reads messages into the state machine, carries out its effects.

Two tasks, and one per comparison: the reader takes messages and waits where it must (for memory,
for an answer), which holds back its own peer and nobody else; the writer sends what commits have
made true. Of the acknowledgements of a group only the newest waits to be sent, so a peer that does
not read costs nothing. A comparison is answered before another may take its place, for the same
reason.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import trio

from blockrepl import limits
from blockrepl.channel.certificates import PeerIdentity
from blockrepl.channel.framing import MessageStream
from blockrepl.errors import BlockreplError, PeerError, StorageError
from blockrepl.formats import messages
from blockrepl.formats.comparison import Compare, Verdict
from blockrepl.formats.messages import MessageType, Refusal, Request, Response
from blockrepl.services.group_committer import Arrival, GroupCommitter, MemoryBudget
from blockrepl.session.receiver import (
    Answer,
    Append,
    AttachGroup,
    Closed,
    CompareRange,
    Greet,
    ReceiverSession,
    Send,
)

logger = logging.getLogger(__name__)

GOODBYE_SECONDS = 2.0  # to tell a peer why it is dropped


class Groups(Protocol):
    """Where a session finds the replicas it may write to."""

    async def attach(self, identity: PeerIdentity, group: str) -> GroupCommitter: ...

    async def answer(self, committer: GroupCommitter, source: bytes, request: Request) -> Any: ...

    async def compare(
        self, committer: GroupCommitter, source: bytes, compare: Compare
    ) -> Verdict: ...


class Admit(Protocol):
    """Lets an agent process in; its number. Raises BlockreplError when it may not come in."""

    async def __call__(self, session: SourceSession, instance: int) -> int: ...


def refusal_of(error: BlockreplError, group: str | None = None) -> Refusal:
    """An error as it is told to a peer."""
    return Refusal(
        code=error.code[:64], error=str(error)[:1000], hint=error.hint[:1000], group=group
    )


class SourceSession:
    """A session with a source whose certificate has been accepted."""

    def __init__(
        self,
        stream: MessageStream,
        identity: PeerIdentity,
        source: bytes,
        *,
        receiver: str,
        groups: Groups,
        budget: MemoryBudget,
        admit: Admit,
    ) -> None:
        self.identity = identity
        self.source = source
        self.instance = 0  # of the agent process; known once it has been admitted
        self.ended = trio.Event()
        self.refusals: dict[str, BlockreplError] = {}  # of groups of its own, until they attach
        self._stream = stream
        self._machine = ReceiverSession(receiver)
        self._groups = groups
        self._budget = budget
        self._admit = admit
        self._committers: dict[str, GroupCommitter] = {}
        self._reason: BlockreplError | None = None
        self._scope = trio.CancelScope()
        self._tasks: trio.Nursery
        self._comparing = trio.Semaphore(limits.COMPARISONS_MAX)
        self._asked = trio.Semaphore(limits.COMPARISONS_WAITING_MAX)
        self._answering = trio.Semaphore(limits.REQUESTS_MAX)
        self._acks: dict[str, Send] = {}
        self._others: list[Send] = []
        self._to_send = trio.Event()

    async def run(self) -> None:
        """Until the peer leaves or is dropped; never raises what a peer caused."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._tasks = nursery
                    nursery.start_soon(self._guarded, self._write)
                    await self._guarded(self._read)
                    nursery.cancel_scope.cancel()
        finally:
            self.ended.set()
        if self._reason is not None:
            if self._reason.code != "disconnected":
                logger.warning("source %s dropped: %s", self.identity.name, self._reason)
            await self._say_goodbye(self._reason)

    async def _guarded(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except BlockreplError as error:
            self.end(error)
        except trio.BrokenResourceError:
            self.end(PeerError("the connection was lost", code="disconnected"))
        except Exception:
            logger.exception("source %s dropped: a defect of ours", self.identity.name)
            self.end(StorageError("the receiver failed inside; see its log", code="internal"))

    def end(self, error: BlockreplError) -> None:
        """Drop the peer, and tell it why."""
        if self._reason is None:
            self._reason = error
        self._scope.cancel()

    async def _say_goodbye(self, error: BlockreplError) -> None:
        with (
            trio.move_on_after(GOODBYE_SECONDS, shield=True),
            suppress(BlockreplError, trio.BrokenResourceError, trio.ClosedResourceError),
        ):
            await self._stream.send(MessageType.ERROR, messages.encode(refusal_of(error)))

    # Reading

    async def _read(self) -> None:
        with trio.move_on_after(limits.HANDSHAKE_SECONDS) as scope:
            is_open = await self._take(await self._stream.receive())
        if scope.cancelled_caught:
            raise PeerError(
                f"no hello within {limits.HANDSHAKE_SECONDS:.0f} s: silent peer", code="silent"
            )
        while is_open:
            is_open = await self._take(await self._stream.receive())

    async def _take(self, message: tuple[int, memoryview] | None) -> bool:
        """Do what a message asks for; False at the end of the session."""
        if message is not None:
            effect = self._machine.received(*message)
            match effect:
                case Append():
                    await self._append(effect)
                case CompareRange():
                    await self._asked.acquire()
                    self._tasks.start_soon(self._guarded, partial(self._compare, effect))
                case Send():
                    await self._stream.send(effect.type, effect.payload)
                case Greet(instance):
                    self.instance = await self._admit(self, instance)
                    send = self._machine.welcomed(self.instance)
                    await self._stream.send(send.type, send.payload)
                    self._tasks.start_soon(self._guarded, self._keep_alive)
                case AttachGroup():
                    await self._attach(effect)
                case Answer(request):
                    await self._answering.acquire()
                    self._tasks.start_soon(self._guarded, partial(self._answer, request))
                case Closed(refusal):
                    logger.info("source %s: %s", self.identity.name, refusal.error)
                    return False
        return message is not None

    async def _append(self, effect: Append) -> None:
        await self._budget.take(effect.frame.nbytes)
        # No checkpoint from here on: a frame that was paid for is always queued.
        arrival = Arrival(self, effect.generation, effect.header, effect.frame)
        self._committers[effect.group].submit(arrival)

    async def _compare(self, effect: CompareRange) -> None:
        """Answer a comparison, in its turn."""
        group, generation = effect.group, effect.generation
        try:
            committer = self._committers[group]
            async with self._comparing:
                verdict = await self._groups.compare(committer, self.source, effect.compare)
            send = self._machine.compared(group, generation, verdict)
            if send is not None:
                await self._stream.send(send.type, send.payload)
        except PeerError:
            if self._machine.is_current(group, generation):
                raise  # else it was refused meanwhile, and frames before this one dropped
        except StorageError as error:
            logger.error("group %s cannot be compared: %s", group, error)
            self.refused(group, generation, error)
        finally:
            self._asked.release()

    async def _attach(self, effect: AttachGroup) -> None:
        group, generation = effect.attach.group, effect.generation
        send: Send | None
        is_ours = False
        try:
            committer = await self._groups.attach(self.identity, group)
            is_ours = True
            attached = await committer.perform(
                lambda: committer.replica.attach(self.source, effect.attach.disks)
            )
        except BlockreplError as error:
            logger.warning("source %s, group %s: refused: %s", self.identity.name, group, error)
            if is_ours:  # else the group is another's, or says itself what is wrong
                self.refusals[group] = error
            send = self._machine.refused(group, generation, refusal_of(error, group))
        else:
            self._committers[group] = committer
            self.refusals.pop(group, None)
            self._acks.pop(group, None)  # they count messages of before
            send = self._machine.accepted(generation, attached)
        if send is not None:
            await self._stream.send(send.type, send.payload)

    async def _answer(self, request: Request) -> None:
        """Beside the reader: an answer may wait for a disk, and frames do not wait for it."""
        try:
            send = self._machine.answered(await self._response(request))
            await self._stream.send(send.type, send.payload)
        finally:
            self._answering.release()

    async def _response(self, request: Request) -> Response:
        try:
            if not self._machine.may_ask(request.group):
                raise PeerError(f"group {request.group} is not attached", code="not-attached")
            committer = self._committers[request.group]
            data = await self._groups.answer(committer, self.source, request)
            return Response(id=request.id, data=data)
        except BlockreplError as error:
            return Response(id=request.id, refusal=refusal_of(error, request.group))

    # Outcomes of commits

    def is_current(self, group: str, generation: int) -> bool:
        # What a peer sent behind a lie, or after it was shut out, is not looked at.
        if self._reason is not None and self._reason.code != "disconnected":
            return False
        return self._machine.is_current(group, generation)

    def committed(
        self, group: str, generation: int, *, frames: int, size_bytes: int, number: int
    ) -> None:
        send = self._machine.committed(
            group, generation, frames=frames, size_bytes=size_bytes, number=number
        )
        if send is not None:
            self._acks[group] = send
            self._to_send.set()

    def refused(self, group: str, generation: int, error: BlockreplError) -> None:
        send = self._machine.refused(group, generation, refusal_of(error, group))
        if send is not None:
            self.refusals[group] = error
            # An acknowledgement of before must not follow the refusal.
            if (ack := self._acks.pop(group, None)) is not None:
                self._others.append(ack)
            self._others.append(send)
            self._to_send.set()

    def verify(self, group: str) -> bool:
        """Ask for a scrub pass of a group now; False when it is not attached."""
        send = self._machine.verify(group)
        if send is not None and send not in self._others:
            self._others.append(send)
            self._to_send.set()
        return send is not None

    def has_group(self, group: str) -> bool:
        return group in self._committers

    async def _keep_alive(self) -> None:
        """Be heard, whatever holds up the reader, and while a ping waits behind a large frame."""
        while True:
            await trio.sleep(limits.IDLE_SECONDS / 3)
            await self._stream.send(MessageType.PONG)

    async def _write(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send = trio.Event()
            while self._others or self._acks:
                # Taken one by one: what waits for its turn may yet be replaced or withdrawn.
                send = (
                    self._others.pop(0) if self._others else self._acks.pop(next(iter(self._acks)))
                )
                await self._stream.send(send.type, send.payload)
