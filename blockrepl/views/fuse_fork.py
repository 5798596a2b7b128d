"""The FUSE door of a fork: the files of one instant, which can be written to.

==============================  ==================================================
what is asked                   what is done
==============================  ==================================================
write                           into the overlay; ENOSPC over the fork's limit and
                                beyond the disk's end
fsync                           durable in the overlay (also a loop device's flush)
another size, owner or mode     EPERM: a disk has its own
other times                     passed over
==============================  ==================================================

The kernel hands over each write as it is made (no write-back cache), so a guest's error is its own.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import partial

from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    RequestContext,
    SetattrFields,
)

from blockrepl.errors import BlockreplError, StorageError
from blockrepl.storage.history import ReplicaHistory, State
from blockrepl.storage.overlay import Overlay
from blockrepl.views.fork import WritableView
from blockrepl.views.fuse import ViewFileSystem
from blockrepl.views.fuse_nodes import Image
from blockrepl.views.view import View


class ForkFileSystem(ViewFileSystem):
    """A mount of one fork. The fork pins its instant itself."""

    def __init__(
        self,
        replica: ReplicaHistory,
        at_ns: int,
        state: State,
        overlays: dict[str, Overlay],
        what: str = "mount",
    ) -> None:
        super().__init__(replica, at_ns, state, what)
        self._fork = WritableView(View(replica, at_ns, state, self._windows), overlays)
        self._views[at_ns] = self._fork

    def close(self) -> None:
        """Make durable what was written. StorageError."""
        super().close()
        self._fork.close()

    def _image_attributes(self, image: Image) -> EntryAttributes:
        attributes = super()._image_attributes(image)
        attributes.st_mode = ModeT(attributes.st_mode | stat.S_IWUSR)
        return attributes

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        if flags & os.O_TRUNC:
            raise FUSEError(errno.EPERM)
        return await super().open(inode, FlagT(flags & ~os.O_ACCMODE), ctx)

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        now = await self.getattr(inode, ctx)
        resized = fields.update_size and attr.st_size != now.st_size
        if resized or fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        return now

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        _, disk = self._open[fh]
        if off + len(buf) > self._fork.disk(disk).size_bytes:
            raise FUSEError(errno.ENOSPC)
        try:
            # Into the page cache most often: a thread would take several times as long.
            self._fork.write(disk, off, buf, wait=False)
        except BlockingIOError:
            await self._in_thread(partial(self._fork.write, disk, off, buf))
        except BlockreplError as error:
            raise self._failed(error) from error
        return len(buf)

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        _, disk = self._open[fh]
        await self._in_thread(partial(self._fork.flush, disk))

    def _failed(self, error: BlockreplError) -> FUSEError:
        failed = super()._failed(error)
        is_full = isinstance(error, StorageError) and error.code == "full"
        return FUSEError(errno.ENOSPC) if is_full else failed
