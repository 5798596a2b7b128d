"""Files and directories that remember what of them is durable, and what a power loss leaves.

==========  ====================================  ================================================
of a        durable is                            a power loss takes
==========  ====================================  ================================================
file        its content at its last fsync         writes and truncations since
directory   its names at its last fsync           names made, removed and renamed since. A rename
                                                  within one directory is one change
==========  ====================================  ================================================

A file's fsync does not make its name durable, as POSIX has it. What it takes, by `Loss`:

======  =========================================================================================
drop    everything that is not durable
keep    nothing
tear    of each change, all, nothing or (of a write) some of its sectors, at random; names likewise.
        Sometimes only the file's new size is kept, so that its new end reads as zeros
======  =========================================================================================
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

PAGE_BYTES = 4096
SECTOR_BYTES = 512


class Loss(enum.Enum):
    DROP = "drop"
    TEAR = "tear"
    KEEP = "keep"


class Content:
    """Bytes, by page; a page that is not there is zeros. Copies share their pages."""

    def __init__(self, pages: dict[int, bytes] | None = None, size_bytes: int = 0) -> None:
        self.pages = pages or {}
        self.size_bytes = size_bytes

    def copy(self) -> Content:
        return Content(dict(self.pages), self.size_bytes)

    def read(self, offset: int, size_bytes: int) -> bytes:
        end = min(offset + size_bytes, self.size_bytes)
        if offset >= end:
            return b""
        first, last = offset // PAGE_BYTES, (end - 1) // PAGE_BYTES
        zeros = bytes(PAGE_BYTES)
        whole = b"".join(self.pages.get(page, zeros) for page in range(first, last + 1))
        start = offset - first * PAGE_BYTES
        return whole[start : start + end - offset]

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        self.size_bytes = max(self.size_bytes, end)
        at = offset
        while at < end:
            page, start = divmod(at, PAGE_BYTES)
            piece = data[at - offset : at - offset + PAGE_BYTES - start]
            if len(piece) < PAGE_BYTES:
                old = self.pages.get(page, bytes(PAGE_BYTES))
                piece = old[:start] + piece + old[start + len(piece) :]
            self.pages[page] = piece
            at = (page + 1) * PAGE_BYTES

    def truncate(self, size_bytes: int) -> None:
        last, kept = divmod(size_bytes, PAGE_BYTES)
        if size_bytes < self.size_bytes:
            self.pages = {n: page for n, page in self.pages.items() if n * PAGE_BYTES < size_bytes}
            if kept and last in self.pages:
                self.pages[last] = self.pages[last][:kept] + bytes(PAGE_BYTES - kept)
        self.size_bytes = size_bytes


@dataclass(frozen=True, slots=True)
class Write:
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    size_bytes: int


@dataclass(slots=True, eq=False)
class File:
    """Also a socket, or a pipe: then it has no content."""

    mode: int
    name: str = ""  # the last it had
    inode: int = 0
    content: Content = field(default_factory=Content)
    durable: Content = field(default_factory=Content)
    pending: list[Write | Truncate] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        self.content.write(offset, data)
        self.pending.append(Write(offset, data))

    def truncate(self, size_bytes: int) -> None:
        self.content.truncate(size_bytes)
        self.pending.append(Truncate(size_bytes))

    def sync(self) -> None:
        self.durable = self.content.copy()
        self.pending.clear()

    def lose_writeback(self) -> None:
        """As when writing dirty pages back has failed: the device never gets them, but the file
        keeps its size, and whoever has its pages in memory goes on seeing them.
        """
        size_bytes = self.content.size_bytes
        self.content = self.durable.copy()
        self.content.truncate(size_bytes)
        self.pending = [Truncate(size_bytes)]

    def lose_power(self, loss: Loss, choose: random.Random) -> None:
        if loss is Loss.DROP:
            self.content = self.durable
        elif loss is Loss.TEAR:
            self.content = self._torn(choose)
        self.sync()

    def _torn(self, choose: random.Random) -> Content:
        content = self.durable.copy()
        for change in self.pending:
            fate = choose.randrange(3)
            if isinstance(change, Truncate):
                if fate:
                    content.truncate(change.size_bytes)
            elif fate == 1:
                content.write(change.offset, change.data)
            elif fate == 2:
                for offset, data in _sectors(change):
                    if choose.random() < 0.5:
                        content.write(offset, data)
        if choose.random() < 0.25:
            content.truncate(max(content.size_bytes, self.content.size_bytes))
        return content


def _sectors(write: Write) -> Iterator[tuple[int, bytes]]:
    at = write.offset
    end = write.offset + len(write.data)
    while at < end:
        after = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
        yield at, write.data[at - write.offset : after - write.offset]
        at = after


Setting = tuple[bytes, "Node | None"]  # a name, and what it names now


@dataclass(slots=True, eq=False)
class Directory:
    mode: int
    name: str = ""
    inode: int = 0
    names: dict[bytes, Node] = field(default_factory=dict)
    durable: dict[bytes, Node] = field(default_factory=dict)
    pending: list[tuple[Setting, ...]] = field(default_factory=list)

    def change(self, *settings: Setting) -> None:
        """Change names, all of them in one step."""
        _apply(self.names, settings)
        self.pending.append(settings)

    def sync(self) -> None:
        self.durable = dict(self.names)
        self.pending.clear()

    def lose_power(self, loss: Loss, choose: random.Random) -> None:
        if loss is Loss.DROP:
            self.names = self.durable
        elif loss is Loss.TEAR:
            self.names = dict(self.durable)
            for settings in self.pending:
                if choose.random() < 0.5:
                    _apply(self.names, settings)
        self.sync()
        for node in self.names.values():
            node.lose_power(loss, choose)


def _apply(names: dict[bytes, Node], settings: tuple[Setting, ...]) -> None:
    for name, node in settings:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


Node = File | Directory
