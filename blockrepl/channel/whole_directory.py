"""A directory of small secret files that exists whole or not at all.

Order: write and sync every file into a new directory beside the target, rename it over the target
(which must not exist or be empty), sync the parent. A crash leaves at most a directory named
`.<target>.new-*`, never a half-filled target.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from blockrepl.errors import StorageError

FILE_MODE = 0o600
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def create_directory(target: Path, files: Mapping[str, str]) -> bool:
    """Create `target` (mode 0700) with these files (0600); False if it already holds something."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        try:
            for name, text in files.items():
                _write(fresh / name, text)
            _sync_directory(fresh)
            os.rename(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        _sync_directory(target.parent)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        raise StorageError(f"cannot create {target}: {error.strerror}") from error
    return True


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
