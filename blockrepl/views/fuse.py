"""The FUSE door: views as files, at one instant or at any you name.

Mounted at one point, the root is that view. Mounted without:

=====================  ==================  ===================================================
path                   is                  caching
=====================  ==================  ===================================================
latest                 symlink             none: asked anew each time
checkpoints/NAME       symlink             none
at/POINT               symlink             none, unless POINT is the instant's canonical name
at/INSTANT             directory           for ever: it is a view, and a view never changes
at/INSTANT/DISK.img    file                for ever, pages included (keep_cache)
=====================  ==================  ===================================================

INSTANT is ISO 8601 in UTC with nanoseconds. So ``readlink latest`` tells which instant it is now,
and a program that has followed the link stays at that instant. ``at/`` lists the instants in use.

Each instant in use is pinned (storage/pins.py) until the kernel has forgotten it.

A point that cannot be reached does not exist (ENOENT); the log says why. Damage is EIO, told in
the log once, with segment and offset.

A read that the page cache can answer is answered at once, since a thread costs more than most reads
do. Others go to threads, so that one slow device holds up nobody; but where no other request is
there, one of up to SMALL_BYTES waits in place.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ReaddirToken,
    RequestContext,
    StatvfsData,
)

from blockrepl.errors import BlockreplError, DamageError, PointError
from blockrepl.model import points
from blockrepl.storage import pins
from blockrepl.storage.history import ReplicaHistory, State
from blockrepl.units import KIB, format_instant
from blockrepl.views.fork import WritableView
from blockrepl.views.fuse_nodes import Folder, Image, Link, Node, Nodes, ViewFolder
from blockrepl.views.view import View, window_cache

log = logging.getLogger(__name__)

FOREVER_SECONDS = 10 * 365 * 86400.0
BLOCK_BYTES = 4 * KIB
READERS = 8  # threads that wait for devices
SMALL_BYTES = 128 * KIB
IMAGE_SUFFIX = ".img"
NAME_BYTES_MAX = 255

Result = TypeVar("Result")
AnyView = View | WritableView  # the latter: views/fuse_fork.py

ROOT, CHECKPOINTS, AT = InodeT(pyfuse3.ROOT_INODE), InodeT(2), InodeT(3)


class ViewFileSystem(pyfuse3.Operations):
    """What the kernel asks, answered from a replica. ``at_ns``: mount that instant alone.

    ``what`` says of the pins whose they are.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self, replica: ReplicaHistory, at_ns: int | None, state: State, what: str = "mount"
    ) -> None:
        super().__init__()
        self._replica = replica
        self._what = what
        self._windows = window_cache()
        self._views: dict[int, AnyView] = {}
        self._pins: dict[int, pins.HeldPin | None] = {}
        self._nodes = Nodes()
        self._open: dict[FileHandleT, tuple[AnyView, str]] = {}
        self._next_handle = 1
        self._readers = trio.CapacityLimiter(READERS)
        self._in_threads = 0  # requests
        self.has_more: Callable[[], bool] = lambda: True  # requests of the kernel, by now
        self._told: set[str] = set()
        self._started_ns = time.time_ns()
        self._root: Node = Folder() if at_ns is None else ViewFolder(at_ns)
        if at_ns is not None:
            self._pins[at_ns] = self._pin(at_ns)
            self._views[at_ns] = View(replica, at_ns, state, self._windows)

    def _pin(self, at_ns: int) -> pins.HeldPin | None:
        return pins.hold(self._replica, at_ns, at_ns, self._what)

    def close(self) -> None:
        """Let go of what is pinned."""
        self._views = {}
        self._release_pins()

    def _release_pins(self) -> None:
        for at_ns in self._pins.keys() - self._views.keys():
            pin = self._pins.pop(at_ns)
            if pin is not None:
                pin.release()

    # Names

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        text = os.fsdecode(name)
        parent = self._node(parent_inode)
        if isinstance(parent, ViewFolder):
            attributes = self._image_entry(parent, text)
        elif parent_inode == ROOT:
            attributes = await self._top_entry(text)
        elif parent_inode == CHECKPOINTS:
            attributes = await self._link_entry(Link(f"tag:{text}", "../at/"))
        else:
            attributes = await self._instant_entry(text)
        self._nodes.looked_up(attributes.st_ino)
        return attributes

    async def _top_entry(self, name: str) -> EntryAttributes:
        if name == "checkpoints":
            return self._folder_attributes(CHECKPOINTS, self._started_ns)
        if name == "at":
            return self._folder_attributes(AT, self._started_ns)
        if name == "latest":
            return await self._link_entry(Link("latest", "at/"))
        raise FUSEError(errno.ENOENT)

    async def _link_entry(self, link: Link) -> EntryAttributes:
        target = await self._target(link)
        return self._link_attributes(link, target)

    async def _instant_entry(self, text: str) -> EntryAttributes:
        at_ns = await self._resolve(text)
        if format_instant(at_ns) != text:
            return self._link_attributes(Link(text, ""), format_instant(at_ns))
        await self._view(at_ns)
        return self._folder_attributes(self._nodes.inode(ViewFolder(at_ns)), at_ns)

    def _image_entry(self, folder: ViewFolder, name: str) -> EntryAttributes:
        disk = name.removesuffix(IMAGE_SUFFIX)
        if disk == name or disk not in self._views[folder.at_ns].disks:
            raise FUSEError(errno.ENOENT)
        return self._image_attributes(Image(folder.at_ns, disk))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            self._nodes.forget(inode, count)
        used = {node.at_ns for node in self._nodes.by_node if isinstance(node, ViewFolder | Image)}
        if isinstance(self._root, ViewFolder):
            used.add(self._root.at_ns)
        self._views = {at_ns: view for at_ns, view in self._views.items() if at_ns in used}
        self._release_pins()

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        node = self._node(inode)
        if not isinstance(node, Link):
            raise FUSEError(errno.EINVAL)
        return FileNameT(os.fsencode(await self._target(node)))

    async def _target(self, link: Link) -> str:
        return link.up + format_instant(await self._resolve(link.point))

    async def _resolve(self, text: str) -> int:
        """The instant a name means; ENOENT where there is none."""
        try:
            point = points.parse(text)
            resolved = await trio.to_thread.run_sync(
                self._replica.resolve, point, time.time_ns(), limiter=self._readers
            )
        except DamageError as error:
            raise self._failed(error) from error
        except BlockreplError as error:
            log.info("%s; %s", error, error.hint)
            raise FUSEError(errno.ENOENT) from error
        return resolved.at_ns

    async def _view(self, at_ns: int) -> None:
        """Have a view of an instant, pinned."""
        if at_ns in self._views:
            return

        def make() -> tuple[pins.HeldPin | None, View]:
            pin = self._pin(at_ns)
            try:
                return pin, View(self._replica, at_ns, self._replica.state(), self._windows)
            except BaseException:
                if pin is not None:
                    pin.release()
                raise

        pin, view = await self._in_thread(make)
        if at_ns not in self._views:
            self._views[at_ns], self._pins[at_ns] = view, pin
        elif pin is not None:  # another request was quicker
            pin.release()

    # Attributes

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        node = self._node(inode)
        match node:
            case Folder():
                return self._folder_attributes(inode, self._started_ns)
            case ViewFolder():
                return self._folder_attributes(inode, node.at_ns)
            case Image():
                return self._image_attributes(node)
            case Link():
                return self._link_attributes(node, await self._target(node))

    def _node(self, inode: InodeT) -> Node:
        if inode == ROOT:
            return self._root
        if inode in (CHECKPOINTS, AT):
            return Folder()
        try:
            return self._nodes.by_inode[inode]
        except KeyError:
            raise FUSEError(errno.ESTALE) from None

    def _folder_attributes(self, inode: InodeT, at_ns: int) -> EntryAttributes:
        return _attributes(inode, stat.S_IFDIR | 0o500, at_ns, FOREVER_SECONDS, links=2)

    def _link_attributes(self, link: Link, target: str) -> EntryAttributes:
        inode = self._nodes.inode(link)
        at_ns = time.time_ns()
        return _attributes(inode, stat.S_IFLNK | 0o777, at_ns, 0.0, size_bytes=len(target))

    def _image_attributes(self, image: Image) -> EntryAttributes:
        view = self._views[image.at_ns]
        size_bytes = view.disk(image.disk).size_bytes
        try:
            allocated = view.allocated_bytes(image.disk)
        except BlockreplError:
            allocated = size_bytes  # whoever reads it will be told
        return _attributes(
            self._nodes.inode(image),
            stat.S_IFREG | 0o400,
            image.at_ns,
            FOREVER_SECONDS,
            size_bytes=size_bytes,
            allocated_bytes=allocated,
        )

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        state = await self._in_thread(self._replica.state)
        blocks = sum(disk.size_bytes for disk in state.disks) // BLOCK_BYTES
        data = StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_BYTES
        data.f_blocks = blocks
        data.f_files = len(state.disks)
        data.f_namemax = NAME_BYTES_MAX
        return data

    # Directories

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        inode = InodeT(fh)
        entries = await self._entries(inode)
        for place, (name, make) in enumerate(entries[start_id:], start_id + 1):
            try:
                attributes = await make()
            except FUSEError as error:
                if error.errno == errno.ENOENT:  # gone, or a checkpoint that cannot be reached
                    continue
                raise
            if not pyfuse3.readdir_reply(token, FileNameT(os.fsencode(name)), attributes, place):
                self._nodes.forget(attributes.st_ino, 0)
                return
            self._nodes.looked_up(attributes.st_ino)

    async def _entries(
        self, inode: InodeT
    ) -> list[tuple[str, Callable[[], Awaitable[EntryAttributes]]]]:
        """Names of a directory and how to get at their attributes."""
        node = self._node(inode)
        if isinstance(node, ViewFolder):
            names = [f"{disk}{IMAGE_SUFFIX}" for disk in self._views[node.at_ns].disks]
            return [(name, _later(self._image_entry, node, name)) for name in names]
        if inode == ROOT:
            return [
                (name, partial(self._top_entry, name)) for name in ("at", "checkpoints", "latest")
            ]
        if inode == CHECKPOINTS:
            state = await self._in_thread(self._replica.state)
            links = {name: Link(f"tag:{name}", "../at/") for name in sorted(state.checkpoints)}
            return [(name, partial(self._link_entry, link)) for name, link in links.items()]
        names = [format_instant(at_ns) for at_ns in sorted(self._views)]
        return [(name, partial(self._instant_entry, name)) for name in names]

    # Files

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        node = self._node(inode)
        if not isinstance(node, Image):
            raise FUSEError(errno.EISDIR)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        handle = FileHandleT(self._next_handle)
        self._next_handle += 1
        self._open[handle] = (self._views[node.at_ns], node.disk)
        return FileInfo(fh=handle, keep_cache=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        view, disk = self._open[fh]
        # The reply takes any buffer; a copy of a megabyte would cost a tenth of the throughput.
        is_alone = size <= SMALL_BYTES and not self.has_threads() and not self.has_more()
        try:
            return cast(bytes, view.read(disk, off, size, wait=is_alone))
        except BlockingIOError:
            return cast(bytes, await self._in_thread(partial(view.read, disk, off, size)))
        except BlockreplError as error:
            raise self._failed(error) from error

    def has_threads(self) -> bool:
        """Whether threads are at work on requests."""
        return self._in_threads > 0

    async def release(self, fh: FileHandleT) -> None:
        del self._open[fh]

    async def flush(self, fh: FileHandleT) -> None:
        pass

    async def _in_thread(self, function: Callable[[], Result]) -> Result:
        self._in_threads += 1
        try:
            return await trio.to_thread.run_sync(function, limiter=self._readers)
        except PointError as error:
            log.info("%s; %s", error, error.hint)
            raise FUSEError(errno.ENOENT) from error
        except BlockreplError as error:
            raise self._failed(error) from error
        finally:
            self._in_threads -= 1

    def _failed(self, error: BlockreplError) -> FUSEError:
        """EIO, told once. Where damage is found it is told already."""
        text = str(error)
        if not isinstance(error, DamageError) and text not in self._told:
            self._told.add(text)
            log.error("%s", text)
        return FUSEError(errno.EIO)


def _later(
    function: Callable[..., EntryAttributes], *args: object
) -> Callable[[], Awaitable[EntryAttributes]]:
    async def call() -> EntryAttributes:
        return function(*args)

    return call


def _attributes(
    inode: InodeT,
    mode: int,
    at_ns: int,
    timeout_seconds: float,
    *,
    links: int = 1,
    size_bytes: int = 0,
    allocated_bytes: int = 0,
) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = inode
    entry.generation = 0
    entry.entry_timeout = entry.attr_timeout = timeout_seconds
    entry.st_mode = pyfuse3.ModeT(mode)
    entry.st_nlink = links
    entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
    entry.st_size = size_bytes
    entry.st_blksize = BLOCK_BYTES
    entry.st_blocks = -(-allocated_bytes // 512)
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = at_ns
    return entry
