# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Newest wins: what a window shows of entries that overlap, by a sweep over it.

``sweep(starts, ends, ages, first, last)``: entry k covers [starts[k], ends[k]). Of two entries the
one is newer that is greater in the first of the columns ``ages`` in which they differ, or comes
later where they do not. Returns (starts, ends, winners) of flat extents without holes: the newest
entry that covers each, -1 where none does; neighbours differ.

The entries are sorted by start, which takes next to nothing where they come as a few parts that are
sorted. At any place of the sweep a heap holds the entries begun that may still show, the newest on
top; one that ends before the top does is never put there, so entries of one size, which most are,
hardly use it. O(n log n) at worst. Runs without the GIL.
"""

import numpy as np

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef struct Ages:
    const uint64_t *stamps  # NULL: their order says it
    const uint32_t *numbers
    const uint32_t *frames
    const uint32_t *positions


def sweep(
    const uint64_t[::1] starts, const uint64_t[::1] ends, ages, uint64_t first, uint64_t last
):
    """``ages``: None, or (stamps u64, segment numbers u32, frames u32, positions u32)."""
    cdef Py_ssize_t count = starts.shape[0], place = 0, held = 0, made = 0
    cdef const uint64_t[::1] stamps
    cdef const uint32_t[::1] numbers, frames, positions
    cdef Ages age = Ages(NULL, NULL, NULL, NULL)
    if ends.shape[0] != count:
        raise ValueError("starts and ends differ in length")
    new_starts = np.empty(2 * count + 1, np.uint64)
    new_ends = np.empty(2 * count + 1, np.uint64)
    new_winners = np.empty(2 * count + 1, np.int64)
    scratch = np.empty((2, max(1, count)), np.int64)
    cdef uint64_t[::1] out_starts = new_starts, out_ends = new_ends
    cdef int64_t[::1] out_winners = new_winners
    cdef int64_t[:, ::1] room = scratch
    cdef int64_t *order = &room[0, 0]
    cdef int64_t *heap = &room[1, 0]
    cdef uint64_t at = first, stop
    cdef int64_t entry, top
    if ages is not None and count:
        stamps, numbers, frames, positions = ages
        if not (
            stamps.shape[0] == numbers.shape[0] == frames.shape[0] == positions.shape[0] == count
        ):
            raise ValueError("the columns differ in length")
        age = Ages(&stamps[0], &numbers[0], &frames[0], &positions[0])
    with nogil:
        if count and _sort(&starts[0], order, heap, count):
            order, heap = heap, order
        while at < last:
            while place < count and starts[order[place]] <= at:
                entry = order[place]
                place += 1
                if ends[entry] > at and (
                    held == 0
                    or ends[entry] > ends[heap[0]]
                    or _is_newer(&age, entry, heap[0])
                ):
                    _push(&age, heap, held, entry)
                    held += 1
            while held and ends[heap[0]] <= at:
                held -= 1
                _pop(&age, heap, held)
            top = heap[0] if held else -1
            stop = last
            if held and ends[top] < stop:
                stop = ends[top]
            while place < count and starts[order[place]] < stop:
                entry = order[place]
                if ends[entry] > starts[entry]:
                    if held == 0 or _is_newer(&age, entry, top):
                        stop = starts[entry]
                        break
                    if ends[entry] > ends[top]:
                        _push(&age, heap, held, entry)
                        held += 1
                place += 1
            if made and out_winners[made - 1] == top:
                out_ends[made - 1] = stop
            else:
                out_starts[made] = at
                out_ends[made] = stop
                out_winners[made] = top
                made += 1
            at = stop
    return new_starts[:made], new_ends[:made], new_winners[:made]


cdef inline bint _is_newer(const Ages *age, int64_t one, int64_t other) noexcept nogil:
    if age.stamps != NULL:
        if age.stamps[one] != age.stamps[other]:
            return age.stamps[one] > age.stamps[other]
        if age.numbers[one] != age.numbers[other]:
            return age.numbers[one] > age.numbers[other]
        if age.frames[one] != age.frames[other]:
            return age.frames[one] > age.frames[other]
        if age.positions[one] != age.positions[other]:
            return age.positions[one] > age.positions[other]
    return one > other


cdef inline void _push(
    const Ages *age, int64_t *heap, Py_ssize_t held, int64_t entry
) noexcept nogil:
    cdef Py_ssize_t place = held, above
    while place:
        above = (place - 1) >> 1
        if _is_newer(age, heap[above], entry):
            break
        heap[place] = heap[above]
        place = above
    heap[place] = entry


cdef inline void _pop(const Ages *age, int64_t *heap, Py_ssize_t held) noexcept nogil:
    """Take the top off; ``held`` are left."""
    cdef int64_t entry = heap[held]
    cdef Py_ssize_t place = 0, below = 1
    while below < held:
        if below + 1 < held and _is_newer(age, heap[below + 1], heap[below]):
            below += 1
        if _is_newer(age, entry, heap[below]):
            break
        heap[place] = heap[below]
        place = below
        below = 2 * place + 1
    heap[place] = entry


cdef bint _sort(
    const uint64_t *keys, int64_t *one, int64_t *other, Py_ssize_t count
) noexcept nogil:
    """0 .. count - 1 by their keys, ascending; whether they are in ``other``.

    A merge sort that takes what ascends already as it is.
    """
    cdef Py_ssize_t at, middle, end, left, right, into, parts
    cdef int64_t *from_ = one
    cdef int64_t *to = other
    cdef bint swapped = False
    for at in range(count):
        from_[at] = at
    while True:
        at = parts = 0
        while at < count:
            parts += 1
            middle = _ascends(keys, from_, at, count)
            end = _ascends(keys, from_, middle, count) if middle < count else middle
            left, right, into = at, middle, at
            while left < middle and right < end:
                if keys[from_[right]] < keys[from_[left]]:
                    to[into] = from_[right]
                    right += 1
                else:
                    to[into] = from_[left]
                    left += 1
                into += 1
            memcpy(to + into, from_ + left, (middle - left) * sizeof(int64_t))
            into += middle - left
            memcpy(to + into, from_ + right, (end - right) * sizeof(int64_t))
            at = end
        from_, to = to, from_
        swapped = not swapped
        if parts <= 1:
            return swapped


cdef inline Py_ssize_t _ascends(
    const uint64_t *keys, const int64_t *entries, Py_ssize_t at, Py_ssize_t count
) noexcept nogil:
    """The end of what ascends from ``at`` on."""
    at += 1
    while at < count and keys[entries[at - 1]] <= keys[entries[at]]:
        at += 1
    return at


def places(
    const uint64_t[::1] starts, const uint64_t[::1] ends, const int64_t[::1] winners,
    const uint64_t[::1] run_starts, const uint8_t[::1] run_kinds,
    const uint32_t[::1] run_segments, const uint32_t[::1] run_frames,
    const uint32_t[::1] run_positions,
):
    """What ``sweep`` found, with the places of the winners' data in place of their numbers.

    Returns (starts, ends, kinds, segments, frames, positions). Kinds: 0 data, 1 zeros, 255 none of
    the entries; only data has a place. Extents that merely go on where the one before them ends are
    one with it.
    """
    cdef Py_ssize_t count = starts.shape[0], index, made = 0
    cdef int64_t winner
    cdef uint8_t kind
    cdef uint32_t segment, frame, position, behind = 0
    new_bounds = np.empty((2, count), np.uint64)
    new_kinds = np.empty(count, np.uint8)
    new_places = np.empty((3, count), np.uint32)
    cdef uint64_t[:, ::1] bounds = new_bounds
    cdef uint8_t[::1] kinds = new_kinds
    cdef uint32_t[:, ::1] out = new_places
    if ends.shape[0] != count or winners.shape[0] != count:
        raise ValueError("the extents' columns differ in length")
    if not (
        run_starts.shape[0] == run_kinds.shape[0] == run_segments.shape[0]
        == run_frames.shape[0] == run_positions.shape[0]
    ):
        raise ValueError("the entries' columns differ in length")
    for index in range(count):
        if winners[index] >= run_starts.shape[0]:
            raise ValueError("a winner is none of the entries")
    with nogil:
        for index in range(count):
            winner = winners[index]
            segment = frame = position = 0
            kind = 255
            if winner >= 0:
                kind = 1 if run_kinds[winner] else 0
                if kind == 0:
                    segment = run_segments[winner]
                    frame = run_frames[winner]
                    position = run_positions[winner] + <uint32_t>(
                        starts[index] - run_starts[winner]
                    )
            if made and kinds[made - 1] == kind and (
                kind != 0
                or (
                    out[0, made - 1] == segment
                    and out[1, made - 1] == frame
                    and behind == position
                )
            ):
                bounds[1, made - 1] = ends[index]
            else:
                bounds[0, made] = starts[index]
                bounds[1, made] = ends[index]
                kinds[made] = kind
                out[0, made] = segment
                out[1, made] = frame
                out[2, made] = position
                made += 1
            behind = position + <uint32_t>(ends[index] - starts[index])
    return (
        new_bounds[0, :made], new_bounds[1, :made], new_kinds[:made],
        new_places[0, :made], new_places[1, :made], new_places[2, :made],
    )
