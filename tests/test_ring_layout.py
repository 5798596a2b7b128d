"""formats/ring.py and formats/hot_map.py, and their tables, say what ring.h and hot_map.c do."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import blockrepl.capture
from blockrepl import limits
from blockrepl.formats import hot_map
from blockrepl.formats import ring as layout
from blockrepl.formats.frame import FUA, RecordKind
from blockrepl.services.disk_server import THREADS
from blockrepl.units import MIB

HEADERS = Path(blockrepl.capture.__file__).parent

PROGRAM = r"""
#include <stddef.h>
#include <stdio.h>
#include "ring.h"
#define HEADER(f) printf("header." #f " %zu\n", offsetof(struct ring_header, f))
#define INFLIGHT(f) printf("inflight." #f " %zu\n", offsetof(struct ring_inflight, f))
#define SLOT(f) printf("slot." #f " %zu\n", offsetof(struct ring_slot, f))
#define NUMBER(n) printf(#n " %ld\n", (long)(n))
int main(void)
{
    HEADER(magic); HEADER(version); HEADER(complete); HEADER(ring_id); HEADER(disk_id);
    HEADER(size_bytes); HEADER(region_bytes); HEADER(region_count); HEADER(slot_count);
    HEADER(payload_bytes); HEADER(clock_offset); HEADER(head); HEADER(busy);
    HEADER(last_stamp); HEADER(gap_from); HEADER(dropped); HEADER(written_bytes);
    HEADER(hot_regions); HEADER(writer_pid); HEADER(flushed); HEADER(flush_failed);
    HEADER(flush_unknown); HEADER(flush_known); HEADER(flushing);
    HEADER(tail); HEADER(durable); HEADER(next_number);
    INFLIGHT(start); INFLIGHT(end); INFLIGHT(generation); INFLIGHT(pad);
    SLOT(stamp); SLOT(offset); SLOT(position); SLOT(length); SLOT(kind);
    NUMBER(sizeof(struct ring_header)); NUMBER(sizeof(struct ring_inflight));
    NUMBER(sizeof(struct ring_slot)); NUMBER(RING_VERSION); NUMBER(RING_HEADER_BYTES);
    NUMBER(RING_INFLIGHT_SLOTS); NUMBER(RING_FLUSH_SLOTS); NUMBER(RING_PAGE);
    NUMBER(RECORD_WRITE); NUMBER(RECORD_ZERO); NUMBER(RECORD_TRIM); NUMBER(RECORD_FLUSH);
    NUMBER(RECORD_FUA);
    printf("RING_MAGIC %s\n", RING_MAGIC);
    return 0;
}
"""

# field of struct ring_header -> (words of its line in the module's table, constant if there is one)
FIELDS = {
    "magic": ("magic", None),
    "version": ("version", None),
    "complete": ("1 once the file is fully set up", layout.COMPLETE_AT),
    "ring_id": ("ring id", None),
    "disk_id": ("disk id", None),
    "size_bytes": ("disk size", None),
    "region_bytes": ("region bytes", None),
    "region_count": ("region count", None),
    "slot_count": ("slot count", None),
    "payload_bytes": ("payload bytes", None),
    "clock_offset": ("clock offset", None),
    "head": ("head", layout.HEAD_AT),
    "busy": ("busy", layout.BUSY_AT),
    "last_stamp": ("last stamp", layout.LAST_STAMP_AT),
    "gap_from": ("gap from", layout.GAP_FROM_AT),
    "dropped": ("records dropped", layout.DROPPED_AT),
    "written_bytes": ("payload bytes ever", layout.WRITTEN_AT),
    "hot_regions": ("hot regions", layout.HOT_REGIONS_AT),
    "writer_pid": ("writer's process id", layout.WRITER_AT),
    "flushed": ("records before this sequence are on the local disk", layout.FLUSHED_AT),
    "flush_failed": ("1 once the local disk has failed to flush", layout.FLUSH_FAILED_AT),
    "flush_unknown": ("flush unknown", layout.FLUSH_UNKNOWN_AT),
    "flush_known": ("flush known", layout.FLUSH_KNOWN_AT),
    "flushing": ("flushing", layout.FLUSHING_AT),
    "tail": ("tail", layout.TAIL_AT),
    "durable": ("durable", layout.DURABLE_AT),
    "next_number": ("next number", layout.NEXT_NUMBER_AT),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the compiler makes of ring.h."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "no C compiler"
    directory = tmp_path_factory.mktemp("layout")
    (directory / "layout.c").write_text(PROGRAM)
    program = directory / "layout"
    subprocess.run(
        [compiler, f"-I{HEADERS}", "-o", program, directory / "layout.c"], check=True, timeout=60
    )
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return dict(line.rsplit(" ", 1) for line in lines.splitlines())


def table(text: str | None) -> dict[int, tuple[int | None, str]]:
    """A module's byte table: offset -> (size, words)."""
    found = {}
    for line in (text or "").splitlines():
        if line[:6].strip().isdigit():
            found[int(line[:6])] = (int(line[8:12]) if line[8:12].strip() else None, line[14:])
    return found


def test_header_offsets(compiled: dict[str, str]) -> None:
    for field, (_, constant) in FIELDS.items():
        if constant is not None:
            assert int(compiled[f"header.{field}"]) == constant, field
    assert {name for name in compiled if name.startswith("header.")} == {
        f"header.{field}" for field in FIELDS
    }


def test_the_table_says_what_the_compiler_does(compiled: dict[str, str]) -> None:
    rows = table(layout.__doc__)
    assert len(rows) == len(FIELDS)
    for field, (words, _) in FIELDS.items():
        size, text = rows[int(compiled[f"header.{field}"])]
        assert text.startswith(words), field
        assert size is not None


def test_every_field_of_the_header_is_tried_here() -> None:
    source = (HEADERS / "ring.h").read_text()
    body = source.split("struct ring_header {")[1].split("};")[0]
    fields = re.findall(r"^\s+\w+ (\w+)(?:\[\w[^]]*\])?;", body, re.MULTILINE)
    assert {field for field in fields if not field.startswith("pad")} == set(FIELDS)


def test_the_packed_header_is_the_struct(compiled: dict[str, str]) -> None:
    ring = layout.geometry(
        ring_id=0x1112131415161718,
        disk=bytes(range(16)),
        size_bytes=5 * MIB + 512,
        region_bytes=MIB,
        ring_bytes=limits.RING_BYTES_MIN,
        clock_offset=-5,
    )
    data = layout.encode_geometry(ring)
    expected = {
        "ring_id": ring.ring_id,
        "size_bytes": ring.size_bytes,
        "region_bytes": ring.region_bytes,
        "region_count": 6,
        "slot_count": ring.slot_count,
        "payload_bytes": ring.payload_bytes,
    }
    for field, value in expected.items():
        at = int(compiled[f"header.{field}"])
        assert int.from_bytes(data[at : at + 8], "little") == value, field
    at = int(compiled["header.clock_offset"])
    assert int.from_bytes(data[at : at + 8], "little", signed=True) == -5
    at = int(compiled["header.disk_id"])
    assert data[at : at + 16] == ring.disk
    assert data[:8].decode() == compiled["RING_MAGIC"]
    assert layout.decode_geometry(data) is None  # not complete yet
    complete = bytearray(data)
    complete[layout.COMPLETE_AT] = 1
    assert layout.decode_geometry(bytes(complete)) == ring
    complete[int(compiled["header.version"])] = 1
    assert layout.decode_geometry(bytes(complete)) is None  # of an earlier version: like none


def test_slots_and_ranges_in_flight(compiled: dict[str, str]) -> None:
    for name, kind in (("inflight", layout.INFLIGHT), ("slot", layout.SLOT)):
        assert kind.fields is not None
        offsets = {field: entry[1] for field, entry in kind.fields.items()}
        for field, at in offsets.items():
            c_name = "pad" if field == "reserved" else field
            assert int(compiled[f"{name}.{c_name}"]) == at
        assert int(compiled[f"sizeof(struct ring_{name})"]) == kind.itemsize


def test_numbers(compiled: dict[str, str]) -> None:
    assert int(compiled["RING_VERSION"]) == layout.VERSION
    assert int(compiled["RING_HEADER_BYTES"]) == layout.HEADER_BYTES
    assert int(compiled["sizeof(struct ring_header)"]) == layout.HEADER_BYTES
    assert int(compiled["RING_INFLIGHT_SLOTS"]) == layout.INFLIGHT_SLOTS
    assert int(compiled["RING_FLUSH_SLOTS"]) == layout.FLUSH_SLOTS > THREADS
    assert int(compiled["RING_PAGE"]) == layout.PAGE_BYTES
    assert int(compiled["RECORD_FUA"]) == FUA
    for kind in RecordKind:
        assert int(compiled[f"RECORD_{kind.name}"]) == kind


@pytest.mark.parametrize("size_bytes", [512, MIB, MIB + 512, 5000 * MIB])
@pytest.mark.parametrize("ring_bytes", [limits.RING_BYTES_MIN, limits.RING_BYTES_DEFAULT])
def test_parts_of_a_ring_begin_on_pages_and_do_not_meet(size_bytes: int, ring_bytes: int) -> None:
    ring = layout.geometry(
        ring_id=1,
        disk=bytes(16),
        size_bytes=size_bytes,
        region_bytes=MIB,
        ring_bytes=ring_bytes,
        clock_offset=0,
    )
    parts = [
        (ring.inflight_at, layout.INFLIGHT_SLOTS * layout.INFLIGHT.itemsize),
        (ring.stale_at, ring.region_count),
        (ring.syncing_at, ring.region_count),
        (ring.slots_at, ring.slot_count * layout.SLOT.itemsize),
        (ring.payload_at, ring.payload_bytes),
    ]
    assert parts[0][0] == layout.HEADER_BYTES
    for (start, size), (following, _) in pairwise(parts):
        assert following % layout.PAGE_BYTES == 0
        assert start + size <= following
    assert ring.file_bytes == sum(parts[-1])
    assert ring.slot_count * layout.SLOT.itemsize + ring.payload_bytes <= ring_bytes


def test_the_hot_map_is_as_its_table_says() -> None:
    rows = table(hot_map.__doc__)
    assert [(at, size) for at, (size, _) in rows.items()] == [
        (0, 8),
        (8, 4),
        (12, 4),
        (16, 16),
        (32, 8),
        (40, 8),
        (4096, None),
    ]
    data = hot_map.encode(bytes(range(16)), 20 * MIB, MIB, hot=True)
    assert data[:8] == hot_map.MAGIC
    assert "BRHOT001" in rows[0][1]
    assert int.from_bytes(data[8:12], "little") == 1
    assert data[16:32] == bytes(range(16))
    assert int.from_bytes(data[32:40], "little") == 20 * MIB
    assert int.from_bytes(data[40:48], "little") == MIB
    assert data[hot_map.HEADER_BYTES :] == b"\xff\xff\x0f"


def test_capture_reads_the_map_where_its_table_says() -> None:
    source = (HEADERS / "hot_map.c").read_text()
    [found] = re.findall(r"#define MAP_HEADER_BYTES (\d+)", source)
    assert int(found) == hot_map.HEADER_BYTES
    source = (HEADERS / "device.c").read_text()
    [found] = re.findall(r"#define RECORD_BYTES_MAX \((\d+)u << 20\)", source)
    assert int(found) * MIB == limits.REQUEST_BYTES_MAX


def test_bits_of_the_hot_map_are_lowest_first() -> None:
    data = bytearray(hot_map.encode(bytes(16), 12 * MIB, MIB, hot=False))
    data[hot_map.HEADER_BYTES + 1] |= 1 << 2
    found = hot_map.decode(bytes(data), bytes(16), 12 * MIB, MIB)
    assert found is not None
    assert np.flatnonzero(found).tolist() == [10]


@pytest.mark.parametrize(
    ("disk", "size_bytes"), [(b"\1" * 16, 12 * MIB), (bytes(16), 13 * MIB), (bytes(16), 80 * MIB)]
)
def test_the_map_of_another_disk_or_size_is_not_read(disk: bytes, size_bytes: int) -> None:
    data = hot_map.encode(bytes(16), 12 * MIB, MIB, hot=False)
    assert hot_map.decode(data, disk, size_bytes, MIB) is None
