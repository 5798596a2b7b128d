"""The agent: replicates its groups, keeps a session with the receiver, and answers for itself.

It may be killed at any instant. What was written and is not yet durable at the receiver is in the
rings and spools, what may differ is in the hot maps, how far things are the receiver says: a lost
session is simply begun anew, with back-off (model/backoff.py). Groups and disks may come and go
while it runs: `disk add` and `disk remove` change files, which are looked at again every half
second.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from uuid import UUID

import trio

from blockrepl.channel.enrolment import Identity, load_identity, open_transport
from blockrepl.channel.framing import MessageStream
from blockrepl.channel.handshake import RECEIVER_SERVER_NAME, connect
from blockrepl.errors import BlockreplError, StateError, explain
from blockrepl.formats.messages import AGENT_ACCEPTS, RECEIVER_ACCEPTS
from blockrepl.model.backoff import Backoff
from blockrepl.model.bandwidth import BandwidthLimit
from blockrepl.model.scrub import RATE_DEFAULT
from blockrepl.services.agent_session import AgentSession
from blockrepl.services.group_replication import GroupReplication
from blockrepl.services.scrub_pace import ScrubPool
from blockrepl.services.shaping import Shaper
from blockrepl.storage.clock import SourceClock, open_clock
from blockrepl.storage.group_notes import read_note
from blockrepl.storage.growing import grow_disk
from blockrepl.storage.home import Home, exclusive_lock
from blockrepl.storage.source import DiskEntry, SourceDisks
from blockrepl.storage.spool import SpoolLimits

log = logging.getLogger(__name__)

FENCED_SECONDS = 60.0  # until an agent asks again that was refused for a later one
CONFIGURATION_SECONDS = 0.5
CLOCK_SECONDS = 1.0  # how often the agent looks whether the clock's lease is to be renewed

Connect = Callable[[], Awaitable[MessageStream]]


@dataclass(frozen=True, slots=True)
class AgentOptions:
    spool: SpoolLimits = field(default_factory=SpoolLimits)
    bandwidth: BandwidthLimit = field(default_factory=BandwidthLimit)
    scrub_rate: float = RATE_DEFAULT  # bytes per second; 0: no scrub but those asked for


class Agent:
    """The running agent. ``session`` is None while there is none; ``problem`` says why.

    ``connect``, ``clock`` and ``identity`` replace the network, the host's clock, and what `join`
    has written.
    """

    def __init__(
        self,
        home: Home,
        options: AgentOptions | None = None,
        *,
        connect: Connect | None = None,
        clock: SourceClock | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.home = home
        self.options = options or AgentOptions()
        self.identity = identity or load_identity(home.source_directory / "identity")
        self.clock = clock or open_clock(home.source_directory)
        self.disks = SourceDisks(home)
        self.groups: dict[str, GroupReplication] = {}
        self.session: AgentSession | None = None
        self.problem: BlockreplError | None = StateError("not yet connected")
        self.shaper = Shaper(self.options.bandwidth)
        self._connect = connect or self._connect_receiver
        self._scrubs = ScrubPool(self.options.scrub_rate)
        self._source = UUID(self.identity.source_id).bytes
        self._instance = 0  # of this process at the receiver, once it has said so

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._follow_configuration, nursery)
            nursery.start_soon(self._keep_clock)
            nursery.start_soon(self._keep_session)

    async def _keep_clock(self) -> None:
        """Renew the clock's lease ahead of time: a disk that stalls holds up no pump for long."""
        while True:
            if self.clock.is_due():
                with contextlib.suppress(OSError):  # told by a pump, once the lease has run out
                    await trio.to_thread.run_sync(self.clock.renew)
            await trio.sleep(CLOCK_SECONDS)

    # --- groups

    async def _follow_configuration(
        self,
        nursery: trio.Nursery,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        told = ""
        while True:
            try:
                self._follow_groups(nursery)
                told = ""
            except (BlockreplError, OSError) as error:
                if str(error) != told:
                    log.error("the disks cannot be looked at: %s", error)
                told = str(error)
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            await trio.sleep(CONFIGURATION_SECONDS)

    def _follow_groups(self, nursery: trio.Nursery) -> None:
        wanted: dict[str, list[DiskEntry]] = {}
        for entry in self.disks.all():
            wanted.setdefault(entry.group, []).append(entry)
        spooled = self.home.source_directory / "spool"
        names = wanted.keys() | {path.parent.name for path in spooled.glob("*/state.json")}
        held = []
        for name in names | self.groups.keys():
            if lacking := self._unreadable_disks(name):
                held.append(
                    f"until the entry of disk {', '.join(sorted(lacking))} can be read, or is "
                    f"removed, group {name} stays as it is"
                )
            else:
                self._follow_group(nursery, name, wanted.get(name, []), is_due=name in names)
        if held:
            raise StateError("; ".join(sorted(held)))

    def _unreadable_disks(self, name: str) -> set[str]:
        """Those of a group: without them it would be attached as if they had been removed, and the
        receiver would retire them.
        """
        unreadable = self.disks.unreadable
        if not unreadable:
            return set()
        if name in self.groups:
            return unreadable & {entry.name for entry in self.groups[name].entries}
        note = read_note(self.home, name)
        return unreadable & set(note.disks) if note is not None else set()

    def _follow_group(
        self, nursery: trio.Nursery, name: str, entries: list[DiskEntry], *, is_due: bool
    ) -> None:
        group = self.groups.get(name)
        if group is not None and group.finished:
            group.end()
            del self.groups[name]
            group = None
        if group is None:
            if not is_due:
                return
            group = GroupReplication(
                name, self.disks, self._source, self.clock, self.options.spool, self._scrubs
            )
            self.groups[name] = group
            group.entries = entries
            nursery.start_soon(group.run)
        group.entries = entries

    async def grow(self, name: str, size_bytes: int) -> DiskEntry:
        """Give a disk the size that its image has got. StateError, StorageError."""
        entry = self.disks.load(name)
        group = self.groups.get(entry.group)
        if group is None:  # nothing of it is open yet
            return grow_disk(self.disks, name, size_bytes, self.clock)
        return await group.grow(entry, size_bytes)

    # --- the session

    async def _keep_session(self) -> None:
        backoff = Backoff()
        while True:
            begun, session_seconds = trio.current_time(), 0.0
            try:
                await self._one_session()
            except BlockreplError as error:
                if self.problem is None or str(error) != str(self.problem):
                    log.warning("no session with %s: %s", self.identity.address, explain(error))
                self.problem = error
            finally:
                if self.session is not None:
                    session_seconds = trio.current_time() - begun
                self.session = None
            wait_seconds = backoff.wait_seconds(session_seconds, random.random())
            if self.problem is not None and self.problem.code == "fenced":
                wait_seconds = FENCED_SECONDS
            await trio.sleep(wait_seconds)

    async def _connect_receiver(self) -> MessageStream:
        context = self.identity.context()  # first: when it fails there is nothing to close
        transport = await open_transport(self.identity.address)
        stream = await connect(transport, context, RECEIVER_SERVER_NAME)
        return MessageStream(stream, {**AGENT_ACCEPTS, **RECEIVER_ACCEPTS})

    async def _one_session(self) -> None:
        async with await self._connect() as messages:
            session = AgentSession(messages, self.groups, self.shaper.shape, self._instance)
            await session.run(self._welcomed)

    def _welcomed(self, session: AgentSession) -> None:
        self.session, self._instance, self.problem = session, session.instance, None
        log.info("connected to %s", self.identity.address)


async def run_agent(home: Home, options: AgentOptions, *, ready: Callable[[Agent], None]) -> None:
    """Run the agent of a home until cancelled. StateError when one runs already."""
    from blockrepl.services.agent_api import agent_application
    from blockrepl.services.control import serve_control

    with exclusive_lock(home.run_directory / "agent.lock", f"the source at {home.path}"):
        agent = Agent(home, options)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, agent_application(agent), home.agent_socket)
            ready(agent)
            await agent.run()
