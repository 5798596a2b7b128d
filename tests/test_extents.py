"""Newest-wins resolution against a byte painter that knows no theory."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.model import extents
from blockrepl.model._sweep import places

SPAN = st.tuples(st.integers(0, 40), st.integers(0, 20)).map(lambda s: (s[0], s[0] + s[1]))


def resolve(spans: list[tuple[int, int]], first: int, last: int) -> extents.Extents:
    starts = np.array([s for s, _ in spans], np.uint64)
    ends = np.array([e for _, e in spans], np.uint64)
    return extents.resolve(starts, ends, first, last)


@given(st.lists(SPAN, max_size=25), st.integers(0, 40), st.integers(0, 30))
def test_every_byte_shows_the_newest_record_that_covers_it(
    spans: list[tuple[int, int]], first: int, size: int
) -> None:
    naive = [-1] * 100
    for index, (start, end) in enumerate(spans):
        naive[start:end] = [index] * (end - start)
    flat = resolve(spans, first, first + size)
    shown: list[int] = []
    for start, end, winner in zip(flat.starts, flat.ends, flat.winners, strict=True):
        assert start == first + len(shown)
        assert end > start
        shown += [int(winner)] * int(end - start)
    assert shown == naive[first : first + size]
    assert not (flat.winners[1:] == flat.winners[:-1]).any()


def test_an_empty_window_has_no_extents() -> None:
    assert len(resolve([(0, 10)], 5, 5)) == 0


def test_offsets_near_the_end_of_the_number_range_survive() -> None:
    top = (1 << 63) - 4096
    flat = resolve([(top, top + 4096)], top - 4096, top + 4096)
    assert flat.winners.tolist() == [-1, 0]


def test_a_hundred_thousand_overlapping_records_resolve_in_well_under_a_second() -> None:
    generator = np.random.default_rng(1)
    starts = generator.integers(0, 1 << 24, 100_000).astype(np.uint64)
    ends = starts + generator.integers(1, 1 << 16, 100_000).astype(np.uint64)
    flat = extents.resolve(starts, ends, 0, 1 << 24)
    assert int((flat.ends - flat.starts).sum()) == 1 << 24


@given(st.data())
def test_the_order_in_which_entries_are_given_does_not_matter_with_their_ages(
    data: st.DataObject,
) -> None:
    spans = data.draw(st.lists(SPAN, max_size=25))
    few = st.integers(0, 2)
    ages = data.draw(st.lists(st.tuples(few, few, few), min_size=len(spans), max_size=len(spans)))
    keys = [(*age, position) for position, age in enumerate(ages)]  # the last one is always new
    order = sorted(range(len(spans)), key=lambda entry: keys[entry])
    in_order = resolve([spans[entry] for entry in order], 5, 50)
    columns = np.array(keys, np.uint32).reshape(-1, 4).T.copy()
    starts = np.array([s for s, _ in spans], np.uint64)
    ends = np.array([e for _, e in spans], np.uint64)
    flat = extents.resolve(
        starts, ends, 5, 50, (columns[0].astype(np.uint64), columns[1], columns[2], columns[3])
    )
    assert flat.starts.tolist() == in_order.starts.tolist()
    assert flat.ends.tolist() == in_order.ends.tolist()
    found = [extents.BASE if winner < 0 else order[winner] for winner in in_order.winners]
    assert flat.winners.tolist() == found


@given(st.lists(st.tuples(SPAN, st.integers(0, 2), st.integers(0, 1), st.integers(0, 9))))
def test_places_are_those_of_the_winners_byte_by_byte(
    entries: list[tuple[tuple[int, int], int, int, int]],
) -> None:
    flat = resolve([span for span, *_ in entries], 5, 60)
    starts, ends, kinds, segments, frames, positions = places(
        flat.starts,
        flat.ends,
        flat.winners,
        np.array([span[0] for span, *_ in entries], np.uint64),
        np.array([kind for _, kind, _, _ in entries], np.uint8),
        np.array([segment for _, _, segment, _ in entries], np.uint32),
        np.array([segment + 7 for _, _, segment, _ in entries], np.uint32),
        np.array([position for *_, position in entries], np.uint32),
    )
    wanted: list[tuple[int, ...]] = []
    for start, end, winner in zip(flat.starts, flat.ends, flat.winners, strict=True):
        for at in range(int(start), int(end)):
            (begin, _), kind, segment, position = (
                entries[winner] if winner >= 0 else ((0, 0), 9, 0, 0)
            )
            if winner < 0 or kind:
                wanted.append((1 if winner >= 0 else 255, 0, 0, 0))
            else:
                wanted.append((0, segment, segment + 7, position + at - begin))
    found: list[tuple[int, ...]] = []
    columns = (starts, ends, kinds, segments, frames, positions)
    for start, end, kind, segment, frame, position in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        assert start == 5 + len(found)
        first = (kind, segment, frame, position)
        after = (kind, *found[-1][1:3], found[-1][3] + (kind == 0)) if found else ()
        assert not found or found[-1][0] != kind or first != after
        for at in range(end - start):
            found.append((kind, segment, frame, position + (at if kind == 0 else 0)))
    assert found == wanted
