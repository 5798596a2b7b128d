"""The file system's door to the kernel, and the faults it can be told to have.

The extended attribute `CONTROL` of its root takes a command and gives the state, both JSON:

=====================================  ===========================================================
command                                does
=====================================  ===========================================================
{"cut": N, "when": "before"|"after"}   loses power at the N-th fsync from now, before or after it
                                       has taken effect: from then on every call fails with EIO
{..., "of": SUFFIX}                    counts fsyncs of files alone whose name ends like this
{"cut": 0}                             loses power now
{"restore": LOSS, "seed": S}           power comes back; LOSS says what is left (nodes.py). Files
                                       that were open stay dead: EIO
{"fail": N, "error": E}                the N-th counted call from now fails with errno E, once. A
                                       failed fsync of a file loses what was written (nodes.py)
{..., "only": CALL}                    counts calls of that name alone: "fsync", or "read", which
                                       is not counted otherwise: files that are opened from then on
                                       are read anew
{"fail": N, "error": "short"}          the first write from the N-th counted call on writes half
{"full": true|false}                   whatever takes room fails with ENOSPC
{"free_bytes": N}                      what statfs says is free
=====================================  ===========================================================

Counted calls are those that change something; not those on files with a suffix of `UNCOUNTED`,
whose pages the kernel writes when it likes. State: "on", "syncs" and "calls" since the last
command, "failed" (the call that was made to fail, and on what).

Pages are cached by the kernel, so memory can be mapped and what the cache hides is hidden as it is
elsewhere: after a failed fsync, readers see the lost pages until the cache lets go of them.
"""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import sys
from collections.abc import Sequence
from typing import Any

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
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from lossy.nodes import PAGE_BYTES, Directory, File, Loss, Node

CONTROL = "user.lossy"
UNCOUNTED = ("-shm",)  # of SQLite: memory that processes share, worthless after a crash
FREE_BYTES = 1 << 40
NAME_BYTES_MAX = 255


class LossyFileSystem(pyfuse3.Operations):
    """A disk made of memory."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self) -> None:
        super().__init__()
        self.root = Directory(stat.S_IFDIR | 0o755)
        self._nodes: dict[int, Node] = {}
        self._next_inode = int(pyfuse3.ROOT_INODE)
        self._number(self.root)
        self._open: dict[int, tuple[int, Node]] = {}
        self._next_handle = 1
        self._life = 0  # of the power: handles of an earlier one are dead
        self._is_on = True
        self._is_full = False
        self._free_bytes = FREE_BYTES
        self._syncs = self._calls = 0
        self._cut_at, self._cut_after, self._cut_of = -1, False, ""
        self._fail_at, self._error = -1, 0
        self._failed, self._only = "", ""

    def _number(self, node: Node) -> Node:
        node.inode = self._next_inode
        self._nodes[node.inode] = node
        self._next_inode += 1
        return node

    # Faults

    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        if inode != pyfuse3.ROOT_INODE or name != CONTROL.encode():
            raise FUSEError(errno.EOPNOTSUPP)
        self._command(json.loads(value))

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        if inode != pyfuse3.ROOT_INODE or name != CONTROL.encode():
            raise FUSEError(errno.ENODATA)
        state = {
            "on": self._is_on,
            "syncs": self._syncs,
            "calls": self._calls,
            "failed": self._failed,
        }
        return json.dumps(state).encode()

    def _command(self, command: dict[str, Any]) -> None:
        self._is_full = command.get("full", self._is_full)
        self._free_bytes = command.get("free_bytes", self._free_bytes)
        self._syncs = self._calls = 0
        self._cut_at, self._cut_after = command.get("cut", -1), command.get("when") == "after"
        self._cut_of = command.get("of", "")
        self._fail_at = command.get("fail", -1)
        self._error = 0 if command.get("error") == "short" else command.get("error", errno.EIO)
        self._failed, self._only = "", command.get("only", "")
        if self._cut_at == 0:
            self._is_on = False
        if "restore" in command:
            self._restore(Loss(command["restore"]), random.Random(command.get("seed", 0)))

    def _restore(self, loss: Loss, choose: random.Random) -> None:
        self._is_on, self._life = True, self._life + 1
        self.root.lose_power(loss, choose)
        # New inodes: so the kernel finds in none of its caches what was lost.
        self._nodes = {self.root.inode: self.root}
        waiting: list[Node] = list(self.root.names.values())
        while waiting:
            node = self._number(waiting.pop())
            if isinstance(node, Directory):
                waiting += node.names.values()

    def _check_power(self) -> None:
        if not self._is_on:
            raise FUSEError(errno.EIO)

    def _count(self, call: str, name: str, *, takes_room: bool = False) -> bool:
        """Before a call that changes something. True: a write is to fall short."""
        self._check_power()
        if name.endswith(UNCOUNTED):
            return False
        if takes_room and self._is_full:
            raise FUSEError(errno.ENOSPC)
        if self._only and call != self._only:
            return False
        self._calls += 1
        if self._failed or self._fail_at < 0 or self._calls < self._fail_at:
            return False
        if self._error == 0:
            if call == "write":
                self._failed = f"short {call} {name}"
                return True
        elif self._calls == self._fail_at:
            self._failed = f"{call} {name}"
            raise FUSEError(self._error)
        return False

    def _sync(self, node: Node) -> None:
        try:
            self._count("fsync", node.name or "/")
        except FUSEError:
            if self._is_on and isinstance(node, File):
                node.lose_writeback()
            raise
        is_counted = node.name.endswith(self._cut_of)
        self._syncs += is_counted
        is_cut = is_counted and self._syncs == self._cut_at
        if not is_cut or self._cut_after:
            node.sync()
        if is_cut:
            self._is_on = False
            self._check_power()

    # Names

    def _directory(self, inode: int) -> Directory:
        node = self._node(inode)
        assert isinstance(node, Directory)
        return node

    def _node(self, inode: int) -> Node:
        self._check_power()
        try:
            return self._nodes[inode]
        except KeyError:
            raise FUSEError(errno.EIO) from None  # of an earlier life

    def _file(self, handle: int) -> Node:
        life, node = self._open[handle]
        self._check_power()
        if life != self._life:
            raise FUSEError(errno.EIO)
        return node

    def _handle(self, node: Node) -> FileHandleT:
        handle = self._next_handle
        self._next_handle += 1
        self._open[handle] = (self._life, node)
        return FileHandleT(handle)

    def _add(self, parent: int, name: FileNameT, node: Node, call: str) -> Node:
        directory = self._directory(parent)
        self._count(call, os.fsdecode(name), takes_room=True)
        if name in directory.names:
            raise FUSEError(errno.EEXIST)
        node.name = os.fsdecode(name)
        directory.change((name, self._number(node)))
        return node

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        found = self._directory(parent_inode).names.get(name)
        if found is None:
            raise FUSEError(errno.ENOENT)
        return _attributes(found)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Nodes are kept until the power is lost: no test makes many."""

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        node = Directory(stat.S_IFDIR | stat.S_IMODE(mode))
        return _attributes(self._add(parent_inode, name, node, "mkdir"))

    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return _attributes(self._add(parent_inode, name, File(mode), "mknod"))

    async def create(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        node = self._add(parent_inode, name, File(stat.S_IFREG | stat.S_IMODE(mode)), "create")
        return FileInfo(fh=self._handle(node), keep_cache=True), _attributes(node)

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        directory = self._directory(parent_inode)
        if name not in directory.names:
            raise FUSEError(errno.ENOENT)
        self._count("unlink", os.fsdecode(name))
        directory.change((name, None))

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        found = self._directory(parent_inode).names.get(name)
        if isinstance(found, Directory) and found.names:
            raise FUSEError(errno.ENOTEMPTY)
        await self.unlink(parent_inode, name, ctx)

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,  # type: ignore[override]  # pyfuse3's stub says str
        parent_inode_new: InodeT,
        name_new: FileNameT,  # type: ignore[override]
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        old, new = self._directory(parent_inode_old), self._directory(parent_inode_new)
        node = old.names.get(name_old)
        if node is None:
            raise FUSEError(errno.ENOENT)
        if flags:
            raise FUSEError(errno.EINVAL)
        self._count("rename", os.fsdecode(name_new))
        node.name = os.fsdecode(name_new)
        if old is new:
            old.change((name_old, None), (name_new, node))
        else:
            new.change((name_new, node))
            old.change((name_old, None))

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return self._handle(self._directory(inode))

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        directory = self._file(fh)
        assert isinstance(directory, Directory)
        for place, (name, node) in enumerate(list(directory.names.items())[start_id:], start_id):
            if not pyfuse3.readdir_reply(token, FileNameT(name), _attributes(node), place + 1):
                return

    async def releasedir(self, fh: FileHandleT) -> None:
        del self._open[fh]

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        self._sync(self._file(fh))

    # Attributes

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        if inode == pyfuse3.ROOT_INODE:
            return _attributes(self.root)
        return _attributes(self._node(inode))

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self._node(inode)
        if fields.update_mode:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_size and isinstance(node, File):
            self._count("truncate", node.name)
            node.truncate(attr.st_size)
        return _attributes(node)

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        data = StatvfsData()
        data.f_bsize = data.f_frsize = PAGE_BYTES
        data.f_blocks = FREE_BYTES // PAGE_BYTES
        data.f_bfree = data.f_bavail = 0 if self._is_full else self._free_bytes // PAGE_BYTES
        data.f_files = data.f_ffree = data.f_favail = 1 << 20
        data.f_namemax = NAME_BYTES_MAX
        return data

    # Content

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        return FileInfo(fh=self._handle(self._node(inode)), keep_cache=self._only != "read")

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        node = self._file(fh)
        assert isinstance(node, File)
        if self._only == "read":
            self._count("read", node.name)
        return node.content.read(off, size)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        node = self._file(fh)
        assert isinstance(node, File)
        is_short = self._count("write", node.name, takes_room=True)
        data = bytes(buf[: len(buf) // 2] if is_short else buf)
        node.write(off, data)
        return len(data)

    async def flush(self, fh: FileHandleT) -> None:
        pass

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        self._sync(self._file(fh))

    async def release(self, fh: FileHandleT) -> None:
        del self._open[fh]


def _attributes(node: Node) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = InodeT(node.inode)
    entry.generation = 0
    entry.entry_timeout = entry.attr_timeout = 0
    entry.st_mode = ModeT(node.mode)
    entry.st_nlink = 1
    entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
    if isinstance(node, File):
        entry.st_size = node.content.size_bytes
        entry.st_blocks = len(node.content.pages) * PAGE_BYTES // 512
    entry.st_blksize = PAGE_BYTES
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = 0
    return entry


def main(target: str) -> None:
    """Mount, say so on standard output, and serve until the mount is undone."""
    options = set(pyfuse3.default_options) - {"default_permissions"}
    pyfuse3.init(LossyFileSystem(), target, {*options, "fsname=lossy"})
    try:
        print("ready", flush=True)
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(sys.argv[1])
