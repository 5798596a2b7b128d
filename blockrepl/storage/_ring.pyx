# cython: language_level=3, boundscheck=False, wraparound=False
"""Atomic access to the words of a shared mapping: what numpy and struct do not promise."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint64_t

cdef extern from "ring.h" nogil:
    uint64_t ring_load(const uint64_t *p)
    void ring_store(uint64_t *p, uint64_t v)
    int ring_swap(uint64_t *p, uint64_t expected, uint64_t desired)
    void ring_store_byte(uint8_t *p, uint8_t v)
    void ring_fence()


cdef class Words:
    """A writable buffer as aligned 64-bit words and bytes, addressed by byte offset."""

    cdef Py_buffer view

    def __cinit__(self, mapping):
        PyObject_GetBuffer(mapping, &self.view, PyBUF_SIMPLE | PyBUF_WRITABLE)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)  # harmless where nothing was taken

    cdef char *at(self, uint64_t offset, uint64_t size) except NULL:
        if offset + size > <uint64_t>self.view.len or (size == 8 and offset % 8):
            raise IndexError("outside the mapping")
        return <char *>self.view.buf + offset

    def load(self, uint64_t offset):
        return ring_load(<uint64_t *>self.at(offset, 8))

    def store(self, uint64_t offset, uint64_t value):
        ring_store(<uint64_t *>self.at(offset, 8), value)

    def swap(self, uint64_t offset, uint64_t expected, uint64_t desired):
        """Compare and swap; True when the word held ``expected``."""
        return bool(ring_swap(<uint64_t *>self.at(offset, 8), expected, desired))

    def fence(self):
        """Everything read before, numpy's reads too, is older than what is read after."""
        ring_fence()

    def store_byte(self, uint64_t offset, uint8_t value):
        ring_store_byte(<uint8_t *>self.at(offset, 1), value)
