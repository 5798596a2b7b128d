"""The receiver's machine: the product's receiver and store, without TLS and its control API."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import trio

from blockrepl import limits
from blockrepl.errors import DamageError, StorageError
from blockrepl.services import receiver_groups
from blockrepl.services.group_committer import GroupCommitter, MemoryBudget
from blockrepl.services.receiver import Receiver
from blockrepl.services.receiver_groups import ReceiverGroups
from blockrepl.storage import durable as durables
from blockrepl.storage.files import Files
from blockrepl.storage.home import Home
from blockrepl.storage.replica import Replica, create_replica, open_replica
from blockrepl.storage.trust import fenced
from scripts.simulation import substitutes
from scripts.simulation.checkers import check_recovered
from scripts.simulation.files import Machine, SimulatedFiles
from scripts.simulation.link import End, Network
from scripts.simulation.model import Model, Remembered
from scripts.simulation.source import GROUP
from scripts.simulation.world import Process, Violation, World


class _Trust:
    """Everybody is trusted; agents that started earlier are refused, as in storage/trust.py."""

    instance = 0

    def admit(self, _source: str, instance: int, *, may_return: bool = False) -> int:
        if instance not in {0, self.instance}:
            if may_return:
                return instance
            raise fenced()
        if instance == 0:
            self.instance += 1
        return self.instance

    def is_revoked(self, _serial: str) -> bool:
        return False

    def claim_group(self, _source: str, _group: str) -> None:
        pass


class _Receiver(Receiver):
    async def _let_in(self, transport: Any) -> Any:
        return transport


class _FailingSync(SimulatedFiles):
    """A disk whose next fdatasync may fail."""

    fails = False

    def sync(self, descriptor: int) -> None:
        if self.fails:
            self.fails = False
            self._machine.world.operation("sync")
            self._machine.fail_to_sync(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync(descriptor)


class ReceiverMachine:
    def __init__(self, world: World, network: Network, model: Model) -> None:
        self.world = world
        self.machine = Machine(world, "receiver")
        self.network = network
        self.model = model
        self.files = _FailingSync(self.machine)
        self.process: Process | None = None
        self.groups: ReceiverGroups | None = None
        self.home = Home.create(world.directory / "receiver")
        self.home.replicas.mkdir()
        self.directory = self.home.replica_directory(GROUP)
        self._replicas: list[Replica] = []
        self._trust = _Trust()
        self._copies = 0
        self._copy: tuple[Path, Remembered] | None = None
        self._durable_before = b""
        self._is_losing_power = False
        self.down_until = 0.0
        self._boots = 0
        self._boot()

    def _boot(self) -> None:
        self._boots += 1
        self._boot_id.write_text(f"boot {self._boots} of the receiver\n")

    @property
    def _boot_id(self) -> Path:
        return self.world.directory / "receiver_boot_id"

    def replacements(self) -> Any:
        """Where the product opens its store, and which boot of the machine it is there."""
        yield durables, "_BOOT_ID", self._boot_id
        yield receiver_groups, "open_replica", self._open_replica
        yield receiver_groups, "create_replica", partial(create_replica, clock=self.world.now_ns)

    def _open_replica(self, directory: Any, *, files: Files | None = None) -> Replica:
        replica = open_replica(directory, files=self.files, clock=self.world.now_ns)
        self._replicas.append(replica)
        return replica

    async def keep(self) -> None:
        """Run it, again and again."""
        while True:
            await trio.sleep_until(self.down_until)
            if trio.current_time() < self.down_until:
                continue
            process = self.process = Process("receiver")
            process.on_death.append(self._died)
            self.world.trace("start", "receiver")
            await self.world.run(process, self._main)
            await trio.sleep(0.001)

    async def _main(self) -> None:
        path = self.directory / durables.FILE_NAME
        self._durable_before = path.read_bytes() if path.exists() else b""
        async with trio.open_nursery() as nursery:
            trust: Any = self._trust
            budget = MemoryBudget(limits.RECEIVE_BYTES_MAX)
            groups = ReceiverGroups(self.home, trust, nursery, budget)
            receiver = _Receiver(self.home, "receiver", substitutes.authority(), trust, groups)
            groups.answer_with = receiver.answer
            await groups.open_all()
            self._check_recovered(groups)
            self.groups = groups
            accept_to, accept_from = trio.open_memory_channel[End](100)
            self.network.accepting = accept_to
            process = self.process
            assert process is not None
            async for end in accept_from:
                end.belongs_to(process)
                transport: Any = end
                nursery.start_soon(partial(receiver.serve, transport))

    def _check_recovered(self, groups: ReceiverGroups) -> None:
        """What the source was told is durable is there after the crash."""
        failures = groups.failures.values()
        if any(isinstance(failure, DamageError) for failure in failures):
            raise Violation(f"a replica cannot be opened after a crash: {groups.failures}")
        if GROUP in groups.committers:
            check_recovered(groups.committers[GROUP].replica, self.model)

    @property
    def has_failed(self) -> bool:
        """Whether it must be started again."""
        committer = self.committer
        if committer is None:
            return False
        error = committer.replica.error
        return error is not None and error.code == "fail-stop"

    @property
    def committer(self) -> GroupCommitter | None:
        if self.groups is None or self.process is None:
            return None
        return self.groups.committers.get(GROUP)

    # --- deaths

    def kill(self, down_seconds: float) -> None:
        self.down_until = max(self.down_until, self.world.clock.now + down_seconds)
        if self.process is not None:
            self.process.die()

    def lose_power(self, down_seconds: float) -> None:
        self._is_losing_power = True
        self.kill(down_seconds)
        self._is_losing_power = False
        self.machine.lose_power()
        self._lose_durable_record()
        self._boot()

    def _died(self) -> None:
        self.process = self.groups = self.network.accepting = None
        self.network.process_died("receiver", silently=self._is_losing_power)
        for replica in self._replicas:
            # Closed as the kernel would: nothing is written any more.
            replica.error = StorageError("killed", code="fail-stop")
            replica.close()
        self._replicas.clear()

    def _lose_durable_record(self) -> None:
        """It is never synced: there may be an older one, half of one, or none."""
        path = self.directory / durables.FILE_NAME
        if not path.exists():
            return
        fate = self.world.chance.choice(("kept", "older", "torn", "gone"))
        self.world.trace("power", "receiver", "durable record", fate)
        if fate == "older" and self._durable_before:
            path.write_bytes(self._durable_before)
        elif fate == "torn":
            path.write_bytes(path.read_bytes()[:24] + bytes(24))
        elif fate == "gone":
            path.unlink()

    # --- copies of the store

    def copy_store(self) -> None:
        """Remember it as it is now."""
        if not self.directory.exists():
            return
        self._copies += 1
        place = self.world.directory / f"copy{self._copies}"
        shutil.copytree(self.directory, place)
        self._copy = (place, self.model.remember())
        self.world.trace("copied", "the store at", self.model.acknowledged_number)

    @property
    def copied_number(self) -> int:
        """The frame that is due where the copy was made."""
        return self._copy[1].number + 1 if self._copy is not None else 0

    def restore_store(self, down_seconds: float) -> None:
        """Somebody has put the older copy in its place."""
        if self._copy is None:
            return
        self.kill(down_seconds)
        place, remembered = self._copy
        shutil.rmtree(self.directory)
        shutil.copytree(place, self.directory)
        self._durable_before = b""  # it speaks of the store that is gone
        self.model.roll_back(remembered)
        self.world.trace("restored", "the store at", self.model.acknowledged_number)
