"""The nodes of a mount's tree, and which of them the kernel knows."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyfuse3 import InodeT

FIRST_DYNAMIC = 16  # the tree's fixed directories have inodes below it


@dataclass(frozen=True, slots=True)
class Folder:
    """One of the fixed directories of the tree."""


@dataclass(frozen=True, slots=True)
class Link:
    """A symlink to the instant that a point means whenever it is asked. ``up`` leads to ``at``."""

    point: str
    up: str


@dataclass(frozen=True, slots=True)
class ViewFolder:
    at_ns: int


@dataclass(frozen=True, slots=True)
class Image:
    at_ns: int
    disk: str


Node = Folder | Link | ViewFolder | Image


@dataclass(slots=True)
class Nodes:
    """Inodes the kernel knows, with its count of lookups of each."""

    by_inode: dict[InodeT, Node] = field(default_factory=dict)
    by_node: dict[Node, InodeT] = field(default_factory=dict)
    lookups: dict[InodeT, int] = field(default_factory=dict)
    next_inode: int = FIRST_DYNAMIC

    def inode(self, node: Node) -> InodeT:
        inode = self.by_node.get(node)
        if inode is None:
            inode = InodeT(self.next_inode)
            self.next_inode += 1
            self.by_node[node] = inode
            self.by_inode[inode] = node
            self.lookups[inode] = 0
        return inode

    def looked_up(self, inode: InodeT) -> None:
        if inode in self.lookups:
            self.lookups[inode] += 1

    def forget(self, inode: InodeT, count: int) -> None:
        if inode in self.lookups:
            self.lookups[inode] -= count
            if self.lookups[inode] <= 0:
                del self.lookups[inode]
                del self.by_node[self.by_inode.pop(inode)]
