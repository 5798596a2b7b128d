"""Where the product's modules take time, chance, places and threads from; see world.py."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from blockrepl.channel.certificates import PeerIdentity
from blockrepl.errors import StorageError
from blockrepl.services import agent, receiver, receiver_groups
from blockrepl.storage import (
    catalog,
    catalog_file,
    clock,
    home,
    journal,
    replica,
    ring,
    source,
    spool,
)
from blockrepl.storage.source import DiskEntry

if TYPE_CHECKING:
    from scripts.simulation.world import World

SOURCE_ID = "00000000-0000-4000-8000-000000000001"


class SmallRingEntry(DiskEntry):
    """A disk whose ring may be smaller than the product allows."""

    ring_bytes: int


class LazyFuture:
    """A call that is done the third time somebody looks, or when its result is wanted."""

    def __init__(self, world: World, call: Callable[[], Any]) -> None:
        from scripts.simulation.world import running

        self._world = world
        self._call = call
        self._process = running.get()
        self._looks = world.chance.randrange(4)
        self._result: Any = None
        self._error: Exception | None = None
        self._is_done = False

    def done(self) -> bool:
        self._looks -= 1
        if self._looks < 0:
            self._run()
        return self._is_done

    def result(self) -> Any:
        self._run()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        if self._is_done:
            return
        self._is_done = True
        # Whoever looks while the call is under way is its own process's death.
        self._error = StorageError("the process was killed", code="full")
        if self._process is not None and not self._process.alive:
            return
        try:
            self._result = self._call()
        except Exception as error:
            self._error = error
        else:
            self._error = None


class Executor:
    """A ThreadPoolExecutor without threads."""

    world: World

    def __init__(self, *_arguments: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: object) -> LazyFuture:
        return LazyFuture(self.world, lambda: call(*arguments))

    def shutdown(self) -> None:
        pass


def replacements(
    world: World, *, time: object, secrets: object, uuid4: Callable[[], object], chance: object
) -> Iterator[tuple[object, str, object]]:
    for module in (clock, ring, receiver, receiver_groups):
        yield module, "time", time
    for module in (home, ring):
        yield module, "secrets", secrets
    for module in (source, replica):
        yield module, "uuid4", uuid4
    yield agent, "random", chance
    for module in (clock, spool):
        yield module, "_BOOT_ID", world.directory / "boot_id"
    yield ring, "SHARED_MEMORY", world.directory / "shm"
    yield source, "DiskEntry", SmallRingEntry
    yield catalog_file, "_prepare", _prepare
    yield catalog.Catalog, "transaction", _transaction(world, catalog.Catalog.transaction)
    yield journal, "ThreadPoolExecutor", type("_Executor", (Executor,), {"world": world})
    yield receiver, "server_contexts", lambda *_arguments: {}
    yield receiver, "read_identity", lambda _certificate: PeerIdentity("source", SOURCE_ID, "1")


def _prepare(connection: sqlite3.Connection) -> None:
    """SQLite's own promises are taken for granted: no file of its own per transaction."""
    connection.execute("PRAGMA journal_mode = MEMORY")
    connection.execute("PRAGMA synchronous = OFF")


def authority() -> Any:
    return SimpleNamespace(ca_pem="", server_certificate_path=Path(), server_key_path=Path())


def _transaction(world: World, transaction: Callable[..., Any]) -> Callable[..., Any]:
    """SQLite's own promise is taken for granted: a crash comes before or after the whole."""

    @contextmanager
    def crashing(self: catalog.Catalog) -> Iterator[None]:
        if self._connection.in_transaction:
            with transaction(self):
                yield
            return
        world.operation("transaction")
        with transaction(self):
            yield
        world.operation("the step after a transaction")

    return crashing
