# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Newest wins, over compressed coordinates.

``paint(firsts, lasts, cells)``: entry k covers cells [firsts[k], lasts[k]); entries are ordered
oldest first. Returns int64[cells]: the newest entry that covers each cell, -1 where none does.

Entries are painted newest first and every cell once: ``next_free[i]`` leads from cell i to the
first cell not yet painted at or after it, with path halving (union-find), so the whole costs
O((entries + cells) * inverse Ackermann). Runs without the GIL.
"""

import numpy as np

from libc.stdint cimport int64_t


def paint(const int64_t[::1] firsts, const int64_t[::1] lasts, Py_ssize_t cells):
    if firsts.shape[0] != lasts.shape[0]:
        raise ValueError("firsts and lasts differ in length")
    winners_array = np.full(cells, -1, np.int64)
    next_free_array = np.arange(cells + 1, dtype=np.int64)
    cdef int64_t[::1] winners = winners_array
    cdef int64_t[::1] next_free = next_free_array
    cdef Py_ssize_t k
    cdef int64_t cell, last
    cdef Py_ssize_t left = cells
    with nogil:
        for k in range(firsts.shape[0] - 1, -1, -1):
            if left == 0:
                break
            cell = firsts[k]
            last = lasts[k]
            if cell < 0:
                cell = 0
            if last > cells:
                last = cells
            if cell >= last:
                continue
            cell = _free(next_free, cell)
            while cell < last:
                winners[cell] = k
                left -= 1
                next_free[cell] = cell + 1
                cell = _free(next_free, cell + 1)
    return winners_array


cdef inline int64_t _free(int64_t[::1] next_free, int64_t cell) noexcept nogil:
    while next_free[cell] != cell:
        next_free[cell] = next_free[next_free[cell]]
        cell = next_free[cell]
    return cell
