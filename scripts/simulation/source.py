"""The source's machine: images, rings, the agent (the product's), and the disks' servers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import trio
from typing_extensions import Buffer

from blockrepl.channel.enrolment import Identity
from blockrepl.channel.framing import MessageStream
from blockrepl.errors import StorageError
from blockrepl.formats import frame as frames
from blockrepl.formats import messages
from blockrepl.formats.marks import GapMark, decode_mark
from blockrepl.formats.messages import AGENT_ACCEPTS, RECEIVER_ACCEPTS, MessageType
from blockrepl.services import disk_sync, scrubber, source_disk
from blockrepl.services.agent import Agent, AgentOptions
from blockrepl.services.group_replication import GroupReplication
from blockrepl.storage import clock, flush_watch, group_notes, retiring, ring, source, spool
from blockrepl.storage.clock import open_clock
from blockrepl.storage.home import Home, write_atomically
from blockrepl.storage.image import is_locked
from blockrepl.storage.ring import RingReader
from blockrepl.storage.source import DiskEntry, SourceDisks
from blockrepl.storage.spool import Spool, SpoolLimits
from scripts.simulation.capture import Server
from scripts.simulation.files import Machine, SimulatedFiles
from scripts.simulation.link import End, Network
from scripts.simulation.model import Model
from scripts.simulation.plan import Plan, Request
from scripts.simulation.substitutes import SOURCE_ID
from scripts.simulation.world import Process, World, running

GROUP = "group"


class ObservedStream(MessageStream):
    """The agent's channel; what passes goes to the trace, what it is told to the model."""

    def __init__(self, end: End, world: World, network: Network, model: Model) -> None:
        accepted = {**AGENT_ACCEPTS, **RECEIVER_ACCEPTS}
        super().__init__(end, accepted)  # type: ignore[arg-type]
        self._world = world
        self._network = network
        self._model = model
        self._generation = model.generation

    async def send_taken(
        self, message_type: int, payload_bytes: int, take: Callable[[], Iterable[Buffer]]
    ) -> None:
        taken: list[Buffer] = []

        def seen() -> Iterable[Buffer]:
            taken.extend(take())
            self._see(message_type, taken)
            return taken

        await super().send_taken(message_type, payload_bytes, seen)
        call = self._network.on_gap
        if call is not None and message_type == MessageType.DATA and _is_gap(taken):
            self._network.on_gap = None
            call()

    def _see(self, message_type: int, buffers: Sequence[Buffer]) -> None:
        name = MessageType(message_type).name
        if message_type == MessageType.DATA:
            header = frames.decode_header(memoryview(buffers[0])[: frames.HEADER_BYTES])
            if header.number:
                self._model.sent(header.number, header.watermark)
            kind = frames.FrameKind(header.kind).name
            self._world.trace("->", kind, header.number, header.record_count, header.watermark)
        elif message_type != MessageType.PING:
            self._world.trace("->", name)

    async def receive(self) -> tuple[int, memoryview] | None:
        message = await super().receive()
        if message is None:
            self._world.trace("<-", "end")
            return None
        kind, payload = message
        if kind == MessageType.ACK:
            _, durable_count, number = messages.decode_ack(payload)
            self._world.trace("<-", "ACK", durable_count, number)
            if self._generation == self._model.generation:  # else of before a roll-back
                self._model.acknowledged(number)
            if self._network.on_ack is not None:
                self._network.on_ack()
        elif kind in {MessageType.ERROR, MessageType.ATTACHED}:
            self._world.trace("<-", MessageType(kind).name, bytes(payload).decode())
        elif kind != MessageType.PONG:
            self._world.trace("<-", MessageType(kind).name)
        return message


def _is_gap(buffers: Sequence[Buffer]) -> bool:
    data = b"".join(buffers)
    header = frames.decode_header(memoryview(data)[: frames.HEADER_BYTES])
    if header.kind != frames.FrameKind.MARK:
        return False
    body = memoryview(data)[frames.HEADER_BYTES :]
    return isinstance(decode_mark(frames.decode_payload(header, body)), GapMark)


class _DeadWords:
    """The words of a ring, to a process that is no more: it changes nothing."""

    def __init__(self, words: Any) -> None:
        self.load = words.load
        self.fence = words.fence

    def store(self, _offset: int, _value: int) -> None: ...

    def store_byte(self, _offset: int, _value: int) -> None: ...

    def swap(self, _offset: int, _expected: int, _desired: int) -> bool:
        return False


class _Reader(RingReader):
    """The agent's end of a ring; dead when the agent is."""

    def __init__(self, path: Path, disk: bytes) -> None:
        super().__init__(path, disk)
        process = running.get()
        assert process is not None
        process.on_death.append(self._die)

    def _die(self) -> None:
        self._words = _DeadWords(self._words)  # type: ignore[assignment]
        self.stale, self.syncing = self.stale.copy(), self.syncing.copy()


class _System:
    """The module `os`; what is synced, the machine knows of."""

    def __init__(self, machine: Machine) -> None:
        self.fsync = machine.sync

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class SourceMachine:
    def __init__(self, world: World, plan: Plan, network: Network, model: Model) -> None:
        self.world = world
        self.plan = plan
        self.machine = Machine(world, "source")  # of images and hot maps
        self.spool_machine = Machine(world, "spool")  # of the home; may be full
        self.network = network
        self.model = model
        self.agent: Agent | None = None
        self.agent_process: Process | None = None
        self.agent_down_until = 0.0
        self.servers: dict[str, Server] = {}
        self.server_down_until = {disk.name: disk.served_from for disk in plan.disks}
        self.boots = 0
        self._is_losing_power = False
        self._spool_states: list[bytes] = []
        (world.directory / "shm").mkdir()
        self._boot()
        self.home = Home.create(world.directory / "source")
        self.home.source_directory.mkdir()
        self.disks = SourceDisks(self.home)
        self.entries = [self._add(disk.name, disk.initial, disk.ring_bytes) for disk in plan.disks]
        self.clock = open_clock(self.home.source_directory)
        self._identity = Identity("source", SOURCE_ID, "1", "receiver", world.directory)

    def _add(self, name: str, initial: bytes, ring_bytes: int) -> DiskEntry:
        image = self.world.directory / f"{name}.img"
        descriptor = os.open(image, os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, len(initial))
        for at in range(0, len(initial), 4096):  # sparse where it is zeros
            if any(piece := initial[at : at + 4096]):
                os.pwrite(descriptor, piece, at)
        os.close(descriptor)
        return self.disks.add(name, image, GROUP, create_bytes=None, ring_bytes=ring_bytes)

    def _boot(self) -> None:
        self.boots += 1
        (self.world.directory / "boot_id").write_text(f"boot {self.boots}\n")

    def content(self, name: str) -> bytes:
        return (self.world.directory / f"{name}.img").read_bytes()

    # --- what the product's files at the source go through

    def replacements(self) -> Iterator[tuple[object, str, object]]:
        for module in (source, retiring, clock, group_notes):
            yield module, "write_atomically", self._write_atomically
        yield spool, "Files", lambda: SimulatedFiles(self.spool_machine)
        yield Spool, "_write_state", self._crashing("spool state", Spool._write_state)
        yield Spool, "_add_file", self._crashing("spool file", Spool._add_file)
        yield source_disk, "RingReader", _Reader
        yield retiring, "os", _System(self.machine)
        yield flush_watch, "os", _System(self.machine)
        yield scrubber.GroupScrub, "_judge", self._judging(scrubber.GroupScrub._judge)

    def _judging(self, judge: Callable[..., None]) -> Callable[..., None]:
        """Nobody flips a byte here: what a scrub finds has diverged, and would be healed unseen."""

        def judging(
            scrubs: object, disk: bytes, scrub: object, read: Any, stamp: int, differing: Any
        ) -> None:
            if differing:
                self.world.failures.append(f"the scrub finds a difference at {read.offset}")
            judge(scrubs, disk, scrub, read, stamp, differing)

        return judging

    def _write_atomically(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        self.world.operation(f"write of {path.name}")
        process = running.get()
        if self.spool_machine.full and process is not None and process is self.agent_process:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomically(path, data, mode)
        self.world.operation(f"the step after the write of {path.name}")

    def _crashing(self, what: str, call: Callable[..., None]) -> Callable[..., None]:
        def crashing(spooler: Spool, *arguments: Any, **options: Any) -> None:
            self.world.operation(what)
            if self.spool_machine.full:
                raise StorageError("no room left", code="full")
            path = spooler.directory / spool.STATE
            if path.exists():
                self._spool_states.append(path.read_bytes())
            call(spooler, *arguments, **options)
            if options.get("durably"):
                self._spool_states.clear()
            self.world.operation(f"the step after {what}")

        return crashing

    # --- the agent

    async def keep_agent(self) -> None:
        """Run it, again and again."""
        while True:
            await trio.sleep_until(self.agent_down_until)
            if trio.current_time() < self.agent_down_until:
                continue
            process = self.agent_process = Process("agent")
            process.on_death.append(self._agent_died)
            self.world.trace("start", "agent")
            disk_sync.tokens = count(1)  # as in a new process
            setattr(scrubber, "tokens", disk_sync.tokens)  # noqa: B010
            await self.world.run(process, self._run_agent)
            await trio.sleep(0.01)

    async def _run_agent(self) -> None:
        try:
            opened = open_clock(self.home.source_directory)
        except OSError:
            return  # the home is full: it ends with that, and whoever started it does so again
        self.agent = Agent(
            self.home,
            AgentOptions(
                SpoolLimits(self.plan.spool_bytes, 0), scrub_rate=self.plan.scrub_bytes_per_second
            ),
            connect=self._connect,
            clock=opened,
            identity=self._identity,
        )
        await self.agent.run()

    async def _connect(self) -> ObservedStream:
        end = await self.network.connect()
        self.world.trace("connected")
        return ObservedStream(end, self.world, self.network, self.model)

    def _agent_died(self) -> None:
        self.agent = self.agent_process = None
        self.network.process_died("source", silently=self._is_losing_power)

    def kill_agent(self, down_seconds: float) -> None:
        self.agent_down_until = max(self.agent_down_until, self.world.clock.now + down_seconds)
        if self.agent_process is not None:
            self.agent_process.die()

    @property
    def group(self) -> GroupReplication | None:
        return self.agent.groups.get(GROUP) if self.agent is not None else None

    @property
    def noted_number(self) -> int:
        """Which frame is due, as the source's note says: a little old, and durable."""
        note = group_notes.read_note(self.home, GROUP)
        return note.next_number if note is not None else 0

    @property
    def remembered_number(self) -> int:
        """The same with what the rings say: to the frame, until the machine loses its power."""
        paths = (ring.ring_path(entry.id.bytes) for entry in self.entries)
        return max([self.noted_number, *(ring.read_next_number(path) for path in paths)])

    # --- servers

    async def keep_server(self, entry: DiskEntry) -> None:
        while True:
            until = self.server_down_until[entry.name]
            await trio.sleep_until(until)
            if trio.current_time() < self.server_down_until[entry.name]:
                continue
            # By the agent, with the disk's lock: no thread can wait here.
            while is_locked(entry.image):
                await trio.sleep(0.001)
            model = self.model.disks[entry.name]
            server = Server(self.world, self.machine, self.disks, entry, model)
            self.world.trace("start", server.process.name, server.geometry.ring_id)
            self.servers[entry.name] = server
            server.process.on_death.append(lambda: self._server_died(entry))
            await self.world.run(server.process, server.run)
            await trio.sleep(0.001)

    def _server_died(self, entry: DiskEntry) -> None:
        del self.servers[entry.name]

    def kill_server(self, name: str, down_seconds: float) -> None:
        until = self.world.clock.now + down_seconds
        self.server_down_until[name] = max(self.server_down_until[name], until)
        if name in self.servers:
            self.servers[name].process.die()

    def stop_server(self, name: str, down_seconds: float) -> None:
        """As its owner stops it: after the requests under way."""
        if name in self.servers and not self.servers[name].is_busy:
            self.kill_server(name, down_seconds)
            self.disks.socket_path(self.disks.load(name)).unlink(missing_ok=True)

    def request(self, request: Request) -> None:
        """The guest's; lost while nobody serves the disk."""
        server = self.servers.get(self.plan.disks[request.disk].name)
        if server is not None:
            server.submit(request)

    # --- the machine

    def lose_power(self, down_seconds: float) -> None:
        """All processes, the rings, and what was not synced are gone."""
        process = running.set(None)  # what follows is not done by the one that it may strike
        self._lose_power(down_seconds)
        running.reset(process)

    def _lose_power(self, down_seconds: float) -> None:
        instant = self.clock.now()
        for disk in self.model.disks.values():
            disk.cause("power", instant, self.model.acknowledged_watermark + 1)
        self._is_losing_power = True
        self.kill_agent(down_seconds)
        for entry in self.entries:
            self.kill_server(entry.name, down_seconds)
        self._is_losing_power = False
        for path in (self.world.directory / "shm").iterdir():
            path.unlink()
        self.machine.lose_power()
        self.spool_machine.lose_power()
        self._lose_spool()
        self._boot()
        for entry in self.entries:
            self.model.disks[entry.name].reset(instant, self.content(entry.name))
        self.clock = open_clock(self.home.source_directory)

    def _lose_spool(self) -> None:
        """Its small files are never synced."""
        chance = self.world.chance
        path = self.home.source_directory / "spool" / GROUP / spool.STATE
        if not path.exists():
            return
        fates = ("kept", "kept", "older", "gone", "cut") if self._spool_states else ("kept",)
        fate = chance.choice(fates)
        self.world.trace("power", "source", path.name, fate)
        if fate == "gone":
            path.unlink()
        elif fate == "cut":
            os.truncate(path, chance.randrange(path.stat().st_size))
        elif fate == "older":
            path.write_bytes(chance.choice(self._spool_states[-3:]))
