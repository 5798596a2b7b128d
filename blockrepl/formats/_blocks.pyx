# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The stored blocks of a frame (frame.py): made of a payload, and proven. Without the GIL."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport uint8_t, uint32_t, uint64_t

import numpy as np

cdef extern from "lz4.h" nogil:
    int LZ4_sizeofState()
    int LZ4_compress_fast_extState(
        void *state, const char *source, char *target, int size, int size_max, int acceleration)

cdef extern from "digest.h" nogil:
    uint64_t digest64(const void *data, size_t length)

cdef enum:
    ACCELERATION = 1  # of LZ4: the least, which compresses best


def encode_blocks(payload, Py_ssize_t block_bytes, uint32_t raw_bit):
    """Compress each block of the payload on its own where that makes it smaller.

    Returned: the stored bytes, neighbours that are not compressed as one view of ``payload``; what
    the block table says of each block: digests of the stored bytes, lengths with ``raw_bit``.
    """
    whole = memoryview(payload).cast("B")
    cdef Py_ssize_t size = len(whole), count = (size + block_bytes - 1) // block_bytes
    digests, lengths = np.empty(count, np.uint64), np.empty(count, np.uint32)
    if count == 0:
        return [], digests, lengths
    cdef const uint8_t[::1] view = whole
    cdef uint64_t[::1] digest_of = digests
    cdef uint32_t[::1] length_of = lengths
    cdef Py_ssize_t index, at, length, raw_from = 0
    cdef int packed
    cdef char *state = <char *>PyMem_Malloc(LZ4_sizeofState() + block_bytes)
    if state is NULL:
        raise MemoryError
    cdef char *target = state + LZ4_sizeofState()
    stored = []
    try:
        for index in range(count):
            at = index * block_bytes
            length = min(block_bytes, size - at)
            with nogil:
                # Room for less than the block: LZ4 gives up, and copies nothing.
                packed = LZ4_compress_fast_extState(
                    state, <const char *>&view[at], target, <int>length, <int>length - 1, ACCELERATION
                )
                if packed:
                    digest_of[index] = digest64(target, packed)
                    length_of[index] = packed
                else:
                    digest_of[index] = digest64(&view[at], length)
                    length_of[index] = <uint32_t>length | raw_bit
            if packed:
                if raw_from < at:
                    stored.append(whole[raw_from:at])
                stored.append(PyBytes_FromStringAndSize(target, packed))
                raw_from = at + length
        if raw_from < size:
            stored.append(whole[raw_from:])
    finally:
        PyMem_Free(state)
    return stored, digests, lengths


def first_damaged(const uint8_t[::1] body, const uint64_t[::1] bounds,
                  const uint64_t[::1] digests):
    """The first block that does not match its digest, or -1. The bounds are those of the body."""
    cdef Py_ssize_t index, count = digests.shape[0]
    if bounds.shape[0] != count + 1 or bounds[count] > <uint64_t>body.shape[0]:
        raise ValueError("blocks lie outside of their body")
    for index in range(count):
        if bounds[index] > bounds[index + 1]:
            raise ValueError("blocks overlap")
    with nogil:
        for index in range(count):
            if digest64(&body[0] + bounds[index], bounds[index + 1] - bounds[index]) \
                    != digests[index]:
                break
        else:
            index = -1
    return index
