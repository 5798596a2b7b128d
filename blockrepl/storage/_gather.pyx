# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Fill a buffer from the many places that a resolved window says its bytes are at.

``Gather`` walks the window's extents once and notes what is to be done:

==========================  ===================================================================
an extent's bytes           are
==========================  ===================================================================
zeros                       left as they are: the buffer is zeros before
of the base image           read from it; beyond its end they are zeros
of a raw, proven block      read from the segment's file
of any other block          missing: the caller hands in its payload (``supply``), or says where it
                            is stored and what its digest is (``prove``)
==========================  ===================================================================

Reads of one file that go on where the last one ends become one. ``read`` does them all, ``prove``
reads, checks and decompresses stored blocks, and both without the GIL. ``ProvenBlocks`` knows which stored blocks need no more proof: it remembers as many as it has
room for, four to a set, and forgets the one of a set that was put there first.
"""

import numpy as np

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.errno cimport EAGAIN, EINTR, EOPNOTSUPP, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv2(int fd, const iovec *vectors, int count, int64_t offset, int flags)

cdef extern from "<fcntl.h>" nogil:
    int posix_fadvise(int fd, int64_t offset, int64_t size, int advice)
    int POSIX_FADV_WILLNEED

cdef extern from * nogil:
    """
    #define XXH_INLINE_ALL
    #include <xxhash.h>
    #include <lz4.h>
    #ifndef RWF_NOWAIT
    #define RWF_NOWAIT 8
    #endif
    """
    uint64_t XXH3_64bits(const void *data, size_t size)
    int LZ4_decompress_safe(const char *source, char *target, int size, int room)
    int RWF_NOWAIT

cdef enum:
    BLOCK_SHIFT = 16
    BLOCK_SIZE = 1 << BLOCK_SHIFT  # limits.BLOCK_BYTES
    WAYS = 4
    DATA = 0  # index.SHOWS_DATA
    BASE = 255  # index.SHOWS_BASE
    IMAGE = -1  # source of a piece; a segment's number is that segment's file
    MISSING = -2  # and below: the missing block -2 - source

BLOCK_BYTES = BLOCK_SIZE
# What may be wrong with a stored block, beside an errno.
ENDS_TOO_SOON = -1
WRONG_DIGEST = -2
WRONG_SIZE = -3
LEADS_OUT = -4
SHOWS_DATA = DATA
SHOWS_BASE = BASE


cdef struct Piece:
    int64_t source
    int64_t offset
    int64_t into
    int64_t length
    int64_t before  # the piece before it of the same missing block, -1 for none
    int descriptor


cdef struct Stored:
    int descriptor
    int64_t offset
    int64_t stored_bytes
    int64_t payload_bytes
    bint is_raw
    uint64_t digest
    int64_t newest  # piece
    uint8_t *payload  # room for it; NULL for a raw block: it is its stored bytes


cdef inline uint64_t _key(uint64_t segment, uint64_t frame, uint64_t block) noexcept nogil:
    # Frames of a segment take 17 bits, blocks of a frame 8. 0 is no key.
    return (segment << 25 | frame << 8 | block) + 1


cdef class ProvenBlocks:
    """Raw blocks whose digest was checked: where they lie. Use it with the GIL held."""

    cdef uint64_t[::1] keys
    cdef int64_t[::1] offsets
    cdef uint32_t[::1] sizes
    cdef uint8_t[::1] next
    cdef uint64_t mask

    def __init__(self, int bits):
        """Room for 2 ** bits blocks, 20 bytes each."""
        self.keys = np.zeros(1 << bits, np.uint64)
        self.offsets = np.zeros(1 << bits, np.int64)
        self.sizes = np.zeros(1 << bits, np.uint32)
        self.next = np.zeros((1 << bits) // WAYS, np.uint8)
        self.mask = (1 << bits) // WAYS - 1

    cdef Py_ssize_t _set(self, uint64_t key) noexcept:
        return <Py_ssize_t>(((key * <uint64_t>0x9E3779B97F4A7C15) >> 32) & self.mask)

    def add(self, uint64_t segment, uint64_t frame, uint64_t block, int64_t offset, uint32_t size):
        cdef uint64_t key = _key(segment, frame, block)
        cdef Py_ssize_t place = self._set(key)
        cdef Py_ssize_t way = self.next[place]
        self.next[place] = (way + 1) % WAYS
        place = place * WAYS + way
        self.keys[place] = key
        self.offsets[place] = offset
        self.sizes[place] = size

    cdef Py_ssize_t find(self, uint64_t key) noexcept:
        cdef Py_ssize_t place = self._set(key) * WAYS
        cdef Py_ssize_t way
        for way in range(WAYS):
            if self.keys[place + way] == key:
                return place + way
        return -1


cdef class Gather:
    """What to do for [first, last) of a disk. ``missing`` are (segment, frame, block)."""

    cdef Piece *pieces
    cdef Py_ssize_t count
    cdef Py_ssize_t room
    cdef dict places
    cdef list newest  # per missing block, its last piece
    cdef readonly list missing

    def __cinit__(self):
        self.pieces = NULL
        self.count = self.room = 0
        self.places = {}
        self.missing = []
        self.newest = []

    def __dealloc__(self):
        PyMem_Free(self.pieces)

    def __init__(
        self,
        ProvenBlocks proven,
        const uint64_t[::1] bounds,
        const uint8_t[::1] kinds,
        const uint32_t[::1] segments,
        const uint32_t[::1] frames,
        const uint32_t[::1] positions,
        uint64_t first,
        uint64_t last,
    ):
        cdef Py_ssize_t low = 0, high = bounds.shape[0], middle
        cdef uint64_t at = first, stop
        if bounds.shape[0] != kinds.shape[0] + 1 or segments.shape[0] != kinds.shape[0]:
            raise ValueError("a window's arrays differ in length")
        if frames.shape[0] != kinds.shape[0] or positions.shape[0] != kinds.shape[0]:
            raise ValueError("a window's arrays differ in length")
        if first > last or first < bounds[0] or last > bounds[high - 1]:
            raise ValueError("a read leads out of its window")
        while low < high:
            middle = (low + high) // 2
            if bounds[middle] <= at:
                low = middle + 1
            else:
                high = middle
        low -= 1
        while at < last:
            stop = bounds[low + 1]
            if stop > last:
                stop = last
            if kinds[low] == BASE:
                self._add(IMAGE, at, at - first, stop - at)
            elif kinds[low] == DATA:
                self._add_data(
                    proven, segments[low], frames[low],
                    positions[low] + (at - bounds[low]), at - first, stop - at,
                )
            at = stop
            low += 1

    cdef int _add_data(
        self, ProvenBlocks proven, uint64_t segment, uint64_t frame,
        uint64_t position, int64_t into, int64_t length,
    ) except -1:
        cdef int64_t block, skip, size
        cdef uint64_t key
        cdef Py_ssize_t place
        while length > 0:
            block = position >> BLOCK_SHIFT
            skip = position & (BLOCK_SIZE - 1)
            size = min(length, BLOCK_SIZE - skip)
            key = _key(segment, frame, block)
            place = proven.find(key)
            if place >= 0 and skip + size <= proven.sizes[place]:
                self._add(segment, proven.offsets[place] + skip, into, size)
            else:
                known = self.places.get(key)
                if known is None:
                    known = self.places[key] = len(self.missing)
                    self.missing.append((segment, frame, block))
                    self.newest.append(-1)
                self._add(MISSING - <int64_t>known, skip, into, size)
                if self.newest[known] != self.count - 1:
                    self.pieces[self.count - 1].before = self.newest[known]
                    self.newest[known] = self.count - 1
            position += size
            into += size
            length -= size

    cdef int _add(self, int64_t source, int64_t offset, int64_t into, int64_t length) except -1:
        cdef Piece *piece
        cdef void *grown
        if self.count:
            piece = &self.pieces[self.count - 1]
            if (
                piece.source == source
                and piece.offset + piece.length == offset
                and piece.into + piece.length == into
            ):
                piece.length += length
                return 0
        if self.count == self.room:
            self.room = max(16, 2 * self.room)
            grown = PyMem_Realloc(self.pieces, self.room * sizeof(Piece))
            if grown == NULL:
                raise MemoryError
            self.pieces = <Piece *>grown
        self.pieces[self.count] = Piece(source, offset, into, length, -1, -1)
        self.count += 1
        return 0

    def files(self):
        """Numbers of the segments to be read, -1 for the image, each once."""
        cdef Py_ssize_t index
        found = {}
        for index in range(self.count):
            if self.pieces[index].source > MISSING:
                found[self.pieces[index].source] = None
        return list(found)

    def prove(self, list wanted, uint8_t[::1] target, int flags):
        """Read, prove and use missing blocks: (number, descriptor, file offset, stored bytes,
        payload bytes, whether it is raw, digest).

        Returns (place in ``wanted`` of what failed, errno or what is wrong, payloads): without
        failure the place is -1, and payloads has those of compressed blocks, None for raw ones.
        """
        cdef Py_ssize_t place, count = len(wanted)
        cdef Py_ssize_t failed = -1
        cdef int reason = 0
        cdef bint advised = False
        cdef Stored *blocks = <Stored *>PyMem_Malloc(max(1, count) * sizeof(Stored))
        cdef uint8_t *scratch = <uint8_t *>PyMem_Malloc(BLOCK_SIZE)
        cdef uint8_t *start = &target[0] if target.shape[0] else NULL
        cdef Stored *block
        payloads = []
        try:
            if blocks == NULL or scratch == NULL:
                raise MemoryError
            for place in range(count):
                block = &blocks[place]
                (
                    number, block.descriptor, block.offset, block.stored_bytes,
                    block.payload_bytes, block.is_raw, block.digest,
                ) = wanted[place]
                block.newest = self.newest[number]
                if not (
                    0 <= block.stored_bytes <= BLOCK_SIZE and 0 <= block.payload_bytes <= BLOCK_SIZE
                ):
                    return place, WRONG_SIZE, []
                block.payload = NULL
                payload = None
                if not block.is_raw:
                    payload = PyBytes_FromStringAndSize(NULL, block.payload_bytes)
                    block.payload = <uint8_t *>PyBytes_AS_STRING(payload)
                payloads.append(payload)
            for place in range(self.count):
                if self.pieces[place].into + self.pieces[place].length > target.shape[0]:
                    raise ValueError("the target is too short")
            with nogil:
                for place in range(count):
                    reason = _prove(
                        blocks, place, count, scratch, self.pieces, start, flags, &advised
                    )
                    if reason:
                        failed = place
                        break
        finally:
            PyMem_Free(blocks)
            PyMem_Free(scratch)
        return failed, reason, payloads

    def supply(self, Py_ssize_t number, const uint8_t[::1] block, uint8_t[::1] target):
        """Copy all that is wanted of a missing block. False when it leads out of the block."""
        cdef Py_ssize_t index = self.newest[number]
        cdef Piece *piece
        while index >= 0:
            piece = &self.pieces[index]
            if piece.offset + piece.length > block.shape[0]:
                return False
            if piece.into + piece.length > target.shape[0]:
                raise ValueError("the target is too short")
            memcpy(&target[piece.into], &block[piece.offset], piece.length)
            index = piece.before
        return True

    def read(self, dict descriptors, uint8_t[::1] target, int flags):
        """Do the reads: (0, 0, 0), or (errno, file as in ``files``, offset) of the one that failed.

        An errno of -1: a segment's file ends too soon.
        """
        cdef Py_ssize_t index, place = -1
        cdef Piece *piece
        cdef int failed = 0
        cdef uint8_t *start = &target[0] if target.shape[0] else NULL
        for index in range(self.count):
            piece = &self.pieces[index]
            if piece.source > MISSING:
                if piece.into + piece.length > target.shape[0]:
                    raise ValueError("the target is too short")
                piece.descriptor = descriptors[piece.source]
        if flags:
            # What never waits is over before another thread would have given the lock back.
            failed = _read_all(self.pieces, self.count, start, flags, &place)
        else:
            with nogil:
                failed = _read_all(self.pieces, self.count, start, flags, &place)
        if failed:
            return failed, self.pieces[place].source, self.pieces[place].offset
        return 0, 0, 0


cdef int _read_all(
    Piece *pieces, Py_ssize_t count, uint8_t *target, int flags, Py_ssize_t *place
) noexcept nogil:
    cdef Py_ssize_t index
    cdef int failed
    for index in range(count):
        if pieces[index].source > MISSING:
            failed = _read(&pieces[index], target + pieces[index].into, flags)
            if failed:
                place[0] = index
                return failed
    return 0


cdef int _read(const Piece *piece, uint8_t *target, int flags) noexcept nogil:
    cdef int failed = _read_range(piece.descriptor, target, piece.length, piece.offset, flags)
    return 0 if failed == -1 and piece.source == IMAGE else failed


cdef int _read_range(
    int descriptor, uint8_t *target, int64_t length, int64_t offset, int flags
) noexcept nogil:
    cdef iovec vector
    cdef int64_t done = 0
    cdef ssize_t count
    while done < length:
        vector.iov_base = target + done
        vector.iov_len = length - done
        count = preadv2(descriptor, &vector, 1, offset + done, flags)
        if count < 0:
            if errno == EINTR:
                continue
            return errno
        if count == 0:
            return -1
        done += count
    return 0


cdef int _prove(
    Stored *blocks, Py_ssize_t place, Py_ssize_t count, uint8_t *scratch,
    const Piece *pieces, uint8_t *target, int flags, bint *advised,
) noexcept nogil:
    cdef Stored *block = &blocks[place]
    cdef int failed = _read_range(
        block.descriptor, scratch, block.stored_bytes, block.offset, RWF_NOWAIT
    )
    cdef Py_ssize_t other
    cdef const uint8_t *payload = scratch
    if failed == EAGAIN or failed == EOPNOTSUPP or failed == -1:
        if flags & RWF_NOWAIT:
            return EAGAIN
        # One after the other each would be a wait: the device gets them all at once.
        for other in range(count if advised[0] else place, count):
            posix_fadvise(
                blocks[other].descriptor, blocks[other].offset, blocks[other].stored_bytes,
                POSIX_FADV_WILLNEED,
            )
        advised[0] = True
        failed = _read_range(block.descriptor, scratch, block.stored_bytes, block.offset, 0)
    if failed:
        return failed
    if XXH3_64bits(scratch, block.stored_bytes) != block.digest:
        return -2
    if block.is_raw:
        if block.stored_bytes != block.payload_bytes:
            return -3
    else:
        if LZ4_decompress_safe(
            <const char *>scratch, <char *>block.payload, <int>block.stored_bytes,
            <int>block.payload_bytes,
        ) != block.payload_bytes:
            return -3
        payload = block.payload
    cdef int64_t index = block.newest
    while index >= 0:
        if pieces[index].offset + pieces[index].length > block.payload_bytes:
            return -4
        memcpy(target + pieces[index].into, payload + pieces[index].offset, pieces[index].length)
        index = pieces[index].before
    return 0
