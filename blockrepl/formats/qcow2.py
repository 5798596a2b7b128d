"""A qcow2 image (version 3) with some clusters and nothing else: what a patch is written as.

Written front to back, the header last:

==============  ==========================================================================
clusters        hold
==============  ==========================================================================
0               the header (104 bytes; QEMU's docs/interop/qcow2.rst)
then, by turns  data clusters, and the L2 table of each 512 MiB of disk that has some
then            the L1 table, the refcount blocks (each cluster is used once), their table
==============  ==========================================================================

A cluster that is all zeros is an entry of its L2 table and takes no room. One that is not there
shows the image's backing file; there is none until somebody names one (``qemu-img rebase -u``).
All integers are big-endian.
"""

from __future__ import annotations

import struct

import numpy as np

from blockrepl.formats.frame import U64

CLUSTER_BITS = 16
CLUSTER_BYTES = 1 << CLUSTER_BITS
L2_ENTRIES = CLUSTER_BYTES // 8
REFCOUNTS = CLUSTER_BYTES // 2  # of 16 bits, in a refcount block
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
USED_ONCE = 1 << 63  # in an entry of L1 and L2: its cluster's refcount is exactly one
READS_AS_ZEROS = 1


def l1_entries(size_bytes: int) -> int:
    return -(-size_bytes // (CLUSTER_BYTES * L2_ENTRIES))


def entry(cluster: int) -> int:
    """What points to a cluster of the file."""
    return cluster * CLUSTER_BYTES | USED_ONCE


def encode_table(entries: U64) -> bytes:
    """A table in whole clusters."""
    data = entries.astype(">u8").tobytes()
    return data + bytes(-len(data) % CLUSTER_BYTES)


def encode_end(size_bytes: int, l1: U64, first_cluster: int) -> tuple[bytes, bytes]:
    """All from the L1 table on, to be written at ``first_cluster``; and the header."""
    l1_table = encode_table(l1)
    before = first_cluster + len(l1_table) // CLUSTER_BYTES
    blocks = tables = 1
    while True:  # refcount blocks and their table are counted themselves
        clusters = before + blocks + tables
        wanted = -(-clusters // REFCOUNTS), -(-blocks * 8 // CLUSTER_BYTES)
        if wanted == (blocks, tables):
            break
        blocks, tables = max(blocks, wanted[0]), max(tables, wanted[1])
    counts = np.zeros(blocks * REFCOUNTS, ">u2")
    counts[:clusters] = 1
    places = np.arange(before, before + blocks, dtype=np.uint64) * np.uint64(CLUSTER_BYTES)
    header = HEADER.pack(
        *(b"QFI\xfb", 3, 0, 0, CLUSTER_BITS, size_bytes, 0),
        *(l1_entries(size_bytes), first_cluster * CLUSTER_BYTES),
        *((before + blocks) * CLUSTER_BYTES, tables, 0, 0),
        *(0, 0, 0, 4, HEADER.size),
    )
    return l1_table + counts.tobytes() + encode_table(places), header
