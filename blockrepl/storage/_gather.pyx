# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Fill a buffer from the many places that a resolved window says its bytes are at.

``Gather`` walks the window's extents once and notes what is wanted:

==================  ==============================================================================
an extent's bytes   are
==================  ==============================================================================
zeros               zeros
of the base image   read from it; beyond its end they are zeros
of payload          read from the segment's file, each block proven once and decompressed (gather.h)
==================  ==============================================================================

``read`` does it all in one call. ``Blocks`` is what it keeps for the next one: frames' block tables
with what was proven of them, and the payload of compressed blocks, bounded in bytes each.
"""

from cpython.bytearray cimport PyByteArray_FromStringAndSize
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Realloc
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "gather.h" nogil:
    ctypedef bint c_bool "bool"
    struct kept:
        size_t bytes
    struct kept_value:
        pass
    int kept_init(kept *kept, size_t bytes_max)
    void kept_free(kept *kept)
    struct segment_file:
        int descriptor
        uint32_t place
        c_bool is_image
        const uint64_t *frames
        size_t frame_count
        uint64_t end
    struct want:
        uint32_t file
        uint32_t frame
        uint32_t block
        uint64_t offset
        uint64_t into
        uint64_t length
    struct blocks:
        kept tables
        kept payloads
    struct gather_failure:
        uint32_t file
        uint32_t frame
        uint32_t block
        uint64_t offset
    int gather_read(
        blocks *blocks, const segment_file *files, const want *wants, size_t count,
        uint8_t *target, uint64_t length, c_bool may_wait, size_t proofs_max,
        gather_failure *failure)
    enum:
        BLOCK_SHIFT
        BLOCK_SIZE
        C_ENDS_TOO_SOON "ENDS_TOO_SOON"
        C_WRONG_DIGEST "WRONG_DIGEST"
        C_WRONG_SIZE "WRONG_SIZE"
        C_LEADS_OUT "LEADS_OUT"
        C_WRONG_TABLE "WRONG_TABLE"

cdef enum:
    DATA = 0  # index.SHOWS_DATA
    BASE = 255  # index.SHOWS_BASE

BLOCK_BYTES = BLOCK_SIZE
# What may be wrong, beside an errno.
ENDS_TOO_SOON = C_ENDS_TOO_SOON
WRONG_DIGEST = C_WRONG_DIGEST
WRONG_SIZE = C_WRONG_SIZE
LEADS_OUT = C_LEADS_OUT
WRONG_TABLE = C_WRONG_TABLE
SHOWS_DATA = DATA
SHOWS_BASE = BASE
IMAGE = -1  # among a gather's files; a segment's place is that segment's file


def unfilled(Py_ssize_t size):
    """A bytearray of so many bytes, whatever they are: for a gather, which fills them all."""
    if size < 0:
        raise ValueError("a size is at least 0")
    return PyByteArray_FromStringAndSize(NULL, size)


cdef class Blocks:
    """What is kept between reads. May be used by several threads."""

    cdef blocks kept

    def __cinit__(self, size_t table_bytes_max, size_t payload_bytes_max):
        if kept_init(&self.kept.tables, table_bytes_max):
            raise MemoryError
        if kept_init(&self.kept.payloads, payload_bytes_max):
            raise MemoryError

    def __dealloc__(self):
        kept_free(&self.kept.tables)
        kept_free(&self.kept.payloads)

    @property
    def table_bytes(self):
        return self.kept.tables.bytes

    @property
    def payload_bytes(self):
        return self.kept.payloads.bytes


cdef class Gather:
    """What is wanted of [first, last) of a disk. ``files``: each IMAGE or a segment's place."""

    cdef want *wants
    cdef size_t count
    cdef size_t room
    cdef uint64_t length
    cdef dict numbers
    cdef readonly list files

    def __cinit__(self):
        self.wants = NULL
        self.count = self.room = 0
        self.numbers = {}
        self.files = []

    def __dealloc__(self):
        PyMem_Free(self.wants)

    def __init__(
        self,
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
        cdef uint32_t file = 0
        cdef int64_t place = IMAGE - 1
        if bounds.shape[0] != kinds.shape[0] + 1 or segments.shape[0] != kinds.shape[0]:
            raise ValueError("a window's arrays differ in length")
        if frames.shape[0] != kinds.shape[0] or positions.shape[0] != kinds.shape[0]:
            raise ValueError("a window's arrays differ in length")
        if first > last or first < bounds[0] or last > bounds[high - 1]:
            raise ValueError("a read leads out of its window")
        self.length = last - first
        while low < high:
            middle = (low + high) // 2
            if bounds[middle] <= at:
                low = middle + 1
            else:
                high = middle
        low -= 1
        while at < last:
            stop = min(bounds[low + 1], last)
            if kinds[low] == BASE:
                if place != IMAGE:
                    place = IMAGE
                    file = self._number(place)
                self._add(file, 0, 0, at, at - first, stop - at)
            elif kinds[low] == DATA:
                if place != segments[low]:
                    place = segments[low]
                    file = self._number(place)
                self._add_data(
                    file, frames[low], positions[low] + (at - bounds[low]), at - first, stop - at
                )
            at = stop
            low += 1

    cdef uint32_t _number(self, int64_t place) except? 0:
        number = self.numbers.get(place)
        if number is None:
            number = self.numbers[place] = len(self.files)
            self.files.append(place)
        return number

    cdef int _add_data(
        self, uint32_t file, uint32_t frame, uint64_t position, uint64_t into, uint64_t length
    ) except -1:
        cdef uint64_t skip, size
        while length > 0:
            skip = position & (BLOCK_SIZE - 1)
            size = min(length, BLOCK_SIZE - skip)
            self._add(file, frame, <uint32_t>(position >> BLOCK_SHIFT), skip, into, size)
            position += size
            into += size
            length -= size

    cdef int _add(
        self, uint32_t file, uint32_t frame, uint32_t block,
        uint64_t offset, uint64_t into, uint64_t length,
    ) except -1:
        cdef void *grown
        if self.count == self.room:
            self.room = 4 * self.room if self.room else 4
            grown = PyMem_Realloc(self.wants, self.room * sizeof(want))
            if grown == NULL:
                raise MemoryError
            self.wants = <want *>grown
        self.wants[self.count] = want(file, frame, block, offset, into, length)
        self.count += 1
        return 0

    def read(self, Blocks kept, opened, uint8_t[::1] target, bint may_wait, proofs_max):
        """Fill the target, whatever it holds. ``opened``: for each of ``files`` its descriptor,
        the offsets of its frames and where they end (an image: an empty array and 0).

        None, or (errno or what is wrong, number of the file, frame, block, offset in the file).
        Without ``may_wait``: EAGAIN where it would take a device's time, or the proof of more than
        ``proofs_max`` blocks.
        """
        cdef size_t count = len(self.files), most = proofs_max
        cdef Py_ssize_t number
        cdef segment_file *files
        cdef gather_failure failure
        cdef int failed
        cdef const uint64_t[::1] frames
        if <uint64_t>target.shape[0] < self.length:
            raise ValueError("the target is too short")
        if <size_t>len(opened) != count:
            raise ValueError("a file is lacking")
        if self.length == 0:
            return None
        cdef uint8_t *start = &target[0]
        held = []
        files = <segment_file *>PyMem_Calloc(count, sizeof(segment_file))
        if files == NULL:
            raise MemoryError
        try:
            for number in range(<Py_ssize_t>count):
                descriptor, offsets, end = opened[number]
                files[number].descriptor = descriptor
                files[number].is_image = self.files[number] == IMAGE
                if not files[number].is_image:
                    files[number].place = self.files[number]
                    frames = offsets
                    held.append(frames)
                    files[number].frames = &frames[0] if frames.shape[0] else NULL
                    files[number].frame_count = frames.shape[0]
                    files[number].end = end
            if may_wait:
                with nogil:
                    failed = gather_read(
                        &kept.kept, files, self.wants, self.count, start, self.length, True, most,
                        &failure,
                    )
            else:
                # What never waits is over before another thread would have given the lock back.
                failed = gather_read(
                    &kept.kept, files, self.wants, self.count, start, self.length, False, most,
                    &failure,
                )
        finally:
            PyMem_Free(files)
        if failed == 0:
            return None
        return failed, failure.file, failure.frame, failure.block, failure.offset
