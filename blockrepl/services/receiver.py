"""The receiver: one port, many sources, one committer per group.

Limits at the door: HANDSHAKES_MAX connections that have not shown who they are, SESSIONS_MAX that
have; more are closed at once. A source has one session: a new one replaces the older, unless it is
of an agent process that started earlier (storage/trust.py): then it is refused, and the session
there is does not notice. When the later one has gone, the earlier comes back (model/presence.py).
A source that is revoked, by whatever process, is dropped within half a second.

Nothing that one peer does ends another's session: every connection's failure stays in its task.
"""

from __future__ import annotations

import errno
import logging
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import trio

from blockrepl import limits
from blockrepl.channel.certificates import Authority, read_identity
from blockrepl.channel.enrolment import serve_enrolment
from blockrepl.channel.framing import MessageStream
from blockrepl.channel.handshake import ENROL_SERVER_NAME, accept, server_contexts
from blockrepl.channel.secure_stream import SecureStream
from blockrepl.errors import (
    BlockreplError,
    PeerError,
    StateError,
    StorageError,
    TrustError,
    UsageError,
    explain,
)
from blockrepl.formats import messages
from blockrepl.formats.messages import RECEIVER_ACCEPTS, Request, ScrubPass
from blockrepl.model.presence import Presence
from blockrepl.services.control import serve_control
from blockrepl.services.group_committer import GroupCommitter, MemoryBudget
from blockrepl.services.index_merging import IndexMerging
from blockrepl.services.receiver_api import (
    Checkpoint,
    GroupStatus,
    NewCheckpoint,
    Status,
    receiver_application,
)
from blockrepl.services.receiver_groups import ReceiverGroups
from blockrepl.services.receiver_home import (
    join_address,
    load_authority,
    open_trust,
    read_configuration,
)
from blockrepl.services.receiver_sessions import SourceSession
from blockrepl.services.receiver_status import (
    GroupFacts,
    describe_group,
    facts_of,
    facts_of_failed,
    newest_gaps,
)
from blockrepl.services.retention import PASS_SECONDS, Retention
from blockrepl.services.retention_status import (
    RetentionStatus,
    check_policy,
    check_shortening,
    describe_retention,
)
from blockrepl.services.verification import DiskProof, describe_proofs
from blockrepl.storage.home import Home, check_name, exclusive_lock, make_directory
from blockrepl.storage.retained import Policy, write_policy
from blockrepl.storage.trust import TrustStore, fenced

logger = logging.getLogger(__name__)

TRUST_SECONDS = 0.25  # how often changes of trust by other processes are looked for
BACKLOG_CONNECTIONS = 128


class Receiver:
    """A running receiver."""

    def __init__(
        self, home: Home, name: str, authority: Authority, trust: TrustStore, groups: ReceiverGroups
    ) -> None:
        self.name = name
        self.groups = groups
        self._home = home
        self._authority = authority
        self._trust = trust
        self._contexts: dict[str, ssl.SSLContext] = server_contexts(
            authority.ca_pem, authority.server_certificate_path, authority.server_key_path
        )
        self._budget = groups.budget
        self._handshakes = 0
        self._greeting: dict[bytes, SourceSession] = {}  # connected, hello not yet said
        self._sessions: dict[bytes, SourceSession] = {}
        self._admitting = trio.StrictFIFOLock()
        self._presence = Presence(trio.current_time())
        self._source_names: dict[bytes, str] = {}
        self.passes: dict[bytes, ScrubPass] = {}  # by disk, as their sources told last
        self._retention = Retention()

    # Connections

    async def serve(self, transport: trio.SocketStream) -> None:
        """One connection, from its first byte to its last. Raises nothing that a peer caused."""
        if self._handshakes >= limits.HANDSHAKES_MAX:
            await trio.aclose_forcefully(transport)
            return
        peer = _peer_address(transport)  # known while it is connected only
        try:
            stream = await self._let_in(transport)
            if stream is not None:
                async with MessageStream(stream, RECEIVER_ACCEPTS) as channel:
                    await self._serve_source(stream, channel)
        except BlockreplError as error:
            logger.info("connection of %s dropped: %s", peer, error)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.info("connection of %s lost: %s", peer, error)
        except Exception:
            logger.exception("connection of %s dropped: a defect of ours", peer)
        finally:
            await trio.aclose_forcefully(transport)

    async def _let_in(self, transport: trio.SocketStream) -> SecureStream | None:
        """The stream of a source that showed its certificate; None when it came to enrol."""
        self._handshakes += 1
        try:
            stream = await accept(transport, self._contexts)
            if stream.server_name != ENROL_SERVER_NAME:
                return stream
            await serve_enrolment(stream, self._authority, self._trust.redeem, time.time_ns)
            return None
        finally:
            self._handshakes -= 1

    async def _serve_source(self, stream: SecureStream, channel: MessageStream) -> None:
        identity = read_identity(stream.peer_certificate_der() or b"")
        session = SourceSession(
            channel,
            identity,
            UUID(identity.source_id).bytes,
            receiver=self.name,
            groups=self.groups,
            budget=self._budget,
            admit=self._admit,
        )
        known = self._sessions.keys() | self._greeting.keys()
        if len(known) >= limits.SESSIONS_MAX and session.source not in known:
            session.end(PeerError("the receiver has as many sessions as it can", code="busy"))
        if older := self._greeting.get(session.source):
            older.end(_replaced())
        self._greeting[session.source] = session
        self._source_names[session.source] = identity.name
        try:
            # Registered first: a revocation from here on finds the session.
            await self._check_trust(session)
            logger.info("source %s: session begun", identity.name)
            await session.run()
        finally:
            for sessions in (self._greeting, self._sessions):
                if sessions.get(session.source) is session:
                    del sessions[session.source]
            if session.instance:
                self._presence.ended(session.source, session.instance, trio.current_time())

    async def _admit(self, session: SourceSession, instance: int) -> int:
        """Let an agent process in that has said hello; the session before it ends."""
        async with self._admitting:
            there = self._sessions.get(session.source)
            may_return = self._presence.may_return(
                session.source, instance, there.instance if there else 0, trio.current_time()
            )
            admit = partial(self._trust.admit, may_return=may_return)
            number = await trio.to_thread.run_sync(admit, session.identity.source_id, instance)
            if self._greeting.get(session.source) is session:
                del self._greeting[session.source]
            older = self._sessions.get(session.source)
            self._sessions[session.source] = session
        if older is not None:
            older.end(_replaced() if older.instance == number else fenced())
        return number

    async def _check_trust(self, session: SourceSession) -> None:
        if await trio.to_thread.run_sync(self._trust.is_revoked, session.identity.serial):
            session.end(
                TrustError(
                    "this source is no longer trusted by the receiver",
                    hint="join again with a new token, in a new home",
                    code="revoked",
                )
            )

    async def watch_trust(self) -> None:
        """Notice what other processes change; until cancelled."""
        seen = -1
        while True:
            try:
                version = await trio.to_thread.run_sync(self._trust.data_version)
                if version != seen:
                    await self._follow_trust()
                    seen = version
            except StorageError as error:
                logger.error("revocations cannot be seen: %s", error)
            await trio.sleep(TRUST_SECONDS)

    async def _follow_trust(self) -> None:
        sources = await trio.to_thread.run_sync(self._trust.list_sources)
        self._source_names = {UUID(one.id).bytes: one.name for one in sources}
        for session in [*self._greeting.values(), *self._sessions.values()]:
            await self._check_trust(session)

    # Control

    async def status(self) -> Status:
        groups = [
            await self._describe(committer) for committer in list(self.groups.committers.values())
        ]
        for name, error in self.groups.failures.items():
            directory = self._home.replica_directory(name)
            facts = await trio.to_thread.run_sync(facts_of_failed, directory, error)
            groups.append(self.describe(facts, 0.0))
        groups.sort(key=lambda group: group.name)
        return Status(name=self.name, running=True, groups=groups)

    async def _describe(self, committer: GroupCommitter) -> GroupStatus:
        known = self._retention.groups.get(committer.replica.name)
        problem = known.problem if known else ""
        unreadable = self.groups.comparisons.unreadable(committer.replica.name)
        facts = await trio.to_thread.run_sync(facts_of, committer.replica, problem, unreadable)
        return self.describe(facts, committer.throughput.per_second())

    def describe(self, facts: GroupFacts, bytes_per_second: float) -> GroupStatus:
        return describe_group(
            facts,
            connected=self._connected(facts.name),
            source_names=self._source_names,
            bytes_per_second=bytes_per_second,
            passes=self.passes,
            refused=self._refused(facts.name),
        )

    def _refused(self, group: str) -> dict[bytes, BlockreplError]:
        return {
            source: session.refusals[group]
            for source, session in self._sessions.items()
            if group in session.refusals
        }

    def _connected(self, group: str) -> set[bytes]:
        return {source for source, session in self._sessions.items() if session.has_group(group)}

    async def place_seed(self, group: str, disk: str) -> None:
        await self.groups.place_seed(check_name(group, "group"), check_name(disk, "disk"))

    async def verify(self, group: str) -> list[DiskProof]:
        return await self._proofs(self.groups.find(group))

    async def _proofs(self, committer: GroupCommitter) -> list[DiskProof]:
        replica = committer.replica
        disks = replica.status().disks
        unreadable = self.groups.comparisons.unreadable(replica.name)
        return await trio.to_thread.run_sync(
            lambda: describe_proofs(replica.proofs, disks, self.passes, unreadable, time.time_ns())
        )

    async def begin_verify(self, group: str) -> list[DiskProof]:
        """Ask the sources for a pass; what was proven before it. StateError when none is here."""
        proofs = await self.verify(group)
        asked = [session.verify(group) for session in self._sessions.values()]
        if not any(asked):
            for error in self._refused(group).values():
                raise StateError(
                    f"group {group} is refused to its source: {error}",
                    hint=error.hint,
                    code=error.code,
                )
            raise StateError(
                f"no source of group {group} is connected: only it can read its disks",
                hint="see `blockrepl status`; start the agent there, or wait until it is back",
                code="disconnected",
            )
        return proofs

    async def checkpoints(self, group: str) -> list[Checkpoint]:
        return await self.groups.checkpoints(self.groups.find(group))

    async def create_checkpoint(self, group: str, wanted: NewCheckpoint) -> Checkpoint:
        return await self.groups.create_checkpoint(self.groups.find(group), wanted)

    async def remove_checkpoint(self, group: str, name: str) -> Checkpoint:
        return await self.groups.remove_checkpoint(self.groups.find(group), name, kept_too=True)

    async def keep_checkpoint(self, group: str, name: str, kept: bool) -> Checkpoint:
        return await self.groups.keep_checkpoint(self.groups.find(group), name, kept)

    # Retention

    async def keep_retention(self) -> None:
        """A pass over every group now and then, until cancelled."""
        while True:
            await trio.sleep(PASS_SECONDS)
            for committer in list(self.groups.committers.values()):
                await self._retention.run_pass(committer)

    async def retention(self, group: str, policy: Policy | None = None) -> RetentionStatus:
        """What retention keeps of a group, or what it would with another policy. UsageError.

        A group that takes nothing says why here, too.
        """
        replica = self.groups.find(group).replica
        if policy is not None:
            await trio.to_thread.run_sync(check_policy, replica.catalog, policy)
        known = self._retention.groups.get(group)
        problem = known.problem if known and policy is None else ""
        if replica.error is not None:
            problem = explain(replica.error)
        return await trio.to_thread.run_sync(
            lambda: describe_retention(
                replica.directory,
                replica.catalog,
                replica.segments(),
                replica.newest_ns(),
                problem,
                policy,
            )
        )

    async def set_retention(self, group: str, policy: Policy, shorten: bool) -> RetentionStatus:
        """Keep a group's history by this policy from now on. UsageError; StateError when that lets
        go of history at once, unless ``shorten``.
        """
        committer = self.groups.find(group)
        catalog = committer.replica.catalog
        await trio.to_thread.run_sync(check_policy, catalog, policy)
        if not shorten:
            status = await self.retention(group)
            await trio.to_thread.run_sync(check_shortening, catalog, status, policy)
        await committer.perform(lambda: write_policy(catalog, policy))
        return await self.retention(group)

    async def run_retention(self, group: str) -> RetentionStatus:
        await self._retention.run_pass(self.groups.find(group))
        return await self.retention(group)

    async def answer(self, committer: GroupCommitter, source: bytes, request: Request) -> Any:
        """Answer a source's request about a group of its own, with what a message takes."""
        match request.verb:
            case "group-status":
                status = await self._describe(committer)
                status.gaps = newest_gaps(status.gaps, messages.GAPS_TOLD_MAX)
                return status.model_dump()
            case "verify":
                disks = committer.replica.status().disks
                own = {disk.id for disk in disks if disk.source == source}  # others share groups
                told = {one.disk.bytes: one for one in request.passes}
                self.passes.update({disk: told[disk] for disk in told.keys() & own})
                return [proof.model_dump() for proof in await self._proofs(committer)]
            case "checkpoint-list":
                found = await self.groups.checkpoints(committer, request.name)
                return [one.model_dump() for one in found[-messages.CHECKPOINTS_TOLD_MAX :]]
            case "checkpoint-remove":
                name = request.name or ""
                removed = await self.groups.remove_checkpoint(committer, name, kept_too=False)
                return removed.model_dump()


async def run_receiver(home: Home, host: str, port: int, *, ready: Callable[[str], None]) -> None:
    """Serve until cancelled; then everything is committed and closed.

    ``ready`` gets the address (HOST:PORT) once sources may connect. StateError when the home has no
    receiver or is in use, or the address is taken; UsageError when the host cannot be one's name.
    """
    configuration = read_configuration(home)
    authority = load_authority(home)
    make_directory(home.replicas)
    with exclusive_lock(home.run_directory / "receiver.lock", f"the receiver's home {home.path}"):
        listeners = await _listen(host, port)
        trust = await trio.to_thread.run_sync(open_trust, home)
        groups: ReceiverGroups | None = None
        try:
            async with trio.open_nursery() as nursery:
                groups = ReceiverGroups(
                    home, trust, nursery, MemoryBudget(limits.RECEIVE_BYTES_MAX)
                )
                receiver = Receiver(home, configuration.name, authority, trust, groups)
                groups.answer_with = receiver.answer
                await groups.open_all()
                application = receiver_application(receiver)
                await nursery.start(serve_control, application, home.receiver_socket)
                nursery.start_soon(receiver.watch_trust)
                nursery.start_soon(groups.write_proofs)
                nursery.start_soon(groups.sweep_forks)
                nursery.start_soon(IndexMerging(groups.committers).run)
                nursery.start_soon(receiver.keep_retention)
                nursery.start_soon(partial(trio.serve_listeners, receiver.serve, listeners))
                ready(_address(listeners[0]))
        finally:
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()
                if groups is not None:
                    await groups.close_all()
                trust.close()


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(port, host=host or None, backlog=BACKLOG_CONNECTIONS)
    except UnicodeError as error:  # a label of it is empty or too long
        raise UsageError(
            f"{host[:80]!r} is no host's name", hint="choose another with --listen HOST:PORT"
        ) from error
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise StateError(
            f"cannot listen on {host}:{port}: "
            f"{'the port is in use' if taken else error.strerror or error}",
            hint="stop what uses it, or choose another address with --listen HOST:PORT",
            code="port-in-use" if taken else "listen",
        ) from error


def _replaced() -> PeerError:
    return PeerError("another session of this source has begun", code="replaced")


def _address(listener: trio.SocketListener) -> str:
    return join_address(*listener.socket.getsockname()[:2])


def _peer_address(transport: trio.SocketStream) -> str:
    try:
        return join_address(*transport.socket.getpeername()[:2])
    except OSError:
        return "a peer that has gone"
