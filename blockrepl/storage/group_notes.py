"""What a source remembers of a group's replica: up to which frame it was durable there once, and
which disks it had.

``<home>/source/groups/<group>.json``, written before regions may cool on the strength of it. A
receiver whose next number is lower has lost durable frames: its store was restored from an older
copy, perhaps.

A note is seconds old, for it is synced. The rings (formats/ring.py, next number) know it to the
frame, and outlive the agent. What neither knows, after the source has lost its power: a copy of the
receiver's store that is made and restored within those seconds. Then hot regions are sent again all
the same; what is missed is content of a region that was sent in that time and, long unwritten, has
cooled in it.
"""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blockrepl.errors import StorageError
from blockrepl.storage.files import failure
from blockrepl.storage.home import Home, make_directory, write_atomically


class GroupNote(BaseModel):
    model_config = ConfigDict(frozen=True)
    replica: UUID
    next_number: int = Field(ge=1)
    disks: tuple[str, ...] = ()  # by name: so an entry that cannot be read is known to be a group's


def _path(home: Home, group: str) -> Path:
    return home.source_directory / "groups" / f"{group}.json"


def read_note(home: Home, group: str) -> GroupNote | None:
    """None when nothing is remembered."""
    path = _path(home, group)
    try:
        return GroupNote.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise StorageError(
            f"{path} cannot be read",
            hint="remove it; the group is then trusted to the receiver as it is",
        ) from error


def write_note(home: Home, group: str, note: GroupNote) -> None:
    """Durably. StorageError."""
    path = _path(home, group)
    try:
        make_directory(path.parent)
        write_atomically(path, note.model_dump_json().encode())
    except OSError as error:
        raise failure(error, f"cannot write {path}") from error


def forget_note(home: Home, group: str) -> None:
    _path(home, group).unlink(missing_ok=True)
