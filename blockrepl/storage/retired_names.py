"""Names that a group's history still holds: a disk of that name was replicated, then removed.

``<home>/source/retired/<group>/<name>``, with the id of the disk that had the name. The receiver
keeps the history under the name, so it would refuse another disk that has it, and with that disk
the whole group. When retention has let go of that history nobody tells the source: the note stays
until it is removed by hand.
"""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from blockrepl.errors import StateError
from blockrepl.storage.home import Home, make_directory, write_atomically


def _path(home: Home, group: str, name: str) -> Path:
    return home.source_directory / "retired" / group / name


def note_retired(home: Home, group: str, name: str, disk: UUID) -> None:
    """Remember that the name is taken, durably. OSError."""
    path = _path(home, group, name)
    make_directory(path.parent)
    write_atomically(path, f"{disk}\n".encode())


def check_not_retired(home: Home, group: str, name: str) -> None:
    """StateError when the group's history holds another disk of that name."""
    path = _path(home, group, name)
    if path.exists():
        raise StateError(
            f"group {group} already had a disk named {name!r}, whose history is kept under that "
            "name",
            hint="add it by another name; when the receiver has nothing of the old disk any more, "
            f"remove {path}, and the name is free",
            code="taken",
        )
