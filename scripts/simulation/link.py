"""The network between the source and the receiver: connections of two pipes, and what befalls them.

A pipe delivers what was sent in order, late, in pieces of any size, and holds a bounded amount; it
can be cut at any byte, fall silent, or go on delivering when its other end is long gone.

==========  =====================================================================================
fault       what is seen
==========  =====================================================================================
cut         one direction breaks after a number of bytes more, and with it the connection
silence     nothing arrives any more, in one direction or both; nobody is told
half-open   the source sees the connection broken and begins a new one; to the receiver the old one
            stays, and delivers what was on its way after a while
behind      the connection breaks right behind the next gap that the source tells of
down        the connection is broken or silent, and new ones are refused until it is over
slow        few bytes a second, until it is over
==========  =====================================================================================

TLS is left out: its own tests prove it. What it gives is kept: bytes arrive unchanged, and an end
without a goodbye is a broken connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import trio
from typing_extensions import Buffer

from blockrepl.errors import PeerError
from scripts.simulation.world import Process, World, running

PIPE_BYTES = 256 * 1024  # what the kernels on both sides hold


class Pipe:
    """Bytes one way."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._clock = network.world.clock
        self._queue: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self._due = 0.0
        self._changed = trio.Event()
        self.cut_after: int | None = None  # bytes until it breaks
        self.is_silent = False
        self.is_broken = False  # now
        self.is_ended: str = ""  # "clean" or "broken", once all that was sent has arrived

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # --- the sender's end

    async def send(self, data: bytes) -> None:
        while self._held_bytes >= PIPE_BYTES and not self._cannot_send():
            await self._changed.wait()
        if self._cannot_send():
            raise trio.BrokenResourceError("the connection is broken")
        if self.is_silent:
            self._held_bytes += len(data)
            return
        if self.cut_after is not None and len(data) >= self.cut_after:
            data = data[: self.cut_after]
            self.is_ended = "broken"
        elif self.cut_after is not None:
            self.cut_after -= len(data)
        self._held_bytes += len(data)
        self._due = max(self._due, self._clock.now + self._network.latency())
        self._due += len(data) / self._network.bytes_per_second
        self._queue.append((self._due, data))
        self._change()

    def _cannot_send(self) -> bool:
        return self.is_broken or bool(self.is_ended)

    # --- the receiver's end

    async def receive(self, size_bytes: int) -> bytes:
        """Some bytes, b"" after a clean end."""
        while True:
            if self.is_broken:
                raise trio.BrokenResourceError("the connection is broken")
            if self._queue and not self.is_silent:
                due, data = self._queue[0]
                if due <= self._clock.now:
                    return self._take(data, size_bytes)
                with trio.move_on_at(due):
                    await self._changed.wait()
                continue
            if self.is_ended and not self.is_silent:
                if self.is_ended == "clean":
                    return b""
                self.break_off()
                continue
            await self._changed.wait()

    def _take(self, data: bytes, size_bytes: int) -> bytes:
        if len(data) > size_bytes:
            self._queue[0] = (self._queue[0][0], data[size_bytes:])
            data = data[:size_bytes]
        else:
            self._queue.popleft()
        was_full = self._held_bytes >= PIPE_BYTES
        self._held_bytes -= len(data)
        if was_full:
            self._change()
        return data

    # --- faults

    def break_off(self) -> None:
        """Both ends see it broken now; what is on its way is lost."""
        self.is_broken = True
        self._change()

    def end(self, how: str) -> None:
        """After what was sent, nothing comes."""
        self.is_ended = self.is_ended or how
        self._change()

    def fall_silent(self) -> None:
        self.is_silent = True
        self._queue.clear()
        self._change()

    def delay(self, seconds: float) -> None:
        """What is on its way comes later."""
        self._queue = deque((due + seconds, data) for due, data in self._queue)
        self._due += seconds
        self._change()


class End:
    """One end of a connection, as `SecureStream` is one."""

    def __init__(self, connection: Connection, incoming: Pipe, outgoing: Pipe) -> None:
        self.connection = connection
        self.sent_bytes = 0
        self.received_bytes = 0
        # What the receiver asks a socket for before it talks.
        self.socket = SimpleNamespace(getpeername=lambda: ("source", 1))
        self._incoming = incoming
        self._outgoing = outgoing
        self._closed = False
        self._process = running.get()

    def belongs_to(self, process: Process) -> None:
        self._process = process

    def peer_certificate_der(self) -> bytes:
        return b"simulated"

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._process is not None and not self._process.alive:
            raise trio.BrokenResourceError("the process was killed")

    async def send_many(self, buffers: Iterable[Buffer]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        data = b"".join(buffers)
        self.sent_bytes += len(data)
        await self._outgoing.send(data)
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def send_all(self, data: bytes) -> None:
        await self.send_many((data,))

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        self._check()
        data = await self._incoming.receive(max_bytes or 65536)
        self._check()
        self.received_bytes += len(data)
        return data

    async def receive_into(self, buffer: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        filled = 0
        while filled < len(buffer):
            self._check()
            data = await self._incoming.receive(len(buffer) - filled)
            self._check()
            if not data:
                raise PeerError("the peer closed the connection early", code="disconnected")
            buffer[filled : filled + len(data)] = data
            filled += len(data)
            self.received_bytes += len(data)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._outgoing.end("clean")
            self._incoming.break_off()
        await trio.lowlevel.checkpoint()

    def die(self, *, silently: bool) -> None:
        """Its process was killed, or its machine lost power (then nobody is told)."""
        if silently:
            self._outgoing.fall_silent()
            self._incoming.fall_silent()
        else:
            self._outgoing.end("broken")
            self._incoming.break_off()


class Connection:
    def __init__(self, network: Network) -> None:
        self.to_receiver = Pipe(network)
        self.to_source = Pipe(network)
        self.source = End(self, self.to_source, self.to_receiver)
        self.receiver = End(self, self.to_receiver, self.to_source)

    def break_off(self) -> None:
        self.to_receiver.break_off()
        self.to_source.break_off()


class Network:
    """All connections between the two machines."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.connections: list[Connection] = []
        self.accepting: trio.MemorySendChannel[End] | None = None
        self.latency_seconds = 0.0005
        self.bytes_per_second = 1e8
        self.is_down = False
        self.on_gap: Callable[[], None] | None = None  # called when the source has told of a gap
        self.on_ack: Callable[[], None] | None = (
            None  # called when the source hears an acknowledgement
        )

    def latency(self) -> float:
        return self.latency_seconds * self.world.chance.uniform(0.5, 2)

    async def connect(self) -> End:
        """The source's end of a new connection. PeerError."""
        await trio.sleep(self.latency())
        if self.is_down or self.accepting is None:
            raise PeerError("cannot reach the receiver", code="unreachable")
        connection = Connection(self)
        self.connections = [*self.connections[-3:], connection]
        self.accepting.send_nowait(connection.receiver)
        return connection.source

    @property
    def newest(self) -> Connection | None:
        return self.connections[-1] if self.connections else None

    def process_died(self, side: str, *, silently: bool = False) -> None:
        """All ends of one side are gone."""
        for connection in self.connections:
            end = connection.source if side == "source" else connection.receiver
            end.die(silently=silently)

    # --- faults

    def cut(self, to_receiver: bool, after_bytes: int) -> None:
        if (connection := self.newest) is not None:
            pipe = connection.to_receiver if to_receiver else connection.to_source
            pipe.cut_after = after_bytes

    def cut_behind_gap(self, then: Callable[[], None]) -> None:
        def cut() -> None:
            self.cut(True, 0)
            then()

        self.on_gap = cut

    def silence(self, which: str) -> None:
        if (connection := self.newest) is not None:
            if which != "to-source":
                connection.to_receiver.fall_silent()
            if which != "to-receiver":
                connection.to_source.fall_silent()

    def half_open(self, delay_seconds: float) -> None:
        if (connection := self.newest) is not None:
            connection.to_receiver.delay(delay_seconds)
            connection.to_source.break_off()

    def go_down(self, *, silently: bool) -> None:
        self.is_down = True
        if silently:
            self.silence("both")
        elif (connection := self.newest) is not None:
            connection.break_off()
