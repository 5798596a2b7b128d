"""One run: the machines, the guest and the faults of a seed, and the checkers beside them.

1. Everything runs; the guest writes and faults happen as planned (plan.py).
2. The faults are over: the link works, what is down comes up, disks have room.
3. Both sides must come to the same within CONVERGE_SECONDS, and the checkers look for a last time.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from blockrepl.errors import StateError
from blockrepl.services.group_pump import WantedCheckpoint
from scripts.simulation import checkers
from scripts.simulation.link import Network
from scripts.simulation.model import DiskModel, Model
from scripts.simulation.plan import Fault, make_plan
from scripts.simulation.replica_side import ReceiverMachine
from scripts.simulation.source import SourceMachine
from scripts.simulation.world import Violation, World

SETTLE_SECONDS = 0.2
CONVERGE_SECONDS = 60.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Outcome:
    seed: int
    digest: str  # of the trace
    violation: str = ""


def simulate(seed: int, show: Callable[[str], None] | None = None) -> Outcome:
    """Run a seed. ``show`` gets the lines of its trace."""
    directory = Path(tempfile.mkdtemp(prefix="blockrepl-simulation-", dir=SHARED_MEMORY))
    try:
        world = World(seed, directory, show)
        violation = ""
        try:
            _run(world)
        except Violation as found:
            violation = str(found)
        except BaseExceptionGroup as group:
            found_in, others = group.split(Violation)
            if found_in is None:
                raise
            violation = str(_first(found_in))
            if others is not None and others.subgroup(Exception) is not None:
                violation += f" (and {others.exceptions!r})"
        return Outcome(seed, world.trace_digest(), violation)
    finally:
        shutil.rmtree(directory)


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def _run(world: World) -> None:
    plan = make_plan(world.seed)
    world.scale.update(plan.scale)
    with world.installed():
        run = Run(world)
        with world.replaced(run.source.replacements()), world.replaced(run.receiver.replacements()):
            trio.run(run.main, clock=world.clock)


class Run:
    def __init__(self, world: World) -> None:
        self.world = world
        self.plan = make_plan(world.seed)
        self.model = Model({d.name: DiskModel(d.name, d.initial) for d in self.plan.disks})
        self.network = Network(world)
        self.network.latency_seconds = self.plan.latency_seconds
        self.source = SourceMachine(world, self.plan, self.network, self.model)
        self.receiver = ReceiverMachine(world, self.network, self.model)
        self._chance = random.Random(f"checkers {world.seed}")

    async def main(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.receiver.keep)
            nursery.start_soon(self.source.keep_agent)
            for entry in self.source.entries:
                nursery.start_soon(self.source.keep_server, entry)
            nursery.start_soon(self._guest)
            for fault in self.plan.faults:
                nursery.start_soon(self._fault, fault)
            nursery.start_soon(self._watch)
            await trio.sleep(self.plan.active_seconds + SETTLE_SECONDS)
            self._end_faults()
            await self._converge()
            nursery.cancel_scope.cancel()

    async def _guest(self) -> None:
        for request in self.plan.requests:
            await trio.sleep_until(request.at)
            self.source.request(request)

    async def _watch(self) -> None:
        while True:
            await trio.sleep(0.05)
            self._check_failures()
            checkers.check_limits(self.source.group, self.plan.spool_bytes)
            if self._chance.random() < 0.1:
                checkers.check_store(self.receiver.directory, self.model, self._chance, 3)

    def _check_failures(self) -> None:
        if self.world.failures:
            raise Violation(self.world.failures[0])

    # --- the end

    def _end_faults(self) -> None:
        self.world.trace("the faults are over")
        self.world.no_more_crashes()
        now = self.world.clock.now
        self.receiver.down_until = self.source.agent_down_until = now
        self.source.server_down_until = dict.fromkeys(self.source.server_down_until, now)
        self.receiver.machine.full = self.source.spool_machine.full = False
        if self.receiver.files.fails or self.receiver.has_failed:
            self.receiver.files.fails = False
            self.receiver.kill(0)
        self.network.is_down = False
        self.network.bytes_per_second = 1e8

    async def _converge(self) -> None:
        until = self.world.clock.now + CONVERGE_SECONDS
        while why := self._why_not_converged():
            if self.world.clock.now > until:
                raise Violation(f"does not converge: {why}")
            await trio.sleep(0.1)
        self.world.trace("converged")
        self._check_failures()
        images = {name: self.source.content(name) for name in self.model.disks}
        directory = self.receiver.directory
        checkers.check_converged(directory, self.model, images)
        checkers.check_store(directory, self.model, self._chance)

    def _why_not_converged(self) -> str:
        if len(self.source.servers) < len(self.plan.disks):  # only it knows what it had in flight
            return "a disk's server is not back"
        if any(server.is_busy for server in self.source.servers.values()):
            return "requests are under way"
        if self.receiver.has_failed:
            self.receiver.kill(0)
        committer = self.receiver.committer
        replica = committer.replica if committer is not None else None
        return checkers.why_not_converged(replica, self.source.group, self.model)

    # --- faults

    async def _fault(self, fault: Fault) -> None:
        await trio.sleep_until(fault.at)
        self.world.trace("fault", fault.kind, f"{fault.seconds:.3f}", fault.operations)
        what, _, how = fault.kind.partition(" ")
        match what:
            case "source" if how == "power behind a gap":
                await self._power_behind_gap(fault)
            case "agent" if how == "killed behind an acknowledgement":
                await self._kill_agent_behind_ack()
            case "receiver" if how == "power behind a restart":
                await self._power_behind_restart(fault)
            case "agent" | "server" | "receiver" | "source" if how in {
                "killed",
                "power",
                "stopped",
            }:
                self._crash(fault, what, how)
            case "link":
                await self._link(fault, how)
            case "checkpoint":
                await self._checkpoint(f"checkpoint{fault.number}")
            case "store" if how == "copied":
                self.receiver.copy_store()
            case "store":
                if self._would_be_noticed():
                    self.receiver.restore_store(fault.seconds)
            case _:
                await self._storage(fault, what, how)

    def _crash(self, fault: Fault, what: str, how: str) -> None:
        source, receiver = self.source, self.receiver
        name = self.plan.disks[fault.disk].name
        if what == "server":
            stop = source.stop_server if how == "stopped" else source.kill_server
            stop(name, fault.seconds)
            return
        crash: Callable[[], None]
        if what == "agent":
            crash = partial(source.kill_agent, fault.seconds)
        elif what == "source":
            crash = partial(self._lose_power, fault)
        else:
            lose = receiver.lose_power if how == "power" else receiver.kill
            crash = partial(lose, fault.seconds)
        process = receiver.process if what == "receiver" else source.agent_process
        if fault.operations >= 0 and process is not None:
            self.world.crash_in(process, fault.operations, crash)
        else:
            crash()

    def _would_be_noticed(self) -> bool:
        """Whether the copy that is to be restored lacks nothing, or the source knows that it does.

        It does not when it has lost its power since, and its note (storage/group_notes.py) is of
        before: the one older copy that is left out.
        """
        due = self.model.acknowledged_number + 1
        copied = self.receiver.copied_number
        return copied >= due or self.source.remembered_number > copied

    def _lose_power(self, fault: Fault) -> None:
        """The same left out, the other way round: not before it has noticed a restored copy."""
        source, due = self.source, self.model.acknowledged_number + 1
        if source.remembered_number > due >= source.noted_number:
            self.world.trace("the agent alone: else nobody would know of the restored copy")
            source.kill_agent(fault.seconds)
            return
        source.lose_power(fault.seconds)

    async def _power_behind_gap(self, fault: Fault) -> None:
        """A server is killed as it writes, just after a record. The link breaks behind the gap that
        is told then, and soon the source loses its power: nothing is left of all that it would have
        sent next.
        """
        told = trio.Event()
        self.network.cut_behind_gap(told.set)
        with trio.move_on_after(self.plan.active_seconds - self.world.clock.now):
            await self._kill_busy_server(self.plan.disks[fault.disk].name)
            await told.wait()
            await trio.sleep(self._chance.choice((0.0, 0.005, 0.03)))
            self._lose_power(fault)
        self.network.on_gap = None

    async def _kill_agent_behind_ack(self) -> None:
        """As it hears of an acknowledgement: what it has sent since is lost on its way."""
        heard = trio.Event()

        def acknowledged() -> None:
            if self._chance.random() < 0.3:
                self.network.silence("to-receiver")
                heard.set()

        self.network.on_ack = acknowledged
        with trio.move_on_after(self.plan.active_seconds - self.world.clock.now):
            await heard.wait()
            self.source.kill_agent(0.0)
        self.network.on_ack = None

    async def _power_behind_restart(self, fault: Fault) -> None:
        """The receiver is killed between a write and its sync; soon after it is back, its machine
        loses its power: what it took in as it recovered is on the disk, or was never durable.
        """
        receiver, killed = self.receiver, self.receiver.process
        if killed is None:
            return
        crash = partial(receiver.kill, fault.seconds)
        self.world.crash_in(killed, 0, crash, only="sync")
        with trio.move_on_after(self.plan.active_seconds - self.world.clock.now):
            while receiver.process is killed or receiver.groups is None:
                await trio.sleep(0.001)
            await trio.sleep(self._chance.choice((0.0, 0.005, 0.03)))
            receiver.lose_power(0.0)

    async def _kill_busy_server(self, name: str) -> None:
        head = 0
        while True:
            await trio.sleep(0.001)
            server = self.source.servers.get(name)
            if server is None:
                continue
            if server.is_busy and server.head > head > 0:
                break
            head = server.head
        self.source.kill_server(name, 0.0)

    async def _storage(self, fault: Fault, what: str, how: str) -> None:
        if how == "sync error":
            self.receiver.files.fails = True
            await trio.sleep(fault.seconds)
            if self.receiver.has_failed:
                self.receiver.kill(0)
            return
        machine = self.receiver.machine if what == "receiver" else self.source.spool_machine
        machine.full = True
        await trio.sleep(fault.seconds)
        machine.full = False

    async def _link(self, fault: Fault, how: str) -> None:
        network, chance = self.network, self._chance
        match how:
            case "cut":
                network.cut(chance.random() < 0.5, chance.choice((1, 30, 300, 3000, 30000)))
            case "silent":
                network.silence(chance.choice(("both", "to-source", "to-receiver")))
            case "half-open":
                network.half_open(fault.seconds)
            case "down":
                network.go_down(silently=chance.random() < 0.3)
                await trio.sleep(fault.seconds)
                network.is_down = False
            case "slow":
                network.bytes_per_second = chance.choice((3e3, 3e4, 3e5))
                await trio.sleep(fault.seconds)
                network.bytes_per_second = 1e8

    async def _checkpoint(self, name: str) -> None:
        group = self.source.group
        if group is None or group.pump is None or not group.pump.outbox.is_direct:
            return
        wanted = WantedCheckpoint(name, kept=False)
        generation = self.model.generation
        try:
            group.pump.want_checkpoint(wanted)
        except StateError:
            return
        with trio.move_on_after(1.0):
            await wanted.durable.wait()
            self.world.trace("checkpoint", name, wanted.at_ns)
            if generation == self.model.generation:  # else of before a roll-back
                self.model.checkpoints[name] = wanted.at_ns
