"""Whom the receiver trusts: invitations, sources, and who owns which group.

SQLite, ``<home>/receiver/trust.sqlite``.

===========  ======================================================================================
table        a row is
===========  ======================================================================================
state        the one row; ``version`` grows with every change, whoever made it
invites      an invitation: SHA-256 of its secret, when it expires, when it was used (or null)
invited      a group that an invitation lets its user join, though another source owns it
sources      a source: id, name, its certificate's serial, when it was revoked (or null)
owners       a source that may write to a group
granted      a source that may become an owner of a group although the group has one
instances    the number of a source's newest agent process; since version 2
===========  ======================================================================================

Rules:

1. An invitation is used at most once, in the same transaction that adds the source: if the source
   cannot be added (its name is taken), the invitation stays good.
2. The first source that writes to a group owns it; another one needs an invitation that names the
   group. A revoked source keeps its groups: nobody inherits history by taking a name.
3. Names of sources are unique among those not revoked. Ids and serials are never used again.
4. A certificate that is not listed here is not trusted, whoever signed it.
5. Secrets are not stored, only their digests.
6. Numbers of agent processes only grow. One that is behind its source's newest is refused, so of
   two agents with one identity (a copied home) the one that started last is let in, and the other
   one not, however often it tries, until the last one has gone (model/presence.py). It keeps its
   number then: the newest may come back at any time.
7. WAL mode, synchronous=FULL: a revocation that was reported is durable. A running receiver sees
   one made by another process by asking for `data_version` (a few microseconds).

One connection may be used by several threads: a lock serialises them.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blockrepl import limits
from blockrepl.errors import StateError, StorageError, TrustError
from blockrepl.units import NANOSECONDS_PER_SECOND

FILE_NAME = "trust.sqlite"
VERSION = 2
BUSY_SECONDS = 10.0  # another process may be inside its own short transaction
SECRET_BYTES = 32
SCHEMA = """
CREATE TABLE state (only INTEGER PRIMARY KEY CHECK (only = 1), version INTEGER NOT NULL) STRICT;
INSERT INTO state VALUES (1, 0);
CREATE TABLE invites (
    digest TEXT PRIMARY KEY, expires_ns INTEGER NOT NULL, used_ns INTEGER) STRICT;
CREATE TABLE invited (
    digest TEXT NOT NULL REFERENCES invites (digest), group_name TEXT NOT NULL,
    PRIMARY KEY (digest, group_name)) STRICT;
CREATE TABLE sources (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, serial TEXT NOT NULL UNIQUE,
    joined_ns INTEGER NOT NULL, revoked_ns INTEGER) STRICT;
CREATE UNIQUE INDEX names_in_use ON sources (name) WHERE revoked_ns IS NULL;
CREATE TABLE owners (
    group_name TEXT NOT NULL, source TEXT NOT NULL REFERENCES sources (id),
    PRIMARY KEY (group_name, source)) STRICT;
CREATE TABLE granted (
    group_name TEXT NOT NULL, source TEXT NOT NULL REFERENCES sources (id),
    PRIMARY KEY (group_name, source)) STRICT;
"""
INSTANCES = """
CREATE TABLE instances (
    source TEXT PRIMARY KEY REFERENCES sources (id), number INTEGER NOT NULL) STRICT;
"""

INVITE_HINT = "make a new token with `blockrepl receiver invite` on the receiver"


def fenced() -> TrustError:
    """What an agent is told that is not the newest one of its source."""
    return TrustError(
        "another agent with this source's identity has started since this one",
        hint="stop one of the two; this one goes on by itself some minutes after the other has "
        "ended, or at once when it is restarted. A host whose home was copied needs an identity of "
        "its own: join it with a new token, in a new home",
        code="fenced",
    )


@dataclass(frozen=True, slots=True)
class Source:
    """A source as the receiver knows it. `serial` is its certificate's, in hexadecimal."""

    id: str
    name: str
    serial: str
    joined_ns: int
    revoked_ns: int | None
    groups: tuple[str, ...]


class TrustStore:
    """The receiver's list of whom it trusts. Makes the file if there is none.

    Methods raise TrustError for what is not allowed and StorageError for what the disk refuses.
    `now` is in ns since 1970. They block for a disk flush: call those that change something from a
    worker thread.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._connection = _open(path)
        except sqlite3.Error as error:
            raise StorageError(f"cannot open {path}: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # Invitations

    def create_invite(self, expires_seconds: float, groups: Iterable[str], now: int) -> str:
        """A new secret that lets one source in; `groups` are those it may join beside others."""
        secret = secrets.token_urlsafe(SECRET_BYTES)
        digest = _digest(secret)
        expires_ns = now + int(expires_seconds * NANOSECONDS_PER_SECOND)
        with self._change() as connection:
            connection.execute("INSERT INTO invites VALUES (?, ?, NULL)", (digest, expires_ns))
            rows = [(digest, group) for group in set(groups)]
            connection.executemany("INSERT INTO invited VALUES (?, ?)", rows)
        return secret

    def redeem(self, secret: str, now: int, *, name: str, source_id: str, serial: str) -> Source:
        """Use an invitation up and add the source, or neither.

        TrustError codes: "unknown" (forged, or of another receiver), "used", "expired",
        "name-taken".
        """
        digest = _digest(secret)
        with self._change() as connection:
            row = connection.execute(
                "SELECT expires_ns, used_ns FROM invites WHERE digest = ?", (digest,)
            ).fetchone()
            if row is None:
                raise TrustError(
                    "this token is not from this receiver", hint=INVITE_HINT, code="unknown"
                )
            expires_ns, used_ns = row
            if used_ns is not None:
                raise TrustError("this token has already been used", hint=INVITE_HINT, code="used")
            if now >= expires_ns:
                raise TrustError("this token has expired", hint=INVITE_HINT, code="expired")
            if _id_of(connection, name) is not None:
                raise TrustError(
                    f"a source named {name} has already joined",
                    hint="join under another name, or revoke the old one on the receiver: "
                    f"`blockrepl receiver revoke {name}`",
                    code="name-taken",
                )
            connection.execute("UPDATE invites SET used_ns = ? WHERE digest = ?", (now, digest))
            connection.execute(
                "INSERT INTO sources VALUES (?, ?, ?, ?, NULL)", (source_id, name, serial, now)
            )
            connection.execute(
                "INSERT INTO granted SELECT group_name, ? FROM invited WHERE digest = ?",
                (source_id, digest),
            )
        return Source(source_id, name, serial, now, None, ())

    # Sources

    def is_revoked(self, serial: str) -> bool:
        """Whether a certificate is no longer trusted; one that is not listed never was."""
        with self._read() as connection:
            row = connection.execute(
                "SELECT revoked_ns FROM sources WHERE serial = ?", (serial,)
            ).fetchone()
        return row is None or row[0] is not None

    def revoke(self, name: str, now: int) -> Source:
        """Trust the source of this name no more. TrustError "unknown-source" if there is none."""
        with self._change() as connection:
            source_id = _id_of(connection, name)
            if source_id is None:
                raise TrustError(
                    f"there is no source named {name}",
                    hint="`blockrepl receiver sources` lists them",
                    code="unknown-source",
                )
            connection.execute("UPDATE sources SET revoked_ns = ? WHERE id = ?", (now, source_id))
            (source,) = (one for one in _sources(connection) if one.id == source_id)
        return source

    def list_sources(self) -> list[Source]:
        """All sources that ever joined, in that order, revoked ones included."""
        with self._read() as connection:
            return _sources(connection)

    def admit(self, source_id: str, instance: int, *, may_return: bool = False) -> int:
        """The number of an agent process, which is 0 when it has just started.

        TrustError "fenced" when a later one has been admitted, unless it ``may_return``.
        """
        with self._read() as connection:
            newest = _newest_instance(connection, source_id)
        if instance and instance == newest:
            return instance  # it comes back: nothing to write
        with self._change() as connection:
            newest = _newest_instance(connection, source_id)
            if 0 < instance < newest:
                if may_return:
                    return instance
                raise fenced()
            number = instance or newest + 1
            connection.execute(
                "INSERT OR REPLACE INTO instances VALUES (?, ?)", (source_id, number)
            )
        return number

    # Groups

    def claim_group(self, source_id: str, group: str) -> None:
        """Let a source write to a group.

        TrustError codes: "not-owner", "revoked", "too-many-groups".
        """
        if self._owns(source_id, group):
            return  # the common case needs no transaction, hence no disk flush
        with self._change() as connection:
            known = connection.execute(
                "SELECT 1 FROM sources WHERE id = ? AND revoked_ns IS NULL", (source_id,)
            ).fetchone()
            if known is None:
                raise TrustError("this source is no longer trusted", code="revoked")
            owned = connection.execute(
                "SELECT 1 FROM owners WHERE group_name = ? LIMIT 1", (group,)
            ).fetchone()
            granted = connection.execute(
                "SELECT 1 FROM granted WHERE group_name = ? AND source = ?", (group, source_id)
            ).fetchone()
            if owned and not granted:
                raise TrustError(
                    f"group {group} belongs to another source",
                    hint="use another group name, or join with a token that names the group: "
                    f"`blockrepl receiver invite --group {group}`",
                    code="not-owner",
                )
            (count,) = connection.execute(
                "SELECT count(*) FROM owners WHERE source = ?", (source_id,)
            ).fetchone()
            if count >= limits.GROUPS_PER_SOURCE_MAX:
                raise TrustError(
                    f"this source has {count} groups, which is as many as it may have",
                    hint="put the disk into one of them",
                    code="too-many-groups",
                )
            connection.execute("INSERT OR IGNORE INTO owners VALUES (?, ?)", (group, source_id))

    def _owns(self, source_id: str, group: str) -> bool:
        with self._read() as connection:
            row = connection.execute(
                "SELECT 1 FROM owners JOIN sources ON source = id"
                " WHERE group_name = ? AND source = ? AND revoked_ns IS NULL",
                (group, source_id),
            ).fetchone()
        return row is not None

    def data_version(self) -> int:
        """A number that is greater after every change, also one by another process."""
        with self._read() as connection:
            (version,) = connection.execute("SELECT version FROM state").fetchone()
        return int(version)

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise StorageError(f"the trust store cannot be read: {error}") from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One write transaction: durable when it ends, undone if its body raises."""
        with self._lock:
            connection = self._connection
            try:
                # IMMEDIATE: whoever decides by what it reads must be the only writer.
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("UPDATE state SET version = version + 1")
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise StorageError(f"the trust store cannot be changed: {error}") from error


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """SQLite does not wait for others that change the mode of a new file at the same moment."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorname.startswith("SQLITE_BUSY")
            if not is_busy or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _open(path: Path) -> sqlite3.Connection:
    # The file tells who may come in: only its owner may read it, from its first byte on.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        _use_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("BEGIN IMMEDIATE")  # two processes may open a new file at once
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version < VERSION:
            for statement in [*(SCHEMA.split(";") if version == 0 else ()), INSTANCES]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        elif version != VERSION:
            raise StateError(
                f"{path} is of format version {version}, this blockrepl knows {VERSION}",
                hint="use the blockrepl version that made it",
                code="home-version",
            )
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def _id_of(connection: sqlite3.Connection, name: str) -> str | None:
    row = connection.execute(
        "SELECT id FROM sources WHERE name = ? AND revoked_ns IS NULL", (name,)
    ).fetchone()
    return None if row is None else str(row[0])


def _newest_instance(connection: sqlite3.Connection, source_id: str) -> int:
    row = connection.execute(
        "SELECT number FROM instances WHERE source = ?", (source_id,)
    ).fetchone()
    return 0 if row is None else int(row[0])


def _sources(connection: sqlite3.Connection) -> list[Source]:
    groups: dict[str, list[str]] = {}
    for group, source_id in connection.execute("SELECT group_name, source FROM owners ORDER BY 1"):
        groups.setdefault(source_id, []).append(group)
    rows = connection.execute(
        "SELECT id, name, serial, joined_ns, revoked_ns FROM sources ORDER BY rowid"
    )
    return [
        Source(source_id, name, serial, joined_ns, revoked_ns, tuple(groups.get(source_id, ())))
        for source_id, name, serial, joined_ns, revoked_ns in rows
    ]
