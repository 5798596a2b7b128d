"""Reads the byte tables of module docstrings, so that tests hold them against the structs."""

from __future__ import annotations

import re
import struct

Field = tuple[int, int]  # offset, size


def byte_table(docstring: str | None) -> list[Field]:
    """(offset, size) of each row ``offset size text``."""
    rows = re.findall(r"^(\d+) +(\d+) +\S", docstring or "", re.MULTILINE)
    return [(int(offset), int(size)) for offset, size in rows]


def struct_fields(form: struct.Struct, start: int = 0) -> list[Field]:
    """(offset, size) of each field of a little-endian struct; padding is a field of its own."""
    fields: list[Field] = []
    for count, code in re.findall(r"(\d*)([a-zA-Z])", form.format):
        each = struct.calcsize("<" + code)
        sizes = [int(count or 1) * each] if code in "sx" else [each] * int(count or 1)
        for size in sizes:
            fields.append((start, size))
            start += size
    return fields


def field(data: bytes, place: Field) -> int:
    offset, size = place
    return int.from_bytes(data[offset : offset + size], "little")
