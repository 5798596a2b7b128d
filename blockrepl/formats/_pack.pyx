# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Columns of integers as bits: value i is base + (i-th ``width`` bits << shift), low bits first.

``pack`` finds the least width; ``unpack_into`` reads one column of a chunk into an array of its
type, without the GIL. Both are exact for every 64-bit value.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

ctypedef fused Number:
    uint8_t
    uint32_t
    uint64_t


def pack(const uint64_t[::1] values):
    """(base, shift, width, bytes); of no values: zeros and no bytes."""
    cdef Py_ssize_t index, count = values.shape[0]
    cdef uint64_t base, differ = 0, bits
    cdef int shift = 0, width = 0
    if count == 0:
        return 0, 0, 0, b""
    base = values[0]
    for index in range(1, count):
        if values[index] < base:
            base = values[index]
    for index in range(count):
        differ |= values[index] - base
    if differ:
        while not (differ >> shift) & 1:
            shift += 1
        bits = differ >> shift
        while bits:
            width += 1
            bits >>= 1
    cdef Py_ssize_t size = (count * width + 7) // 8
    cdef bytearray packed = bytearray(size + 16)  # whole words are written
    cdef uint8_t *target = packed
    cdef Py_ssize_t at
    cdef int skip
    cdef uint64_t word
    if width:
        for index in range(count):
            bits = (values[index] - base) >> shift
            at = (index * width) >> 3
            skip = (index * width) & 7
            memcpy(&word, target + at, 8)
            word |= bits << skip
            memcpy(target + at, &word, 8)
            if skip + width > 64:
                target[at + 8] |= <uint8_t>(bits >> (64 - skip))
    return base, shift, width, bytes(packed[:size])


def unpack_into(
    const uint8_t[::1] data, Py_ssize_t start, Py_ssize_t count,
    uint64_t base, int shift, int width, Number[::1] target, Py_ssize_t place,
):
    """Write ``count`` values to ``target`` from ``place`` on. At least 9 bytes follow the column.

    ValueError when that leads out of the data or the target.
    """
    cdef Py_ssize_t index, at
    cdef int skip
    cdef uint64_t word, mask
    if not 0 <= width <= 64 or not 0 <= shift < 64 or start < 0 or count < 0 or place < 0:
        raise ValueError("a packed column is malformed")
    if place + count > target.shape[0] or start + (count * width + 7) // 8 + 9 > data.shape[0]:
        raise ValueError("a packed column leads out of its chunk")
    mask = <uint64_t>0xFFFFFFFFFFFFFFFF if width == 64 else (<uint64_t>1 << width) - 1
    cdef const uint8_t *source = &data[start]
    with nogil:
        for index in range(count):
            at = (index * width) >> 3
            skip = (index * width) & 7
            memcpy(&word, source + at, 8)
            word >>= skip
            if skip + width > 64:
                word |= <uint64_t>source[at + 8] << (64 - skip)
            target[place + index] = <Number>(base + ((word & mask) << shift))
