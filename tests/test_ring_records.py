"""Records are taken out of a ring whole and in order, as many as the limits allow."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from ring_writer import RingWriter

from blockrepl import limits
from blockrepl.formats.frame import RecordKind
from blockrepl.storage.ring import RingReader, create_ring
from blockrepl.units import KIB, MIB

KINDS = [RecordKind.WRITE, RecordKind.WRITE, RecordKind.ZERO, RecordKind.FLUSH]


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_holds_all_that_its_limits_allow(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    disk = bytes(range(16))
    path = tmp_path / "ring"
    create_ring(
        path,
        disk=disk,
        size_bytes=8 * MIB,
        region_bytes=limits.REGION_BYTES,
        ring_bytes=limits.RING_BYTES_MIN,
        clock_offset=0,
        stale=np.zeros(8, np.uint8),
    )
    ring, writer = RingReader(path, disk), RingWriter(path)
    records: list[tuple[int, bytes]] = []
    for _ in range(300):
        kind, data = choose.choice(KINDS), choose.randbytes(choose.choice((512, 4 * KIB, 9 * KIB)))
        if kind == RecordKind.WRITE:
            writer.write(0, data)
        else:
            writer.append(kind, 0, 4096 if kind == RecordKind.ZERO else 0)
            data = b""
        records.append((kind, data))
    first = 0
    while first < len(records):
        head = choose.randint(first + 1, len(records))
        payload_limit = choose.choice((1, 4 * KIB, 18 * KIB, 100 * KIB, 8 * MIB))
        record_limit = choose.choice((1, 7, 1000))
        batch = ring.take(first, head, payload_limit, record_limit)
        due = 1
        while due < min(head - first, record_limit):
            if sum(len(data) for _, data in records[first : first + due + 1]) > payload_limit:
                break
            due += 1
        assert (batch.first, batch.after) == (first, first + due)
        assert batch.columns.kinds.tolist() == [kind for kind, _ in records[first : batch.after]]
        payload = b"".join(data for _, data in records[first : batch.after])
        assert bytes(batch.payload) == payload
        first = batch.after
