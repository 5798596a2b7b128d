# cython: language_level=3, boundscheck=False, wraparound=False
"""nbdkit's callbacks, compiled: each hands the borrowed buffer to device.c with the GIL released.

nbdkit's Python plugin looks these functions up by name in the plugin's module. One process serves
one disk, so there is one device. Errors: nbdkit wants ``nbdkit.set_error(errno)`` and an exception.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.signal cimport SIG_IGN, signal
from libc.stdint cimport uint32_t, uint64_t

import os

cdef extern from "signal.h" nogil:
    enum:
        SIGHUP

cdef extern from "sys/prctl.h" nogil:
    enum:
        PR_SET_PDEATHSIG
    int prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)

cdef extern from "Python.h":
    ctypedef enum PyGILState_STATE:
        PyGILState_LOCKED
    PyGILState_STATE PyGILState_Ensure()
    void PyGILState_Release(PyGILState_STATE state)

cdef extern from "device.h" nogil:
    struct device:
        pass
    int device_open(device **out, int image_fd, int map_fd, int ring_fd, uint64_t size_bytes,
                    uint64_t region_bytes, uint64_t hot_regions_max)
    int device_start(device *device)
    void device_close(device *device)
    int device_read(device *device, void *data, uint32_t length, uint64_t offset)
    int device_write(device *device, const void *data, uint32_t length, uint64_t offset, int fua)
    int device_zero(device *device, uint32_t length, uint64_t offset, int may_trim, int fast,
                    int fua)
    int device_trim(device *device, uint32_t length, uint64_t offset, int fua)
    int device_flush(device *device)
    int device_extent(device *device, uint64_t offset, uint64_t length, uint64_t *extent_length,
                      int *hole)

cdef enum:  # nbdkit's constants
    FLAG_MAY_TRIM = 1
    FLAG_FUA = 2
    FLAG_REQ_ONE = 4
    FLAG_FAST_ZERO = 8
    EXTENT_HOLE_AND_ZERO = 3

cdef enum:
    EXTENTS_MAX = 1024  # a reply may be shorter than what was asked

cdef device *served = NULL
cdef uint64_t served_size = 0
cdef object set_error = None


def start(int image_fd, int map_fd, int ring_fd, uint64_t size_bytes, uint64_t region_bytes,
          uint64_t hot_regions_max, on_error):
    """Open the device over descriptors of the image, the hot map and the ring."""
    global served, served_size, set_error
    cdef int rc
    set_error = on_error
    outlive_parent()
    rc = device_open(&served, image_fd, map_fd, ring_fd, size_bytes, region_bytes, hot_regions_max)
    if rc == 0:
        rc = device_start(served)
    if rc:
        raise OSError(-rc, os.strerror(-rc))
    served_size = size_bytes


cdef void outlive_parent():
    """A guest's disk must not go with the shell that started its server.

    nbdkit 1.32 asks for SIGTERM when its parent ends, and takes SIGHUP for an order to quit.
    """
    prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
    signal(SIGHUP, SIG_IGN)


def stop():
    global served
    device_close(served)
    served = NULL


def open(readonly):
    """Keep Python's state of this thread, which serves the connection's requests, until `close`.

    nbdkit's Python plugin takes the state for each request and gives it back; the last to give it
    back ends it, so each request would make one and end one. Where a connection has other threads
    for its requests (PARALLEL), they do.
    """
    PyGILState_Ensure()
    return 1


def close(handle):
    """The thread that opened ends. Not called when nbdkit quits: the state goes with Python."""
    PyGILState_Release(PyGILState_LOCKED)


cdef int fail(int rc) except -1:
    set_error(-rc)
    raise OSError(-rc, os.strerror(-rc))


def get_size(handle):
    return served_size


def pread(handle, buffer, uint64_t offset, uint32_t flags):
    cdef Py_buffer view
    cdef int rc
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    with nogil:
        rc = device_read(served, view.buf, <uint32_t>view.len, offset)
    PyBuffer_Release(&view)
    if rc:
        fail(rc)


def pwrite(handle, buffer, uint64_t offset, uint32_t flags):
    cdef Py_buffer view
    cdef int rc
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    with nogil:
        rc = device_write(served, view.buf, <uint32_t>view.len, offset, (flags & FLAG_FUA) != 0)
    PyBuffer_Release(&view)
    if rc:
        fail(rc)


def zero(handle, uint32_t count, uint64_t offset, uint32_t flags):
    cdef int rc
    with nogil:
        rc = device_zero(served, count, offset, (flags & FLAG_MAY_TRIM) != 0,
                         (flags & FLAG_FAST_ZERO) != 0, (flags & FLAG_FUA) != 0)
    if rc:
        fail(rc)


def trim(handle, uint32_t count, uint64_t offset, uint32_t flags):
    cdef int rc
    with nogil:
        rc = device_trim(served, count, offset, (flags & FLAG_FUA) != 0)
    if rc:
        fail(rc)


def flush(handle, uint32_t flags):
    cdef int rc
    with nogil:
        rc = device_flush(served)
    if rc:
        fail(rc)


def extents(handle, uint32_t count, uint64_t offset, uint32_t flags):
    cdef uint64_t at = offset, end = offset + count, length
    cdef int rc, hole
    result = []
    while at < end and len(result) < EXTENTS_MAX:
        with nogil:
            rc = device_extent(served, at, end - at, &length, &hole)
        if rc:
            fail(rc)
        result.append((at, length, EXTENT_HOLE_AND_ZERO if hole else 0))
        at += length
        if flags & FLAG_REQ_ONE:
            break
    return result
