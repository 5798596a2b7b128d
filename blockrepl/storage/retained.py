"""What retention has left of a group, in its catalog, and the steps by which that changes.

=============  ===================================================================================
table          a row is
=============  ===================================================================================
meta           ``retention``: the policy, as JSON; none: the default. ``image NAME``: the base
               image of a disk that was forgotten may still be there; what lies under another
               name beside the known disks' is a seed (storage/seed.py). ``forgotten ID``: the
               segment up to which the journal may have records of a disk that was forgotten
thinned        a stretch of history of which only the multiples of ``step_ns`` can be reached
kept_instants  an instant in such a stretch that was pinned when it was thinned
folds          a floor that has been raised; the journal up to it is being folded into the base
leftovers      a segment file that is not part of the history any more, and may still be there
=============  ===================================================================================

History is shortened in this order, so that a crash between any two steps loses nothing that can be
reached, and leaves nothing that cannot be finished:

1. The catalog says what can be reached from now on (`thin_to`, `raise_floor`, `forget_retired`),
   in one transaction: the floor is the oldest of any disk that it knows. Whoever pins an instant
   does so before this, or is refused (storage/pins.py).
2. Files are made: segments written anew under names of their own, base images brought up to the
   floor. Views read either: what the base gains, the journal still covers.
3. The catalog says which segments there are, and which are left over (`replace`); then these are
   removed, beside commits. What a crash leaves of them goes at the next start (`remove_leftovers`).

Whoever does any of this holds ``retention.lock``, and so does the worker that it starts, by the
same open file: a worker whose receiver was killed keeps out the next one for as long as it lives.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blockrepl.errors import DamageError, StateError, StorageError
from blockrepl.formats.segment import file_name
from blockrepl.model.retention import DEFAULT, Kept, Ladder, Stretch, parse_age, parse_ladder
from blockrepl.storage.base import image_path
from blockrepl.storage.catalog import Catalog, SegmentRow
from blockrepl.storage.files import failure
from blockrepl.storage.home import ExclusiveLock, exclusive_lock, sync_directory
from blockrepl.storage.reading import OpenFile

LOCK_NAME = "retention.lock"
LOCK_WAIT_SECONDS = 2.0  # a worker ends much sooner after its receiver (retention_worker.py)
_LOCK_POLL_SECONDS = 0.05
_IMAGE = "image "  # and a disk's name: a key in meta
_FORGOTTEN = "forgotten "  # and a disk's id, in hex: a key in meta
_VERSION = 3  # of the catalog that has these tables


class Policy(BaseModel):
    """``promised`` is kept whatever the limits say; by default the ladder's first rung."""

    model_config = ConfigDict(frozen=True)
    ladder: str = str(DEFAULT)
    promised: str | None = None  # an age, as in 24h
    size_bytes: int | None = Field(default=None, gt=0)  # of the journal
    free_bytes: int = Field(default=0, ge=0)  # to be left on the file system

    def rungs(self) -> Ladder:
        return parse_ladder(self.ladder)

    def promised_ns(self) -> int:
        """The age up to which nothing may go to make room."""
        ladder = self.rungs()
        if self.promised is None:
            return ladder.rungs[0].until_ns
        return min(parse_age(self.promised), ladder.rungs[-1].until_ns)


def read_policy(catalog: Catalog) -> Policy:
    """DamageError when it does not parse."""
    rows = catalog.rows("SELECT value FROM meta WHERE key = 'retention'")
    if not rows:
        return Policy()
    try:
        return Policy.model_validate_json(rows[0][0])
    except ValidationError as error:
        raise DamageError(
            f"the retention policy in {catalog.path} does not parse",
            hint="set it again with `blockrepl retention set`",
        ) from error


def write_policy(catalog: Catalog, policy: Policy) -> None:
    catalog.change("INSERT OR REPLACE INTO meta VALUES ('retention', ?)", policy.model_dump_json())


def read_kept(catalog: Catalog) -> Kept:
    if catalog.version < _VERSION:
        return Kept()
    stretches = catalog.rows("SELECT from_ns, to_ns, step_ns FROM thinned ORDER BY from_ns")
    instants = catalog.rows("SELECT at_ns FROM kept_instants ORDER BY at_ns")
    return Kept(tuple(Stretch(*row) for row in stretches), tuple(at_ns for (at_ns,) in instants))


def lock(replica: Path) -> ExclusiveLock:
    """Keep everybody else from shortening a replica's history. Blocks; StorageError."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            return exclusive_lock(replica / LOCK_NAME)
        except StateError as error:
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"a retention worker of an earlier receiver is still at work in {replica}",
                    hint=f"it ends by itself; fuser -v {replica / LOCK_NAME} names it",
                ) from error
        time.sleep(_LOCK_POLL_SECONDS)


# --- step 1


def thin_to(catalog: Catalog, kept: Kept) -> list[str]:
    """Say what is left from now on; the names of the checkpoints that are gone with the rest."""
    with catalog.transaction():
        catalog.change("DELETE FROM thinned")
        for one in kept.stretches:
            catalog.change(
                "INSERT INTO thinned VALUES (?, ?, ?)", one.from_ns, one.to_ns, one.step_ns
            )
        catalog.change("DELETE FROM kept_instants")
        for at_ns in kept.instants:
            catalog.change("INSERT INTO kept_instants VALUES (?)", at_ns)
        gone = [row.name for row in catalog.checkpoints() if kept.before(row.at_ns) != row.at_ns]
        for name in gone:
            catalog.remove_checkpoint(name)
    return gone


def raise_floor(catalog: Catalog, floor_ns: int) -> None:
    """No point before ``floor_ns`` can be reached from now on; a fold is due."""
    with catalog.transaction():
        catalog.change("INSERT OR IGNORE INTO folds VALUES (?)", floor_ns)
        catalog.change(
            "UPDATE disks SET ready_ns = ?1 WHERE ready_ns < ?1 AND "
            "(removed_ns IS NULL OR removed_ns > ?1)",
            floor_ns,
        )
        catalog.change("DELETE FROM checkpoints WHERE at_ns < ?", floor_ns)
        catalog.change("DELETE FROM gaps WHERE to_ns <= ?", floor_ns)


def fold_due(catalog: Catalog) -> int | None:
    """The floor up to which the journal is to be folded."""
    ((floor_ns,),) = catalog.rows("SELECT max(floor_ns) FROM folds")
    return None if floor_ns is None else int(floor_ns)


# --- step 3


def replace(
    catalog: Catalog, old: Sequence[SegmentRow], new: Sequence[SegmentRow], folded_ns: int | None
) -> None:
    """``new`` segments stand for ``old`` ones; a fold up to ``folded_ns`` is done."""
    with catalog.transaction():
        for row in old:
            catalog.remove_segment(row.number)
            catalog.change("INSERT INTO leftovers VALUES (?, ?)", row.number, row.generation)
        for row in new:
            catalog.put_segment(row)
        if folded_ns is not None:
            catalog.change("DELETE FROM folds WHERE floor_ns <= ?", folded_ns)


def leftovers(catalog: Catalog) -> set[str]:
    """Names of files that a reader passes over."""
    if catalog.version < _VERSION:
        return set()
    return {file_name(*row) for row in catalog.rows("SELECT number, generation FROM leftovers")}


def remove_leftovers(catalog: Catalog, directory: Path) -> None:
    """Remove what is left over, and what was written anew for a `replace` that never came.

    StorageError. Nobody may be writing segments anew meanwhile; the catalog may be changed.
    """
    anew = {path.name for path in directory.glob("*-*.seg")}  # before a `replace` may name them
    names = {file_name(row.number, row.generation) for row in catalog.segments()}
    rows = catalog.rows("SELECT number, generation FROM leftovers")
    gone = {file_name(*row) for row in rows} | (anew - names)
    if not gone:
        return
    try:
        for name in gone:
            (directory / name).unlink(missing_ok=True)
        sync_directory(directory)  # a folded segment that comes back would hide what is newer
    except OSError as error:
        raise failure(error, f"cannot remove what retention has left in {directory}") from error
    with catalog.transaction():
        for row in rows:
            catalog.change("DELETE FROM leftovers WHERE number = ? AND generation = ?", *row)


def forget_retired(catalog: Catalog, floor_ns: int) -> list[bytes]:
    """Forget the disks that were retired before the floor; their ids. Then `remove_images`."""
    gone = [
        row
        for row in catalog.disks(removed=True)
        if row.removed_ns is not None and row.removed_ns <= floor_ns
    ]
    newest = max((segment.number for segment in catalog.segments()), default=0)
    with catalog.transaction():
        for row in gone:
            for table in ("gaps", "growths", "proofs", "mismatches"):
                catalog.change(f"DELETE FROM {table} WHERE disk = ?", row.id.hex())
            catalog.change("DELETE FROM disks WHERE id = ?", row.id.hex())
            for key, value in (
                (f"{_IMAGE}{row.name}", ""),
                (f"{_FORGOTTEN}{row.id.hex()}", str(newest)),
            ):
                catalog.change("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)
    return [row.id for row in gone]


def has_forgotten_records(catalog: Catalog, disk: bytes) -> bool:
    """Whether the journal may still have records of a disk, by its id, that was forgotten."""
    key = f"{_FORGOTTEN}{disk.hex()}"
    rows = catalog.rows("SELECT value FROM meta WHERE key = ?", key)
    if rows and all(segment.number > int(rows[0][0]) for segment in catalog.segments()):
        catalog.change("DELETE FROM meta WHERE key = ?", key)
        return False
    return bool(rows)


def remove_images(catalog: Catalog, directory: Path) -> list[OpenFile]:
    """Remove the base images of disks that were forgotten from a replica. StorageError.

    Another disk may have their names at once. Their room is free when what is returned is let go
    of, which takes a disk long.
    """
    rows = catalog.rows("SELECT key FROM meta WHERE substr(key, 1, ?) = ?", len(_IMAGE), _IMAGE)
    if not rows:
        return []
    removed = []
    try:
        for (key,) in rows:
            path = image_path(directory, key.removeprefix(_IMAGE))
            with suppress(FileNotFoundError):
                removed.append(OpenFile(path))
                path.unlink()
            sync_directory(path.parent)
    except OSError as error:
        raise failure(error, f"cannot remove a base image in {directory}") from error
    with catalog.transaction():
        for (key,) in rows:
            catalog.change("DELETE FROM meta WHERE key = ?", key)
    return removed
