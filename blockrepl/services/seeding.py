"""Seeds a disk at the receiver, running or not: copies the image, and has it put in place."""

from __future__ import annotations

import contextlib
from pathlib import Path

from blockrepl.errors import StateError
from blockrepl.services.control_client import ControlClient
from blockrepl.services.receiver_home import read_configuration
from blockrepl.storage import catalog as catalogs
from blockrepl.storage.catalog import Catalog
from blockrepl.storage.home import Home, check_name, exclusive_lock
from blockrepl.storage.replica import create_replica
from blockrepl.storage.seed import (
    Progress,
    check_free,
    check_seed,
    copy_seed,
    move_seed,
    place_seed,
    seed_path,
)


def seed(home: Home, group: str, disk: str, image: Path, *, move: bool, progress: Progress) -> int:
    """Make an image the base of a disk to come; its size. Blocks. BlockreplError, OSError."""
    read_configuration(home)
    check_name(group, "group")
    check_name(disk, "disk")
    size_bytes = check_seed(image)
    _check_free(home, group, disk)
    copy = seed_path(home, group, disk)
    with exclusive_lock(home.run_directory / "seed.lock", f"a seeding in {home.path}"):
        if move:
            move_seed(image, copy)
            progress(size_bytes)
        else:
            copy_seed(image, copy, size_bytes, progress)
        try:
            _place(home, group, disk, copy)
        except BaseException:
            if move:
                copy.rename(image)
            copy.unlink(missing_ok=True)
            raise
    return size_bytes


def _check_free(home: Home, group: str, disk: str) -> None:
    """Before the work of copying."""
    path = home.replica_directory(group) / catalogs.FILE_NAME
    if path.exists():
        with contextlib.closing(Catalog.open_readonly(path)) as catalog:
            check_free(catalog, disk)


def _place(home: Home, group: str, disk: str, copy: Path) -> None:
    try:
        ControlClient(home.receiver_socket, "receiver").post(f"/seeds/{group}/{disk}")
        return
    except StateError as error:
        if error.code != "not-running":
            raise
    with exclusive_lock(home.run_directory / "receiver.lock", f"the receiver's home {home.path}"):
        directory = home.replica_directory(group)
        create_replica(directory, group)
        with contextlib.closing(Catalog.open(directory / catalogs.FILE_NAME)) as catalog:
            place_seed(directory, catalog, copy, disk)
