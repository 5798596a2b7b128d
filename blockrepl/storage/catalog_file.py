"""The catalog's file: its schema, its versions, and SQLite's errors as ours.

========  =========================================
version   adds
========  =========================================
1         meta, sources, disks, gaps, checkpoints, segments
2         proofs, mismatches
3         retention: what thinning has left, pending folds, segments written anew
4         growths
========  =========================================

Who opens an older version to write upgrades it, in one transaction. Readers take it as it is.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from blockrepl.errors import DamageError, StateError, StorageError
from blockrepl.storage.files import Files, failure, settle

BUSY_SECONDS = 10.0  # a reader may hold up a checkpoint of the write-ahead log for a moment
_VERSION_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE sources (
    id TEXT PRIMARY KEY, last_number INTEGER NOT NULL, watermark INTEGER NOT NULL) STRICT;
CREATE TABLE disks (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, size_bytes INTEGER NOT NULL,
    source TEXT NOT NULL REFERENCES sources (id), ready_ns INTEGER,
    epoch INTEGER NOT NULL, ring_id INTEGER NOT NULL, next_sequence INTEGER NOT NULL,
    removed_ns INTEGER) STRICT;
CREATE TABLE gaps (
    disk TEXT NOT NULL REFERENCES disks (id), from_ns INTEGER NOT NULL, to_ns INTEGER,
    PRIMARY KEY (disk, from_ns)) STRICT;
CREATE TABLE checkpoints (
    name TEXT PRIMARY KEY, at_ns INTEGER NOT NULL, kind TEXT NOT NULL,
    kept INTEGER NOT NULL) STRICT;
CREATE INDEX checkpoints_by_instant ON checkpoints (at_ns);
CREATE TABLE segments (
    number INTEGER PRIMARY KEY, created_ns INTEGER NOT NULL, first_stamp INTEGER NOT NULL,
    last_stamp INTEGER NOT NULL, sealed INTEGER NOT NULL, bytes INTEGER NOT NULL,
    frames INTEGER NOT NULL) STRICT;
"""
# The sums of a chunk stand before its stamps: reading them does not read the blob's pages.
_VERSION_2 = """
CREATE TABLE proofs (
    disk TEXT NOT NULL REFERENCES disks (id), chunk INTEGER NOT NULL, proven INTEGER NOT NULL,
    oldest_ns INTEGER NOT NULL, newest_ns INTEGER NOT NULL, stamps BLOB NOT NULL,
    PRIMARY KEY (disk, chunk)) STRICT;
CREATE TABLE mismatches (
    disk TEXT NOT NULL REFERENCES disks (id), start INTEGER NOT NULL, length INTEGER NOT NULL,
    at_ns INTEGER NOT NULL, healed_ns INTEGER, proven_ns INTEGER,
    PRIMARY KEY (disk, start, length, at_ns)) STRICT;
"""
_VERSION_3 = """
ALTER TABLE segments ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
ALTER TABLE segments ADD COLUMN step_ns INTEGER NOT NULL DEFAULT 0;
CREATE TABLE thinned (
    from_ns INTEGER PRIMARY KEY, to_ns INTEGER NOT NULL, step_ns INTEGER NOT NULL) STRICT;
CREATE TABLE kept_instants (at_ns INTEGER PRIMARY KEY) STRICT;
CREATE TABLE folds (floor_ns INTEGER PRIMARY KEY) STRICT;
CREATE TABLE leftovers (
    number INTEGER NOT NULL, generation INTEGER NOT NULL, PRIMARY KEY (number, generation)) STRICT;
"""
_VERSION_4 = """
CREATE TABLE growths (
    disk TEXT NOT NULL REFERENCES disks (id), before_bytes INTEGER NOT NULL,
    at_ns INTEGER NOT NULL, PRIMARY KEY (disk, before_bytes)) STRICT;
"""
STEPS = (_VERSION_1, _VERSION_2, _VERSION_3, _VERSION_4)
VERSION = len(STEPS)


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection in one of SQLite's modes (ro, rw, rwc). StateError when there is no file."""
    if mode != "rwc" and not path.exists():
        raise StateError(f"there is no catalog at {path}", code="no-catalog")
    if mode == "rwc":  # SQLite would let others read it, and what it keeps beside it
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    with translated(path):
        return sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=BUSY_SECONDS,
        )


def create(connection: sqlite3.Connection, path: Path, meta: dict[str, str]) -> None:
    """Fill an empty file."""
    rows = ",".join(f"('{key}', '{value}')" for key, value in meta.items())
    with translated(path):
        _prepare(connection)
        # One transaction, so that a crash leaves an empty file (made again) or a whole catalog.
        connection.executescript(
            f"BEGIN IMMEDIATE; {''.join(STEPS)} PRAGMA user_version = {VERSION};"
            f"INSERT INTO meta VALUES {rows}; COMMIT;"
        )


def settle_files(path: Path) -> None:
    """Before the first connection after a crash: SQLite would take a failed sync's pages of its
    write-ahead log for committed, go on behind them, and lose all of it with the power. OSError.
    """
    for file in (path, path.with_name(f"{path.name}-wal")):
        with suppress(FileNotFoundError):
            descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
            try:
                settle(Files(), descriptor)
            finally:
                os.close(descriptor)


def open_to_write(connection: sqlite3.Connection, path: Path) -> None:
    """Make a catalog ready to be written to: of the newest version. StateError."""
    version = read_version(connection, path)
    with translated(path):
        _prepare(connection)
        if version < VERSION:
            connection.executescript(
                f"BEGIN IMMEDIATE; {''.join(STEPS[version:])} PRAGMA user_version = {VERSION};"
                "COMMIT;"
            )
        connection.execute("PRAGMA foreign_keys = ON")


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def read_version(connection: sqlite3.Connection, path: Path) -> int:
    """The version of a catalog. StateError, the connection closed, when it is not known."""
    with translated(path):
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not 0 < version <= VERSION:
        connection.close()
        if version == 0:
            raise StateError(f"the catalog {path} is empty", code="no-catalog")
        raise StateError(
            f"the catalog {path} is of format {version}, this blockrepl knows {VERSION}",
            hint="use the blockrepl version that made it",
            code="catalog-version",
        )
    return int(version)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise DamageError(
                f"the catalog {path} is damaged: {error}",
                hint="restore it, and the files beside it, from a copy of the replica",
            ) from error
        if name == "SQLITE_FULL":
            raise failure(OSError(errno.ENOSPC, str(error)), f"cannot write {path}") from error
        raise StorageError(
            f"the catalog {path} cannot be used: {error}",
            hint="check the disk it is on, then restart the receiver",
        ) from error
