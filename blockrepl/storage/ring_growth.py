"""A ring for a disk that has grown: the same ring (id, sequences, records) with more regions.

Only what waits in it is copied of the payload. What is being synced is stale in the copy: who ends
that sync may still write to the old file. No region of the new part is stale.

Nobody may write to the ring meanwhile: its server does not run, and the agent is the caller, or
does not run either.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from blockrepl.errors import StateError
from blockrepl.formats import ring as layout
from blockrepl.formats.frame import KIND_MASK, RecordKind
from blockrepl.storage.ring import new_ring, unfinished_path
from blockrepl.units import MIB

CHUNK_BYTES = 1 * MIB  # copied at once


def make_grown(path: Path, size_bytes: int) -> Path:
    """Copy a ring for its disk's new size; where the copy is. StorageError: there is no room."""
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = os.pread(source, layout.HEADER_BYTES, 0)
        old = layout.decode_geometry(header)
        if old is None:
            raise StateError(f"{path} is not a ring", code="ring")
        count = -(-size_bytes // old.region_bytes)
        new = replace(old, size_bytes=size_bytes, region_count=count)
        with new_ring(path, new) as target:
            known = layout.HEADER.size
            os.pwrite(target, header[known:], known)
            _copy(source, old.inflight_at, target, new.inflight_at, old.stale_at - old.inflight_at)
            os.pwrite(target, _stale(source, old).tobytes(), new.stale_at)
            slot_bytes = old.slot_count * layout.SLOT.itemsize
            _copy(source, old.slots_at, target, new.slots_at, slot_bytes)
            for at, length in _payload_in_use(source, old, header):
                _copy(source, old.payload_at + at, target, new.payload_at + at, length)
    finally:
        os.close(source)
    return unfinished_path(path)


def _stale(source: int, ring: layout.RingGeometry) -> np.ndarray:
    stale = np.frombuffer(os.pread(source, ring.region_count, ring.stale_at), np.uint8)
    syncing = np.frombuffer(os.pread(source, ring.region_count, ring.syncing_at), np.uint8)
    return stale | syncing


def _payload_in_use(source: int, ring: layout.RingGeometry, header: bytes) -> list[tuple[int, int]]:
    """The pieces of the payload area that hold records not yet let go: places and lengths."""
    head = int.from_bytes(header[layout.HEAD_AT : layout.HEAD_AT + 8], "little")
    tail = int.from_bytes(header[layout.TAIL_AT : layout.TAIL_AT + 8], "little")
    if head == tail:
        return []
    first, last = (
        np.frombuffer(
            os.pread(
                source,
                layout.SLOT.itemsize,
                ring.slots_at + sequence % ring.slot_count * layout.SLOT.itemsize,
            ),
            layout.SLOT,
        )[0]
        for sequence in (tail, head - 1)
    )
    is_write = int(last["kind"]) & KIND_MASK == RecordKind.WRITE
    length = int(last["position"]) + is_write * int(last["length"]) - int(first["position"])
    at = int(first["position"]) % ring.payload_bytes
    part = min(length, ring.payload_bytes - at)
    return [(at, part), (0, length - part)]


def _copy(source: int, at: int, target: int, to: int, length: int) -> None:
    for done in range(0, length, CHUNK_BYTES):
        data = os.pread(source, min(CHUNK_BYTES, length - done), at + done)
        os.pwrite(target, data, to + done)
